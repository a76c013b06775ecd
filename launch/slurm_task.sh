#!/usr/bin/env bash
# Runs one rank, started by srun: sets torchrun's variables from SLURM's, then runs the program.
set -euo pipefail
repository=$(dirname -- "$(dirname -- "$(readlink -f -- "$0")")")
export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES)) GROUP_WORLD_SIZE=$SLURM_NNODES
if [[ $SLURM_NNODES == 1 ]]; then # otherwise gloo resolves this machine's name
  export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo}
fi
# shellcheck source=launch/environment.sh
source "$repository/launch/environment.sh"
exec "$python" -P -m megatron_rpp.launcher.rank "$@"
