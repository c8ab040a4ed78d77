"""What an update costs: this suite's network and its whole program beside plain Keras, in one interleaved run.

    python benchmarks/training_step.py                       2017 network, batch 3, 512 x 512, bfloat16 where it is fast
    python benchmarks/training_step.py --window 128 --rounds 2        a quick look

Every round times a few updates of each candidate in turn, so that a busy moment of the machine hits them all; what
counts are the ratios of the medians. "stock" is the same architecture with Keras's own batch norm, dropout and
upsampling; "train_on_batch" feeds it the same finished batch again and again; "program" is an update as a run does
it: crops drawn and cut, warp on the device (--augment all; none), learning rate, progress and history.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import keras
import numpy as np

import data
import dilatedUnet
from files import atomic
from network import device, losses, unet
from train import run as training
from train.feed import Stacks
from train.record import Place, hardware, versions
from train.recorder import Recorder


class StockLayers(unet._Layers):
    """The network's layers as Keras ships them."""

    def bn_drop(self, x, name):
        x = self.batch_norm(x, name)
        return self.drop(x, name + "_drop")

    def batch_norm(self, x, name):
        return keras.layers.BatchNormalization(dtype=self.dtype, name=name)(x)

    def drop(self, x, name):
        return keras.layers.Dropout(self.rate, dtype=self.dtype, name=name)(x)

    def __call__(self, kind, x, name, **settings):
        kind = {"Upsample": "UpSampling2D"}.get(kind, kind)
        kinds = self.kinds if kind == "Interior" else keras.layers
        return getattr(kinds, kind)(dtype=self.dtype, name=name, **settings)(x)


def stock_network(layers=StockLayers, **settings):
    """`unet.build` with `StockLayers`."""
    ours, unet._Layers = unet._Layers, layers
    try:
        return unet.build(**settings)
    finally:
        unet._Layers = ours


def on_fixed_batch(network, batch, window):
    """A function that runs one update of `train_on_batch`."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(batch, window, window, 1)).astype("float32")
    y = (rng.random((batch, window, window)) < 0.78).astype("float32")
    network.compile("rmsprop", loss=losses.bce_dice)
    return lambda: network.train_on_batch(x, y)


class Program:
    """Updates of a whole run; `__call__(n)` returns the seconds of each of n, the first of a fit left out."""

    def __init__(self, words, folder, precision):
        self.args = dilatedUnet.parse(words)
        images, masks = data.synthetic(sections=6)
        split = training.split_of(self.args, len(images.sections))
        stacks = Stacks(images, masks, None, split, data.Normalisation.fit(images.sections))
        course, place = training.course_of(self.args), Place(Path(folder), Path(folder) / "best.weights.h5")
        self.trainee = training.make_trainee(self.args, course, stacks.normalisation, precision)
        self.recorder = Recorder(place, {}, course)
        self.recorder.on_epoch_end = lambda *_: None  # the checkpoint is an epoch's cost, not an update's
        self.batches = training.feed_of(self.args, stacks)
        self.feed = self.batches.training(0)

    def __call__(self, updates):
        clock = Clock()
        self.trainee.fit(
            self.feed,
            steps_per_epoch=updates + 1,
            callbacks=[self.recorder, clock],
            shuffle=False,
            verbose=0,
        )
        return clock.seconds[1:]


class Clock(keras.callbacks.Callback):
    """Seconds from the end of one update to the end of the next."""

    def on_train_begin(self, logs=None):
        self.last, self.seconds = time.perf_counter(), []

    def on_train_batch_end(self, batch, logs=None):
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now


def measure(candidates, rounds, updates):
    """Median and quartiles of the seconds of an update, for each candidate, interleaved."""
    seconds = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            if isinstance(run, Program):
                seconds[name] += run(updates)
                continue
            for _ in range(updates):
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)
    return {name: np.percentile(values, (50, 25, 75)).tolist() for name, values in seconds.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--updates", type=int, default=2, help="updates of each candidate per round")
    parser.add_argument("--json", help="write the record there")
    args = parser.parse_args()
    auto = device.choose_precision("auto")
    network = {"dilate": True, "dilate_rate": 2}
    fixed = args.batch_size, args.window
    with tempfile.TemporaryDirectory() as folder:
        words = f"--dilate 1 --dilate_rate 2 --image_path synthetic --window {args.window}"
        words += f" --batch_size {args.batch_size} --protocol holdout --augment"
        program = {augment: Program([*words.split(), augment], folder, auto) for augment in ("all", "none")}
        candidates = {
            "stock float32, train_on_batch": on_fixed_batch(stock_network(**network), *fixed),
            "ours float32, train_on_batch": on_fixed_batch(unet.build(**network), *fixed),
            f"stock {auto}, train_on_batch": on_fixed_batch(stock_network(**network, precision=auto), *fixed),
            f"ours {auto}, train_on_batch": on_fixed_batch(unet.build(**network, precision=auto), *fixed),
            f"ours {auto}, program": program["all"],
            f"ours {auto}, program without augmentation": program["none"],
        }
        for run in candidates.values():
            run(1) if isinstance(run, Program) else run()
        found = measure(candidates, args.rounds, args.updates)
    report(args, auto, found)


def write_record(path, **found):
    """Write what was measured, with the command, versions and hardware, if a path is given."""
    if path:
        about = {"command": " ".join(sys.argv), "versions": versions(), "hardware": hardware()}
        atomic.write_json(Path(path), about | found)


def report(args, auto, found):
    stock = found["stock float32, train_on_batch"][0]
    print(device.describe(auto))
    print(f"{args.batch_size} windows of {args.window} x {args.window} px per update")
    for name, (median, low, high) in found.items():
        print(f"{name:44s} {median:7.3f} s ({low:.3f}..{high:.3f})  {median / stock:5.2f} of stock float32")
    program = found[f"ours {auto}, program"][0] / found[f"ours {auto}, train_on_batch"][0]
    print(f"whole program / train_on_batch of the same network: {program:.3f} (limit 1.05)")
    print(f"whole program in {auto} / stock float32: {found[f'ours {auto}, program'][0] / stock:.3f} (limit 0.85)")
    write_record(args.json, seconds=found, arguments=vars(args))


if __name__ == "__main__":
    main()
