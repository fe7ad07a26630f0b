#!/usr/bin/env bash
# Plan a run here, submit the jobs that label it, and one that reduces it when all are complete. Prints the job ids.
#   cluster/slurm/submit.sh RUNFILE RUN [TASKS [OPTION OF SBATCH...]]
#   cluster/slurm/submit.sh run.yaml /scratch/runs/1 16 --partition=gpu --gpus-per-node=1 --time=8:00:00
# The options are for the labelling jobs; OWLSAM_REDUCE_OPTIONS="--partition=cpu --mem=16G" sets those of the reduce job.
# After any failure, run the same command again to continue.
set -euo pipefail
OWLSAM_HOME=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
export OWLSAM_HOME
# shellcheck source=cluster/slurm/site.sh
source "$OWLSAM_HOME/cluster/slurm/site.sh"
if (($# < 2)) || ! [[ ${3:-1} =~ ^[1-9][0-9]{0,5}$ ]]; then
    echo "usage: $0 RUNFILE RUN [TASKS [OPTION OF SBATCH...]]   (TASKS: a number of jobs; default 1)" >&2
    exit 2
fi
run_file=$1 run=$2 tasks=${3:-1}
options=("${@:4}")
read -ra reduce_options <<<"${OWLSAM_REDUCE_OPTIONS:-}"
jobs=$OWLSAM_HOME/cluster/slurm

"$OWLSAM" plan "$run_file" --run "$run" >&2
if ((tasks == 1)); then
    label=$(sbatch --parsable "${options[@]}" "$jobs/annotate.sbatch" "$run_file" "$run")
else
    label=$(sbatch --parsable --array="0-$((tasks - 1))" "${options[@]}" "$jobs/annotate-array.sbatch" "$run_file" "$run")
fi
label=${label%%;*} # clusters with a name print id;name
echo "annotate $label"
reduce=$(sbatch --parsable --dependency="afterok:$label" --kill-on-invalid-dep=yes "${reduce_options[@]}" \
    "$jobs/reduce.sbatch" "$run_file" "$run")
echo "reduce ${reduce%%;*}"
