#!/usr/bin/env bash
# Trains a model with REINFORCE++ from a fresh clone: on two GPUs, on one, or without a GPU on two CPU
# cores.
#
#   bash launch/quickstart.sh [--section.key value ...]
#
#   RUN=runs/quickstart   where everything is written; a finished run stays as it is, an interrupted
#                         one resumes
#   NPROC=2               processes; the layout is the recipe's parallel section, so for example
#                         NPROC=1 RUN=runs/tp1 bash launch/quickstart.sh --parallel.tensor 1
#                         Without NPROC, a single GPU gets one process and --parallel.tensor 1.
#
# Relative paths are relative to the directory where it is called.
set -euo pipefail
repository=$(dirname -- "$(dirname -- "$(readlink -f -- "$0")")")
python=$repository/.venv/bin/python
RUN=${RUN:-runs/quickstart}
[[ $RUN == /* ]] || RUN=$PWD/$RUN
say() { printf '\n[%s] %s\n' "$(printf '%d:%02d' $((SECONDS / 60)) $((SECONDS % 60)))" "$*"; }

say "1/5  environment"
bash "$repository/launch/install.sh"
layout=()
if [[ -z ${NPROC:-} ]]; then
  NPROC=2
  # A GPU takes one process, so a single GPU holds the whole model.
  if [[ $("$python" -c "import torch; print(torch.cuda.device_count())") == 1 ]]; then
    NPROC=1 layout=(--parallel.tensor 1)
  fi
fi
settings=(
  --config "$repository/launch/recipes/quickstart.yaml" "${layout[@]}"
  --data.train "$RUN/data/train.jsonl" --data.eval "$RUN/data/eval.jsonl"
  --data.tokenizer "$RUN/data/tokenizer.model"
  --sft.dir "$RUN/sft" --checkpoint.dir "$RUN/checkpoints" --logging.dir "$RUN/logs"
  "$@"
)
say "2/5  task and tokenizer"
"$python" "$repository/tools/make_task.py" "${settings[@]}"
say "3/5  supervised warm start, $NPROC processes"
bash "$repository/launch/torchrun.sh" --nproc-per-node "$NPROC" sft "${settings[@]}"
say "4/5  REINFORCE++, $NPROC processes"
bash "$repository/launch/torchrun.sh" --nproc-per-node "$NPROC" train "${settings[@]}" \
  --model.init_path "$RUN/sft"
say "5/5  result"
"$python" "$repository/tools/report.py" "${settings[@]}"
