"""fovea-report, fovea-compare, fovea-export and the load API, on files that the program writes and
on fabricated ones: unfinished, failed, NaN, one experiment, a hundred seeds."""
import contextlib
import html.parser
import importlib.util
import io
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import unittest
import warnings

import h5py
import numpy as np
import pandas

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "analysis"), str(pathlib.Path(__file__).resolve().parent)]
import study_file  # noqa: E402
from fovea_analysis import Unreadable, commands, load, load_attention  # noqa: E402

FOVEA = os.environ.get("FOVEA", str(ROOT / "fovea"))
SEVEN = ["A_baseline", "B_temp_0.1", "C_contrastive", "D_freeze_dino", "E_hard_attn_32",
         "F_entropy_reg", "G_combined_best"]


def run(*arguments):
    """A command as its entry point runs it: status and both outputs."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), \
            warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # which a user would see
        try:
            commands.COMMANDS[arguments[0]]([str(a) for a in arguments[1:]])
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
            print(end.code, file=err)
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())


class Case(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        self.file = self.folder / "results.h5"

    def command(self, *arguments):
        done = run(*arguments)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(done.stderr, "")
        return done.stdout

    def refused(self, pattern, *arguments):
        done = run(*arguments)
        self.assertEqual(done.returncode, 1, done.stdout)
        self.assertEqual(len(done.stderr.splitlines()), 1, done.stderr)
        self.assertRegex(done.stderr, pattern)


class OfTheProgram(unittest.TestCase):
    """A whole study as ./fovea writes it."""

    @classmethod
    def setUpClass(cls):
        cls.temporary = tempfile.TemporaryDirectory()
        cls.out = pathlib.Path(cls.temporary.name) / "tiny"
        subprocess.run([FOVEA, "configs/tiny.yaml", "seeds=0,1,2", "--out", cls.out], check=True,
                       cwd=ROOT, capture_output=True, timeout=120)
        cls.done = run("report", cls.out)
        cls.page = cls.out / "report"

    @classmethod
    def tearDownClass(cls):
        cls.temporary.cleanup()

    def test_load_is_the_file(self):
        study = load(self.out)
        with h5py.File(self.out / "results.h5") as file:
            for name, dataset in file["summary"].items():
                if dataset.dtype.kind == "f":
                    np.testing.assert_array_equal(study[name].values, dataset[()], name)
                    self.assertEqual(study[name].attrs["units"], dataset.attrs["units"])
            run_3 = file["runs/D_freeze_dino/seed_2"]
            one = study.sel(experiment="D_freeze_dino", seed=2)
            for name, dataset in run_3["eval"].items():
                if not h5py.h5ds.is_scale(dataset.id):
                    np.testing.assert_array_equal(one["eval_" + name].values, dataset[()])
                    np.testing.assert_array_equal(one["last_" + name].values, dataset[-1])
            self.assertEqual(one.config.sel(key="freeze_dino").item(), "1")
            self.assertEqual(one.config.sel(key="lr").item(), "0.001")
            self.assertEqual(one.seconds.item(), run_3.attrs["seconds"])
            self.assertEqual(one.device.item(), run_3.attrs["device"])
            maps = load_attention(self.out, seed=2)
            np.testing.assert_array_equal(
                maps["map"].sel(experiment="D_freeze_dino", seed=2).values,
                run_3["attention/map"][()])
            np.testing.assert_array_equal(maps.pixels.values, run_3["attention/pixels"][()])
        self.assertEqual(study.eval_cosine.dims,
                         ("experiment", "seed", "eval_step", "clip", "frame"))
        self.assertEqual(study.sizes["clip"], 6)
        self.assertEqual(list(maps["pass"].values), ["coarse", "fine"])
        self.assertEqual(load_attention(self.out).sizes["seed"], 3)

    def test_report_holds_what_it_must_in_order(self):
        self.assertEqual(self.done.returncode, 0, self.done.stderr)
        self.assertEqual(self.done.stderr, "")
        text = (self.page / "report.md").read_text()
        self.assertEqual(re.findall(r"^## (.*)", text, re.M), [
            "Ranking", "What was run", "Experiments", "Where the queries look",
            "Against the published table", "Training cost", "How to reproduce it"])
        self.assertEqual(re.findall(r"^### (.*)", text, re.M)[-7:], SEVEN)
        for name in SEVEN:
            self.assertRegex(text, rf"\| \d \| {re.escape(name)} \| ")
        self.assertNotRegex(text, r"\bnan\b|\bNone\b(?! of the)|\{|\}")

    def test_numbers_are_those_of_the_file(self):
        text = (self.page / "report.md").read_text()
        with h5py.File(self.out / "results.h5") as file:
            names = file["summary/experiment"].asstr()[()].tolist()
            ratio = file["summary/held_out_ratio"][()].mean(axis=1)
            for e, name in enumerate(names):
                shown = re.search(rf"\| \d \| {re.escape(name)} \| \*\*([\d.]+)\*\*", text)
                self.assertEqual(shown.group(1), f"{ratio[e]:.4f}")
                self.assertIn(f"Result: ratio={ratio[e]:.4f}, "
                              f"sim={file['summary/held_out_cosine'][e].mean():.4f}, "
                              f"loss_fine={file['summary/held_out_loss_fine'][e].mean():.4f}", text)
        order = re.findall(r"^\| \d \| (\S+) \|", text, re.M)
        self.assertEqual(order, [names[i] for i in np.argsort(ratio, kind="stable")])

    def test_the_snippet_of_the_page_runs(self):
        text = (self.page / "report.md").read_text()
        snippet = re.search(r"```\n(import xarray\n.*?)```", text, re.S).group(1)
        done = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True)
        self.assertEqual(done.returncode, 0, done.stderr)
        value = float(re.search(r"([\d.]+)\)?\nCoord", done.stdout).group(1).strip("()"))
        self.assertIn(f"# {value:.4f} where", snippet)

    def test_the_example_of_the_docs_runs(self):
        block = re.search(r"```python\n(.*?)```", (ROOT / "docs/analysis.md").read_text(), re.S)
        (self.out.parent / "runs").mkdir()
        (self.out.parent / "runs/ablations").symlink_to(self.out)
        done = subprocess.run([sys.executable, "-c", block.group(1)], text=True,
                              cwd=self.out.parent, capture_output=True,
                              env={**os.environ, "PYTHONPATH": str(ROOT / "analysis")})
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("eval_loss_fine", done.stdout)

    def test_as_a_module(self):
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "analysis")}
        for arguments, status in ((["compare", self.out, "--against", "seed"], 0),
                                  (["nothing"], 1)):
            done = subprocess.run([sys.executable, "-m", "fovea_analysis", *arguments], text=True,
                                  capture_output=True, env=environment)
            self.assertEqual(done.returncode, status, done.stderr)

    def test_html_stands_alone(self):
        text = (self.page / "report.html").read_text()
        sources = re.findall(r'src="([^"]{5})', text)
        self.assertGreater(len(sources), 15)
        self.assertEqual(set(sources), {"data:"})
        self.assertNotRegex(text, r'href=|<script|url\(')
        stack, case = [], self

        class Nesting(html.parser.HTMLParser):
            def handle_starttag(self, tag, attrs):
                if tag not in ("meta", "img"):
                    stack.append(tag)

            def handle_endtag(self, tag):
                case.assertEqual(stack.pop(), tag)

        Nesting().feed(text)
        self.assertEqual(stack, [])

    def test_pictures(self):
        from PIL import Image
        text = (self.page / "report.md").read_text()
        named = set(re.findall(r"\]\(([\w.]+)\)", text)) | set(re.findall(r"`(\w+\.png)`", text))
        there = {p.name for p in self.page.iterdir() if p.suffix in (".png", ".gif")}
        self.assertEqual(named, there)
        for name in there:
            with Image.open(self.page / name) as image:
                self.assertGreater(image.width, 450, name)
                # more than background: text and curves
                self.assertGreater(len(image.convert("RGB").getcolors(1 << 24)), 20, name)
        with Image.open(self.page / "attention.gif") as image:
            self.assertEqual(image.n_frames, 4 * 4)  # sets of maps, frames

    def test_the_same_file_gives_the_same_page(self):
        before = (self.page / "report.md").read_bytes()
        again = run("report", self.out, "-o", self.out / "again")
        self.assertEqual(again.returncode, 0, again.stderr)
        self.assertEqual((self.out / "again/report.md").read_bytes(), before)

    def test_compared_with_itself(self):
        done = run("compare", self.out, self.out / "results.h5")
        self.assertEqual(done.returncode, 0, done.stderr)
        for name in SEVEN:
            self.assertRegex(done.stdout, rf"\| {re.escape(name)} .*\| 0.0000 \(0.0000 to 0.0000\) "
                                          r"\| 1.000 \| no detectable difference .*paired")

    def test_export_gives_the_numbers_back(self):
        done = run("export", self.out, "-o", self.out / "tables")
        self.assertEqual(done.returncode, 0, done.stderr)
        tables = {n: pandas.read_csv(self.out / f"tables/{n}.csv", dtype=str)
                  for n in ("runs", "steps", "evaluations")}
        with h5py.File(self.out / "results.h5") as file:
            np.testing.assert_array_equal(tables["runs"].held_out_ratio.astype(float),
                                          file["summary/held_out_ratio"][()].ravel())
            np.testing.assert_array_equal(tables["steps"].loss_fine.astype(float),
                                          file["summary/loss_fine"][()].ravel())
            rows = tables["evaluations"].query("experiment == 'B_temp_0.1' and seed == '1'")
            np.testing.assert_array_equal(rows.cosine.astype(float),
                                          file["runs/B_temp_0.1/seed_1/eval/cosine"][()].ravel())
        self.assertEqual(set(tables["runs"].query("experiment == 'B_temp_0.1'").config_temperature),
                         {"0.1"})

    @unittest.skipUnless(importlib.util.find_spec("pyarrow"), "pyarrow is not installed")
    def test_parquet(self):
        done = run("export", self.out, "-o", self.out / "parquet", "--format", "parquet")
        self.assertEqual(done.returncode, 0, done.stderr)
        import pyarrow.parquet
        table = pyarrow.parquet.read_table(self.out / "parquet/steps.parquet")
        with h5py.File(self.out / "results.h5") as file:
            np.testing.assert_array_equal(table["loss_fine"].to_numpy(),
                                          file["summary/loss_fine"][()].ravel())


class Unfinished(Case):
    STATUS = {("A_baseline", 1): "running", ("B", 0): "failed", ("B", 2): "waiting",
              ("C", 0): "waiting", ("C", 1): "waiting", ("C", 2): "waiting"}

    def test_a_running_study_is_reported_as_such(self):
        study_file.write(self.file, ["A_baseline", "B", "C"], seeds=(0, 1, 2), status=self.STATUS)
        out = self.command("report", self.file)
        self.assertIn("The study is still going on: 3 of 9 runs have finished (1 running, "
                      "4 waiting, 1 failed).", out)
        text = (self.folder / "report/report.md").read_text()
        self.assertIn("> The study is still going on", text)
        self.assertIn("B, seed 0: step 10: loss_fine is nan", text)
        self.assertRegex(text, r"\| - \| C \| - \|.*nothing finished")
        self.assertIn("No run has finished (3 waiting).", text)

    def test_padding(self):
        study_file.write(self.file, ["A_baseline", "B", "C"], seeds=(0, 1, 2), status=self.STATUS)
        study = load(self.file)
        self.assertEqual(int(np.isfinite(study.loss_fine.sel(experiment="B", seed=0)).sum()), 10)
        self.assertTrue(np.isnan(study.eval_cosine.sel(experiment="C")).all())
        self.assertTrue(np.isnan(study.last_cosine.sel(experiment="B", seed=2)).all())
        self.assertEqual(study.steps_done.sel(experiment="A_baseline", seed=1).item(), 10)
        self.assertEqual(list(study.eval_step.values), [0, 10, 20])

    def test_the_program_itself_while_it_runs(self):
        """Its own states: finished, running, failed, waiting."""
        program = ROOT / os.environ.get("B", "build") / "f32/test_results"
        subprocess.run([program, "--make", self.folder], check=True)
        out = self.command("report", self.folder)
        self.assertIn("still going on: 1 of 4 runs have finished", out)
        self.assertEqual(load(self.folder).status.values.tolist(),
                         [["finished", "running"], ["failed", "waiting"]])

    def test_runs_that_are_not_there(self):
        study_file.write(self.file, ["A_baseline", "B"], seeds=(0, 1, 2))
        with h5py.File(self.file, "a") as file:
            del file["runs/B/seed_1"]
        study = load(self.file)
        self.assertTrue(np.isnan(study.eval_cosine.sel(experiment="B", seed=1)).all())
        self.assertEqual(study.steps_done.sel(experiment="B", seed=1).item(), -1)


class Sizes(Case):
    def test_one_experiment_one_seed(self):
        study_file.write(self.file, ["D"], seeds=(7,), effect={"D": -0.01})
        out = self.command("report", self.file)
        self.assertIn("One seed cannot answer it.", out)
        self.assertRegex(out, r"the fine pass predicts better by \d.\d\d %")
        self.assertIn("nothing to compare", out)
        text = (self.folder / "report/report.md").read_text()
        self.assertIn("One seed shows no verdict.", text)
        self.assertNotIn("Against the published", text)

    def test_no_maps(self):
        study_file.write(self.file, ["A_baseline", "B"], maps=False)
        self.command("report", self.file)
        self.assertIn("kept no attention maps", (self.folder / "report/report.md").read_text())
        self.assertIsNone(load_attention(self.file))

    def test_a_hundred_seeds(self):
        study_file.write(self.file, ["A_baseline", "B", "C"], seeds=range(100), clips=3,
                         effect={"B": -0.01}, maps=False)
        self.command("report", self.file)
        text = (self.folder / "report/report.md").read_text()
        self.assertRegex(text, r"\| 1 \| B \|.*\*\*better\*\*")
        self.assertIn("lower in 100 of 100 seeds", text)

    def test_many_experiments(self):
        study_file.write(self.file, ["A_baseline"] + [f"E{i:02}" for i in range(13)], clips=3)
        self.command("report", self.file)
        text = (self.folder / "report/report.md").read_text()
        self.assertEqual(len(re.findall(r"^### E\d\d", text, re.M)), 13)

    def test_other_budgets_are_told(self):
        study_file.write(self.file, ["A_baseline", "B"], maps=False)
        with h5py.File(self.file, "a") as file:
            file["summary/held_out_step"][1, 0] = 10
            file["runs/B/seed_0/eval/eval_step"][-1] = 10
        self.command("report", self.file)
        self.assertIn("different numbers of steps** (10 and 20)",
                      (self.folder / "report/report.md").read_text())

    def test_answer_says_the_direction(self):
        study_file.write(self.file, ["A_baseline", "B", "C"], seeds=range(4), maps=False,
                         effect={"A_baseline": -0.01, "B": -0.03, "C": 0.02}, choice=0.02)
        out = self.command("report", self.file)
        self.assertIn("Yes, in B and A_baseline.", out)
        self.assertIn("B lowers the ratio detectably", out)
        self.assertIn("C raises the ratio detectably", out)
        self.assertRegex(out, r"in A_baseline, the fine pass predicts better by [\d.]+ % \(95 % "
                              r"interval [\d.]+ to [\d.]+ %\) than")
        study_file.write(self.file, ["A_baseline", "B", "C"], seeds=range(4), maps=False)
        self.assertIn("Not shown", self.command("report", self.file))

    def test_controls_of_another_study(self):
        study_file.write(self.file, ["A_baseline", "B"], seeds=range(3), maps=False)
        other = self.folder / "controls.h5"
        study_file.write(other, ["A_baseline", "vision_off"], seeds=range(3), maps=False)
        self.command("report", self.file, "--controls", other)
        self.assertIn("No vision: vision_off of the controls",
                      (self.folder / "report/report.md").read_text())


class Compared(Case):
    def test_two_studies(self):
        other = self.folder / "long.h5"
        study_file.write(self.file, ["A_baseline", "B", "X"], seeds=range(4), maps=False)
        study_file.write(other, ["A_baseline", "B", "Y"], seeds=range(4), maps=False, steps=40,
                         effect={"B": -0.02})
        out = self.command("compare", self.file, other)
        self.assertRegex(out, r"\| B \|.*\| B better \|.*paired over seeds and clips")
        self.assertRegex(out, r"\| A_baseline \|.*\| no detectable difference \|")
        self.assertIn("Only in A: X.", out)
        self.assertIn("| steps | 20 | 40 |", out)
        study_file.write(other, ["A_baseline", "B"], seeds=(9,), maps=False)
        out = self.command("compare", self.file, other)
        self.assertRegex(out, r"\| B \|.*\| not enough data \|.*unpaired")

    def test_against_the_published_table(self):
        study_file.write(self.file, ["A_baseline", "D_freeze_dino"], maps=False)
        out = self.command("compare", self.file, "--against", "seed")
        self.assertIn("| D_freeze_dino | 0.9966 |", out)
        self.assertIn("| device | RTX 4090 | cpu |", out)
        self.assertIn("| steps | 1500 | 20 |", out)


class Wrong(Case):
    def test_files(self):
        text = self.folder / "text.h5"
        text.write_text("not HDF5")
        other = self.folder / "other.h5"
        with h5py.File(other, "w") as file:
            file["x"] = 1
        version = self.folder / "version.h5"
        study_file.write(version, ["A"], version=2)
        waiting = self.folder / "waiting.h5"
        study_file.write(waiting, ["A"], status={("A", 0): "waiting"})
        for path, says in ((self.folder / "none.h5", "no such file"), (text, "cannot be read"),
                           (other, "is no results.h5 of fovea"),
                           (version, "has format version 2; this program reads version 1"),
                           (waiting, "no experiment has finished .1 waiting.")):
            with self.subTest(path=path.name):
                self.refused(f"^fovea-report: {re.escape(str(path))}: {says}", "report", path)
        self.refused("^fovea-compare: .*no such file", "compare", version.with_name("no"), waiting)
        self.refused("^fovea-export: .*cannot be read", "export", text)
        with self.assertRaises(Unreadable):
            load(text)

    def test_a_dataset_is_missing_or_misshapen(self):
        study_file.write(self.file, ["A"])
        with h5py.File(self.file, "a") as file:
            del file["summary/ratio"]
            file["summary/ratio"] = np.ones(5)
        self.refused("/summary/ratio has the shape", "report", self.file)
        with h5py.File(self.file, "a") as file:
            del file["summary"]
        self.refused("cannot be read", "report", self.file)

    def test_a_folder_that_cannot_be_written(self):
        study_file.write(self.file, ["A"], maps=False)
        blocked = self.folder / "blocked"
        blocked.write_text("a file")
        self.refused("^fovea-report: .*blocked", "report", self.file, "-o", blocked)


if __name__ == "__main__":
    unittest.main()
