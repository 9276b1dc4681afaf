#!/usr/bin/env python3
"""Ranking table and loss curves of one study.

    python3 analysis/ranking.py OUT/results.h5        (or just OUT)

Prints the table and draws OUT/losses.png; works while the study is running. Needs h5py, NumPy and
matplotlib. The variables are described in docs/results.md.
"""
import argparse
import pathlib
import signal
import sys
import warnings

try:
    import h5py
    import numpy as np
except ImportError as missing:
    sys.exit(f"ranking: {missing.name} is missing; install python3-h5py (Debian, Ubuntu)")

WINDOW = 50  # steps of the rolling mean in the figure; a tenth of the run where that is less

CURVES = ("loss_fine", "loss_coarse", "ratio")
NUMBERS = ("ratio_last200", "feature_sim_last200", "held_out_loss_fine", "held_out_loss_coarse",
           "held_out_loss_fine_other", "held_out_loss_copy", "held_out_ratio",
           "held_out_ratio_chosen")
HEADINGS = ("fine", "coarse", "other", "copy", "ratio", "chosen")  # of NUMBERS from the third on

# Okabe and Ito's colours, told apart with any colour vision; yellow is too pale on white.
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7")
STYLES = ("-", "--", ":", "-.")


class Unreadable(Exception):
    """One line for the user."""


def read_study(path):
    """/summary as arrays: numbers [experiment, seed], curves [experiment, seed, step]."""
    if not path.exists():
        raise Unreadable(f"{path}: no such file; it is written by ./fovea soon after its start")
    try:
        with h5py.File(path, "r") as file:
            kind = file.attrs.get("format", "")
            if kind not in ("fovea-results", b"fovea-results") or "summary" not in file:
                raise Unreadable(f"{path}: is no results.h5 of fovea")
            group = file["summary"]
            study = {name: group[name][()] for name in CURVES + NUMBERS}
            for name in ("experiment", "status"):
                study[name] = group[name].asstr()[()]
            study["seed"] = group["seed"][()]
    except (OSError, KeyError, TypeError) as error:
        raise Unreadable(f"{path}: cannot be read: {error}".replace("\n", " ")) from error
    shape = study["experiment"].shape + study["seed"].shape
    for name in NUMBERS + ("status",) + CURVES:
        if study[name].shape[:2] != shape or study[name].ndim != 2 + (name in CURVES):
            raise Unreadable(f"{path}: /summary/{name} has the shape {study[name].shape}")
    return study


def mean(values, axis=None):
    """Mean of what is not NaN; NaN, without a warning, where nothing is left."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.nanmean(values, axis=axis)


def rank(study):
    """One row an experiment, lowest ratio first, those without one last. Failed runs are counted
    but not averaged: they stopped at different steps for reasons of their own."""
    rows = []
    steps_done = np.isfinite(study["loss_fine"]).sum(axis=2)
    for e, name in enumerate(study["experiment"]):
        usable = (study["status"][e] != "failed") & np.isfinite(study["ratio_last200"][e])
        values = [mean(study[key][e, usable]) if usable.any() else np.nan for key in NUMBERS]
        ratios = study["ratio_last200"][e, usable]
        states, counts = np.unique(study["status"][e], return_counts=True)
        rows.append({
            "index": e,
            "name": str(name),
            "seeds": int(usable.sum()),
            "steps": int(steps_done[e, usable].min()) if usable.any() else 0,
            "values": values,
            "spread": float(ratios.std(ddof=1)) if len(ratios) > 1 else np.nan,
            "state": ", ".join(f"{n} {s}" if len(study["seed"]) > 1 else s
                               for s, n in zip(states, counts)),
        })
    return sorted(rows, key=lambda row: (np.isnan(row["values"][0]), row["values"][0]))


def number(value, width=8, digits=4):
    return f"{value:{width}.{digits}f}" if np.isfinite(value) else f"{'-':>{width}}"


def print_table(study, rows):
    width = max([len(row["name"]) for row in rows] + [10])
    repeated = len(study["seed"]) > 1
    spread = f" {'+-':>8}" if repeated else ""
    print(f"{'':4} {'':{width}} {'last 200 training steps':>{20 + len(spread)}} | held-out clips")
    print(f"rank {'experiment':{width}} {'ratio':>8}{spread} {'feature sim':>11} | "
          + " ".join(f"{text:>8}" for text in HEADINGS) + " | seeds  steps  state")
    for place, row in enumerate(rows, 1):
        ratio, similarity, *held_out = row["values"]
        shown = f"{place:4}" if np.isfinite(ratio) else f"{'-':>4}"
        print(f"{shown} {row['name']:{width}} {number(ratio)}"
              + (f" {number(row['spread'])}" if repeated else "")
              + f" {number(similarity, 11)} | " + " ".join(number(v) for v in held_out)
              + f" | {row['seeds']:5} {row['steps']:6}  {row['state']}")
    print("\nratio = loss_fine / loss_coarse: below 1 the fine pass predicts better. chosen: the "
          "same over\nframes that read a chosen query. other: fine pass with the queries chosen "
          "for another clip.\ncopy: the previous latent as the prediction.")
    for line in cautions(study, rows):
        print(line)


def cautions(study, rows):
    """What the table cannot show."""
    used = [row["seeds"] for row in rows if row["seeds"]]
    if used and min(used) == 1:
        one = "One seed" if max(used) == 1 else "Some experiments have one seed, which"
        yield (f"{one} shows no uncertainty: differences may be chance. More seeds: "
               "seeds=0,1,2,3,4 on the command line.")
    if used and max(used) > 1:
        yield "+-: standard deviation over seeds of the ratio, not an interval of its mean."
    if len({row["steps"] for row in rows if row["seeds"]}) > 1:
        yield "The experiments have trained for different numbers of steps: compare with care."
    if (study["status"] == "failed").any():
        yield "Failed runs are left out of the means; /runs/NAME/seed_N has the reason."


def rolling_mean(values, window):
    """Centred; NaN where the window is not full, so that every point has the same noise."""
    finite = np.isfinite(values)
    count = np.convolve(finite, np.ones(window), "same")
    total = np.convolve(np.where(finite, values, 0), np.ones(window), "same")
    return np.where(np.rint(count) == window, total / window, np.nan)


def draw_curve(axes, curves, colour, style, label, alpha, window):
    """curves [seed, step]: every seed faint, the mean over seeds smoothed."""
    for values in curves:
        axes.plot(np.arange(1, len(values) + 1), values, color=colour, alpha=alpha, linewidth=0.5,
                  zorder=1)
    smooth = rolling_mean(mean(curves, axis=0), window)
    axes.plot(np.arange(1, len(smooth) + 1), smooth, color=colour, linestyle=style, linewidth=1.6,
              label=label, zorder=3)
    return smooth


def limits(smoothed, logarithmic):
    """Range of the smoothed curves with a margin: single steps may leave it."""
    values = np.concatenate(smoothed)
    values = values[np.isfinite(values)]
    if not len(values):
        return 0.9, 1.1
    low, high = values.min(), values.max()
    if logarithmic:
        return low / 1.15, high * 1.15
    low, high = min(low, 1.0), max(high, 1.0)
    margin = 0.08 * (high - low) or 0.01
    return low - margin, high + margin


def draw(study, rows, path):
    """Losses of both passes and their ratio. False when nothing is measured yet."""
    rows = [row for row in rows if np.isfinite(study["loss_fine"][row["index"]]).any()]
    if not rows:
        return False
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    figure = pyplot.figure(figsize=(11, 8), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(1, 1))
    fine = figure.add_subplot(grid[0, 0])
    coarse = figure.add_subplot(grid[0, 1], sharex=fine, sharey=fine)
    ratio = figure.add_subplot(grid[1, :])
    panels = {"loss_fine": fine, "loss_coarse": coarse, "ratio": ratio}
    smoothed = {key: [] for key in panels}
    longest = max(np.isfinite(study["loss_fine"][row["index"]]).sum(axis=1).max() for row in rows)
    window = int(min(WINDOW, max(1, longest // 10)))
    alpha = 0.5 / (len(rows) * study["seed"].size + 4)  # however many there are, they stay behind
    for row in rows:
        # Colour by place in the file, so that it stays when the ranking changes.
        e = row["index"]
        colour, style = COLOURS[e % len(COLOURS)], STYLES[e // len(COLOURS) % len(STYLES)]
        for key, axes in panels.items():
            smoothed[key].append(draw_curve(axes, study[key][e], colour, style, row["name"],
                                            alpha, window))
    copy = mean(study["held_out_loss_copy"])
    for key, title in (("loss_fine", "fine pass"), ("loss_coarse", "coarse pass")):
        axes = panels[key]
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_title(f"training loss, {title}", loc="left")
        axes.set_xlabel("step")
    fine.set_ylabel("mean squared error")
    shown = smoothed["loss_fine"] + smoothed["loss_coarse"]
    if np.isfinite(copy) and copy > 0:
        shown = shown + [np.array([copy])]
        for axes in (fine, coarse):
            axes.axhline(copy, color="0.45", linewidth=1, linestyle=(0, (1, 2)))
    fine.set_ylim(limits(shown, logarithmic=True))
    ratio.axhline(1, color="0.45", linewidth=1)
    ratio.set_ylim(limits(smoothed["ratio"], logarithmic=False))
    ratio.yaxis.get_major_formatter().set_useOffset(False)
    ratio.set_title("ratio = fine / coarse; below 1 the fine pass predicts better", loc="left")
    ratio.set_xlabel("step")
    ratio.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False,
                 title="lowest ratio first", alignment="left")
    for axes in panels.values():
        axes.grid(color="0.92")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.01)
    seeds = study["seed"].size
    over_seeds = f" and {seeds} seeds" if seeds > 1 else ""
    figure.suptitle(f"thick: mean over {window} steps{over_seeds}; thin: single steps; "
                    "dotted: copying the previous latent, held-out clips",
                    x=0.01, ha="left", fontsize=9, color="0.35")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=pathlib.Path, help="results.h5 or the folder it is in")
    parser.add_argument("--figure", type=pathlib.Path, help="default: losses.png beside results.h5")
    options = parser.parse_args()
    path = options.results / "results.h5" if options.results.is_dir() else options.results
    figure = options.figure or path.with_name("losses.png")
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` is no error
    try:
        study = read_study(path)
    except Unreadable as error:
        sys.exit(f"ranking: {error}")
    rows = rank(study)
    wrong = None
    try:
        drawn = draw(study, rows, figure)
    except ImportError as missing:
        wrong = f"no figure: {missing.name} is missing; install python3-matplotlib"
    except OSError as error:
        wrong = f"{figure}: cannot be written: {error.strerror or error}"
    print_table(study, rows)
    if wrong:
        sys.exit(f"ranking: {wrong}")
    print(f"figure: {figure}" if drawn else "nothing to draw yet")


if __name__ == "__main__":
    main()
