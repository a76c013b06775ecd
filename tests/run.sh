#!/usr/bin/env bash
# Sets up .venv and runs every test. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/install.sh requirements.txt requirements-dev.txt
bash tests/launch/install_slurm.sh
exec .venv/bin/python -m pytest "${@:-tests}"
