"""TAESD's encoder in plain PyTorch, and weights that need no file.

    python3 tests/reference/taesd.py

writes tests/golden/taesd.safetensors: small frames and their latents, computed in double.
"""

from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import Tensor
from torch.nn.functional import conv2d, relu

WIDTH, LATENTS = 64, 4
BLOCKS, HALVES = (1, 3, 4, 5, 7, 8, 9, 11, 12, 13), (2, 6, 10)
SHAPES = ((2, 24), (1, 40))  # frames, pixels per side; 24: 3 x 3 positions in the last layers


def names() -> list[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor, in the order in which values are drawn."""
    found: list[tuple[str, tuple[int, ...]]] = []

    def conv(stem: str, into: int, out: int, bias: bool = True) -> None:
        found.append((f"{stem}.weight", (out, into, 3, 3)))
        if bias:
            found.append((f"{stem}.bias", (out,)))

    conv("0", 3, WIDTH)
    for layer in range(1, 14):
        if layer in HALVES:
            conv(str(layer), WIDTH, WIDTH, bias=False)
        else:
            for i in (0, 2, 4):
                conv(f"{layer}.conv.{i}", WIDTH, WIDTH)
    conv("14", WIDTH, LATENTS)
    return found


def numbers(stream: int, count: int) -> np.ndarray:
    """Bits 8 .. 31 of a hash of (stream, index): 32-bit integers, the same in every language."""
    h = np.arange(count, dtype=np.uint32) * np.uint32(2654435761) + np.uint32(stream * 40503 + 1)
    h ^= h >> np.uint32(15)
    h *= np.uint32(2246822519)
    h ^= h >> np.uint32(13)
    h *= np.uint32(3266489917)
    h ^= h >> np.uint32(16)
    return h >> np.uint32(8)


def weights() -> dict[str, np.ndarray]:
    """Uniform in +-1/2 (first convolution), +-3/32 (the others), +-1/8 (biases): every layer then
    adds about as much as it was given. Multiples of 2^-28 below 1: exact in single precision."""
    drawn = {}
    for stream, (name, shape) in enumerate(names()):
        bound = 1 / 8 if len(shape) == 1 else 1 / 2 if shape[1] == 3 else 3 / 32
        unit = (numbers(stream, int(np.prod(shape))).astype(np.float64) - 2**23) / 2**23
        drawn[name] = (unit * bound).reshape(shape)
    return drawn


def encode(weight: dict[str, Tensor], frames: Tensor) -> Tensor:
    """frames uint8 [n, size, size, 3] -> latents [n, 4, size / 8, size / 8]"""
    kind = next(iter(weight.values())).dtype

    def conv(x: Tensor, stem: str, stride: int = 1) -> Tensor:
        return conv2d(x, weight[f"{stem}.weight"], weight.get(f"{stem}.bias"), stride, padding=1)

    x = conv(frames.to(kind).permute(0, 3, 1, 2) / 255, "0")
    for layer in range(1, 14):
        if layer in HALVES:
            x = conv(x, str(layer), stride=2)
        else:
            a = relu(conv(x, f"{layer}.conv.0"))
            a = relu(conv(a, f"{layer}.conv.2"))
            x = relu(x + conv(a, f"{layer}.conv.4"))
    return conv(x, "14")


def main() -> None:
    weight = {name: torch.from_numpy(value) for name, value in weights().items()}
    golden = {}
    for stream, (frames, size) in enumerate(SHAPES, start=1000):
        values = numbers(stream, frames * size * size * 3) >> np.uint32(16)
        pixels = values.astype(np.uint8).reshape(frames, size, size, 3)
        golden[f"pixels_{size}"] = pixels
        golden[f"latents_{size}"] = encode(weight, torch.from_numpy(pixels)).numpy()
        print(f"{size}: latents up to {np.abs(golden[f'latents_{size}']).max():.3g}")
    path = Path(__file__).resolve().parent.parent / "golden/taesd.safetensors"
    save_file({name: np.ascontiguousarray(value) for name, value in golden.items()}, path)
    print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
