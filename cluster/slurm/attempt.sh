#!/usr/bin/env bash
# One attempt at a run, inside a Slurm job; annotate*.sbatch replace themselves by this script.
#   attempt.sh RUNFILE RUN [OPTION OF ANNOTATE...]
# SIGUSR1 (shortly before the time limit) and SIGTERM are passed to owlsam as SIGTERM. If it ends as interrupted (exit
# code 75), the job is queued again, at most OWLSAM_MAX_REQUEUES times; any other exit code becomes the job's.
set -euo pipefail

main() { # a function, which bash reads whole before it runs: this file may change meanwhile
    OWLSAM_HOME=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
    # shellcheck source=cluster/slurm/site.sh
    source "$OWLSAM_HOME/cluster/slurm/site.sh"
    (($# >= 2)) || fail "usage: attempt.sh RUNFILE RUN [OPTION OF ANNOTATE...]"
    local run_file=$1 run=$2 code=0
    shift 2
    driver='' stopping='' signalled=''
    trap stop_driver USR1 TERM
    make_ray_folder
    size_of_job
    "$OWLSAM" annotate "$run_file" --run "$run" "${sizes[@]}" "$@" &
    driver=$!
    [ -z "$stopping" ] || stop_driver # the signal came before there was a driver
    while :; do # a trapped signal ends `wait` as well
        signalled='' code=0
        wait "$driver" || code=$?
        [ -n "$signalled" ] || break
    done
    rm -rf "$ray_folder" || true
    if [ -n "$stopping" ] && ((code == 128 + 15)); then
        code=75 # the signal came before Python was up
    fi
    ((code != 75)) || queue_again
    exit "$code"
}

say() { echo "$(date +%H:%M:%S) slurm: $*" >&2; }

fail() {
    say "$*"
    exit 2
}

stop_driver() {
    stopping=yes signalled=yes
    [ -z "$driver" ] || kill -TERM "$driver" 2>/dev/null || true
}

make_ray_folder() { # for this job only: several jobs may share a node
    ray_folder=$OWLSAM_TMP/owlsam-$SLURM_JOB_ID
    rm -rf "$ray_folder" # left by an attempt that was killed
    mkdir -m 700 "$ray_folder" || fail "cannot make $ray_folder: set OWLSAM_TMP to a folder of this node"
    export RAY_TMPDIR=$ray_folder
}

size_of_job() { # otherwise Ray takes the whole node
    sizes=(--set "resources.num_cpus=$SLURM_CPUS_ON_NODE")
    local mb=${SLURM_MEM_PER_NODE:-$((${SLURM_MEM_PER_CPU:-0} * SLURM_CPUS_ON_NODE))}
    if ((mb > 0)); then # 30 % for blocks, Ray's default share; 80 % for actors, as `auto`
        sizes+=(--set "resources.object_store_mb=$((mb * 3 / 10))")
        sizes+=(--set "resources.actor_memory_gb=$(printf '%d.%03d' $((mb * 839 / 1000000)) $((mb * 839 / 1000 % 1000)))")
    fi
}

queue_again() {
    local job=$SLURM_JOB_ID restarts=${SLURM_RESTART_COUNT:-0} state waited
    # The last task of an array has the same SLURM_JOB_ID as the whole array.
    [ -z "${SLURM_ARRAY_JOB_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    if ((restarts >= OWLSAM_MAX_REQUEUES)); then
        say "interrupted after $restarts requeues (OWLSAM_MAX_REQUEUES): submit the job again to continue"
        return
    fi
    # Slurm would also requeue a job that was cancelled.
    state=$(squeue --noheader --jobs="$job" --format=%T) || state=unknown
    if [ "$state" != RUNNING ]; then
        say "interrupted, and not queued again because the job's state is $state"
        return
    fi
    # From here on this process waits for Slurm to end it: if it exited first, the job would be over.
    trap 'exit 75' TERM
    trap '' USR1
    for _ in 1 2 3 4 5 6; do
        say "interrupted: queued again ($((restarts + 1)) of at most $OWLSAM_MAX_REQUEUES)"
        if scontrol requeue "$job"; then
            for ((waited = 0; waited < 600; waited++)); do sleep 1 || true; done
            return
        fi
        sleep 10
    done
    say "Slurm does not queue the job again: submit it again to continue"
}

main "$@"
