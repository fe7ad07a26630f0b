#!/usr/bin/env bash
# Everything that must hold: lint, types, tests. Makes its own environment.
#   tests/run.sh                      the default run (no GPU, no network beyond the installation)
#   tests/run.sh -k resume -x         arguments go to pytest
# Three files are tested at a time on two cores, since whole runs wait much; each in one process: what a file makes for
# its tests is made once. The long ones come first (tests/conftest.py).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
cluster/setup.sh dev
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
exec .venv/bin/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder "$@"
