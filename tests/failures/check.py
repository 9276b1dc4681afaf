"""Checks an OUT folder after a failure: check.py OUT WHOLE MEMORY

Every file that is not temporary can be read; results.h5 shows no less than at the last check (MEMORY
keeps that), and every row it shows equals the row of the undisturbed run WHOLE/results.h5.
"""
import json
import pathlib
import struct
import sys

import h5py
import numpy as np


def check_tensors(path):
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:8 + size])
    ends = [t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"]
    if len(data) != 8 + size + max(ends, default=0):
        sys.exit(f"{path}: is cut")


def rows(results, whole):
    shown = {}
    for name, experiment in results["runs"].items():
        for seed, run in experiment.items():
            for series in ("loss_fine", "grad_norm", "eval/loss_fine"):
                if series not in run:
                    continue
                x, y = run[series][()], whole[f"runs/{name}/{seed}/{series}"][()]
                if len(x) > len(y) or not np.array_equal(x, y[:len(x)]):
                    sys.exit(f"{name}/{seed}/{series}: rows differ from the undisturbed run's")
                shown[f"{name}/{seed}/{series}"] = len(x)
    return shown


def main(out, whole, memory):
    before = json.loads(memory.read_text()) if memory.exists() else {}
    for path in out.rglob("*.safetensors"):
        check_tensors(path)
    results = out / "results.h5"
    if not results.exists():
        if before:
            sys.exit(f"{results}: was there and is gone")
        print("no results yet")
        return
    with h5py.File(results) as a, h5py.File(whole / "results.h5") as b:
        shown = rows(a, b)
    for name, count in before.items():
        if shown.get(name, 0) < count:
            sys.exit(f"{name}: {shown.get(name, 0)} rows are shown after {count}")
    memory.write_text(json.dumps(shown))
    print(f"{sum(shown.values())} rows")


if __name__ == "__main__":
    main(*map(pathlib.Path, sys.argv[1:4]))
