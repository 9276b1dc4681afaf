"""What a study shows: estimates, controls and verdicts for every experiment.

Finished runs alone are counted. The rules are those of docs/analysis.md.
"""
import dataclasses

import numpy as np

from .load import Unreadable
from .statistics import (Estimate, estimate, hedges_g, holm, least_p, mean_of, minus, ratio_of,
                         sign_flip)

ALPHA = 0.05
MIN_SEEDS = 3         # pairs of runs below which nothing is said about other seeds
COLLAPSED = 0.95      # held-out cosine of coarse and fine features from which they count as one
APART = 0.1           # cosine below the baseline's from which features count as differentiated
UNSTABLE = 1.1        # last held-out loss_fine above so many times the run's lowest
CHOSEN_FROM = 3       # first frame that depends on a chosen query


@dataclasses.dataclass
class Comparison:
    """An experiment against the baseline, over the seeds that both have finished."""
    seeds: list
    ratio: Estimate           # difference of held-out ratios
    chosen: Estimate          # the same over frames that read a chosen query
    cosine: Estimate          # difference of the features' cosine
    loss: Estimate            # held-out loss_fine relative to the baseline's, minus 1
    differences: np.ndarray   # of the held-out ratio, one a seed
    clips_better: float       # share of clips whose ratio is lower, mean over seeds
    effect: float             # Hedges' g over seeds
    p_flip: float
    p: float = np.nan         # of `test`
    p_holm: float = np.nan
    test: str = "Student's t"  # "sign flips" where these can reach ALPHA after the correction


@dataclasses.dataclass
class Result:
    name: str
    index: int                # place in the study: the colour of its curves
    seeds: list               # finished
    states: dict              # status: number of runs
    ratio: Estimate = None
    ratio_chosen: Estimate = None
    cosine: Estimate = None
    controls: dict = None     # name: loss_fine / the control's loss - 1
    last200: dict = None      # column: (mean, deviation over seeds)
    held_out: dict = None     # column: mean over seeds
    step: int = 0
    vision: bool = True
    against: Comparison = None
    tags: list = dataclasses.field(default_factory=list)

    @property
    def measured(self):
        return self.ratio is not None


@dataclasses.dataclass
class Findings:
    study: object             # xarray.Dataset
    baseline: str
    results: list             # in the study's order
    floor: str = ""           # where the losses without vision come from

    def by_name(self, name):
        return next((r for r in self.results if r.name == name), None)

    @property
    def ranked(self):
        """Lowest held-out ratio first; without vision and unmeasured ones last."""
        return sorted(self.results, key=lambda r: (
            not r.measured, not r.vision, r.ratio.value if r.measured else 0.0))

    @property
    def compared(self):
        return [r for r in self.results if r.against]

    @property
    def most_seeds(self):
        return max((len(r.seeds) for r in self.results), default=0)


def place(study, experiment):
    return study.experiment.values.tolist().index(experiment)


def last_evaluation(study, column, experiment, seeds, from_frame=1):
    """[seed, clip]: mean over frames of a run's last evaluation; clips that are not there left
    out."""
    rows = np.isin(study.seed.values, seeds)
    values = study["last_" + column].values[place(study, experiment)][rows]
    values = values[:, :, study.frame.values >= from_frame]
    there = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        means = np.where(there, values, 0).sum(axis=2) / there.sum(axis=2)
    return means[:, np.isfinite(means).all(axis=0)]


def finished(study, experiment):
    e = place(study, experiment)
    done = (study.status.values[e] == "finished") & np.isfinite(study.held_out_ratio.values[e])
    return study.seed.values[done].tolist()


def has_vision(study, experiment):
    if "vision" not in study.key.values:
        return True
    return study.config.sel(experiment=experiment, key="vision").item() not in ("0", "False")


def measure(study, name, index):
    states = dict(zip(*np.unique(study.status.values[index].astype(str), return_counts=True)))
    seeds = finished(study, name)
    result = Result(name, index, seeds, states, vision=has_vision(study, name))
    if not seeds:
        return result

    def values(column, from_frame=1):
        return last_evaluation(study, column, name, seeds, from_frame)

    fine, coarse = values("loss_fine"), values("loss_coarse")
    count = fine.shape
    result.ratio = estimate(ratio_of(fine, coarse), *count)
    result.cosine = estimate(mean_of(values("cosine")), *count)
    result.controls = {"copy": estimate(ratio_of(fine, values("loss_copy")), *count)}
    late = values("loss_fine", CHOSEN_FROM)
    if late.size:
        result.ratio_chosen = estimate(ratio_of(late, values("loss_coarse", CHOSEN_FROM)), *count)
        result.controls["other"] = estimate(
            ratio_of(late, values("loss_fine_other", CHOSEN_FROM)), *count)
    result.controls = {k: e.scaled(1, -1) for k, e in result.controls.items()}
    rows = np.isin(study.seed.values, seeds)
    result.last200, result.held_out = {}, {}
    for variable in study.data_vars:
        if variable.endswith("_last200"):
            v = study[variable].values[index, rows]
            result.last200[variable[:-8]] = (float(v.mean()),
                                             float(v.std(ddof=1)) if len(v) > 1 else np.nan)
        elif variable.startswith("held_out_"):
            result.held_out[variable[9:]] = float(study[variable].values[index, rows].mean())
    result.step = int(study.held_out_step.values[index, rows].max())
    return result


def paired(study_a, name_a, study_b, name_b):
    """Comparison of a with b over the seeds that both have; None without any, or where the two were
    not evaluated on the same clips."""
    seeds = [s for s in finished(study_a, name_a) if s in finished(study_b, name_b)]
    if not seeds:
        return None
    data = [set(s.data_sha256.values[place(s, n), np.isin(s.seed.values, seeds)])
            for s, n in ((study_a, name_a), (study_b, name_b))]

    def values(column, from_frame=1):
        return (last_evaluation(study_a, column, name_a, seeds, from_frame),
                last_evaluation(study_b, column, name_b, seeds, from_frame))

    fine, coarse, cosine = values("loss_fine"), values("loss_coarse"), values("cosine")
    if data[0] != data[1] or fine[0].shape != fine[1].shape:
        return None
    count = fine[0].shape
    ratio = [f / c for f, c in zip(fine, coarse)]
    late = values("loss_fine", CHOSEN_FROM), values("loss_coarse", CHOSEN_FROM)
    chosen = Estimate(np.nan)
    if late[0][0].size:
        chosen = estimate(minus(ratio_of(late[0][0], late[1][0]), ratio_of(late[0][1], late[1][1])),
                          *count)
    differences = np.subtract(*(f.mean(axis=1) / c.mean(axis=1) for f, c in zip(fine, coarse)))
    return Comparison(
        seeds,
        estimate(minus(ratio_of(fine[0], coarse[0]), ratio_of(fine[1], coarse[1])), *count),
        chosen,
        estimate(minus(mean_of(cosine[0]), mean_of(cosine[1])), *count),
        estimate(ratio_of(*fine), *count).scaled(1, -1),
        differences, float((ratio[0] < ratio[1]).mean()), hedges_g(differences),
        sign_flip(differences))


def correct(comparisons):
    """Fills in p, p_holm and test. Sign flips decide where all comparisons have enough seeds for
    them to reach ALPHA after Holm's correction; else Student's t of the bootstrap does."""
    reach = comparisons and all(
        len(comparisons) * least_p(len(c.seeds)) <= ALPHA for c in comparisons)
    for c in comparisons:
        c.test = "sign flips" if reach else "Student's t"
        c.p = c.p_flip if reach else c.ratio.p()
    for c, p in zip(comparisons, holm([c.p for c in comparisons])):
        c.p_holm = p


def verdict(c):
    """Of a comparison with the baseline."""
    if len(c.seeds) < MIN_SEEDS:
        return "not enough data"
    if c.p_holm <= ALPHA and c.ratio.excludes(0):
        return "better" if c.ratio.value < 0 else "worse"
    return "no detectable effect"


def unstable(study, name, seeds):
    """Why, or None."""
    e = place(study, name)
    failed = study.seed.values[study.status.values[e] == "failed"]
    if len(failed):
        return f"failed with seed {', '.join(map(str, failed))}"
    for seed in seeds:
        loss = study.eval_loss_fine.values[e, study.seed.values == seed][0]
        loss = [step[np.isfinite(step)].mean() for step in loss if np.isfinite(step).any()]
        if loss[-1] > UNSTABLE * min(loss):
            return (f"held-out loss_fine of seed {seed} ends "
                    f"{100 * (loss[-1] / min(loss) - 1):.0f} % above its lowest")
    return None


def tag(findings, result):
    """The verdict and what else is to be said, the most important first."""
    tags = []
    if not result.measured:
        tags.append("nothing finished")
    elif not result.vision:
        tags.append("control: no vision")
    elif result.name == findings.baseline:
        tags.append("baseline")
    elif result.against:
        tags.append(verdict(result.against))
        apart = result.against.cosine
        if (tags[0] in ("no detectable effect", "worse") and apart.value <= -APART
                and apart.high < 0):
            tags.append("differentiated but not more predictive")
    else:
        tags.append("not comparable with the baseline")
    if result.measured and result.vision and result.cosine.value >= COLLAPSED:
        tags.append("collapsed features")
    if unstable(findings.study, result.name, result.seeds):
        tags.append("unstable")
    return tags


def choose_baseline(study, wish):
    names = [str(n) for n in study.experiment.values]
    if wish and wish not in names:
        raise Unreadable(f"--baseline {wish}: the study has {', '.join(names)}")
    seeing = [n for n in names if has_vision(study, n)]
    return wish or ("A_baseline" if "A_baseline" in names else (seeing or names)[0])


def judge(study, baseline=None, controls=None):
    """Findings of a study. controls: another study (configs/controls.yaml) whose experiment without
    vision is the floor, where this study has none. Unreadable when no run has finished."""
    baseline = choose_baseline(study, baseline)
    results = [measure(study, str(n), i) for i, n in enumerate(study.experiment.values)]
    if not any(r.measured for r in results):
        states = dict(zip(*np.unique(study.status.values.astype(str), return_counts=True)))
        raise Unreadable(f"{study.attrs['path']}: no experiment has finished ("
                         + ", ".join(f"{n} {s}" for s, n in states.items()) + ")")
    findings = Findings(study, baseline, results)
    if findings.by_name(baseline).measured:
        for result in results:
            if result.measured and result.vision and result.name != baseline:
                result.against = paired(study, result.name, study, baseline)
    correct([r.against for r in findings.compared])
    add_floor(findings, controls)
    for result in results:
        result.tags = tag(findings, result)
    return findings


def add_floor(findings, controls):
    """loss_fine against the experiment without vision, seed by seed on the same clips."""
    for study, where in ((findings.study, ""), (controls, " of the controls")):
        blind = [] if study is None else [
            str(n) for n in study.experiment.values
            if not has_vision(study, str(n)) and finished(study, str(n))]
        if not blind:
            continue
        findings.floor = blind[0] + where
        for result in findings.results:
            if result.measured and result.vision:
                pair = paired(findings.study, result.name, study, blind[0])
                if pair:
                    result.controls["floor"] = pair.loss
        return
