#!/usr/bin/env bash
# --stage DIR: the study reads a copy of the data file, recorded under the file's own name, with the
# same results; a copy that is there is used, one of another file is replaced.
. tests/integration/common
study=$PWD/$tiny tests=$PWD/tests/integration
cd "$TMPDIR"
make_clips() { "$FOVEA" prepare procedural -o "$1" --frames 4 --size 16 --clips-train 20 --clips-held-out 4 "${@:2}" >log; }
run() { "$FOVEA" "$study" data=clips.h5 frames=4 image_size=16 --only A_baseline --out "$@" >log 2>&1 || { cat log; exit 1; }; }

make_clips clips.h5
run plain
run staged --stage local/disk
"$PYTHON" "$tests/compare_results.py" plain/results.h5 staged/results.h5
cmp clips.h5 local/disk/*-clips.h5
grep -q "^data clips.h5:" log || fail "the copy's name is shown: $(grep ^data log)"

# what is there is not copied again
inode=$(stat -c %i local/disk/*-clips.h5)
run again --stage local/disk
[ "$(stat -c %i local/disk/*-clips.h5)" = "$inode" ] || fail "an equal copy was replaced"
make_clips clips.h5 --seed 3
run other --stage local/disk
cmp clips.h5 local/disk/*-clips.h5

# two ranks of one host share the copy
rm -r local
mpirun --oversubscribe -np 2 "$FOVEA" "$study" data=clips.h5 frames=4 image_size=16 --only A_baseline \
    --ranks-per-experiment 2 --stage local --out two >log 2>&1 || { cat log; exit 1; }
[[ $(ls local) =~ ^[0-9a-f]{16}-clips\.h5$ ]] || fail "left in the folder: $(ls local)"

# two files of one name
mkdir other_file
make_clips other_file/clips.h5 --seed 5
two() { "$FOVEA" "$study" data=clips.h5 D_freeze_dino.data=other_file/clips.h5 frames=4 image_size=16 \
    --only A_baseline,D_freeze_dino --out "$@" >log 2>&1 || { cat log; exit 1; }; }
two two_plain
two two_staged --stage local
"$PYTHON" "$tests/compare_results.py" two_plain/results.h5 two_staged/results.h5
[ "$(ls local | wc -l)" = 2 ] || fail "copies: $(ls local)"

# half a copy that a killed process has left
copy=$(ls local | head -n 1)
touch "local/$copy.tmp-4194305"
rm "local/$copy"
two two_again --stage local
[ "$(ls local | wc -l)" = 2 ] || fail "left in the folder: $(ls local)"

: >file
expect 3 "file" "$FOVEA" "$study" data=clips.h5 frames=4 image_size=16 --stage file --out refused
