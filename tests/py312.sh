#!/usr/bin/env bash
# Runs the tests on Python 3.12 with megatron-core 0.19, the versions for GPUs; no GPU is needed.
#
#   bash tests/py312.sh [WORDS OF tests/run.sh]
#
# The tests of the current commit run in a clone with an environment of its own, which is kept for the
# next time: CLONE=DIR (default runs/py312). For Python 3.12 the registry has only the CUDA build of
# torch, so the environment takes 6 GB where PyTorch's own index is not reachable.
set -euo pipefail
cd "$(dirname "$0")/.."
clone=${CLONE:-runs/py312}
if [[ ! -d $clone/.git ]]; then
  git clone --quiet . "$clone"
fi
git -C "$clone" fetch --quiet "$PWD" HEAD
git -C "$clone" checkout --quiet --detach FETCH_HEAD

if [[ ! -x $clone/.venv/bin/python ]]; then
  for python in "${PYTHON:-python3.12}" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python; do
    ! "$python" --version 2>/dev/null | grep -q '^Python 3\.12' || break
  done
  PYTHON=$python bash "$clone/launch/install.sh" --cpu requirements.txt requirements-dev.txt
fi
"$clone/.venv/bin/python" -c "import importlib.metadata as m, platform as p; print(
  f'Python {p.python_version()}, torch {m.version(\"torch\")}, megatron-core {m.version(\"megatron-core\")}')"
exec bash "$clone/tests/run.sh" "$@"
