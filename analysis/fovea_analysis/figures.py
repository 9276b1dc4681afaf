"""Curves and intervals of a study as PNG files, each with a caption that says what to see.

Every experiment keeps one colour, dash and marker: told apart with any colour vision and in grey.
"""
import collections
import warnings

import matplotlib

matplotlib.use("Agg")
import numpy as np  # noqa: E402
from matplotlib import pyplot  # noqa: E402
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter  # noqa: E402

Picture = collections.namedtuple("Picture", "file caption")

# Okabe and Ito's; yellow is too pale on white.
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7")
DASHES = ("-", (0, (6, 2)), (0, (1, 1.2)), (0, (6, 2, 1, 2)), (0, (3, 1.5)),
          (0, (6, 1, 1, 1, 1, 1)), (0, (10, 3)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
WINDOW = 50       # steps of the rolling mean; a tenth of the run where that is less
RAW_SEEDS = 3     # seeds whose single steps are drawn
WIDTH, DPI = 9.0, 130
FAINT = "0.45"
pyplot.rc("font", size=9)


def style(index):
    turn = index // len(COLOURS)
    return {"color": COLOURS[index % len(COLOURS)],
            "linestyle": DASHES[(index + turn) % len(DASHES)]}


def marker(index):
    return MARKERS[(index + index // len(COLOURS)) % len(MARKERS)]


def mean(values, axis=None):
    """Mean of what is finite; NaN where nothing is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.nanmean(values, axis=axis)


def rolling_mean(values, window):
    """Centred; NaN where the window is not full."""
    finite = np.isfinite(values)
    count = np.convolve(finite, np.ones(window), "same")[:len(values)]
    total = np.convolve(np.where(finite, values, 0), np.ones(window), "same")[:len(values)]
    return np.where(np.rint(count) == window, total / window, np.nan)


def window_of(study):
    longest = int(np.isfinite(study.loss_fine.values).sum(axis=2).max())
    return int(min(WINDOW, max(1, longest // 10)))


def dress(axes, title=None, xlabel=None, ylabel=None):
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if title:
        axes.set_title(title, loc="left", fontsize=9)
    if xlabel:
        axes.set_xlabel(xlabel)
    if ylabel:
        axes.set_ylabel(ylabel)


def logarithmic(axes):
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())


def save(figure, folder, name):
    figure.savefig(folder / name, dpi=DPI, metadata={"Software": None})
    pyplot.close(figure)
    return name


def curve(axes, curves, index, window, label=None, alpha=0.12, **more):
    """curves [seed, step]: single steps faint, the mean over seeds smoothed; returns the latter."""
    steps = np.arange(1, curves.shape[1] + 1)
    looks = {**style(index), **more}
    for values in curves[:RAW_SEEDS]:
        axes.plot(steps, values, color=looks["color"], alpha=alpha, linewidth=0.5, zorder=1)
    smooth = rolling_mean(mean(curves, axis=0), window)
    axes.plot(steps, smooth, linewidth=1.5, label=label, zorder=3, **looks)
    return smooth


def frame_values(axes, values, include=None):
    """Range of the smoothed values with a margin: single steps may leave it."""
    values = np.concatenate([np.ravel(v) for v in values]) if values else np.array([])
    values = values[np.isfinite(values)]
    if include is not None and len(values):
        values = np.append(values, include)
    if not len(values):
        return
    low, high = values.min(), values.max()
    if axes.get_yscale() == "log":
        axes.set_ylim(low / 1.12, high * 1.12)
    else:
        margin = 0.08 * (high - low) or 0.01
        axes.set_ylim(low - margin, high + margin)


def started(findings):
    """(result, [seed, step] rows that have begun) in the study's order."""
    loss = findings.study.loss_fine.values
    for result in findings.results:
        rows = np.isfinite(loss[result.index]).any(axis=1)
        if rows.any():
            yield result, rows


def canvas(rows, height, sharex=False):
    """Figure of two columns of panels, and axes below them for the legend of all."""
    figure = pyplot.figure(figsize=(WIDTH, rows * height + 0.55), layout="constrained")
    grid = figure.add_gridspec(rows + 1, 2, height_ratios=[height] * rows + [0.45])
    panels = []
    for i in range(2 * rows):
        panels.append(figure.add_subplot(grid[i // 2, i % 2],
                                         sharex=panels[0] if sharex and i else None))
    below = figure.add_subplot(grid[rows, :])
    below.axis("off")
    return figure, panels, below


def legend(below, axes):
    handles, labels = axes.get_legend_handles_labels()
    below.legend(handles, labels, loc="center", ncols=min(4, max(1, len(labels))), frameon=False,
                 handlelength=3.5, borderpad=0)


def series(findings, folder, name, panels, caption):
    """panels: {column: (title, unit, log axis)}, two in a row; one curve an experiment."""
    study, window = findings.study, window_of(findings.study)
    figure, grid, below = canvas((len(panels) + 1) // 2, 2.7, sharex=True)
    experiments = list(started(findings))
    copy = mean(study.held_out_loss_copy.values)
    for axes, (column, (title, unit, log)) in zip(grid, panels.items()):
        shown = [curve(axes, study[column].values[r.index][there], r.index, window, r.name,
                       alpha=0.3 / len(experiments))
                 for r, there in experiments]
        if log:
            logarithmic(axes)
        if column.startswith("loss_") and np.isfinite(copy):
            axes.axhline(copy, color=FAINT, linewidth=1, linestyle=(0, (1, 2)))
            shown.append([copy])
        if column == "ratio":
            axes.axhline(1, color=FAINT, linewidth=1)
        frame_values(axes, shown, include=1 if column == "ratio" else None)
        dress(axes, title, "step", unit)
    if panels.keys() == {"loss_fine", "loss_coarse"}:
        low, high = zip(*(axes.get_ylim() for axes in grid))
        for axes in grid:
            axes.set_ylim(min(low), max(high))
    legend(below, grid[0])
    seeds = " and over seeds" if study.sizes["seed"] > 1 else ""
    return Picture(save(figure, folder, name),
                   f"{caption} Thick: mean over {window} steps{seeds}; thin: single steps.")


def losses(findings, folder):
    return series(findings, folder, "losses.png", {
        "loss_fine": ("training loss, fine pass", "mean squared error", True),
        "loss_coarse": ("training loss, coarse pass", None, True)},
        "Losses of both passes on the training batches, one logarithmic axis: a curve that ends "
        "lower predicts better. The dotted line is the held-out loss of repeating the previous "
        "latent; above it a model has not yet learned what copying gives.")


def diagnostics(findings, folder):
    return series(findings, folder, "diagnostics.png", {
        "feature_sim": ("feature similarity: cosine of coarse and fine features", "cosine", False),
        "grad_norm": ("norm of the gradient before clipping", "norm", True),
        "entropy_fine": ("entropy of the fine query's attention", "nat", False),
        "entropy_coarse": ("entropy of the coarse query's attention", "nat", False)},
        "Feature similarity near 1: both passes hold the same token (collapsed); near -1: opposite "
        "ones. Entropy: low is sharp attention. Gradients that jump mark unstable training.")


def ratio_over_steps(findings, folder):
    study, window = findings.study, window_of(findings.study)
    figure, (left, right), below = canvas(1, 3.1)
    shown, held = [], []
    experiments = list(started(findings))
    for r, there in experiments:
        smooth = curve(left, study.ratio.values[r.index][there], r.index, window, r.name,
                       alpha=0.12 / len(experiments))
        shown.append(smooth[len(smooth) // 2:])
        if "eval_loss_fine" not in study:
            continue
        fine, coarse = (mean(study[f"eval_loss_{k}"].values[r.index], axis=(2, 3))
                        for k in ("fine", "coarse"))
        ratio = mean(fine / coarse, axis=0)
        there = np.isfinite(ratio)
        right.plot(study.eval_step.values[there], ratio[there], marker=marker(r.index),
                   markersize=4, linewidth=1.2, **style(r.index))
        held.append(ratio[study.eval_step.values > 0])
    for axes, values, title in ((left, shown, "training batches"), (right, held, "held-out clips")):
        axes.axhline(1, color=FAINT, linewidth=1)
        axes.yaxis.get_major_formatter().set_useOffset(False)
        frame_values(axes, values, include=1)
        dress(axes, "ratio, " + title, "step", "loss_fine / loss_coarse" if axes is left else None)
    legend(below, left)
    return Picture(save(figure, folder, "ratio.png"),
                   "Ratio = loss_fine / loss_coarse over training: below the line at 1 the fine "
                   "pass predicts better; the left axis fits the second half of training. Curves that cross again and again are not told apart by "
                   "their last value.")


def intervals(findings, folder):
    """Held-out ratio and its difference from the baseline, one row an experiment."""
    study = findings.study
    rows = [r for r in findings.ranked if r.measured]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(WIDTH, 1.3 + 0.42 * len(rows)),
                                            sharey=True, layout="constrained")
    for y, r in enumerate(rows):
        looks = {"color": COLOURS[r.index % len(COLOURS)], "marker": marker(r.index)}
        each = study.held_out_ratio.values[r.index][np.isin(study.seed.values, r.seeds)]
        left.plot(each, np.full(len(each), y + 0.25), "|", color=FAINT, markersize=6)
        for axes, e in ((left, r.ratio), (right, r.against and r.against.ratio)):
            if e:
                half = [[e.half], [e.half]] if np.isfinite(e.half) else None
                axes.errorbar(e.value, y, xerr=half, markersize=6, capsize=3, linewidth=1.5,
                              **looks)
        if r.name == findings.baseline:
            right.plot(0, y, fillstyle="none", markersize=6, **looks)
    left.axvline(1, color=FAINT, linewidth=1)
    right.axvline(0, color=FAINT, linewidth=1)
    left.set_yticks(range(len(rows)), [r.name for r in rows])
    left.set_ylim(len(rows) - 0.5, -0.6)
    for axes in (left, right):
        axes.xaxis.get_major_formatter().set_useOffset(False)
        axes.locator_params(axis="x", nbins=6)
        axes.tick_params(axis="x", labelsize=8)
    dress(left, "held-out ratio; left of 1 the fine pass predicts better")
    dress(right, f"its difference from {findings.baseline}; left of 0 is better")
    what = "seeds and clips" if findings.most_seeds > 1 else "clips alone, for one seed's models"
    return Picture(save(figure, folder, "intervals.png"),
                   f"Held-out ratio and its paired difference from the baseline, with 95 % "
                   f"intervals over {what}; small strokes are single seeds. An interval that "
                   "crosses the line leaves the direction open.")


def scatter(findings, folder):
    rows = [r for r in findings.ranked if r.measured and r.vision]
    figure, axes = pyplot.subplots(figsize=(WIDTH * 0.75, 4.4), layout="constrained")
    for r in rows:
        bars = [e.half if np.isfinite(e.half) else 0 for e in (r.cosine, r.ratio)]
        axes.errorbar(r.cosine.value, r.ratio.value, xerr=bars[0], yerr=bars[1], markersize=7,
                      linewidth=1, capsize=2, marker=marker(r.index), linestyle="none",
                      color=COLOURS[r.index % len(COLOURS)], label=r.name)
    axes.axhline(1, color=FAINT, linewidth=1)
    axes.yaxis.get_major_formatter().set_useOffset(False)
    axes.set_xlim(-1.08, 1.08)
    dress(axes, "held-out ratio against feature similarity",
          "held-out cosine of coarse and fine features (1: the same, -1: opposite)",
          "held-out ratio (below 1: fine predicts better)")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return Picture(save(figure, folder, "similarity.png"),
                   "If features that differ more predicted better, the points would rise from "
                   "left to right. A point far left at or above 1 has learned to be different, "
                   "not to be more predictive.")


def experiment(findings, result, folder):
    """Small plots of one experiment: losses, ratio, similarity and entropies."""
    study, window, i = findings.study, window_of(findings.study), result.index
    there = np.isfinite(study.loss_fine.values[i]).any(axis=1)
    figure, (loss, ratio, more) = pyplot.subplots(
        1, 3, figsize=(WIDTH, 2.1), gridspec_kw={"left": 0.06, "right": 0.99, "top": 0.88,
                                                 "bottom": 0.22, "wspace": 0.22})
    shown = [curve(loss, study[c].values[i][there], 0, window, label, color=colour, linestyle=dash)
             for c, label, colour, dash in (("loss_fine", "fine", "#D55E00", "-"),
                                            ("loss_coarse", "coarse", "#0072B2", (0, (4, 2))))]
    logarithmic(loss)
    frame_values(loss, shown)
    smooth = curve(ratio, study.ratio.values[i][there], i, window, color="0.3", linestyle="-",
                   label="training")
    values = [smooth[len(smooth) // 2:]]
    if "eval_loss_fine" in study:
        held = mean(mean(study.eval_loss_fine.values[i], axis=(2, 3))
                    / mean(study.eval_loss_coarse.values[i], axis=(2, 3)), axis=0)
        ratio.plot(study.eval_step.values, held, "o", color="#009E73", markersize=4,
                   label="held out", zorder=4)
        values.append(held[len(held) // 2:])
    ratio.axhline(1, color=FAINT, linewidth=1)
    ratio.yaxis.get_major_formatter().set_useOffset(False)
    frame_values(ratio, values, include=1)
    curve(more, study.feature_sim.values[i][there], 0, window, color="#000000", linestyle="-",
          label="similarity")
    more.set_ylim(-1.08, 1.08)
    for axes, title in ((loss, "loss"), (ratio, "ratio"), (more, "feature similarity")):
        dress(axes, title, "step")
        axes.tick_params(labelsize=7.5)
    for axes in (loss, ratio):
        axes.legend(frameon=False, fontsize=8)
    return Picture(save(figure, folder, f"experiment_{result.name}.png"), "")


def all_curves(findings, folder):
    """{name: Picture} of the figures that are about all experiments."""
    return {f.__name__: f(findings, folder)
            for f in (intervals, losses, ratio_over_steps, scatter, diagnostics)}
