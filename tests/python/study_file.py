"""Writes small results.h5 files with known effects, in the layout of docs/results.md."""
import h5py
import numpy as np

COLUMNS = ("loss_fine", "loss_coarse", "loss_total", "ratio", "feature_sim", "entropy_fine",
           "entropy_coarse", "grad_norm", "lr", "step_seconds")
EVALS = ("loss_fine", "loss_coarse", "cosine", "entropy_fine", "entropy_coarse", "loss_copy",
         "loss_fine_other")
TEXT = h5py.string_dtype()


def add(group, name, values, dims=(), units="1"):
    """A dataset on the dimension scales of its own group."""
    values = np.asarray(values)
    text = values.dtype.kind in "OU"
    data = group.create_dataset(name, data=values.astype(object) if text else values,
                                dtype=TEXT if text else None)
    data.attrs["long_name"] = name
    if not text:
        data.attrs["units"] = units
    for i, dim in enumerate(dims):
        data.dims[i].attach_scale(group[dim])


def scales(group, **axes):
    for name, values in axes.items():
        add(group, name, values)
        group[name].make_scale(name)


def write(path, experiments, seeds=(0,), clips=8, frames=4, steps=20, effect=None, cosine=None,
          status=None, noise=0.001, choice=0.0, copy=2.0, config=None, maps=True, rise=0.0, start=0,
          version=1):
    """effect, cosine, choice, rise: {experiment: value}: held-out ratio minus 1, cosine, what other
    queries add to loss_fine, and what the last evaluation adds to the losses. status: {(experiment,
    seed): text}; "waiting" has no steps. Clips are shared by all runs, so that pairing matters."""
    effect, cosine, status, rise = effect or {}, cosine or {}, status or {}, rise or {}
    if not isinstance(choice, dict):
        choice = {name: choice for name in experiments}
    clip_level = np.exp(0.3 * np.random.default_rng(7).normal(size=(clips, 1)))
    with h5py.File(path, "w") as file:
        file.attrs.update({"format": "fovea-results", "format_version": version, "study": "made",
                           "study_text": "", "command_line": "./fovea made", "revision": "abc",
                           "hosts": "", "libraries": "", "start_time": "2026-01-01T00:00:00Z",
                           "end_time": "", "data": "procedural", "data_sha256": "d",
                           "weights": "", "weights_sha256": ""})
        shape = (len(experiments), len(seeds))
        summary = {name: np.full(shape + (steps,), np.nan) for name in COLUMNS}
        means = {name + "_last200": np.full(shape, np.nan) for name in COLUMNS}
        held = {"held_out_" + name: np.full(shape, np.nan)
                for name in EVALS + ("ratio", "ratio_chosen", "step")}
        for e, name in enumerate(experiments):
            for s, seed in enumerate(seeds):
                rng = np.random.default_rng([start, seed, e])
                state = status.get((name, seed), "finished")
                done = {"finished": steps, "waiting": 0}.get(state, steps // 2)
                run = file.create_group(f"runs/{name}/seed_{seed}")
                run.attrs.update({
                    "seed": seed, "status": state, "steps_done": done, "parameters": 100,
                    "why": "step 10: loss_fine is nan" if state == "failed" else "",
                    "trained": 90, "latents_used": "blocks", "data_sha256": "d", "device": "cpu",
                    "ranks": 1, "seconds": 1.5, "restarts": 0, "hard_attn_k_effective": 0,
                    "checkpoint_write_seconds": 0.1, "checkpoint_bytes": 1000, "steps": steps,
                    "lr": 3e-4, "temperature": 1.0, "vision": 0 if name == "vision_off" else 1,
                    "scale": "small", **(config or {}).get(name, {})})
                scales(run, step=np.arange(1, done + 1))
                ratio = 1 + effect.get(name, 0.0) + noise * rng.normal()
                for column in COLUMNS:
                    values = 1 + 0.01 * rng.normal(size=done)
                    if column == "ratio":
                        values = ratio + 0.001 * rng.normal(size=done)
                    add(run, column, values, ["step"], "s" if column == "step_seconds" else "1")
                    summary[column][e, s, :done] = values
                    if done:
                        means[column + "_last200"][e, s] = values[-200:].mean()
                if state == "waiting":
                    continue
                at = np.unique([0, done])
                group = run.create_group("eval")
                scales(group, eval_step=at, clip=np.arange(clips), frame=np.arange(1, frames + 1))
                size = (len(at), clips, frames)
                coarse = clip_level * np.exp(0.02 * rng.normal(size=size))
                coarse[-1] *= 1 + rise.get(name, 0.0)
                fine = coarse * (ratio + noise * rng.normal(size=size))
                values = dict(zip(EVALS, (
                    fine, coarse, cosine.get(name, 0.5) + 1e-3 * rng.normal(size=size),
                    np.ones(size), np.ones(size), copy * clip_level * np.ones(size),
                    fine * (1 + choice.get(name, 0.0) + noise * rng.normal(size=size)))))
                for column in EVALS:
                    add(group, column, values[column], ["eval_step", "clip", "frame"])
                    held["held_out_" + column][e, s] = values[column][-1].mean()
                held["held_out_ratio"][e, s] = fine[-1].mean() / coarse[-1].mean()
                if frames > 2:
                    held["held_out_ratio_chosen"][e, s] = (fine[-1][:, 2:].mean()
                                                           / coarse[-1][:, 2:].mean())
                held["held_out_step"][e, s] = done
                if maps and name != "vision_off":
                    add_maps(run, at, rng)
        group = file.create_group("summary")
        scales(group, experiment=np.array(experiments, dtype=object),
               seed=np.array(seeds, dtype="u8"), step=np.arange(1, steps + 1))
        states = [[status.get((e, s), "finished") for s in seeds] for e in experiments]
        add(group, "status", np.array(states, dtype=object), ["experiment", "seed"])
        for name, values in {**means, **held}.items():
            add(group, name, values, ["experiment", "seed"])
        for name, values in summary.items():
            add(group, name, values, ["experiment", "seed", "step"])


def add_maps(run, steps, rng, grid=3, frames=4):
    group = run.create_group("attention")
    scales(group, map_step=steps, clip=[0, 4], frame=np.arange(1, frames + 1),
           y=np.arange(grid) * 8 + 3.5, x=np.arange(grid) * 8 + 3.5, pixel_y=np.arange(8 * grid),
           pixel_x=np.arange(8 * grid), rgb=np.array(["red", "green", "blue"], dtype=object))
    add(group, "pass", np.array(["coarse", "fine"], dtype=object))
    group["pass"].make_scale("pass")
    share = rng.dirichlet(np.ones(grid * grid + 1), size=(len(steps), 2, 2, frames))
    dims = ["map_step", "pass", "clip", "frame"]
    add(group, "cls", share[..., 0].astype("f4"), dims)
    add(group, "map", share[..., 1:].reshape(share.shape[:-1] + (grid, grid)).astype("f4"),
        dims + ["y", "x"])
    pixels = rng.integers(0, 256, size=(2, frames, 8 * grid, 8 * grid, 3), dtype=np.uint8)
    add(group, "pixels", pixels, ["clip", "frame", "pixel_y", "pixel_x", "rgb"])
