"""fovea_analysis.statistics against known cases, scipy and simulation."""
import pathlib
import sys
import unittest

import numpy as np
from scipy import stats

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "analysis"))
from fovea_analysis import statistics as st  # noqa: E402


def simulated(rng, seeds, clips, seed_sd, clip_sd, cell_sd, ratio=0.997):
    """Losses [seed, clip] whose true ratio is `ratio`."""
    coarse = np.exp(0.1 * rng.normal(size=(seeds, 1)) + 0.4 * rng.normal(size=(1, clips))
                    + 0.05 * rng.normal(size=(seeds, clips)))
    fine = coarse * (ratio + seed_sd * rng.normal(size=(seeds, 1))
                     + clip_sd * rng.normal(size=(1, clips))
                     + cell_sd * rng.normal(size=(seeds, clips)))
    return fine, coarse


class Intervals(unittest.TestCase):
    REPEATS = 400

    def coverage(self, seeds, parts, paired=False):
        """Share of 95 % intervals that hold the true value, of the ratio or of a difference."""
        rng = np.random.default_rng([seeds, int(1e4 * sum(parts)), paired])
        hits = 0
        for _ in range(self.REPEATS):
            fine, coarse = simulated(rng, seeds, 64, *parts)
            statistic, truth = st.ratio_of(fine, coarse), 0.997
            if paired:
                other = simulated(rng, seeds, 64, *parts, ratio=0.992)
                statistic, truth = st.minus(statistic, st.ratio_of(*other)), 0.005
            e = st.estimate(statistic, seeds, 64)
            hits += e.low <= truth <= e.high
        return hits / self.REPEATS

    def test_they_cover(self):
        # 400 repeats: standard error of a share of 0.95 is 0.011. 0.91 is 3.7 of them below; the
        # intervals may be too wide where seeds and clips have no effect of their own.
        for seeds in (3, 5, 10):
            for parts in ((0.003, 0, 0.001), (0.0001, 0.01, 0.001), (0.002, 0.01, 0.01),
                          (0, 0, 0.01)):
                with self.subTest(seeds=seeds, parts=parts):
                    share = self.coverage(seeds, parts)
                    self.assertGreater(share, 0.91)
                    if parts[0] or parts[1]:
                        self.assertLess(share, 0.985)

    def test_differences_cover(self):
        for seeds in (3, 5):
            with self.subTest(seeds=seeds):
                share = self.coverage(seeds, (0.003, 0.002, 0.005), paired=True)
                self.assertGreater(share, 0.91)
                self.assertLess(share, 0.985)

    def test_plain_percentiles_would_not(self):
        """Why the standard error and Student's distribution are used."""
        rng = np.random.default_rng(3)
        hits = 0
        for _ in range(self.REPEATS):
            fine, coarse = simulated(rng, 3, 64, 0.003, 0, 0.001)
            drawn = st.ratio_of(fine, coarse)(st.resamples(64, 1))
            means = (st.resamples(3, 0) * drawn).sum(axis=1)
            low, high = np.percentile(means, (2.5, 97.5))
            hits += low <= 0.997 <= high
        self.assertLess(hits / self.REPEATS, 0.88)

    def test_seeds_alone_are_students_interval(self):
        values = np.random.default_rng(5).normal(size=(12, 1))
        e = st.estimate(st.mean_of(values), 12, 1)
        low, high = stats.t.interval(0.95, 11, values.mean(), stats.sem(values[:, 0]))
        # the error is known from 2000 resamples: to 1/sqrt(2 * 2000) = 1.6 percent, four of them
        np.testing.assert_allclose([e.low - e.value, e.high - e.value],
                                   [low - values.mean(), high - values.mean()], rtol=0.064)
        self.assertAlmostEqual(e.value, values.mean(), places=14)
        self.assertEqual(e.dof, 11)

    def test_one_seed_is_about_clips_and_one_clip_too_has_no_interval(self):
        values = np.random.default_rng(6).normal(size=(1, 50))
        e = st.estimate(st.mean_of(values), 1, 50)
        np.testing.assert_allclose(e.error, stats.sem(values[0]), rtol=0.064)
        alone = st.estimate(st.mean_of(values[:, :1]), 1, 1)
        self.assertTrue(np.isnan(alone.half) and np.isnan(alone.p()))
        self.assertFalse(alone.excludes(0))

    def test_no_difference_at_all(self):
        e = st.estimate(st.mean_of(np.zeros((4, 8))), 4, 8)
        self.assertEqual((e.value, e.error, e.p()), (0, 0, 1))
        self.assertFalse(e.excludes(0))

    def test_the_same_numbers_give_the_same_interval(self):
        values = np.random.default_rng(8).normal(size=(5, 9))
        twice = [st.estimate(st.mean_of(values), 5, 9) for _ in range(2)]
        self.assertEqual(twice[0], twice[1])

    def test_unpaired_is_welch(self):
        rng = np.random.default_rng(9)
        a, b = rng.normal(size=9), rng.normal(1, 3, size=14)
        est = [st.Estimate(v.mean(), stats.sem(v), len(v) - 1) for v in (a, b)]
        want = stats.ttest_ind(a, b, equal_var=False)
        self.assertAlmostEqual(st.unpaired(*est).p(), want.pvalue, places=12)


class SignFlips(unittest.TestCase):
    def test_against_scipy(self):
        differences = np.random.default_rng(1).normal(0.4, 1, size=9)
        want = stats.permutation_test((differences,), np.mean, permutation_type="samples",
                                      n_resamples=np.inf).pvalue
        self.assertAlmostEqual(st.sign_flip(differences), want, places=12)

    def test_known(self):
        self.assertEqual(st.sign_flip([1, 2, 3]), 2 / 8)
        self.assertEqual(st.sign_flip([1, -1]), 1)
        self.assertEqual(st.sign_flip([0.1] * 8), st.least_p(8))
        self.assertTrue(np.isnan(st.sign_flip([])))
        self.assertTrue(np.isnan(st.sign_flip([1, np.nan])))

    def test_many_seeds_are_sampled(self):
        p = st.sign_flip(np.random.default_rng(2).normal(0.02, 1, size=100))
        want = stats.ttest_1samp(np.random.default_rng(2).normal(0.02, 1, size=100), 0).pvalue
        self.assertAlmostEqual(p, want, delta=0.02)  # both tests, and 4 errors of 20000 patterns
        self.assertAlmostEqual(st.sign_flip(np.ones(100)), st.least_p(100), places=12)

    def test_holds_its_level(self):
        rng = np.random.default_rng(4)
        found = np.mean([st.sign_flip(rng.normal(size=8)) <= 0.05 for _ in range(2000)])
        self.assertLess(found, 0.05 + 4 * np.sqrt(0.05 * 0.95 / 2000))


class Corrections(unittest.TestCase):
    def test_holm(self):
        np.testing.assert_allclose(st.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
        np.testing.assert_allclose(st.holm([0.5, 0.9]), [1, 1])
        np.testing.assert_array_equal(st.holm([np.nan, 0.02]), [np.nan, 0.02])
        self.assertEqual(len(st.holm([])), 0)

    def test_hedges_g(self):
        d = np.array([1.0, 2.0, 3.0, 4.0])
        self.assertAlmostEqual(st.hedges_g(d), 2.5 / d.std(ddof=1) * (1 - 3 / 11), places=12)
        self.assertTrue(np.isnan(st.hedges_g([1.0])) and np.isnan(st.hedges_g([2.0, 2.0])))


if __name__ == "__main__":
    unittest.main()
