#!/usr/bin/env bash
# Killed at random moments and run again, or stopped by a signal: the same losses to the bit, and
# what results.h5 has shown never shrinks.
. tests/integration/common
steps="steps=60 checkpoint_steps=7 eval_every=20 map_every=20"

# shellcheck disable=SC2086
run_tiny "$TMPDIR/whole" $steps
seconds=0
for kill in 1 2 3 4 5 6; do
    # shellcheck disable=SC2086
    "$FOVEA" "$tiny" $steps --out "$TMPDIR/killed" >"$TMPDIR/log" 2>&1 &
    run=$!
    sleep "0.$((RANDOM % 6 + 4))"
    kill -KILL $run 2>/dev/null || true
    wait $run 2>/dev/null || true
    [ -f "$TMPDIR/killed/results.h5" ] || continue
    shown=$("$PYTHON" -c '
import sys, h5py
f = h5py.File(sys.argv[1])
print(sum(len(s["loss_fine"]) for e in f["runs"].values() for s in e.values()))' \
        "$TMPDIR/killed/results.h5")
    [ "$shown" -ge "$seconds" ] || fail "$shown steps shown after $seconds before"
    seconds=$shown
done
# shellcheck disable=SC2086
run_tiny "$TMPDIR/killed" $steps
compare "$TMPDIR/killed/results.h5" --complete
compare "$TMPDIR/whole/results.h5" "$TMPDIR/killed/results.h5"

# a signal checkpoints, status 75, and the same command goes on
for signal in USR1 TERM INT; do
    # shellcheck disable=SC2086
    "$FOVEA" "$tiny" $steps steps=3000 --only A_baseline --out "$TMPDIR/$signal" \
        >"$TMPDIR/log" 2>&1 &
    run=$!
    sleep 1.2
    kill -$signal $run
    status=0
    wait $run || status=$?
    [ $status = 75 ] || { cat "$TMPDIR/log"; fail "status $status after $signal"; }
    ls "$TMPDIR/$signal"/A_baseline/seed_0/checkpoint-*.safetensors >/dev/null
done

# mpirun hands USR1 on to every rank
# shellcheck disable=SC2086
mpirun --oversubscribe -np 2 "$FOVEA" "$tiny" $steps steps=3000 --out "$TMPDIR/mpi" \
    >"$TMPDIR/log" 2>&1 &
run=$!
sleep 1.5
kill -USR1 $run
status=0
wait $run || status=$?
[ $status = 75 ] || { cat "$TMPDIR/log"; fail "status $status of mpirun after USR1"; }

# a damaged newest checkpoint: the one before is taken, the end is the same
# shellcheck disable=SC2086
"$FOVEA" "$tiny" $steps --only A_baseline --out "$TMPDIR/damaged" >"$TMPDIR/log" 2>&1
folder=$TMPDIR/damaged/A_baseline/seed_0
newest=$(ls "$folder"/checkpoint-*.safetensors | tail -n 1)
truncate -s -100 "$newest"
"$PYTHON" - "$folder/history.safetensors" <<'P'
import os, sys
os.remove(sys.argv[1])
P
# shellcheck disable=SC2086
"$FOVEA" "$tiny" $steps --only A_baseline --out "$TMPDIR/damaged" >"$TMPDIR/log" 2>&1
grep -q "passed over" "$TMPDIR/log" || { cat "$TMPDIR/log"; fail "damage is not told"; }
"$PYTHON" - "$TMPDIR/whole/results.h5" "$TMPDIR/damaged/results.h5" <<'P'
import sys, h5py, numpy as np
a, b = (h5py.File(p)["runs/A_baseline/seed_0/loss_fine"][()] for p in sys.argv[1:])
assert len(a) == 60 and np.array_equal(a, b)
P

# all checkpoints damaged: it starts over, and the new ones are kept although their steps are lower
for file in "$folder"/checkpoint-*.safetensors; do truncate -s -100 "$file"; done
rm "$folder/history.safetensors"
# shellcheck disable=SC2086
"$FOVEA" "$tiny" $steps --only A_baseline --out "$TMPDIR/damaged" >"$TMPDIR/log" 2>&1 &
run=$!
for _ in $(seq 200); do
    ls "$folder"/checkpoint-000000000[1-9].safetensors "$folder"/checkpoint-00000000[1-4]?.safetensors \
        >"$TMPDIR/early" 2>/dev/null || true
    [ -s "$TMPDIR/early" ] && break
    sleep 0.01
done
kill -KILL $run 2>/dev/null || true
wait $run 2>/dev/null || true
# shellcheck disable=SC2086
"$FOVEA" "$tiny" $steps --only A_baseline --out "$TMPDIR/damaged" >"$TMPDIR/log" 2>&1
grep -q "passed over" "$TMPDIR/log" && { cat "$TMPDIR/log"; fail "a damaged checkpoint was kept"; }
for file in "$folder"/checkpoint-*.safetensors; do
    "$FOVEA" info "$file" >/dev/null || fail "$file is damaged"
done
