"""Why the study of 2017 validates worse than it trains, on the same sections: dropout, batch norm, or the windows.

    python benchmarks/montages_2017.py RUN [RUN ...] --json results/benchmarks/montages_2017.json

RUN is a finished run of `reproduce table` under the published protocol. Its best weights see 15 windows of the montage
that trains and 15 of the one that validates, in four ways. Means over the windows, batches of 3, float32. TensorFlow
only. Five minutes a run on 2 cores.
"""

import argparse
import itertools
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
WINDOWS = 5  # batches of 3
AVERAGED, MOMENTUM = 20, 0.8  # batches of the training montage that new averages are taken of, and their momentum


def prepared(folder):
    """Trainee and feed of a run, in float32."""
    args = dilatedUnet.parse([*json.loads((folder / "run.json").read_text())["argv"], "--precision", "float32"])
    stacks = training.load(args)
    trainee = training.make_trainee(args, training.course_of(args), stacks.normalisation, "float32")
    return trainee, training.feed_of(args, stacks)


def compiled(trainee, training_mode):
    """The network as it is now, as a function from a batch to interior and mask."""
    import tensorflow as tf

    return tf.function(lambda batch: trainee(batch, training=training_mode))


def score(function, batches):
    """Loss, BCE and soft Dice, means over batches."""
    found = []
    for batch in batches:
        interior, mask = function(batch)
        found.append([float(of(mask, interior)) for of in (losses.bce_dice, losses.bce, losses.soft_dice)])
    return dict(zip(("loss", "bce", "dice"), np.mean(found, axis=0).round(4).tolist(), strict=True))


def four_ways(trainee, feed):
    """Scores of the weights that are in place."""
    dropping = [layer for layer in trainee.network.layers if isinstance(layer, layers._Masking)]
    fresh = (batch for (batch,) in feed.training(EPOCH))
    windows = {"validate": [*feed.validation()(EPOCH)][:WINDOWS], "train": [*itertools.islice(fresh, WINDOWS)]}

    def both(training_mode):
        function = compiled(trainee, training_mode)
        return {montage: score(function, batches) for montage, batches in windows.items()}

    found = {"moving averages, no dropout (as it validates)": both(False)}
    found["batch statistics, dropout (as it trains)"] = both(True)
    for layer in dropping:
        layer.seed_generator, layer.momentum = None, MOMENTUM
    found["batch statistics, no dropout"] = both(True)
    without = compiled(trainee, True)
    for batch in itertools.islice(fresh, AVERAGED):
        without(batch)
    return found | {"averages taken anew without dropout": both(False)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--json", required=True, metavar="FILE")
    args = parser.parse_args()
    if len({run.name for run in args.runs}) < len(args.runs):
        raise SystemExit("montages_2017.py: two runs have folders of one name, and the record names them by it")
    before = json.loads(Path(args.json).read_text()) if Path(args.json).exists() else {}
    found = before | {"versions": records.versions(), "hardware": records.hardware(), "commit": records.commit()}
    for folder in args.runs:
        trainee, feed = prepared(folder)
        trainee.network.load_weights(folder / "best.weights.h5")
        found.setdefault("runs", {})[folder.name] = four = four_ways(trainee, feed)
        atomic.write_json(Path(args.json), found)
        for name, values in four.items():
            print(f"{folder.name}: {name}: {values}", flush=True)


if __name__ == "__main__":
    main()
