#!/usr/bin/env bash
# The same losses to the bit with other threads, ranks, jobs per rank; within rounding with an
# experiment shared by two ranks.
. tests/integration/common

run_tiny "$TMPDIR/one" --threads 1
compare "$TMPDIR/one/results.h5" --complete
run_tiny "$TMPDIR/threads" --threads 3
compare "$TMPDIR/one/results.h5" "$TMPDIR/threads/results.h5"
run_tiny "$TMPDIR/jobs" --jobs-per-rank 3
compare "$TMPDIR/one/results.h5" "$TMPDIR/jobs/results.h5"
mpirun --oversubscribe -np 3 "$FOVEA" "$tiny" --out "$TMPDIR/ranks" >"$TMPDIR/log" 2>&1
compare "$TMPDIR/one/results.h5" "$TMPDIR/ranks/results.h5"
mpirun --oversubscribe -np 4 "$FOVEA" "$tiny" --ranks-per-experiment 2 --jobs-per-rank 2 \
    --out "$TMPDIR/shards" >"$TMPDIR/log" 2>&1
compare "$TMPDIR/one/results.h5" "$TMPDIR/shards/results.h5" --close
mpirun --oversubscribe -np 2 "$FOVEA" "$tiny" --ranks-per-experiment 2 --out "$TMPDIR/shards2" \
    >"$TMPDIR/log" 2>&1
compare "$TMPDIR/shards/results.h5" "$TMPDIR/shards2/results.h5"

# without the savings: more work, the same numbers within rounding
run_tiny "$TMPDIR/whole" skip_tail=false share_text=false share_convolutions=false cache_encoder=false
compare "$TMPDIR/one/results.h5" "$TMPDIR/whole/results.h5" --close

# jobs that share stored outputs: all clips are stored, and it matters to no bit who stored them
run_tiny "$TMPDIR/stored" --jobs-per-rank 4 --only D_freeze_dino,G_combined_best seeds=0,1
grep -q "outputs are kept for 30 of 30 clips" "$TMPDIR/stored/log.txt" ||
    fail "the log does not tell of the stored clips"
run_tiny "$TMPDIR/alone" --only D_freeze_dino,G_combined_best seeds=0,1
compare "$TMPDIR/alone/results.h5" "$TMPDIR/stored/results.h5"

# order of the jobs: one experiment alone gives what it gave among the seven
run_tiny "$TMPDIR/only" --only D_freeze_dino
"$PYTHON" - "$TMPDIR/one/results.h5" "$TMPDIR/only/results.h5" <<'P'
import sys, h5py, numpy as np
a, b = (h5py.File(p)["runs/D_freeze_dino/seed_0/loss_fine"][()] for p in sys.argv[1:])
assert len(a) and np.array_equal(a, b)
P
