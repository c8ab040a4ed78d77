"""Why the study of 2017 validates worse than it trains, on the same sections: dropout and batch norm's averages.

    python benchmarks/dropout_2017.py RUN [RUN ...] --json results/benchmarks/dropout_2017.json

RUN is a finished run of `reproduce table` under the published protocol. Its best and its last weights see the same 30
windows of its validation montage in four ways. Means over the windows, batches of 3, float32.
"""

import argparse
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

import dilatedUnet
from files import atomic
from network import layers, losses
from train import record as records
from train import run as training

EPOCH = 10**6  # keys the windows: none that a run has drawn
AVERAGED = 20  # batches of the training montage that new averages are taken of


def prepared(folder):
    """Trainee and feed of a run, in float32."""
    args = dilatedUnet.parse([*json.loads((folder / "run.json").read_text())["argv"], "--precision", "float32"])
    stacks = training.load(args)
    trainee = training.make_trainee(args, training.course_of(args), stacks.normalisation, "float32")
    return trainee, training.feed_of(args, stacks)


def score(trainee, batches, training_mode):
    """Loss, BCE and soft Dice, means over batches."""
    found = []
    for batch in batches:
        interior, mask = trainee(batch, training=training_mode)
        found.append([float(of(mask, interior)) for of in (losses.bce_dice, losses.bce, losses.soft_dice)])
    return dict(zip(("loss", "bce", "dice"), np.mean(found, axis=0).round(4).tolist(), strict=True))


def four_ways(trainee, feed):
    """Scores of the weights that are in place."""
    norms = [layer for layer in trainee.network.layers if isinstance(layer, layers.BatchNormDropout)]
    dropping = [layer for layer in trainee.network.layers if isinstance(layer, layers._Masking)]
    kept = trainee.network.get_weights()
    windows = [*feed.validation()(EPOCH)]
    found = {"averages, no dropout (validation)": score(trainee, windows, False)}
    found["batch statistics, dropout (training)"] = score(trainee, windows, True)
    generators = [layer.seed_generator for layer in dropping]
    for layer in dropping:
        layer.seed_generator = None
    found["batch statistics, no dropout"] = score(trainee, windows, True)
    batches = feed.training(EPOCH)
    for i in range(AVERAGED):
        for layer in norms:
            layer.momentum = i / (i + 1)
        trainee(next(batches)[0], training=True)
    found["averages taken anew without dropout"] = score(trainee, windows, False)
    for layer, generator in zip(dropping, generators, strict=True):
        layer.seed_generator = generator
    trainee.network.set_weights(kept)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--json", required=True, metavar="FILE")
    args = parser.parse_args()
    before = json.loads(Path(args.json).read_text()) if Path(args.json).exists() else {}
    found = before | {"versions": records.versions(), "hardware": records.hardware(), "commit": records.commit()}
    for folder in args.runs:
        trainee, feed = prepared(folder)
        for weights in ("best", "last"):
            if not (path := folder / f"{weights}.weights.h5").exists():
                continue
            trainee.network.load_weights(path)
            found.setdefault("runs", {})[f"{folder.name}, {weights}"] = four = four_ways(trainee, feed)
            atomic.write_json(Path(args.json), found)
            for name, values in four.items():
                print(f"{folder.name}, {weights}: {name}: {values}", flush=True)


if __name__ == "__main__":
    main()
