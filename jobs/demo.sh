#!/usr/bin/env bash
# The main job on this machine, from nothing: make .venv, draw 64 images, label them, merge the labels. About a minute
# after the installation. The models are tiny and untrained: this shows the machinery, not good labels.
#   jobs/demo.sh [DIR]            default: runs/demo; call it again to see a finished run resume
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
cluster/setup.sh
directory=${1:-runs/demo}
[ -f "$directory/run.yaml" ] || .venv/bin/python -m tests.seeded_run --tiny "$directory"
for command in plan annotate reduce; do
    echo "+ owlsam $command $directory/run.yaml --run $directory/run" >&2
    .venv/bin/owlsam "$command" "$directory/run.yaml" --run "$directory/run"
done
