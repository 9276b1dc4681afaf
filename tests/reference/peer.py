"""A training step of the study in PyTorch, written for speed: what `make bench-gpu` compares with.

The same mathematics as model.py, which stays as close to the specification as it can; here products
are fused (query, key and value; gate and up), all clips go together, and the text is `none`. Two ways
of running it:

eager    bf16 autocast, weights in float32, AdamW as it comes: what is written first
best     bf16 weights beside float32 ones, fused AdamW, no work without effect, the encoder's keys
         and values cached when it is frozen, blocks compiled, the whole step one CUDA graph

The text is one row that both passes share; computing it twice costs nothing here, and sharing it
would be more code. `check` compares losses and gradients with model.py in double precision.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

import model
from model import Params, Sizes, Switches

Weights = dict[str, Tensor]  # of one block, by short names
MODES = ("eager", "best", "tuned", "graph", "exact")
CHECK_LIMIT = 1e-10  # doubles; the longest sums have some thousand terms of random sign


def wide(x: Tensor) -> Tensor:
    """In the precision for sums: float32 for bf16, anything else as it is."""
    return x.float() if x.dtype == torch.bfloat16 else x


# ---------------------------------------------------------------------------------------------
# Blocks: functions of tensors alone, so that one compilation serves every layer
# ---------------------------------------------------------------------------------------------


def norm(w: Weights, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[name + ".w"], w[name + ".b"], model.NORM_EPS)


def mlp(w: Weights, x: Tensor) -> Tensor:
    hidden = F.gelu(F.linear(norm(w, "norm2", x), w["fc1.w"], w["fc1.b"]))
    return x + w["scale2"] * F.linear(hidden, w["fc2.w"], w["fc2.b"])


def encoder_block(w: Weights, x: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """x [R, rows, D] to the next block's x, and this one's keys and values [R, heads, rows, d]."""
    found = F.linear(norm(w, "norm1", x), w["qkv.w"], w["qkv.b"])
    query, key, value = found.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    x = x + w["scale1"] * F.linear(mixed, w["out.w"], w["out.b"])
    return mlp(w, x), key, value


def keys_and_values(w: Weights, x: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """All that the last block is read for."""
    width = x.shape[-1]
    found = F.linear(norm(w, "norm1", x), w["qkv.w"][width:], w["qkv.b"][width:])
    key, value = found.unflatten(-1, (2, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return key, value


def query_block(
    w: Weights, q: Tensor, key: Tensor, value: Tensor, scale: float, top_k: int, last: bool
) -> tuple[Tensor, Optional[Tensor]]:
    """Query tokens q [R, D] through a block; probabilities [R, heads, N+1] of the last one."""
    heads, width = key.shape[1], q.shape[-1]
    query = F.linear(norm(w, "norm1", q), w["qkv.w"][:width], w["qkv.b"][:width])
    query = query.unflatten(-1, (heads, 1, -1))
    probabilities = None
    if top_k == 0 and not last:
        mixed = F.scaled_dot_product_attention(query, key, value, scale=scale)
    else:
        scores = wide(query @ key.transpose(-1, -2)) * scale
        probabilities = model.attention_probabilities(scores, top_k)
        mixed = probabilities.to(value.dtype) @ value
        probabilities = probabilities.squeeze(-2)
    mixed = F.linear(mixed.flatten(1), w["out.w"], w["out.b"])
    return mlp(w, q + w["scale1"] * mixed), probabilities


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


def lm_block(w: Weights, x: Tensor, cos: Tensor, sin: Tensor, heads: int, kv: int, eps: float):
    """x [B, rows, M] to the next block's."""
    d = x.shape[-1] // heads
    found = F.linear(F.rms_norm(x, x.shape[-1:], w["norm1"].to(x.dtype), eps), w["qkv"])
    query, key, value = found.unflatten(-1, (-1, d)).transpose(1, 2).split([heads, kv, kv], dim=1)
    query, key = rotated(query, cos, sin), rotated(key, cos, sin)
    mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=heads != kv)
    x = x + F.linear(mixed.transpose(1, 2).flatten(2), w["out"])
    gate, up = F.linear(F.rms_norm(x, x.shape[-1:], w["norm2"].to(x.dtype), eps), w["gate_up"]).chunk(2, dim=-1)
    return x + F.linear(F.silu(gate) * up, w["down"])


def head_start(w: Weights, previous: Tensor) -> Tensor:
    x = F.gelu(F.conv2d(previous, w["conv1.w"], w["conv1.b"], padding=1))
    x = F.gelu(F.conv2d(x, w["conv2.w"], w["conv2.b"], padding=1))
    return F.conv2d(x, w["conv3.w"], w["conv3.b"], padding=1)


def head_end(w: Weights, features: Tensor, hidden: Tensor) -> Tensor:
    film = F.linear(F.gelu(F.linear(hidden, w["film1.w"], w["film1.b"])), w["film2.w"], w["film2.b"])
    gamma, beta = film[..., None, None].chunk(2, dim=1)
    x = F.gelu(F.conv2d(gamma * features + beta, w["conv4.w"], w["conv4.b"], padding=1))
    x = F.gelu(F.conv2d(x, w["conv5.w"], w["conv5.b"], padding=1))
    return F.conv2d(x, w["conv6.w"], w["conv6.b"], padding=1)


# ---------------------------------------------------------------------------------------------
# Weights
# ---------------------------------------------------------------------------------------------

ENCODER_NAMES = {
    "norm1.w": "norm1.weight", "norm1.b": "norm1.bias", "norm2.w": "norm2.weight",
    "norm2.b": "norm2.bias", "scale1": "layer_scale1.lambda1", "scale2": "layer_scale2.lambda1",
    "out.w": "attention.output.dense.weight", "out.b": "attention.output.dense.bias",
    "fc1.w": "mlp.fc1.weight", "fc1.b": "mlp.fc1.bias",
    "fc2.w": "mlp.fc2.weight", "fc2.b": "mlp.fc2.bias",
}  # fmt: skip


def sources(c: Sizes) -> dict[str, list[str]]:
    """Every tensor of the peer, `group.index.name`, and the parameters it is joined from."""
    found: dict[str, list[str]] = {}
    for i in range(c.dino_layers):
        block, attention = f"dino.encoder.layer.{i}.", f"dino.encoder.layer.{i}.attention.attention."
        for short, name in ENCODER_NAMES.items():
            found[f"encoder.{i}.{short}"] = [block + name]
        for short, name in (("w", "weight"), ("b", "bias")):
            parts = [f"{attention}{part}.{name}" for part in ("query", "key", "value")]
            found[f"encoder.{i}.qkv.{short}"] = parts
    for i in range(c.lm_layers):
        block = f"lm.model.layers.{i}."
        found[f"lm.{i}.qkv"] = [f"{block}self_attn.{part}_proj.weight" for part in "qkv"]
        found[f"lm.{i}.gate_up"] = [f"{block}mlp.{part}_proj.weight" for part in ("gate", "up")]
        found[f"lm.{i}.out"] = [block + "self_attn.o_proj.weight"]
        found[f"lm.{i}.down"] = [block + "mlp.down_proj.weight"]
        found[f"lm.{i}.norm1"] = [block + "input_layernorm.weight"]
        found[f"lm.{i}.norm2"] = [block + "post_attention_layernorm.weight"]
    for name in [f"conv{i}" for i in range(1, 7)] + ["film1", "film2"]:
        found[f"head.0.{name}.w"] = [f"head.{name}.weight"]
        found[f"head.0.{name}.b"] = [f"head.{name}.bias"]
    taken = {name for names in found.values() for name in names}
    for name in model.shapes(c):
        if name not in taken and name != "lm.model.embed_tokens.weight":
            found["rest.0." + name] = [name]
    return found


# ---------------------------------------------------------------------------------------------
# The step
# ---------------------------------------------------------------------------------------------


@dataclass
class Batch:
    frames: Tensor  # uint8 [B, T, S, S, 3]
    latents: Tensor  # [B, T, 4, s, s]
    clip: Tensor  # [B], into the cache of a frozen encoder


class Peer:
    """One model with its optimizer. `tuned` is `best` with products tuned by the compiler, which takes
    minutes, `graph` is `best` without compilation, `exact` has its savings in the precision of the
    weights."""

    def __init__(self, c: Sizes, s: Switches, weights: Params, mode: str, device: str, lr: float = 3e-5):
        assert mode in MODES and s.vision and s.text == "none" and s.query_mode == "deep"
        self.c, self.s, self.mode, self.device = c, s, mode, device
        self.saving = mode != "eager"
        self.half = mode in ("best", "tuned", "graph")
        self.cache: Optional[Tensor] = None
        self.names = sources(c)
        self.master: Params = {}
        self.used: Params = {}
        for name, parts in self.names.items():
            joined = torch.cat([weights[part] for part in parts]).to(device)
            if joined.dim() == 4 and joined.shape[-1] == 3 and device != "cpu":
                joined = joined.to(memory_format=torch.channels_last)
            trained = model.is_trained(parts[0], c.frames, s)
            self.master[name] = joined.requires_grad_(trained)
            self.used[name] = joined
            if self.half:
                self.used[name] = joined.detach().to(torch.bfloat16).requires_grad_(trained)
        self.trained = [name for name, w in self.master.items() if w.requires_grad]
        self.groups: dict[str, list[Weights]] = {}
        for name, tensor in self.used.items():
            group, index, short = name.split(".", 2)
            blocks = self.groups.setdefault(group, [])
            while len(blocks) <= int(index):
                blocks.append({})
            blocks[int(index)][short] = tensor
        self.rest = self.groups["rest"][0]
        self.optimizer = torch.optim.AdamW(
            [self.master[name] for name in self.trained], lr=lr, weight_decay=0.01,
            **({"fused": True, "capturable": True} if self.half and device != "cpu" else {}),
        )  # fmt: skip
        self.blocks: dict[str, Callable] = {}
        for block in (encoder_block, keys_and_values, query_block, lm_block, head_start, head_end):
            self.blocks[block.__name__] = block
            if mode in ("best", "tuned"):
                how = "max-autotune-no-cudagraphs" if mode == "tuned" else "default"
                self.blocks[block.__name__] = torch.compile(block, mode=how, dynamic=False)
        self.constants()

    def constants(self) -> None:
        c = self.c
        dtype = self.used["rest.0.q_static"].dtype
        place = {"dtype": dtype, "device": self.device}
        self.pixel_scale = 1 / (255 * torch.tensor(model.PIXEL_STD, **place))
        self.pixel_shift = torch.tensor(model.PIXEL_MEAN, **place) / torch.tensor(
            model.PIXEL_STD, **place
        )
        d = c.lm_width // c.lm_heads
        turns = c.lm_rope_theta ** -(torch.arange(0, d, 2, dtype=torch.float64) / d)
        angle = torch.arange(c.frames + 2, dtype=torch.float64)[:, None] * turns
        self.cos, self.sin = angle.cos().to(**place), angle.sin().to(**place)

    # --- forward -------------------------------------------------------------------------------

    def tokens(self, frames: Tensor) -> Tensor:
        """Frames [R, S, S, 3] of bytes as the first block's x [R, N+1, D]."""
        c, rest = self.c, self.rest
        pixels = frames.to(self.pixel_scale.dtype) * self.pixel_scale - self.pixel_shift
        weight = rest["dino.embeddings.patch_embeddings.projection.weight"]
        bias = rest["dino.embeddings.patch_embeddings.projection.bias"]
        x = F.conv2d(pixels.permute(0, 3, 1, 2), weight, bias, stride=c.patch)
        x = x.flatten(2).transpose(1, 2)
        cls = rest["dino.embeddings.cls_token"].expand(x.shape[0], 1, -1)
        return torch.cat([cls, x], dim=1) + rest["dino.embeddings.position_embeddings"]

    def encode(self, frames: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of every layer."""
        c, x, found = self.c, self.tokens(frames), []
        for i, w in enumerate(self.groups["encoder"]):
            if self.saving and i == c.dino_layers - 1:
                found.append(self.blocks["keys_and_values"](w, x, c.dino_heads))
            else:
                x, key, value = self.blocks["encoder_block"](w, x, c.dino_heads)
                found.append((key, value))
        return found

    def whole_encoder(self, frames: Tensor) -> Tensor:
        """Features after the last norm, all layers computed."""
        x, rest = self.tokens(frames), self.rest
        for w in self.groups["encoder"]:
            x, _, _ = self.blocks["encoder_block"](w, x, self.c.dino_heads)
        gain, shift = rest["dino.layernorm.weight"], rest["dino.layernorm.bias"]
        return F.layer_norm(x, x.shape[-1:], gain, shift, model.NORM_EPS)

    def seen(self, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        if self.cache is not None:
            chosen = self.cache.index_select(0, batch.clip)  # [B, L, 2, T, heads, N+1, d]
            layers = chosen.permute(1, 2, 0, 3, 4, 5, 6).flatten(2, 3).unbind(0)
            return [tuple(layer.unbind(0)) for layer in layers]
        frames = batch.frames.flatten(0, 1)
        if self.s.freeze_dino:
            with torch.no_grad():
                return self.encode(frames)
        return self.encode(frames)

    @torch.no_grad()
    def fill_cache(self, frames: Tensor) -> None:
        """Of a frozen encoder: frames [clips, T, S, S, 3], encoded clip by clip."""
        clips = []
        for clip in frames:
            with self.precision():
                layers = self.encode(clip.to(self.device))
            clips.append(torch.stack([torch.stack(layer) for layer in layers]))
        self.cache = torch.stack(clips)

    def read(self, queries: Tensor, seen: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """queries [B, T, Q]: z [B, T, D], probabilities [R, heads, N+1] of the last layer."""
        c, s, rest = self.c, self.s, self.rest
        q = F.linear(queries.flatten(0, 1), rest["query_in.weight"])
        scale = 1 / (math.sqrt(c.dino_width // c.dino_heads) * s.temperature)
        for i, (w, (key, value)) in enumerate(zip(self.groups["encoder"], seen, strict=True)):
            last = i == c.dino_layers - 1
            q, probabilities = self.blocks["query_block"](w, q, key, value, scale, s.hard_attn_k, last)
        gain, shift = rest["dino.layernorm.weight"], rest["dino.layernorm.bias"]
        q = F.layer_norm(q, q.shape[-1:], gain, shift, model.NORM_EPS)
        z = F.linear(q, rest["query_out.weight"], rest["query_out.bias"])
        return z.unflatten(0, queries.shape[:2]), probabilities

    def hear(self, mode: str, z: Tensor) -> Tensor:
        """Hidden states [B, 1 + T, M] from the mode token on."""
        c, rest, clips = self.c, self.rest, z.shape[0]
        v = F.linear(z, rest["dino_to_lm.weight"], rest["dino_to_lm.bias"])
        v = v * (model.TOKEN_STD / (wide(v).std(-1, keepdim=True) + 1e-6)).to(v.dtype)
        start = torch.stack([rest["no_text"], rest["mode_" + mode]]).to(v.dtype)
        x = torch.cat([start.expand(clips, 2, -1), v], dim=1)
        for w in self.groups["lm"]:
            x = self.blocks["lm_block"](w, x, self.cos, self.sin, c.lm_heads, c.lm_kv_heads, c.lm_rms_eps)
        gain = rest["lm.model.norm.weight"].to(x.dtype)
        return F.rms_norm(x, x.shape[-1:], gain, c.lm_rms_eps)[:, 1:]

    def errors(self, hidden: Tensor, features: Optional[Tensor], batch: Batch) -> Tensor:
        """Mean squared errors [B, T]."""
        w, clips, frames = self.groups["head"][0], hidden.shape[0], self.c.frames
        if features is None:
            features = self.features(batch)
        made = self.blocks["head_end"](w, features, hidden[:, :-1].flatten(0, 1))
        error = wide(made).unflatten(0, (clips, frames)) - batch.latents
        return error.square().mean((2, 3, 4))

    def features(self, batch: Batch) -> Tensor:
        clips = batch.latents.shape[0]
        dtype = self.pixel_scale.dtype
        first = self.rest["latent_init"].to(dtype).expand(clips, 1, -1, -1, -1)
        previous = torch.cat([first, batch.latents[:, :-1].to(dtype)], dim=1).flatten(0, 1)
        if self.device != "cpu":
            previous = previous.to(memory_format=torch.channels_last)
        return self.blocks["head_start"](self.groups["head"][0], previous)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The measures of a step, `loss_total` among them."""
        clips, count, rest = batch.latents.shape[0], self.c.frames, self.rest
        seen = self.seen(batch)
        features = self.features(batch) if self.saving else None
        z, coarse = self.read(rest["q_static"].expand(clips, count, -1), seen)
        hidden = self.hear("coarse", z)
        found = {"loss_coarse": self.errors(hidden, features, batch)}
        queries = rest["q_init"].expand(clips, 1, -1)
        if count > 1:
            chosen = F.linear(hidden[:, 1:-1], rest["lm_to_query.weight"], rest["lm_to_query.bias"])
            queries = torch.cat([queries.to(chosen.dtype), chosen], dim=1)
        z_fine, fine = self.read(queries, seen)
        found["loss_fine"] = self.errors(self.hear("fine", z_fine), features, batch)
        a, b = wide(z), wide(z_fine)
        found["cosine"] = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1)).clamp(min=1e-8)
        for name, probabilities in (("fine", fine), ("coarse", coarse)):
            measured = model.entropy(wide(probabilities)).mean(-1)
            found["entropy_" + name] = measured.unflatten(0, (clips, count))
        return model.step_measures(found, self.s)

    # --- training ------------------------------------------------------------------------------

    def precision(self):
        kind = "cpu" if self.device == "cpu" else "cuda"
        return torch.autocast(kind, torch.bfloat16, enabled=self.mode == "eager")

    def step(self, batch: Batch) -> dict[str, Tensor]:
        with self.precision():
            measures = self.forward(batch)
        measures["loss_total"].backward()
        if self.half:
            halves = [self.used[name] for name in self.trained]
            masters = [self.master[name] for name in self.trained]
            for master, half in zip(masters, halves, strict=True):
                master.grad = half.grad.to(master.dtype)
        measures["grad_norm"] = torch.nn.utils.clip_grad_norm_(
            [self.master[name] for name in self.trained], 1.0
        )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.half:
            with torch.no_grad():
                torch._foreach_copy_(halves, masters)
            for half in halves:
                half.grad = None
        return measures

    def captured(self, batch: Batch) -> Callable[[], dict[str, Tensor]]:
        """The whole step as a CUDA graph over the tensors of `batch`; measures stay on the GPU."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(5):
                self.step(batch)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            measures = self.step(batch)

        def replay() -> dict[str, Tensor]:
            graph.replay()
            return measures

        return replay


# ---------------------------------------------------------------------------------------------
# Weights and clips for benchmarks and checks
# ---------------------------------------------------------------------------------------------


def random_weights(c: Sizes, dtype: torch.dtype = torch.float32) -> Params:
    """Start values of healthy size: rows of matrices of length 1, gains of 1."""
    generator = torch.Generator().manual_seed(1)
    found = {}
    for name, shape in model.shapes(c).items():
        noise = torch.randn(shape, generator=generator)
        fan_in = noise[0].numel() if noise.dim() > 1 else 25
        gain = "lambda1" in name or ("norm" in name and name.endswith("weight"))
        found[name] = (float(gain) + noise / fan_in**0.5).to(dtype)
    return found


def random_batch(c: Sizes, dtype: torch.dtype, seed: int = 2) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    pixels = (c.clips, c.frames, c.size, c.size, 3)
    frames = torch.randint(0, 256, pixels, generator=generator, dtype=torch.uint8)
    side = c.size // 8
    latents = torch.randn(c.clips, c.frames, 4, side, side, generator=generator)
    return Batch(frames, latents.to(dtype), torch.arange(c.clips))


def gradients(p: Peer, batch: Batch) -> tuple[Tensor, Params]:
    measures = p.forward(batch)
    measures["loss_total"].backward()
    found = {}
    for name in p.trained:
        parts = p.names[name]
        sizes = [model.shapes(p.c)[part][0] for part in parts]
        for part, g in zip(parts, p.master[name].grad.split(sizes), strict=True):
            found[part] = g
    return measures["loss_total"].detach(), found


def check(c: Sizes, switches: dict[str, Switches]) -> float:
    """The largest relative difference from model.py, in loss and gradients, in double."""
    worst = 0.0
    for name, s in switches.items():
        weights, batch = random_weights(c, torch.float64), random_batch(c, torch.float64)
        theirs = {n: w.clone().requires_grad_(model.is_trained(n, c.frames, s)) for n, w in weights.items()}
        loss = model.step_measures(
            model.same_length(theirs, c, s, batch.frames, batch.latents), s
        )["loss_total"]
        loss.backward()
        for saving in (True, False):
            p = Peer(c, s, {n: w.clone() for n, w in weights.items()}, "exact", "cpu")
            p.saving = saving
            if s.freeze_dino and saving:
                p.fill_cache(batch.frames)
            ours, grads = gradients(p, batch)
            trained = {n for n, w in theirs.items() if w.requires_grad}
            if set(grads) != trained:
                raise AssertionError(f"{name}: other parameters are trained: {set(grads) ^ trained}")
            pairs = [(ours[None], loss.detach()[None])]
            pairs += [(grads[n].flatten(), theirs[n].grad.flatten()) for n in sorted(trained)]
            a, b = (torch.cat(side) for side in zip(*pairs, strict=True))
            error = float((a - b).norm() / b.norm())
            if not error <= CHECK_LIMIT:
                raise AssertionError(f"{name}: the peer differs from model.py by {error:.1e}")
            worst = max(worst, error)
    return worst


EXPERIMENTS = {
    "A_baseline": Switches(),
    "B_temp_0.1": Switches(temperature=0.1),
    "C_contrastive": Switches(contrastive=0.1),
    "D_freeze_dino": Switches(freeze_dino=True),
    "E_hard_attn_32": Switches(hard_attn_k=32),
    "F_entropy_reg": Switches(entropy_margin=0.5),
    "G_combined_best": Switches(
        temperature=0.1, contrastive=0.1, freeze_dino=True, hard_attn_k=32
    ),
}


def scaled(s: Switches, patches: int) -> Switches:
    """k keeps its share of 256 patches."""
    k = s.hard_attn_k * patches // 256
    return replace(s, hard_attn_k=max(k, 1) if s.hard_attn_k else 0)
