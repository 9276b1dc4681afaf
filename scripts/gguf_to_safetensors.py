#!/usr/bin/env python3
"""Makes a Hugging Face folder (config.json, model.safetensors, tokenizer.json) of a GGUF file that
holds a Llama model, so that fovea and transformers can read it.

    python3 scripts/gguf_to_safetensors.py FILE.gguf FOLDER [--dtype bf16]

Quantised weights become what they stand for; what quantisation lost stays lost. FOLDER appears
whole or not at all. Needs the packages gguf, safetensors and tokenizers, and ml_dtypes for bf16.
"""
import argparse
import json
import pathlib
import sys
import tempfile

USAGE, DATA, FILES = 2, 3, 6  # exit statuses, as fovea's
try:
    import gguf
    import numpy as np
    import tokenizers
    from safetensors.numpy import save_file
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
except ImportError as error:
    print(f"gguf_to_safetensors: {error}: pip install gguf safetensors tokenizers", file=sys.stderr)
    sys.exit(USAGE)

# Names in a GGUF file to those of a checkpoint; the heads whose rows lie permuted.
OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
HEADS = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}

# How text is cut before byte-level BPE, by tokenizer.ggml.pre.
BYTES = {"add_prefix_space": False, "trim_offsets": True, "use_regex": True}
PRE_TOKENIZERS = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(**BYTES),
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(**BYTES)]
    ),
}


class Refused(Exception):
    def __init__(self, message, status=DATA):
        super().__init__(message)
        self.status = status


class Source:
    """A GGUF file's metadata and tensors."""

    def __init__(self, path):
        self.path = path
        try:
            self.reader = gguf.GGUFReader(path)
        except OSError as error:
            raise Refused(f"{path}: {error.strerror or error}", FILES) from error
        except Exception as error:  # whatever parsing of foreign bytes runs into
            raise Refused(f"{path}: not a readable GGUF file: {error}") from error
        kind = self.get("general.architecture", "none")
        if kind != "llama":
            raise Refused(f"{path}: architecture is '{kind}'; only 'llama' can be converted")

    def get(self, key, default=None):
        field = self.reader.fields.get(key)
        if field is not None:
            return field.contents()
        if default is None:
            raise Refused(f"{self.path}: metadata lacks {key}")
        return default

    def llama(self, key, default=None):
        return self.get("llama." + key, default)


def read_config(source):
    """config.json of the checkpoint; refuses what fovea's and this script's Llama has not."""
    heads = source.llama("attention.head_count")
    width = source.llama("embedding_length")
    if width % heads:
        raise Refused(f"{source.path}: embedding_length {width} is no multiple of {heads} heads")
    head_width = source.llama("attention.key_length", width // heads)
    rotated = source.llama("rope.dimension_count", head_width)
    scaling = source.llama("rope.scaling.type", "none")
    if rotated != head_width or head_width % 2 or scaling != "none":
        raise Refused(
            f"{source.path}: rotary positions over {rotated} of {head_width} values, scaling "
            f"'{scaling}': only whole heads without scaling can be converted"
        )
    tied = all(t.name != "output.weight" for t in source.reader.tensors)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": width,
        "head_dim": head_width,
        "intermediate_size": source.llama("feed_forward_length"),
        "num_hidden_layers": source.llama("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": source.llama("attention.head_count_kv", heads),
        "max_position_embeddings": source.llama("context_length"),
        "rms_norm_eps": shortest(source.llama("attention.layer_norm_rms_epsilon")),
        "rope_theta": shortest(source.llama("rope.freq_base", 10000.0)),
        "rope_interleaved": False,
        "vocab_size": len(source.get("tokenizer.ggml.tokens")),
        "tie_word_embeddings": tied,
        "attention_bias": False,
        "mlp_bias": False,
    }
    for key, name in (("bos", "bos"), ("eos", "eos"), ("padding", "pad")):
        token = source.get(f"tokenizer.ggml.{key}_token_id", -1)
        if token >= 0:
            config[f"{name}_token_id"] = token
    return config


def storage_type(dtype):
    if dtype == "f32":
        return np.float32
    try:
        import ml_dtypes
    except ImportError as error:
        raise Refused(f"{error}: pip install ml_dtypes, or use --dtype f32", USAGE) from error
    return ml_dtypes.bfloat16


def shortest(value):
    """The decimal number that a float32 was written for: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def expected_shapes(config):
    """Shape by checkpoint name, outputs first."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    shapes = {
        "model.embed_tokens.weight": (config["vocab_size"], width),
        "model.norm.weight": (width,),
    }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], width)
    in_layer = {
        "attn_norm": (width,), "ffn_norm": (width,),
        "attn_q": (queries, width), "attn_k": (keys, width), "attn_v": (keys, width),
        "attn_output": (width, queries),
        "ffn_gate": (inner, width), "ffn_up": (inner, width), "ffn_down": (width, inner),
    }  # fmt: skip
    for layer in range(config["num_hidden_layers"]):
        for part, shape in in_layer.items():
            shapes[f"model.layers.{layer}.{IN_LAYER[part]}.weight"] = shape
    return shapes


def checkpoint_name(name):
    """The checkpoint's name of a GGUF tensor and its part of the layer; None for unknown ones."""
    if name in OUTSIDE:
        return OUTSIDE[name], None
    block, _, rest = name.partition(".")
    layer, _, rest = rest.partition(".")
    part, _, kind = rest.partition(".")
    if block == "blk" and part in IN_LAYER and kind == "weight":
        return f"model.layers.{layer}.{IN_LAYER[part]}.weight", part
    return None, None


def rows_of_halves(weight, heads):
    """Rows as a checkpoint has them. Rotary positions turn pairs of a head's d rows: (2i, 2i+1) in
    a GGUF file, (i, i + d/2) in a checkpoint."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows, columns))


def read_weights(source, config):
    """Yields name and float32 array of every parameter."""
    missing = expected_shapes(config)
    for tensor in source.reader.tensors:
        name, part = checkpoint_name(tensor.name)
        shape = missing.pop(name, None)
        found = tuple(int(n) for n in reversed(tensor.shape))
        if shape is None:
            raise Refused(f"{source.path}: tensor {tensor.name} has no place in a Llama checkpoint")
        if found != shape:
            raise Refused(f"{source.path}: {tensor.name} is {list(found)}, {list(shape)} is needed")
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        weight = weight.reshape(shape)
        yield name, rows_of_halves(weight, config[HEADS[part]]) if part in HEADS else weight
    if missing:
        first = next(iter(missing))
        raise Refused(f"{source.path}: {len(missing)} tensors are missing, {first} first")


def write_weights(path, weights, kind):
    """kind: NumPy's type to store, rounded to nearest. Returns the number of parameters."""
    tensors = {name: weight.astype(kind, copy=False) for name, weight in weights}
    save_file(tensors, path, metadata={"format": "pt"})
    return sum(weight.size for weight in tensors.values())


def write_tokenizer(path, source):
    """Byte-level BPE as the file describes it; says so and writes nothing for another tokenizer."""
    kind = source.get("tokenizer.ggml.model", "none")
    cut = source.get("tokenizer.ggml.pre", "none")
    if kind != "gpt2" or cut not in PRE_TOKENIZERS:
        print(f"no tokenizer.json: '{kind}' with pre-tokenizer '{cut}' is not one of gpt2 with "
              f"{', '.join(PRE_TOKENIZERS)}", file=sys.stderr)
        return
    tokens = source.get("tokenizer.ggml.tokens")
    merges = [tuple(pair.split(" ", 1)) for pair in source.get("tokenizer.ggml.merges")]
    try:
        vocabulary = {token: number for number, token in enumerate(tokens)}
        made = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    except Exception as error:  # tokenizers raises Exception itself
        raise Refused(f"{source.path}: tokens and merges do not fit: {error}") from error
    made.pre_tokenizer = PRE_TOKENIZERS[cut]()
    made.decoder = decoders.ByteLevel()
    kinds = zip(tokens, source.get("tokenizer.ggml.token_type"), strict=True)
    special = [token for token, kind in kinds if kind == gguf.TokenType.CONTROL]
    made.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    made.save(str(path))


def convert(path, folder, dtype):
    kind = storage_type(dtype)
    source = Source(path)
    config = read_config(source)
    config["torch_dtype"] = np.dtype(kind).name
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise Refused(f"{folder}: is there and not an empty folder; choose another", FILES)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=folder.name + ".", dir=folder.parent) as scratch:
        made = pathlib.Path(scratch) / "made"
        made.mkdir()
        (made / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        count = write_weights(made / "model.safetensors", read_weights(source, config), kind)
        write_tokenizer(made / "tokenizer.json", source)
        # Some releases of safetensors make files that only their owner may read.
        (made / "model.safetensors").chmod((made / "config.json").stat().st_mode)
        made.replace(folder)
    print(f"{folder}: {count} parameters, {config['num_hidden_layers']} layers, {dtype}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0])
    parser.add_argument("file", type=pathlib.Path, metavar="FILE.gguf")
    parser.add_argument("folder", type=pathlib.Path, metavar="FOLDER")
    parser.add_argument("--dtype", choices=("f32", "bf16"), default="f32", help="default: f32")
    options = parser.parse_args()
    try:
        convert(options.file, options.folder, options.dtype)
    except Refused as error:
        print(f"gguf_to_safetensors: {error}", file=sys.stderr)
        return error.status
    except OSError as error:
        where = error.filename or options.folder
        print(f"gguf_to_safetensors: {where}: {error.strerror}", file=sys.stderr)
        return FILES
    return 0


if __name__ == "__main__":
    sys.exit(main())
