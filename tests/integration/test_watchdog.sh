#!/usr/bin/env bash
# A rank that is stopped in its tracks ends the run within the limit, with one line that names it;
# the same command then goes on to the results of an undisturbed run.
. tests/integration/common
two() { mpirun --oversubscribe -np 2 "$FOVEA" "$tiny" steps=300 eval_every=150 map_every=300 --ranks-per-experiment 2 \
    --only A_baseline checkpoint_seconds=0.3 "$@"; }

two --out "$TMPDIR/undisturbed" >"$TMPDIR/log" 2>&1 || { cat "$TMPDIR/log"; exit 1; }

two watchdog=4 --out "$TMPDIR/out" >"$TMPDIR/hung" 2>&1 &
launcher=$!
until compgen -G "$TMPDIR/out/A_baseline/seed_*/checkpoint-*" >/dev/null; do
    kill -0 $launcher 2>/dev/null || { cat "$TMPDIR/hung"; fail "ended before its first checkpoint"; }
    sleep 0.05
done
for pid in $(pgrep -f -- "--out $TMPDIR/out"); do
    grep -qz '^OMPI_COMM_WORLD_RANK=1$' "/proc/$pid/environ" && kill -STOP "$pid"
done
got=0
wait $launcher || got=$?
[ $got = 5 ] || { cat "$TMPDIR/hung"; fail "exit status $got instead of 5"; }
grep -Eq 'rank 1 on .* hangs: A_baseline seed 0, step [0-9]+, no progress for [0-9]+ seconds \(watchdog\)' \
    "$TMPDIR/hung" || { cat "$TMPDIR/hung"; fail "the rank is not named"; }

two --out "$TMPDIR/out" >"$TMPDIR/log" 2>&1 || { cat "$TMPDIR/log"; exit 1; }
compare "$TMPDIR/undisturbed/results.h5" "$TMPDIR/out/results.h5"
