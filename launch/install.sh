#!/usr/bin/env bash
# Makes .venv with the pinned requirements; quick if they have not changed.
#
#   bash launch/install.sh [--gpu | --cpu] [--dry-run] [REQUIREMENTS FILE ...]
#
#   --gpu       Python 3.12 or newer and requirements-gpu.txt, which compiles TransformerEngine (10 to
#               40 minutes). The default where nvidia-smi lists a GPU.
#   --cpu       requirements.txt alone; the default elsewhere
#   --dry-run   print what would be installed
#
# Without a switch, a .venv that is there stays what it is. The files default to requirements.txt.
# PYTHON=FILE names the interpreter for a new .venv.
set -euo pipefail
cd "$(dirname "$0")/.."

refuse() {
  echo "error: $*" >&2
  exit 2
}

# Whether $1 is an interpreter, Python 3.$2 or newer.
is_python() {
  "$1" -c "import sys; sys.exit(sys.version_info < (3, $2))" 2>/dev/null
}

# Sets `python` to the interpreter for a new .venv of this kind.
choose_python() {
  local least=11 remedy="install it" candidate
  local candidates=(python3.11 python3)
  if [[ $kind == gpu ]]; then
    least=12 candidates=(python3.12 python3.13 python3)
    remedy="megatron-core 0.19 and TransformerEngine need it. Install it, or use launch/Dockerfile, or"
    remedy+=" install for the CPU with --cpu"
  fi
  candidates+=("${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[2-9]*/bin/python)
  [[ -z ${PYTHON:-} ]] || candidates=("$PYTHON")
  for candidate in "${candidates[@]}"; do
    if is_python "$candidate" "$least"; then
      python=$candidate
      return
    fi
  done
  local found="none was found"
  [[ -z ${PYTHON:-} ]] || found="PYTHON=$PYTHON is not"
  refuse "an environment for the ${kind^^} needs Python 3.$least or newer, and $found: $remedy." \
    "PYTHON=FILE names an interpreter"
}

kind='' dry_run=''
while [[ ${1:-} == --* ]]; do
  case $1 in
    --gpu | --cpu) kind=${1#--} ;;
    --dry-run) dry_run=1 ;;
    *) refuse "$1: the options are --gpu, --cpu and --dry-run" ;;
  esac
  shift
done
files=("${@:-requirements.txt}")

machine=cpu
if nvidia-smi -L 2>/dev/null | grep -q '^GPU '; then
  machine=gpu
fi
if [[ -x .venv/bin/python ]]; then
  there=$(cat .venv/kind 2>/dev/null || echo cpu)
  [[ ${kind:-$there} == "$there" ]] ||
    refuse "--$kind: .venv is one for the ${there^^}: remove it (rm -r .venv) to make another"
  if [[ -z $kind && $there != "$machine" ]]; then
    echo "environment .venv: for the ${there^^}, though this is a machine for the ${machine^^}; to" \
      "change that, remove it (rm -r .venv) and use --$machine" >&2
  fi
  kind=$there python=.venv/bin/python
else
  kind=${kind:-$machine}
  choose_python
fi

read_by_pip=(requirements.txt pyproject.toml)
if [[ $kind == gpu ]]; then
  read_by_pip+=(requirements-gpu-build.txt)
  for index in "${!files[@]}"; do
    [[ ${files[index]} != requirements.txt ]] || files[index]=requirements-gpu.txt
  done
fi
if [[ -n $dry_run ]]; then
  echo "kind: $kind"
  echo "python: $python"
  echo "files: ${files[*]}"
  exit 0
fi

stamp=.venv/installed-$(cat <(echo "$kind") "${files[@]}" "${read_by_pip[@]}" | sha256sum | cut -c1-16)
if [[ -f $stamp ]]; then
  echo "environment .venv: unchanged"
  exit 0
fi
[[ -x .venv/bin/python ]] || "$python" -m venv .venv
echo "$kind" >.venv/kind
pip=(.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-warn-conflicts
  --no-compile)

index=()
[[ $kind != cpu ]] || read -ra index < <(bash launch/cpu_index.sh "$python") || true
torch=$(grep '^torch==' requirements.txt)
echo "environment .venv, ${kind^^}: installing $torch"
"${pip[@]}" "${index[@]}" "$torch"

# TransformerEngine comes as source. It is compiled against the installed torch, and with the headers
# of CUDA from the registry, so neither a GPU nor a CUDA toolkit is needed.
install_for_gpu() {
  local site
  site=$(.venv/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/nvidia
  local include=$site/cu13/include:$site/nccl/include:$site/cudnn/include
  "${pip[@]}" -r requirements.txt -r requirements-gpu-build.txt
  echo "environment .venv, GPU: compiling TransformerEngine, which takes 10 to 40 minutes"
  PATH=$PWD/.venv/bin:$PATH NVTE_FRAMEWORK=pytorch CUDA_HOME=$site/cu13 \
    CPLUS_INCLUDE_PATH=$include C_INCLUDE_PATH=$include \
    "${pip[@]}" --no-build-isolation -r requirements-gpu.txt
}

[[ $kind == cpu ]] || install_for_gpu
echo "environment .venv, ${kind^^}: installing ${files[*]}"
for file in "${files[@]}"; do
  "${pip[@]}" -r "$file"
done
"${pip[@]}" --no-deps -e .
# On all cores, where pip compiles on one: a minute becomes half. Some packages bring templates and
# tests that are not Python.
echo "environment .venv: compiling"
.venv/bin/python -W ignore -m compileall -qq -j 0 .venv/lib || true
touch "$stamp"
