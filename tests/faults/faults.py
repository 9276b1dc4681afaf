"""The faults that `run` plants: exact text of the source and what takes its place.

Each must match its file exactly once; a fault that no longer does must be brought up to date with
the source, not dropped. They are errors that leave a program which runs, trains and looks well.
"""

from typing import NamedTuple


class Edit(NamedTuple):
    file: str
    old: str
    new: str


class Fault(NamedTuple):
    name: str
    edits: list


MODEL, STEP = "src/model/model.c", "src/model/step.c"
LM, QUERY = "src/model/lm.c", "src/model/query.c"
ENCODER, HEAD, PARAMS = "src/model/encoder.c", "src/model/head.c", "src/model/params.c"

HINGE_CALL = """m->c.frames, t->entropy[FV_FINE], t->entropy[FV_COARSE],
                       m->c.entropy_margin, hinge_weight, t->hinge, t->dentropy[FV_FINE],
                       t->dentropy[FV_COARSE]);"""
HINGE_SWAPPED = """m->c.frames, t->entropy[FV_COARSE], t->entropy[FV_FINE],
                       m->c.entropy_margin, hinge_weight, t->hinge, t->dentropy[FV_COARSE],
                       t->dentropy[FV_FINE]);"""


def one(name: str, file: str, old: str, new: str) -> Fault:
    return Fault(name, [Edit(file, old, new)])


FAULTS = [
    # --- optimizer ---
    one(
        "no weight decay",
        "src/backend/cpu_optimizer.c",
        "(real)(1 - rates[0] * a->weight_decay)",
        "1",
    ),
    one("no clipping", "src/backend/cpu_optimizer.c", "(real)(clip < 1 ? clip : 1)", "1"),
    one(
        "no bias correction of the mean",
        "src/backend/cpu_optimizer.c",
        "(real)(rates[0] / rates[1])",
        "(real)rates[0]",
    ),
    one(
        "a clip factor of at least 1",
        "src/backend/cpu_optimizer.c",
        "clip < 1 ? clip : 1",
        "clip > 1 ? clip : 1",
    ),
    # --- between the passes ---
    one(
        "no gradient from the fine into the coarse pass",
        STEP,
        "if (pass == FV_COARSE && m->c.vision && m->c.frames > 1)",
        "if (pass == FV_PASSES)",
    ),
    Fault(
        "mode tokens swapped",
        [
            Edit(STEP, "m->mode[pass].w", "m->mode[1 - pass].w"),
            Edit(STEP, "m->mode[pass].g", "m->mode[1 - pass].g"),
        ],
    ),
    one(
        "frames predicted from their own token",
        MODEL,
        "m->rows.before, f, first + t)",
        "m->rows.before, f, first + 1 + t)",
    ),
    one(
        "coarse loss at full weight in the gradient",
        STEP,
        "pass == FV_FINE ? 1.0 : m->c.lambda_coarse",
        "1.0",
    ),
    one(
        "queries chosen one frame early",
        MODEL,
        "m->rows.chooser, b * (frames - 1) + t, first + 1 + t)",
        "m->rows.chooser, b * (frames - 1) + t, first + t)",
    ),
    # --- query ---
    one(
        "one head's temperature",
        "src/backend/cpu_query.c",
        "scores_of(s->keys, s->width, stride, (real)s->scale,",
        "scores_of(s->keys, s->width, stride, (real)s->scale * (h == 1 ? 2 : 1),",
    ),
    one("temperature ignored", QUERY, " * c->temperature)", ")"),
    one("top-k keeps one too few", QUERY, "= c->hard_attn_k}", "= c->hard_attn_k - 1}"),
    one(
        "top-k keeps one too many",
        QUERY,
        "= c->hard_attn_k}",
        "= c->hard_attn_k + (c->hard_attn_k > 0)}",
    ),
    one("bias of query_out not added", QUERY, "q->out_w.w, q->out_b.w", "q->out_w.w, NULL"),
    one(
        "bias of the query's output projection not trained",
        QUERY,
        "w->o_w.g,\n                         w->o_b.g)",
        "w->o_w.g,\n                         NULL)",
    ),
    one(
        "no gradient from the query into keys and values",
        QUERY,
        "e->dk[l], e->dv[l]);",
        "NULL, NULL);",
    ),
    one(
        "no gradient of the entropy",
        QUERY,
        "l + 1 == layers ? dprobs : NULL",
        "l > layers ? dprobs : NULL",
    ),
    # --- stored outputs of a frozen encoder ---
    one(
        "bias of the values not added after the sum",
        QUERY,
        "pooled, w->v_w.w, w->v_b.w, a->att",
        "pooled, w->v_w.w, NULL, a->att",
    ),
    one(
        "gradient of the absorbed query through the values' weights",
        QUERY,
        "q->dabsorbed, w->k_w.w, NULL, q->dq",
        "q->dabsorbed, w->v_w.w, NULL, q->dq",
    ),
    one(
        "every clip's outputs in the first one's place",
        STEP,
        "fv_encoded_at(m, m->encoded, (i * m->c.clips + b) * n)",
        "fv_encoded_at(m, m->encoded, i * m->c.clips * n)",
    ),
    # --- what the passes share ---
    one(
        "only the last pass's gradient of the text",
        STEP,
        "if (first || !m->c.share_text)",
        "if (first || last)",
    ),
    one(
        "only the last pass's gradient of the shared convolutions",
        STEP,
        "m->c.share_convolutions && pass == FV_COARSE",
        "pass == FV_PASSES",
    ),
    # --- further terms ---
    one("hinge with the passes swapped", STEP, HINGE_CALL, HINGE_SWAPPED),
    one(
        "contrastive term summed over frames",
        STEP,
        "m->c.contrastive / (double)frames",
        "m->c.contrastive",
    ),
    one(
        "no contrastive gradient into the coarse pass",
        STEP,
        "ops->add(m->be, frames * d, m->dz_coarse, q->dz);",
        ";",
    ),
    one(
        "visual tokens rescaled without its gradient",
        STEP,
        "ops->rescale_back(m->be, frames, w, visual_scale, m->visual_in[pass], "
        "m->visual_std[pass],\n                      m->dvisual, m->dvisual_in);",
        "ops->copy(m->be, frames * w, m->dvisual, m->dvisual_in);",
    ),
    # --- encoder ---
    one("epsilon of LayerNorm", "src/model/encoder.h", "_EPS 1e-6", "_EPS 1e-5"),
    one(
        "mean term missing in the gradient of LayerNorm",
        "src/backend/cpu_norm.c",
        "dx[i] += rstd * (gamma[i] * dy[i] - sum - (x[i]",
        "dx[i] += rstd * (gamma[i] * dy[i] - (x[i]",
    ),
    one(
        "bias of the encoder's MLP not added",
        ENCODER,
        "w->fc1_w.w, w->fc1_b.w, a->f1",
        "w->fc1_w.w, NULL, a->f1",
    ),
    one(
        "bias of the encoder's MLP not trained",
        ENCODER,
        "w->fc2_w.g, w->fc2_b.g)",
        "w->fc2_w.g, NULL)",
    ),
    Fault(
        "frozen encoder trained",
        [
            Edit(MODEL, "c->vision && c->freeze_dino ? FV_FROZEN : visual", "visual"),
            Edit(MODEL, ".trained = config->vision && !config->freeze_dino", ".trained = config->vision"),
        ],
    ),
    # --- language model ---
    one(
        "residual missing after the LM's MLP",
        LM,
        "ops->residual(m->be, n, d, a->mid, NULL, a->m, y);",
        "ops->copy(m->be, n * d, a->m, y);",
    ),
    one(
        "queries not rotated back",
        LM,
        "m->c.lm_rope_theta, true, lm->dq);",
        "m->c.lm_rope_theta, false, lm->dq);",
    ),
    one(
        "keys not rotated back",
        LM,
        "m->c.lm_rope_theta, true, dk);",
        "m->c.lm_rope_theta, false, dk);",
    ),
    one(
        "no gradient into the text's values",
        LM,
        "lm->dv, lm->text_to_keys, text->dv[l], NULL,\n                       true);",
        "lm->dv, lm->text_to_keys, text->dv[l], NULL,\n                       false);",
    ),
    one(
        "padding is seen",
        LM,
        ".causal = true,\n                         .first = m->lm.first}",
        ".causal = true,\n                         .first = NULL}",
    ),
    one(
        "query heads read another group's keys",
        "src/backend/cpu_attention.c",
        "size_t key_at = (b * a->keys + first) * ks + g * a->width;",
        "size_t key_at = (b * a->keys + first) * ks + (a->kv_heads - 1 - g) * a->width;",
    ),
    # --- prediction head ---
    one(
        "no gradient of latent_init",
        HEAD,
        "h->latent_init.g, m->rows.zeros, true);",
        "h->da, m->rows.zeros, false);",
    ),
    one(
        "no gradient of the modulation's beta",
        "src/backend/cpu_image.c",
        "dgb[c + i] += dy[i];",
        "dgb[c + i] += 0 * dy[i];",
    ),
    one(
        "bias of a convolution not trained",
        HEAD,
        "h->conv_w[i].g,\n                          h->conv_b[i].g)",
        "h->conv_w[i].g,\n                          i == 3 ? NULL : h->conv_b[i].g)",
    ),
    one(
        "previous latents of another clip",
        MODEL,
        "m->rows.initial, b, b * frames)",
        "m->rows.initial, b, b * frames + (b > 0 && frames > 1))",
    ),
    # --- parameters ---
    one(
        "convolutions in the file's layout in memory",
        PARAMS,
        "if (!p->channels_last) {\n        be->ops->upload",
        "if (p->count) {\n        be->ops->upload",
    ),
    one("start values without the name", PARAMS, "fv_stream(seed, p->name)", 'fv_stream(seed, "")'),
    one("LM start values too large", LM, "norm ? 1 : 0.02", "norm ? 1 : 0.03"),
    one(
        "another clip's queries are one's own",
        STEP,
        "fine_with(m, m->bank, t->loss_other);",
        "fine_with(m, chosen_queries(m), t->loss_other);",
    ),
]
