"""Held-out V_rand against training time: this suite's recipe, the study's of 2017, and the usual Keras U-Net.

    python benchmarks/time_to_quality.py --minutes 20                       all, one after the other
    python benchmarks/time_to_quality.py --only start.py --minutes 2        a quick look
    python benchmarks/time_to_quality.py --record results/benchmarks/time_to_quality*.json --figure time.png

Sections 24-29 of ISBI-2012 are held out, and scored whenever `--every` seconds of training have passed; the clock
stands still meanwhile. "start.py" is that script's recipe, to its end; "start.py / 2" has half the updates, and its
learning rate falls twice as fast. "2017" is the published dilated recipe, RMSprop and cycles, of which few of 500
epochs fit into the time. "usual" is the U-Net that most Keras tutorials train: 31 million parameters, padded, no batch
norm, sections rescaled to 256 x 256 and predictions scaled back, binary cross-entropy, Adam 1e-4, batches of 2, light
affine augmentation, float32; it runs in this suite's program, so what is slow or fast about it is the recipe. All start
from scratch with the same seed.
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import training_step  # noqa: F401 - sets the path to the suite
from skimage.transform import resize

import data
import dilatedUnet
import figures
from files import atomic
from network import device
from predict import prediction
from score import evaluation
from train import run as training
from train.record import hardware, versions
from train.trainee import averaged_weights

OURS = "--recipe quick"
RECIPES = {
    "start.py": OURS + " --epochs 25 --steps_per_epoch 20",  # the same updates in shorter epochs, to score in between
    "start.py / 2": OURS + " --epochs 25 --steps_per_epoch 10",
    "2017": "--protocol holdout --inner_sections 0 --dilate 1 --dilate_rate 2 --addition 1 --lr 1e-5 --max_lr 0.01 "
    "--epochs 500",
    "usual": "--protocol holdout --inner_sections 0 --arch unet2015 --padding same --window 256 --batch_size 2 "
    "--loss bce --optimizer adam --lr 1e-4 --clr_mode none --augment affine --precision float32 --epochs 5000",
}
USUAL_SIDE = 256
LATE = 5  # minutes over which a recipe that swings is averaged


class Run:
    """One recipe, its stack, and the predictor of its held-out sections."""

    def __init__(self, name, image_path, seed):
        words = [*RECIPES[name].split(), "--image_path", image_path, "--seed", str(seed)]
        self.args = args = dilatedUnet.parse(words)
        stacks = training.load(args)
        images, masks, held_out = stacks.images, stacks.masks, list(stacks.split.held_out)
        self.raw, self.truth = images.sections[held_out], masks.sections[held_out]
        self.rescaled = name == "usual"
        if self.rescaled:
            images, masks = rescaled(images), rescaled(masks, binary=True)
            normalisation = data.Normalisation.fit(images.sections[list(stacks.split.train)])
            stacks = replace(stacks, images=images, masks=masks, normalisation=normalisation)
        self.normalisation = stacks.normalisation
        precision = device.choose_precision(args.precision)
        self.trainee = training.make_trainee(args, training.course_of(args), self.normalisation, precision)
        self.feed = training.feed_of(args, stacks).training(0)

    def v_rand(self):
        """Of the held-out sections, each at full size."""
        predict = prediction.section_predictor(self.trainee.network, self.normalisation)
        with averaged_weights(self.trainee):
            if self.rescaled:
                found = [resize(predict(small(s)), s.shape, order=1) for s in self.raw]
            else:
                found = [predict(section) for section in self.raw]
        return evaluation.score_arrays(np.stack(found), self.truth, ("v_rand",))["v_rand"]

    def points(self, minutes, every):
        """[(seconds of training, updates, V_rand), ...]"""
        watch = Watch(self, 60 * minutes, every)
        length = {"epochs": self.args.epochs, "steps_per_epoch": self.args.steps_per_epoch}
        self.trainee.fit(self.feed, **length, callbacks=[watch], shuffle=False, verbose=0)
        return watch.found


class Watch(keras.callbacks.Callback):
    """Scores at the ends of epochs, with the clock stopped; ends the training when the time is up."""

    def __init__(self, run, limit, every):
        super().__init__()
        self.run, self.limit, self.every = run, limit, every
        self.seconds, self.scored, self.found = 0.0, 0.0, []

    def on_train_begin(self, logs=None):
        self.began = time.monotonic()

    def on_epoch_end(self, epoch, logs=None):
        self.seconds += time.monotonic() - self.began
        last = epoch + 1 == self.run.args.epochs or self.seconds >= self.limit
        if last or self.seconds - self.scored >= self.every:
            self.scored = self.seconds
            updates = (epoch + 1) * self.run.args.steps_per_epoch
            self.found.append((round(self.seconds, 1), updates, round(self.run.v_rand(), 4)))
            print("{:6.0f} s, {:5d} updates: V_rand {:.4f}".format(*self.found[-1]), flush=True)
        self.model.stop_training = last
        self.began = time.monotonic()


def small(section):
    """A section of USUAL_SIDE px a side, in its gray values."""
    return resize(section, (USUAL_SIDE, USUAL_SIDE), order=1, anti_aliasing=True, preserve_range=True)


def rescaled(stack, binary=False):
    sections = np.stack([small(section) for section in stack.sections])
    sections = (sections > 0.5).astype(np.uint8) if binary else np.round(sections).astype(np.uint8)
    return replace(stack, sections=sections)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image_path", default="isbi2012")
    parser.add_argument("--minutes", type=float, default=25, help="of training, for each recipe at most")
    parser.add_argument("--every", type=float, default=60, help="seconds of training between two scores")
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="write the record there")
    parser.add_argument("--record", nargs="+", help="train nothing: compare what these records hold")
    parser.add_argument("--figure", help="draw V_rand against time there, a PNG")
    args = parser.parse_args()
    found = recorded(args.record) if args.record else measured(args)
    print("\n".join(comparison(found)))
    if args.figure:
        lines = {name: ([t / 60 for t, _, _ in p], [v for _, _, v in p], [0.0] * len(p)) for name, p in found.items()}
        title = "Sections 24-29 of ISBI-2012, held out"
        figures.factor({"V_rand": lines}, args.figure, xlabel="minutes of training", title=title)


def recorded(paths):
    """{recipe: points} of records."""
    found = {}
    for path in paths:
        found |= json.loads(Path(path).read_text())["points"]
    return found


def measured(args):
    """{recipe: points}, trained one after the other."""
    print(device.describe(device.choose_precision("auto")))
    found = {}
    for name in args.only:
        print(f"{name}: {RECIPES[name]}", flush=True)
        found[name] = Run(name, args.image_path, args.seed).points(args.minutes, args.every)
    if args.json:
        record = {"command": " ".join(sys.argv), "versions": versions(), "hardware": hardware()}
        atomic.write_json(Path(args.json), record | {"recipes": RECIPES, "points": found})
    return found


def comparison(found):
    """Lines: how each recipe ended, how it swings, and how soon start.py's had what it ended with, and its best."""
    ours = {name: points for name, points in found.items() if name.startswith("start.py")}
    for name, points in found.items():
        seconds, updates, final = points[-1]
        late = [v for t, _, v in points if t > seconds - 60 * LATE]
        mean = statistics.fmean(late)
        at, best = max(((t, v) for t, _, v in points), key=lambda point: point[1])
        yield f"{name}: V_rand {final:.4f} after {seconds / 60:.1f} minutes, {updates} updates"
        swings = f"{mean:.4f} ({min(late):.4f}..{max(late):.4f})"
        yield f"    best {best:.4f} after {at / 60:.1f} minutes; mean of the last {LATE} minutes {swings}"
        for ahead, theirs in ours.items() if name not in ours else ():
            marks = {"final": (final, seconds), "late mean": (mean, seconds), "best": (best, at)}
            times = [f"its {what} {how_soon(theirs, *mark)}" for what, mark in marks.items()]
            yield f"    {ahead} has {', '.join(times)}"


def how_soon(points, score, seconds):
    """When a recipe first had a score, and as a part of the seconds that another needed."""
    reached = next((t for t, _, v in points if v >= score), None)
    return "never" if reached is None else f"after {reached / 60:.1f} ({reached / seconds:.3f} of the time)"


if __name__ == "__main__":
    main()
