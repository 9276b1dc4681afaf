#!/usr/bin/env bash
# Weights by name: what a run ends with starts another run; info tells what a file would set.
. tests/integration/common

run_tiny "$TMPDIR/first" --only A_baseline
model=$TMPDIR/first/A_baseline/seed_0/model.safetensors
expect 0 '^head.conv1.weight +F32 +\[4, 4, 3, 3\]' "$FOVEA" info "$model"
expect 0 'query_in.weight .* filled' "$FOVEA" info "$tiny" "$model"
grep -q 'missing\|another shape\|left over' "$TMPDIR/out" && fail "info: not all would be filled"
expect 0 'another shape' "$FOVEA" info "$tiny" "$model" query_width=9

# the held-out loss before the first step is that after the other run's last step
run_tiny "$TMPDIR/second" --only A_baseline "init_from=$model"
"$PYTHON" - "$TMPDIR/first/results.h5" "$TMPDIR/second/results.h5" <<'P'
import sys, h5py, numpy as np
first, second = (h5py.File(p) for p in sys.argv[1:])
a = first["runs/A_baseline/seed_0/eval/loss_fine"][-1]
b = second["runs/A_baseline/seed_0/eval/loss_fine"][0]
assert np.array_equal(a, b), (a, b)
assert not np.array_equal(first["runs/A_baseline/seed_0/eval/loss_fine"][0], b)
assert second.attrs["weights"] and len(second.attrs["weights_sha256"]) == 64
P

# another shape, nothing of ours, a cut file: status 3
expect 3 'another shape' "$FOVEA" "$tiny" query_width=9 --only A_baseline "init_from=$model" \
    --out "$TMPDIR/no1"
head -c 1000 "$model" >"$TMPDIR/cut.safetensors"
expect 3 'cut.safetensors' "$FOVEA" "$tiny" --only A_baseline \
    "init_from=$TMPDIR/cut.safetensors" --out "$TMPDIR/no2"
