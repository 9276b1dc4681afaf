#!/usr/bin/env bash
# Weights by name: what a run ends with starts another run; info tells what a file would set.
. tests/integration/common

run_tiny "$TMPDIR/first" --only A_baseline
model=$TMPDIR/first/A_baseline/seed_0/model.safetensors
expect 0 '^head.conv1.weight +F32 +\[4, 4, 3, 3\]' "$FOVEA" info "$model"
expect 0 '^[0-9]+ parameters in [0-9]+ tensors, [0-9]+ bytes$' "$FOVEA" info "$model"
cp "$model" "$TMPDIR/no_suffix"
expect 0 '^head.conv1.weight +F32 +\[4, 4, 3, 3\]' "$FOVEA" info "$TMPDIR/no_suffix"
expect 2 'a study comes before them' "$FOVEA" info "$model" "$tiny"
expect 2 'no safetensors file, and no study' "$FOVEA" info "$FOVEA"
expect 3 'safetensors.index.json: cannot be opened' "$FOVEA" info \
    "$TMPDIR/absent.safetensors.index.json"

# two shards and their index are as good as the file they came from
"$PYTHON" - "$model" "$TMPDIR/sharded" <<'P'
import json, os, struct, sys
source, folder = sys.argv[1:]
os.mkdir(folder)
with open(source, "rb") as f:
    header = json.loads(f.read(struct.unpack("<Q", f.read(8))[0]))
    data = f.read()
header.pop("__metadata__")
places = {}
for i in range(2):
    part, body = {}, b""
    for name in sorted(header)[i::2]:
        begin, end = header[name]["data_offsets"]
        part[name] = dict(header[name], data_offsets=[len(body), len(body) + end - begin])
        body += data[begin:end]
        places[name] = f"model-{i}.safetensors"
    text = json.dumps(part).encode()
    with open(f"{folder}/model-{i}.safetensors", "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text + body)
with open(f"{folder}/model.safetensors.index.json", "w") as f:
    json.dump({"metadata": {"total_size": len(data)}, "weight_map": places}, f)
P
index=$TMPDIR/sharded/model.safetensors.index.json
expect 0 '^head.conv1.weight +F32 +\[4, 4, 3, 3\]' "$FOVEA" info "$index"
cmp <("$FOVEA" info "$model" | sort) <("$FOVEA" info "$index" | sort) ||
    fail "info: the shards hold something else than the file"
expect 0 'query_in.weight .* filled' "$FOVEA" info "$tiny" "$model"
grep -q 'missing\|another shape\|left over' "$TMPDIR/out" && fail "info: not all would be filled"
expect 0 'another shape' "$FOVEA" info "$tiny" "$model" query_width=9

# the held-out loss before the first step is that after the other run's last step
run_tiny "$TMPDIR/second" --only A_baseline "init_from=$index"
"$PYTHON" - "$TMPDIR/first/results.h5" "$TMPDIR/second/results.h5" <<'P'
import sys, h5py, numpy as np
first, second = (h5py.File(p) for p in sys.argv[1:])
a = first["runs/A_baseline/seed_0/eval/loss_fine"][-1]
b = second["runs/A_baseline/seed_0/eval/loss_fine"][0]
assert np.array_equal(a, b), (a, b)
assert not np.array_equal(first["runs/A_baseline/seed_0/eval/loss_fine"][0], b)
assert second.attrs["weights"]
sums = second.attrs["weights_sha256"].splitlines()  # of the index and two shards
assert [len(s) for s in sums] == [64] * 3, sums
P

# another shape, nothing of ours, a cut file: status 3
expect 3 'another shape' "$FOVEA" "$tiny" query_width=9 --only A_baseline "init_from=$model" \
    --out "$TMPDIR/no1"
head -c 1000 "$model" >"$TMPDIR/cut.safetensors"
expect 3 'cut.safetensors' "$FOVEA" "$tiny" --only A_baseline \
    "init_from=$TMPDIR/cut.safetensors" --out "$TMPDIR/no2"

# folders as well as files; what is missing is told before anything runs, by --dry-run too
folder=$TMPDIR/first/A_baseline/seed_0
expect 0 'parameters in' "$FOVEA" info "$folder"
expect 0 'usage: fovea info' "$FOVEA" info --help
expect 3 'nosuch: no such file or folder' "$FOVEA" "$tiny" dino_from=nosuch --dry-run

# weights that have changed under their name do not go into an old OUT
cp "$model" "$TMPDIR/start.safetensors"
run_tiny "$TMPDIR/third" --only A_baseline "init_from=$TMPDIR/start.safetensors"
cp "$TMPDIR/second/A_baseline/seed_0/model.safetensors" "$TMPDIR/start.safetensors"
expect 2 'start.safetensors: has changed since' "$FOVEA" "$tiny" \
    "init_from=$TMPDIR/start.safetensors" --out "$TMPDIR/third"
(cd "$TMPDIR/third" && sha256sum -c weights.sha256) >/dev/null 2>&1 && fail "weights.sha256 agrees"
run_tiny "$TMPDIR/third" --only A_baseline "init_from=$TMPDIR/start.safetensors" --fresh
(cd "$TMPDIR/third" && sha256sum -c weights.sha256) >/dev/null || fail "weights.sha256 is wrong"
