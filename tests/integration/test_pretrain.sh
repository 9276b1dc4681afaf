#!/usr/bin/env bash
# fovea pretrain: the same bits whether it was killed or not, ranks that agree, OUT that is gone on
# with or refused, and an encoder that a study starts from.
. tests/integration/common

sizes="patch=5 dino_width=16 dino_heads=2 dino_layers=2 dino_mlp=16 head_width=12 head_out=6
    prototypes=24 image_size=16 crop_size=15 local_size=10 locals=2 clips=20 frames=2 batch=4"
# shellcheck disable=SC2206
short=($sizes steps=12 warmup_steps=3 still_steps=2)
# shellcheck disable=SC2206
long=($sizes steps=400 warmup_steps=30 checkpoint_steps=7)
pretrain() { "$FOVEA" pretrain "$@" >"$TMPDIR/log" 2>&1 || return $?; }
same_model() {
    cmp "$1/model.safetensors" "$2/model.safetensors" || fail "another model in $2"
    cmp "$1/pretrain.tsv" "$2/pretrain.tsv" || fail "another table in $2"
}

# twice the same; a command that is done does nothing more
pretrain procedural "${short[@]}" --out "$TMPDIR/a"
grep -q "dino_from=$TMPDIR/a trains a study on it" "$TMPDIR/log" || fail "no word of what it is for"
pretrain procedural "${short[@]}" --threads 2 --out "$TMPDIR/b"
same_model "$TMPDIR/a" "$TMPDIR/b"
[ "$(wc -l <"$TMPDIR/a/pretrain.tsv")" = 13 ] || fail "the table has not one line a step"
cp -r "$TMPDIR/a" "$TMPDIR/kept"
pretrain procedural "${short[@]}" --out "$TMPDIR/a"
same_model "$TMPDIR/a" "$TMPDIR/kept"

# killed at random moments, then to the end
pretrain procedural "${long[@]}" --out "$TMPDIR/whole"
for _ in 1 2 3; do
    "$FOVEA" pretrain procedural "${long[@]}" --out "$TMPDIR/killed" >"$TMPDIR/log" 2>&1 &
    run=$!
    sleep "0.$((RANDOM % 5 + 2))"
    kill -KILL $run 2>/dev/null || true
    wait $run 2>/dev/null || true
done
pretrain procedural "${long[@]}" --out "$TMPDIR/killed"
same_model "$TMPDIR/whole" "$TMPDIR/killed"
if compgen -G "$TMPDIR/killed/*.tmp-*" >"$TMPDIR/left"; then fail "left: $(cat "$TMPDIR/left")"; fi

# a signal: a checkpoint, status 75, and the same command goes on
"$FOVEA" pretrain procedural "${long[@]}" steps=100000 --out "$TMPDIR/stopped" \
    >"$TMPDIR/log" 2>&1 &
run=$!
for _ in $(seq 500); do [ -f "$TMPDIR/stopped/pretrain.tsv" ] && break; sleep 0.02; done
kill -TERM $run
status=0
wait $run || status=$?
[ $status = 75 ] || { cat "$TMPDIR/log"; fail "status $status after TERM"; }
grep -q 'stopped after step [0-9]*; the same command goes on' "$TMPDIR/log" || fail "no line"
"$FOVEA" pretrain procedural "${long[@]}" steps=100000 --out "$TMPDIR/stopped" \
    >"$TMPDIR/log" 2>&1 &
run=$!
for _ in $(seq 500); do grep -q 'goes on after step [1-9]' "$TMPDIR/log" && break; sleep 0.02; done
kill -TERM $run
wait $run || true
grep -q 'goes on after step [1-9]' "$TMPDIR/log" || { cat "$TMPDIR/log"; fail "it started over"; }

# two ranks: the same crops, sums in another order
# shellcheck disable=SC2206
five=($sizes steps=5 warmup_steps=3 lr=0.01)
pretrain procedural "${five[@]}" --out "$TMPDIR/one"
mpirun --oversubscribe -np 2 "$FOVEA" pretrain procedural "${five[@]}" --threads 1 \
    --out "$TMPDIR/two" >"$TMPDIR/log" 2>&1 || { cat "$TMPDIR/log"; fail "two ranks"; }
"$PYTHON" - "$TMPDIR/one/pretrain.tsv" "$TMPDIR/two/pretrain.tsv" <<'P'
import sys
import numpy as np
one, two = (np.genfromtxt(p, names=True) for p in sys.argv[1:])
assert len(one) == len(two) == 5
for name in one.dtype.names:
    assert np.isfinite(one[name]).all(), name
    assert np.allclose(one[name], two[name], rtol=1e-4, atol=0), (name, one[name], two[name])
assert len(set(one["loss"])) == 5
P
expect 2 'batch 4 cannot be shared equally by 3 ranks' mpirun --oversubscribe -np 3 "$FOVEA" \
    pretrain procedural "${five[@]}" --out "$TMPDIR/three"

# clips of a file; the procedural ones of the same seed, so the same model
"$FOVEA" prepare procedural -o "$TMPDIR/clips.h5" --size 16 --frames 2 --clips-train 20 \
    --clips-held-out 2 --seed 1 >"$TMPDIR/log" 2>&1
pretrain "$TMPDIR/clips.h5" "${short[@]}" --out "$TMPDIR/file"
cmp "$TMPDIR/a/model.safetensors" "$TMPDIR/file/model.safetensors" ||
    fail "clips.h5 gives another model than the clips it holds"

expect 3 'nosuch.h5: No such file.*`fovea prepare`, or procedural' \
    "$FOVEA" pretrain "$TMPDIR/nosuch.h5" "${short[@]}" --out "$TMPDIR/none"
[ ! -e "$TMPDIR/none" ] || fail "a folder for data that is not there"
expect 0 '[-]-device auto.cuda.cpu' "$FOVEA" pretrain --help

# another setting in an old OUT, or other data; --fresh starts over, but not for what cannot run
cp -r "$TMPDIR/a" "$TMPDIR/old"
expect 2 'old/pretrain.yaml was begun with "locals: 2", now "locals: 3"' \
    "$FOVEA" pretrain procedural "${short[@]}" locals=3 --out "$TMPDIR/old"
expect 2 'was begun with "data: [0-9a-f]*", now "data: [0-9a-f]*"' \
    "$FOVEA" pretrain "$TMPDIR/clips.h5" "${short[@]}" --out "$TMPDIR/old"
expect 2 'dino_width 16: must be a multiple of dino_heads 3' \
    "$FOVEA" pretrain procedural "${short[@]}" dino_heads=3 --fresh --out "$TMPDIR/old"
same_model "$TMPDIR/a" "$TMPDIR/old"
pretrain procedural "${short[@]}" locals=3 --fresh --out "$TMPDIR/old"
cmp -s "$TMPDIR/a/model.safetensors" "$TMPDIR/old/model.safetensors" && fail "--fresh: same model"
pretrain procedural "${short[@]}" locals=3 --out "$TMPDIR/new"
same_model "$TMPDIR/new" "$TMPDIR/old"
# checkpoints may come at other steps
pretrain procedural "${short[@]}" checkpoint_steps=5 --out "$TMPDIR/a"
# settings that cannot run leave nothing that keeps the right ones out
expect 2 'must be a multiple' \
    "$FOVEA" pretrain procedural "${short[@]}" dino_heads=3 --out "$TMPDIR/slip"
pretrain procedural "${short[@]}" --out "$TMPDIR/slip"

# a study starts from it, and takes its sizes; Hugging Face's names and sizes
"$FOVEA" "$tiny" --only A_baseline "dino_from=$TMPDIR/a" --out "$TMPDIR/study" \
    >"$TMPDIR/log" 2>&1 || { cat "$TMPDIR/log"; fail "no study on it"; }
expect 0 'dino.layernorm.weight .* filled' "$FOVEA" info "$tiny" "$TMPDIR/a/model.safetensors"
grep '^dino\.' "$TMPDIR/out" | grep -v 'filled$' && fail "info: not all of dino would be filled"
expect 3 'dino_width 8: .*config.json says 16' "$FOVEA" "$tiny" --only A_baseline dino_width=8 \
    "dino_from=$TMPDIR/a" --out "$TMPDIR/no"
"$PYTHON" - "$TMPDIR/a" <<'P'
import json, struct, sys
with open(f"{sys.argv[1]}/model.safetensors", "rb") as f:
    header = json.loads(f.read(struct.unpack("<Q", f.read(8))[0]))
assert header.pop("__metadata__")["format"] == "pt"
shapes = {name: tuple(t["shape"]) for name, t in header.items()}
assert {t["dtype"] for t in header.values()} == {"F32"}
assert shapes["embeddings.cls_token"] == (1, 1, 16)
assert shapes["embeddings.mask_token"] == (1, 16)
assert shapes["embeddings.position_embeddings"] == (1, 10, 16)
assert shapes["embeddings.patch_embeddings.projection.weight"] == (16, 3, 5, 5)
assert shapes["encoder.layer.1.attention.attention.query.weight"] == (16, 16)
assert shapes["layernorm.bias"] == (16,)
assert len(shapes) == 7 + 2 * 18
config = json.load(open(f"{sys.argv[1]}/config.json"))
assert config["model_type"] == "dinov2" and config["architectures"] == ["Dinov2Model"]
sizes = [config[k] for k in ("hidden_size", "num_hidden_layers", "num_attention_heads",
                             "mlp_ratio", "image_size", "patch_size")]
assert sizes == [16, 2, 2, 1, 15, 5], sizes
try:
    from safetensors.numpy import load_file
except ImportError:
    sys.exit()
tensors = load_file(f"{sys.argv[1]}/model.safetensors")
assert {name: t.shape for name, t in tensors.items()} == shapes
P

# what is refused, and how
expect 2 'name the data' "$FOVEA" pretrain "steps=3" --out "$TMPDIR/no"
expect 2 'key "prototype" is not known; did you mean "prototypes"' \
    "$FOVEA" pretrain procedural prototype=3 --out "$TMPDIR/no"
expect 2 'steps.*abc' "$FOVEA" pretrain procedural steps=abc --out "$TMPDIR/no"
expect 2 'local_area 0.5 must be below crop_area 0.4' \
    "$FOVEA" pretrain procedural local_area=0.5 --out "$TMPDIR/no"
expect 2 'dino_mlp 17 must be a multiple of dino_width 16' \
    "$FOVEA" pretrain procedural "${short[@]}" dino_mlp=17 --out "$TMPDIR/no"
expect 2 'patch 11: does not fit' "$FOVEA" pretrain procedural "${short[@]}" patch=11 \
    --out "$TMPDIR/no"
expect 2 '4 of 4 patches hidden: some must be seen; lower mask_share' \
    "$FOVEA" pretrain procedural "${short[@]}" crop_size=10 mask_share=0.9 --out "$TMPDIR/no"
expect 2 'all ranks share the one job' "$FOVEA" pretrain procedural --only A --out "$TMPDIR/no"
expect 3 'absent.h5' "$FOVEA" pretrain "$TMPDIR/absent.h5" --out "$TMPDIR/no"
expect 3 'log' "$FOVEA" pretrain "$TMPDIR/log" --out "$TMPDIR/no"
expect 3 'a step needs batch=4 clips, there are 3' "$FOVEA" pretrain procedural "${short[@]}" clips=3 \
    --out "$TMPDIR/no"
expect 4 'loss .*not finite; lower lr' "$FOVEA" pretrain procedural "${short[@]}" steps=40 lr=1000 \
    lr_end=1000 warmup_steps=0 clip_norm=1e30 --out "$TMPDIR/no"
"$FOVEA" pretrain procedural "${short[@]}" locals=0 crop_area=0.04 --out "$TMPDIR/large" \
    >"$TMPDIR/log" 2>&1 || { cat "$TMPDIR/log"; fail "small crops are asked for where there are none"; }

# a folder that holds something else keeps it, --fresh or not
mkdir "$TMPDIR/model"
cp "$TMPDIR/a/config.json" "$TMPDIR/a/model.safetensors" "$TMPDIR/model"
for fresh in '' --fresh; do
    # shellcheck disable=SC2086
    expect 2 'holds a model that pretrain has not made' \
        "$FOVEA" pretrain procedural "${short[@]}" locals=3 --out "$TMPDIR/model" $fresh
    # shellcheck disable=SC2086
    expect 2 'holds a study' \
        "$FOVEA" pretrain procedural "${short[@]}" --out "$TMPDIR/study" $fresh
    # shellcheck disable=SC2086
    expect 2 'holds a pretrained encoder' "$FOVEA" "$tiny" --only A_baseline --out "$TMPDIR/a" $fresh
done
cmp "$TMPDIR/a/model.safetensors" "$TMPDIR/model/model.safetensors"
[ -f "$TMPDIR/study/results.h5" ] || fail "a study's results are gone"

# clips of which none is held out will do
"$FOVEA" prepare procedural -o "$TMPDIR/all.h5" --size 16 --frames 2 --clips-train 20 \
    --clips-held-out 2 >"$TMPDIR/log" 2>&1
"$PYTHON" -c 'import sys, h5py; h5py.File(sys.argv[1], "r+")["split"][:] = 0' "$TMPDIR/all.h5"
pretrain "$TMPDIR/all.h5" "${short[@]}" --out "$TMPDIR/from-all"

# a loss that is not finite: one line of one rank, and no abort
expect 4 'not finite; lower lr' mpirun --oversubscribe -np 2 "$FOVEA" pretrain procedural \
    "${short[@]}" warmup_steps=0 clip_norm=1e30 lr=1e3 steps=300 --out "$TMPDIR/wild"
[ "$(grep -c 'not finite' "$TMPDIR/out")" = 1 ] || { cat "$TMPDIR/out"; fail "told twice"; }
grep -q 'MPI_ABORT' "$TMPDIR/out" && fail "an abort banner"
true
