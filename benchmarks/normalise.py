"""Which default of `predict --normalise` is right, and what `--rescale` is worth: V_rand of the shipped network.

    python benchmarks/normalise.py [--sections 24,26,28] [--json results/benchmarks/normalise.json]

Sections of ISBI-2012 as they are and with gray values and pixel sizes changed, and as many of the synthetic stack,
normalised as in training and by the stack's own statistics. The network was trained on the sections of ISBI-2012: only
the numbers of one line may be compared.
"""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from skimage.transform import resize

import data
from files import atomic
from predict import engines, intensity, prediction, rescale
from score import scores

WEIGHTS = Path(__file__).resolve().parents[1] / "weights" / "isbi2012_standard"
GRAYS = {
    "as it is": lambda gray: gray,
    "gamma 0.7": lambda gray: 255 * (gray / 255) ** 0.7,
    "gamma 1.4": lambda gray: 255 * (gray / 255) ** 1.4,
    "x 0.7 + 40": lambda gray: 0.7 * gray + 40,
    "x 0.4 + 100": lambda gray: 0.4 * gray + 100,
    "a quarter black": lambda gray: gray * (np.arange(gray.shape[-1]) >= gray.shape[-1] // 4),
}


def v_rand(images, masks, network, record, how, size=None):
    """V_rand at its best threshold, what `predict` says, and the threshold; `size` is that after --rescale."""
    said = {}
    norm = intensity.normalisation_for(intensity.sample(data.iter_sections(images)), record, how, said.setdefault)
    predict = prediction.section_predictor(network, norm, engine=engines.choose("auto"))
    predict = rescale.seen_at(size or images.shape[1:], predict)
    found = np.stack([predict(section) for section in images.sections])
    seen = images.sections.any(axis=(0, 1))  # columns that are not black
    curve = scores.v_scores(found[..., seen], masks[..., seen])["v_rand"]
    return {"v_rand": round(curve.value, 4), "threshold": round(curve.threshold, 2), "said": list(said)}


def changed(images, function):
    return replace(images, sections=np.rint(function(images.sections.astype(np.float64))).astype(np.uint8))


def resized(stack, size, order):
    """A stack as another microscope would give it: smoothed if it is an image (order 1), else of its own values."""
    how = {"order": order, "anti_aliasing": order > 0, "preserve_range": True}
    return np.stack([np.rint(resize(section, size, **how)).astype(np.uint8) for section in stack])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default="24,26,28", help="sections of ISBI-2012 (default: 24,26,28)")
    parser.add_argument("--json", help="write the numbers to FILE")
    args = parser.parse_args()
    network, record = prediction.load_network(WEIGHTS)
    chosen, rows, sizes = list(data.parse_sections(args.sections)), {}, {}
    images, masks, _ = data.load_pair("isbi2012", "isbi2012")
    images, masks = replace(images, sections=images.sections[chosen]), masks.sections[chosen]
    stacks = {f"isbi2012, {name}": (changed(images, function), masks) for name, function in GRAYS.items()}
    painted, interior = data.synthetic(len(chosen))
    for name, pair in (stacks | {"synthetic": (painted, interior.sections)}).items():
        rows[name] = {how: v_rand(*pair, network, record, how) for how in ("training", "own")}
        print(name, rows[name], flush=True)
    for nm in (8, 3):
        size = tuple(round(side * 4 / nm) for side in images.shape[1:])
        small = replace(images, sections=resized(images.sections, size, 1)), resized(masks, size, 0)
        seen = {"as it is": None, "--rescale": images.shape[1:]}
        sizes[f"{nm} nm"] = {how: v_rand(*small, network, record, "training", s) for how, s in seen.items()}
        print(nm, "nm", sizes[f"{nm} nm"], flush=True)
    if args.json:
        about = {"weights": WEIGHTS.name, "sections": args.sections}
        atomic.write_json(args.json, about | {"normalise": rows, "pixel_size": sizes})


if __name__ == "__main__":
    main()
