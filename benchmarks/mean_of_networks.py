"""What the mean of several networks is worth: held-out scores of each alone, and of their mean.

    python benchmarks/mean_of_networks.py RUN RUN RUN --json results/benchmarks/mean_of_networks.json

Each RUN is a finished run of `reproduce best`: of one block, with different seeds. Of the held-out sections the
interior probabilities (eight rotations) are averaged; of false borders the probabilities that the networks' forests
give. Three minutes a network on 2 cores.
"""

import argparse
import itertools
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

import data
from files import atomic
from predict import borders, engines, prediction
from score import evaluation
from train import record as records

NAMES = ("v_rand", "v_info")


def load(run):
    """Split of a run, held-out sections, masks and probability, all (N, H, W), its borders, seconds of prediction."""
    record = json.loads((run / "run.json").read_text())
    held_out, merger = record["split"]["held_out"], borders.load(run / "best.borders.npz")
    paths = record["settings"]
    images, masks, _ = data.load_pair(
        data.resolve(paths["image_path"], "image"), data.resolve(paths["mask_path"] or paths["image_path"], "mask")
    )
    images, masks = images.sections[held_out], masks.sections[held_out]
    engine = engines.choose("auto")
    network, beside = prediction.load_network(str(run / "best"), "float32", engine)
    normalisation = data.Normalisation.from_dict(beside["normalisation"])
    predict = prediction.section_predictor(network, normalisation, engine=engine, tta="8")
    begin = time.perf_counter()
    interior = np.stack([predict(section) for section in images])
    return record["split"], images, masks, interior, merger, time.perf_counter() - begin


def score(maps, masks):
    found = evaluation.score_arrays(maps, masks, NAMES)
    return {name: round(found[name], 4) for name in NAMES}


def scores_of(runs):
    """Scores of every one of the networks, and of every mean of two or more; with and without false borders."""
    loaded = [load(run) for run in runs]
    split, images, masks, *_ = loaded[0]
    if any(other != split for other, *_ in loaded):
        raise SystemExit("mean_of_networks.py: the runs hold out different sections")
    found = {"sections": data.format_sections(split["held_out"]), "seconds": [round(one[-1], 1) for one in loaded]}
    for count in range(1, len(runs) + 1):
        for chosen in itertools.combinations(range(len(runs)), count):
            interior = np.mean([loaded[i][3] for i in chosen], axis=0)
            mergers = [loaded[i][4] for i in chosen]
            cuts = map(borders.cut, interior, images)
            merged = np.stack([borders.merged(cut, mergers) for cut in cuts])
            name = " + ".join(runs[i].name for i in chosen)
            found[name] = {"alone": score(interior, masks), "false borders taken away": score(merged, masks)}
            print(name, found[name], flush=True)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--json", required=True, type=Path, metavar="FILE")
    args = parser.parse_args()
    record = json.loads(args.json.read_text()) if args.json.exists() else {}
    record |= {"versions": records.versions(), "hardware": records.hardware(), "commit": records.commit()}
    found = scores_of(args.runs)
    record[f"sections {found['sections']}"] = found
    atomic.write_json(args.json, record)


if __name__ == "__main__":
    main()
