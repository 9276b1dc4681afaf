"""The commands fovea-report, fovea-compare, fovea-export and fovea-attend."""
import argparse
import importlib
import pathlib
import signal
import sys

from .load import Unreadable, load


def guarded(name, work):
    """Runs a command; whatever the user can mend is one line and status 1."""
    def run(arguments=None):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` is no error
        try:
            work(arguments)
        except Unreadable as error:
            sys.exit(f"{name}: {error}")
        except OSError as error:
            sys.exit(f"{name}: {error.filename or ''}: {error.strerror or error}")
    return run


def parser(text, **more):
    return argparse.ArgumentParser(description=text, **more)


def report_work(arguments):
    options = parser("Writes a report of one study: report.md, report.html and figures.",
                     prog="fovea-report")
    options.add_argument("results", type=pathlib.Path, help="results.h5 or the folder it is in")
    options.add_argument("-o", "--out", type=pathlib.Path,
                         help="folder of the report; default: report beside results.h5")
    options.add_argument("--baseline", metavar="NAME",
                         help="default: A_baseline, else the first experiment")
    options.add_argument("--controls", type=pathlib.Path, metavar="OUT",
                         help="results of configs/controls.yaml: the floor without vision")
    options.add_argument("--against", choices=("seed", "none"), default="seed",
                         help="the published table beside the study's; default: seed")
    o = options.parse_args(arguments)
    from . import report as pages
    from .verdicts import judge
    study = load(o.results)
    findings = judge(study, o.baseline, load(o.controls) if o.controls else None)
    folder = o.out or pathlib.Path(study.attrs["path"]).with_name("report")
    path = pages.write(findings, folder, o.against == "seed")
    print(pages.answer(findings).replace("**", ""))
    if pages.progress(study):
        print(pages.progress(study))
    print(path)


def compare_work(arguments):
    options = parser("Compares two studies, or one with the published table.",
                     prog="fovea-compare")
    options.add_argument("results", type=pathlib.Path, nargs="+",
                         help="one or two results.h5, or the folders they are in")
    options.add_argument("--against", choices=("seed",), help="the published table")
    options.add_argument("--baseline", metavar="NAME")
    options.add_argument("-o", "--out", type=pathlib.Path, help="write here, not to the terminal")
    o = options.parse_args(arguments)
    if len(o.results) != (1 if o.against else 2):
        options.error("one study with --against seed, else two")
    from . import compare as pages
    from .verdicts import judge
    findings = [judge(load(path), o.baseline) for path in o.results]
    text = (pages.published_page if o.against else pages.two)(*findings).markdown()
    if o.out:
        o.out.write_text(text, encoding="utf-8")
    else:
        print(text, end="")


def frames_of(study):
    """Tidy tables by name: runs, steps, evaluations."""
    flat = {"runs": ("experiment", "seed"), "steps": ("experiment", "seed", "step"),
            "evaluations": ("experiment", "seed", "eval_step", "clip", "frame")}
    for name, dims in flat.items():
        columns = [v for v in study.data_vars if study[v].dims == dims]
        if not columns:
            continue
        table = study[columns].to_dataframe(dim_order=list(dims))[columns]
        if name == "runs":
            config = study.config.to_pandas().add_prefix("config_")
            table = table.join(config, on="experiment")
        else:
            table = table.dropna(how="all")
        yield name, table.rename(columns=lambda c: c.removeprefix("eval_")).reset_index()


def export_work(arguments):
    options = parser("Writes a study as tables: runs, steps and evaluations, a row each.",
                     prog="fovea-export")
    options.add_argument("results", type=pathlib.Path, help="results.h5 or the folder it is in")
    options.add_argument("-o", "--out", type=pathlib.Path,
                         help="folder of the tables; default: tables beside results.h5")
    options.add_argument("--format", choices=("csv", "parquet"), default="csv")
    o = options.parse_args(arguments)
    if o.format == "parquet":
        try:
            importlib.import_module("pyarrow")
        except ImportError as error:
            raise Unreadable(f"Parquet needs pyarrow: {error}; pip install pyarrow, or "
                             "--format csv") from None
    study = load(o.results)
    folder = o.out or pathlib.Path(study.attrs["path"]).with_name("tables")
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in frames_of(study):
        path = folder / f"{name}.{o.format}"
        if o.format == "csv":
            table.to_csv(path, index=False)  # shortest digits that give the same number back
        else:
            table.to_parquet(path, index=False)
        print(f"{path}: {len(table)} rows, {len(table.columns)} columns")


def attend_work(arguments):
    options = parser("Draws what ./fovea attend has written, frame by frame, as a GIF.",
                     prog="fovea-attend")
    options.add_argument("maps", type=pathlib.Path, help="the file of ./fovea attend")
    options.add_argument("-o", "--out", type=pathlib.Path, help="default: FILE.gif beside it")
    o = options.parse_args(arguments)
    from .attend import draw
    print(draw(o.maps, o.out or o.maps.with_suffix(".gif")))


report = guarded("fovea-report", report_work)
compare = guarded("fovea-compare", compare_work)
export = guarded("fovea-export", export_work)
attend = guarded("fovea-attend", attend_work)
COMMANDS = {"report": report, "compare": compare, "export": export, "attend": attend}


def main():
    """python3 -m fovea_analysis COMMAND ...: without installation."""
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        sys.exit(f"usage: python3 -m fovea_analysis {'|'.join(COMMANDS)} ...")
    COMMANDS[sys.argv[1]](sys.argv[2:])
