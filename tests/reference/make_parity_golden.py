"""Writes tests/golden/parity_*.safetensors: hidden states of tiny random models as the
`transformers` package computes them, in double precision, stored in single.

    python3 tests/reference/make_parity_golden.py

README.md beside this file says what the files hold.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from transformers import Dinov2Model

import parity
from parity import Checkpoint

LIMIT = 400_000  # bytes of a file
PATCH, TABLE = 7, 5
SIZES = (35, 49, 52)  # pixels: the table's own grid, a larger one, pixels beyond the last patch
GRIDS = (3, 4, 7, 10)  # sides that the position table is resized to
META_OFFSET = 0.1
# width, heads, key and value heads, layers, MLP, rows
LLAMAS = {"a": (32, 4, 2, 3, 48, 21), "b": (36, 9, 3, 2, 64, 40), "c": (20, 2, 2, 4, 24, 7)}


def original_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's weights as the original .pth files name them."""
    parts = {
        "norm1": "norm1",
        "attention.output.dense": "attn.proj",
        "layer_scale1.lambda1": "ls1.gamma",
        "norm2": "norm2",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
        "layer_scale2.lambda1": "ls2.gamma",
    }
    found = {
        "cls_token": weights["embeddings.cls_token"],
        "mask_token": weights["embeddings.mask_token"],
        "pos_embed": weights["embeddings.position_embeddings"],
    }
    for end in ("weight", "bias"):
        projection = weights[f"embeddings.patch_embeddings.projection.{end}"]
        found[f"patch_embed.proj.{end}"] = projection
        found[f"norm.{end}"] = weights[f"layernorm.{end}"]
    layers = 1 + max(int(n.split(".")[2]) for n in weights if n.startswith("encoder.layer."))
    for i in range(layers):
        old, new = f"encoder.layer.{i}.", f"blocks.{i}."
        for end in ("weight", "bias"):
            attention = f"{old}attention.attention."
            three = [weights[f"{attention}{part}.{end}"] for part in ("query", "key", "value")]
            found[f"{new}attn.qkv.{end}"] = torch.cat(three)
        for theirs, name in parts.items():
            for end in ("", ".weight", ".bias"):
                if old + theirs + end in weights:
                    found[new + name + end] = weights[old + theirs + end]
    return found


def resized_hf(network: Dinov2Model, grid: int) -> Tensor:
    """The table [1, grid*grid + 1, D] as transformers makes it for an image of that grid."""
    table = network.embeddings
    patches = torch.empty(1, grid * grid + 1, table.position_embeddings.shape[-1])
    return table.interpolate_pos_encoding(patches, grid * PATCH, grid * PATCH).detach().contiguous()


def resized_meta(table: Tensor, grid: int) -> Tensor:
    """The same as the original implementation makes it: by a scale factor that is a little large,
    so that rounding cannot lose a row."""
    patches = table[:, 1:].reshape(1, TABLE, TABLE, -1).permute(0, 3, 1, 2)
    factor = (grid + META_OFFSET) / TABLE
    made = F.interpolate(patches, scale_factor=(factor, factor), mode="bicubic", antialias=False)
    assert made.shape[-2:] == (grid, grid), made.shape
    return torch.cat([table[:, :1], made.flatten(2).transpose(1, 2)], dim=1)


class Writer:
    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, name: str, tensors: dict[str, Tensor], config: dict | None = None) -> None:
        path = self.folder / f"parity_{name}.safetensors"
        metadata = {"config": json.dumps(config, sort_keys=True)} if config else None
        save_file({n: t.contiguous() for n, t in tensors.items()}, path, metadata=metadata)
        size = path.stat().st_size
        print(f"{path.name}: {size} bytes")
        assert size < LIMIT, "too large for the repository"


def config_text(made: Checkpoint, published: bool) -> dict:
    """config.json as transformers writes it now, or with the rotary base at the top level, as in
    the published SmolLM2."""
    with tempfile.TemporaryDirectory() as folder:
        made.config.save_pretrained(folder)
        config = json.loads((Path(folder) / "config.json").read_text())
    if published:
        config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    return config


def write_dinov2(writer: Writer) -> None:
    made = parity.random_dinov2(24, 3, 3, 96, PATCH, TABLE, seed=1)
    config = config_text(made, False)
    for size in SIZES:
        pixels = parity.random_pixels(2, size, seed=size)
        states = parity.states_of("dinov2", made, pixels, torch.float64)
        writer.write(f"dinov2_{size}", made.weights | {"pixels": pixels} | states, config)
    original = original_names(made.weights)
    writer.write("dinov2_original", original | {"pixels": pixels} | states, config)

    with tempfile.TemporaryDirectory() as folder:
        made.save(Path(folder))
        network = parity.load("dinov2", Path(folder), torch.float32)
    table = made.weights["embeddings.position_embeddings"]
    positions = {"embeddings.position_embeddings": table}
    for grid in GRIDS:
        positions[f"position.hf.{grid}"] = resized_hf(network, grid)
        positions[f"position.meta.{grid}"] = resized_meta(table, grid)
    writer.write("dinov2_positions", positions, config)


def write_llama(writer: Writer) -> None:
    for name, (width, heads, kv_heads, layers, mlp, rows) in LLAMAS.items():
        made = parity.random_llama(width, heads, kv_heads, layers, mlp, 16, seed=2)
        x = parity.random_embeddings(rows, width, seed=3)
        states = parity.states_of("llama", made, x, torch.float64)
        tensors = {n: t[None] for n, t in (states | {"inputs_embeds": x}).items()}
        writer.write(f"llama_{name}", made.weights | tensors, config_text(made, name == "a"))


def main() -> int:
    folder = Path(__file__).resolve().parent.parent / "golden"
    parser = argparse.ArgumentParser(description="Writes the golden files of parity.")
    parser.add_argument("--out", type=Path, default=folder, help="folder to write to")
    writer = Writer(parser.parse_args().out)
    torch.set_num_threads(1)  # the sizes are tiny, and sums keep one order
    write_dinov2(writer)
    write_llama(writer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
