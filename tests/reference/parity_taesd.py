"""Compares `fovea latents` with the published TAESD network on real weights and frames.

    python3 tests/reference/parity_taesd.py taesd_encoder.safetensors VIDEOS... [--frames N]

Needs PyTorch, diffusers, safetensors and h5py, and the program built. For 224, 256 and 200 pixels:
prepares clips, lets `fovea latents` encode them, and encodes the same frames with diffusers'
AutoencoderTiny in double and in single precision. Fails when |latents - double| / |double| (2-norms)
is above 1e-4. The largest error of one latent is given relative to the root mean square of all.
Frames per second are those of the whole command and of PyTorch's network alone, with two threads
each.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file

LIMIT, THREADS = 1e-4, 2
FOVEA = Path(__file__).resolve().parents[2] / "fovea"


def published(path: str) -> torch.nn.Module:
    """The network as published, with the weights' names turned into its own: all must fit."""
    encoder = AutoencoderTiny(latent_channels=4).encoder
    names = {f"layers.{name}": value.float() for name, value in load_file(path).items()}
    encoder.load_state_dict(names, strict=True)
    return encoder.eval()


def encode(encoder: torch.nn.Module, frames: np.ndarray) -> tuple[np.ndarray, float]:
    """Latents of uint8 [n, size, size, 3], one frame at a time, and seconds. The network takes
    [-1, 1] and makes [0, 1] of it itself."""
    weight = next(encoder.parameters())
    out, start = [], time.perf_counter()
    for frame in frames:
        x = torch.from_numpy(frame).to(weight.dtype).permute(2, 0, 1)[None] / 127.5 - 1
        out.append(encoder(x.contiguous(memory_format=torch.channels_last)).numpy())
    return np.concatenate(out), time.perf_counter() - start


def compare(size: int, options: argparse.Namespace, folder: Path) -> float:
    clips = folder / f"clips{size}.h5"
    subprocess.run([FOVEA, "prepare", *options.videos, "-o", clips, "--size", str(size), "--frames", "1",
                    "--max-clips-per-video", "1"], check=True, capture_output=True)
    done = subprocess.run([FOVEA, "latents", clips, "--vae", options.vae, "--threads", str(THREADS)],
                          check=True, capture_output=True, text=True)
    rate = float(re.search(r"([\d.e+]+) a second", done.stdout)[1])
    with h5py.File(clips) as f:
        shape = f["frames"].shape
        every = max(1, shape[0] * shape[1] // options.frames)
        frames = f["frames"][:].reshape(-1, *shape[2:])[::every]
        got = f["latents"][:].reshape(-1, 4, size // 8, size // 8)[::every]
    encoder = published(options.vae)
    single, seconds = encode(encoder.to(memory_format=torch.channels_last), frames)
    want, _ = encode(encoder.double(), frames)
    rms = np.sqrt(np.mean(want**2))
    errors = [np.sqrt(np.mean((x - want) ** 2)) / rms for x in (got, single)]
    largest = [np.abs(x - want).max() / rms for x in (got, single)]
    print(f"| {size} | {len(frames)} | {errors[0]:.1e}, {largest[0]:.1e} | "
          f"{errors[1]:.1e}, {largest[1]:.1e} | {rate:.3g} | {len(frames) / seconds:.3g} |", flush=True)
    return float(errors[0])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("vae")
    parser.add_argument("videos", nargs="+")
    parser.add_argument("--frames", type=int, default=16, help="frames compared per size")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.set_num_threads(THREADS)
    print("| pixels | frames | fovea: error, largest | PyTorch in single | fovea, frames/s | PyTorch |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        worst = max(compare(size, options, Path(folder)) for size in (224, 256, 200))
    print(f"largest relative error {worst:.1e}, allowed {LIMIT:.0e}")
    return int(not worst <= LIMIT)


if __name__ == "__main__":
    sys.exit(main())
