"""Steps per second of the reference, trained with PyTorch on the CPU at the study's small scale.

    python3 tests/reference/bench_torch.py --threads 1,2

All clips go through the model together (float32, eager, fused AdamW), after a check that this
gives the losses and gradients of taking them one by one. Reading data is not timed. One line per
configuration, for example `torch A_baseline threads 2: 3.1 steps/s`.
"""

import argparse
import dataclasses
import sys
import time

import torch
from torch import Tensor

import model
from model import Params, Sizes, Switches

SMALL = Sizes(
    clips=2,
    frames=8,
    size=64,
    patch=8,
    dino_width=64,
    dino_heads=4,
    dino_layers=4,
    dino_mlp=256,
    lm_width=64,
    lm_layers=4,
    lm_heads=4,
    lm_kv_heads=2,
    lm_mlp=192,
    lm_vocab=256,
    lm_rope_theta=10000.0,
    lm_rms_eps=1e-5,
    query_width=64,
    head_width=32,
    film_width=512,
)
SEED = dataclasses.replace(
    SMALL,
    size=224,
    patch=14,
    dino_width=384,
    dino_heads=6,
    dino_layers=12,
    dino_mlp=1536,
)
EXPERIMENTS = {"A_baseline": Switches(), "D_freeze_dino": Switches(freeze_dino=True)}
WARM_UP_STEPS = 5
# Summing over clips in another order changes a double by rounding only: about 1e-16 for each of
# the some thousand terms of the longest sums.
BATCHED_LIMIT = 1e-10


def parameters(s: Switches, dtype: torch.dtype) -> Params:
    """Random weights of healthy size; only trained ones ask for a gradient."""
    generator = torch.Generator().manual_seed(1)
    found = {}
    for name, shape in model.shapes(SMALL).items():
        noise = torch.randn(shape, generator=generator)
        fan_in = noise[0].numel() if noise.dim() > 1 else 25
        mean = 1.0 if "lambda1" in name or ("norm" in name and name.endswith("weight")) else 0.0
        found[name] = (mean + noise / fan_in**0.5).to(dtype)
        found[name].requires_grad_(model.is_trained(name, SMALL.frames, s))
    return found


def batch(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    c, side = SMALL, SMALL.size // 8
    generator = torch.Generator().manual_seed(2)
    pixels = (c.clips, c.frames, c.size, c.size, 3)
    frames = torch.randint(0, 256, pixels, generator=generator, dtype=torch.uint8)
    latents = torch.randn(c.clips, c.frames, 4, side, side, generator=generator)
    return frames, latents.to(dtype)


def check_batched(s: Switches) -> None:
    """All clips together must give the loss and gradients of the clips taken one by one."""
    frames, latents = batch(torch.float64)
    no_tokens = torch.zeros(SMALL.clips, 0, dtype=torch.int32)
    no_count = torch.zeros(SMALL.clips, dtype=torch.int32)
    results = []
    for together in (True, False):
        p = parameters(s, torch.float64)
        if together:
            found = model.same_length(p, SMALL, s, frames, latents)
        else:
            found = model.clip_by_clip(p, SMALL, s, frames, latents, no_tokens, no_count)
        loss = model.step_measures(found, s)["loss_total"]
        trained = [v for v in p.values() if v.requires_grad]
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)])
        results.append(torch.cat([loss.detach()[None], gradient]))
    error = (results[0] - results[1]).norm() / results[1].norm()
    if not error <= BATCHED_LIMIT:
        raise AssertionError(f"batched and clip by clip differ by {error:.1e}")


def steps_per_second(s: Switches, seconds: float) -> float:
    p = parameters(s, torch.float32)
    frames, latents = batch(torch.float32)
    trained = [v for v in p.values() if v.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-4, weight_decay=0.01, fused=True)

    def step() -> None:
        measures = model.step_measures(model.same_length(p, SMALL, s, frames, latents), s)
        optimizer.zero_grad()
        measures["loss_total"].backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()

    for _ in range(WARM_UP_STEPS):
        step()
    steps, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        step()
        steps += 1
    return steps / (time.perf_counter() - begin)


@torch.no_grad()
def encoder_frames_per_second(seconds: float) -> float:
    """The encoder's forward pass at the seed scale, 8 frames at once."""
    found = {}
    generator = torch.Generator().manual_seed(1)
    for name, shape in model.shapes(SEED).items():
        if name.startswith("dino."):
            found[name] = 0.02 * torch.randn(shape, generator=generator)
    frames = torch.randint(0, 256, (1, 8, SEED.size, SEED.size, 3), generator=generator,
                           dtype=torch.uint8)
    model.encode(found, SEED, frames)
    count, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        model.encode(found, SEED, frames)
        count += frames.shape[1]
    return count / (time.perf_counter() - begin)


def main() -> int:
    parser = argparse.ArgumentParser(description="Times the PyTorch reference on the CPU.")
    parser.add_argument("--threads", default="1,2", help="thread counts, with commas between")
    parser.add_argument("--seconds", type=float, default=8, help="time for each configuration")
    parser.add_argument("--encoder", action="store_true", help="the encoder's forward pass alone")
    args = parser.parse_args()
    if args.encoder:
        for threads in args.threads.split(","):
            torch.set_num_threads(int(threads))
            speed = encoder_frames_per_second(args.seconds)
            print(f"torch encoder threads {threads}: {speed:.2f} frames/s", flush=True)
        return 0
    for s in EXPERIMENTS.values():
        check_batched(s)
    for threads in args.threads.split(","):
        torch.set_num_threads(int(threads))
        for name, s in EXPERIMENTS.items():
            speed = steps_per_second(s, args.seconds)
            print(f"torch {name} threads {threads}: {speed:.2f} steps/s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
