#!/usr/bin/env bash
# fovea attend: on the frames of a map clip it finds the attention that training recorded last, and
# other videos become an animation.
. tests/integration/common
command -v ffmpeg >/dev/null || { echo "no ffmpeg to make test videos with"; exit 77; }
run_tiny "$TMPDIR/study" seeds=0,3 --only A_baseline,G_combined_best
run=$TMPDIR/study/G_combined_best
make_video() { ffmpeg -v error -nostdin -y "$@"; }

# Two clips whose pixels survive: RGB, lossless, of the model's size.
"$PYTHON" - "$TMPDIR/study/results.h5" "$TMPDIR/frames.rgb" <<'P'
import sys, h5py
with h5py.File(sys.argv[1]) as file:
    file["runs/G_combined_best/seed_3/attention/pixels"][()].tofile(sys.argv[2])
P
make_video -f rawvideo -pix_fmt rgb24 -s 16x16 -r 10 -i "$TMPDIR/frames.rgb" -c:v ffv1 \
    -pix_fmt bgr0 "$TMPDIR/clips.mkv"
"$FOVEA" attend "$TMPDIR/none/A" x.mkv --help | grep -q "usage: fovea attend" || fail "no help"
if ! "$FOVEA" attend "$run/seed_3" "$TMPDIR/clips.mkv" --stride 1 >"$TMPDIR/out.txt" 2>&1; then
    grep -q "build reads no videos" "$TMPDIR/out.txt" && { echo "this build has no FFmpeg"; exit 77; }
    cat "$TMPDIR/out.txt"
    fail "attend"
fi
grep -q "study/G_combined_best_clips.h5: G_combined_best seed 3, 2 clips of 4 frames" \
    "$TMPDIR/out.txt" || fail "no line that says what was written"
"$PYTHON" - "$TMPDIR/study/results.h5" "$TMPDIR/study/G_combined_best_clips.h5" <<'P'
import sys, h5py, numpy as np
with h5py.File(sys.argv[1]) as study, h5py.File(sys.argv[2]) as file:
    want = study["runs/G_combined_best/seed_3/attention"]
    np.testing.assert_array_equal(file["pixels"], want["pixels"])
    assert file["clip"][()].tolist() == [0, 4] and file["frame"][()].tolist() == [1, 2, 3, 4]
    assert [d[0].name for d in file["map"].dims] == ["/clip", "/pass", "/frame", "/y", "/x"]
    for name in "map", "cls":
        got, last = file[name][()], np.swapaxes(want[name][-1], 0, 1)
        assert np.isfinite(got).all() and got.shape == last.shape
        # the same sums in batches of another size: rounding of float through a few layers
        np.testing.assert_allclose(got, last, atol=2e-5)
    total = file["map"][()].sum(axis=(-2, -1)) + file["cls"][()]
    np.testing.assert_allclose(total, 1, atol=1e-5)
    assert np.abs(np.diff(file["map"][()], axis=1)).max() > 1e-4  # the passes do differ
    assert dict(file.attrs)["video"] == "clips.mkv" and file.attrs["seed"] == 3
P

# Any video, the first seed; the animation.
make_video -f lavfi -i "testsrc=size=98x56:rate=10:duration=3" -pix_fmt yuv420p "$TMPDIR/a.mp4"
expect 0 "a.h5: A_baseline seed 0, 3 clips of 4 frames" \
    "$FOVEA" attend "$TMPDIR/study/A_baseline/" "$TMPDIR/a.mp4" -o "$TMPDIR/a.h5" --clips 3
if "$PYTHON" -c "import matplotlib, PIL" 2>/dev/null; then
    export PYTHONPATH=analysis
    expect 0 "a.gif: 12 frames" "$PYTHON" -m fovea_analysis attend "$TMPDIR/a.h5"
    "$PYTHON" - "$TMPDIR/a.gif" <<'P'
import sys
from PIL import Image
with Image.open(sys.argv[1]) as gif:
    assert gif.n_frames == 12 and gif.width > 3 * 256, (gif.n_frames, gif.size)
P
    expect 1 "fovea-attend: .*results.h5: is no file of ./fovea attend" \
        "$PYTHON" -m fovea_analysis attend "$TMPDIR/study/results.h5"
    expect 1 "fovea-attend: .*none.h5: no such file" "$PYTHON" -m fovea_analysis attend none.h5
fi

expect 2 'has no experiment "A_base"; did you mean "A_baseline"' \
    "$FOVEA" attend "$TMPDIR/study/A_base" "$TMPDIR/a.mp4"
expect 2 "name an experiment's folder" "$FOVEA" attend x "$TMPDIR/a.mp4"
expect 2 "study.yaml" "$FOVEA" attend "$TMPDIR/none/A_baseline" "$TMPDIR/a.mp4"
expect 2 "clips=0: needs a whole number" "$FOVEA" attend "$run" "$TMPDIR/a.mp4" --clips 0
expect 2 "name OUT/NAME and a video" "$FOVEA" attend "$run"
expect 3 "seed_7/model.safetensors.*written when the run has finished" \
    "$FOVEA" attend "$run/seed_7" "$TMPDIR/a.mp4"
expect 3 "README.md: Invalid data" "$FOVEA" attend "$run" README.md
expect 3 "too short: a clip spans 31 frames" "$FOVEA" attend "$run" "$TMPDIR/a.mp4" --stride 10
cp "$TMPDIR/study/A_baseline/seed_0/model.safetensors" "$TMPDIR/keep"
head -c 2000 "$TMPDIR/keep" >"$TMPDIR/study/A_baseline/seed_0/model.safetensors"
expect 3 "model.safetensors" "$FOVEA" attend "$TMPDIR/study/A_baseline" "$TMPDIR/a.mp4"
expect 6 "No such file" "$FOVEA" attend "$run" "$TMPDIR/a.mp4" -o "$TMPDIR/none/x.h5"
"$FOVEA" configs/controls.yaml seeds=0 steps=2 eval_every=2 --only vision_off --out "$TMPDIR/c" \
    >"$TMPDIR/log" 2>&1
expect 2 "vision_off has vision off: it looks nowhere" \
    "$FOVEA" attend "$TMPDIR/c/vision_off" "$TMPDIR/a.mp4"
