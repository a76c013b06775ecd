#!/usr/bin/env bash
# Sets up .venv and runs every test, two files at a time. Arguments go to pytest instead.
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/install.sh requirements.txt requirements-dev.txt
bash tests/launch/install_slurm.sh
(($#)) || set -- --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 15 tests
exec .venv/bin/python -m pytest "$@"
