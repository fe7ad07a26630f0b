#!/usr/bin/env bash
# Create .venv at the root of the checkout and install owlsam-ray with exact versions. Does nothing when that is done.
#   cluster/setup.sh          what a run needs
#   cluster/setup.sh dev      also what the tests need
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras=${1:-}
[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
stamp=.venv/.owlsam-${extras:-run}
if [ "$(cat "$stamp" 2>/dev/null)" != "$(cat pyproject.toml cluster/constraints.txt | sha256sum)" ]; then
    .venv/bin/python -m pip install --quiet --disable-pip-version-check \
        --constraint cluster/constraints.txt --editable ".${extras:+[$extras]}"
    cat pyproject.toml cluster/constraints.txt | sha256sum > "$stamp"
fi
