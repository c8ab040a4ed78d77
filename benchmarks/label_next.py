"""Which section to label next: where a network disagrees with itself, at random, or evenly? 2 -> 5 -> 10 of ISBI-2012.

    python benchmarks/label_next.py --runs label-next --json results/suggest.json

Trains from nothing on sections 6 and 18, then on 5 of 0-23, then on 10; scores the held-out sections 24-29. "suggest"
adds those about whose segments the eight turned and mirrored versions of its network disagree, spread out; "chance"
draws; "even" spaces all evenly. 21 short trainings, paired by seed. It can be resumed.
"""

import argparse
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import training_step  # noqa: F401 - sets the path to the suite

import data
from files import atomic
from predict import prediction, tiling
from score import scores, segments
from studies import verdicts
from studies.rows import spread_over
from train.record import hardware, versions

PROGRAM = [sys.executable, str(Path(__file__).resolve().parent.parent / "dilatedUnet.py")]
RECIPE = (
    "--recipe quick --arch unet2017 --optimizer adam --max_lr 1.5e-3 --bn_momentum 0.99 --average_warmup 0 --merge 0 "
    "--tta none --filters 16,32,64 --window 192 --epochs 3 --protocol holdout --image_path isbi2012"
)
CANDIDATES, HELD_OUT, SEEDS, COUNTS, WAYS = 24, slice(24, 30), range(3), (5, 10), ("suggest", "chance", "even")


def versions_of(section, predict):
    """The predictions of the eight versions of a section, turned back: (8, H, W)."""
    found = np.empty((8, *section.shape), np.float32)
    for into, version in zip(found, tiling.TRANSFORMS["8"], strict=True):
        tiling.transform(into, *version)[...] = predict(tiling.transform(section, *version))
    return found


def error(probability, truth, threshold):
    return 1 - scores.v_rand([probability], [truth], (threshold,)).value


def choose(gains, labelled, count):
    """Largest gain first; below the distance of even spacing a gain counts in proportion to the distance."""
    taken, spacing = list(labelled), len(gains) / (len(labelled) + count)
    for _ in range(count):
        apart = np.abs(np.arange(len(gains))[:, None] - taken).min(axis=1)
        worth = np.where(apart > 0, np.asarray(gains) * np.minimum(1, apart / spacing), -1)
        taken.append(int(worth.argmax()))
    return taken[len(labelled) :]


def record_of(runs, way, count, seed):
    """What a training gave, which is made where it is not there yet."""
    folder, file = runs / f"{way}-{count}-s{seed}", runs / f"{way}-{count}-s{seed}.json"
    if not file.exists():
        labelled = labelled_by(runs, way, count, seed)
        words = [*PROGRAM, *RECIPE.split(), "--train_sections", ",".join(map(str, labelled)), "--seed", str(seed)]
        subprocess.run([*words, "--run_dir", str(folder), "--resume"], check=True)
        about = {"way": way, "count": count, "seed": seed, "labelled": labelled}
        atomic.write_json(file, about | scored(folder / "best", way, count))
    return atomic.read_json(file, "--runs")


def labelled_by(runs, way, count, seed):
    """The sections of a training: what was labelled before, and what is added."""
    if way in ("start", "even"):
        return list(data.parse_sections(spread_over(count, CANDIDATES)))
    before = record_of(runs, *(("start", 2) if count == COUNTS[0] else (way, COUNTS[0])), seed)
    labelled, more = before["labelled"], count - before["count"]
    if way == "suggest":
        return sorted([*labelled, *choose(before["gains"], labelled, more)])
    drawn = np.random.default_rng((seed, count)).choice(np.setdiff1d(range(CANDIDATES), labelled), more, replace=False)
    return sorted([*labelled, *drawn.tolist()])


def scored(weights, way, count):
    """Held-out scores, plain and as with --tta; where a choice follows, gain and true error of every candidate."""
    network, about = prediction.load_network(weights)
    norm, at = data.Normalisation.from_dict(about["normalisation"]), about["threshold"]
    predict = prediction.section_predictor(network, norm, engine="auto")
    images, masks = (stack.sections for stack in data.load_pair("isbi2012", "isbi2012")[:2])
    held, truth, found = [versions_of(section, predict) for section in images[HELD_OUT]], masks[HELD_OUT], {}
    for tag, interior in (("", [v[0] for v in held]), ("_tta", [v.mean(axis=0) for v in held])):
        curve = scores.v_rand(interior, truth, [i / 50 for i in range(51)]).curve
        found |= {f"v_rand{tag}": float(curve[::5].max()), f"v_rand{tag}_fine": float(curve.max())}
        found[f"dice{tag}"] = scores.dice(sum(map(scores.confusion, interior, truth)))
    if way not in ("start", "suggest") or count == COUNTS[-1]:
        return {"scores": found}
    each = [versions_of(section, predict) for section in images[:CANDIDATES]]
    cuts = [segments.above(eight.mean(axis=0), at) for eight in each]
    gains = [float(np.mean([error(one, cut, at) for one in eight])) for eight, cut in zip(each, cuts, strict=True)]
    errors = [error(cut, mask, 0.5) for cut, mask in zip(cuts, masks, strict=False)]
    return {"scores": found, "gains": gains, "errors": errors}


def table(runs):
    """Lines: suggest less another way, paired by seed, with the 95 % interval and the verdict, corrected for four."""
    jobs = list(product(COUNTS, WAYS))
    for metric in runs[0]["scores"]:
        of = {job: {(r["seed"], 0): r["scores"][metric] for r in runs if (r["count"], r["way"]) == job} for job in jobs}
        pairs = {(n, way): verdicts.paired(of[n, "suggest"], of[n, way]) for n, way in jobs if way != "suggest"}
        for (count, way), sample, verdict in zip(pairs, pairs.values(), verdicts.holds([*pairs.values()]), strict=True):
            yield f"{metric}, {count} sections, suggest - {way}: {sample} {np.round(sample.values, 4)}, {verdict}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", required=True, type=Path, help="folder of the trainings")
    parser.add_argument("--json", required=True, type=Path, help="write every run's numbers there")
    args = parser.parse_args()
    runs = [record_of(args.runs, *job) for s in SEEDS for job in (("start", 2, s), *product(WAYS, COUNTS, (s,)))]
    print("\n".join(found := list(table(runs))))
    about = {"recipe": RECIPE, "versions": versions(), "hardware": hardware(), "runs": runs, "table": found}
    atomic.write_json(args.json, about, force=True)


if __name__ == "__main__":
    main()
