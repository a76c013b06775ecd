#!/usr/bin/env bash
# Prints pip's option for PyTorch's own index of builds for the CPU, if that host can be reached.
#
#   bash launch/cpu_index.sh PYTHON
#
# PyPI's torch brings gigabytes of CUDA. Where the index is out of reach, pip would try it again for
# every package; there the builds come from wherever pip is configured to find them.
set -euo pipefail
url=https://download.pytorch.org/whl/cpu
if "$1" -c "import urllib.request as u; u.urlopen('$url/', timeout=5)" 2>/dev/null; then
  echo "--extra-index-url $url"
fi
