"""Compares fovea's encoder and language model with transformers at full size, layer by layer.

    make build/f32/parity
    python3 tests/reference/parity_large.py [--llama FOLDER] [--dinov2 FOLDER] > table.md

Random weights, and those of the folders named; single precision on both sides. Prints one Markdown
table: the error of a state is max|fovea - transformers| / max|transformers|, and `rounding` is what
transformers' own single precision loses against double. Exit status 1 where an error is above 1e-4.
"""

import argparse
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

import parity

LIMIT = 1e-4
FRAMES = 2
ROWS = 300
TABLE = 37  # patches per side of the published position tables
ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "build/f32/parity"


@dataclass
class Case:
    kind: str
    title: str
    folder: Path
    inputs: dict[str, Tensor]  # by what the table calls them


def encoder_inputs() -> dict[str, Tensor]:
    sizes = (224, 256, 237)
    return {f"{FRAMES} frames of {s} px": parity.random_pixels(FRAMES, s, seed=s) for s in sizes}


def llama_inputs(folder: Path) -> dict[str, Tensor]:
    """Random vectors; with a tokenizer there, also the embeddings of an English text."""
    table = load_file(folder / "model.safetensors")["model.embed_tokens.weight"].float()
    found = {f"{ROWS} random rows": parity.random_embeddings(ROWS, table.shape[1], seed=4)}
    if (folder / "tokenizer.json").exists():
        text = (ROOT / "README.md").read_text()
        ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids[:ROWS]
        found[f"{len(ids)} tokens of README.md"] = table[ids]
    return found


def all_cases(scratch: Path, options: argparse.Namespace) -> list[Case]:
    """Writes the folders of random weights."""
    small, base, llama = scratch / "small", scratch / "base", scratch / "llama"
    parity.random_dinov2(384, 6, 12, 1536, 14, TABLE, seed=5).save(small)
    parity.random_dinov2(768, 12, 12, 3072, 14, TABLE, seed=6).save(base)
    parity.random_llama(576, 9, 3, 30, 1536, 49152, seed=7).save(llama)
    cases = [
        Case("dinov2", "ViT-S/14, random", small, encoder_inputs()),
        Case("dinov2", "ViT-B/14, random", base, encoder_inputs()),
        Case("llama", "SmolLM2-135M's sizes, random", llama, llama_inputs(llama)),
    ]
    if options.dinov2:
        cases.append(Case("dinov2", options.dinov2.name, options.dinov2, encoder_inputs()))
    if options.llama:
        cases.append(Case("llama", options.llama.name, options.llama, llama_inputs(options.llama)))
    return cases


def states_of_program(program: list[str], case: Case, tensor: Tensor, scratch: Path) -> tuple:
    """The program's states by name, and the seconds it took, loading included."""
    source, target = scratch / "input.safetensors", scratch / "output.safetensors"
    save_file({"pixels" if case.kind == "dinov2" else "inputs_embeds": tensor}, source)
    start = time.monotonic()
    subprocess.run([*program, case.kind, str(case.folder), str(source), str(target)], check=True)
    return load_file(target), time.monotonic() - start


def worst_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """The largest error of a state and the state's name; a NaN is the largest error of all."""
    if found.keys() != expected.keys():
        raise AssertionError(f"states differ: {sorted(found.keys() ^ expected.keys())}")
    errors = []
    for name, state in expected.items():
        if found[name].shape != state.shape:
            raise AssertionError(f"{name}: {list(found[name].shape)}, not {list(state.shape)}")
        error = ((found[name] - state).abs().max() / state.abs().max()).item()
        errors.append((error if error == error else float("inf"), name))
    return max(errors)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--dinov2", type=Path, help="folder of a DINOv2 checkpoint to compare too")
    parser.add_argument("--llama", type=Path, help="folder of a Llama checkpoint to compare too")
    parser.add_argument("--program", default=str(PROGRAM), help="default: build/f32/parity")
    options = parser.parse_args()

    failed = False
    print("| weights | input | states | worst error | at | rounding | seconds |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        for case in all_cases(scratch, options):
            single = parity.load(case.kind, case.folder, torch.float32)
            double = parity.load(case.kind, case.folder, torch.float64)
            for text, tensor in case.inputs.items():
                program = shlex.split(options.program)
                found, seconds = states_of_program(program, case, tensor, scratch)
                expected = parity.hidden_states(single, tensor)
                error, worst = worst_error(found, expected)
                rounding, _ = worst_error(expected, parity.hidden_states(double, tensor))
                failed = failed or not error <= LIMIT
                print(f"| {case.title} | {text} | {len(expected)} | {error:.1e} | {worst} | "
                      f"{rounding:.1e} | {seconds:.1f} |", flush=True)  # fmt: skip
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
