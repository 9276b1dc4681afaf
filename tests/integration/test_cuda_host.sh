#!/usr/bin/env bash
# The whole program with the CUDA backend, its kernels on the CPU (tests/cuda_host): the losses of
# --device cpu within rounding, with one rank, with two on one GPU and with a GPU each, also when the
# GPU is behind the host; NCCL's stand-in among ranks; bf16.
. tests/integration/common
host=${B:-build}/hostfast
[ -x "$host/fovea" ] || fail "$host/fovea was not built"
some=A_baseline,G_combined_best # all switches but the entropy term

# on_gpus DEVICES RANKS OPTIONS...: results in $TMPDIR/cuda-DEVICES-RANKS; in fp32 unless
# $precision says otherwise
on_gpus() {
    local devices=$1 ranks=$2 out=$TMPDIR/cuda-$1-$2
    shift 2
    rm -rf "$out"
    CUDA_HOST_DEVICES=$devices mpirun --oversubscribe -np "$ranks" "$host/fovea" "$tiny" \
        --device cuda --out "$out" "precision=${precision:-fp32}" "$@" >"$out.log" 2>&1 || {
        cat "$out.log"
        fail "$ranks ranks on $devices GPUs"
    }
}

# device RANKS DEVICES RANK BUS: what the table of ranks says
device() {
    grep -Eq "^$3 .* kernels on the CPU 0000:$4:00.0, 4 GB" "$TMPDIR/cuda-$2-$1.log" ||
        fail "rank $3 of $1 does not compute on GPU $4 of $2"
}

run_tiny "$TMPDIR/cpu" --device cpu
run_tiny "$TMPDIR/cpu-some" --device cpu --only $some
on_gpus 1 1
device 1 1 0 00
compare "$TMPDIR/cuda-1-1/results.h5" --complete
compare "$TMPDIR/cpu/results.h5" "$TMPDIR/cuda-1-1/results.h5" --close
mv "$TMPDIR/cuda-1-1" "$TMPDIR/alone"
on_gpus 1 2 --only $some --ranks-per-experiment 2
device 2 1 0 00
device 2 1 1 00
compare "$TMPDIR/cpu-some/results.h5" "$TMPDIR/cuda-1-2/results.h5" --close
on_gpus 2 2 --only $some --ranks-per-experiment 2
device 2 2 0 00
device 2 2 1 01
compare "$TMPDIR/cuda-1-2/results.h5" "$TMPDIR/cuda-2-2/results.h5"

grep -q "gradients over MPI: ranks 0 and 1 of the group share the GPU" "$TMPDIR/cuda-1-2.log" ||
    fail "two ranks on one GPU do not say how they average"
grep -q "gradients over NCCL" "$TMPDIR/cuda-2-2.log" || fail "ranks with a GPU each do without NCCL"

# A recorded step, over NCCL too, is the queued one; in bf16.
precision=bf16
on_gpus 2 2 --only $some --ranks-per-experiment 2
mv "$TMPDIR/cuda-2-2" "$TMPDIR/recorded"
on_gpus 2 2 --only $some --ranks-per-experiment 2 graph=false
compare "$TMPDIR/recorded/results.h5" "$TMPDIR/cuda-2-2/results.h5"

# GPUs that are behind the host by up to 20 ms: a wait that is missing changes the losses.
export CUDA_HOST_LATE=20
for graph in true false; do
    on_gpus 2 2 --only $some --ranks-per-experiment 2 graph=$graph
    compare "$TMPDIR/recorded/results.h5" "$TMPDIR/cuda-2-2/results.h5"
done
precision=fp32
on_gpus 1 1 --jobs-per-rank 7
compare "$TMPDIR/alone/results.h5" "$TMPDIR/cuda-1-1/results.h5"
unset CUDA_HOST_LATE precision

expect 5 'comm=nccl: ranks 0 and 1 of the group share the GPU .* use comm=auto or comm=mpi' \
    env CUDA_HOST_DEVICES=1 mpirun --oversubscribe -np 2 "$host/fovea" "$tiny" --device cuda \
    comm=nccl --ranks-per-experiment 2 --out "$TMPDIR/refused"

# The launcher shows each rank a GPU of its own.
# shellcheck disable=SC2016 # expanded by each rank
on_gpus_of_their_own='CUDA_VISIBLE_DEVICES=$((3 - OMPI_COMM_WORLD_RANK)) exec "$@"'
CUDA_HOST_DEVICES=4 mpirun --oversubscribe -np 2 sh -c "$on_gpus_of_their_own" sh "$host/fovea" \
    "$tiny" --device cuda --out "$TMPDIR/own" --only $some --ranks-per-experiment 2 \
    precision=fp32 >"$TMPDIR/cuda-1-2.log" 2>&1 || fail "a GPU shown to each rank"
device 2 1 0 03
device 2 1 1 02
compare "$TMPDIR/cuda-1-2/results.h5" "$TMPDIR/own/results.h5"

# bf16, what auto is on a GPU: other losses, by less than one of its roundings, 2^-8, and the same bits
# recorded and queued.
precision=auto on_gpus 3 1 --only $some
mv "$TMPDIR/cuda-3-1" "$TMPDIR/bf16"
precision=bf16 on_gpus 3 1 --only $some graph=false
"$PYTHON" - $some "$TMPDIR"/{cpu,bf16,cuda-3-1}/results.h5 <<'P' || fail "bf16"
import sys, h5py, numpy as np
files = [h5py.File(path)["runs"] for path in sys.argv[2:]]
for name in sys.argv[1].split(","):
    exact, run, again = (runs[name]["seed_0"] for runs in files)
    assert run.attrs["device"].endswith(", bf16"), run.attrs["device"]
    assert run.attrs["status"] == again.attrs["status"] == "finished"
    for column in ("loss_fine", "loss_coarse"):
        want, got = exact[column][()], run[column][()]
        assert not np.array_equal(got, want), (name, column)
        assert np.abs(got / want - 1).max() < 1 / 256, (name, column, got, want)
        assert np.array_equal(got, again[column][()]), (name, column)
P

expect 5 'sees no GPU \(no CUDA-capable device is detected\)' \
    env CUDA_HOST_DEVICES=0 "$host/fovea" "$tiny" --device cuda --out "$TMPDIR/none"

for ranks in 2 3; do
    mpirun --oversubscribe -np $ranks "$host/test_nccl" >"$TMPDIR/log" 2>&1 || {
        cat "$TMPDIR/log"
        fail "NCCL's stand-in among $ranks ranks"
    }
    [ "$(grep -c '^\[       OK \]' "$TMPDIR/log")" = $ranks ] || fail "NCCL's tests did not all run"
done
