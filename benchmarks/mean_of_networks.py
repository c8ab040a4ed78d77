"""What the mean of several networks is worth: held-out scores of each alone, and of their mean.

    python benchmarks/mean_of_networks.py RUN RUN RUN --json results/benchmarks/mean_of_networks.json

Each RUN is a finished run of `reproduce best`: of one block, with different seeds. Of the held-out sections the
interior probabilities (eight rotations) are averaged; of false borders the probabilities that the networks' forests
give. Half a minute for two networks on 2 cores.
"""

import argparse
import itertools
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

import data
import dilatedUnet
from files import atomic
from predict import borders, engines, prediction
from score import evaluation
from train import record as records
from train import run as training

NAMES = ("v_rand", "v_info")


def opened(run):
    """Stacks of a finished run, images and masks of its held-out sections, its predictor (8 rotations), its borders."""
    record = json.loads((run / "run.json").read_text())
    own = run / "best"
    weights = str(own if prediction.weight_file(own).exists() else record["settings"]["weight_path"])
    if not prediction.borders_file(weights).exists() or not record["split"]["held_out"]:
        raise SystemExit(f"{run}: must hold out sections and have learned false borders, as --recipe quick does")
    stacks = training.load(dilatedUnet.parse(record["argv"]))
    images, masks = (stack.sections[list(stacks.split.held_out)] for stack in (stacks.images, stacks.masks))
    merger, engine = borders.load(prediction.borders_file(weights)), engines.choose("auto")
    network, _ = prediction.load_network(weights, "float32", engine)
    predict = prediction.section_predictor(network, stacks.normalisation, engine=engine, tta="8")
    return stacks, images, masks, predict, merger


def load(run):
    """Stacks of a run, its network's probability of the held-out sections, (N, H, W), its borders, and seconds."""
    stacks, images, _, predict, merger = opened(run)
    begin = time.perf_counter()
    interior = np.stack([predict(section) for section in images])
    return stacks, interior, merger, round(time.perf_counter() - begin, 1)


def score(maps, masks):
    found = evaluation.score_arrays(maps, masks, NAMES)
    return {name: round(found[name], 4) for name in NAMES}


def scores_of(runs):
    """Scores of every one of the networks, and of every mean of two or more; with and without false borders."""
    stacks, maps, mergers, seconds = zip(*map(load, runs), strict=True)
    first, split = stacks[0], stacks[0].split
    if any(one.split != split for one in stacks):
        raise SystemExit("mean_of_networks.py: the runs hold out different sections")
    images, masks = (stack.sections[list(split.held_out)] for stack in (first.images, first.masks))
    found = {"sections": data.format_sections(split.held_out), "seconds": seconds}
    for count in range(1, len(runs) + 1):
        for chosen in itertools.combinations(range(len(runs)), count):
            interior = np.mean([maps[i] for i in chosen], axis=0)
            cuts = map(borders.cut, interior, images)
            merged = np.stack(list(borders.maps(cuts, [mergers[i] for i in chosen])))
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
    if len({run.name for run in args.runs}) < len(args.runs):
        raise SystemExit("mean_of_networks.py: two runs have folders of one name, and the record names them by it")
    found = scores_of(args.runs)
    key = f"sections {found['sections']}"
    record[key] = record.get(key, {}) | found
    atomic.write_json(args.json, record)


if __name__ == "__main__":
    main()
