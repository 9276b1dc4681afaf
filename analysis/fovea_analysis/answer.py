"""What a study says, in sentences made from its numbers."""
import numpy as np

from . import words
from .verdicts import COLLAPSED, MIN_SEEDS, unstable
from .words import count, direction, listing, number, signed, span


def claim(result):
    """What ratio and controls say about "the chosen query helps"."""
    if not result.vision:
        return "control"
    wins = result.ratio.high < 1
    own = result.controls.get("other")
    choice = own is not None and own.high < 0
    beats_copy = result.controls["copy"].high < 0
    if wins and choice:
        return "supported" if beats_copy else "supported, but worse than copying"
    if wins:
        return "fine predicts better, but not through the choice"
    if choice:
        return "the choice matters, but fine does not beat coarse"
    return "not supported"


def passes(result):
    """Fine against coarse, in words."""
    change = result.ratio.scaled(1, -1)
    text = f"the fine pass predicts {direction(change)} than the coarse pass"
    if not np.isfinite(change.half):
        return text
    return text if change.excludes(0) else text + ", which may be chance"


def scope(findings):
    """What the intervals are about."""
    clips = max(r.ratio.clips for r in findings.results if r.measured)
    return f"{count(findings.most_seeds, 'seed')}, {count(clips, 'held-out clip')}"


def one_seed(findings):
    """What too few seeds cannot show; "" where there are enough."""
    if findings.most_seeds >= MIN_SEEDS:
        return ""
    about = ("One seed shows no verdict.** Intervals are over clips alone: they"
             if findings.most_seeds == 1 else "Two seeds show no verdict.** They")
    return (f"**{about} describe these trained models; another seed may give differences of the "
            f"same size with the opposite sign. Verdicts need {MIN_SEEDS} seeds or more: "
            "`seeds=0,1,2,3,4` on the command line.")


def compared_text(findings):
    """What the interventions do to the baseline's ratio."""
    groups = {v: [r for r in findings.compared if r.tags[0] == v]
              for v in ("better", "worse", "no detectable effect", "not enough data")}
    if not findings.compared:
        return "There is nothing to compare it with."
    parts = []
    if groups["not enough data"]:
        lowest = min(findings.compared, key=lambda r: r.against.ratio.value)
        parts.append(f"Of {count(len(findings.compared), 'intervention')}, {lowest.name} has the "
                     f"lowest ratio against the baseline ({signed(lowest.against.ratio.value)}), "
                     "with too few seeds to tell it from chance.")
    for key, verb in (("better", "lowers"), ("worse", "raises")):
        if groups[key]:
            several = len(groups[key]) > 1
            parts.append(f"**{listing(r.name for r in groups[key])} "
                         f"{verb[:-1] if several else verb} the ratio detectably** ("
                         + "; ".join(f"{signed(r.against.ratio.value)}, 95 % interval "
                                     f"{span(r.against.ratio, show=signed)}"
                                     for r in groups[key]) + ").")
    if groups["no detectable effect"]:
        widest = max(r.against.ratio.half for r in groups["no detectable effect"])
        if len(groups["no detectable effect"]) == len(findings.compared):
            who = "None of the interventions has a detectable effect on the ratio"
        else:
            who = f"{listing(r.name for r in groups['no detectable effect'])}: no detectable effect"
        parts.append(f"{who} (differences up to about {number(widest)} would stay unseen here).")
    return " ".join(parts)


def controls_text(findings):
    """What the controls say, over all experiments that see."""
    seen = [r for r in findings.results if r.measured and r.vision]
    parts = []
    that = "That" if findings.most_seeds >= MIN_SEEDS else "For these trained models alone, that"
    supported = [r.name for r in seen if claim(r).startswith("supported")]
    if supported:
        parts.append(f"{that} the choice itself helps is supported for {listing(supported)}: "
                     "queries chosen for another clip predict worse there.")
    elif any("other" in r.controls for r in seen):
        parts.append(f"{that} the choice itself helps is supported for no experiment: it takes a "
                     "fine pass that beats the coarse one and loses when it reads with another "
                     "clip's queries.")
    worse = [r for r in seen if r.controls["copy"].low > 0]
    if len(worse) == len(seen):
        least = min(r.controls["copy"].value for r in worse)
        parts.append(f"Every model still predicts worse than repeating the previous latent (by "
                     f"{words.percent(least)} at least): differences between passes say little "
                     "so early.")
    elif worse:
        parts.append(f"{listing(r.name for r in worse)}: worse than repeating the previous latent.")
    apart = [r.name for r in seen if "differentiated but not more predictive" in r.tags]
    if apart:
        verb = "holds" if len(apart) == 1 else "hold"
        parts.append(f"Different is not better: {listing(apart)} {verb} features farther apart than "
                     "the baseline without predicting detectably better.")
    collapsed = [r.name for r in seen if "collapsed features" in r.tags]
    if collapsed:
        parts.append(f"Features have collapsed in {listing(collapsed)}.")
    return " ".join(parts)


def lead(findings):
    """The answer in one line."""
    helps = [r.name for r in findings.ranked if r.measured and claim(r) == "supported"]
    if findings.most_seeds < MIN_SEEDS:
        return f"**{count(findings.most_seeds, 'seed').capitalize()} cannot answer it.**"
    if helps:
        return f"**Yes, in {listing(helps)}.**"
    return "**Not shown: in no experiment does the choice of the query help detectably.**"


def loss_text(findings):
    """A ratio says nothing about how well the fine pass predicts: the loss itself."""
    seen = [r for r in findings.results if r.measured and r.vision]
    best = min(seen, key=lambda r: r.held_out["loss_fine"]) if seen else None
    if not best or not findings.compared:
        return ""
    text = (f"The fine pass itself predicts best in {best.name}: its loss of "
            f"{number(best.held_out['loss_fine'])} is ")
    if not best.against:
        return text + "the lowest."
    return text + f"{direction(best.against.loss, ('lower', 'higher'))} than the baseline's."


def answer(findings):
    best = findings.ranked[0]
    base = findings.by_name(findings.baseline)
    parts = [lead(findings), f"On {scope(findings)}:"]
    if base.measured:
        parts.append(f"in {base.name}, {passes(base)}.")
    parts.append(f"The lowest ratio is that of {best.name}, {number(best.ratio.value)}.")
    parts += [compared_text(findings), loss_text(findings), controls_text(findings)]
    return " ".join(p for p in parts if p)


def alike(cosine):
    for limit, text in ((COLLAPSED, "the same"), (0.5, "alike"), (0.1, "a little alike"),
                        (-0.1, "unrelated"), (-0.9, "turned against each other")):
        if cosine >= limit:
            return text
    return "opposite"


def sense(findings, result):
    """One paragraph from the numbers."""
    if not result.vision:
        return (f"The floor: without seeing the frames {passes(result)}; its loss_fine is "
                f"{number(result.held_out['loss_fine'])}.")
    parts = [f"On the held-out clips {passes(result)}."]
    c = result.against
    if c:
        parts.append(f"Against {findings.baseline} the ratio is "
                     f"{'lower' if c.ratio.value < 0 else 'higher'} by "
                     f"{number(abs(c.ratio.value))}"
                     + (f" (95 % interval {span(c.ratio, show=signed)})"
                        if np.isfinite(c.ratio.half) else "")
                     + f", lower in {int((c.differences < 0).sum())} of {len(c.seeds)} "
                     f"seed{'s' * (len(c.seeds) > 1)} and in {100 * c.clips_better:.0f} % of the "
                     f"clips: {result.tags[0]}. Its fine loss is "
                     f"{direction(c.loss, ('lower', 'higher'))}.")
    parts.append(f"Features of the two passes are {alike(result.cosine.value)} (cosine "
                 f"{number(result.cosine.value, 2)}"
                 + (f", {signed(c.cosine.value, 2)} from the baseline's" if c else "") + ").")
    own = result.controls.get("other")
    if own is not None:
        parts.append(f"With its own queries instead of another clip's it predicts {direction(own)}"
                     + ("." if own.excludes(0) else ": no sign that the choice matters."))
    why = unstable(findings.study, result.name, result.seeds)
    if why:
        parts.append(f"Unstable: {why}.")
    return " ".join(parts)
