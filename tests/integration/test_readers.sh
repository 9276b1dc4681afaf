#!/usr/bin/env bash
# While the study runs, results.h5 can be opened at any moment and never goes back.
. tests/integration/common
"$FOVEA" "$tiny" steps=3000 --out "$TMPDIR/live" >"$TMPDIR/log" 2>&1 &
run=$!
"$PYTHON" - "$TMPDIR/live/results.h5" $run <<'P'
import os, sys, time, h5py
path, pid = sys.argv[1], int(sys.argv[2])
start, reads, last, seen = time.time(), 0, {}, set()
while time.time() - start < 40 and (len(seen) < 3 or reads < 50):
    if not os.path.exists(path):
        time.sleep(0.02)
        continue
    with h5py.File(path, "r") as f:
        assert f.attrs["format"] == "fovea-results"
        info = os.fstat(f.id.get_vfd_handle())
        seen.add((info.st_ino, info.st_mtime_ns))
        for name, run in f["runs"].items():
            steps = len(run["seed_0/loss_fine"])
            assert steps >= last.get(name, 0), name
            last[name] = steps
    reads += 1
    time.sleep(0.02)
assert reads > 50 and len(seen) >= 3, (reads, len(seen))
assert max(last.values()) > 0, last
print(reads, "reads of", len(seen), "files")
P
kill -KILL $run
wait $run || true
