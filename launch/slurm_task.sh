#!/usr/bin/env bash
# One rank, started by srun: torchrun's variables from SLURM's, then the program.
set -euo pipefail
cd "$(dirname "$0")/.."
program=$1
shift
export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES)) GROUP_WORLD_SIZE=$SLURM_NNODES
# As in torchrun.sh.
export CUDA_DEVICE_MAX_CONNECTIONS=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
python=python3
[[ -x ${VENV:=.venv}/bin/python ]] && python=$VENV/bin/python
exec "$python" -m "megatron_rpp.$program" "$@"
