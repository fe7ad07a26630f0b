#!/usr/bin/env bash
# What tests/slurm needs of Debian: Slurm, munge, and shellcheck. Does nothing when they are there; where they cannot be
# installed it says so, and these tests are skipped.
set -euo pipefail
PATH=$PATH:/usr/sbin
missing=()
for pair in slurmctld:slurm-wlm slurmd:slurm-wlm munged:munge shellcheck:shellcheck; do
    command -v "${pair%%:*}" >/dev/null || missing+=("${pair#*:}")
done
((${#missing[@]})) || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "not installed: ${missing[*]}. Their tests are skipped: to install them takes root and apt-get." >&2
    exit 0
fi
export DEBIAN_FRONTEND=noninteractive
if ! { apt-get -qq update && apt-get -qq install -y --no-install-recommends "${missing[@]}" >/dev/null; }; then
    echo "apt-get cannot install ${missing[*]}. Their tests are skipped." >&2
fi
