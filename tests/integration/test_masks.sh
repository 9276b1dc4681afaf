#!/usr/bin/env bash
# fovea prepare procedural --masks: masks and objects beside the same clips as without.
. tests/integration/common
cd "$TMPDIR"

small=(-o clips.h5 --frames 3 --size 32 --clips-train 20 --clips-held-out 4)
expect 0 "24 procedural clips" "$FOVEA" prepare procedural "${small[@]}"
mv clips.h5 plain.h5
expect 0 "24 procedural clips" "$FOVEA" prepare procedural "${small[@]}" --masks
"$PYTHON" - <<'PYTHON'
import h5py

with h5py.File("plain.h5") as plain, h5py.File("clips.h5") as f:
    assert "masks" not in plain and "objects" not in plain
    assert (plain["frames"][:] == f["frames"][:]).all()
    masks, objects = f["masks"][:], f["objects"][:]
    assert masks.dtype == objects.dtype == "uint8"
    assert masks.shape == (24, 3, 32, 32) and objects.shape == (24, 6, 2), objects.shape
    assert f["masks"].chunks == (1, 3, 32, 32)
    colours, shapes = (f["objects"].attrs[name].tolist() for name in ("colours", "shapes"))
    for mask, rows, caption in zip(masks, objects, f["caption"].asstr()[:]):
        there = [(colours[c], shapes[s]) for c, s in rows if c != 255]
        assert there[-1] == ("beacon", "beacon") and 0 < mask.max() <= len(there)
        assert (mask == len(there)).any()  # the beacon is never hidden
        assert there[-2] == tuple(caption.split()[:2]), (there, caption)
        assert (rows[len(there):] == 255).all()
PYTHON
expect 2 'only `procedural` clips have masks' "$FOVEA" prepare videos -o clips.h5 --masks
