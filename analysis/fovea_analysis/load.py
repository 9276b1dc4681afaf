"""results.h5 as xarray data. Its layout is described in docs/results.md.

The program replaces the file as a whole, so it can be read at any moment of a run; each call reads
one version of it.
"""
import contextlib
import pathlib

import h5py
import numpy as np
import xarray

FORMAT, VERSION = "fovea-results", 1
MISSING = {"f": np.nan, "i": -1, "u": 0, "O": "", "U": ""}

# Attributes of a run that say how it went; the others, but for the seed, are its configuration.
RECORD = ("status", "why", "steps_done", "parameters", "trained", "hard_attn_k_effective",
          "latents_used", "data_sha256", "device", "ranks", "seconds", "restarts",
          "checkpoint_write_seconds", "checkpoint_bytes")
UNITS = {"seconds": "s", "checkpoint_write_seconds": "s", "checkpoint_bytes": "byte"}


class Unreadable(Exception):
    """One line for the user."""


def find(path):
    """The file meant by a study's folder or by the file itself."""
    path = pathlib.Path(path)
    return path / "results.h5" if path.is_dir() else path


@contextlib.contextmanager
def opened(path):
    """The open file, its format checked; whatever cannot be read becomes Unreadable."""
    path = find(path)
    if not path.exists():
        raise Unreadable(f"{path}: no such file; ./fovea writes it soon after its start")
    try:
        with h5py.File(path, "r") as file:
            kind, version = file.attrs.get("format"), file.attrs.get("format_version")
            if kind not in (FORMAT, FORMAT.encode()):
                raise Unreadable(f"{path}: is no results.h5 of fovea")
            if version != VERSION:
                raise Unreadable(f"{path}: has format version {version}; this program reads "
                                 f"version {VERSION}")
            yield file
    except (OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise Unreadable(f"{path}: cannot be read: {error}".replace("\n", " ")) from error


def array(dataset):
    text = h5py.check_string_dtype(dataset.dtype)
    return dataset.asstr()[()].astype(object) if text else dataset[()]


def described(dataset):
    return {key: dataset.attrs[key] for key in ("long_name", "units") if key in dataset.attrs}


def runs_of(file):
    """(experiment, seed, group) of every run, experiments in the study's order."""
    for experiment in array(file["summary/experiment"]):
        for seed in file["summary/seed"][()]:
            group = file.get(f"runs/{experiment}/seed_{seed}")
            if group is not None:
                yield str(experiment), int(seed), group


def placed(found, coords, dims, like):
    """One array over `coords` from found {(experiment, seed): array}, NaN or -1 where none is.
    `like` is {(experiment, seed): {dim: labels}}."""
    first = next(iter(found.values()))
    kind = np.asarray(first).dtype.kind
    dtype = object if kind in "OSU" else np.asarray(first).dtype
    out = np.full([len(coords[d]) for d in dims], MISSING.get(kind, ""), dtype=dtype)
    place = {d: {label: i for i, label in enumerate(coords[d].tolist())} for d in dims}
    for key, values in found.items():
        at = [[place["experiment"][key[0]]], [place["seed"][key[1]]]]
        at += [[place[d][label] for label in like[key][d].tolist()] for d in dims[2:]]
        if all(at):
            out[np.ix_(*at)] = np.asarray(values)[None, None]
    return out


def gather(file, subgroup, names=None, skip=()):
    """The datasets of one subgroup of every run as {name: (dims, values, attrs)} and coordinates:
    dims of the file behind experiment and seed, labels united over the runs."""
    found, like, notes, dims, coords = {}, {}, {}, {}, {}
    for experiment, seed, run in runs_of(file):
        if subgroup not in run:
            continue
        group = run[subgroup]
        axes = {name: array(d) for name, d in group.items() if h5py.h5ds.is_scale(d.id)}
        like[experiment, seed] = axes
        for name, labels in axes.items():
            notes[name] = notes.get(name) or described(group[name])
            coords[name] = labels if name not in coords else np.union1d(coords[name], labels)
        for name, dataset in group.items():
            if name in axes or name in skip or (names and name not in names):
                continue
            if name not in dims:  # the name of a scale is slow to find
                notes[name] = described(dataset)
                dims[name] = ("experiment", "seed") + tuple(
                    d[0].name.rsplit("/", 1)[-1] for d in dataset.dims)
            found.setdefault(name, {})[experiment, seed] = dataset[()]
    if "pass" in coords:
        coords["pass"] = np.array(["coarse", "fine"], dtype=object)  # union1d sorts
    coords["experiment"] = array(file["summary/experiment"])
    coords["seed"] = file["summary/seed"][()].astype(np.int64)
    variables = {name: (dims[name], placed(runs, coords, dims[name], like), notes[name])
                 for name, runs in found.items()}
    used = {d for name in variables for d in variables[name][0]} | {"experiment", "seed"}
    return variables, {d: (d, coords[d], notes.get(d, {})) for d in used}


def record(file, names, seeds):
    """Attributes of the runs: how they went [experiment, seed], and their configuration as text
    [experiment, key]."""
    values, config = {}, {}
    for experiment, seed, run in runs_of(file):
        for key, value in run.attrs.items():
            if isinstance(value, bytes):
                value = value.decode()
            if key in RECORD:
                values.setdefault(key, {})[experiment, seed] = value
            elif key != "seed":
                config.setdefault(key, {})[experiment] = f"{value:g}" if isinstance(
                    value, (float, np.floating)) else str(value)
    coords = {"experiment": names, "seed": seeds}
    dims = ("experiment", "seed")
    like = {(e, s): {} for e in names.tolist() for s in seeds.tolist()}
    out = {}
    for key, runs in values.items():
        attrs = {"long_name": f"attribute {key} of the runs"}
        attrs["units"] = UNITS.get(key, "1")
        out[key] = (dims, placed(runs, coords, dims, like), attrs)
    keys = np.array(sorted(config), dtype=object)
    table = np.array([[config[k].get(e, "") for k in keys] for e in names], dtype=object)
    out["config"] = (("experiment", "key"), table.reshape(len(names), len(keys)),
                     {"long_name": "configuration"})
    return out, keys


def last_of(values, eval_steps, last_steps):
    """[experiment, seed, ...] at the evaluation after last_steps [experiment, seed]."""
    at = np.searchsorted(eval_steps, np.nan_to_num(last_steps)).astype(int)
    at = np.minimum(at, len(eval_steps) - 1)
    taken = np.take_along_axis(values, at[:, :, None, None, None], axis=2)[:, :, 0]
    return np.where(np.isfinite(last_steps)[:, :, None, None], taken, np.nan)


def load(path):
    """A study as one xarray.Dataset; path is results.h5 or the folder it is in.

    [experiment, seed, step]                    the training columns, e.g. loss_fine
    [experiment, seed]                          COLUMN_last200, held_out_COLUMN, held_out_ratio,
                                                held_out_ratio_chosen, held_out_step; status, why,
                                                seconds, parameters, ... (the runs' attributes)
    [experiment, seed, eval_step, clip, frame]  eval_COLUMN: every evaluation on held-out clips
    [experiment, seed, clip, frame]             last_COLUMN: each run's last evaluation
    [experiment, key]                           config, as text
    attributes                                  those of the file: study, command_line, ...

    Runs that are waiting, unfinished or shorter are padded with NaN; `status` tells them apart.
    Raises Unreadable with one line. Attention maps are large: load_attention.
    """
    with opened(path) as file:
        summary = file["summary"]
        names, seeds = array(summary["experiment"]), summary["seed"][()].astype(np.int64)
        shape = (len(names), len(seeds))
        data = {}
        for name, dataset in summary.items():
            if name in ("experiment", "seed", "step"):
                continue
            if dataset.shape[:2] != shape:
                raise Unreadable(f"{find(path)}: /summary/{name} has the shape {dataset.shape}")
            dims = ("experiment", "seed", "step")[:dataset.ndim]
            data[name] = (dims, array(dataset), described(dataset))
        more, keys = record(file, names, seeds)
        evaluations, axes = gather(file, "eval")
        attrs = {k: v.decode() if isinstance(v, bytes) else v for k, v in file.attrs.items()}
        step = summary["step"]
        coords = {"experiment": ("experiment", names, described(summary["experiment"])),
                  "seed": ("seed", seeds, described(summary["seed"])),
                  "step": ("step", step[()].astype(np.int64), described(step)), "key": keys}
        coords.update({k: v for k, v in axes.items() if k not in coords})
    data.update(more)
    for name, (dims, values, notes) in evaluations.items():
        data["eval_" + name] = dims, values, notes
        last = last_of(values, axes["eval_step"][1], data["held_out_step"][1])
        data["last_" + name] = (dims[:2] + dims[3:], last, {
            **notes, "long_name": "last evaluation: " + notes.get("long_name", name)})
    return xarray.Dataset(data, coords, {**attrs, "path": str(find(path))})


def load_attention(path, seed=None):
    """Attention maps of a study: map, cls [experiment, seed, map_step, pass, clip, frame(, y, x)]
    and pixels [clip, frame, pixel_y, pixel_x, rgb]. One seed, or all of them (memory!). None when
    no run has maps. Experiments with another grid or other clips than the first are left out."""
    with opened(path) as file:
        first, drop = None, set()
        for experiment, run_seed, run in runs_of(file):
            if "attention" not in run or (seed is not None and run_seed != seed):
                drop.add((experiment, run_seed))
                continue
            group = run["attention"]
            axes = [group[n][()].tolist() for n in ("clip", "frame", "y", "x")]
            first = first or (axes, group)
            if axes != first[0]:
                drop.add((experiment, run_seed))
        if first is None:
            return None
        variables, coords = gather(Kept(file, drop), "attention", names=("map", "cls"))
        pixels = first[1]["pixels"]
        axes = ("clip", "frame", "pixel_y", "pixel_x", "rgb")
        data = xarray.Dataset(variables, coords)
        data["pixels"] = (axes, pixels[()], described(pixels))
        for name in axes[2:]:
            scale = first[1][name]
            data.coords[name] = (name, array(scale), described(scale))
    return data if seed is None else data.sel(seed=[seed])


class Kept:
    """The file without some of its runs."""

    def __init__(self, file, drop):
        self.file, self.hidden = file, {f"runs/{e}/seed_{s}" for e, s in drop}

    def __getitem__(self, name):
        return self.file[name]

    def get(self, name):
        return None if name in self.hidden else self.file.get(name)
