#!/usr/bin/env python3
"""What handing out jobs and writing results costs: tests/speed/coordinator.py [SECONDS [RANKS...]]

Starts the small study with many jobs on 2, 4, 8 and 16 ranks, more than there are cores, and measures
over SECONDS (30) the processor time of rank 0's coordinator thread, which answers all ranks, draws
the display and rewrites results.h5, against the processor time of all ranks and their steps.
Processor time, not elapsed time: other load on the machine does not count.
"""
import collections
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
FOVEA = str(ROOT / "fovea")


def ranks_of(out):
    found = {}
    for entry in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            if str(out) not in (entry / "cmdline").read_text() or (entry / "comm").read_text() != "fovea\n":
                continue
            rank = re.search(r"OMPI_COMM_WORLD_RANK=(\d+)", (entry / "environ").read_text())
            found[int(rank.group(1))] = entry
        except (OSError, AttributeError):
            continue
    return found


def threads(process):
    """Seconds of processor time by thread."""
    spent = {}
    for task in (process / "task").iterdir():
        try:
            spent[task.name] = int((task / "schedstat").read_text().split()[0]) / 1e9
        except OSError:
            continue
    return spent


def coordinator(process):
    """The one thread that naps, 5 ms at a time."""
    naps = collections.Counter()
    for _ in range(200):
        for task in (process / "task").iterdir():
            naps[task.name] += (task / "wchan").read_text() == "hrtimer_nanosleep"
        time.sleep(0.003)
    return naps.most_common(1)[0][0]


def steps(out):
    text = subprocess.run([FOVEA, "status", str(out)], stdout=subprocess.PIPE, text=True, check=True).stdout
    return sum(int(n) for n in re.findall(r" seed \d+ +\w+ +(\d+)/", text))


def measure(ranks, seconds, out):
    run = subprocess.Popen(
        ["mpirun", "--oversubscribe", "-np", str(ranks), FOVEA, str(ROOT / "configs/ablations.yaml"),
         "scale=small", "seeds=0,1,2", "steps=20000", "checkpoint_seconds=5", "--threads", "1",
         "--device", "cpu", "--out", str(out)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not list(out.glob("*/seed_*/history.safetensors")) or len(ranks_of(out)) < ranks:
            if run.poll() is not None:
                sys.exit(f"{ranks} ranks: fovea ended with {run.returncode}")
            time.sleep(0.5)
        time.sleep(5)
        processes = ranks_of(out)
        thread = coordinator(processes[0])
        own = threads(processes[0])[thread]
        everything = sum(sum(threads(p).values()) for p in processes.values())
        done, start = steps(out), time.time()
        time.sleep(seconds)
        elapsed = time.time() - start
        own = threads(processes[0])[thread] - own
        everything = sum(sum(threads(p).values()) for p in processes.values()) - everything
        done = steps(out) - done
    finally:
        run.send_signal(signal.SIGUSR1)
        run.wait()
    size = (out / "results.h5").stat().st_size
    print(f"{ranks:5} {done:7} {1e3 * everything / done:12.1f} {1e3 * own / done:14.3f} "
          f"{100 * own / everything:9.2f} {100 * own / elapsed:13.2f} {size / 1e6:10.1f}", flush=True)


def main():
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 30
    if os.geteuid() == 0:
        os.environ.update(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
    print("ranks   steps  ms of a step  coordinator ms   share %  % of a core results MB")
    for ranks in map(int, sys.argv[2:] or (2, 4, 8, 16)):
        with tempfile.TemporaryDirectory() as folder:
            measure(ranks, seconds, pathlib.Path(folder) / "out")


if __name__ == "__main__":
    main()
