#!/usr/bin/env bash
# Starts a program of this package on one node or many, from any directory.
#
#   bash launch/torchrun.sh [TORCHRUN OPTIONS] train|sft|reward_model --config FILE \
#       [--section.key value ...]
#
#   one node:    bash launch/torchrun.sh --nproc-per-node 8 train --config FILE
#   many nodes:  the same line on every node, with
#                --nnodes 2 --rdzv-endpoint FIRST_NODE:29500 --rdzv-id ANY_NAME
#
# Exits with the code of the ranks: 0 done, 2 invalid configuration, 75 saved after SIGTERM or
# SIGUSR1 (run it again), any other code a failure. --max-restarts N restarts crashed ranks.
set -euo pipefail
repository=$(dirname -- "$(dirname -- "$(readlink -f -- "$0")")")

# If an option is given twice, the last one counts.
options=(--nnodes 1 --rdzv-backend c10d)
while [[ $# -gt 0 && ! $1 =~ ^(train|sft|reward_model)$ ]]; do
  options+=("$1")
  shift
done
if [[ $# -eq 0 ]]; then
  sed -n '2,12s/^# \{0,1\}//p' "$repository/launch/torchrun.sh" >&2
  exit 2
fi

# shellcheck source=launch/environment.sh
source "$repository/launch/environment.sh"
exec "$python" -P -m megatron_rpp.torchrun "${options[@]}" \
  --no-python "$python" -P -u -m megatron_rpp.launcher.rank "$@"
