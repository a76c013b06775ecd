#!/usr/bin/env bash
# Compares REINFORCE++ with PPO, GRPO and others on two CPU cores, by the protocol of
# docs/reproduction.md.
#
#   bash launch/reproduce.sh [speed] [length] [math] [--seeds 1 2 3] [--quick]
#
#   RUN=runs/reproduction   where the runs are; finished ones stay as they are, interrupted ones resume
#   --quick                 two minutes with very few steps, to see that everything works; results go
#                           to RUN/quick. Without it they go to docs.
#
# Relative paths are relative to the directory where it is called.
set -euo pipefail
repository=$(dirname -- "$(dirname -- "$(readlink -f -- "$0")")")
bash "$repository/launch/install.sh"
exec "$repository/.venv/bin/python" "$repository/tools/reproduce.py" run "$@"
