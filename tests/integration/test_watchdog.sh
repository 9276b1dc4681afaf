#!/usr/bin/env bash
# A rank that is stopped in its tracks ends the run within the limit, with one line that names it,
# rank 0 too; the same command then goes on to the results of an undisturbed run. Neither work between
# steps nor a suspended job is taken for it.
. tests/integration/common
two() { mpirun --oversubscribe -np 2 "$FOVEA" "$tiny" steps=300 eval_every=150 map_every=300 --ranks-per-experiment 2 \
    --only A_baseline checkpoint_seconds=0.3 "$@"; }

two --out "$TMPDIR/undisturbed" >"$TMPDIR/log" 2>&1 || { cat "$TMPDIR/log"; exit 1; }

# The pids of the ranks of the run into $1, by rank.
ranks_of() {
    local pid
    for pid in $(pgrep -f -- "--out $1"); do
        if grep -qz '^OMPI_COMM_WORLD_RANK=' "/proc/$pid/environ"; then
            tr '\0' '\n' <"/proc/$pid/environ" | sed -n "s/^OMPI_COMM_WORLD_RANK=/$pid /p"
        fi
    done | sort -k 2 -n | cut -d ' ' -f 1
}

# start OUT OPTIONS...: a run in the background, until it has written a checkpoint
start() {
    two --out "$@" >"$TMPDIR/hung" 2>&1 &
    launcher=$!
    until compgen -G "$1/A_baseline/seed_*/checkpoint-*" >/dev/null; do
        kill -0 $launcher 2>/dev/null || { cat "$TMPDIR/hung"; fail "ended before its first checkpoint"; }
        sleep 0.05
    done
}

ends() { # STATUS
    local got=0
    wait $launcher || got=$?
    [ $got = "$1" ] || { cat "$TMPDIR/hung"; fail "exit status $got instead of $1"; }
}

for rank in 1 0; do
    start "$TMPDIR/out-$rank" watchdog=4
    mapfile -t pids < <(ranks_of "$TMPDIR/out-$rank")
    kill -STOP "${pids[rank]}"
    ends 5
    grep -Eq "rank $rank on .* hangs: .* no progress for [0-9]+ seconds \(watchdog\)" "$TMPDIR/hung" ||
        { cat "$TMPDIR/hung"; fail "rank $rank is not named"; }
done
two --out "$TMPDIR/out-0" >"$TMPDIR/log" 2>&1 || { cat "$TMPDIR/log"; exit 1; }
compare "$TMPDIR/undisturbed/results.h5" "$TMPDIR/out-0/results.h5"

# Suspended as a whole for longer than the limit, as by `scontrol suspend`.
start "$TMPDIR/suspended" watchdog=4
mapfile -t pids < <(ranks_of "$TMPDIR/suspended")
kill -STOP "${pids[@]}"
sleep 6
kill -CONT "${pids[@]}"
ends 0
compare "$TMPDIR/undisturbed/results.h5" "$TMPDIR/suspended/results.h5"

# An evaluation that takes longer than the limit, batch by batch.
"$FOVEA" "$tiny" steps=2 clips_held_out=6000 watchdog=1 --only A_baseline --out "$TMPDIR/long" >"$TMPDIR/log" 2>&1 ||
    { cat "$TMPDIR/log"; fail "a long evaluation is no hang"; }
