"""Random weights with the shapes of TAESD's encoder, as a safetensors file.

    taesd_weights.py FILE [seed=N] [prefix=TEXT] [latents=N] [without=NAME] [with=NAME] [NAME=TYPE]

prefix goes before every name (and adds a decoder's tensor, as whole autoencoders have); without
leaves a tensor out, with adds one; NAME=TYPE stores the tensor as I16, U8, ... instead of F32.
"""

import json
import struct
import sys

import numpy as np

TYPES = {"F64": "<f8", "F32": "<f4", "I64": "<i8", "I32": "<i4", "I16": "<i2", "U8": "u1"}


def shapes(latents: int) -> dict[str, tuple[int, ...]]:
    out: dict[str, tuple[int, ...]] = {"0.weight": (64, 3, 3, 3), "0.bias": (64,)}
    for layer in range(1, 14):
        if layer in (2, 6, 10):
            out[f"{layer}.weight"] = (64, 64, 3, 3)
        else:
            for i in (0, 2, 4):
                out[f"{layer}.conv.{i}.weight"] = (64, 64, 3, 3)
                out[f"{layer}.conv.{i}.bias"] = (64,)
    return out | {"14.weight": (latents, 64, 3, 3), "14.bias": (latents,)}


def main() -> None:
    path, options = sys.argv[1], dict(a.split("=", 1) for a in sys.argv[2:])
    draw = np.random.default_rng(int(options.get("seed", 0)))
    prefix = options.get("prefix", "")
    tensors = {prefix + n: s for n, s in shapes(int(options.get("latents", 4))).items()}
    if prefix:
        tensors["decoder.layers.0.weight"] = (64, 4, 3, 3)
    if "with" in options:
        tensors[options["with"]] = (64,)
    header, data = {}, b""
    for name, shape in tensors.items():
        if name == options.get("without"):
            continue
        kind = options.get(name, "F32")
        values = draw.uniform(-0.09, 0.09, shape).astype(TYPES[kind]).tobytes()
        span = [len(data), len(data) + len(values)]
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": span}
        data += values
    text = json.dumps(header).encode()
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text + data)


main()
