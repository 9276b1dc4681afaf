#!/usr/bin/env bash
# fovea latents: the same bits whether it was killed or not, and a data file that is whole whatever
# happens.
. tests/integration/common
f=$FOVEA
tests=$PWD/tests/integration
study=$PWD/$tiny
weights() { "$PYTHON" "$tests/taesd_weights.py" "$@"; }
partial_size() { stat -c %s clips.h5.latents-partial 2>/dev/null || echo 0; }
cd "$TMPDIR"
weights vae.safetensors
"$f" prepare procedural -o plain.h5 --size 32 --frames 4 --clips-train 18 --clips-held-out 6 >log

# what it writes; prepared clips stay as they were
cp plain.h5 clips.h5
expect 0 'latents of 24 clips, 4 frames of 4 x 4 x 4, made with vae.safetensors' \
    "$f" latents clips.h5 --vae vae.safetensors
[ ! -e clips.h5.latents-partial ] || fail "the partial file was left"
"$PYTHON" - <<'P'
import hashlib, h5py, numpy as np
with h5py.File("clips.h5") as f, h5py.File("plain.h5") as before:
    latents = f["latents"]
    assert latents.shape == (24, 4, 4, 4, 4) and latents.dtype == np.float32
    assert np.isfinite(latents[()]).all() and latents[()].std() > 0
    assert latents.attrs["vae"] == "vae.safetensors" and latents.attrs["units"] == "1"
    assert latents.attrs["vae_sha256"] == hashlib.sha256(open("vae.safetensors", "rb").read()).hexdigest()
    assert "clip, frame, channel" in latents.attrs["long_name"]
    assert set(f) == set(before) | {"latents"} and dict(f.attrs) == dict(before.attrs)
    for name in before:
        assert np.array_equal(f[name][()], before[name][()]), name
P
cp clips.h5 whole.h5
expect 0 'has the latents of vae.safetensors already' "$f" latents clips.h5 --vae vae.safetensors
cmp clips.h5 whole.h5 || fail "a second call changed the file"

# a study predicts them
expect 0 'results' "$f" "$study" --only A_baseline data=clips.h5 latents=file image_size=32 frames=4 \
    --out study

# kills the command once it has kept a clip more than OLD bytes hold
killed() { # SIGNAL OLD ARGUMENTS...
    local signal=$1 old=$2 run
    shift 2
    rm -f log
    "$f" latents clips.h5 --threads 1 "$@" >log 2>&1 &
    run=$!
    for _ in $(seq 1500); do [ "$(partial_size)" -gt $((old + 1100)) ] && break; sleep 0.02; done
    kill -"$signal" $run
    status=0
    wait $run || status=$?
}

# one thread, killed twice, cut within a record, stopped: the same file
cp plain.h5 clips.h5
old=256 # bytes before the first clip's 1032
for signal in KILL KILL TERM; do
    killed $signal "$old" --vae vae.safetensors
    cmp clips.h5 plain.h5 || fail "clips.h5 was touched before the end"
    [ $signal = KILL ] || [ $status = 75 ] || { cat log; fail "status $status after TERM"; }
    truncate -s -5 clips.h5.latents-partial
    old=$(partial_size)
done
grep -q 'going on after [1-9]' log || fail "the third call started over"
grep -q 'stopped by a signal.*the same command goes on' log || fail "no line about the signal"
expect 6 'another fovea' flock clips.h5.latents-partial \
    "$f" latents clips.h5 --vae vae.safetensors
# a copy that a killed process left, and a record whose bits have changed
printf 'junk' >clips.h5.latents-new
printf 'x' | dd of=clips.h5.latents-partial bs=1 seek=3000 conv=notrunc status=none
expect 0 'going on after [0-9]+ of 24' "$f" latents clips.h5 --vae vae.safetensors
cmp clips.h5 whole.h5 || fail "another file after kills"
[ "$(ls -d clips.h5*)" = clips.h5 ] || fail "left: $(ls -d clips.h5*)"

# other weights: asked for, and work of the first ones is not taken for theirs; a link stays a link
weights other.safetensors seed=1 prefix=encoder.layers.
expect 2 'latents of other weights.*--replace' "$f" latents clips.h5 --vae other.safetensors
cmp clips.h5 whole.h5 || fail "refused, but changed"
ln -s clips.h5 link.h5
expect 0 'made with other' "$f" latents link.h5 --vae other.safetensors --replace
[ -L link.h5 ] || fail "the link was replaced"
expect 0 'already' "$f" latents clips.h5 --vae other.safetensors
! cmp -s clips.h5 whole.h5 || fail "nothing was replaced"
expect 0 'made with vae' "$f" latents clips.h5 --vae vae.safetensors --replace
"$PYTHON" -c 'import h5py; a, b = (h5py.File(p)["latents"][()] for p in ("clips.h5", "whole.h5"))
assert (a == b).all()'

# unfinished work of other weights survives whatever else is asked for; finished work does not
weights third.safetensors seed=2
cp whole.h5 clips.h5
killed KILL 256 --vae other.safetensors --replace
[ $status = 137 ] || fail "status $status: not killed in time"
cp clips.h5.latents-partial kept
expect 0 'already' "$f" latents clips.h5 --vae vae.safetensors
expect 2 'clips.h5.latents-partial: keeps unfinished work.*or remove this file' \
    "$f" latents clips.h5 --vae third.safetensors --replace
cmp clips.h5.latents-partial kept || fail "work of other weights was lost"
cmp clips.h5 whole.h5 || fail "changed under unfinished work"
cp plain.h5 clips.h5
expect 2 'of other clips: finish that' "$f" latents clips.h5 --vae other.safetensors
cmp clips.h5.latents-partial kept || fail "work on other clips was lost"
cp whole.h5 clips.h5
expect 0 'going on after [1-9]' "$f" latents clips.h5 --vae other.safetensors --replace
mv kept clips.h5.latents-partial # as if killed before its removal
expect 0 'already' "$f" latents clips.h5 --vae other.safetensors
[ ! -e clips.h5.latents-partial ] || fail "finished work was left"

# wrong input: one line, nothing written
cp plain.h5 clips.h5
expect 2 'usage: fovea latents' bash -c "! '$f' latents --help; exit 2"
expect 2 '--vae taesd_encoder' "$f" latents clips.h5
expect 2 'one data file' "$f" latents --vae vae.safetensors
expect 2 '--threads=0' "$f" latents clips.h5 --vae vae.safetensors --threads 0
expect 2 '--bogus' "$f" latents clips.h5 --vae vae.safetensors --bogus
expect 3 'No such file' "$f" latents nowhere.h5 --vae vae.safetensors
expect 3 'nowhere.safetensors' "$f" latents clips.h5 --vae nowhere.safetensors
expect 3 'not an HDF5 file' "$f" latents vae.safetensors --vae vae.safetensors
expect 3 'clips.h5: (is|header)' "$f" latents clips.h5 --vae clips.h5
head -c 20000 vae.safetensors >cut.safetensors
expect 3 'cut.safetensors' "$f" latents clips.h5 --vae cut.safetensors
weights wide.safetensors latents=16
expect 3 'wide.safetensors: 14.weight is \[16, 64, 3, 3\], .*\[4, 64, 3, 3\]: name TAESD' \
    "$f" latents clips.h5 --vae wide.safetensors
for type in I16 U8 I32 I64; do
    weights "$type.safetensors" 8.conv.2.bias=$type
    expect 3 "$type.safetensors: 8.conv.2.bias is of type $type, weights are F64" \
        "$f" latents clips.h5 --vae "$type.safetensors"
done
weights less.safetensors without=9.conv.2.bias
expect 3 'no tensor 9.conv.2.bias' "$f" latents clips.h5 --vae less.safetensors
weights more.safetensors with=15.bias
expect 3 '15.bias is no part' "$f" latents clips.h5 --vae more.safetensors
weights decoder.safetensors without=0.weight # the decoder's first layer has no weights
expect 3 "no tensor 0.weight: name TAESD's encoder" "$f" latents clips.h5 --vae decoder.safetensors
"$PYTHON" - <<'P'
import h5py, numpy as np
for name, shape in ("odd", (2, 2, 20, 20, 3)), ("wide", (2, 2, 16, 24, 3)), ("flat", (2, 16, 16, 3)):
    with h5py.File(f"{name}.h5", "w") as f:
        f["frames"] = np.zeros(shape, "u1")
h5py.File("empty.h5", "w").close()
P
expect 3 '20 x 20 pixels: needs squares of a multiple of 8' "$f" latents odd.h5 --vae vae.safetensors
expect 3 '16 x 24 pixels: needs squares' "$f" latents wide.h5 --vae vae.safetensors
expect 3 '/frames is' "$f" latents flat.h5 --vae vae.safetensors
expect 3 'no dataset /frames' "$f" latents empty.h5 --vae vae.safetensors
cmp clips.h5 plain.h5 || fail "wrong input changed clips.h5"
! ls ./*.latents-* 2>/dev/null || fail "wrong input left files"

# a full disk, while clips are kept (25 KiB) and while they are added to the copy: clips.h5 stays
size=$(($(stat -c %s plain.h5) / 1024))
expect 6 'File too large.*clips done are kept' bash -c 'ulimit -f 12; exec "$@"' - \
    "$f" latents clips.h5 --vae vae.safetensors
expect 6 'File too large' bash -c "ulimit -f $((size + 10)); exec \"\$@\"" - \
    "$f" latents clips.h5 --vae vae.safetensors
cmp clips.h5 plain.h5 || fail "a full disk changed clips.h5"
[ ! -e clips.h5.latents-new ] || fail "a full disk left the copy"
if [ "$(id -u)" = 0 ] && mkdir full && mount -t tmpfs -o size=$((2 * size + 90))k tmpfs full 2>/dev/null; then
    trap 'umount "$TMPDIR/full"' EXIT
    cp plain.h5 full/clips.h5
    expect 6 'No space left on device' "$f" latents full/clips.h5 --vae vae.safetensors
    cmp full/clips.h5 plain.h5 || fail "a full disk changed clips.h5"
    [ ! -e full/clips.h5.latents-new ] || fail "a full disk kept the copy"
    rm full/clips.h5.latents-partial
    mount -o remount,ro full
    expect 6 'latents-partial: cannot be written: Read-only' "$f" latents full/clips.h5 --vae vae.safetensors
fi
expect 0 'going on after 24 of 24' "$f" latents clips.h5 --vae vae.safetensors
cmp clips.h5 whole.h5 || fail "another file after full disks"
echo "latents: all as expected"
