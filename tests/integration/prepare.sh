#!/usr/bin/env bash
# fovea prepare: good, odd, short, turned, cut and broken videos become a clips.h5 or a clear line.
set -eu
command -v ffmpeg >/dev/null || { echo "no ffmpeg to make test videos with"; exit 77; }
cd "$TMPDIR"
make_video() { ffmpeg -v error -nostdin -y -f lavfi -i "$1" "${@:2}"; }
fail() { echo "FAILED: $*"; exit 1; }
# expect STATUS TEXT COMMAND...: exit status, and TEXT in the output
expect() {
    local status=0
    "${@:3}" >out.txt 2>&1 || status=$?
    [ "$status" = "$1" ] || { cat out.txt; fail "exit $status, not $1: ${*:3}"; }
    grep -qF -- "$2" out.txt || { cat out.txt; fail "no \"$2\" from: ${*:3}"; }
}

mkdir -p videos/more
make_video "testsrc=size=98x56:rate=10:duration=4" -pix_fmt yuv420p videos/a.mp4
make_video "testsrc2=size=65x49:rate=7:duration=6" videos/odd.gif
make_video "color=red:size=64x32:rate=10:duration=2" -pix_fmt yuv420p videos/more/red.mkv
# left half blue, right half lime; to be shown turned, one above the other
make_video "color=blue:size=64x64:rate=10:duration=2,drawbox=x=32:w=32:h=64:c=lime:t=fill" \
    -pix_fmt yuv420p flat.mp4
ffmpeg -v error -nostdin -i flat.mp4 -c copy -metadata:s:v rotate=90 videos/turned.mp4
ffmpeg -v error -nostdin -i videos/turned.mp4 -frames:v 1 -f rawvideo -pix_fmt rgb24 turned.rgb
# pixels twice as wide as high: the centred square is 32 x 64 of them
make_video "color=blue:size=64x64:rate=10:duration=2,drawbox=x=16:w=32:h=64:c=red:t=fill,setsar=2" \
    -pix_fmt yuv420p videos/wide.mp4
# right half transparent, for good
make_video "color=red:size=32x32:rate=10:duration=2,format=rgba,geq=r=255:g=0:b=0:a='255*lt(X,16)'" \
    -c:v ffv1 videos/clear.mkv
make_video "testsrc=size=64x64:rate=10:duration=1" videos/short.avi
make_video "testsrc=size=320x240:rate=25:duration=8" videos/whole.mkv
head -c $(($(stat -c %s videos/whole.mkv) / 2)) videos/whole.mkv >videos/cut.mkv
head -c 3000 videos/a.mp4 >videos/broken.mp4
printf 'a note beside the videos\n' >videos/note.txt
ln -s .. videos/more/loop
ln -s ../a.mp4 videos/more/again.mp4

prepare=("$FOVEA" prepare)
expect 0 "usage: fovea prepare" "${prepare[@]}" --help
if ! "${prepare[@]}" videos -o probe.h5 >out.txt 2>&1 && grep -q "build reads no videos" out.txt; then
    echo "this build has no FFmpeg"
    exit 77
fi
expect 0 "skipped: 1 unreadable, 1 too short, 1 other files" "${prepare[@]}" videos -o clips.h5
grep -q "videos/broken.mp4: skipped, unreadable" out.txt || fail "no line for broken.mp4"
grep -q "videos/short.avi: skipped, too short: a clip spans 15 frames" out.txt || fail "short.avi"
cp clips.h5 before.h5

"$PYTHON" - <<'PYTHON' || fail "contents of clips.h5"
import collections
import h5py

with h5py.File("clips.h5") as f:
    frames, split = f["frames"][:], f["split"][:]
    source = [s.rsplit(":", 1) for s in f["source"].asstr()[:]]
    assert frames.shape[1:] == (8, 64, 64, 3) and frames.dtype == "uint8", frames.shape
    assert f["frames"].chunks == (1, 8, 64, 64, 3)
    assert f.attrs["format"] == "fovea-clips" and f.attrs["stride"] == 2, dict(f.attrs)
    assert all({"units", "long_name"} <= set(d.attrs) for d in f.values())
clips = collections.Counter(name for name, _ in source)
# (frames of the video) / 16, each video once although a link names one of them again
want = {"a.mp4": 2, "odd.gif": 2, "more/red.mkv": 1, "turned.mp4": 1, "wide.mp4": 1,
        "clear.mkv": 1, "whole.mkv": 12}
cut = clips.pop("cut.mkv")
assert clips == want and 1 <= cut < 12, (clips, cut)
assert [int(n) for name, n in source if name == "a.mp4"] == [0, 16], source
sides = collections.defaultdict(set)
for (name, _), s in zip(source, split):
    sides[name].add(int(s))
assert all(len(s) == 1 for s in sides.values()), sides
assert {0, 1} == set(split.tolist())

def pixel(name, y, x):
    return frames[[n for n, _ in source].index(name), 4, y, x].tolist()

def near(got, want):  # 8-bit YUV and chroma at half the resolution lose a few levels
    assert all(abs(a - b) <= 12 for a, b in zip(got, want)), (got, want)

near(pixel("more/red.mkv", 32, 32), (255, 0, 0))
shown = open("turned.rgb", "rb").read()  # as ffmpeg itself shows it
for y, x in (8, 8), (8, 56), (56, 8), (56, 56):
    near(pixel("turned.mp4", y, x), shown[(y * 64 + x) * 3:][:3])
near(shown[:3], shown[63 * 3:][:3])  # the halves do lie above each other
for x in (2, 32, 61):
    near(pixel("wide.mp4", 32, x), (255, 0, 0))
near(pixel("clear.mkv", 32, 8), (255, 0, 0))
near(pixel("clear.mkv", 32, 56), (255, 255, 255))
PYTHON

expect 0 "clips.h5: " "${prepare[@]}" videos/ -o clips.h5
cmp clips.h5 before.h5 || fail "the same videos made another file"
expect 0 "7 clips of 4 frames, 32 x 32 pixels" "${prepare[@]}" videos/a.mp4 --frames 4 --stride=1 \
    --size 32 --max-clips-per-video 7 --crop none -o one.h5
grep -q "no clip is held out" out.txt || fail "no note about the empty split"

# what fails leaves the file of before, and nothing else
expect 3 "no clips: of 2 files 1 are unreadable, 1 too short" \
    "${prepare[@]}" videos/broken.mp4 videos/short.avi -o clips.h5
expect 3 "No such file" "${prepare[@]}" absent.mp4 -o clips.h5
expect 2 "-o clips.h5" "${prepare[@]}" videos
expect 2 "--stride=0" "${prepare[@]}" videos -o clips.h5 --stride 0
expect 2 "--bogus" "${prepare[@]}" videos -o clips.h5 --bogus
expect 6 "No such file" "${prepare[@]}" videos -o no/such/clips.h5
"${prepare[@]}" procedural --size 224 --clips-train 20000 -o clips.h5 >out.txt 2>&1 &
child=$!
for _ in $(seq 200); do ls clips.h5.tmp-* >/dev/null 2>&1 && break || sleep 0.05; done
kill -TERM "$child"
status=0
wait "$child" || status=$?
[ "$status" = 75 ] || { cat out.txt; fail "exit $status after TERM, not 75"; }
cmp clips.h5 before.h5 || fail "clips.h5 was changed"
! ls ./*.tmp-* 2>/dev/null || fail "temporary files were left"

# a disk that fills up
if [ "$(id -u)" = 0 ] && mkdir full && mount -t tmpfs -o size=4m tmpfs full 2>/dev/null; then
    trap 'umount "$TMPDIR/full"' EXIT
    expect 6 "No space left on device" "${prepare[@]}" procedural -o full/clips.h5
    [ -z "$(ls -A full)" ] || fail "a full disk kept $(ls -A full)"
fi
echo "prepare: all as expected"
