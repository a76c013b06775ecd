#!/usr/bin/env bash
# Tests rollout.engine vllm with the real vLLM on a CPU, which takes up to half an hour on two cores.
#
#   bash tests/vllm.sh [PYTEST_WORD ...]
#
# vLLM's environment is made in runs/vllm, unless VLLM_PYTHON names the Python of another one.
set -euo pipefail
cd "$(dirname "$0")/.."
export VLLM_PYTHON=${VLLM_PYTHON:-$PWD/runs/vllm/bin/python}
bash launch/install.sh requirements.txt requirements-dev.txt
if [[ ! -x $VLLM_PYTHON ]]; then
  "${PYTHON:-python3.11}" -m venv runs/vllm
  read -ra index < <(bash launch/cpu_index.sh runs/vllm/bin/python) || true
  runs/vllm/bin/pip install --quiet --no-deps "${index[@]}" -r tools/requirements-vllm.txt
fi
(($#)) || set -- tests/vllm
exec .venv/bin/python -m pytest -m vllm "$@"
