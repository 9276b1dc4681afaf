"""Two studies side by side, with the statistics of one."""
import numpy as np

from . import words
from .answer import claim
from .document import Document
from .report import against_published, setup_differences
from .statistics import holm, unpaired
from .verdicts import ALPHA, MIN_SEEDS, paired
from .words import number, signed, span

TOLD = ("study", "revision", "data", "weights", "start_time", "end_time")


def pair(a, b):
    """(estimate of the ratio in b minus that in a, how, seeds) of two results of one name."""
    both = paired(b[0].study, b[1].name, a[0].study, a[1].name)
    if both:
        return both.ratio, "paired over seeds and clips", len(both.seeds)
    return (unpaired(b[1].ratio, a[1].ratio), "unpaired",
            min(len(a[1].seeds), len(b[1].seeds)))


def rows_of(first, second):
    """Rows of the comparison, experiments in the first study's order."""
    found = []
    for r in first.results:
        other = second.by_name(r.name)
        if other and r.measured and other.measured:
            found.append((r, other, *pair((first, r), (second, other))))
    corrected = holm([e.p() if seeds >= MIN_SEEDS else np.nan for _, _, e, _, seeds in found])
    rows = []
    for (r, other, e, how, seeds), p in zip(found, corrected):
        if seeds < MIN_SEEDS:
            text = "not enough data"
        elif p <= ALPHA and e.excludes(0):
            text = "B better" if e.value < 0 else "B worse"
        else:
            text = "no detectable difference"
        rows.append([r.name, f"{number(r.ratio.value)} ({span(r.ratio)})",
                     f"{number(other.ratio.value)} ({span(other.ratio)})",
                     f"{signed(e.value)} ({span(e, show=signed)})", number(p, 3), text,
                     f"{number(r.held_out['loss_fine'])}, {number(other.held_out['loss_fine'])}",
                     f"{number(r.cosine.value, 2)}, {number(other.cosine.value, 2)}", how])
    return rows


def settings(first, second):
    """What the studies do not share: attributes, and keys of the experiments of both names."""
    rows = [["file", first.study.attrs["path"], second.study.attrs["path"]]]
    for key in TOLD:
        values = [str(f.study.attrs.get(key, "")) or "-" for f in (first, second)]
        if values[0] != values[1]:
            rows.append([key] + [v.replace("\n", ", ") for v in values])
    rows.append(["seeds finished"] + [
        ", ".join(map(str, sorted({s for r in f.results for s in r.seeds})))
        for f in (first, second)])
    shared = [r.name for r in first.results if second.by_name(r.name)]
    for key in sorted(set(first.study.key.values) | set(second.study.key.values)):
        texts = []
        for f in (first, second):
            there = key in f.study.key.values and shared
            texts.append(", ".join(dict.fromkeys(
                f.study.config.sel(experiment=shared, key=key).values)) if there else "-")
        if texts[0] != texts[1]:
            rows.append([key] + texts)
    return rows


def two(first, second):
    page = Document("Comparison of two studies")
    rows = rows_of(first, second)
    if not rows:
        page.text("No experiment has finished in both.")
        return page
    page.table(["Experiment", "A: ratio (95 %)", "B: ratio (95 %)", "B − A (95 %)", "p Holm",
                "verdict", "loss_fine A, B", "sim A, B", "statistics"], rows)
    page.text("Held-out ratios, below 1 the fine pass predicts better. Differences are paired "
              "where both studies have finished the same seeds on the same clips. Holm's correction is "
              f"over the {len(rows)} rows, p is Student's.")
    for label, f in (("A", first), ("B", second)):
        best = f.ranked[0]
        page.text(f"{label}: lowest ratio {best.name}, {number(best.ratio.value)}; \"the chosen "
                  f"query helps\" there: {claim(best)}.")
    for label, f, g in (("A", first, second), ("B", second, first)):
        alone = [r.name for r in f.results if not g.by_name(r.name)]
        if alone:
            page.text(f"Only in {label}: {words.listing(alone)}.")
    page.heading("Not shared")
    page.table(["", "A", "B"], settings(first, second))
    return page


def published_page(findings):
    """The published seven rows beside a study's."""
    page = Document("Against the published table")
    found = against_published(findings)
    if not found:
        page.text("The study has none of the published experiments.")
        return page
    page.table(*found[:2])
    page.text(found[2])
    page.text("Set up otherwise:")
    page.table(["", "published", "here"], setup_differences(findings.study))
    return page
