"""Writes tests/golden: what the PyTorch reference computes for a tiny model, case by case.

    python3 tests/reference/make_golden.py

README.md beside this file says what the files hold.
"""

import argparse
import json
import struct
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import model
from model import Params, Sizes, Switches

STEPS = 20
SEED = 32
LARGE = {"lr": 1e-2, "weight_decay": 0.5}  # every parameter moves far: finds wrong terms
STUDY = {"lr": 3e-5, "weight_decay": 0.01}
# A run from weights perturbed by rounding must end at the same place to this, relative to each
# parameter's change; the comparison at 1e-8 means something only then.
CHAOS_LIMIT = 1e-9
# No clip of a step may be nearer to the kink of the entropy hinge than this many nats, or rounding
# to single precision could switch its gradient.
KINK_LIMIT = 1e-3

SIZES = Sizes(
    clips=3,
    frames=3,
    size=16,
    patch=5,
    dino_width=6,
    dino_heads=2,
    dino_layers=3,
    dino_mlp=7,
    lm_width=16,
    lm_layers=2,
    lm_heads=4,
    lm_kv_heads=2,
    lm_mlp=5,
    lm_vocab=11,
    lm_rope_theta=100.0,
    lm_rms_eps=1e-5,
    query_width=5,
    head_width=2,
    film_width=9,
    max_text=4,
)

# Drawn larger, so that attention is far from uniform and the chosen queries differ by clip.
LARGE_WEIGHTS = (
    "attention.key.weight",
    "k_proj.weight",
    "query_out.weight",
    "lm_to_query.weight",
)

# Top-4 of 10 keys stands for the study's top-32 of 257.
STUDIED = {
    "A_baseline": Switches(),
    "B_temp_0.1": Switches(temperature=0.1),
    "C_contrastive": Switches(contrastive=0.1),
    "D_freeze_dino": Switches(freeze_dino=True),
    "E_hard_attn": Switches(hard_attn_k=4),
    "F_entropy_reg": Switches(entropy_margin=0.5),
    "G_combined_best": Switches(temperature=0.1, contrastive=0.1, freeze_dino=True, hard_attn_k=4),
}


@dataclass
class Case:
    name: str
    switches: Switches
    clipped: bool  # whether gradients are clipped, at every step or at none
    frames: int = SIZES.frames


def all_cases() -> list[Case]:
    cases = [
        Case(f"{name}_{mode}_{'clipped' if clipped else 'unclipped'}", chosen, clipped)
        for name, switches in STUDIED.items()
        for mode in ("deep", "shallow")
        for chosen in [replace(switches, query_mode=mode)]
        for clipped in (True, False)
    ]
    captions_shallow = Switches(text="captions", query_mode="shallow", lambda_coarse=0.5)
    return cases + [
        Case("captions", Switches(text="captions"), True),
        Case("captions_shallow_lambda", captions_shallow, False),
        Case("freeze_lm", Switches(freeze_lm=True), True),
        Case("vision_off", Switches(vision=False), False),
        Case("one_frame", Switches(contrastive=0.1), True, frames=1),
    ]


# ---------------------------------------------------------------------------------------------
# Inputs
# ---------------------------------------------------------------------------------------------


def start_values(sizes: Sizes, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Random float32 parameters of healthy size: nothing is 0, no gain is 1, attention is far
    from uniform, and the two passes differ."""

    def value(name: str, shape: tuple[int, ...]) -> np.ndarray:
        noise = rng.standard_normal(shape)
        if "lambda1" in name:
            return 0.7 + 0.1 * noise
        if "norm" in name:
            gain = 0.7 if name.startswith("lm.") else 1.0
            return (gain if name.endswith("weight") else 0.0) + 0.2 * noise
        if name in ("q_static", "q_init"):
            return noise
        if name.startswith("mode_") or name in ("no_text", "lm.model.embed_tokens.weight"):
            return 0.14 * noise
        if name == "latent_init" or name.endswith("bias"):
            return 0.2 * noise
        if "patch_embeddings" in name:
            return 0.2 * noise
        if name.startswith("dino.embeddings"):
            return 0.5 * noise
        gain = 2.0 if name.endswith(LARGE_WEIGHTS) else 1.0
        return gain * noise / np.sqrt(np.prod(shape[1:]))

    return {name: value(name, s).astype(np.float32) for name, s in model.shapes(sizes).items()}


def batches(sizes: Sizes, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Frames, latents and captions of every step. Token ids beyond a clip's count are random: a
    reader must ignore them."""
    clip = (STEPS, sizes.clips)
    side = sizes.size // 8
    picture = (sizes.frames, sizes.size, sizes.size, 3)
    counts = rng.integers(0, sizes.max_text + 1, clip)
    counts[0] = [sizes.max_text, 0, 2]
    return {
        "batch.frames": rng.normal(128, 40, clip + picture).clip(0, 255).astype(np.uint8),
        "batch.latents": rng.standard_normal(clip + (sizes.frames, 4, side, side)).astype("f4"),
        "batch.tokens": rng.integers(0, sizes.lm_vocab, clip + (sizes.max_text,)).astype("i4"),
        "batch.token_count": counts.astype("i4"),
    }


# ---------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------


class Job:
    """One case on the common inputs, in any precision."""

    def __init__(self, case: Case, start: dict, data: dict, latent_scale: float):
        self.case, self.switches = case, case.switches
        self.sizes = replace(SIZES, frames=case.frames)
        self.start, self.data, self.latent_scale = start, data, latent_scale
        self.trained = [n for n in start if model.is_trained(n, case.frames, case.switches)]

    def parameters(self, dtype: torch.dtype) -> Params:
        found = {name: torch.tensor(v, dtype=dtype) for name, v in self.start.items()}
        for name in self.trained:
            found[name].requires_grad_()
        return found

    def forward(self, p: Params, step: int, chosen: Tensor | None = None) -> dict[str, Tensor]:
        batch = {name: torch.from_numpy(v[step]) for name, v in self.data.items()}
        frames = batch["batch.frames"][:, : self.case.frames]
        latents = batch["batch.latents"][:, : self.case.frames] * self.latent_scale
        return model.clip_by_clip(
            p,
            self.sizes,
            self.switches,
            frames,
            latents.to(p["q_init"].dtype),
            batch["batch.tokens"],
            batch["batch.token_count"],
            chosen,
        )

    def train(self, dtype: torch.dtype, lr: float, weight_decay: float, jitter: float = 0) -> dict:
        """Trains for all batches. Returns `series` [steps] by name, the first step's unclipped
        `grad` and the total `change` by parameter, and `hinge` [steps, clips], what goes into the
        entropy hinge; all as float64 arrays."""
        p = self.parameters(dtype)
        noise = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name in self.trained if jitter else []:
                p[name] *= 1 + jitter * torch.randn(p[name].shape, generator=noise, dtype=dtype)
        begin = {name: p[name].detach().clone() for name in self.trained}
        trained = [p[name] for name in self.trained]
        optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay, foreach=False)
        series: dict[str, list[float]] = {}
        hinge = []
        for step in range(STEPS):
            found = self.forward(p, step)
            measures = model.step_measures(found, self.switches)
            hinge.append(model.hinge_inputs(found, self.switches).detach().double().numpy())
            optimizer.zero_grad()
            measures["loss_total"].backward()
            if step == 0:
                self.check_trained(p)
                grad = {name: p[name].grad.double().numpy().copy() for name in self.trained}
            measures["grad_norm"] = model.clip_gradients(trained)
            optimizer.step()
            for name, v in measures.items():
                series.setdefault(name, []).append(v.item())
        change = {n: (p[n].detach().double() - begin[n].double()).numpy() for n in self.trained}
        return {
            "series": {name: np.array(v) for name, v in series.items()},
            "grad": grad,
            "change": change,
            "hinge": np.array(hinge),
        }

    def check_trained(self, p: Params) -> None:
        """Autograd must agree about which parameters the loss depends on."""
        for name in self.trained:
            if p[name].grad is None:
                raise AssertionError(f"{self.case.name}: {name} is trained but has no gradient")

    def evaluate(self) -> dict[str, np.ndarray]:
        """Per clip and frame measures [clips, T] and maps [clips, T, N+1] at the start."""
        p = self.parameters(torch.float64)
        with torch.no_grad():
            own = self.forward(p, 0)
            other = own
            if "chosen" in own:
                other = self.forward(p, 0, chosen=own["chosen"].roll(1, dims=0))
        names = ("loss_fine", "loss_coarse", "cosine", "entropy_fine", "entropy_coarse")
        found = {"eval." + name: own[name].numpy() for name in names}
        found["eval.loss_fine_other"] = other["loss_fine"].numpy()
        latents = self.data["batch.latents"][0, :, : self.case.frames].astype(np.float64)
        latents *= self.latent_scale
        previous = np.concatenate([np.zeros_like(latents[:, :1]), latents[:, :-1]], axis=1)
        found["eval.loss_copy"] = np.square(previous - latents).mean((2, 3, 4))
        for side in ("coarse", "fine"):
            if "map_" + side in own:
                found["map." + side] = own["map_" + side].numpy()
        return found


def find_latent_scale(case: Case, start: dict, data: dict) -> tuple[float, dict]:
    """The power of two nearest 1 at which all steps of the study run are clipped, or none is;
    with it that run."""
    for power in range(13):
        scale = 2.0 ** (power if case.clipped else -power)
        run = Job(case, start, data, scale).train(torch.float64, **STUDY)
        norm = run["series"]["grad_norm"]
        if (norm > 1.02).all() if case.clipped else (norm < 0.98).all():
            return scale, run
    raise AssertionError(f"{case.name}: no latent scale gives the wanted gradient norms: {norm}")


def check_hinge(case: Case, large: dict, study: dict) -> None:
    """The entropy hinge must be met on both sides of its kink, and never at it."""
    if case.switches.entropy_margin > 0:
        inputs = np.concatenate([large["hinge"], study["hinge"]])
        if not (np.abs(inputs) > KINK_LIMIT).all() or not 0.1 < (inputs > 0).mean() < 0.9:
            raise AssertionError(f"{case.name}: bad entropy hinge; choose another SEED")


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.square(x).mean()))


def worst_change(job: Job, run: dict, settings: dict) -> tuple[float, str]:
    """The largest relative difference of a parameter's change after starting from weights
    perturbed by rounding. Key biases are left out: their gradient is exactly zero, what trains
    them is rounding."""
    other = job.train(torch.float64, **settings, jitter=1e-15)["change"]
    return max(
        (rms(other[n] - run["change"][n]) / rms(run["change"][n]), n)
        for n in job.trained
        if not n.endswith("key.bias")
    )


def golden(case: Case, start: dict, data: dict) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Metadata and tensors of one case's file."""
    scale, study = find_latent_scale(case, start, data)
    job = Job(case, start, data, scale)
    large = job.train(torch.float64, **LARGE)
    check_hinge(case, large, study)
    single = job.train(torch.float32, **STUDY)
    worst = max(worst_change(job, large, LARGE), worst_change(job, study, STUDY))
    print(
        f"{case.name}: latent scale {scale:g}, grad_norm {study['series']['grad_norm'].min():.3g}"
        f" to {study['series']['grad_norm'].max():.3g}, rounding moves {worst[0]:.1e} {worst[1]}"
    )
    if not worst[0] < CHAOS_LIMIT:
        raise AssertionError(f"{case.name} is chaotic; choose another SEED")

    tensors: dict[str, np.ndarray] = {}
    for name, values in large["series"].items():
        tensors["series64." + name] = values
        tensors["seriesS." + name] = study["series"][name]
        error = single["series"][name] - study["series"][name]
        tensors["round_seriesS." + name] = np.array([rms(error)])
    for name in job.trained:
        tensors["grad." + name] = study["grad"][name]
        tensors["change." + name] = large["change"][name]
        tensors["changeS." + name] = study["change"][name].astype(np.float32)
        for kind in ("grad", "change"):
            error = rms(single[kind][name] - study[kind][name])
            tensors[f"round_{kind.replace('change', 'changeS')}.{name}"] = np.array([error])
    tensors.update(job.evaluate())
    metadata = case.switches.describe()
    metadata.update(latent_scale=repr(scale), frames=str(case.frames), steps=str(STEPS))
    for suffix, settings in (("64", LARGE), ("S", STUDY)):
        metadata.update({f"{name}{suffix}": repr(v) for name, v in settings.items()})
    return metadata, tensors


# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------

SAFETENSORS_TYPES = {"float64": "F64", "float32": "F32", "uint8": "U8", "int32": "I32"}


def write_safetensors(path: Path, metadata: dict[str, str], tensors: dict[str, np.ndarray]) -> None:
    """Eight bytes of header length, the JSON header, the tensors one after the other."""
    header: dict = {"__metadata__": metadata}
    offset = 0
    # Wide types first keeps every tensor aligned.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    for name, values in ordered:
        header[name] = {
            "dtype": SAFETENSORS_TYPES[str(values.dtype)],
            "shape": list(values.shape),
            "data_offsets": [offset, offset + values.nbytes],
        }
        offset += values.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, values in ordered:
            file.write(np.ascontiguousarray(values).tobytes())


def main() -> int:
    folder = Path(__file__).resolve().parent.parent / "golden"
    parser = argparse.ArgumentParser(description="Writes the golden files of the C tests.")
    parser.add_argument("--out", type=Path, default=folder, help="folder to write to")
    parser.add_argument("--only", help="names of cases, with commas between; default: all")
    parser.add_argument("--seed", type=int, default=SEED)
    args = parser.parse_args()

    torch.set_num_threads(1)  # the sizes are tiny, and sums keep one order
    rng = np.random.default_rng(args.seed)
    start, data = start_values(SIZES, rng), batches(SIZES, rng)
    cases = all_cases()
    if args.only:
        wanted = args.only.split(",")
        cases = [case for case in cases if case.name in wanted]
    args.out.mkdir(parents=True, exist_ok=True)
    sizes = {name: str(v) for name, v in asdict(SIZES).items()}
    write_safetensors(args.out / "common.safetensors", {**sizes, "steps": str(STEPS)}, start | data)
    for case in cases:
        write_safetensors(args.out / f"{case.name}.safetensors", *golden(case, start, data))
    return 0


if __name__ == "__main__":
    sys.exit(main())
