#!/usr/bin/env bash
# What goes wrong on a cluster (docs/failures.md), short form; tests/soak is the long one. Each case
# ends with the losses of an undisturbed run, or with a message and all finished work kept.
. tests/integration/common
. tests/failures/common
build_fault

study="$tiny steps=1500 checkpoint_steps=40 eval_every=500 map_every=500
    --only A_baseline,D_freeze_dino,E_hard_attn_32"
whole=$TMPDIR/whole
go whole
lap() { echo "$((SECONDS - began)) s: $*" && began=$SECONDS; }
began=$SECONDS
[ "$("$FOVEA" status "$whole" | grep -c ' finished  *1500/1500')" = 3 ] || fail "the undisturbed run"

# Killed inside calls that write, of results, checkpoints or histories; the calls of a run come in
# nearly the same order every time, so a number chooses the moment.
for at in 3 400 1500; do
    for fault in KILL HALF; do
        FAULT_AT=$((at + RANDOM % 100)) with_fault $fault killed && fail "$fault did not kill"
        shown killed
    done
done
lap "killed in a write"

# A full disk, a quota that is used up, a file system that turns read-only, a bad disk.
for fault in ENOSPC EDQUOT EROFS EIO; do
    code=0
    FAULT_AT=$((60 + RANDOM % 100)) with_fault $fault killed || code=$?
    [ $code = 6 ] || { cat "$TMPDIR/log"; fail "status $code after $fault"; }
    grep -Eq 'fovea: .*(No space left|quota exceeded|Read-only|Input/output error)' "$TMPDIR/log" ||
        { cat "$TMPDIR/log"; fail "$fault is not told"; }
    shown killed
done
lap "no room"

# A bit of the newest checkpoint flips: the one before is taken. After all this, the same losses.
begin killed
until_written killed
end_run
flip "$(ls -t "$TMPDIR"/killed/*/seed_0/checkpoint-*.safetensors | head -n 1)"
ended_well killed
grep -q 'passed over' "$TMPDIR/log" || { cat "$TMPDIR/log"; fail "damage is not told"; }
lap "a flipped bit"

# One rank of three, in its own write; then one rank from outside; then the launcher.
in_one_rank KILL 20 ranks && fail "the rank was not killed"
shown ranks
begin ranks mpirun --oversubscribe -np 3
until_written ranks
kill -KILL "$(rank_of ranks)"
ends_with 137
shown ranks
ended_well ranks
begin launcher mpirun --oversubscribe -np 3
until_written launcher
kill -KILL "$run"
wait "$run" || true
shown launcher
ended_well launcher
lap "ranks and the launcher"

# A file system that is full, or read-only from the start, where one may be mounted.
mkdir "$TMPDIR/small"
if mount -t tmpfs -o size=1200k none "$TMPDIR/small" 2>/dev/null; then
    trap 'umount -l "$TMPDIR/small"' EXIT
    code=0
    go small/out || code=$?
    [ $code = 6 ] || { cat "$TMPDIR/log"; fail "status $code on a full file system"; }
    grep -q 'No space left' "$TMPDIR/log" || { cat "$TMPDIR/log"; fail "a full file system is not told"; }
    shown small/out
    mount -o remount,ro "$TMPDIR/small"
    # shellcheck disable=SC2086
    expect 6 'Read-only' "$FOVEA" $study --out "$TMPDIR/small/out"
    mount -o remount,rw,size=100m "$TMPDIR/small"
    ended_well small/out
else
    echo "no file system may be mounted here: only simulated"
fi
lap "a small file system"

# The folder goes away under the run, which ends; what was moved away is whole.
begin gone
until_written gone
mv "$TMPDIR/gone" "$TMPDIR/moved"
ends_with 6
grep -q 'gone/owner: cannot be opened' "$TMPDIR/log" || { cat "$TMPDIR/log"; fail "a folder that is gone is not told"; }
shown moved
ended_well moved
lap "the folder goes away"

# The clock jumps back and ahead by days while the run goes on.
command -v faketime >/dev/null || fail "faketime is not installed"
echo '+0d' >"$TMPDIR/offset"
begin clock env LD_PRELOAD="$(faketime_library)" FAKETIME_TIMESTAMP_FILE="$TMPDIR/offset" \
    FAKETIME_NO_CACHE=1 FAKETIME_DONT_FAKE_MONOTONIC=1
until_written clock
echo '-3d' >"$TMPDIR/offset"
sleep 0.3
echo '+30d' >"$TMPDIR/offset"
ends_with 0
rm -f "/dev/shm/faketime_shm_$run" "/dev/shm/sem.faketime_sem_$run"
compare "$whole/results.h5" "$TMPDIR/clock/results.h5"
lap "the clock jumps"

# A reader keeps results.h5 open all the time; a second run in the same folder is refused. The first
# notices neither.
begin shared
until_written shared
"$PYTHON" -c '
import sys, h5py
with h5py.File(sys.argv[1]) as f:
    print(len(f["runs"]), flush=True)
    sys.stdin.read()' "$TMPDIR/shared/results.h5" < <(sleep 60) >"$TMPDIR/reading" &
reader=$!
# shellcheck disable=SC2086
expect 6 'another fovea' "$FOVEA" $study --out "$TMPDIR/shared"
ends_with 0
[ -s "$TMPDIR/reading" ] || fail "the reader could not read"
kill $reader
compare "$whole/results.h5" "$TMPDIR/shared/results.h5"
lap "a reader and a second run"

# One experiment asks for more memory than there is: it alone ends, and says so.
code=0
# shellcheck disable=SC2086
(ulimit -v 2600000 && exec "$FOVEA" $study E_hard_attn_32.lm_mlp=1000000 --out "$TMPDIR/memory") \
    >"$TMPDIR/log" 2>&1 || code=$?
[ $code = 5 ] || { cat "$TMPDIR/log"; fail "status $code when memory is short"; }
grep -q 'memory' "$TMPDIR/log" || { cat "$TMPDIR/log"; fail "a lack of memory is not told"; }
[ "$("$FOVEA" status "$TMPDIR/memory" | grep -c ' finished ')" = 2 ] ||
    { "$FOVEA" status "$TMPDIR/memory"; fail "other experiments were lost"; }
"$FOVEA" status "$TMPDIR/memory" | grep -Eq '^E_hard_attn_32 .* failed .*memory' ||
    { "$FOVEA" status "$TMPDIR/memory"; fail "the job does not tell why it failed"; }
lap "too little memory"

# A rank hangs, here before it has told of its job: the watchdog names it, and the run can be gone
# on with. test_watchdog.sh has one that hangs in a step.
begin hang mpirun --oversubscribe -np 2 -- watchdog=5
until_written hang
kill -STOP "$(rank_of hang 1)"
ends_with 5
grep -Eq 'rank 1 on .* hangs: .*(step|between two jobs)' "$TMPDIR/log" || { cat "$TMPDIR/log"; fail "the hung rank is not named"; }
ended_well hang
lap "hang"
