#!/bin/bash
# A training run on several nodes without a scheduler: the same command on every node, with the first node's name.
#
#     NODES=2 examples/torchrun.sh FIRST_NODE recipes/pythia_1.4b_lt.toml [further arguments of `lattice run`]
#
# The run's directory must be on a disk that all nodes see. A rank that fails is restarted with all others, from the
# last checkpoint, at most three times.

set -eu
first=${1:?usage: NODES=2 $0 FIRST_NODE RECIPE [arguments of lattice run]}
recipe=${2:?usage: NODES=2 $0 FIRST_NODE RECIPE [arguments of lattice run]}
shift 2

export OMP_NUM_THREADS=1
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1   # a new store for processes that are started again
exec torchrun \
    --nnodes "${NODES:-2}" \
    --nproc-per-node "${GPUS_PER_NODE:-8}" \
    --max-restarts 3 \
    --rdzv-id "${RUN_ID:-lattice}" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$first:${RDZV_PORT:-29400}" \
    -m lattice run "$recipe" "$@"
