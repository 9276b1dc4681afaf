"""Hidden states of every layer as the `transformers` package computes them, and checkpoints of
random weights under their published names.

    python3 tests/reference/parity.py dinov2|llama FOLDER INPUT.safetensors OUTPUT.safetensors

The command does with transformers what the test program `parity` does with fovea's own model.
"""

import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model, LlamaConfig, LlamaModel, PreTrainedConfig

import make_golden
import model
from model import Params

KINDS = {"dinov2": Dinov2Model, "llama": LlamaModel}


@dataclass
class Checkpoint:
    """A config and weights under the names that published checkpoints use."""

    config: PreTrainedConfig
    weights: Params

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.config.save_pretrained(folder)
        save_file(self.weights, folder / "model.safetensors", metadata={"format": "pt"})


def random_weights(sizes: model.Sizes, prefix: str, seed: int) -> Params:
    """Those of the reference's weights whose name starts with the prefix, without it; attention is
    far from uniform, no bias or gain has its neutral value."""
    p = make_golden.start_values(sizes, np.random.default_rng(seed))
    return {n[len(prefix) :]: torch.tensor(v) for n, v in p.items() if n.startswith(prefix)}


def random_dinov2(
    width: int, heads: int, layers: int, mlp: int, patch: int, grid: int, seed: int
) -> Checkpoint:
    """`grid`: patches per side of the position table. The mask token, which nothing reads, is there
    as in the published files."""
    sizes = replace(
        make_golden.SIZES, size=grid * patch, patch=patch, dino_width=width, dino_heads=heads,
        dino_layers=layers, dino_mlp=mlp,
    )  # fmt: skip
    config = Dinov2Config(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        mlp_ratio=mlp // width,
        image_size=grid * patch,
        patch_size=patch,
        layer_norm_eps=model.NORM_EPS,
        architectures=["Dinov2Model"],
    )
    weights = random_weights(sizes, "dino.", seed)
    # The reference's gain is for small patches; this keeps the patches' part as large as positions.
    weights["embeddings.patch_embeddings.projection.weight"] *= 2.5 / (patch * 3**0.5)
    weights["embeddings.mask_token"] = torch.ones(1, width)
    return Checkpoint(config, weights)


def random_llama(
    width: int, heads: int, kv_heads: int, layers: int, mlp: int, vocabulary: int, seed: int
) -> Checkpoint:
    sizes = replace(
        make_golden.SIZES, lm_width=width, lm_heads=heads, lm_kv_heads=kv_heads, lm_layers=layers,
        lm_mlp=mlp, lm_vocab=vocabulary,
    )  # fmt: skip
    config = LlamaConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=mlp,
        vocab_size=vocabulary,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        architectures=["LlamaForCausalLM"],
    )
    return Checkpoint(config, random_weights(sizes, "lm.", seed))


def load(kind: str, folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    """A transformers model from a folder: every weight must find its place, and only a mask token,
    or the output layer, which is not part of these models, may be left over or missing."""
    found, info = KINDS[kind].from_pretrained(folder, dtype=dtype, output_loading_info=True)
    lost = [n for n in info["missing_keys"] if "mask_token" not in n]
    extra = [n for n in info["unexpected_keys"] if n != "lm_head.weight"]
    if lost or extra or info["mismatched_keys"]:
        raise AssertionError(f"{folder}: names do not match: {info}")
    return found.eval()


def normalised(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes [frames, S, S, 3] as the encoder takes them: [frames, 3, S, S]."""
    mean, std = (torch.tensor(v, dtype=dtype) for v in (model.PIXEL_MEAN, model.PIXEL_STD))
    return ((pixels.to(dtype) / 255 - mean) / std).permute(0, 3, 1, 2)


def hidden_states(network: torch.nn.Module, tensor: Tensor) -> dict[str, Tensor]:
    """`hidden.0`, what enters the first layer, `hidden.L`, what leaves layer L, and
    `last_hidden_state`, after the last norm. Hooks take them because transformers' own list ends
    with the normed state for some models. Takes pixels [frames, S, S, 3] in bytes for an encoder,
    input vectors [rows, M] for a language model; leading axes are those of the input."""
    found: dict[str, Tensor] = {}
    dtype = next(network.parameters()).dtype
    encoder = isinstance(network, Dinov2Model)
    layers = network.encoder.layer if encoder else network.layers

    def keep(name: str, value: Tensor | tuple) -> None:
        value = value[0] if isinstance(value, tuple) else value
        found[name] = (value if encoder else value[0]).float().contiguous()

    hooks = [layers[0].register_forward_pre_hook(lambda _, inputs: keep("hidden.0", inputs))]
    for i, layer in enumerate(layers, 1):
        hooks.append(layer.register_forward_hook(lambda *a, i=i: keep(f"hidden.{i}", a[-1])))
    with torch.inference_mode():
        if encoder:
            last = network(pixel_values=normalised(tensor, dtype)).last_hidden_state
        else:
            last = network(inputs_embeds=tensor[None].to(dtype), use_cache=False).last_hidden_state
    for hook in hooks:
        hook.remove()
    keep("last_hidden_state", last)
    return found


def states_of(kind: str, made: Checkpoint, tensor: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """`hidden_states` of a checkpoint that lies in no folder."""
    with tempfile.TemporaryDirectory() as folder:
        made.save(Path(folder))
        return hidden_states(load(kind, Path(folder), dtype), tensor)


def random_pixels(frames: int, size: int, seed: int) -> Tensor:
    noise = np.random.default_rng(seed).normal(128, 50, (frames, size, size, 3))
    return torch.tensor(noise.clip(0, 255).astype(np.uint8))


def random_embeddings(rows: int, width: int, seed: int) -> Tensor:
    noise = np.random.default_rng(seed).standard_normal((rows, width))
    return torch.tensor(model.TOKEN_STD * noise, dtype=torch.float32)


def main() -> int:
    if len(sys.argv) != 5 or sys.argv[1] not in KINDS:
        print(__doc__, file=sys.stderr)
        return 2
    kind, folder, source, target = sys.argv[1], *map(Path, sys.argv[2:])
    (tensor,) = load_file(source).values()
    save_file(hidden_states(load(kind, folder, torch.float32), tensor), target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
