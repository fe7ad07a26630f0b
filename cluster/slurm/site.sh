# shellcheck shell=bash disable=SC2034
# What differs from site to site, for all jobs of this folder: edit it, or set the variables where you submit. Partition,
# account, GPUs, CPUs, memory and time are options of sbatch. This file is read on the node, in the directory from which
# you submitted.

# module load cuda                                  # whatever your site needs

# The owlsam command; default: the one in the checkout's .venv.
OWLSAM=${OWLSAM:-$OWLSAM_HOME/.venv/bin/owlsam}

# How often a job may be queued again after an interruption.
OWLSAM_MAX_REQUEUES=${OWLSAM_MAX_REQUEUES:-50}

# A folder on the node for Ray's sockets, logs and spilled blocks, removed at the end. At most 20 characters: Ray's
# sockets are in it, and the kernel limits a socket's path to 107 bytes.
OWLSAM_TMP=${OWLSAM_TMP:-/tmp}
