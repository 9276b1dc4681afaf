"""The published study: seven single runs, measured on training batches."""

SETUP = {"device": "RTX 4090", "batch": "2", "steps": "1500", "seeds": "1", "scale": "seed",
         "lr": "3e-05", "text": "none"}

# experiment: (ratio, feature similarity, verdict)
ROWS = {
    "D_freeze_dino": (0.9966, 0.4300, "winner: best ratio, good differentiation"),
    "B_temp_0.1": (0.9987, 0.9266, "moderate improvement"),
    "G_combined_best": (0.9987, -0.5251, "same as temperature, more complexity"),
    "C_contrastive": (1.0000, -0.9993, "most differentiation, no prediction gain"),
    "F_entropy_reg": (1.0000, 0.9841, "no impact"),
    "A_baseline": (1.0001, 0.9913, "features collapsed"),
    "E_hard_attn_32": (1.0001, 0.9771, "no impact"),
}
