#!/usr/bin/env bash
# Sets up .venv and runs the tests, three files at a time: many tests wait, for a time limit or for SLURM.
#
#   bash tests/run.sh                  all tests
#   bash tests/run.sh --fast           a quick subset, under two minutes in total
#   bash tests/run.sh PYTEST_WORD ...  pytest with these words instead
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/install.sh requirements.txt requirements-dev.txt
shared=(--numprocesses 3 --dist loadfile --no-loadscope-reorder --durations 15)
if [[ ${1:-} == --fast ]]; then
  shift
  set -- "${shared[@]}" -m "not slow" "$@" tests
else
  bash tests/launch/install_slurm.sh
  (($#)) || set -- "${shared[@]}" tests
fi
exec .venv/bin/python -m pytest "$@"
