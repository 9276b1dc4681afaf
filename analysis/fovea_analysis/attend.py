"""The animation of what `./fovea attend` has written: frame, coarse and fine attention."""
import h5py
import numpy as np
from PIL import Image, ImageDraw

from .load import Unreadable, array
from .maps import bar, colours, enlarged, font, top_of, write_gif, LOW

PANEL = 256       # pixels per side of a panel
GAP, HEAD = 8, 44
SHARE = 0.6       # of the map's colour in a panel, over the grey frame


def read(path):
    """(attributes, map [clip, pass, frame, y, x], pixels [clip, frame, y, x, 3], first frames)."""
    if not path.exists():
        raise Unreadable(f"{path}: no such file; ./fovea attend OUT/NAME VIDEO writes it")
    try:
        with h5py.File(path, "r") as file:
            if file.attrs.get("format") != "fovea-attention":
                raise Unreadable(f"{path}: is no file of ./fovea attend")
            if file.attrs["format_version"] != 1:
                raise Unreadable(f"{path}: has format version {file.attrs['format_version']}; "
                                 "this program reads version 1")
            return dict(file.attrs), file["map"][()], file["pixels"][()], array(file["clip"])
    except (OSError, KeyError) as error:
        raise Unreadable(f"{path}: cannot be read: {error}".replace("\n", " ")) from error


def over(values, picture):
    """A map over its frame: the frame in grey, the map as smooth colour."""
    patches = values.size
    with np.errstate(divide="ignore"):
        at = np.log(values.astype(float) * patches / LOW) / np.log(top_of(patches) / LOW)
    heat = Image.fromarray((np.clip(at, 0, 1) * 255).round().astype(np.uint8))
    heat = np.asarray(heat.resize((PANEL, PANEL), Image.BICUBIC)) / 255
    colour = Image.fromarray(np.ascontiguousarray(colours("cividis", heat)))
    return Image.blend(picture.convert("L").convert("RGB"), colour, SHARE)


def scene(about, both, pixels, text):
    """Frame, coarse and fine side by side; both [pass, y, x]."""
    picture = enlarged(pixels, PANEL, smooth=True)
    panels = [("frame", picture), ("coarse: one fixed query", over(both[0], picture)),
              ("fine: chosen queries", over(both[1], picture))]
    width = 3 * PANEL + 4 * GAP
    image = Image.new("RGB", (width, HEAD + PANEL + 52), "white")
    draw = ImageDraw.Draw(image)
    draw.text((GAP, 4), f"{about['experiment']}, seed {about['seed']}", fill="black", font=font(14))
    draw.text((width - GAP, 4), text, fill="black", font=font(14), anchor="ra")
    for i, (label, panel) in enumerate(panels):
        x = GAP + i * (PANEL + GAP)
        draw.text((x, HEAD - 4), label, fill="black", font=font(13), anchor="ls")
        image.paste(panel, (x, HEAD))
    image.paste(bar(width, both[0].size), (0, HEAD + PANEL + 6))
    return image


def draw(path, out):
    """Writes the GIF; returns a line that says so."""
    about, values, pixels, first = read(path)
    scenes = []
    for c in range(values.shape[0]):
        for t in range(values.shape[2]):
            frame = int(first[c]) + t * int(about["stride"])
            scenes.append(scene(about, values[c, :, t], pixels[c, t],
                                f"{about['video']}, frame {frame}"))
    write_gif(scenes, out, milliseconds=250)
    return f"{out}: {len(scenes)} frames"
