#!/bin/bash
# A training run as a SLURM job that comes back after preemption and at the end of its time, until it is finished.
#
#     sbatch --nodes 8 examples/slurm.sh recipes/pythia_1.4b_lt.toml [further arguments of `lattice run`]
#
# The run's directory must be on a disk that all nodes see. Every start is the same command: lattice goes on from
# the last checkpoint, and a finished run ends at once.

#SBATCH --job-name=lattice
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=lattice-%j.log
#SBATCH --signal=B:USR1@300     # to this script, five minutes before the time is over
# Of a preempted job the steps get SIGTERM and, as long as the cluster's GraceTime is, the time to save; this script
# does not. If the cluster sets PreemptParameters=send_user_signal it gets SIGUSR1 first.

set -u
recipe=${1:?usage: sbatch [--nodes N] examples/slurm.sh RECIPE [arguments of lattice run]}
shift

head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=1
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1   # a new store for processes that are started again
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240     # seconds in which ranks may save before torchrun kills them

again=""
stop() {
    # To the steps and not to this script. torchrun passes it on; the ranks agree on a step, save and end.
    echo "$(date --iso-8601=seconds) $1: asking the run to save and stop"
    scancel --signal=TERM "$SLURM_JOB_ID" 2>/dev/null  # SLURM itself tells those of a cancelled job
}
trap 'again=yes; stop USR1' USR1
trap 'stop TERM' TERM           # somebody cancels the job

srun --kill-on-bad-exit=1 \
    torchrun \
        --nnodes "$SLURM_JOB_NUM_NODES" \
        --nproc-per-node "${GPUS_PER_NODE:-8}" \
        --max-restarts 3 \
        --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
        --rdzv-backend c10d \
        --rdzv-endpoint "$head_node:${RDZV_PORT:-29400}" \
        -m lattice run "$recipe" "$@" &
step=$!

# `wait` comes back early when a signal is trapped.
status=0
wait "$step" || status=$?
while kill -0 "$step" 2>/dev/null; do
    status=0
    wait "$step" || status=$?
done

# A job that ends within its GraceTime is not requeued by SLURM, which only says when it preempted it.
if scontrol show job "$SLURM_JOB_ID" | grep -q "PreemptTime=[0-9]"; then
    again=yes
fi
if [ -n "$again" ]; then
    echo "$(date --iso-8601=seconds) back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
