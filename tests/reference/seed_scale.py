"""Three training steps of the whole model at the study's full size, by fovea and by the reference.

    python3 tests/reference/seed_scale.py --dinov2 FOLDER --llama FOLDER --data clips.h5

Encoder and language model start from Hugging Face folders, everything else from values drawn here;
the clips, with latents, come from a file of `fovea prepare` and `fovea latents`. Prints losses and
gradient norm of every step as a Markdown table; exit status 1 where they differ by more than 1e-4
of their value and more than twice `rounding`. The column `rounding` is what a start perturbed by 2^-24 changes in PyTorch: AdamW's
first steps move every parameter by the learning rate along its gradient's sign, however small the
gradient, so rounding grows from step to step. Three runs, one after the other, of about 6 GB each.
"""

import argparse
import math
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

import model
from model import Params

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 1e-4
ROUNDING = 2.0**-24
STEPS = 3
SEED = 0
STUDY = {"lr": 3e-5, "weight_decay": 0.01}
MEASURES = ("loss_fine", "loss_coarse", "grad_norm")
EXPERIMENT = "A_baseline"
SIZES = model.SEED_SCALE

# ---------------------------------------------------------------------------------------------
# Order of clips: src/base/rng.c and fv_order_step in Python
# ---------------------------------------------------------------------------------------------

WORD = 2**64 - 1


def mix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & WORD
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & WORD
    return x ^ (x >> 31)


def number(key: int, index: int) -> int:
    return mix(mix(key) ^ mix((index * 0xD1342543DE82EF95 + 1) & WORD))


def stream(seed: int, name: str) -> int:
    key = mix(seed)
    for byte in name.encode():
        key = mix(key ^ byte)
    return key


def permutation(key: int, count: int) -> list[int]:
    order = list(range(count))
    for i in range(count, 1, -1):
        j = (number(key, i) * i) >> 64
        order[i - 1], order[j] = order[j], order[i - 1]
    return order


def clips_of_step(step: int, count: int) -> list[int]:
    epoch, within = divmod(step, count // SIZES.clips)
    order = permutation(number(stream(SEED, "order"), epoch), count)
    return order[within * SIZES.clips :][: SIZES.clips]


# ---------------------------------------------------------------------------------------------
# Start values and clips
# ---------------------------------------------------------------------------------------------


def rest_of_model() -> Params:
    """What neither checkpoint sets, as fovea draws it: queries of deviation 1, tokens of 0.14,
    layers uniform within 1/sqrt(inputs), latents 0."""
    generator = torch.Generator().manual_seed(SEED)
    shapes = model.shapes(replace(SIZES, dino_layers=0, lm_layers=0, lm_vocab=1))
    found = {}
    for name, shape in shapes.items():
        if name.startswith(("dino.", "lm.")):
            continue
        if name == "latent_init":
            found[name] = torch.zeros(shape)
        elif len(shape) == 1 and not name.endswith("bias"):
            deviation = 1.0 if name.startswith("q_") else model.TOKEN_STD
            found[name] = deviation * torch.randn(shape, generator=generator)
        else:
            inputs = math.prod(shapes[name.replace(".bias", ".weight")][1:])
            found[name] = (2 * torch.rand(shape, generator=generator) - 1) / inputs**0.5
    return found


def resized(table: Tensor, grid: int) -> Tensor:
    """A position table [1, n*n + 1, D] for grid x grid patches, as transformers resizes it."""
    side = round((table.shape[1] - 1) ** 0.5)
    patches = table[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    made = F.interpolate(patches, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], made.flatten(2).transpose(1, 2)], dim=1)


def start_values(dinov2: Path, llama: Path, rest: Params) -> Params:
    p = {name: weight.clone() for name, weight in rest.items()}
    for prefix, folder in (("dino.", dinov2), ("lm.", llama)):
        weights = load_file(folder / "model.safetensors")
        p.update({prefix + name: weight.float() for name, weight in weights.items()})
    table = "dino.embeddings.position_embeddings"
    p[table] = resized(p[table], SIZES.size // SIZES.patch)
    for unused in ("dino.embeddings.mask_token", "lm.lm_head.weight"):
        p.pop(unused, None)
    shapes = {name: tuple(weight.shape) for name, weight in p.items()}
    if shapes != model.shapes(SIZES):
        raise SystemExit(f"{dinov2}, {llama}: not the parameters of `scale: seed`")
    return p


def read_clips(path: Path, step: int) -> tuple[Tensor, Tensor]:
    with h5py.File(path) as file:
        training = np.flatnonzero(file["split"][:] == 0)
        rows = [int(training[i]) for i in clips_of_step(step, len(training))]
        frames = np.stack([file["frames"][row] for row in rows])
        latents = np.stack([file["latents"][row] for row in rows]).astype(np.float32)
    return torch.tensor(frames), torch.tensor(latents)


# ---------------------------------------------------------------------------------------------
# The two runs
# ---------------------------------------------------------------------------------------------


def run_fovea(options: argparse.Namespace, rest: Params) -> dict[str, list[float]]:
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        rest_file, out = Path(folder) / "rest.safetensors", Path(folder) / "out"
        save_file(rest, rest_file)
        keys = {
            "scale": "seed", "steps": STEPS, "seeds": SEED, "data": options.data, "latents": "file",
            "dino_from": options.dinov2, "lm_from": options.llama, "init_from": rest_file,
        }  # fmt: skip
        study = ROOT / "configs/ablations.yaml"
        command = [options.fovea, study, "--only", EXPERIMENT, "--out", out]
        command += [f"{key}={value}" for key, value in keys.items()]
        subprocess.run([str(part) for part in command], check=True, stdout=sys.stderr)
        with h5py.File(out / "results.h5") as file:
            run = file[f"runs/{EXPERIMENT}/seed_{SEED}"]
            return {name: run[name][:].tolist() for name in MEASURES}


def run_reference(options: argparse.Namespace, rest: Params, jitter: float = 0) -> dict:
    """`jitter`: every trained parameter starts multiplied by 1 + jitter * normal(0, 1)."""
    switches = model.Switches()
    p = start_values(options.dinov2, options.llama, rest)
    trained = [p[n] for n in p if model.is_trained(n, SIZES.frames, switches)]
    noise = torch.Generator().manual_seed(1)
    for parameter in trained:
        if jitter:
            parameter.mul_(1 + jitter * torch.randn(parameter.shape, generator=noise))
        parameter.requires_grad_()
    optimizer = torch.optim.AdamW(trained, **STUDY, foreach=False)
    series: dict[str, list[float]] = {name: [] for name in MEASURES}
    for step in range(STEPS):
        frames, latents = read_clips(options.data, step)
        found = model.same_length(p, SIZES, switches, frames, latents)
        measures = model.step_measures(found, switches)
        optimizer.zero_grad()
        measures["loss_total"].backward()
        measures["grad_norm"] = model.clip_gradients(trained)
        optimizer.step()
        for name in MEASURES:
            series[name].append(measures[name].item())
        print(f"reference: step {step + 1} of {STEPS}", file=sys.stderr)
    return series


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--dinov2", type=Path, required=True, help="folder of DINOv2 ViT-S/14")
    parser.add_argument("--llama", type=Path, required=True, help="folder of SmolLM2-135M")
    parser.add_argument("--data", type=Path, required=True, help="8 frames, 224 px, latents")
    parser.add_argument("--fovea", type=Path, default=ROOT / "fovea", help="the program")
    parser.add_argument("--scratch", help="folder for fovea's results; about 5 GB for a while")
    options = parser.parse_args()

    rest = rest_of_model()
    ours, theirs = run_fovea(options, rest), run_reference(options, rest)
    moved = run_reference(options, rest, ROUNDING)
    failed = False
    print("| measure | step | fovea | PyTorch | difference | rounding |\n|---|---|---|---|---|---|")
    for name in MEASURES:
        rows = zip(ours[name], theirs[name], moved[name], strict=True)
        for step, (a, b, c) in enumerate(rows, 1):
            difference, rounding = abs(a - b) / b, abs(c - b) / b
            failed = failed or not difference <= max(LIMIT, 2 * rounding)
            print(f"| {name} | {step} | {a:.8g} | {b:.8g} | {difference:.1e} | {rounding:.1e} |")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
