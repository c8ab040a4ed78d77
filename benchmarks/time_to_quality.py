"""Held-out V_rand against training time: this suite's recipe, the study's of 2017, the usual Keras U-Net, and rivals.

    python benchmarks/time_to_quality.py --minutes 20                       all of this suite, one after the other
    python benchmarks/time_to_quality.py --only start.py --minutes 2        a quick look
    python benchmarks/time_to_quality.py --record results/benchmarks/time_to_quality.json --figure time.png
    python benchmarks/time_to_quality.py --only "SMP ResNet-34" nnU-Net --python PEERS/bin/python --seeds 0 1 2

The rivals train in PyTorch, with their own networks, as `rivals.py` says; PEERS is an environment with what
`requirements-rivals.txt` lists. `--minutes` is where a recipe is cut off, and where a rival's learning rate ends.

Sections 24-29 of ISBI-2012 are held out, and scored whenever `--every` seconds of training have passed; the clock
stands still meanwhile. "start.py" is that script's recipe, to its end; "start.py / 2" has half the updates, and its
learning rate falls twice as fast. "2017" is the published dilated recipe, RMSprop and cycles, of which few of 500
epochs fit into the time. "usual" is the U-Net that most Keras tutorials train: 31 million parameters, padded, no batch
norm, sections rescaled to 256 x 256 and predictions scaled back, binary cross-entropy, Adam 1e-4, batches of 2, light
affine augmentation, float32; it runs in this suite's program, so what is slow or fast about it is the recipe. All start
from scratch with the same seeds; with several, means and their standard deviations are drawn.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import training_step  # sets the path to the suite
from skimage.transform import resize

import data
import dilatedUnet
import figures
from network import device
from predict import prediction
from score import evaluation
from train import run as training
from train.trainee import averaged_weights

OURS = "--recipe quick"
RECIPES = {
    "start.py": OURS + " --epochs 35 --steps_per_epoch 20",  # the same updates in shorter epochs, to score in between
    "start.py / 2": OURS + " --epochs 35 --steps_per_epoch 10",
    "2017": "--protocol holdout --inner_sections 0 --dilate 1 --dilate_rate 2 --addition 1 --lr 1e-5 --max_lr 0.01 "
    "--epochs 500",
    "usual": "--protocol holdout --inner_sections 0 --arch unet2015 --padding same --window 256 --batch_size 2 "
    "--loss bce --optimizer adam --lr 1e-4 --clr_mode none --augment affine --precision float32 --epochs 5000",
}
RIVALS = ("SMP ResNet-34", "SMP EfficientNet-B0", "MONAI BasicUNet", "nnU-Net")
USUAL_SIDE = 256
LATE = 5  # minutes over which a recipe that swings is averaged
MARKS = (0.96, 0.975, 0.978)  # V_rand of which is said when it was reached


def stacks_of(recipe, image_path, seed, val_sections=None):
    """A recipe's parsed command line, its stacks, and the held-out sections' gray values and labels."""
    words = [*recipe.split(), "--image_path", image_path, "--seed", str(seed)]
    args = dilatedUnet.parse(words + (["--val_sections", val_sections] if val_sections else []))
    stacks = training.load(args)
    held_out = list(stacks.split.held_out)
    return args, stacks, stacks.images.sections[held_out], stacks.masks.sections[held_out]


def v_rand(found, truth):
    return evaluation.score_arrays(found, truth, ("v_rand",))["v_rand"]


class Run:
    """One recipe, its stack, and the predictor of its held-out sections."""

    def __init__(self, name, image_path, seed, val_sections=None, tta="none"):
        args, stacks, self.raw, self.truth = stacks_of(RECIPES[name], image_path, seed, val_sections)
        self.args, self.tta = args, tta
        self.rescaled = name == "usual"
        if self.rescaled:
            images, masks = rescaled(stacks.images), rescaled(stacks.masks, binary=True)
            normalisation = data.Normalisation.fit(images.sections[list(stacks.split.train)])
            stacks = replace(stacks, images=images, masks=masks, normalisation=normalisation)
        self.normalisation = stacks.normalisation
        precision = device.choose_precision(args.precision)
        self.trainee = training.make_trainee(args, training.course_of(args), self.normalisation, precision)
        self.feed = training.feed_of(args, stacks).training(0)

    def v_rand(self):
        """Of the held-out sections, each at full size."""
        predict = prediction.section_predictor(self.trainee.network, self.normalisation, tta=self.tta)
        with averaged_weights(self.trainee):
            if self.rescaled:
                found = [resize(predict(small(s)), s.shape, order=1) for s in self.raw]
            else:
                found = [predict(section) for section in self.raw]
        return v_rand(np.stack(found), self.truth)

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
            self.found.append(point(self.seconds, updates, self.run.v_rand()))
        self.model.stop_training = last
        self.began = time.monotonic()


def point(seconds, updates, score):
    print(f"{seconds:6.0f} s, {updates:5d} updates: V_rand {score:.4f}", flush=True)
    return round(seconds, 1), updates, round(score, 4)


def rival_points(name, options, seed):
    """What a rival, which trains in a process of its own, chose for itself, and its points as in `Run.points`."""
    _, stacks, raw, truth = stacks_of(OURS, options.image_path, seed, options.val_sections)
    train, norm = list(stacks.split.train), stacks.normalisation
    task = {"images": stacks.images.sections[train], "masks": stacks.masks.sections[train], "held_out": raw}
    task |= {"mean": norm.mean, "std": norm.std}
    scored = trained(name, task, options, seed)
    chosen = next(scored)
    print("{threads} threads, {precision}, of {seconds_an_update}".format(**chosen), flush=True)
    return chosen, [point(seconds, updates, v_rand(found, truth)) for seconds, updates, found in scored]


def trained(name, task, options, seed):
    """What a rival chose for itself; then, as they come, (seconds, updates, predictions of the held-out sections)."""
    with tempfile.TemporaryDirectory() as folder, Path(folder, "log.txt").open("w+") as log:
        np.savez(Path(folder, "task.npz"), **task)
        how = {key: getattr(options, key) for key in ("minutes", "every", "tta", "threads", "precision")}
        how |= {"name": name, "folder": folder, "seed": seed}
        words = [options.python, Path(__file__).with_name("rivals.py"), json.dumps(how)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log, "text": True}
        with subprocess.Popen(words, **pipes) as process:
            for line in process.stdout:
                said = json.loads(line)
                if "updates" not in said:
                    yield said
                    continue
                yield said["seconds"], said["updates"], np.load(Path(folder, "found.npy"))
                print("go", file=process.stdin, flush=True)
        if process.returncode:
            log.seek(0)
            raise SystemExit(f"{name} ended:\n" + "".join(log.readlines()[-10:]))


def small(section):
    """A section of USUAL_SIDE px a side, in its gray values."""
    return resize(section, (USUAL_SIDE, USUAL_SIDE), order=1, anti_aliasing=True, preserve_range=True)


def rescaled(stack, binary=False):
    sections = np.stack([small(section) for section in stack.sections])
    sections = (sections > 0.5).astype(np.uint8) if binary else np.round(sections).astype(stack.sections.dtype)
    return replace(stack, sections=sections)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image_path", default="isbi2012")
    parser.add_argument("--minutes", type=float, default=25, help="of training, for each recipe at most")
    parser.add_argument("--every", type=float, default=60, help="seconds of training between two scores")
    names = [*RECIPES, *RIVALS]
    of = {"nargs": "+", "choices": names, "default": list(RECIPES), "metavar": "NAME", "help": ", ".join(names)}
    parser.add_argument("--only", **of)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--val_sections", metavar="LIST", help="the sections to hold out (default: the last fifth)")
    parser.add_argument("--tta", default="none", choices=("none", "8"), help="turned and mirrored versions to average")
    parser.add_argument("--python", default=sys.executable, help="interpreter of the rivals (default: this one)")
    counts = {"type": int, "nargs": "+", "default": sorted({1, os.cpu_count()})}
    parser.add_argument("--threads", **counts, help="of the rivals; the fastest is taken")
    auto = {"choices": ("auto", "float32", "bfloat16"), "default": "auto"}
    parser.add_argument("--precision", **auto, help="of the rivals; auto: the fastest")
    parser.add_argument("--json", help="write the record there")
    parser.add_argument("--record", nargs="+", help="train nothing: compare what these records hold")
    parser.add_argument("--figure", help="draw V_rand against time there, a PNG")
    args = parser.parse_args()
    if not shutil.which(args.python):
        parser.error(f"--python: there is no {args.python}; benchmarks/README.md says how to make it")
    found = recorded(args.record) if args.record else measured(args)
    means = {name: mean_points(list(runs.values())) for name, runs in found.items()}
    print("\n".join([*comparison({name: points for name, (points, _) in means.items()}), *reached(found)]))
    if args.figure:
        lines = {
            name: ([t / 60 for t, _, _ in points], [v for _, _, v in points], spread)
            for name, (points, spread) in means.items()
        }
        figures.factor({"V_rand": lines}, args.figure, xlabel="minutes of training", title="Held-out sections")


def recorded(paths):
    """{recipe: {seed: points}} of records; the older ones hold the points of seed 0 alone."""
    found = {}
    for path in paths:
        for name, runs in json.loads(Path(path).read_text())["points"].items():
            runs = runs if isinstance(runs, dict) else {"0": runs}
            for seed in runs.keys() & found.setdefault(name, {}).keys():
                print(f"{name}, seed {seed}: as in {path}, not as in the record before")
            found[name].update(runs)
    return found


def measured(args):
    """{recipe: {seed: points}}, trained one after the other; the record is written after each."""
    print(device.describe(device.choose_precision("auto")))
    found, chosen = {}, {}
    for seed in args.seeds:
        for name in args.only:
            print(f"{name}, seed {seed}: {RECIPES.get(name, 'its own program')}", flush=True)
            if name in RECIPES:
                keras.utils.clear_session()
                points = Run(name, args.image_path, seed, args.val_sections, args.tta).points(args.minutes, args.every)
            else:
                chosen[f"{name}, seed {seed}"], points = rival_points(name, args, seed)
            found.setdefault(name, {})[str(seed)] = points
            training_step.write_record(args.json, recipes=RECIPES, rivals=chosen, points=found)
    return found


def mean_points(runs):
    """Points of the mean over a recipe's runs, and their standard deviations.

    They are at even times that all runs have seen; the last point is the mean of the runs' ends.
    """
    if len(runs) == 1:
        return runs[0], [0.0] * len(runs[0])
    first, last = max(run[0][0] for run in runs), min(run[-1][0] for run in runs)
    times = np.linspace(first, last, min(map(len, runs)))
    updates, values = (
        np.array([np.interp(times, *np.array(run, float).T[[0, column]]) for run in runs]) for column in (1, 2)
    )
    ends = np.array([run[-1] for run in runs]).T  # seconds, updates, V_rand
    times[-1], updates[:, -1], values[:, -1] = ends[0].mean(), ends[1], ends[2]
    means = (times.tolist(), updates.mean(axis=0).round().astype(int).tolist(), values.mean(axis=0).tolist())
    return list(zip(*means, strict=True)), values.std(axis=0, ddof=1).tolist()


def reached(found):
    """Lines: with what each recipe's runs ended, and after how many minutes each first had each of `MARKS`."""
    for name, runs in found.items():
        yield f"{name}, seeds {', '.join(runs)}: V_rand {', '.join(f'{points[-1][2]:.4f}' for points in runs.values())}"
        for mark in MARKS:
            times = [next((f"{t / 60:.1f}" for t, _, v in points if v >= mark), "never") for points in runs.values()]
            yield f"    minutes to {mark}: {', '.join(times)}"


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
