#!/usr/bin/env bash
# The batch scripts of jobs/slurm, unchanged, on a real Slurm of two nodes (tests/slurm/cluster).
. tests/integration/common

D=$TMPDIR/plain
trap 'tests/slurm/cluster down "$D"' EXIT
trap 'exit 143' TERM INT
unset "${!SBATCH_@}" "${!SLURM_@}" "${!FOVEA_@}"
export FOVEA_STUDY=$tiny

# submit NAME ARGUMENTS...: sbatch for the study in OUT = $TMPDIR/NAME; the job's id
submit() {
    FOVEA_OUT=$TMPDIR/$1 sbatch --parsable --output="$TMPDIR/$1.txt" --cpus-per-task=1 "${@:2}"
}
field() { scontrol show job -o "$1" | tr ' ' '\n' | sed -n "s/^$2=//p" | head -n 1; }
told() { # JOB NAME: what is known when something went wrong
    scontrol show job "$1" >&2
    cat "$TMPDIR/$2.txt" >&2 || true
    tail -n 20 "$D"/log/slurm*.log >&2
}
ended() { # JOB NAME STATE [CODE]
    local state
    for _ in $(seq 900); do
        state=$(field "$1" JobState)
        case $state in PENDING | RUNNING | COMPLETING | CONFIGURING | SUSPENDED) sleep 0.1 ;; *) break ;; esac
    done
    [ "$state" = "$3" ] || { told "$@"; fail "$2: job $1 is $state instead of $3"; }
    [ -z "${4:-}" ] || [ "$(field "$1" ExitCode)" = "$4:0" ] ||
        { told "$@"; fail "$2: ExitCode $(field "$1" ExitCode) instead of $4"; }
}
says() { # NAME PATTERN
    grep -Eq -e "$2" "$TMPDIR/$1.txt" || { cat "$TMPDIR/$1.txt"; fail "$1: no line matches '$2'"; }
}
appears() { # PATTERN of a file
    for _ in $(seq 600); do
        compgen -G "$1" >/dev/null && return
        sleep 0.05
    done
    fail "$1 does not appear"
}
rank_of() { # NAME: pid of one of the job's ranks
    local pid
    for pid in $(tests/slurm/cluster ranks "$D"); do
        if tr '\0' ' ' <"/proc/$pid/cmdline" | grep -qF -e "--out $TMPDIR/$1 "; then echo "$pid" && return; fi
    done
    fail "$1 has no rank"
}
one_node() { submit "$1" --nodes=1 --ntasks-per-node="$2" --gpus-per-node="$2" "${@:3}"; }
seconds=$SECONDS
done_with() {
    echo "$((SECONDS - seconds)) s: $*"
    seconds=$SECONDS
}

# A cluster without GPUs: the scripts' request is refused, and can be taken back.
GPUS=0 tests/slurm/cluster up "$D"
. "$D/env"
run_tiny "$TMPDIR/direct"
if one_node refused 1 jobs/slurm/ablations.sbatch >"$TMPDIR/refused.txt" 2>&1; then
    fail "GPUs were granted where there are none"
fi
says refused 'generic resource'
plain=$(SBATCH_GPUS_PER_NODE=0 submit plain --ntasks-per-node=2 jobs/slurm/ablations.sbatch)
ended "$plain" plain COMPLETED 0
compare "$TMPDIR/direct/results.h5" "$TMPDIR/plain/results.h5"
tests/slurm/cluster down "$D"
done_with "no GPUs"

# Two nodes of two ranks with srun; two and one with mpirun; a partition without GPUs; the data file
# staged.
D=$TMPDIR/cluster
tests/slurm/cluster up "$D"
. "$D/env"
printf '#!/bin/sh\n[ "$1" = status ] || echo "sees GPUs $CUDA_VISIBLE_DEVICES"\nexec ./fovea "$@"\n' >"$TMPDIR/tell"
chmod +x "$TMPDIR/tell"
two=$(FOVEA_PROGRAM=$TMPDIR/tell submit two --nodes=2 --ntasks-per-node=2 --gpus-per-node=2 \
    --gpus-per-task=1 jobs/slurm/ablations.sbatch)
ended "$two" two COMPLETED 0
uneven=$(FOVEA_LAUNCHER=mpirun submit uneven --nodes=2 --ntasks=3 --ntasks-per-node=2 \
    --gpus-per-node=2 jobs/slurm/ablations.sbatch)
cpu=$(SBATCH_GPUS_PER_NODE=0 submit cpu --nodes=1 --ntasks-per-node=2 jobs/slurm/extended.sbatch seeds=0)
clips="frames=4 image_size=16 data=$TMPDIR/clips.h5"
"$FOVEA" prepare procedural -o "$TMPDIR/clips.h5" --frames 4 --size 16 --clips-train 20 --clips-held-out 4 >/dev/null
# shellcheck disable=SC2086,SC2016 # a list; the job expands it
{
    staged=$(FOVEA_STAGE='$TMPDIR/disk' one_node staged 1 jobs/slurm/ablations.sbatch $clips)
    run_tiny "$TMPDIR/unstaged" $clips
}
ended "$uneven" uneven COMPLETED 0
ended "$staged" staged COMPLETED 0
cmp "$TMPDIR/clips.h5" "$TMPDIR"/disk/*-clips.h5
compare "$TMPDIR/unstaged/results.h5" "$TMPDIR/staged/results.h5"
ended "$cpu" cpu COMPLETED 0
for name in two uneven cpu; do compare "$TMPDIR/direct/results.h5" "$TMPDIR/$name/results.h5"; done
says two "$NODE2"
[ "$(grep -c '^sees GPUs 0,1$' "$TMPDIR/two.txt")" = 4 ] || fail "ranks are shown one GPU alone"
says uneven '^2  +'"$NODE2"
done_with "two nodes"

# What is wrong is said, once, and not tried again.
a=$(FOVEA_STUDY=nowhere.yaml one_node a 1 jobs/slurm/ablations.sbatch)
b=$(one_node b 1 jobs/slurm/ablations.sbatch temprature=1)
c=$(one_node c 1 jobs/slurm/ablations.sbatch --out "$TMPDIR/elsewhere")
d=$(SRUN_MPI=none one_node d 2 jobs/slurm/ablations.sbatch)
e=$(FOVEA_LAUNCHER=prun one_node e 1 jobs/slurm/ablations.sbatch)
f=$(one_node f 1 --array=7 jobs/slurm/ablations-array.sbatch)
for job in "$a a" "$b b" "$c c" "$e e" "$f f"; do ended "${job% *}" "${job#* }" FAILED 2; done
ended "$d" d FAILED 1
says a 'FOVEA_STUDY names one'
says b 'did you mean "temperature"'
says c 'FOVEA_OUT=DIR sbatch'
says d 'srun --mpi=list'
says e 'srun or mpirun'
says f 'from 0 to 6'
if one_node g 1 --partition=nowhere jobs/slurm/ablations.sbatch >"$TMPDIR/g.txt" 2>&1; then
    fail "a partition that is not there"
fi
done_with "wrong options"

# A signal before the time limit, or a killed rank: requeued, the same losses in the end. A job that
# the user cancels stays cancelled; one that may not restart ends with fovea's status.
steps="steps=4000 eval_every=1000 map_every=1000 checkpoint_steps=100"
long="--only B_temp_0.1 $steps"
# shellcheck disable=SC2086
{
    signalled=$(one_node signalled 1 jobs/slurm/ablations.sbatch $long)
    cancelled=$(one_node cancelled 1 jobs/slurm/extended.sbatch $long steps=1000000)
    killed=$(FOVEA_PROGRAM="env ./fovea" submit killed --nodes=2 --ntasks-per-node=1 \
        --gpus-per-node=1 jobs/slurm/ablations.sbatch $long)
    tasks=$(submit tasks --gpus-per-node=0 --array=1,3 jobs/slurm/ablations-array.sbatch $steps)
    last=$(FOVEA_RESTARTS=0 one_node last 1 jobs/slurm/ablations.sbatch $long steps=1000000)
    appears "$TMPDIR/signalled/B_temp_0.1/seed_0/checkpoint-*"
    scancel --batch --signal=USR1 "$signalled"
    appears "$TMPDIR/cancelled/B_temp_0.1/seed_0/checkpoint-*"
    scancel "$cancelled"
    appears "$TMPDIR/last/B_temp_0.1/seed_0/checkpoint-*"
    scancel --batch --signal=USR1 "$last"
    appears "$TMPDIR/tasks/tasks/B_temp_0.1/B_temp_0.1/seed_0/checkpoint-*"
    scancel --batch --signal=USR1 "${tasks}_1"
    appears "$TMPDIR/killed/B_temp_0.1/seed_0/checkpoint-*"
    kill -KILL "$(rank_of killed)"
    run_tiny "$TMPDIR/whole" $long
}
ended "$last" last FAILED 75
says last 'restarts were enough'
ended "$cancelled" cancelled CANCELLED
ended "$signalled" signalled COMPLETED 0
[ "$(field "$signalled" Restarts)" = 1 ] || fail "$(field "$signalled" Restarts) restarts instead of 1"
[ "$(field "$cancelled" Restarts)" = 0 ] || fail "a cancelled job came back"
says signalled 'start 1'
says signalled 'after USR1; requeued'
says signalled 'start 2'
compare "$TMPDIR/whole/results.h5" "$TMPDIR/signalled/results.h5"
for task in "${tasks}_1 1" "${tasks}_3 0"; do
    ended "${task% *}" tasks COMPLETED 0
    [ "$(field "${task% *}" Restarts)" = "${task#* }" ] || fail "task ${task% *}: $(field "${task% *}" Restarts) restarts"
done
compare "$TMPDIR/whole/results.h5" "$TMPDIR/tasks/tasks/B_temp_0.1/results.h5"
ended "$killed" killed COMPLETED 0
says killed 'status 137: ranks were killed; requeued'
compare "$TMPDIR/whole/results.h5" "$TMPDIR/killed/results.h5"
done_with "signals"

# An array: the experiment that fails is told, the others are kept and merged; merging again
# changes nothing.
wrong="steps=300 C_contrastive.lr=1000"
# shellcheck disable=SC2086
{
    array=$(submit array --gpus-per-node=0 jobs/slurm/ablations-array.sbatch $wrong)
    merge=$(submit array --open-mode=append --dependency="afterany:$array" jobs/slurm/merge.sbatch)
    run_tiny "$TMPDIR/direct_wrong" $wrong || [ $? = 4 ]
}
ended "$merge" array FAILED 4
for task in 0 1 3 4 5 6; do ended "${array}_$task" array COMPLETED 0; done
ended "${array}_2" array FAILED 4
says array 'C_contrastive +seed 0 +failed'
compare "$TMPDIR/direct_wrong/results.h5" "$TMPDIR/array/results.h5"
cp "$TMPDIR/array/results.h5" "$TMPDIR/before.h5"
merge=$(submit array jobs/slurm/merge.sbatch)
ended "$merge" array FAILED 4
compare "$TMPDIR/before.h5" "$TMPDIR/array/results.h5"
done_with "array"

# A node is lost: Slurm starts the job again on the other one while the ranks of the first live on.
# shellcheck disable=SC2086
lost=$(one_node lost 1 --nodelist="$NODE1" jobs/slurm/ablations.sbatch $long)
appears "$TMPDIR/lost/B_temp_0.1/seed_0/checkpoint-*"
orphans=$(tests/slurm/cluster ranks "$D")
[ -n "$orphans" ] || fail "no rank is running"
# shellcheck disable=SC2086 # stopped meanwhile, so that they are there when the job starts again
kill -STOP $orphans
kill -KILL "$(cat "$D/run/pid.slurmd-$NODE1")"
scontrol update nodename="$NODE1" state=down reason=test
scontrol update jobid="$lost" nodelist= || true
for _ in $(seq 300); do [ "$(field "$lost" JobState)$(field "$lost" Restarts)" != RUNNING1 ] || break; sleep 0.1; done
# shellcheck disable=SC2086
kill -CONT $orphans
ended "$lost" lost COMPLETED 0
[ "$(field "$lost" Restarts)" = 1 ] || fail "the lost job was not requeued once"
compare "$TMPDIR/whole/results.h5" "$TMPDIR/lost/results.h5"
for pid in $orphans; do
    for _ in $(seq 200); do kill -0 "$pid" 2>/dev/null || break; sleep 0.1; done
    kill -0 "$pid" 2>/dev/null && fail "a rank of the lost node goes on"
done
done_with "a lost node"
