#!/usr/bin/env bash
# A Slurm of two nodes on this machine's loopback, for tests. Everything that it writes lies in DIR.
#   tests/slurm/cluster.sh up DIR       DIR: short, new, on a path that nobody else may write to
#   tests/slurm/cluster.sh down DIR     cancels all jobs, and ends every process that `up` or a job has started
#   tests/slurm/cluster.sh guard DIR    does that once its parent has died, and removes DIR
# Use it with SLURM_CONF=DIR/slurm.conf and OWLSAM_TEST_SLURM=DIR, by which the processes of jobs are known.
# Needs root, slurmctld, slurmd and munged. Both nodes are this machine, at ports of their own.
set -euo pipefail

nodes=2 cpus=2

free_port() { # sets $port
    while :; do
        port=$((20000 + RANDOM % 10000))
        [[ " $taken " == *" $port "* ]] || (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || break
    done
    taken+=" $port"
}

write_config() {
    local host node taken='' port
    host=$(hostname -s)
    free_port
    cat >"$dir/slurm.conf" <<CONF
ClusterName=owlsam
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool.%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.%n.pid
SlurmctldLogFile=$dir/log/slurmctld
SlurmdLogFile=$dir/log/slurmd.%n
# A job that is queued again waits until its old credential has expired: two minutes, unless told otherwise.
AuthType=auth/munge
AuthInfo=socket=$dir/munge/socket,cred_expire=5
CredType=cred/munge
# No control groups, of which a container may have none. linuxproc loses what outlives the batch shell.
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
ReturnToService=2
KillWait=5
CONF
    for ((node = 0; node < nodes; node++)); do
        free_port
        echo "NodeName=n$node NodeHostname=$host NodeAddr=127.0.0.1 Port=$port CPUs=$cpus RealMemory=4000"
    done >>"$dir/slurm.conf"
    echo "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP" >>"$dir/slurm.conf"
}

start_munge() {
    local munge=$dir/munge
    mkdir -m 755 "$munge"
    (umask 077 && head -c 128 /dev/urandom >"$munge/key")
    munged --key-file="$munge/key" --socket="$munge/socket" --pid-file="$munge/pid" --log-file="$munge/log" \
        --seed-file="$munge/seed" --num-threads=2
}

up() {
    mkdir -p "$dir" && mkdir "$dir/state" "$dir/log"
    chmod 755 "$dir" # munged asks for a path that everybody may follow
    write_config
    start_munge
    slurmctld -c
    local node waited
    for ((node = 0; node < nodes; node++)); do
        mkdir "$dir/spool.n$node"
        slurmd -N "n$node"
    done
    for ((waited = 0; waited < 300; waited++)); do
        [ "$(sinfo --noheader --Node --states=idle 2>/dev/null | wc -l)" -lt "$nodes" ] || return 0
        sleep 0.1
    done
    echo "no $nodes idle nodes after 30 s:" >&2
    tail -n 20 "$dir"/log/* >&2
    return 1
}

ours() { # ids of the processes with OWLSAM_TEST_SLURM=DIR in their environment, but for this one and its children
    local file pid
    for file in /proc/[0-9]*/environ; do
        pid=${file#/proc/} pid=${pid%/environ}
        if grep -qzxF "OWLSAM_TEST_SLURM=$dir" "$file" 2>/dev/null && ! in_family "$pid"; then
            echo "$pid"
        fi
    done
}

in_family() { # whether a process is this one, above it or below it
    local pid
    for ((pid = $1; pid > 1; pid = $(parent "$pid"))); do
        ((pid != $$)) || return 0
    done
    for ((pid = $$; pid > 1; pid = $(parent "$pid"))); do
        ((pid != $1)) || return 0
    done
    return 1
}

parent() {
    awk '/^PPid:/ { print $2 }' "/proc/$1/status" 2>/dev/null || echo 0
}

down() {
    local pids file waited
    if [ -f "$dir/slurmctld.pid" ]; then
        timeout 10 scancel --state=PENDING --user=root || true
        timeout 10 scancel --user=root || true
        for ((waited = 0; waited < 100; waited++)); do
            [ -n "$(timeout 5 squeue --noheader 2>/dev/null)" ] || break
            sleep 0.1
        done
    fi
    for file in "$dir"/slurmctld.pid "$dir"/slurmd.*.pid "$dir/munge/pid"; do
        [ ! -f "$file" ] || kill "$(cat "$file")" 2>/dev/null || true
    done
    for ((waited = 0; waited < 100; waited++)); do
        mapfile -t pids < <(ours)
        ((${#pids[@]})) || return 0
        ((waited < 50)) || kill -KILL "${pids[@]}" 2>/dev/null || true
        sleep 0.1
    done
    echo "processes are left: ${pids[*]}" >&2
    return 1
}

guard() {
    local parent=$PPID
    trap 'exit 0' TERM
    while kill -0 "$parent" 2>/dev/null; do sleep 0.5; done
    down
    rm -rf "$dir"
}

case ${1:-} in
up | down | guard) [ -n "${2:-}" ] ;;
*) false ;;
esac || {
    echo "usage: $0 up|down|guard DIR" >&2
    exit 2
}
dir=$2
export SLURM_CONF=$dir/slurm.conf OWLSAM_TEST_SLURM=$dir PATH=$PATH:/usr/sbin
"$1"
