# shellcheck shell=bash disable=SC2034
# What differs from site to site, for all jobs of this folder: edit it, or set the variables where you submit. Partition,
# account, GPUs, CPUs, memory and time are options of sbatch. Read on the node, from the directory you submitted from.

# module load cuda                                  # whatever your site needs

# The command; default: that of the checkout.
OWLSAM=${OWLSAM:-$OWLSAM_HOME/.venv/bin/owlsam}

# How often a job may be queued again after it was interrupted.
OWLSAM_MAX_REQUEUES=${OWLSAM_MAX_REQUEUES:-50}

# A folder on the node for Ray's sockets, logs and spilled blocks, removed at the end. At most 20 characters: Ray's
# sockets lie in it, and the kernel takes 107 bytes of a socket's path.
OWLSAM_TMP=${OWLSAM_TMP:-/tmp}
