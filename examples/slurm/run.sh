#!/usr/bin/env bash
# What the three batch scripts share. Sourced by them from the root of the repository, where sbatch was called:
#
#   SAVE=/shared/runs/457m sbatch examples/slurm/smollm_1.7b.sbatch [flags of pretrain_prune.py, which win over the file's]
#
#   SAVE     the run directory, on a file system that all nodes share (required). It is also what a run resumes from:
#            the same command goes on where the last one stopped.
#   PYTHON   the interpreter that has megatron-prune installed, `python` by default.
#
# Before the wall-clock limit (#SBATCH --signal) Slurm signals the training processes; they save and exit with code 75,
# and the job goes back into the queue. So it does, by itself, when a node fails (#SBATCH --requeue). An error ends it.

# run_pruning FLAGS... - train on all tasks of the job, then requeue it, finish or fail.
run_pruning() {
    if [[ -z ${SLURM_JOB_ID:-} || -z ${SLURM_JOB_NODELIST:-} ]]; then
        stop 2 "this is a batch script: start it with SAVE=... sbatch $0"
    fi
    if [[ -z ${SAVE:-} ]]; then
        stop 2 "SAVE is not set: give a run directory that all nodes share, SAVE=/shared/runs/NAME sbatch ..."
    fi

    local -a hosts
    mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    if [[ -z ${hosts[0]:-} ]]; then
        stop 1 "scontrol names no host for SLURM_JOB_NODELIST=$SLURM_JOB_NODELIST"
    fi
    # Rank 0 runs on the first host. The port follows from the job, so that jobs sharing a host differ; it lies below
    # the range from which the kernel gives out ports.
    export MASTER_ADDR=${hosts[0]}
    export MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
    # srun no longer takes this from sbatch (Slurm 22.05).
    export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SRUN_CPUS_PER_TASK}

    # srun reports the highest exit code of its tasks. All of them return 75 together; a task that fails before the
    # others can hear of it (a node lacks a file, say) is what --kill-on-bad-exit is for.
    local code=0
    srun --kill-on-bad-exit=1 "${PYTHON:-python}" -u pretrain_prune.py --save "$SAVE" "$@" || code=$?

    case $code in
        0) echo "job $SLURM_JOB_ID: finished, see $SAVE" ;;
        75)
            echo "job $SLURM_JOB_ID: stopped with a complete checkpoint, going back into the queue"
            scontrol requeue "$SLURM_JOB_ID"
            ;;
        *) stop "$code" "training ended with code $code, not requeued: mend the error above and submit again to resume" ;;
    esac
}

# stop CODE MESSAGE - say why and leave.
stop() {
    echo "job ${SLURM_JOB_ID:-?}: $2" >&2
    exit "$1"
}
