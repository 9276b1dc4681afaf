"""Attention maps as sheets of tiles and as animations.

All maps share one scale: attention of a patch relative to an even spread over the patches,
logarithmic, from LOW to the number of patches but at most HIGH. cividis grows steadily in
brightness: it reads the same with any colour vision and in grey.
"""
import functools

import matplotlib
import numpy as np
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

from .figures import WIDTH, Picture, dress, marker, pyplot, save, style

LOW, HIGH = 1 / 8, 32
TILE, GAP, LABEL = 84, 4, 150   # pixels
COLUMNS = 8                     # frames or steps shown in a sheet
STEPS = 6                       # training steps shown in the animation
ROWS = 12                       # experiments shown in a sheet


def colours(name, at):
    """RGB bytes of values from 0 to 1."""
    return table(name)[np.round(np.asarray(at) * 255).astype(int)]


@functools.lru_cache(maxsize=None)
def table(name):
    return np.round(matplotlib.colormaps[name](np.arange(256))[:, :3] * 255).astype(np.uint8)


@functools.lru_cache(maxsize=None)
def font(size):
    return ImageFont.truetype(font_manager.findfont("DejaVu Sans"), size)


def fitting(text, width, size):
    """The largest font up to `size` in which the text is no wider."""
    while size > 7 and font(size).getlength(text) > width:
        size -= 1
    return font(size)


def spread(count, most):
    """Up to `most` places of `count`, evenly, with the first and the last."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))


def top_of(patches):
    return float(min(HIGH, max(2, patches)))


def heat(values, patches, size=TILE):
    """values [y, x], attention that adds up to 1 with the CLS share, as an RGB tile."""
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.log(np.asarray(values, dtype=float) * patches / LOW)
    relative /= np.log(top_of(patches) / LOW)
    return enlarged(colours("cividis", np.clip(relative, 0, 1)), size)


def enlarged(rgb, size=TILE, smooth=False):
    """Bytes [y, x, 3] as a square tile: map cells stay cells."""
    image = Image.fromarray(np.ascontiguousarray(rgb))
    return image.resize((size, size), Image.LANCZOS if smooth else Image.NEAREST)


def signed(values, size=TILE):
    """Difference of two maps: orange is positive and bears a plus, purple negative and a minus
    where it is more than half as large as the largest."""
    most = np.abs(values).max() or 1.0
    tile = enlarged(colours("PuOr_r", 0.5 + values / most / 2), size)
    draw = ImageDraw.Draw(tile)
    height, width = values.shape
    for y, x in np.argwhere(np.abs(values) > most / 2):
        centre = ((x + 0.5) * size / width, (y + 0.5) * size / height)
        dark = sum(tile.getpixel((int(centre[0]), int(centre[1])))) < 300
        draw.text(centre, "+" if values[y, x] > 0 else "−", anchor="mm",
                  fill="white" if dark else "black",
                  font=font(max(9, min(16, size // width))))
    return tile


def bar(width, patches):
    """The scale of the maps with its values."""
    top = top_of(patches)
    image = Image.new("RGB", (width, 46), "white")
    draw = ImageDraw.Draw(image)
    left, length = LABEL, min(360, width - LABEL - 60)
    shades = colours("cividis", np.linspace(0, 1, length))
    image.paste(Image.fromarray(np.ascontiguousarray(np.broadcast_to(shades, (13, length, 3)))),
                (left, 6))
    draw.text((4, 4), "attention × patches\n(1: an even spread)", fill="black", font=font(11))
    value = LOW
    while value <= top:
        x = left + length * np.log(value / LOW) / np.log(top / LOW)
        text = f"{value:g}" if value >= 1 else f"1/{1 / value:g}"
        draw.line([(x, 18), (x, 22)], fill="black")
        draw.text((x, 24), text, fill="black", font=font(11), anchor="ma")
        value *= 2 if value * 2 > top or value < 1 else 4 if value * 4 <= top else 2
    return image


def sheet(rows, columns, title=None, patches=None):
    """rows: [(label, [tile, ...])]; tiles may be None. Labels of two lines are fine."""
    head = (22 if title else 0) + 18
    wide = max(len(tiles) for _, tiles in rows)
    size = (LABEL + wide * (TILE + GAP), head + len(rows) * (TILE + GAP))
    image = Image.new("RGB", (size[0], size[1] + (46 if patches else 0)), "white")
    draw = ImageDraw.Draw(image)
    if title:
        draw.text((4, 3), title, fill="black", font=font(13))
    longest = max(columns, key=len)
    for i, text in enumerate(columns):
        draw.text((LABEL + i * (TILE + GAP) + TILE / 2, head - 4), text, fill="black",
                  font=fitting(longest, TILE + GAP - 2, 12), anchor="ms")
    for j, (label, tiles) in enumerate(rows):
        y = head + j * (TILE + GAP)
        draw.multiline_text((4, y + TILE / 2), label, fill="black", font=font(13), anchor="lm")
        for i, tile in enumerate(tiles):
            if tile is not None:
                image.paste(tile, (LABEL + i * (TILE + GAP), y))
    if patches:
        image.paste(bar(size[0], patches), (0, size[1]))
    return image


class Maps:
    """Maps of one seed: attention [experiment, map_step, pass, clip, frame, y, x] as arrays."""

    def __init__(self, attention, findings):
        self.data = attention.isel(seed=0)
        self.seed = int(attention.seed[0])
        order = [r for r in findings.results if r.name in self.data.experiment.values]
        values = self.data["map"].transpose("experiment", "map_step", "pass", "clip", "frame",
                                            "y", "x")
        self.values = values.sel(experiment=[r.name for r in order]).values
        self.cls = self.data.cls.transpose("experiment", "map_step", "pass", "clip",
                                           "frame").sel(experiment=[r.name for r in order]).values
        there = np.isfinite(self.values[:, :, 0, 0, 0, 0, 0])
        keep = there.any(axis=1)
        self.results = [r for r, k in zip(order, keep) if k]
        self.values, self.cls, self.there = self.values[keep], self.cls[keep], there[keep]
        self.steps = self.data.map_step.values
        self.frames, self.clips = self.data.frame.values, self.data["clip"].values
        self.patches = self.data.sizes["y"] * self.data.sizes["x"]
        self.pixels = self.data.pixels.values

    def last(self, e):
        """Place of an experiment's last map."""
        return int(np.flatnonzero(self.there[e])[-1])

    def tile(self, e, step, which, clip, frame):
        return heat(self.values[e, step, which, clip, frame], self.patches)

    def picture(self, clip, frame):
        return enlarged(self.pixels[clip, frame], smooth=True)

    def apart(self, e):
        """[clip, frame]: half the summed difference of both passes' last maps: 0 the same place,
        1 nothing in common."""
        values, cls = self.values[e, self.last(e)], self.cls[e, self.last(e)]
        return 0.5 * (np.abs(values[1] - values[0]).sum(axis=(-2, -1)) + np.abs(cls[1] - cls[0]))


def one_scale(maps):
    return (f"One scale for all maps: attention of a patch times {maps.patches} patches, so that 1 "
            "is an even spread; bright is looked at.")


def grid(maps, clip, folder):
    """Both passes over the frames of one clip, every experiment."""
    frames = spread(len(maps.frames), COLUMNS)
    rows = [("frames", [maps.picture(clip, t) for t in frames])]
    for e, r in enumerate(maps.results[:ROWS]):
        for which, name in enumerate(("coarse", "fine")):
            rows.append((f"{r.name}\n{name}", [maps.tile(e, maps.last(e), which, clip, t)
                                               for t in frames]))
    number = maps.clips[clip]
    name = f"attention_clip{number}.png"
    sheet(rows, [str(maps.frames[t]) for t in frames],
          f"held-out clip {number}, seed {maps.seed}, last maps; columns: frames",
          maps.patches).save(folder / name)
    return Picture(name, f"Where the queries look in held-out clip {number}, at the end of "
                   f"training, seed {maps.seed}. {one_scale(maps)} Rows of a pair that look the "
                   "same: the chosen query reads what the fixed one reads. The fine pass reads "
                   "frame 1 with a learned query, the later ones with chosen queries.")


def over_training(maps, clip, frame, folder):
    """Fine maps of one frame while training goes on."""
    steps = spread(len(maps.steps), COLUMNS)
    rows = [("the frame", [maps.picture(clip, frame)])]
    for e, r in enumerate(maps.results[:ROWS]):
        for which, name in enumerate(("coarse", "fine")):
            tiles = [maps.tile(e, s, which, clip, frame) if maps.there[e, s] else None
                     for s in steps]
            rows.append((f"{r.name}\n{name}", tiles))
    sheet(rows, [str(maps.steps[s]) for s in steps],
          f"held-out clip {maps.clips[clip]}, frame {maps.frames[frame]}, seed {maps.seed}; "
          "columns: training steps", maps.patches).save(folder / "attention_training.png")
    return Picture("attention_training.png",
                   f"How the attention to frame {maps.frames[frame]} of clip {maps.clips[clip]} "
                   f"forms over training steps. {one_scale(maps)}")


def apart(maps, folder):
    """How far the passes look apart, frame by frame, and where most."""
    figure, axes = pyplot.subplots(figsize=(WIDTH * 0.8, 3.2), layout="constrained")
    rows = []
    for e, r in enumerate(maps.results):
        distance = maps.apart(e)
        axes.plot(maps.frames, distance.mean(axis=0), marker=marker(r.index), markersize=5,
                  label=r.name, **style(r.index))
        clip, frame = np.unravel_index(distance.argmax(), distance.shape)
        both = maps.values[e, maps.last(e), :, clip, frame]
        rows.append((f"{r.name}\nclip {maps.clips[clip]}, frame {maps.frames[frame]}\n"
                     f"distance {distance[clip, frame]:.2f}",
                     [maps.picture(clip, frame), heat(both[0], maps.patches),
                      heat(both[1], maps.patches), signed(both[1] - both[0])]))
    axes.axvspan(0.5, 1.5, color="0.95", zorder=0)
    axes.set_xlim(0.5, maps.frames[-1] + 0.5)
    axes.set_ylim(0, None)
    axes.xaxis.get_major_locator().set_params(integer=True)
    dress(axes, "how far apart the passes look (0: same place, 1: nothing in common)", "frame",
          "total variation distance")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), handlelength=3.5)
    sheet(rows[:ROWS], ["frame", "coarse", "fine", "fine − coarse"], None,
          maps.patches).save(folder / "apart_maps.png")
    return [
        Picture(save(figure, folder, "apart.png"),
                f"Distance between the coarse and the fine query's attention, mean over "
                f"{len(maps.clips)} clips, seed {maps.seed}. Grey: frame 1, where both "
                "passes read with learned queries. A distance to the right of it comes from the "
                "choice, or from two constant queries that differ: the control with another "
                "clip's queries tells which."),
        Picture("apart_maps.png",
                "The frame in which each experiment's passes look farthest apart. In the last "
                "column orange and + is where the fine query looks more, purple and − where "
                "less; its colours are scaled for each row.")]


def animation(maps, clip, folder, name="attention.gif"):
    """Frames of one clip over training steps, experiments side by side."""
    chosen = list(enumerate(maps.results))[:COLUMNS]
    pictures = []
    for s in spread(len(maps.steps), STEPS):
        for t in range(len(maps.frames)):
            rows = [("frame", [maps.picture(clip, t)] * len(chosen))]
            rows += [(label, [maps.tile(e, s, which, clip, t) if maps.there[e, s] else None
                              for e, _ in chosen])
                     for which, label in enumerate(("coarse", "fine"))]
            pictures.append(sheet(
                rows, [r.name for _, r in chosen],
                f"clip {maps.clips[clip]}, after {maps.steps[s]} steps, "
                f"frame {maps.frames[t]} of {len(maps.frames)}", maps.patches))
    write_gif(pictures, folder / name)
    return Picture(name, "The same clip frame by frame, after more and more training steps. "
                   + one_scale(maps))


def write_gif(pictures, path, milliseconds=350):
    """One palette for all pictures, so that a colour keeps its meaning: the map's, and what the
    pictures hold besides."""
    sample = Image.new("RGB", (pictures[0].width, pictures[0].height * 3))
    for i, at in enumerate((0, len(pictures) // 2, len(pictures) - 1)):
        sample.paste(pictures[at], (0, i * pictures[0].height))
    found = sample.quantize(colors=192, method=Image.MEDIANCUT)
    palette = Image.new("P", (1, 1))
    palette.putpalette(table("cividis")[::4].ravel().tolist() + found.getpalette()[:3 * 192])
    frames = [p.quantize(palette=palette, dither=Image.FLOYDSTEINBERG) for p in pictures]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=milliseconds, loop=0,
                   optimize=False)


def all_maps(attention, findings, folder):
    """(pictures for the page, pictures of more clips); both empty without maps."""
    maps = Maps(attention, findings) if attention is not None else None
    if maps is None or not maps.results:
        return [], []
    clip, frame = 0, len(maps.frames) - 1
    first = [grid(maps, clip, folder), over_training(maps, clip, frame, folder),
             *apart(maps, folder), animation(maps, clip, folder)]
    return first, [grid(maps, c, folder) for c in range(1, len(maps.clips))]
