"""Which default of `predict --normalise` is right, and what `--rescale` is worth: V_rand of the shipped network.

    python benchmarks/normalise.py results/benchmarks/normalise.json

Three sections of ISBI-2012 as they are, with gray values and pixel sizes changed, and twelve of the synthetic stack.
The network was trained on those of ISBI-2012: compare the numbers of one line only. Written after every line.
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

SECTIONS = [24, 26, 28]
WEIGHTS = "weights/isbi2012"
GRAYS = {
    "as it is": lambda gray: gray,
    "gamma 0.7": lambda gray: 255 * (gray / 255) ** 0.7,
    "gamma 1.4": lambda gray: 255 * (gray / 255) ** 1.4,
    "x 0.7 + 40": lambda gray: 0.7 * gray + 40,
    "a quarter black": lambda gray: gray * (np.arange(gray.shape[-1]) >= gray.shape[-1] // 4),
}


def v_rand(images, masks, how="training", size=None):
    """V_rand at its best threshold, and what `predict` says; `size` is that after --rescale."""
    said, engine = {}, engines.choose("auto")
    network, record = prediction.load_network(Path(__file__).resolve().parents[1] / WEIGHTS, "float32", engine)
    norm = intensity.normalisation_for(intensity.sample(data.iter_sections(images)), record, how, said.setdefault)
    predict = prediction.section_predictor(network, norm, engine=engine)
    found = np.stack([*map(rescale.seen_at(size or images.shape[1:], predict), images.sections)])
    seen = images.sections.any(axis=(0, 1))  # columns that are not black
    value = scores.v_scores(found[..., seen], masks[..., seen])["v_rand"].value
    return {"v_rand": round(value, 4), "said": list(said)}


def cases():
    """Name, and what is to be compared: images and masks, then what `v_rand` takes."""
    images, masks, _ = data.load_pair("isbi2012", "isbi2012")
    images, masks = replace(images, sections=images.sections[SECTIONS]), masks.sections[SECTIONS]
    for name, function in GRAYS.items():
        gray = np.rint(function(images.sections.astype(np.float64))).astype(np.uint8)
        yield name, (replace(images, sections=gray), masks), {"training": ("training",), "own": ("own",)}
    for nm in (8, 3):
        shape = (len(SECTIONS), *(round(side * 4 / nm) for side in images.shape[1:]))
        gray = np.rint(resize(images.sections, shape, order=1, anti_aliasing=True, preserve_range=True))
        truth = resize(masks, shape, order=0, preserve_range=True).astype(np.uint8)
        sizes = {"as it is": (), "--rescale": ("training", images.shape[1:])}
        yield f"pixels of {nm} nm", (replace(images, sections=gray.astype(np.uint8)), truth), sizes
    images, masks = data.synthetic(12)
    yield "synthetic", (images, masks.sections), {"training": ("training",), "own": ("own",)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path, metavar="FILE")
    args = parser.parse_args()
    results = {"weights": WEIGHTS, "sections": SECTIONS}
    for name, pair, compared in cases():
        results[name] = {words: v_rand(*pair, *how) for words, how in compared.items()}
        print(name, results[name], flush=True)
        atomic.write_json(args.json, results)


if __name__ == "__main__":
    main()
