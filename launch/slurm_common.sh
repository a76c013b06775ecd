# Sourced by slurm.sbatch and slurm_per_gpu.sbatch: settings, the command, and requeuing.
# `launch` is the directory of this file. Relative paths are relative to the job's working
# directory: the directory where sbatch was called, or its --chdir.
# shellcheck shell=bash disable=SC2034,SC2154  # what the two scripts read and have set
#
# Variables of the environment (sbatch passes them on), all optional:
#   RUN=DIR               checkpoints, logs and this script's notes (default runs/<job name>)
#   NPROC_PER_NODE=N      ranks a node (default: the node's GPUs, else 1)
#   MODULES="A B"         modules to load
#   VENV=DIR              virtual environment (default .venv of the repository, else python3; in an
#                         image of launch/Dockerfile its python3); none = python3
#   CONTAINER_IMAGE=IMG   runs in this image (needs SLURM's pyxis plugin)
#   CONTAINER_MOUNTS=A:B  further mounts; working directory and repository keep their paths
#   SECRETS="A B"         names of variables that must be set and reach the ranks; never printed
#   MAX_STALLED=3         requeues without a newer checkpoint before the job gives up
#   MASTER_PORT=N         port of the rendezvous (default: computed from the job's number)
#   DRYRUN=1              print what would run, also outside SLURM

refuse() {
  echo "error: $*" >&2
  exit 2
}

# Checks the settings above, and sets the directories of this job (of this seed, in an array).
prepare() {
  [[ $# -gt 0 && $1 =~ ^(train|sft|reward_model)$ ]] ||
    refuse "say what to run: sbatch [SBATCH OPTIONS] SCRIPT train|sft|reward_model --config FILE [...]"
  local word name
  for word in "$@"; do
    case $word in
      --checkpoint.dir* | --logging.dir* | --sft.dir* | --reward_model.dir* | --save | --save=* | \
        --tensorboard-dir*)
        refuse "$word: the script sets the directories, set RUN=DIR instead" ;;
    esac
  done
  for name in ${SECRETS:-}; do
    [[ -n ${!name:-} ]] || refuse "SECRETS names $name, which is not set: export it before sbatch"
    export "${name?}"
  done
  RUN=${RUN:-runs/${SLURM_JOB_NAME:-megatron_rpp}}
  [[ $RUN != -* ]] || RUN=./$RUN # otherwise it would be read as an option
  local seed=()
  if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
    RUN=$RUN/seed-$SLURM_ARRAY_TASK_ID
    seed=(--seed "$SLURM_ARRAY_TASK_ID")
  fi
  checkpoints=$RUN/checkpoints
  [[ $1 == train ]] || checkpoints=$RUN/$1
  program=("$@" "${seed[@]}" --checkpoint.dir "$RUN/checkpoints" --logging.dir "$RUN/logs"
    --sft.dir "$RUN/sft" --reward_model.dir "$RUN/reward_model")
  notes=$RUN/slurm/${SLURM_JOB_ID:-JOB}
  steplog=$notes/restart-${SLURM_RESTART_COUNT:-0}
  nproc=${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
  nodes=${SLURM_NNODES:-1}
  MASTER_PORT=${MASTER_PORT:-$((20000 + ${SLURM_JOB_ID:-0} % 10000))}
  MASTER_ADDR=$(first_node)
  export MASTER_ADDR MASTER_PORT VENV
}

# Prints the address by which SLURM reaches the job's first node; one node needs no network.
first_node() {
  if [[ $nodes == 1 ]]; then
    echo 127.0.0.1
    return
  fi
  if [[ -z ${SLURM_JOB_NODELIST:-} ]]; then
    echo FIRST_NODE
    return
  fi
  local first
  first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  scontrol show node "$first" | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2
}

# Sets `step`, srun and its options. --wait=120: ranks end on their own, so a rank that still runs
# two minutes after the first one has ended is stuck. All codes matter: no kill-on-bad-exit.
step_options() {
  step=(srun --kill-on-bad-exit=0 --wait=120 --cpu-bind=none --export=ALL
    --output="$steplog/node%n.%N.task%t.log" "$@")
  if [[ -n ${CONTAINER_IMAGE:-} ]]; then
    local mounts=$PWD:$PWD repository
    repository=$(readlink -f -- "$launch/..")
    [[ $repository == "$PWD" ]] || mounts+=,$repository:$repository
    step+=(--container-image="$CONTAINER_IMAGE" --container-workdir="$PWD"
      --container-mounts="$mounts${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}")
    local names="MASTER_ADDR MASTER_PORT ${VENV:+VENV} ${SECRETS:-}"
    step+=(--container-env="$(tr -s ' ' , <<<"${names% }")")
  fi
}

show() {
  echo "directory: $PWD"
  echo "modules: ${MODULES:-none}; virtual environment: ${VENV:-.venv if present}"
  echo "environment: MASTER_ADDR=$MASTER_ADDR MASTER_PORT=$MASTER_PORT"
  [[ -n ${SECRETS:-} ]] && echo "secrets, by name: $SECRETS"
  echo "logs: $steplog"
  echo "command: $(printf '%q ' "$@")"
}

# Runs the command, passing SIGUSR1 (the time limit is near) and SIGTERM on to it.
run_step() {
  local signalled='' code
  if [[ -n ${MODULES:-} ]]; then
    # shellcheck disable=SC2086  # several names
    module load $MODULES
  fi
  mkdir -p "$steplog"
  show "$@"
  "$@" &
  local pid=$!
  trap 'signalled=1; kill -USR1 $pid 2>/dev/null' USR1
  trap 'signalled=1; kill -TERM $pid 2>/dev/null' TERM
  code=0
  wait "$pid" || code=$?
  while kill -0 "$pid" 2>/dev/null; do # a signal ended the wait, not the command
    code=0
    wait "$pid" || code=$?
  done
  trap - USR1 TERM
  echo "the step ended with code $code${signalled:+ after a signal}; its logs: $steplog"
  finish "$code"
}

# Codes 0 (done) and 2 (invalid configuration) end the job. After any other code (75: saved before
# the time limit; a crash; a lost node) it is requeued, unless MAX_STALLED requeues in a row
# brought no newer checkpoint.
finish() {
  local code=$1
  [[ $code == 0 || $code == 2 ]] && exit "$code"
  local pointer=$checkpoints/latest_checkpointed_iteration.txt now=none before='' stalled=0
  [[ -f $pointer ]] && now=$(<"$pointer")
  [[ -f $notes/progress ]] && read -r before stalled <"$notes/progress"
  if [[ $now == "$before" ]]; then stalled=$((stalled + 1)); else stalled=0; fi
  echo "$now $stalled" >"$notes/progress"
  if ((stalled >= ${MAX_STALLED:-3})); then
    echo "error: $stalled requeues and the newest checkpoint is still '$now': not requeued again" >&2
    exit "$code"
  fi
  echo "newest checkpoint: $now; requeued"
  scontrol requeue "$SLURM_JOB_ID"
  exit "$code"
}
