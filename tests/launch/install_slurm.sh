#!/usr/bin/env bash
# Installs what tests/launch needs of the system (SLURM, munge, ip) where that is possible, and says
# where it is not: the tests that need it are then skipped with the same message.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin
missing=()
for program in munged:munge slurmctld:slurmctld slurmd:slurmd sbatch:slurm-client ip:iproute2; do
  command -v "${program%%:*}" >/dev/null || missing+=("${program##*:}")
done
if [[ ${#missing[@]} -eq 0 ]]; then
  echo "SLURM for the tests: present"
elif [[ $EUID -ne 0 ]] || ! command -v apt-get >/dev/null; then
  echo "SLURM for the tests: no ${missing[*]}, and installing them needs root and apt-get;" \
    "the tests on it are skipped"
elif ! { export DEBIAN_FRONTEND=noninteractive; apt-get update && apt-get install --yes --no-install-recommends "${missing[@]}"; } \
  >/dev/null 2>&1; then
  echo "SLURM for the tests: apt-get could not install ${missing[*]}; the tests on it are skipped"
else
  echo "SLURM for the tests: installed ${missing[*]}"
fi
