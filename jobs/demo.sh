#!/usr/bin/env bash
# The main job on this machine, from scratch: create .venv, draw 200 images, label them with the small models that come
# with the package, measure the labels. At most three minutes after the installation, on two CPU cores, offline.
#   jobs/demo.sh [--run DIR] [--images N] [--seed S]       default: runs/demo 200 1; again: a finished run does nothing
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
"$root/cluster/setup.sh"
exec "$root/.venv/bin/owlsam" demo "$@"
