#!/usr/bin/env bash
# fovea prepare --captions: bytes or a tokenizer's ids beside the clips, a study that reads them,
# and one clear line for captions that are none.
. tests/integration/common
command -v ffmpeg >/dev/null || { echo "no ffmpeg to make test videos with"; exit 77; }
study=$PWD/$tiny
cd "$TMPDIR"

# 48 frames: three clips each
mkdir -p videos/sub
for name in a b sub/c d; do
    ffmpeg -v error -nostdin -f lavfi -i testsrc=size=32x32:rate=12:duration=4 -pix_fmt yuv420p \
        "videos/$name.mp4"
done
prepare=("$FOVEA" prepare videos -o clips.h5 --frames 4 --stride 4 --size 16)
"${prepare[@]}" >out 2>&1 || { grep -q "build reads no videos" out && exit 77; cat out; exit 1; }

printf '\xef\xbb\xbfa.mp4\ta red ball\r\n\nsub/c.mp4\tgr\xc3\xbcn\r\nd.mp4\tup and down\nz.mp4\tno video' >captions.tsv
cat >captions.jsonl <<'JSON'
{"video": "a.mp4", "caption": "a red ball"}
{"file": "sub/c.mp4", "text": "gr\u00fcn", "signer": 3}

{"video": "d.mp4", "text": "up and down"}
{"video": "z.mp4", "caption": "no video"}
JSON

# bytes
counts="captions: 3 videos have one, 1 have none; 1 captions name no video"
expect 0 "^$counts" "${prepare[@]}" --captions captions.tsv --max-tokens 12
cp clips.h5 bytes.h5
expect 0 "^$counts" "${prepare[@]}" --captions captions.jsonl --max-tokens 12
cmp clips.h5 bytes.h5 || fail "the same captions as TSV and as JSON lines make other files"
"$PYTHON" - <<'PYTHON'
import h5py

texts = {"a": "a red ball", "b": "", "sub/c": "grün", "d": "up and down"}
with h5py.File("clips.h5") as f:
    tokens, count = f["tokens"][:], f["token_count"][:]
    assert tokens.dtype == count.dtype == "int32" and tokens.shape == (12, 12), tokens.shape
    assert dict(f["tokens"].attrs)["tokenizer"] == "bytes", dict(f["tokens"].attrs)
    assert f["tokens"].attrs["vocabulary"] == 256
    for i, source in enumerate(f["source"].asstr()[:]):
        text = texts[source.rsplit(".mp4:", 1)[0]]
        assert f["caption"].asstr()[i] == text, source
        assert bytes(tokens[i, :count[i]].tolist()) == text.encode(), source
        assert not tokens[i, count[i]:].any()
PYTHON
# one clip in four has no text
expect 0 "results" "$FOVEA" "$study" data=clips.h5 text=captions --only A_baseline,F_entropy_reg \
    --out bytes
# captions reach the model: without them the losses are others
expect 0 "results" "$FOVEA" "$study" data=clips.h5 --only A_baseline --out none
"$PYTHON" - <<'PYTHON'
import h5py, numpy as np

loss = [h5py.File(f"{name}/results.h5")["runs/A_baseline/seed_0/loss_coarse"][()]
        for name in ("bytes", "none")]
assert np.isfinite(loss).all() and (loss[0] != loss[1]).all(), loss
PYTHON

# bad captions: nothing is written
bad() { # PATTERN CONTENT [OPTION...]
    printf "$2" >bad.txt
    expect 3 "$1" "${prepare[@]}" --captions bad.txt "${@:3}"
    cmp clips.h5 bytes.h5 || fail "clips.h5 was changed by: $2"
}
bad 'bad.txt:2: no tab' 'a.mp4\tfirst\nb.mp4 second\n'
bad 'bad.txt:1: more than one tab' 'a.mp4\tfirst\tsecond\n'
bad 'bad.txt:3: a.mp4 has a caption already, in line 1' 'a.mp4\tx\nb.mp4\ty\na.mp4\tz\n'
bad 'bad.txt:2: not UTF-8' 'a.mp4\tx\nb.mp4\t\xff\n'
bad 'bad.txt:1: the caption is empty' 'a.mp4\t\n'
bad 'bad.txt:2: the caption has 13 tokens, --max-tokens is 12' 'b.mp4\tx\na.mp4\t1234567890123' \
    --max-tokens 12
bad 'bad.txt: holds no captions' ''
bad 'bad.txt: holds no captions' '\n\r\n'
bad 'bad.txt: holds a zero byte' 'a.mp4\tx\0y\n'
bad 'bad.txt:2: no JSON: ' '{"video": "a.mp4", "text": "x"}\n{"video": "b.mp4"\n'
bad 'bad.txt:1: no string "caption"' '{"video": "a.mp4", "caption": 3}\n'
bad 'bad.txt:1: no string "video"' '{"name": "a.mp4", "caption": "x"}\n'
bad 'bad.txt: no caption is of a video: .* videos/a.mp4, .* is a.mp4' 'videos/a.mp4\tx\n'
expect 3 'absent.tsv: cannot be opened: No such file' "${prepare[@]}" --captions absent.tsv
expect 2 'tokenizer needs --captions' "${prepare[@]}" --tokenizer t.json
expect 2 'have their own' "$FOVEA" prepare procedural -o clips.h5 --captions captions.tsv

# a tokenizer's ids
tokenize=("${prepare[@]}" --captions captions.tsv --tokenizer)
printf '{"version": "1.0"}' >none.json
PYTHON=$TMPDIR/nowhere expect 3 'nowhere cannot be started: No such file.*install it, or set PYTHON' \
    "${tokenize[@]}" none.json
mkdir lacking && printf 'raise ImportError("a test")' >lacking/tokenizers.py
PYTHONPATH=$TMPDIR/lacking expect 3 'needs the Python package tokenizers .*-m pip install tokenizers' \
    "${tokenize[@]}" none.json
expect 3 'none.json: no tokenizer.json' "${tokenize[@]}" none.json
expect 3 'absent.json: .*No such file' "${tokenize[@]}" absent.json
cmp clips.h5 bytes.h5 || fail "clips.h5 was changed"
"$PYTHON" - <<'PYTHON'
from tokenizers import Tokenizer, models, pre_tokenizers

words = {w: i for i, w in enumerate("? a red ball up and down no video".split())}
words["grün"] = 299  # ids may have gaps
tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer.enable_padding(length=40)
tokenizer.enable_truncation(2)
tokenizer.save("words.json")
PYTHON
expect 0 "^$counts" "${tokenize[@]}" words.json --max-tokens 3
"$PYTHON" - <<'PYTHON'
import h5py, hashlib

want = {"a": [1, 2, 3], "b": [0, 0, 0], "sub/c": [299, 0, 0], "d": [4, 5, 6]}
with h5py.File("clips.h5") as f:
    attributes = f["tokens"].attrs
    assert attributes["tokenizer"] == "words.json" and attributes["vocabulary"] == 300
    sha256 = hashlib.sha256(open("words.json", "rb").read()).hexdigest()
    assert attributes["tokenizer_sha256"] == sha256, attributes["tokenizer_sha256"]
    for source, tokens, count in zip(f["source"].asstr()[:], f["tokens"][:], f["token_count"][:]):
        name = source.rsplit(".mp4:", 1)[0]
        assert tokens.tolist() == want[name] and count == sum(t > 0 for t in tokens), source
PYTHON
expect 0 "results" "$FOVEA" "$study" data=clips.h5 text=captions lm_vocab=300 --only A_baseline \
    --out words
expect 3 'vocabulary has 256 tokens: set lm_vocab' "$FOVEA" "$study" data=clips.h5 text=captions \
    --only A_baseline --out small
expect 3 'captions.tsv:1: the caption has 3 tokens, --max-tokens is 2' "${tokenize[@]}" words.json \
    --max-tokens 2

# a long last line is told from its start
printf '#!/bin/sh\nseq -s, 1000 >&2\nexit 1\n' >talks
chmod +x talks
PYTHON=$TMPDIR/talks expect 3 '(^| )1,2,3,' "${tokenize[@]}" words.json

# without PYTHON: the virtual environment beside the program, then python3 of the PATH
mkdir -p here/build/venv/bin path
cp "$FOVEA" here/fovea
ln -s "${FOVEA%/*}/scripts" here/scripts
for place in here/build/venv/bin/python path/python3; do
    printf '#!/bin/sh\necho %s >called\nexec "%s" "$@"\n' "$place" "$PYTHON" >"$place"
    chmod +x "$place"
done
here=(env -u PYTHON PATH="$TMPDIR/path:$PATH" here/fovea "${tokenize[@]:1}" words.json --max-tokens 3)
for place in here/build/venv/bin/python path/python3; do
    expect 0 "^$counts" "${here[@]}"
    [ "$(cat called)" = "$place" ] || fail "$(cat called) was called, not $place"
    rm "$place"
done

# a signal ends the wait for the tokenizer
printf '#!/bin/sh\n: >started\nexec sleep 60\n' >slow
chmod +x slow
cp clips.h5 words.h5
PYTHON=$TMPDIR/slow "${tokenize[@]}" words.json >out 2>&1 &
child=$!
for _ in $(seq 100); do [ -e started ] && break; sleep 0.05; done
kill -TERM $child
status=0
wait $child || status=$?
[ "$status" = 75 ] || { cat out; fail "exit status $status after TERM, not 75"; }
cmp clips.h5 words.h5 || fail "clips.h5 was changed"
! ls ./*.tmp-* 2>/dev/null || fail "temporary files were left"
