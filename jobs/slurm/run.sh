# shellcheck shell=bash
# Sourced by the batch scripts of this folder: bash, in fovea's folder. What they share: how ranks
# are started, how signals reach them, and what an exit status leads to.
#
#   FOVEA_STUDY     study file (each script has its own default)
#   FOVEA_OUT       folder of the results, on a file system that all nodes share: runs/STUDY
#   FOVEA_RESTARTS  how often a job may requeue itself
#   FOVEA_LAUNCHER  srun or mpirun
#   FOVEA_PROGRAM   ./fovea, or a command that starts it in a container
#   SRUN_MPI        plugin of srun: pmix; `srun --mpi=list` shows what there is
#   FOVEA_STAGE     node-local folder that the data file is copied to first, e.g. '$TMPDIR'
#
# Arguments of sbatch after the script's name are fovea's: key=value ... and options, not --out.

say() { echo "$(date '+%F %T') $SLURM_JOB_NAME: $*"; }

die() { # STATUS MESSAGE
    say "$2" >&2
    exit "$1"
}

prepare() { # DEFAULT_STUDY ARGUMENTS...
    study=${FOVEA_STUDY:-$1}
    shift
    if [ -f jobs/slurm/site.env ]; then . jobs/slurm/site.env; fi
    read -ra fovea <<<"${FOVEA_PROGRAM:-./fovea}"
    command -v "${fovea[0]}" >/dev/null || die 2 "no ${fovea[0]} in $PWD: submit from fovea's folder, after make"
    [ -f "$study" ] || die 2 "no study $study: FOVEA_STUDY names one"
    case " $* " in *" --out"*) die 2 "--out is not taken here: FOVEA_OUT=DIR sbatch ..." ;; esac
    out=${FOVEA_OUT:-runs/$(basename "$study" .yaml)}
    restarts=${SLURM_RESTART_COUNT:-0}
    ranks='' stopping=''
    trap 'stop USR1' USR1
    trap 'stop TERM' TERM
    say "job $SLURM_JOB_ID, start $((restarts + 1)), on $SLURM_JOB_NODELIST: $study into $out"
}

# The command that starts the ranks of this job, in $launch.
choose_launcher() {
    case ${FOVEA_LAUNCHER:-srun} in
    srun)
        # Since Slurm 22.05 srun does not take over the batch job's --cpus-per-task. Each rank is shown
        # all GPUs of its job on the node and takes its own by its local rank: one visible GPU per
        # rank keeps NCCL from using peer access (NCCL issues 1066, 1948), and under --gpu-bind=none
        # Slurm does not say which GPUs are the job's.
        export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
        unset SLURM_GPUS_PER_TASK SLURM_TRES_PER_TASK SLURM_GPU_BIND
        launch=(srun "--mpi=${SRUN_MPI:-pmix}" --kill-on-bad-exit=1 --export=ALL)
        ;;
    mpirun) launch=(mpirun --bind-to none) ;;
    *) die 2 "FOVEA_LAUNCHER=$FOVEA_LAUNCHER: srun or mpirun" ;;
    esac
}

# The batch shell alone gets the signal before the time limit (--signal=B:...), since mpirun's ranks
# would not get it otherwise; srun and mpirun both hand it on.
stop() {
    stopping=$1
    say "$1: checkpoint and stop"
    if [ -n "$ranks" ]; then kill -USR1 "$ranks" 2>/dev/null; fi
}

# run FOLDER ARGUMENTS...: fovea's exit status in $status
run() {
    local folder=$1
    shift
    if [ -n "${FOVEA_STAGE:-}" ]; then set -- --stage "$(eval echo "$FOVEA_STAGE")" "$@"; fi
    status=0
    "${launch[@]}" "${fovea[@]}" "$study" --out "$folder" "$@" &
    ranks=$!
    if [ -n "$stopping" ]; then stop "$stopping"; fi # it came before there were ranks
    # `wait` also returns when a signal has come.
    while kill -0 "$ranks" 2>/dev/null; do
        status=0
        wait "$ranks" || status=$?
    done
    trap '' USR1 TERM
}

# only ARGUMENTS...: the experiments that --only among fovea's arguments selects; none: all of them
only() {
    while [ $# -gt 0 ]; do
        case $1 in
        --only) echo "${2:-}" && return ;;
        --only=*) echo "${1#--only=}" && return ;;
        esac
        shift
    done
}

# How many of the folder's selected jobs are neither finished nor failed, as recorded there: srun
# can return 0 after a node failure.
unfinished() { # FOLDER ARGUMENTS...
    "${fovea[@]}" status "$1" | awk -v only="$(only "${@:2}")" \
        '$2 == "seed" && (only == "" || index("," only ",", "," $1 ",")) &&
         $4 != "finished" && $4 != "failed"' | wc -l
}

# Whether this start of the job is the one that Slurm runs: not after scancel or preemption, and not
# on a node that was lost, where this script lives on beside its successor.
still_ours() {
    local now
    now=$(scontrol show job -o "$1" 2>/dev/null)
    [[ $now == *" JobState=RUNNING "* && $now == *" Restarts=$restarts "* ]]
}

requeue() { # LIMIT WHY
    local id=$SLURM_JOB_ID limit=${FOVEA_RESTARTS:-$1}
    # The plain id of an array's task can mean the whole array.
    if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then id=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi
    still_ours "$id" || die "$status" "$2; ended from outside, not requeued"
    [ "$restarts" -lt "$limit" ] ||
        die "$status" "$2; $restarts restarts were enough (FOVEA_RESTARTS); sbatch goes on from here"
    say "$2; requeued"
    scontrol requeue "$id" || die "$status" "could not be requeued; sbatch goes on from here"
    sleep 60 # Slurm ends this script
    exit "$status"
}

# finish RESTARTS FOLDER ARGUMENTS...: ends the batch script with fovea's status, or requeues it
finish() {
    local left
    case $status in
    0)
        left=$(unfinished "${@:2}")
        if [ "$left" = 0 ]; then die 0 "done: $2/results.h5"; fi
        status=5
        requeue "$1" "ended early with $left jobs to do, as after a node failure"
        ;;
    2 | 3) die "$status" "status $status: the message above says what to change" ;;
    4) die 4 "status 4: an experiment failed, the others are done: ./fovea status $2" ;;
    6) die 6 "status 6: $2 cannot be written, or another job writes there" ;;
    75) requeue "$1" "stopped with checkpoints${stopping:+ after $stopping}" ;;
    5) requeue "$1" "status 5: device or MPI" ;;
    *)
        if [ -n "$stopping" ] || [ "$status" -gt 128 ]; then
            requeue "$1" "status $status: ranks were killed"
        fi
        die "$status" "status $status of ${launch[0]}; if it cannot start ranks: srun --mpi=list, SRUN_MPI, FOVEA_LAUNCHER=mpirun"
        ;;
    esac
}
