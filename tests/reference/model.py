"""The foveated video model in plain PyTorch: what the C implementation is compared with.

Everything is a function of a dict of parameters under their checkpoint names, works in the
precision of those parameters, and leaves every gradient to autograd. All clips of one call have
the same text length; `losses` runs clips of different lengths one by one.

Letters in shapes: B clips, T frames, R = B*T frames of all clips, N patches, D encoder width,
M LM width, Q query width, C head width, s = S/8 the side of a latent.
"""

import math
from dataclasses import asdict, dataclass
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

Params = dict[str, Tensor]

PIXEL_MEAN = (0.485, 0.456, 0.406)
PIXEL_STD = (0.229, 0.224, 0.225)
NORM_EPS = 1e-6  # LayerNorm of the encoder
TOKEN_STD = 0.14  # of every visual token the LM reads
HINGE_WEIGHT = 0.1


@dataclass
class Sizes:
    """Sizes of a model and of a step; the fields of src/model/config.h."""

    clips: int
    frames: int
    size: int
    patch: int
    dino_width: int
    dino_heads: int
    dino_layers: int
    dino_mlp: int
    lm_width: int
    lm_layers: int
    lm_heads: int
    lm_kv_heads: int
    lm_mlp: int
    lm_vocab: int
    lm_rope_theta: float
    lm_rms_eps: float
    query_width: int
    head_width: int
    film_width: int
    max_text: int = 1

    @property
    def patches(self) -> int:
        return (self.size // self.patch) ** 2


SEED_SCALE = Sizes(
    clips=2,
    frames=8,
    size=224,
    patch=14,
    dino_width=384,
    dino_heads=6,
    dino_layers=12,
    dino_mlp=1536,
    lm_width=576,
    lm_layers=30,
    lm_heads=9,
    lm_kv_heads=3,
    lm_mlp=1536,
    lm_vocab=49152,
    lm_rope_theta=100000.0,
    lm_rms_eps=1e-5,
    query_width=128,
    head_width=64,
    film_width=512,
)


@dataclass
class Switches:
    """What an experiment changes; names as in a study file."""

    temperature: float = 1.0
    contrastive: float = 0.0
    freeze_dino: bool = False
    hard_attn_k: int = 0
    entropy_margin: float = 0.0
    lambda_coarse: float = 1.0
    query_mode: str = "deep"
    freeze_lm: bool = False
    vision: bool = True
    text: str = "none"

    def describe(self) -> dict[str, str]:
        """The switches as text, booleans the way a study file writes them."""
        written = {name: str(value) for name, value in asdict(self).items()}
        for name in ("freeze_dino", "freeze_lm"):
            written[name] = "true" if getattr(self, name) else "false"
        written["vision"] = "on" if self.vision else "off"
        return written


# ---------------------------------------------------------------------------------------------
# Parameters
# ---------------------------------------------------------------------------------------------


def shapes(c: Sizes) -> dict[str, tuple[int, ...]]:
    """Every parameter's name and shape, in a fixed order."""
    D, M, Q, C = c.dino_width, c.lm_width, c.query_width, c.head_width
    kv = M // c.lm_heads * c.lm_kv_heads
    found: dict[str, tuple[int, ...]] = {}

    def linear(name: str, inputs: int, outputs: int, bias: bool = True) -> None:
        found[name + ".weight"] = (outputs, inputs)
        if bias:
            found[name + ".bias"] = (outputs,)

    def layer_norm(name: str) -> None:
        found[name + ".weight"] = (D,)
        found[name + ".bias"] = (D,)

    found["dino.embeddings.cls_token"] = (1, 1, D)
    found["dino.embeddings.position_embeddings"] = (1, c.patches + 1, D)
    found["dino.embeddings.patch_embeddings.projection.weight"] = (D, 3, c.patch, c.patch)
    found["dino.embeddings.patch_embeddings.projection.bias"] = (D,)
    for i in range(c.dino_layers):
        block = f"dino.encoder.layer.{i}."
        layer_norm(block + "norm1")
        for part in ("query", "key", "value"):
            linear(block + "attention.attention." + part, D, D)
        linear(block + "attention.output.dense", D, D)
        found[block + "layer_scale1.lambda1"] = (D,)
        layer_norm(block + "norm2")
        linear(block + "mlp.fc1", D, c.dino_mlp)
        linear(block + "mlp.fc2", c.dino_mlp, D)
        found[block + "layer_scale2.lambda1"] = (D,)
    layer_norm("dino.layernorm")

    found["lm.model.embed_tokens.weight"] = (c.lm_vocab, M)
    for i in range(c.lm_layers):
        block = f"lm.model.layers.{i}."
        linear(block + "self_attn.q_proj", M, M, bias=False)
        linear(block + "self_attn.k_proj", M, kv, bias=False)
        linear(block + "self_attn.v_proj", M, kv, bias=False)
        linear(block + "self_attn.o_proj", M, M, bias=False)
        linear(block + "mlp.gate_proj", M, c.lm_mlp, bias=False)
        linear(block + "mlp.up_proj", M, c.lm_mlp, bias=False)
        linear(block + "mlp.down_proj", c.lm_mlp, M, bias=False)
        found[block + "input_layernorm.weight"] = (M,)
        found[block + "post_attention_layernorm.weight"] = (M,)
    found["lm.model.norm.weight"] = (M,)

    found["q_static"] = found["q_init"] = (Q,)
    found["mode_coarse"] = found["mode_fine"] = found["no_text"] = (M,)
    linear("query_in", Q, D, bias=False)
    linear("query_out", D, D)
    linear("dino_to_lm", D, M)
    linear("lm_to_query", M, Q)

    side = c.size // 8
    found["latent_init"] = (4, side, side)
    widths = [4, C, 2 * C, 4 * C, 2 * C, C, 4]
    for i in range(6):
        found[f"head.conv{i + 1}.weight"] = (widths[i + 1], widths[i], 3, 3)
        found[f"head.conv{i + 1}.bias"] = (widths[i + 1],)
    linear("head.film1", M, c.film_width)
    linear("head.film2", c.film_width, 8 * C)
    return found


def is_trained(name: str, frames: int, s: Switches) -> bool:
    """Whether training changes a parameter: it is not frozen and the loss depends on it."""
    reading = ("dino.", "q_static", "q_init", "query_in.", "query_out.", "dino_to_lm.")
    if name.startswith("dino.") and s.freeze_dino:
        return False
    if name.startswith("lm.") and s.freeze_lm:
        return False
    if name.startswith(reading) and not s.vision:
        return False
    if name.startswith("lm_to_query.") and (not s.vision or frames == 1):
        return False
    if name == "lm.model.embed_tokens.weight":
        return s.text == "captions"
    if name == "no_text":
        return s.text == "none"
    return True


def linear(p: Params, name: str, x: Tensor) -> Tensor:
    return F.linear(x, p[name + ".weight"], p.get(name + ".bias"))


# ---------------------------------------------------------------------------------------------
# Encoder
# ---------------------------------------------------------------------------------------------


@dataclass
class Encoded:
    """What a query can attend to: keys and values [R, heads, N+1, d] of every layer, and the
    features [R, N+1, D] after the last norm."""

    keys: list[Tensor]
    values: list[Tensor]
    features: Tensor


def layer_norm(p: Params, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], p[name + ".weight"], p[name + ".bias"], NORM_EPS)


def heads_first(x: Tensor, heads: int) -> Tensor:
    """[..., rows, heads * d] to [..., heads, rows, d]."""
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)


def heads_last(x: Tensor) -> Tensor:
    """[..., heads, rows, d] to [..., rows, heads * d]."""
    return x.transpose(-3, -2).flatten(-2)


def mlp_block(p: Params, block: str, x: Tensor) -> Tensor:
    hidden = F.gelu(linear(p, block + "mlp.fc1", layer_norm(p, block + "norm2", x)))
    return x + p[block + "layer_scale2.lambda1"] * linear(p, block + "mlp.fc2", hidden)


def encode(p: Params, c: Sizes, frames: Tensor) -> Encoded:
    """Frames [B, T, S, S, 3] of bytes through the encoder."""
    weight = p["dino.embeddings.patch_embeddings.projection.weight"]
    bias = p["dino.embeddings.patch_embeddings.projection.bias"]
    pixels = frames.flatten(0, 1).to(weight.dtype) / 255
    mean, std = (torch.tensor(v, dtype=weight.dtype) for v in (PIXEL_MEAN, PIXEL_STD))
    pixels = ((pixels - mean) / std).permute(0, 3, 1, 2)
    x = F.conv2d(pixels, weight, bias, stride=c.patch).flatten(2).transpose(1, 2)
    cls = p["dino.embeddings.cls_token"].expand(x.shape[0], 1, -1)
    x = torch.cat([cls, x], dim=1) + p["dino.embeddings.position_embeddings"]

    keys, values = [], []
    for i in range(c.dino_layers):
        block = f"dino.encoder.layer.{i}."
        normed = layer_norm(p, block + "norm1", x)
        query, key, value = (
            heads_first(linear(p, block + "attention.attention." + part, normed), c.dino_heads)
            for part in ("query", "key", "value")
        )
        keys.append(key)
        values.append(value)
        mixed = heads_last(F.scaled_dot_product_attention(query, key, value))
        mixed = linear(p, block + "attention.output.dense", mixed)
        x = mlp_block(p, block, x + p[block + "layer_scale1.lambda1"] * mixed)
    return Encoded(keys, values, layer_norm(p, "dino.layernorm", x))


# ---------------------------------------------------------------------------------------------
# Foveated query
# ---------------------------------------------------------------------------------------------


def attention_probabilities(scores: Tensor, k: int) -> Tensor:
    """Softmax of the k largest scores of each row (equal scores: lower index first); k = 0 or
    more than there are is all of them."""
    if 0 < k < scores.shape[-1]:
        order = scores.argsort(dim=-1, descending=True, stable=True)
        kept = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order[..., :k], True)
        scores = scores.masked_fill(~kept, -math.inf)
    return scores.softmax(dim=-1)


def read_deep(p: Params, c: Sizes, s: Switches, q: Tensor, seen: Encoded) -> tuple[Tensor, Tensor]:
    """Query tokens q [R, D] through the encoder's blocks, attending to the patches only. Returns
    the normed result [R, D] and the last layer's probabilities [R, heads, N+1]."""
    scale = math.sqrt(c.dino_width // c.dino_heads) * s.temperature
    for i in range(c.dino_layers):
        block = f"dino.encoder.layer.{i}."
        normed = layer_norm(p, block + "norm1", q)
        query = linear(p, block + "attention.attention.query", normed)
        query = query.unflatten(-1, (c.dino_heads, 1, -1))
        scores = (query * seen.keys[i]).sum(-1) / scale
        probabilities = attention_probabilities(scores, s.hard_attn_k)
        mixed = (probabilities[..., None] * seen.values[i]).sum(-2).flatten(-2)
        mixed = linear(p, block + "attention.output.dense", mixed)
        q = mlp_block(p, block, q + p[block + "layer_scale1.lambda1"] * mixed)
    return layer_norm(p, "dino.layernorm", q), probabilities


def read_shallow(
    p: Params, c: Sizes, s: Switches, q: Tensor, seen: Encoded
) -> tuple[Tensor, Tensor]:
    """One attention of q [R, D] over the final features; probabilities are [R, 1, N+1]."""
    scores = (seen.features * q[:, None]).sum(-1) / (math.sqrt(c.dino_width) * s.temperature)
    probabilities = attention_probabilities(scores, s.hard_attn_k)
    return (probabilities[..., None] * seen.features).sum(-2), probabilities[:, None]


def read_frames(
    p: Params, c: Sizes, s: Switches, queries: Tensor, seen: Encoded
) -> tuple[Tensor, Tensor]:
    """Reads every frame with its query [B, T, Q]: z [B, T, D], probabilities [B, T, heads, N+1]."""
    clips, frames = queries.shape[:2]
    read = read_deep if s.query_mode == "deep" else read_shallow
    q, probabilities = read(p, c, s, linear(p, "query_in", queries.flatten(0, 1)), seen)
    z = linear(p, "query_out", q)
    return z.unflatten(0, (clips, frames)), probabilities.unflatten(0, (clips, frames))


def entropy(probabilities: Tensor) -> Tensor:
    """Entropy in nats over the last axis; a probability of 0 adds neither value nor gradient."""
    present = torch.where(probabilities > 0, probabilities, torch.ones_like(probabilities))
    return -(probabilities * present.log()).sum(-1)


# ---------------------------------------------------------------------------------------------
# Language model
# ---------------------------------------------------------------------------------------------


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps) * gain


def rotate(x: Tensor, theta: float) -> Tensor:
    """Rotary positions 0, 1, 2, ... along the next to last axis of x [..., rows, d]: the pair
    (i, i + d/2) turns by position * theta^(-2i/d)."""
    rows, d = x.shape[-2:]
    steps = torch.arange(0, d, 2, dtype=x.dtype) / d
    angle = torch.arange(rows, dtype=x.dtype)[:, None] * theta**-steps
    low, high = x.chunk(2, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


def language_model(p: Params, c: Sizes, x: Tensor) -> Tensor:
    """Input vectors [B, rows, M] to hidden states after the final norm."""
    for i in range(c.lm_layers):
        block = f"lm.model.layers.{i}."
        normed = rms_norm(x, p[block + "input_layernorm.weight"], c.lm_rms_eps)
        query = heads_first(linear(p, block + "self_attn.q_proj", normed), c.lm_heads)
        key = heads_first(linear(p, block + "self_attn.k_proj", normed), c.lm_kv_heads)
        value = heads_first(linear(p, block + "self_attn.v_proj", normed), c.lm_kv_heads)
        shared = c.lm_heads // c.lm_kv_heads  # neighbouring query heads share a key head
        key = rotate(key, c.lm_rope_theta).repeat_interleave(shared, dim=1)
        value = value.repeat_interleave(shared, dim=1)
        query = rotate(query, c.lm_rope_theta)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + linear(p, block + "self_attn.o_proj", heads_last(mixed))
        normed = rms_norm(x, p[block + "post_attention_layernorm.weight"], c.lm_rms_eps)
        gate = F.silu(linear(p, block + "mlp.gate_proj", normed))
        up = linear(p, block + "mlp.up_proj", normed)
        x = x + linear(p, block + "mlp.down_proj", gate * up)
    return rms_norm(x, p["lm.model.norm.weight"], c.lm_rms_eps)


def visual_tokens(p: Params, z: Tensor) -> Tensor:
    """z [B, T, D] as LM inputs [B, T, M], each frame rescaled to one standard deviation."""
    v = linear(p, "dino_to_lm", z)
    return v * (TOKEN_STD / (v.std(-1, keepdim=True) + 1e-6))


# ---------------------------------------------------------------------------------------------
# Prediction head
# ---------------------------------------------------------------------------------------------


def predict(p: Params, hidden: Tensor, previous: Tensor) -> Tensor:
    """Latents [R, 4, s, s] from the hidden states [R, M] and latents of the frames before."""

    def conv(i: int, x: Tensor) -> Tensor:
        return F.conv2d(x, p[f"head.conv{i}.weight"], p[f"head.conv{i}.bias"], padding=1)

    features = conv(3, F.gelu(conv(2, F.gelu(conv(1, previous)))))
    film = linear(p, "head.film2", F.gelu(linear(p, "head.film1", hidden)))
    gamma, beta = film[..., None, None].chunk(2, dim=1)
    return conv(6, F.gelu(conv(5, F.gelu(conv(4, gamma * features + beta)))))


# ---------------------------------------------------------------------------------------------
# The two passes
# ---------------------------------------------------------------------------------------------


@dataclass
class Pass:
    hidden: Tensor  # [B, 1 + T, M]: after the mode token and after each visual token
    z: Optional[Tensor]  # [B, T, D]; None without vision
    probabilities: Optional[Tensor]  # [B, T, heads, N+1]


def run_pass(
    p: Params,
    c: Sizes,
    s: Switches,
    mode: str,
    text: Tensor,
    queries: Optional[Tensor],
    seen: Optional[Encoded],
    frames: int,
) -> Pass:
    """One reading of all frames: text [B, rows, M], queries [B, T, Q]."""
    clips, rows, width = text.shape
    if s.vision:
        z, probabilities = read_frames(p, c, s, queries, seen)
        tokens = visual_tokens(p, z)
    else:
        z = probabilities = None
        tokens = text.new_zeros(clips, frames, width)
    token = p["mode_" + mode].expand(clips, 1, width)
    hidden = language_model(p, c, torch.cat([text, token, tokens], dim=1))
    return Pass(hidden[:, rows:], z, probabilities)


def frame_errors(p: Params, hidden: Tensor, latents: Tensor) -> Tensor:
    """Mean squared error [B, T] of predicting each frame's latents [B, T, 4, s, s]."""
    clips, frames = latents.shape[:2]
    first = p["latent_init"].expand(clips, 1, -1, -1, -1)
    previous = torch.cat([first, latents[:, :-1]], dim=1)
    predicted = predict(p, hidden[:, :-1].flatten(0, 1), previous.flatten(0, 1))
    error = predicted.unflatten(0, (clips, frames)) - latents
    return error.square().mean((2, 3, 4))


def repeat_query(query: Tensor, clips: int, frames: int) -> Tensor:
    return query.expand(clips, frames, -1)


def same_length(
    p: Params,
    c: Sizes,
    s: Switches,
    frames: Tensor,
    latents: Tensor,
    tokens: Optional[Tensor] = None,
    chosen: Optional[Tensor] = None,
) -> dict[str, Tensor]:
    """Both passes over clips whose texts have one length.

    frames [B, T, S, S, 3] bytes, latents [B, T, 4, s, s], tokens [B, length] under captions.
    `chosen` [B, T-1, Q] replaces the queries that the coarse pass chooses. Everything returned is
    per clip and frame, [B, T]; also `map_fine` and `map_coarse` [B, T, N+1] and `chosen`.
    """
    clips, count = latents.shape[:2]
    if s.text == "captions":
        text = F.embedding(tokens, p["lm.model.embed_tokens.weight"])
    else:
        text = p["no_text"].expand(clips, 1, -1)

    seen = queries = None
    if s.vision:
        seen = encode(p, c, frames)
        queries = repeat_query(p["q_static"], clips, count)
    coarse = run_pass(p, c, s, "coarse", text, queries, seen, count)

    if s.vision:
        queries = repeat_query(p["q_init"], clips, 1)
        if count > 1:
            if chosen is None:
                chosen = linear(p, "lm_to_query", coarse.hidden[:, 1:-1])
            queries = torch.cat([queries, chosen], dim=1)
    fine = run_pass(p, c, s, "fine", text, queries, seen, count)

    found = {
        "loss_fine": frame_errors(p, fine.hidden, latents),
        "loss_coarse": frame_errors(p, coarse.hidden, latents),
    }
    if s.vision:
        lengths = coarse.z.norm(dim=-1) * fine.z.norm(dim=-1)
        found["cosine"] = (coarse.z * fine.z).sum(-1) / lengths.clamp(min=1e-8)
        for name, side in (("fine", fine), ("coarse", coarse)):
            found["entropy_" + name] = entropy(side.probabilities).mean(-1)
            found["map_" + name] = side.probabilities.mean(-2)
    else:
        for name in ("cosine", "entropy_fine", "entropy_coarse"):
            found[name] = latents.new_zeros(clips, count)
    if chosen is not None:
        found["chosen"] = chosen
    return found


def clip_by_clip(
    p: Params,
    c: Sizes,
    s: Switches,
    frames: Tensor,
    latents: Tensor,
    tokens: Tensor,
    token_count: Tensor,
    chosen: Optional[Tensor] = None,
) -> dict[str, Tensor]:
    """`same_length` for texts of any lengths: every clip alone, the results put together."""
    alone = []
    for b in range(latents.shape[0]):
        one = slice(b, b + 1)
        alone.append(
            same_length(
                p,
                c,
                s,
                frames[one],
                latents[one],
                tokens[one, : int(token_count[b])],
                None if chosen is None else chosen[one],
            )
        )
    return {name: torch.cat([clip[name] for clip in alone]) for name in alone[0]}


# ---------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------


def hinge_inputs(found: dict[str, Tensor], s: Switches) -> Tensor:
    """Per clip [B]: how far the fine pass's entropy is from staying a margin below the coarse
    pass's; only what is above 0 costs."""
    return found["entropy_fine"].mean(1) - found["entropy_coarse"].mean(1) + s.entropy_margin


def step_measures(found: dict[str, Tensor], s: Switches) -> dict[str, Tensor]:
    """The scalars of a training step; `loss_total` is what is minimised."""
    fine, coarse = found["loss_fine"].mean(), found["loss_coarse"].mean()
    total = fine + s.lambda_coarse * coarse
    if s.vision and s.contrastive != 0:
        total = total + s.contrastive * found["cosine"].mean()
    if s.vision and s.entropy_margin > 0:
        total = total + HINGE_WEIGHT * F.relu(hinge_inputs(found, s)).mean()
    return {
        "loss_fine": fine,
        "loss_coarse": coarse,
        "loss_total": total,
        "ratio": fine / coarse,
        "feature_sim": found["cosine"].mean(),
        "entropy_fine": found["entropy_fine"].mean(),
        "entropy_coarse": found["entropy_coarse"].mean(),
    }


def clip_gradients(trained: list[Tensor]) -> Tensor:
    """Scales the gradients to a global norm of at most 1; returns the norm before that."""
    norm = torch.stack([p.grad.square().sum() for p in trained]).sum().sqrt()
    factor = torch.clamp(1 / (norm + 1e-6), max=1.0)
    for p in trained:
        p.grad.mul_(factor)
    return norm
