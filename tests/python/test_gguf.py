"""scripts/gguf_to_safetensors.py on a tiny GGUF file: names, rows, values, tokens, wrong input."""
import importlib.util
import json
import pathlib
import subprocess
import sys
import tempfile
import unittest

import numpy as np

try:
    import gguf
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer
except ImportError:
    gguf = None

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts/gguf_to_safetensors.py"
WIDTH, HEADS, KV_HEADS, INNER, LAYERS = 32, 4, 2, 64, 2
HEAD = WIDTH // HEADS
TOKENS = ["<|end|>", "<|start|>", *"abcde0123", "Ġ", "ab", "Ġc", "Ġab"]
MERGES = ["a b", "Ġ c", "Ġ ab"]


def run(*arguments, env=None):
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, arguments)], text=True, env=env,
                          capture_output=True)  # fmt: skip


def interleaved(weight, heads):
    """What a converter to GGUF does to the rows of q and k: (i, i + d/2) become neighbours."""
    halves = weight.reshape(heads, 2, -1, weight.shape[1])
    return np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(weight.shape)


def random_weights():
    """Weights by checkpoint name; HF's q and k are given, so that the file has to be undone."""
    rng = np.random.default_rng(3)
    shapes = {"model.embed_tokens.weight": (len(TOKENS), WIDTH), "model.norm.weight": (WIDTH,)}
    for layer in range(LAYERS):
        shapes |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (WIDTH,),
                "self_attn.q_proj": (WIDTH, WIDTH),
                "self_attn.k_proj": (KV_HEADS * HEAD, WIDTH),
                "self_attn.v_proj": (KV_HEADS * HEAD, WIDTH),
                "self_attn.o_proj": (WIDTH, WIDTH),
                "post_attention_layernorm": (WIDTH,),
                "mlp.gate_proj": (INNER, WIDTH),
                "mlp.up_proj": (INNER, WIDTH),
                "mlp.down_proj": (WIDTH, INNER),
            }.items()
        }
    return {name: rng.standard_normal(shape).astype("f4") for name, shape in shapes.items()}


def write_gguf(path, weights, arch="llama", kind="F32", pre="smollm", leave_out="", scaling=None):
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HEAD)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    if scaling:
        writer.add_rope_scaling_type(scaling)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3] + [1] * (len(TOKENS) - 2))
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    quantised = gguf.GGMLQuantizationType[kind]
    for name, weight in weights.items():
        heads = {"q": HEADS, "k": KV_HEADS}.get(name.partition("_proj")[0][-1:])
        if "_proj" in name and heads and "self_attn" in name:
            weight = interleaved(weight, heads)
        gguf_name = names.get_name(name, try_suffixes=(".weight",))
        if gguf_name == leave_out:
            continue
        if weight.ndim == 1 or kind == "F32":
            writer.add_tensor(gguf_name, weight)
        else:
            data = gguf.quants.quantize(weight, quantised)
            writer.add_tensor(gguf_name, data, raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@unittest.skipIf(gguf is None, "no gguf, safetensors, tokenizers")
class Converter(unittest.TestCase):
    def setUp(self):
        scratch = tempfile.TemporaryDirectory()
        self.addCleanup(scratch.cleanup)
        self.folder = pathlib.Path(scratch.name)
        self.file, self.out = self.folder / "tiny.gguf", self.folder / "made/tiny"
        self.weights = random_weights()

    def converted(self, *options):
        done = run(self.file, self.out, *options)
        self.assertEqual(done.returncode, 0, done.stderr)
        return done

    def refuses(self, status, pattern, *arguments, env=None):
        done = run(*(arguments or (self.file, self.out)), env=env)
        self.assertEqual(done.returncode, status, done.stderr)
        self.assertRegex(done.stderr, pattern)
        self.assertEqual(len(done.stderr.splitlines()), 1, done.stderr)

    def test_weights_come_back_under_their_names(self):
        write_gguf(self.file, self.weights)
        self.converted()
        found = load_file(self.out / "model.safetensors")
        self.assertEqual(found.keys(), self.weights.keys())
        for name, weight in self.weights.items():
            np.testing.assert_array_equal(found[name], weight, err_msg=name)
        self.assertEqual({p.name for p in self.out.iterdir()},
                         {"config.json", "model.safetensors", "tokenizer.json"})  # fmt: skip

    def test_config_says_what_the_metadata_said(self):
        write_gguf(self.file, self.weights)
        self.converted()
        config = json.loads((self.out / "config.json").read_text())
        wanted = {
            "model_type": "llama", "hidden_size": WIDTH, "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD,
            "intermediate_size": INNER, "vocab_size": len(TOKENS), "rope_theta": 100000.0,
            "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "eos_token_id": 0,
            "torch_dtype": "float32",
        }  # fmt: skip
        self.assertEqual(wanted, {key: config.get(key) for key in wanted})

    def test_quantised_weights_become_what_they_stand_for(self):
        write_gguf(self.file, self.weights, kind="Q8_0")
        self.converted()
        found = load_file(self.out / "model.safetensors")
        for name, weight in self.weights.items():
            # 8 bits of blocks of 32: half a step of the largest value's 127th
            limit = 0 if weight.ndim == 1 else np.abs(weight).max() / 127 * 0.51
            self.assertLessEqual(np.abs(found[name] - weight).max(), limit, name)

    def test_own_output_layer_is_not_tied(self):
        self.weights["lm_head.weight"] = self.weights["model.embed_tokens.weight"] + 1
        write_gguf(self.file, self.weights)
        self.converted()
        self.assertIn("lm_head.weight", load_file(self.out / "model.safetensors"))
        self.assertFalse(json.loads((self.out / "config.json").read_text())["tie_word_embeddings"])

    def test_bf16_is_rounded_to_nearest(self):
        write_gguf(self.file, self.weights)
        if importlib.util.find_spec("ml_dtypes") is None:
            self.refuses(2, "pip install ml_dtypes", self.file, self.out, "--dtype", "bf16")
            return
        self.converted("--dtype", "bf16")
        data = (self.out / "model.safetensors").read_bytes()
        length = int.from_bytes(data[:8], "little")
        entry = json.loads(data[8 : 8 + length])["model.norm.weight"]
        begin, end = (8 + length + o for o in entry["data_offsets"])
        self.assertEqual(entry["dtype"], "BF16")
        found = (np.frombuffer(data[begin:end], "<u2").astype("u4") << 16).view("f4")
        wanted = self.weights["model.norm.weight"]
        self.assertTrue((np.abs(found - wanted) <= np.abs(wanted) * 2.0**-8).all())
        self.assertTrue((np.abs(found) > np.abs(wanted)).any(), "cut off, not rounded")

    def test_tokenizer_splits_digits_and_joins_merges(self):
        write_gguf(self.file, self.weights)
        self.converted()
        made = Tokenizer.from_file(str(self.out / "tokenizer.json"))
        text = "<|start|>ab ab c12 0<|end|>"
        self.assertEqual(made.encode(text).tokens,
                         ["<|start|>", "ab", "Ġab", "Ġc", "1", "2", "Ġ", "0", "<|end|>"])  # fmt: skip
        self.assertEqual(made.decode(made.encode("ab ab c12 0").ids), "ab ab c12 0")
        self.assertEqual(made.encode("<|end|>").ids, [0])

    def test_unknown_tokenizer_is_left_out_and_named(self):
        write_gguf(self.file, self.weights, pre="tekken")
        self.assertRegex(self.converted().stderr, "no tokenizer.json: .*'tekken'")
        self.assertFalse((self.out / "tokenizer.json").exists())

    def test_wrong_files_are_refused_in_one_line(self):
        self.refuses(6, "absent.gguf: No such file", self.folder / "absent.gguf", self.out)
        self.file.write_bytes(b"not a model" * 100)
        self.refuses(3, "tiny.gguf: not a readable GGUF file")
        self.file.write_bytes(b"")
        self.refuses(3, "tiny.gguf: not a readable GGUF file")
        write_gguf(self.file, self.weights)
        self.file.write_bytes(self.file.read_bytes()[:-1000])
        self.refuses(3, "tiny.gguf: not a readable GGUF file")
        write_gguf(self.file, self.weights, arch="gemma")
        self.refuses(3, "architecture is 'gemma'")
        write_gguf(self.file, self.weights, scaling=gguf.RopeScalingType.YARN)
        self.refuses(3, "scaling 'yarn'")
        write_gguf(self.file, self.weights, leave_out="blk.1.ffn_up.weight")
        self.refuses(3, "1 tensors are missing, model.layers.1.mlp.up_proj.weight first")
        self.weights["model.norm.weight"] = np.ones(WIDTH + 1, "f4")
        write_gguf(self.file, self.weights)
        self.refuses(3, r"output_norm.weight is \[33\], \[32\] is needed")
        self.assertFalse(any(self.folder.glob("made/*")), "something was left")

    def test_folder_in_use_is_kept(self):
        write_gguf(self.file, self.weights)
        self.out.mkdir(parents=True)
        self.converted()  # empty: fine
        self.refuses(6, "made/tiny: is there and not an empty folder")

    def test_missing_package_is_named(self):
        (self.folder / "gguf.py").write_text("raise ImportError(\"No module named 'gguf'\")\n")
        self.refuses(2, "No module named 'gguf': pip install gguf", self.file, self.out,
                     env={"PYTHONPATH": str(self.folder)})  # fmt: skip


if __name__ == "__main__":
    unittest.main()
