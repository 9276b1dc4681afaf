#!/usr/bin/env bash
# Wrong input: one clear line, the exit status of the table, nothing lost.
. tests/integration/common
f=$FOVEA

expect 2 'no such option' "$f" --frobnicate
expect 2 'needs a value' "$f" --out
expect 2 'whole number' "$f" --jobs-per-rank 0
expect 2 'cannot be read|No such file' "$f" nowhere.yaml
expect 2 'did you mean "temperature"' "$f" "$tiny" temprature=1
expect 2 'steps.*"many"' "$f" "$tiny" steps=many
expect 2 'no such experiment' "$f" "$tiny" --only Z
CUDA_VISIBLE_DEVICES='' expect 5 'device cpu' "$f" "$tiny" --device cuda
expect 2 'precision.*auto\|fp32\|bf16' "$f" "$tiny" precision=half
expect 2 'B_.*: precision bf16: the processor' "$f" "$tiny" --device cpu B_temp_0.1.precision=bf16
expect 2 'does not divide' "$f" "$tiny" --ranks-per-experiment 2
expect 2 'does not divide' mpirun --oversubscribe -np 2 "$f" "$tiny" --ranks-per-experiment 2 \
    batch=3 --out "$TMPDIR/no"
expect 5 'finds itself alone' env PMI_SIZE=4 "$f" "$tiny" --out "$TMPDIR/no"
expect 3 'nowhere.h5' "$f" "$tiny" data=nowhere.h5 --out "$TMPDIR/no"
echo "no HDF5" >"$TMPDIR/bad.h5"
expect 3 'bad.h5' "$f" "$tiny" "data=$TMPDIR/bad.h5" --out "$TMPDIR/no"
expect 3 'bad.safetensors' "$f" "$tiny" "init_from=$TMPDIR/bad.safetensors" --out "$TMPDIR/no2"
echo file >"$TMPDIR/file"
expect 6 'file' "$f" "$tiny" --out "$TMPDIR/file/out"
expect 2 'usage' "$f" status
expect 2 'study.yaml' "$f" status "$TMPDIR/nowhere"

# another study in an old OUT is refused, with the difference named; --fresh starts over
"$f" "$tiny" --only A_baseline --out "$TMPDIR/old" >/dev/null 2>&1
expect 2 'lr' "$f" "$tiny" lr=0.5 --only A_baseline --out "$TMPDIR/old"
expect 0 'results' "$f" "$tiny" lr=0.005 --only A_baseline --out "$TMPDIR/old" --fresh
expect 0 'finished' "$f" status "$TMPDIR/old"

# a second writer
"$f" "$tiny" steps=100000 --only A_baseline --out "$TMPDIR/busy" >/dev/null 2>&1 &
run=$!
for _ in $(seq 50); do [ -f "$TMPDIR/busy/results.h5" ] && break; sleep 0.1; done
expect 6 'another fovea' "$f" "$tiny" steps=100000 --only A_baseline --out "$TMPDIR/busy"
kill -TERM $run
wait $run || [ $? = 75 ]

# a value that is not finite ends that job alone, named, before the update
expect 4 'not finite' "$f" "$tiny" steps=400 C_contrastive.lr=1000 --out "$TMPDIR/nan" \
    --jobs-per-rank 2
"$PYTHON" - "$TMPDIR/nan/results.h5" <<'P'
import sys, h5py, numpy as np
runs = h5py.File(sys.argv[1])["runs"]
for name, run in runs.items():
    run = run["seed_0"]
    bad = name == "C_contrastive"
    assert run.attrs["status"] == ("failed" if bad else "finished"), (name, run.attrs["status"])
    if bad:
        why = run.attrs["why"]
        assert "step" in why and "clips" in why, why
    assert np.isfinite(run["loss_fine"][()]).all()
P

# a full disk, as a limit on the size of files: results.h5 stays whole. Open MPI is kept from making
# large files of its own.
expect 6 'File too large' env PMIX_MCA_gds=hash OMPI_MCA_btl=self OMPI_MCA_pml=ob1 \
    bash -c 'ulimit -f 600; exec "$@"' - "$f" "$tiny" steps=3000 --out "$TMPDIR/full"
"$PYTHON" -c 'import sys, h5py; print(len(h5py.File(sys.argv[1])))' "$TMPDIR/full/results.h5"
