"""Intervals, tests and effect sizes over seeds and held-out clips.

Data are [seed, clip]: every seed is evaluated on the same clips. Both are samples, seeds of
training runs and clips of videos, so both are resampled. docs/analysis.md explains the choices;
tests/python/test_statistics.py checks coverage by simulation.
"""
import dataclasses
import functools

import numpy as np
from scipy import stats

DRAWS = 2000          # resamples behind a standard error: known to 1.6 percent
EXACT = 14            # seeds up to which all sign patterns are counted, else PATTERNS random ones
PATTERNS = 20000
LEVEL = 0.95


@dataclasses.dataclass
class Estimate:
    """A mean over seeds and clips with its standard error; dof: of Student's distribution. NaN
    where there are no repetitions to learn it from."""
    value: float
    error: float = np.nan
    dof: float = np.nan
    seeds: int = 0
    clips: int = 0

    @property
    def half(self):
        return self.error * stats.t.ppf((1 + LEVEL) / 2, self.dof) if self.dof > 0 else np.nan

    @property
    def low(self):
        return self.value - self.half

    @property
    def high(self):
        return self.value + self.half

    def p(self, null=0.0):
        """Two-sided, of Student's t."""
        away = abs(self.value - null)
        if self.error == 0:
            return 1.0 if away == 0 else np.nan
        return float(2 * stats.t.sf(away / self.error, self.dof)) if self.dof > 0 else np.nan

    def excludes(self, null):
        return self.low > null or self.high < null

    def scaled(self, factor, shift=0.0):
        return dataclasses.replace(self, value=self.value * factor + shift,
                                   error=self.error * abs(factor))


# A statistic is a function of weights [draw, clip] that gives values [draw, seed].

def mean_of(values):
    """Mean over clips; values [seed, clip]."""
    return lambda weights: weights @ values.T


def ratio_of(top, bottom):
    """Mean of top / mean of bottom, as held_out_ratio."""
    return lambda weights: (weights @ top.T) / (weights @ bottom.T)


def minus(a, b):
    return lambda weights: a(weights) - b(weights)


@functools.lru_cache(maxsize=16)
def resamples(count, number):
    """Weights [DRAWS, count] of DRAWS resamples of `count` things; the same in every call."""
    rng = np.random.default_rng([count, number])
    return rng.multinomial(count, np.full(count, 1 / count), size=DRAWS) / count


def estimate(statistic, seeds, clips):
    """Crossed bootstrap of the mean over seeds of a statistic.

    Seeds alone, clips alone (the same clips for every seed) and both are resampled. With the
    variances of a mean of independent seeds, of clips and of their interaction, a, b and c, they
    give a + c, b + c and a + b + 3c, each but for a factor (n - 1)/n of the sample's size, which is
    taken out; the wanted a + b + c follows. Degrees of freedom: Satterthwaite's.
    """
    each = statistic(np.full((1, clips), 1 / clips))  # [1, seed]
    value = float(each.mean())
    over_seeds, over_clips = resamples(seeds, 0), resamples(clips, 1)
    drawn = statistic(over_clips)  # [draw, seed]
    v_seeds = np.var(over_seeds @ each[0]) if seeds > 1 else 0.0
    v_clips = np.var(drawn.mean(axis=1)) if clips > 1 else 0.0
    v_both = np.var((over_seeds * drawn).sum(axis=1)) - v_seeds - v_clips
    a = v_seeds * seeds / (seeds - 1) if seeds > 1 else 0.0
    b = v_clips * clips / (clips - 1) if clips > 1 else 0.0
    c = 0.0
    if min(seeds, clips) > 1:
        c = max(v_both, 0.0) * seeds / (seeds - 1) * clips / (clips - 1)
    variance = max(a, b, a + b - c)
    spread = sum(v * v / (n - 1) for v, n in ((a, seeds), (b, clips)) if n > 1)
    dof = variance**2 / spread if spread > 0 else max(seeds, clips) - 1
    return Estimate(value, float(np.sqrt(variance)) if max(seeds, clips) > 1 else np.nan,
                    float(dof), seeds, clips)


def unpaired(a, b):
    """a - b of independent estimates (Welch)."""
    variance = a.error**2 + b.error**2
    spread = a.error**4 / a.dof + b.error**4 / b.dof if min(a.dof, b.dof) > 0 else np.nan
    dof = variance**2 / spread if spread > 0 else min(a.dof, b.dof)
    return Estimate(a.value - b.value, float(np.sqrt(variance)), float(dof),
                    min(a.seeds, b.seeds), min(a.clips, b.clips))


def sign_flip(differences):
    """Two-sided p of the mean of paired differences, one a seed: the share of sign patterns whose
    mean is as far from zero. Under no effect every pattern is equally likely."""
    differences = np.asarray(differences, dtype=float)
    count = len(differences)
    if count == 0 or not np.isfinite(differences).all():
        return np.nan
    if count <= EXACT:
        signs = 1 - 2 * ((np.arange(2**count)[:, None] >> np.arange(count)) & 1)
        extra = 0
    else:
        signs = np.random.default_rng(0).choice((-1, 1), size=(PATTERNS, count))
        extra = 1  # the pattern that was seen
    sums = np.abs(signs @ differences)
    # rounding must not hide patterns that are as far as the one seen
    seen = np.abs(differences.sum()) - 1e-12 * np.abs(differences).sum()
    return float((np.count_nonzero(sums >= seen) + extra) / (len(signs) + extra))


def least_p(seeds):
    """The smallest p that sign flips of so many seeds can give."""
    return 2.0**(1 - seeds) if seeds <= EXACT else 1 / (PATTERNS + 1)


def holm(p):
    """Holm's correction of several p-values; NaN stay NaN and are not counted."""
    p = np.asarray(p, dtype=float)
    out = np.full(len(p), np.nan)
    order = [i for i in np.argsort(p, kind="stable") if np.isfinite(p[i])]
    largest = 0.0
    for place, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - place) * p[i]))
        out[i] = largest
    return out


def hedges_g(differences):
    """Mean of paired differences in units of their standard deviation over seeds, corrected for
    few seeds (Hedges)."""
    differences = np.asarray(differences, dtype=float)
    count = len(differences)
    deviation = differences.std(ddof=1) if count > 1 else 0.0
    if deviation == 0:
        return np.nan
    return float(differences.mean() / deviation * (1 - 3 / (4 * (count - 1) - 1)))
