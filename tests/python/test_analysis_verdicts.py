"""fovea_analysis.verdicts on fabricated studies with known effects."""
import pathlib
import sys
import tempfile
import unittest

import numpy as np

sys.path[:0] = [str(pathlib.Path(__file__).resolve().parents[2] / "analysis"),
                str(pathlib.Path(__file__).resolve().parent)]
import study_file  # noqa: E402
from fovea_analysis import Unreadable, load  # noqa: E402
from fovea_analysis.answer import claim  # noqa: E402
from fovea_analysis.statistics import estimate, mean_of, minus, sign_flip  # noqa: E402
from fovea_analysis.verdicts import Comparison, correct, judge, verdict  # noqa: E402

SEVEN = ["A_baseline", "B", "C", "D", "E", "F", "G"]


class Verdicts(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.file = pathlib.Path(folder.name) / "results.h5"

    def judge(self, experiments=SEVEN, baseline=None, **more):
        study_file.write(self.file, experiments, maps=False, **more)
        return judge(load(self.file), baseline)

    def test_better_worse_and_nothing(self):
        # noise of 0.001 a seed: a difference of two means over 5 seeds has an error of 0.0006
        f = self.judge(seeds=range(5), effect={"B": -0.02, "C": 0.02})
        self.assertEqual(f.by_name("B").tags, ["better"])
        self.assertEqual(f.by_name("C").tags, ["worse"])
        self.assertEqual(f.by_name("A_baseline").tags, ["baseline"])
        for name in "DEFG":
            self.assertEqual(f.by_name(name).tags, ["no detectable effect"])
        self.assertEqual([r.name for r in f.ranked][0], "B")
        self.assertEqual([r.name for r in f.ranked][-1], "C")
        b = f.by_name("B").against
        self.assertAlmostEqual(b.ratio.value, -0.02, delta=0.003)
        self.assertTrue(b.ratio.low < -0.02 < b.ratio.high)
        self.assertEqual((b.differences < 0).sum(), 5)

    def test_estimates_are_the_files_numbers(self):
        f = self.judge(seeds=range(4), effect={"B": -0.01})
        study = f.study
        for r in f.results:
            self.assertAlmostEqual(r.ratio.value,
                                   float(study.held_out_ratio.sel(experiment=r.name).mean()), 12)
            self.assertAlmostEqual(
                r.ratio_chosen.value,
                float(study.held_out_ratio_chosen.sel(experiment=r.name).mean()), 12)
            self.assertAlmostEqual(r.cosine.value,
                                   float(study.held_out_cosine.sel(experiment=r.name).mean()), 12)
        want = study.held_out_ratio.sel(experiment="B") - study.held_out_ratio.sel(
            experiment="A_baseline")
        np.testing.assert_allclose(f.by_name("B").against.differences, want, atol=1e-14)
        self.assertAlmostEqual(f.by_name("B").against.ratio.value, float(want.mean()), 12)

    def test_one_and_two_seeds_give_no_verdict(self):
        for seeds in ((3,), (3, 4)):
            f = self.judge(seeds=seeds, effect={"B": -0.05}, cosine={"C": -0.9})
            self.assertEqual(f.by_name("B").tags, ["not enough data"])
            self.assertEqual(f.by_name("C").tags, ["not enough data"])
            self.assertLess(f.by_name("B").against.ratio.value, -0.04)

    def test_sign_flips_decide_from_eight_seeds_on(self):
        few = self.judge(seeds=range(7), effect={"B": -0.02})
        self.assertEqual(few.by_name("B").against.test, "Student's t")
        many = self.judge(seeds=range(8), effect={"B": -0.02})
        self.assertEqual(many.by_name("B").against.test, "sign flips")
        self.assertEqual(many.by_name("B").against.p, 2 / 256)
        self.assertAlmostEqual(many.by_name("B").against.p_holm, 6 * 2 / 256)
        self.assertEqual(many.by_name("B").tags, ["better"])

    def test_holm_counts_the_comparisons(self):
        f = self.judge(seeds=range(3))
        p = [r.against.p for r in f.compared]
        self.assertEqual(len(p), 6)
        self.assertAlmostEqual(min(r.against.p_holm for r in f.compared), min(1, 6 * min(p)))

    def test_false_alarms_are_rare(self):
        """Six comparisons with one baseline, no effect: 5 percent of studies may name one."""
        rng, named, studies = np.random.default_rng(1), 0, 200
        for _ in range(studies):
            runs = rng.normal(size=(7, 5, 1)) + 0.5 * rng.normal(size=(7, 5, 8))
            found = []
            for run in runs[1:]:
                e = estimate(minus(mean_of(run), mean_of(runs[0])), 5, 8)
                d = (run - runs[0]).mean(axis=1)
                found.append(Comparison(list(range(5)), e, e, e, e, d, 0.5, 0.0, sign_flip(d)))
            correct(found)
            named += any(verdict(c) != "no detectable effect" for c in found)
        # expected at most 10, four deviations of sqrt(200 * 0.05 * 0.95) = 3.1 above
        self.assertLessEqual(named, 22)
        self.assertGreater(named, 0)

    def test_collapsed_and_differentiated(self):
        f = self.judge(seeds=range(4), effect={"D": -0.02},
                       cosine={"A_baseline": 0.99, "B": 0.97, "C": -0.999, "D": 0.43, "E": 0.93})
        self.assertIn("collapsed features", f.by_name("A_baseline").tags)
        self.assertIn("collapsed features", f.by_name("B").tags)
        self.assertEqual(f.by_name("C").tags,
                         ["no detectable effect", "differentiated but not more predictive"])
        self.assertEqual(f.by_name("D").tags, ["better"])
        self.assertEqual(f.by_name("E").tags, ["no detectable effect"])  # 0.06 apart

    def test_unstable(self):
        f = self.judge(seeds=range(3), rise={"B": 0.3}, status={("C", 1): "failed"})
        self.assertIn("unstable", f.by_name("B").tags)
        self.assertIn("unstable", f.by_name("C").tags)
        self.assertEqual(f.by_name("C").seeds, [0, 2])
        self.assertNotIn("unstable", f.by_name("D").tags)

    def test_pairs_need_both_runs(self):
        f = self.judge(seeds=range(5), status={("A_baseline", 0): "failed", ("B", 4): "running",
                                               ("C", 1): "waiting"})
        self.assertEqual(f.by_name("B").against.seeds, [1, 2, 3])
        self.assertEqual(f.by_name("C").against.seeds, [2, 3, 4])
        self.assertEqual(f.by_name("D").against.seeds, [1, 2, 3, 4])

    def test_without_a_baseline(self):
        f = self.judge(["A_baseline", "B"], seeds=range(3),
                       status={("A_baseline", s): "running" for s in range(3)})
        self.assertIsNone(f.by_name("B").against)
        self.assertEqual(f.by_name("B").tags, ["not comparable with the baseline"])
        self.assertEqual(f.by_name("A_baseline").tags, ["nothing finished"])
        self.assertEqual(self.judge(["X", "Y"]).baseline, "X")
        self.assertEqual(self.judge(["X", "Y"], baseline="Y").baseline, "Y")
        with self.assertRaisesRegex(Unreadable, "--baseline Z: the study has X, Y"):
            self.judge(["X", "Y"], baseline="Z")

    def test_other_clips_are_not_paired(self):
        f = self.judge(["A_baseline", "B"], seeds=range(3), config={"B": {"data_sha256": "other"}})
        self.assertIsNone(f.by_name("B").against)

    def test_controls(self):
        f = self.judge(["A_baseline", "B", "C", "vision_off"], seeds=range(4), copy=0.5,
                       effect={"A_baseline": -0.01, "B": -0.01},
                       choice={"A_baseline": 0.02, "C": 0.02})
        said = {r.name: claim(r) for r in f.results}
        self.assertEqual(said, {
            "A_baseline": "supported, but worse than copying",
            "B": "fine predicts better, but not through the choice",
            "C": "the choice matters, but fine does not beat coarse", "vision_off": "control"})
        self.assertEqual(f.floor, "vision_off")
        self.assertIn("floor", f.by_name("B").controls)
        self.assertEqual(len(f.compared), 2)  # the control is no intervention
        self.assertEqual(f.by_name("vision_off").tags, ["control: no vision"])
        f = self.judge(["A_baseline", "B"], seeds=range(4), effect={"A_baseline": -0.01},
                       choice=0.02)
        self.assertEqual([claim(r) for r in f.results], [
            "supported", "the choice matters, but fine does not beat coarse"])

    def test_two_frames_have_no_chosen_query(self):
        f = self.judge(["A_baseline", "B"], seeds=range(3), frames=2)
        self.assertIsNone(f.by_name("B").ratio_chosen)
        self.assertNotIn("other", f.by_name("B").controls)
        self.assertEqual(claim(f.by_name("B")), "not supported")

    def test_nothing_finished(self):
        with self.assertRaisesRegex(Unreadable, "no experiment has finished .2 running, 1 waiting"):
            self.judge(["A_baseline", "B", "C"], status={
                ("A_baseline", 0): "running", ("B", 0): "running", ("C", 0): "waiting"})


if __name__ == "__main__":
    unittest.main()
