# shellcheck shell=bash
# Sourced by every script here. Arguments of a script: the run folder, and the stage that the job works on.
#
# btx runs on the job's first node and starts the ranks with srun, one torchrun a node. Slurm's USR1, some minutes
# before the time limit (--signal=B:USR1@N), makes it save and end with 75; then the job goes back into the queue and
# goes on from there. A job that a node's failure puts back (--requeue) goes on from the last checkpoint, too.
export BTX_RUN=$1 BTX_STAGE=$2 BTX_SLURM_JOB=1

# modules, virtual environment, variables: written by btx submit from the recipe's slurm section
source "$BTX_RUN/slurm/scripts/environment.sh"
set -uo pipefail # only now: what activates an environment seldom bears it

# NCCL's flight recorder says who was missing when a collective times out
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
export TORCH_NCCL_TRACE_BUFFER_SIZE=${TORCH_NCCL_TRACE_BUFFER_SIZE:-2000}
# what Megatron-Core asks for, so that communication and computation overlap
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}

btx_stage() {
    echo "== job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}, $(date -u +%FT%TZ): $BTX_STAGE on $SLURM_JOB_NODELIST"
    "$BTX_SUPERVISOR_PYTHON" -m btx_megatron run "$BTX_RUN" --only "$BTX_STAGE" &
    local btx=$! code last time_is_up=
    trap 'time_is_up=1; kill -USR1 $btx' USR1
    trap 'kill -TERM $btx' TERM
    # wait comes back early when a signal arrives, and says 127 of a process whose end it has told before
    while wait $btx; code=$?; kill -0 $btx 2>/dev/null; do :; done
    wait $btx
    last=$?
    ((last == 127)) || code=$last
    if ((code == 75)) && [[ $time_is_up ]]; then
        if ((${SLURM_RESTART_COUNT:-0} >= BTX_MAX_RESTARTS)); then
            echo "== saved, but this job was restarted $SLURM_RESTART_COUNT times (slurm.max_restarts); submit again"
            exit 1
        fi
        echo "== saved; back into the queue"
        scontrol requeue "$SLURM_JOB_ID"
    fi
    exit $code
}
