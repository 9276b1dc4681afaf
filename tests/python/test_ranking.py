"""analysis/ranking.py on fabricated results: order, means, gaps, figure, wrong files."""
import os
import pathlib
import subprocess
import sys
import tempfile
import unittest

import h5py
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "analysis/ranking.py"
sys.path.insert(0, str(SCRIPT.parent))
import ranking  # noqa: E402


def write(path, ratios, status, steps=120):
    """ratios, status: [experiment][seed]; None in ratios: nothing measured."""
    value = np.array([[np.nan if r is None else r for r in row] for row in ratios], dtype=float)
    experiments, runs = value.shape
    measured = np.where(np.isnan(value), np.nan, 1.0)
    text = h5py.string_dtype()
    with h5py.File(path, "w") as file:
        file.attrs["format"] = "fovea-results"
        group = file.create_group("summary")
        group.create_dataset("experiment", data=[f"E{i}" for i in range(experiments)], dtype=text)
        group["seed"] = np.arange(runs, dtype="u8")
        group.create_dataset("status", data=status, dtype=text)
        fade = np.linspace(1, 0.4, steps)
        group["loss_coarse"] = measured[:, :, None] * fade
        group["loss_fine"] = value[:, :, None] * fade
        group["ratio"] = np.repeat(value[:, :, None], steps, axis=2)
        group["ratio_last200"] = value
        for place, name in enumerate(ranking.NUMBERS[1:], 1):
            group[name] = measured * place / 10


def run(*arguments, **more):
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, arguments)], text=True,
                          capture_output=True, timeout=120, **more)


class Ranking(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        self.file = self.folder / "results.h5"

    def table(self, result):
        """Fields of the table's lines, by experiment."""
        lines = [line.split() for line in result.stdout.splitlines()]
        return {fields[1]: fields for fields in lines if len(fields) > 8 and fields[1][:1] == "E"
                and fields[1][1:].isdigit()}

    def test_orders_by_ratio_and_draws(self):
        write(self.file, [[1.01], [0.98], [1.0]], [["finished"]] * 3)
        result = run(self.folder)
        self.assertEqual(result.returncode, 0, result.stderr)
        table = self.table(result)
        self.assertEqual([table[name][0] for name in ("E1", "E2", "E0")], ["1", "2", "3"])
        # ratio, feature sim, held-out fine, coarse, other, copy, ratio, chosen, seeds, steps, state
        self.assertEqual(table["E1"][2:], ["0.9800", "0.1000", "|", "0.2000", "0.3000", "0.4000",
                                           "0.5000", "0.6000", "0.7000", "|", "1", "120",
                                           "finished"])
        self.assertIn("One seed shows no uncertainty", result.stdout)
        picture = (self.folder / "losses.png").read_bytes()
        self.assertEqual(picture[:8], b"\x89PNG\r\n\x1a\n")
        width, height = (int.from_bytes(picture[i:i + 4], "big") for i in (16, 20))
        self.assertGreater(width, 1000)
        self.assertGreater(height, 700)

    def test_means_over_seeds(self):
        write(self.file, [[1.0, 1.2], [0.9, 1.1]], [["finished"] * 2] * 2)
        result = run(self.file)
        table = self.table(result)
        self.assertEqual(table["E1"][:4], ["1", "E1", "1.0000", "0.1414"])  # deviation over n - 1
        self.assertEqual(table["E0"][:4], ["2", "E0", "1.1000", "0.1414"])
        self.assertNotIn("One seed", result.stdout)
        self.assertIn("not an interval", result.stdout)

    def test_unfinished_failed_and_waiting(self):
        write(self.file, [[1.0, None], [0.5, 1.1], [None, None]],
              [["running", "waiting"], ["failed", "finished"], ["waiting", "waiting"]])
        result = run(self.file)
        self.assertEqual(result.returncode, 0, result.stderr)
        table = self.table(result)
        self.assertEqual(table["E0"][:4], ["1", "E0", "1.0000", "-"])
        self.assertEqual(table["E1"][:3], ["2", "E1", "1.1000"])  # the failed 0.5 is left out
        self.assertEqual(table["E2"][:3], ["-", "E2", "-"])
        self.assertIn("1 failed, 1 finished", result.stdout)
        self.assertIn("Failed runs are left out", result.stdout)

    def test_nothing_measured_yet(self):
        write(self.file, [[None]], [["waiting"]], steps=0)
        result = run(self.file)
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertIn("nothing to draw yet", result.stdout)
        self.assertFalse((self.folder / "losses.png").exists())

    def test_one_step(self):
        write(self.file, [[1.0], [0.9]], [["running"]] * 2, steps=1)
        result = run(self.file)
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertTrue((self.folder / "losses.png").exists())

    def test_wrong_files_are_one_clear_line(self):
        other = self.folder / "other.h5"
        with h5py.File(other, "w") as file:
            file["x"] = 1
        text = self.folder / "text.h5"
        text.write_text("not HDF5")
        short = self.folder / "short.h5"
        write(short, [[1.0]], [["finished"]])
        with h5py.File(short, "a") as file:
            del file["summary/held_out_ratio"]
        shape = self.folder / "shape.h5"
        write(shape, [[1.0]], [["finished"]])
        with h5py.File(shape, "a") as file:
            del file["summary/ratio"]
            file["summary/ratio"] = np.ones(5)
        for path, says in ((self.folder / "none.h5", "no such file"), (other, "is no results.h5"),
                           (text, "cannot be read"), (short, "held_out_ratio"),
                           (shape, "has the shape")):
            with self.subTest(path=path.name):
                result = run(path)
                self.assertEqual(result.returncode, 1)
                self.assertEqual(len(result.stderr.strip().splitlines()), 1, result.stderr)
                self.assertIn(says, result.stderr)
                self.assertIn(str(path), result.stderr)

    def test_figure_that_cannot_be_written_keeps_the_table(self):
        write(self.file, [[1.0]], [["finished"]])
        result = run(self.file, "--figure", self.folder / "none" / "x.png")
        self.assertEqual(result.returncode, 1)
        self.assertIn("E0", self.table(result))
        self.assertIn("cannot be written", result.stderr)

    def test_a_closed_pipe_is_no_error(self):
        write(self.file, [[1.0]], [["finished"]])
        reading, writing = os.pipe()
        os.close(reading)
        with os.fdopen(writing) as pipe:
            result = subprocess.run([sys.executable, str(SCRIPT), str(self.file)], stdout=pipe,
                                    stderr=subprocess.PIPE, text=True, timeout=120)
        self.assertEqual(result.stderr, "")


class RollingMean(unittest.TestCase):
    def test_constant_and_line_stay(self):
        line = np.arange(40.0)
        smooth = ranking.rolling_mean(line, 5)
        self.assertTrue(np.isnan(smooth[:2]).all() and np.isnan(smooth[-2:]).all())
        # sums of five numbers below 40 are exact; only the division rounds
        np.testing.assert_array_equal(smooth[2:-2], line[2:-2])

    def test_a_gap_stays_a_gap(self):
        values = np.ones(30)
        values[10] = np.nan
        smooth = ranking.rolling_mean(values, 5)
        self.assertTrue(np.isnan(smooth[8:13]).all())
        np.testing.assert_array_equal(smooth[13:28], np.ones(15))


if __name__ == "__main__":
    unittest.main()
