# Sourced by torchrun.sh and slurm_task.sh: sets `python`, the interpreter, and the ranks' variables.
# `repository` must be set. The working directory stays, so relative paths are the caller's.
# shellcheck shell=bash disable=SC2034,SC2154  # what the two scripts read and have set
python=python3
if [[ ${VENV:-} == none ]]; then
  : # python3 of the PATH, as in launch/Dockerfile
elif [[ -n ${VENV:-} ]]; then
  [[ $VENV == /* ]] || VENV=$PWD/$VENV
  python=$VENV/bin/python
  if [[ ! -x $python ]]; then
    echo "error: VENV: there is no $python: name a virtual environment, or none" >&2
    exit 2
  fi
elif [[ -x $repository/.venv/bin/python ]]; then
  python=$repository/.venv/bin/python
fi
export PYTHONPATH=$repository${PYTHONPATH:+:$PYTHONPATH}
# Megatron orders communication before computation on the GPU's one queue.
export CUDA_DEVICE_MAX_CONNECTIONS=1
# Each rank chooses its own number of threads: its share of the host's cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
