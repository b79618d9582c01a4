# shellcheck shell=bash
# Sourced by every script here. Arguments of a script: the run folder, and the stage that the job works on.
#
# btx runs on the job's first node and starts the ranks with srun, one torchrun a node. Slurm's USR1, some minutes
# before the time limit (--signal=B:USR1@N), makes it save and end with 75; then the job goes back into the queue and
# goes on from there. So does a job that failed (a node, a GPU, a preemption) after it had saved something new: it
# goes on from the last checkpoint. One that fails without getting further has failed. A job that the loss of its
# first node puts back (--requeue) goes on from the last checkpoint, too.
time_is_up='' cancelled='' btx=''
trap 'time_is_up=1; [[ $btx ]] && kill -USR1 "$btx"' USR1
trap 'cancelled=1; [[ $btx ]] && kill -TERM "$btx"' TERM
export BTX_RUN=$1 BTX_STAGE=$2 BTX_SLURM_JOB=1

# modules, virtual environment, variables: written by btx submit from the recipe's slurm section
source "$BTX_RUN/slurm/scripts/environment.sh"
set -uo pipefail # only now: what activates an environment seldom bears it

# NCCL's flight recorder says who was missing when a collective times out
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
export TORCH_NCCL_TRACE_BUFFER_SIZE=${TORCH_NCCL_TRACE_BUFFER_SIZE:-2000}
# what Megatron-Core asks for, so that communication and computation overlap
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}

# the step that the stage's last checkpoint holds
btx_saved() {
    cat "$BTX_RUN/.work/${BTX_STAGE/#expert:/experts/}/checkpoints/latest_checkpointed_iteration.txt" 2>/dev/null
}

btx_requeue() {
    local try
    if ((${SLURM_RESTART_COUNT:-0} >= BTX_MAX_RESTARTS)); then
        echo "== $1, but this job was restarted $SLURM_RESTART_COUNT times (slurm.max_restarts); submit again"
        exit 1
    fi
    echo "== $1; back into the queue"
    for ((try = 1; try <= 10; try++)); do # the controller may be busy, or on its way to another machine
        scontrol requeue "$SLURM_JOB_ID" && return
        sleep "${BTX_SECONDS_BETWEEN_TRIES:-15}"
    done
}

btx_stage() {
    local before code last
    before=$(btx_saved)
    echo "== job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}, $(date -u +%FT%TZ): $BTX_STAGE on $SLURM_JOB_NODELIST"
    [[ $cancelled ]] && exit 75
    if [[ $time_is_up ]]; then
        btx_requeue "the time was up before anything was started"
        exit 75
    fi
    "$BTX_SUPERVISOR_PYTHON" -m btx_megatron run "$BTX_RUN" --only "$BTX_STAGE" &
    btx=$!
    # wait comes back early when a signal arrives, and says 127 of a process whose end it has told before
    while wait $btx; code=$?; kill -0 $btx 2>/dev/null; do :; done
    wait $btx
    last=$?
    ((last == 127)) || code=$last
    if [[ $cancelled ]] || ((code == 0 || code == 2)); then
        exit $code
    fi
    if [[ $time_is_up ]] && ((code == 75 || code == 138)); then # 138: it could not yet hear USR1
        btx_requeue saved
    elif [[ $(btx_saved) != "$before" ]]; then
        btx_requeue "failed with $code, but got further than when it started"
    fi
    exit $code
}
