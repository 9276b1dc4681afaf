"""Compares the reference's encoder and language model with those of the `transformers` package.

    python3 tests/reference/check_transformers.py

Random weights in double precision; prints the largest difference and fails above 1e-5 for the LM
(transformers computes rotary angles in single precision) and 1e-12 for the encoder.
"""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import Dinov2Config, Dinov2Model, LlamaConfig, LlamaModel, PreTrainedConfig

import make_golden
import model

# transformers wants a whole ratio of MLP to width
c = replace(make_golden.SIZES, dino_mlp=2 * make_golden.SIZES.dino_width)


def parameters() -> model.Params:
    start = make_golden.start_values(c, np.random.default_rng(5))
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in start.items()}


def under(p: model.Params, prefix: str) -> model.Params:
    return {name[len(prefix) :]: v for name, v in p.items() if name.startswith(prefix)}


def load(kind: type, config: PreTrainedConfig, weights: model.Params) -> torch.nn.Module:
    """A transformers model from a checkpoint of our weights under our names: all of them must
    find their place, and only a mask token may be missing."""
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        contiguous = {name: v.contiguous() for name, v in weights.items()}
        save_file(contiguous, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        theirs, info = kind.from_pretrained(folder, dtype=torch.float64, output_loading_info=True)
    missing = [name for name in info["missing_keys"] if "mask_token" not in name]
    if missing or info["unexpected_keys"] or info["mismatched_keys"]:
        raise AssertionError(f"names do not match: {info}")
    return theirs.eval()


def encoder_difference(p: model.Params) -> float:
    grid = c.size // c.patch
    config = Dinov2Config(
        hidden_size=c.dino_width,
        num_hidden_layers=c.dino_layers,
        num_attention_heads=c.dino_heads,
        image_size=grid * c.patch,
        patch_size=c.patch,
        mlp_ratio=c.dino_mlp // c.dino_width,
        layer_norm_eps=model.NORM_EPS,
    )
    theirs = load(Dinov2Model, config, under(p, "dino."))
    frames = torch.randint(0, 256, (1, 2, c.size, c.size, 3), dtype=torch.uint8)
    mean, std = (torch.tensor(v, dtype=torch.float64) for v in (model.PIXEL_MEAN, model.PIXEL_STD))
    pixels = (frames[0].double() / 255 - mean) / std
    pixels = pixels[:, : grid * c.patch, : grid * c.patch].permute(0, 3, 1, 2)
    expected = theirs(pixel_values=pixels).last_hidden_state
    return (model.encode(p, c, frames).features - expected).abs().max().item()


def lm_difference(p: model.Params) -> float:
    config = LlamaConfig(
        vocab_size=c.lm_vocab,
        hidden_size=c.lm_width,
        intermediate_size=c.lm_mlp,
        num_hidden_layers=c.lm_layers,
        num_attention_heads=c.lm_heads,
        num_key_value_heads=c.lm_kv_heads,
        rms_norm_eps=c.lm_rms_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.lm_rope_theta},
    )
    theirs = load(LlamaModel, config, under(p, "lm.model."))
    x = torch.randn(2, 7, c.lm_width, dtype=torch.float64)
    expected = theirs(inputs_embeds=x).last_hidden_state
    return (model.language_model(p, c, x) - expected).abs().max().item()


def main() -> int:
    p = parameters()
    failed = False
    with torch.no_grad():
        for name, found, limit in (
            ("encoder", encoder_difference(p), 1e-12),
            ("language model", lm_difference(p), 1e-5),
        ):
            print(f"{name}: largest difference {found:.1e}, allowed {limit:.0e}")
            failed = failed or not found <= limit
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
