"""The report of a study: report.md, report.html and figures in one folder."""
import numpy as np

from . import figures, maps, published, words
from .answer import answer, claim, one_seed, sense
from .load import load_attention
from .statistics import LEVEL, least_p
from .verdicts import ALPHA, APART, COLLAPSED, MIN_SEEDS, UNSTABLE, last_evaluation
from .words import count, listing, number, signed, span

TITLE = "{}: does the chosen query predict better?"


# --- tables ---------------------------------------------------------------------------------------

def ranking(findings):
    rows, place = [], 0
    for r in findings.ranked:
        if not r.measured:
            rows.append(["-", r.name, "-", "-", "-", "-", "; ".join(r.tags)])
            continue
        place += r.vision
        difference = "baseline" if r.name == findings.baseline else "-"
        if r.against:
            e = r.against.ratio
            difference = f"{signed(e.value)} ({span(e, show=signed)})"
        rows.append([place if r.vision else "-", r.name, f"**{number(r.ratio.value)}**",
                     span(r.ratio), f"{number(r.cosine.value, 2)}", difference,
                     "**" + r.tags[0] + "**" + "".join("; " + t for t in r.tags[1:])])
    return (["Rank", "Experiment", "Ratio", "95 % interval", "Feature Sim",
             "Difference from baseline (95 %)", "Verdict"], rows)


def behind(findings):
    """The numbers behind the verdicts."""
    rows = []
    for r in findings.ranked:
        if not r.measured:
            continue
        mean, deviation = r.last200["ratio"]
        spread = f" ± {number(deviation)}" if np.isfinite(deviation) else ""
        row = [r.name, len(r.seeds), number(mean) + spread,
               number(r.ratio_chosen.value) if r.ratio_chosen else "-"]
        c = r.against
        if c:
            lower = int((c.differences < 0).sum())
            row += [f"{lower} of {len(c.seeds)}", f"{100 * c.clips_better:.0f} %",
                    signed(c.effect, 2), number(c.p_flip, 3) if len(c.seeds) > 1 else "-",
                    number(c.ratio.p(), 3) if len(c.seeds) > 1 else "-",
                    number(c.p_holm, 3) if len(c.seeds) > 1 else "-",
                    f"{signed(100 * c.loss.value, 2)} % ({signed(100 * c.loss.low, 2)} to "
                    f"{signed(100 * c.loss.high, 2)})"]
        else:
            row += ["-"] * 7
        rows.append(row)
    return (["Experiment", "Seeds", "Training ratio, last 200 steps", "Ratio, chosen frames",
             "Seeds lower", "Clips lower", "Effect g", "p sign flips", "p Student", "p Holm",
             "loss_fine against baseline (95 %)"], rows)


def controls(findings):
    rows = []
    for r in findings.ranked:
        if not r.measured:
            continue
        change = {k: f"{signed(100 * e.value, 2)} % ({signed(100 * e.low, 2)} to "
                     f"{signed(100 * e.high, 2)})" if np.isfinite(e.half)
                  else f"{signed(100 * e.value, 2)} %" for k, e in r.controls.items()}
        rows.append([r.name] + [number(r.held_out[k]) for k in (
            "loss_fine", "loss_coarse", "loss_fine_other", "loss_copy")]
            + [change.get("other", "-"), change.get("copy", "-"), change.get("floor", "-"),
               claim(r)])
    return (["Experiment", "fine", "coarse", "fine, other clip's queries", "copy",
             "own against other queries", "fine against copy", "fine against no vision",
             "\"the chosen query helps\""], rows)


def add_ranking(page, findings, pictures):
    page.heading("Ranking")
    page.table(*ranking(findings))
    page.text("Ratio = loss_fine / loss_coarse on the held-out clips at the end of training, mean "
              "over seeds; below 1 the fine pass predicts better. Feature Sim: cosine of coarse "
              "and fine features there. Intervals: bootstrap over "
              + ("seeds and clips." if findings.most_seeds > 1 else "clips of one seed's models."))
    steps = sorted({r.step for r in findings.results if r.measured})
    if len(steps) > 1:
        page.text("**The experiments were trained for different numbers of steps** ("
                  f"{listing(map(str, steps))}): differences are of the budget too.")
    page.text(one_seed(findings))
    page.picture(pictures["intervals"])
    page.heading("The numbers behind the verdicts", 3)
    page.table(*behind(findings))
    compared = findings.compared
    if compared and findings.most_seeds > 1:
        fewest = min(len(r.against.seeds) for r in compared)
        page.text(f"Holm's correction is over {count(len(compared), 'comparison')} and takes the p "
                  f"of {compared[0].against.test}: with {count(fewest, 'seed')} sign flips reach "
                  f"{least_p(fewest):.3g} at best."
                  " Effect g: mean difference over its standard deviation over seeds (Hedges). "
                  "Chosen frames: frame 3 and later, the first whose prediction depends on a "
                  "chosen query.")
    page.items([
        f"better, worse: the {100 * LEVEL:.0f} % interval of the ratio's difference leaves out 0 "
        f"and p after Holm's correction is at most {ALPHA}; no detectable effect: otherwise",
        f"not enough data: fewer than {MIN_SEEDS} seeds finished in both experiments",
        f"collapsed features: cosine of {COLLAPSED} or more",
        f"differentiated but not more predictive: cosine at least {APART} below the baseline's, "
        "ratio worse or without detectable effect",
        f"unstable: a run failed, or its last held-out loss_fine is more than {UNSTABLE:g} times "
        "its lowest"])
    page.heading("Losses beside their controls", 3)
    page.table(*controls(findings))
    page.text("Held-out mean squared errors. \"Own against other queries\" compares the chosen "
              "frames' loss with that of the same model reading with the queries it chose for "
              "another clip: below zero the choice is worth something. \"Copy\" repeats the "
              "previous latent. "
              + (f"No vision: {findings.floor}." if findings.floor else
                 "No experiment without vision was given (`--controls`, configs/controls.yaml)."))
    page.picture(pictures["scatter"])


def add_run(page, findings):
    study = findings.study
    first = findings.results[0].name

    def key(name):
        values = sorted(set(study.config.sel(key=name).values)) if name in study.key else ["-"]
        return ", ".join(values)

    states = np.unique(study.status.values.astype(str), return_counts=True)
    page.heading("What was run")
    page.table(["", ""], [
        ["study", study.attrs.get("study", "-")],
        ["runs", ", ".join(f"{n} {s}" for s, n in zip(*states))],
        ["scale", f"{key('scale')}: frames of {key('image_size')} pixels, patches of "
                  f"{key('patch')}, {key('frames')} a clip"],
        ["data", f"{listing(study.attrs.get('data', '').splitlines())}; targets: "
                 f"{listing(sorted(set(study.latents_used.values.flat) - {''}))}"],
        ["start weights", listing(study.attrs.get("weights", "").splitlines()) or "random"],
        ["seeds", ", ".join(map(str, study.seed.values))],
        ["steps, batch, learning rate", f"{key('steps')}; {key('batch')}; {key('lr')}"],
        ["devices", listing(sorted(set(study.device.values.flat) - {""}))],
        ["revision", study.attrs.get("revision", "-")],
        ["from, to (UTC)", f"{study.attrs.get('start_time')}, "
                           f"{study.attrs.get('end_time') or 'still going on'}"],
        ["held-out clips", str(last_evaluation(study, "loss_fine", *next(
            (r.name, r.seeds) for r in findings.results if r.measured)).shape[1])],
    ])
    whys = [f"{r.name}, seed {s}: {study.why.sel(experiment=r.name, seed=s).item()}"
            for r in findings.results for s in study.seed.values
            if study.status.sel(experiment=r.name, seed=s).item() == "failed"]
    if whys:
        page.text("Failed, and left out of all means:")
        page.items(whys)
    return first


# --- one experiment -------------------------------------------------------------------------------

def changes(findings, result):
    """Keys that differ from the baseline's: (key, value)."""
    study = findings.study
    own = study.config.sel(experiment=result.name)
    base = study.config.sel(experiment=findings.baseline)
    return [(str(k), own.sel(key=k).item()) for k in study.key.values
            if own.sel(key=k).item() != base.sel(key=k).item()]


def add_experiments(page, findings, pictures, folder):
    study = findings.study
    page.heading("Experiments")
    for name in ("losses", "ratio_over_steps", "diagnostics"):
        page.picture(pictures[name])
    for r in findings.results:
        page.heading(r.name, 3)
        differs = changes(findings, r)
        if r.name != findings.baseline:
            page.text("Differs from the baseline: " + ("; ".join(
                words.meaning(k, v) for k, v in differs) or "in nothing") + ".")
        shown = [k for k in words.INTERVENTIONS if k in study.key.values]
        shown += [k for k, _ in differs if k not in shown]
        config = ", ".join(f"{k}={study.config.sel(experiment=r.name, key=k).item()}"
                           for k in shown)
        if not r.measured:
            page.code(f"Config: {config}")
            states = ", ".join(f"{n} {s}" for s, n in r.states.items())
            page.text(f"No run has finished ({states}).")
        else:
            page.code(f"Config: {config}\nResult: ratio={number(r.ratio.value)}, "
                      f"sim={number(r.cosine.value)}, loss_fine={number(r.held_out['loss_fine'])} "
                      f"(held out, step {r.step}, {count(len(r.seeds), 'seed')})")
            page.text(sense(findings, r))
        if np.isfinite(study.loss_fine.values[r.index]).any():
            page.picture(figures.experiment(findings, r, folder))


# --- the rest -------------------------------------------------------------------------------------

def add_maps(page, attention, findings, folder):
    page.heading("Where the queries look")
    first, more = maps.all_maps(attention, findings, folder)
    if not first:
        page.text("The study kept no attention maps (map_every, map_clips).")
    for picture in first:
        page.picture(picture)
    if more:
        page.text(f"More clips: {listing(f'`{p.file}`' for p in more)} beside this page.")


def setup_differences(study):
    """Where the published study was set up otherwise: (what, published, here)."""
    here = {k: ", ".join(sorted(set(study.config.sel(key=k).values)))
            for k in published.SETUP if k in study.key.values}
    here["device"] = listing(sorted(set(study.device.values.flat) - {""}))
    here["seeds"] = str(study.sizes["seed"])
    return [(k, v, here.get(k, "-")) for k, v in published.SETUP.items() if here.get(k) != v]


def against_published(findings):
    """Rows of the comparison, and a sentence about the order; None when no name is shared."""
    shared = [r for r in findings.results if r.name in published.ROWS and r.measured]
    if not shared:
        return None
    rows = []
    for name, (ratio, similarity, text) in published.ROWS.items():
        r = findings.by_name(name)
        if r is None or not r.measured:
            rows.append([name, number(ratio), "-", "-", number(similarity, 2), "-", text, "-"])
            continue
        rows.append([name, number(ratio), number(r.last200["ratio"][0]),
                     f"{number(r.ratio.value)} ({span(r.ratio)})", number(similarity, 2),
                     number(r.last200["feature_sim"][0], 2), text, "; ".join(r.tags)])
    head = ["Experiment", "published ratio", "training ratio here", "held-out ratio here (95 %)",
            "published sim", "training sim here", "published verdict", "verdict here"]
    sentence = ""
    if len(shared) > 2:
        from scipy import stats
        order = stats.spearmanr([published.ROWS[r.name][0] for r in shared],
                                [r.ratio.value for r in shared])[0]
        if np.isfinite(order):
            sentence = (f"Rank correlation of published and held-out ratios over "
                        f"{len(shared)} experiments: {signed(order, 2)}. ")
    inside = [r.name for r in shared if r.ratio.low <= published.ROWS[r.name][0] <= r.ratio.high]
    sentence += ("The published ratio lies inside the interval here for "
                 f"{listing(inside) or 'none'}.")
    return head, rows, sentence


def add_published(page, findings):
    found = against_published(findings)
    if not found:
        return
    page.heading("Against the published table")
    page.table(*found[:2])
    page.text(found[2] + " The published numbers are of one seed each, on training batches, "
              "without controls; which loss its ratio divides by which is not known for certain.")
    differs = setup_differences(findings.study)
    if differs:
        page.text("Set up otherwise:")
        page.table(["", "published", "here"], differs)


def add_cost(page, findings):
    study = findings.study
    rows = []
    for r in findings.results:
        if not r.measured:
            continue
        runs = np.isin(study.seed.values, r.seeds)

        def value(name):
            return study[name].values[r.index][runs]

        rows.append([r.name, f"{int(value('parameters').max()):,}",
                     f"{int(value('trained').max()):,}",
                     words.duration(float(value("seconds").mean())),
                     f"{1 / r.last200['step_seconds'][0]:.1f}",
                     f"{value('checkpoint_bytes').max() / 1e6:.1f} MB",
                     f"{int(value('ranks').max())}", f"{int(value('restarts').sum())}"])
    total = float(np.nansum(study.seconds.values))
    page.heading("Training cost")
    page.table(["Experiment", "parameters", "trained", "time of a run", "steps/s", "checkpoint",
                "ranks", "restarts"], rows)
    page.text(f"{words.duration(total)} of training in all runs together, on "
              f"{listing(sorted(set(study.device.values.flat) - {''}))}.")


def add_reproduction(page, findings):
    attrs, name = findings.study.attrs, findings.ranked[0].name
    page.heading("How to reproduce it")
    page.code(attrs.get("command_line", "").strip())
    page.items([f"source revision {attrs.get('revision', '-')}",
                "data SHA-256: " + (listing(attrs.get("data_sha256", "").split()) or "-"),
                "weights SHA-256: " + (listing(attrs.get("weights_sha256", "").split()) or
                                       "none: random start"),
                "libraries: " + "; ".join(attrs.get("libraries", "").splitlines()),
                "every key of the study: attribute `study_text` of results.h5"])
    page.text("Ratio, training ratio, losses and similarity are means over the finished seeds of "
              "`/summary/held_out_ratio`, `ratio_last200`, `held_out_loss_fine` and its like, "
              "`held_out_cosine`; intervals come from `/runs/NAME/seed_N/eval`. By hand:")
    page.code("import xarray\n"
              f"study = xarray.open_dataset({attrs['path']!r}, group='summary')\n"
              f"print(study.held_out_ratio.sel(experiment={name!r}).mean('seed'))  # "
              f"{number(findings.ranked[0].ratio.value)} where all seeds have finished")


def progress(study):
    """A sentence about what is not done; "" when all is."""
    status = study.status.values
    done = int((status == "finished").sum())
    left = {s: int((status == s).sum()) for s in ("running", "waiting", "stopped", "failed")}
    text = ", ".join(f"{n} {s}" for s, n in left.items() if n)
    if not text:
        return ""
    going = not study.attrs.get("end_time") and left["running"] + left["waiting"]
    return (f"{'The study is still going on' if going else 'Not everything has finished'}: "
            f"{done} of {status.size} runs have finished ({text}). Numbers are of the finished "
            "runs; curves show what there is.")


def write(findings, folder, with_published=True):
    """Writes the report; returns the path of report.html."""
    from .document import Document

    folder.mkdir(parents=True, exist_ok=True)
    study = findings.study
    page = Document(TITLE.format(study.attrs.get("study", "study")))
    if progress(study):
        page.note(progress(study))
    page.text(answer(findings))
    pictures = figures.all_curves(findings, folder)
    add_ranking(page, findings, pictures)
    add_run(page, findings)
    add_experiments(page, findings, pictures, folder)
    seeds = [r.seeds[0] for r in findings.ranked if r.measured]
    attention = load_attention(study.attrs["path"], seed=max(set(seeds), key=seeds.count))
    add_maps(page, attention, findings, folder)
    if with_published:
        add_published(page, findings)
    add_cost(page, findings)
    add_reproduction(page, findings)
    (folder / "report.md").write_text(page.markdown(), encoding="utf-8")
    (folder / "report.html").write_text(page.html(folder), encoding="utf-8")
    return folder / "report.html"
