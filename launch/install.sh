#!/usr/bin/env bash
# Makes .venv with the pinned requirements; quick where they have not changed.
#
#   bash launch/install.sh [REQUIREMENTS FILE ...]      (default: requirements.txt)
set -euo pipefail
cd "$(dirname "$0")/.."
files=("${@:-requirements.txt}")
python=${PYTHON:-python3.11}
command -v "$python" >/dev/null || python=python3

stamp=.venv/installed-$(cat "${files[@]}" pyproject.toml | sha256sum | cut -c1-16)
if [[ -f $stamp ]]; then
  echo "environment .venv: unchanged"
  exit 0
fi
"$python" -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed"'
[[ -x .venv/bin/python ]] || "$python" -m venv .venv
pip=(.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-warn-conflicts
  --no-compile)

# PyPI's torch brings gigabytes of CUDA. Where no GPU driver is found, the CPU build is taken from
# PyTorch's own index, or from wherever pip is configured to find it first.
index=()
if ! command -v nvidia-smi >/dev/null; then
  url=https://download.pytorch.org/whl/cpu
  if "$python" -c "import urllib.request as u; u.urlopen('$url/', timeout=5)" 2>/dev/null; then
    index=(--extra-index-url "$url")
  fi
fi
echo "environment .venv: installing $(grep -m1 '^torch==' "${files[@]}" -h)"
"${pip[@]}" "${index[@]}" "$(grep -m1 -h '^torch==' "${files[@]}")"
echo "environment .venv: installing ${files[*]}"
for file in "${files[@]}"; do
  "${pip[@]}" -r "$file"
done
"${pip[@]}" --no-deps -e .
# On all cores, where pip compiles on one: a minute becomes half. Some packages bring templates and
# tests that are not Python.
echo "environment .venv: compiling"
.venv/bin/python -W ignore -m compileall -qq -j 0 .venv/lib || true
touch "$stamp"
