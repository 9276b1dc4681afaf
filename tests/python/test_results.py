"""Reads a results.h5 with every library that docs/results.md names.

usage: test_results.py TEST_RESULTS_PROGRAM    (makes a file with `PROGRAM --make FOLDER`)

The file made holds two experiments with two seeds: finished, running, failed, waiting.
"""

import os
import re
import subprocess
import sys
import tempfile
import unittest

import h5py
import netCDF4
import numpy as np
import xarray

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..")
PAGE = os.path.join(ROOT, "docs", "results.md")
CONFIG = os.path.join(ROOT, "src", "run", "config.h")
ENGINES = ("h5netcdf", "netcdf4")
RUNS = ["runs/%s/seed_%d" % (e, s) for e in ("A_baseline", "B_temp_0.1") for s in (0, 10)]
SERIES = "loss_fine loss_coarse loss_total ratio feature_sim entropy_fine entropy_coarse".split()
program = os.path.join(ROOT, os.environ.get("B", "build"), "f32/test_results")


def config_keys():
    """The keys of the table in src/run/config.h: the page names them as a whole."""
    with open(CONFIG) as header:
        return set(re.findall(r"X\((?:size|real|flag|text), (\w+),", header.read()))


class Results(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.TemporaryDirectory()
        subprocess.run([program, "--make", cls.folder.name], check=True)
        os.chdir(cls.folder.name)

    @classmethod
    def tearDownClass(cls):
        os.chdir("/")
        cls.folder.cleanup()

    def test_page_examples(self):
        """The page's code runs as it stands."""
        with open(PAGE) as page:
            blocks = re.findall(r"```python\n(.*?)```", page.read(), re.S)
        self.assertEqual(len(blocks), 3)
        for block in blocks:
            self.assertLessEqual(len(block.splitlines()), 3)
            done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True)
            self.assertEqual(done.returncode, 0, block + done.stderr)
            self.assertTrue(done.stdout)

    def test_page_names_everything(self):
        """Whatever stands in the file is described on the page."""
        with open(PAGE) as page:
            text = page.read()
        quoted = set(re.findall(r"`([^`]*)`", text))
        words = {word for q in quoted for word in re.findall(r"[a-z0-9_]+", q)}
        missing = set()

        def visit(name, item):
            last = name.split("/")[-1]
            if isinstance(item, h5py.Dataset) and not re.search("_last200$|^held_out_", last):
                missing.update({last} - words)

        with h5py.File("results.h5") as file:
            file.visititems(visit)
            missing.update(set(file.attrs) - words)
            missing.update(set(file[RUNS[0]].attrs) - words - config_keys())
            self.assertLessEqual(config_keys(), set(file[RUNS[0]].attrs))
        self.assertEqual(missing, set())

    def test_units_and_long_names(self):
        def visit(name, item):
            if not isinstance(item, h5py.Dataset):
                return
            self.assertIsInstance(item.attrs["long_name"], str, name)
            if item.dtype.kind != "O":
                self.assertIsInstance(item.attrs["units"], str, name)
            else:
                self.assertEqual(h5py.check_string_dtype(item.dtype).encoding, "utf-8", name)
                self.assertIsNone(h5py.check_string_dtype(item.dtype).length, name)
            if h5py.h5ds.is_scale(item.id):
                return
            for dim in item.dims:
                self.assertEqual(len(dim), 1, name)
            if item.dtype.kind == "f":
                self.assertTrue(np.isnan(item.attrs["_FillValue"]), name)
                self.assertEqual(item.attrs["_FillValue"].dtype, item.dtype, name)

        with h5py.File("results.h5") as file:
            file.visititems(visit)

    def test_layout(self):
        with h5py.File("results.h5") as file:
            self.assertEqual(file.attrs["format"], "fovea-results")
            self.assertEqual(file.attrs["format_version"], 1)
            self.assertEqual(file.attrs["end_time"], "")
            self.assertEqual(file.attrs["weights"], "")
            self.assertEqual(len(file.attrs["hosts"].splitlines()), 2)
            run = file[RUNS[0]]
            self.assertEqual((run["ratio"].compression, run["ratio"].chunks), (None, None))
            self.assertEqual(run["ratio"].dtype, np.float64)
            maps = run["attention/map"]
            self.assertEqual((maps.compression, maps.shuffle), ("gzip", True))
            self.assertEqual(maps.chunks, (1,) + maps.shape[1:])
            self.assertEqual(run["attention/pixels"], file[RUNS[1]]["attention/pixels"])
            self.assertEqual(run.attrs["lr"], 3e-4)
            self.assertEqual(run.attrs["steps"], 1500)
            self.assertEqual(run.attrs["vision"], 1)
            self.assertEqual(run.attrs["query_mode"], "deep")
            self.assertEqual(file[RUNS[2]].attrs["freeze_dino"], 1)
            self.assertEqual(file[RUNS[2]].attrs["hard_attn_k"], 32)
            self.assertEqual(file[RUNS[2]].attrs["hard_attn_k_effective"], 8)  # 64 of 256 patches
            self.assertEqual([file[r].attrs["status"] for r in RUNS],
                             ["finished", "running", "failed", "waiting"])
            self.assertEqual([file[r].attrs["steps_done"] for r in RUNS], [300, 120, 42, 0])
            self.assertEqual(file[RUNS[2]].attrs["why"], "step 42: loss_fine is nan \u2014 ?")
            self.assertEqual([("eval" in file[r], "attention" in file[r]) for r in RUNS],
                             [(True, True), (True, True), (False, False), (False, False)])

    def test_summary(self):
        with h5py.File("results.h5") as file:
            for engine in ENGINES:
                with xarray.open_dataset("results.h5", group="summary", engine=engine) as study:
                    self.assertEqual(list(study.experiment.values), ["A_baseline", "B_temp_0.1"])
                    self.assertEqual(list(study.seed.values), [0, 10])
                    self.assertEqual(list(study.status.values.flat),
                                     ["finished", "running", "failed", "waiting"])
                    self.assertEqual(study.sizes["step"], 300)
                    for run in RUNS:
                        _, name, seed = run.split("/")
                        one = study.sel(experiment=name, seed=int(seed[5:]))
                        self.compare(file[run], one, engine + " " + run)

    def compare(self, run, one, label):
        """One run of the summary against the run's own group, recomputed."""
        steps = run["step"].shape[0]
        for name in SERIES:
            self.assertEqual(one[name].dtype, np.float64, label)
            np.testing.assert_array_equal(one[name][:steps], run[name][:], label)
            self.assertTrue(np.isnan(one[name][steps:]).all(), label)
            mean = np.mean(run[name][-200:]) if steps else np.nan
            # two orders of summation of 200 numbers near 1
            np.testing.assert_allclose(one[name + "_last200"], mean, rtol=200 * 1.2e-16)
        if "eval" not in run:
            self.assertTrue(np.isnan(one.held_out_ratio) and np.isnan(one.held_out_step), label)
            return
        fine, coarse = (run["eval"][n][-1] for n in ("loss_fine", "loss_coarse"))
        self.assertEqual(one.held_out_step, run["eval/eval_step"][-1])
        for name, value in (("loss_fine", fine.mean()), ("loss_coarse", coarse.mean()),
                            ("ratio", fine.mean() / coarse.mean()),
                            ("ratio_chosen", fine[:, 2:].mean() / coarse[:, 2:].mean()),
                            ("cosine", run["eval/cosine"][-1].mean()),
                            ("loss_copy", run["eval/loss_copy"][-1].mean()),
                            ("loss_fine_other", run["eval/loss_fine_other"][-1].mean())):
            np.testing.assert_allclose(one["held_out_" + name], value, rtol=400 * 1.2e-16)

    def test_groups_in_xarray(self):
        for engine in ENGINES:
            for i, run in enumerate(RUNS):
                with xarray.open_dataset("results.h5", group=run, engine=engine) as data:
                    self.assertEqual(dict(data.sizes), {"step": (300, 120, 42, 0)[i]})
                    self.assertEqual(data.step_seconds.dtype, np.float64)
                    self.assertEqual(data.attrs["schedule"], "constant")
            for run in RUNS[:2]:
                with xarray.open_dataset("results.h5", group=run + "/eval", engine=engine) as data:
                    self.assertEqual(data.cosine.dims, ("eval_step", "clip", "frame"))
                    self.assertEqual(list(data.frame.values), list(range(1, 9)))
                self.check_attention(run + "/attention", engine)

    def check_attention(self, group, engine):
        with xarray.open_dataset("results.h5", group=group, engine=engine) as data:
            self.assertEqual(data["map"].dims, ("map_step", "pass", "clip", "frame", "y", "x"))
            self.assertEqual(data.cls.dims, data["map"].dims[:4])
            self.assertEqual(data.pixels.dims, ("clip", "frame", "pixel_y", "pixel_x", "rgb"))
            self.assertEqual(list(data["pass"].values), ["coarse", "fine"])
            self.assertEqual(list(data.rgb.values), ["red", "green", "blue"])
            self.assertEqual(list(data["clip"].values), [0, 16, 32, 48])
            self.assertEqual(list(data.y.values), list(np.arange(8) * 8 + 3.5))
            self.assertEqual(data["map"].sel({"pass": "fine", "clip": 16}).shape[1:], (8, 8, 8))
            self.assertEqual(data.pixels.dtype, np.uint8)
            self.assertTrue(data.pixels.load().any())

    def test_netcdf4(self):
        with netCDF4.Dataset("results.h5") as file:
            self.assertEqual(list(file["summary"]["experiment"][:]), ["A_baseline", "B_temp_0.1"])
            self.assertEqual(file["summary"]["ratio"].dimensions, ("experiment", "seed", "step"))
            self.assertEqual(file["runs/A_baseline/seed_0"]["ratio"][:].shape, (300,))

    def test_h5dump(self):
        try:
            done = subprocess.run(["h5dump", "-H", "results.h5"], capture_output=True, text=True)
        except FileNotFoundError:
            self.skipTest("h5dump is not installed")
        self.assertEqual(done.returncode, 0, done.stderr)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    program = os.path.abspath(sys.argv.pop(1))
    unittest.main()
