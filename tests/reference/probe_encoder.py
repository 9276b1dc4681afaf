"""Linear probe of an encoder's frozen patch features: which object covers this patch?

    python3 tests/reference/probe_encoder.py [FOLDER] [--fovea ./fovea] [--seeds 101 102 103]

Draws procedural clips with masks from seeds that pretraining (data_seed 1) and the study (0) never
saw, computes every patch's features with transformers' own Dinov2Model, and fits a multinomial
logistic regression from them to the object that covers most of the patch: one of eight colours, by
which the objects of a clip are told apart and captions name them, the beacon, or the background.
Beside the pretrained encoder: the random start values of the same seeds, and the patch's pixels.
Clips of training and test are different ones. Balanced accuracy: the mean over the ten classes.
Needs torch, transformers, scikit-learn, scipy, h5py.
"""
import argparse
import pathlib
import subprocess
import tempfile

import h5py
import numpy
import scipy.stats
import torch
import transformers
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

CLIPS, FRAMES = 160, 8  # per split; every other frame is used
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def clips(fovea, seed, size, folder):
    path = pathlib.Path(folder) / f"{seed}.h5"
    subprocess.run([fovea, "prepare", "procedural", "--masks", "-o", path, "--seed", str(seed),
                    "--size", str(size), "--frames", str(FRAMES), "--clips-train", str(CLIPS),
                    "--clips-held-out", str(CLIPS)], check=True, stdout=subprocess.DEVNULL)
    return h5py.File(path)


def patch_labels(masks, colours, patch):
    """[clips, T, S, S] -> [clips, T, G*G]: 0 background, 1 + colour number of the object that
    covers most of the patch (the beacon's is the last)."""
    n, t, s, _ = masks.shape
    g = s // patch
    cells = masks[:, :, :g * patch, :g * patch].reshape(n, t, g, patch, g, patch)
    cells = cells.transpose(0, 1, 2, 4, 3, 5).reshape(n, t, g * g, patch * patch)
    counts = numpy.stack([(cells == i).sum(-1) for i in range(colours.shape[1] + 1)], -1)
    winner = counts.argmax(-1)
    table = numpy.concatenate([numpy.zeros((n, 1), int), 1 + colours.astype(int)], 1)
    return numpy.take_along_axis(table, winner.reshape(n, -1), 1).reshape(winner.shape)


@torch.no_grad()
def features(model, frames):
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255
    out = [model((part - MEAN) / STD).last_hidden_state[:, 1:] for part in pixels.split(64)]
    return torch.cat(out).numpy()


def patch_pixels(frames, patch):
    n, s, _, _ = frames.shape
    g = s // patch
    cells = frames[:, :g * patch, :g * patch].reshape(n, g, patch, g, patch, 3)
    return cells.transpose(0, 1, 3, 2, 4, 5).reshape(n, g * g, -1) / 255.0


def scores(train, train_labels, test, test_labels):
    """Balanced accuracy of a linear probe and of the 20 nearest neighbours (cosine)."""
    scaler = StandardScaler().fit(train)
    a, b = scaler.transform(train), scaler.transform(test)
    linear = LogisticRegression(C=0.1, max_iter=300, class_weight="balanced").fit(a, train_labels)
    near = KNeighborsClassifier(20, metric="cosine").fit(train, train_labels)
    return [100 * balanced_accuracy_score(test_labels, m.predict(x))
            for m, x in ((linear, b), (near, test))]


def random_encoder(config, seed):
    """fovea's start values (SPEC-level table: matrices normal(0, 0.02), biases 0, scales 1)."""
    generator = torch.Generator().manual_seed(seed)
    model = transformers.Dinov2Model(config).eval()
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.zeros_(p)
        elif "norm" in name or "lambda" in name:
            torch.nn.init.ones_(p)
        else:
            p.data = 0.02 * torch.randn(p.shape, generator=generator)
    return model


def one_seed(options, seed, folder):
    trained = transformers.Dinov2Model.from_pretrained(options.folder).eval()
    config = trained.config
    with clips(options.fovea, seed, config.image_size, folder) as f:
        frames, split = f["frames"][:, ::2], f["split"][:]
        labels = patch_labels(f["masks"][:, ::2], f["objects"][:, :, 0], config.patch_size)
    rng = numpy.random.default_rng(seed)
    rows = []
    for name, extract in (("pixels", lambda x: patch_pixels(x, config.patch_size)),
                          ("random", lambda x, m=random_encoder(config, seed): features(m, x)),
                          ("pretrained", lambda x: features(trained, x))):
        sets = []
        for part in (0, 1):
            x = frames[split == part].reshape(-1, *frames.shape[2:])
            y = labels[split == part].reshape(-1)
            chosen = rng.permutation(len(y))[:options.patches]
            sets += [extract(x).reshape(len(y), -1)[chosen], y[chosen]]
        rows.append((name, *scores(*sets)))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default="models/dino-nano")
    parser.add_argument("--fovea", default="./fovea")
    parser.add_argument("--seeds", type=int, nargs="+", default=[101, 102, 103])
    parser.add_argument("--patches", type=int, default=12000, help="per split")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    print("| seed | features | linear probe, % | 20 nearest neighbours, % |\n|---|---|---|---|")
    gains = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in options.seeds:
            rows = one_seed(options, seed, folder)
            for name, linear, near in rows:
                print(f"| {seed} | {name} | {linear:.1f} | {near:.1f} |", flush=True)
            gains.append(numpy.subtract(rows[2][1:], rows[1][1:]))
    for name, gain in zip(("linear probe", "nearest neighbours"), numpy.transpose(gains)):
        half = scipy.stats.t.ppf(0.975, len(gain) - 1) * gain.std(ddof=1) / len(gain) ** 0.5
        print(f"{name}: pretrained - random = {gain.mean():.1f} points, 95 % interval "
              f"{gain.mean() - half:.1f} to {gain.mean() + half:.1f} (t, {len(gain)} seeds)")


if __name__ == "__main__":
    main()
