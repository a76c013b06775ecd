#!/usr/bin/env bash
# Starts a program of this package on one node or many.
#
#   bash launch/torchrun.sh [TORCHRUN OPTIONS] train|sft --config FILE [--section.key value ...]
#
#   one node:    bash launch/torchrun.sh --nproc-per-node 8 train --config FILE
#   many nodes:  the same line on every node, with
#                --nnodes 2 --rdzv-endpoint FIRST_NODE:29500 --rdzv-id ANY_NAME
#
# Exits with the code of the ranks: 0 done, 2 refused, 75 saved after SIGTERM or SIGUSR1 (run it
# again), anything else a failure. --max-restarts N starts crashed ranks again.
set -euo pipefail
cd "$(dirname "$0")/.."

options=()
while [[ $# -gt 0 && $1 != train && $1 != sft ]]; do
  options+=("$1")
  shift
done
if [[ $# -eq 0 ]]; then
  sed -n '2,11s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
program=$1
shift

if [[ " ${options[*]-}" == *" --nnodes"* ]]; then
  options+=(--rdzv-backend c10d)
else
  options+=(--standalone)
fi
# Megatron orders communication before computation on the GPU's one queue.
export CUDA_DEVICE_MAX_CONNECTIONS=1
# Each rank takes its share of the host's cores by itself.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

python=python3
[[ -x ${VENV:=.venv}/bin/python ]] && python=$VENV/bin/python
exec "$python" -m megatron_rpp.torchrun "${options[@]}" -m "megatron_rpp.$program" "$@"
