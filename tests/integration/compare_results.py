"""Compares the measurements of results files.

compare_results.py A B             every series, evaluation and map equal bit for bit
compare_results.py A B --close     equal within rounding (another number of ranks)
compare_results.py A --complete    every run finished, every series without NaN
Times are no measurements of the model and are left out.
"""
import sys

import h5py
import numpy as np

TIMES = {"step_seconds"}


def datasets(group):
    found = {}

    def visit(name, item):
        if isinstance(item, h5py.Dataset) and name.rsplit("/", 1)[-1] not in TIMES:
            found[name] = item
    group.visititems(visit)
    return found


def compare(a, b, close):
    left, right = datasets(a["runs"]), datasets(b["runs"])
    if left.keys() != right.keys():
        sys.exit(f"different datasets: {sorted(left.keys() ^ right.keys())}")
    values = 0
    for name in left:
        x, y = left[name][()], right[name][()]
        if np.shape(x) != np.shape(y):
            sys.exit(f"{name}: {np.shape(x)} and {np.shape(y)}")
        if np.asarray(x).dtype.kind == "f":
            same = (np.allclose(x, y, rtol=2e-3, atol=2e-4, equal_nan=True) if close
                    else np.array_equal(x, y, equal_nan=True))
        else:
            same = np.array_equal(x, y)
        if not same:
            sys.exit(f"{name} differs: {x} and {y}")
        values += np.size(x)
    if values == 0:
        sys.exit("nothing to compare")
    print(f"{len(left)} datasets, {values} values agree")


def complete(file):
    runs = 0
    for experiment in file["runs"].values():
        for run in experiment.values():
            runs += 1
            if run.attrs["status"] != "finished":
                sys.exit(f"{run.name}: {run.attrs['status']}: {run.attrs['why']}")
            steps = int(run.attrs["steps"])
            for name in ("loss_fine", "loss_coarse", "loss_total", "ratio", "grad_norm", "lr"):
                if run[name].shape != (steps,) or not np.isfinite(run[name][()]).all():
                    sys.exit(f"{run.name}/{name}: incomplete")
            if not np.isfinite(run["eval/loss_fine"][()]).all():
                sys.exit(f"{run.name}/eval/loss_fine: incomplete")
    if runs == 0:
        sys.exit("no runs")
    print(f"{runs} runs complete")


if __name__ == "__main__":
    if sys.argv[2] == "--complete":
        with h5py.File(sys.argv[1]) as one:
            complete(one)
    else:
        with h5py.File(sys.argv[1]) as one, h5py.File(sys.argv[2]) as two:
            compare(one, two, "--close" in sys.argv)
