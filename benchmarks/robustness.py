"""What a network loses on sections of another microscope: held-out scores, with gray values and sharpness changed.

    python benchmarks/robustness.py RUN ... --json results/benchmarks/robustness.json

Each RUN is a finished run that learned false borders, `--recipe quick` for one. Its held-out sections are changed,
rounded to 8 bits, and predicted as `predict --tta` does, normalised by the training sections; then scored as they are
and with false borders taken away. Written after every change; what is written is not made again. A minute or two a
run on 2 cores.
"""

import argparse
import json
import os
import sys
from functools import partial
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from mean_of_networks import opened, score
from scipy.ndimage import gaussian_filter
from skimage.transform import resize

from files import atomic
from predict import borders
from train import record as records


def noisy(sections, sd):
    """With Gaussian noise, `sd` in standard deviations of the section; always the same noise."""
    noise = [np.random.default_rng(i).standard_normal(section.shape) for i, section in enumerate(sections)]
    return sections + sd * sections.std(axis=(1, 2), keepdims=True) * np.stack(noise)


def coarse(sections, factor):
    """As if taken with pixels `factor` times as large, and resampled."""
    side = tuple(round(n / factor) for n in sections.shape[1:])
    small = (np.rint(resize(section, side, order=1, anti_aliasing=True)) for section in sections)
    return np.stack([resize(section, sections.shape[1:], order=1) for section in small])


def shaded(sections, sd):
    """Darker on the left and brighter on the right, by so many standard deviations each."""
    return sections + sd * sections.std() * np.linspace(-1, 1, sections.shape[-1])


CHANGES = {
    "as it is": lambda x: x,
    **{f"noise, {sd} sd": partial(noisy, sd=sd) for sd in (0.5, 1)},
    **{f"blur, {px} px": partial(gaussian_filter, sigma=px, axes=(1, 2)) for px in (1, 2)},
    "pixels twice as large": partial(coarse, factor=2),
    **{f"gamma {gamma}": lambda x, gamma=gamma: 255 * (x / 255) ** gamma for gamma in (0.7, 1.4)},
    "contrast 0.6": lambda x: x.mean() + 0.6 * (x - x.mean()),
    "shade, 1 sd": partial(shaded, sd=1),
}


def scores_of(run, found):
    """Fill `found` with the scores of a run's held-out sections under each change, saying and yielding as it goes."""
    _, images, masks, predict, merger = opened(run)
    if images.dtype != np.uint8:
        raise SystemExit(f"{run}: the changes are made for sections of 8 bits. Received: {images.dtype}")
    for name in [name for name in CHANGES if name not in found]:
        changed = np.clip(np.rint(CHANGES[name](images.astype(np.float64))), 0, 255).astype(np.uint8)
        interior = np.stack([predict(section) for section in changed])
        merged = np.stack([*borders.maps(map(borders.cut, interior, changed), [merger])])
        found[name] = {"alone": score(interior, masks), "false borders taken away": score(merged, masks)}
        print(run.name, name, found[name], flush=True)
        yield


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--json", required=True, type=Path, metavar="FILE")
    args = parser.parse_args()
    record = json.loads(args.json.read_text()) if args.json.exists() else {"runs": {}}
    record |= {"versions": records.versions(), "hardware": records.hardware(), "commit": records.commit()}
    for run in args.runs:
        about = json.loads((run / "run.json").read_text())
        known = {"command": about["command"], "sections": about["split"]["held_out"], "scores": {}}
        there = record["runs"].setdefault(run.name, known)
        if any(there[key] != known[key] for key in ("command", "sections")):
            raise SystemExit(f"{run}: {args.json} holds another run of that name; rename one, or take another file")
        for _ in scores_of(run, there["scores"]):
            atomic.write_json(args.json, record)


if __name__ == "__main__":
    main()
