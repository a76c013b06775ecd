# Sourced by torchrun.sh and slurm_task.sh: the interpreter, in `python`, and what ranks inherit.
# `repository` is set. The working directory stays the caller's: relative paths are his.
# shellcheck shell=bash disable=SC2034,SC2154  # what the two scripts read and have set
python=python3
if [[ -n ${VENV:-} ]]; then
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
# Each rank takes its share of the host's cores by itself.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
