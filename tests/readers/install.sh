#!/usr/bin/env bash
# The readers of other people that tests/readers opens our files with, in .venv-readers: they want other versions of the
# libraries that we use. Does nothing when they are there; where they cannot be installed it says so, and these tests are
# skipped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
wanted=tests/readers/requirements.txt
installed=.venv-readers/installed.txt
cmp -s "$wanted" "$installed" && exit 0
rm -rf .venv-readers
if ! { "${PYTHON:-python3}" -m venv .venv-readers && .venv-readers/bin/pip install --quiet --disable-pip-version-check -r "$wanted"; }; then
    rm -rf .venv-readers
    echo "cannot install $wanted. The tests of the readers are skipped." >&2
    exit 0
fi
cp "$wanted" "$installed"
