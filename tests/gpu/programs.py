"""The programs on a GPU machine and what they leave: for tests/gpu/run and tests/bench_gpu. Python's
standard library alone."""
import json
import os
import pathlib
import re
import struct
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
DEVICE = os.environ.get("DEVICE", "cuda")
LIMIT = 150  # seconds for one command
TINY = "configs/tiny.yaml"
SMALL = TINY if os.environ.get("SIZE") == "tiny" else "configs/ablations.yaml"
# What changes in a history from run to run.
TIMES = ("history.series.step_seconds",)


class Failure(Exception):
    """The first line goes into the table, the rest above it."""


# --- programs --------------------------------------------------------------------------------------


def find_home():
    """The folder with the programs: a bundle, or the repository once it is built."""
    if (ROOT / "with").exists() or "FOVEA" in os.environ:
        return ROOT
    built = subprocess.run(["make", "-j", "fovea", "gpu-tests"], cwd=ROOT, text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if built.returncode == 0:
        return ROOT
    bundle = ROOT / "build/bundle"
    if not (bundle / "with").exists():
        sys.exit(built.stdout[-2000:] + "tests/gpu/run: cannot build here; run `make bundle` where "
                 "the libraries are, and bring build/bundle")
    print("cannot build here: using build/bundle, revision", (bundle / "REVISION").read_text().strip())
    return bundle


class Programs:
    def __init__(self, home):
        self.home = home
        self.around = [str(home / "with")] if (home / "with").exists() else []
        self.fovea = os.environ.get("FOVEA", str(home / ("fovea.bin" if self.around else "fovea")))
        self.mpirun = str(home / "mpirun") if self.around else "mpirun"
        self.keys = set(re.findall(r"^ +(\w+) ", self.run([self.fovea, "--help"]), re.M))

    def run(self, command, env=None, limit=LIMIT, expected=(0,), tool=()):
        """What a command printed, in the programs' environment; a tool that watches it is outside."""
        command = [*tool, *self.around, *command]
        env = dict(os.environ, OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1",
                   **(env or {}))
        try:
            done = subprocess.run(command, cwd=self.home, env=env, text=True,
                                  errors="replace", timeout=limit, stdin=subprocess.DEVNULL,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        except FileNotFoundError as error:
            raise Failure(f"{error.filename}: not found") from error
        except subprocess.TimeoutExpired as error:
            text = error.stdout.decode(errors="replace") if error.stdout else ""
            raise Failure(f"{command[0]}: still running after {limit} s\n{text}") from error
        if done.returncode not in expected:
            last = (done.stdout.strip() or "no output").splitlines()[-1]
            raise Failure(f"status {done.returncode}: {last}\n{' '.join(command)}\n{done.stdout}")
        return done.stdout

    def study(self, out, study, *arguments, device=DEVICE, ranks=1, tool=()):
        """Runs a study into an empty folder; its jobs' histories by experiment."""
        missing = [a for a in arguments if "=" in a and not a.startswith("-")
                   and a.split("=")[0].split(".")[-1] not in self.keys]
        if missing:
            raise Failure(f"this fovea has no key {missing[0].split('=')[0]}")
        command = [self.fovea, study, "--out", str(out), "--device", device]
        if ranks > 1:
            command = [self.mpirun, "--oversubscribe", "-np", str(ranks)] + command
        self.run(command + list(arguments), tool=tool)
        jobs = {path.parent.parent.name: path for path in out.glob("*/seed_0/history.safetensors")}
        if not jobs:
            raise Failure(f"{out}: no job left a history")
        return {name: Tensors(path) for name, path in sorted(jobs.items())}


# --- results ---------------------------------------------------------------------------------------


class Tensors:
    """A safetensors file."""

    def __init__(self, path):
        self.path = path
        data = path.read_bytes()
        size = struct.unpack("<Q", data[:8])[0]
        self.index = json.loads(data[8:8 + size])
        self.index.pop("__metadata__", None)
        self.data = memoryview(data)[8 + size:]

    def bytes(self, name):
        begin, end = self.index[name]["data_offsets"]
        return self.data[begin:end]

    def series(self, name):
        raw = self.bytes("history.series." + name)
        return struct.unpack(f"<{len(raw) // 8}d", raw)


def same_bits(one, other):
    """Every series, evaluation and map of every job, and the trained weights. The number compared."""
    if set(one) != set(other):
        raise Failure(f"other jobs: {sorted(one)} and {sorted(other)}")
    count = 0
    for job in one:
        a, b = one[job], other[job]
        for name in a.index:
            if name in TIMES:
                continue
            if name not in b.index or a.bytes(name) != b.bytes(name):
                raise Failure(f"{job}: {name} differs{where(a, b, name)}")
            count += len(a.bytes(name)) // 8
        if (a.path.parent / "model.safetensors").read_bytes() != \
                (b.path.parent / "model.safetensors").read_bytes():
            raise Failure(f"{job}: the trained weights differ")
    if count < 100 * len(one):
        raise Failure(f"only {count} values were there to compare")
    return f"{len(one)} jobs, {count} values, weights"


def where(a, b, name):
    if not name.startswith("history.series.") or name not in b.index:
        return ""
    short = name[len("history.series."):]
    pairs = list(zip(a.series(short), b.series(short)))
    at = next((i for i, (x, y) in enumerate(pairs) if x != y), None)
    return "" if at is None else f" first at step {at + 1}: {pairs[at][0]!r}, {pairs[at][1]!r}"


def differences(one, other, names=("loss_fine", "loss_coarse")):
    """Per job the relative difference of the losses at each step, the larger of both."""
    found = {}
    for job in one:
        steps = [zip(one[job].series(n), other[job].series(n), strict=True) for n in names]
        found[job] = [max(abs(x - y) / abs(y) if y == y and x == x else float("inf")
                          for x, y in step) for step in zip(*steps)]
        if not found[job]:
            raise Failure(f"{job}: no step was recorded")
    return found


def within(found, tolerance, text):
    """tolerance(step), steps from 0. The largest share of it that was used."""
    worst = max(((d / tolerance(job, i), job, i, d) for job, steps in found.items()
                 for i, d in enumerate(steps)))
    share, job, i, difference = worst
    said = f"{text} {difference:.1e} of {tolerance(job, i):.1e} at {job} step {i + 1}"
    if not share <= 1:
        raise Failure(said)
    return said
