"""Numbers and directions as words."""
import numpy as np

COUNTS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def number(value, digits=4):
    return f"{value:.{digits}f}" if np.isfinite(value) else "-"


def signed(value, digits=4):
    if not np.isfinite(value):
        return "-"
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")


def span(e, digits=4, show=number):
    """An estimate's interval; "-" without one."""
    if not np.isfinite(e.half):
        return "-"
    return f"{show(e.low, digits)} to {show(e.high, digits)}"


def count(n, noun):
    """one seed, 12 clips"""
    return f"{COUNTS[n] if n < len(COUNTS) else n} {noun}{'' if n == 1 else 's'}"


def percent(value):
    return f"{100 * abs(value):.2f} %" if abs(value) < 0.1 else f"{100 * abs(value):.0f} %"


def better(value, words=("better", "worse")):
    return words[0] if value < 0 else words[1]


def direction(e, words=("better", "worse")):
    """A relative change in words, with its interval: "better by 0.34 % (95 % interval 0.21 to
    0.47 %)". Negative is better."""
    text = f"{better(e.value, words)} by {percent(e.value)}"
    if not np.isfinite(e.half):
        return text
    if e.excludes(0):
        ends = sorted((abs(e.low), abs(e.high)))
        return text + f" (95 % interval {percent(ends[0])[:-2]} to {percent(ends[1])})"
    return (text + f" (95 % interval from {percent(e.low)} {words[0]} to {percent(e.high)} "
            f"{words[1]})")


def listing(names):
    names = list(names)
    return ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else "".join(names)


def duration(seconds):
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


INTERVENTIONS = ("temperature", "contrastive", "freeze_dino", "hard_attn_k", "entropy_margin",
                 "query_mode", "vision")
MEANING = {
    "temperature": "attention scores are divided by {}",
    "contrastive": "{} × cosine of coarse and fine features is added to the loss",
    "freeze_dino": "the encoder keeps its start weights",
    "freeze_lm": "the language model keeps its start weights",
    "hard_attn_k": "only the {} best of 256 patches are read (other grids keep the share)",
    "entropy_margin": "fine attention is to be {} nats sharper than coarse",
    "query_mode": "the query reads in {} mode",
    "vision": "visual tokens are zero",
    "steps": "trains for {} steps",
    "lr": "learning rate {}",
}


def meaning(key, value):
    if key in ("freeze_dino", "freeze_lm") and value in ("0", "False"):
        return f"{key} is off"
    if key == "vision" and value not in ("0", "False"):
        return "the frames are seen"
    return MEANING.get(key, key + " is {}").format(value)
