"""The end of a run: last weights, threshold, scores of whole sections, pictures, the final record."""

import math
from functools import cache

import numpy as np

import data
import figures
from data import DataError
from files import atomic
from files.sections import stretches
from files.shell import say
from predict import borders, prediction
from score import evaluation, scores, segments
from train.record import HISTORY
from train.trainee import averaged_weights

LEARNED_PX = 2**25  # of training sections that false borders are learned from, 128 of 512 x 512
STRETCH = 8  # sections that follow each other, of which those are taken
NOISE = 0.2, 2  # of a section's standard deviation, and times what the network was trained with: then it is less sure


def finish(recorder, stacks, tta, merge=False, trained_noise=0.0):
    """Save the last weights, then score the chosen ones on the held-out sections, else on some training sections.

    With `merge`, false borders are learned from the network's own predictions of its training sections. `trained_noise`
    is the most that the training added to them, in their standard deviations.
    """
    place, journal, network = recorder.place, recorder.journal, recorder.alone.network
    split, cells = stacks.split, stacks.cells
    predict = prediction.section_predictor(network, stacks.normalisation, tta=tta)
    images = stacks.images.sections
    interior_of = cache(lambda i: finite(predict(images[i]), i))  # some both choose and are scored
    cut_of = cache(lambda i: borders.cut(interior_of(i), images[i]))
    noise = NOISE[0] + NOISE[1] * trained_noise
    noisy_cut_of = cache(lambda i: borders.cut(finite(predict(noisy(images[i], i, noise)), i), images[i]))
    chosen = some(split.inner or split.train)
    with averaged_weights(recorder.alone):
        if not journal.validated:  # nothing to choose by: the last weights it is, if they are worth saving
            interior_of(chosen[0])
            recorder.save_weights(place.weights)
        recorder.save_weights(place.last)
    network.load_weights(place.weights)
    record = recorder.record | {"finished": True, "stopped_early": journal.stopped}
    record["final"] = journal.rows[-1] | {"best_val_loss": journal.best if math.isfinite(journal.best) else None}
    record |= choose(stacks, chosen, interior_of)
    sections = list(split.held_out or split.inner or some(split.train))
    interior = np.stack([interior_of(i) for i in sections])
    role = "held_out" if split.held_out else "training_sections"
    record["training_seconds"] = round(journal.seconds, 1)
    merger, threshold = learn_borders(stacks, chosen, cut_of, noisy_cut_of) if merge else (None, None)
    keep(place, record, role, merger, {"threshold": threshold, "tta": tta, "noise": noise})
    truth = cells or stacks.masks
    shown = np.stack(list(prediction.segment_stack(interior, record))) if cells else interior
    record[role] = score(truth.sections[sections], shown, sections, bool(cells))
    if merger and (truth.sections[sections] > 0).any():
        record[f"{role}_merged"] = score_merged(stacks, sections, cut_of, merger)
    middle, course = len(sections) // 2, recorder.course
    pictures = (stacks.images.sections[sections[middle]], truth.sections[sections[middle]], shown[middle])
    titles = (f"section {sections[middle]}", "truth", "prediction")
    figures.panel(*pictures, place.picture(role), titles=titles)
    figures.curves({key: [row.get(key) for row in journal.rows] for key in HISTORY}, place.picture("curves"))
    rates = [float(course.rate(n)) for n in range(len(journal.rows) * course.steps_per_epoch)]
    figures.learning_rate(rates, place.picture("learning_rate"), label=course.mode)
    atomic.write_json(place.record, record)
    say(f"weights: {place.weights}; record, history and pictures: {place.folder}")


def keep(place, record, role, merger, how):
    """Write beside the weights how to segment by them; what was learned from earlier weights of the run goes."""
    file, beside = prediction.borders_file(place.weights), prediction.read_record(place.weights)
    for old, key in ((record, "merge"), (record, f"{role}_merged"), (beside, "merge")):
        old.pop(key, None)
    if merger:
        borders.save(file, merger)
        record["merge"] = how
    else:
        file.unlink(missing_ok=True)
    kept = {key: record[key] for key in (*prediction.SEGMENTATION, "merge") if key in record}
    atomic.write_json(prediction.record_file(place.weights), beside | kept)


def finite(interior, i):
    """The interior probability of section i, (H, W); a DataError where it is not finite."""
    if np.isfinite(interior).all():
        return interior
    raise DataError(f"the network's prediction of section {i} is not finite: the run has diverged, try lower rates.")


def noisy(section, i, level):
    """The section (H, W) with noise of `level` times its standard deviation, the same for the same number `i`."""
    noise = np.random.default_rng(i).standard_normal(section.shape, np.float32)
    return section + np.float32(level * section.std(dtype=np.float64)) * noise


def some(sections, most=6):
    """At most `most` of the sections, evenly spread."""
    return [sections[i * len(sections) // most] for i in range(most)] if len(sections) > most else list(sections)


def learn_borders(stacks, chosen, *cuts_of):
    """What tells a false border, of training sections; and the best threshold for `chosen` by the others' borders.

    `cuts_of` a section are of its prediction, as it is and noisy: a network is too sure of sections that it learned.
    The threshold is 0.5 where there are no others. (None, 0.5) where no border is false, or none is true.
    """
    masks = stacks.masks.sections
    most = max(1, LEARNED_PX // masks[0].size)
    sections = list(stacks.split.train)
    if len(sections) > most:
        length = min(STRETCH, most)
        runs = [sections[i : i + length] for i in range(0, len(sections), length)]
        sections = [i for run in some(runs, most // length) for i in run]

    def learned(sections):
        runs = stretches(sections)
        return borders.Merger.learned(*([[(of(i), masks[i]) for i in run] for run in runs] for of in cuts_of))

    merger = learned(sections)
    if merger is None:
        say("--merge: no border is false in the training sections, or all are, so there is nothing to learn")
        return None, 0.5
    others = [i for i in sections if i not in chosen]
    trial = learned(others) if 0 < len(others) < len(sections) else merger
    if not others or trial is None or not (masks[chosen] > 0).any():
        return merger, 0.5
    near = {j for i in chosen for j in (i - 1, i, i + 1)} & {*sections, *chosen}  # what judges those
    maps = dict(maps_of(sorted(near), cuts_of[0], trial))
    return merger, scores.best_threshold([maps[i] for i in chosen], masks[chosen])


def maps_of(sections, cut_of, merger):
    """Number and map of each section; those that follow each other are neighbours."""
    for run in stretches(sections):
        yield from zip(run, borders.maps(map(cut_of, run), [merger]), strict=True)


def choose(stacks, chosen, interior_of):
    """How `predict --segment` cuts the probability into cells: what is best on some training sections."""
    truth = (stacks.cells or stacks.masks).sections
    if not (truth[chosen] > 0).any():  # nor does it say anything there
        chosen = some([i for i in stacks.split.train if (truth[i] > 0).any()])
    if not chosen:
        return {"threshold": 0.5} | ({"background": 0.5} if stacks.cells else {})
    best = scores.best_segmentation if stacks.cells else scores.best_threshold
    found = best([interior_of(i) for i in chosen], truth[chosen])
    return found if stacks.cells else {"threshold": found}


def score(truth, shown, sections, cells=False):
    """Scores of whole sections, of labels where they are of cells, and a plain word where they are worth nothing."""
    what = "cell" if cells else "interior"
    if not (truth > 0).any():
        say(f"WARNING: no section of these holds {what}, so there is nothing to score")
        return {"sections": sections, "degenerate": f"no {what}"}
    if cells:
        found = evaluation.score_instances(shown, truth, sections=sections)
        wrong = None if shown.any() else "the prediction holds no cell"
        names = ("mean_iou", "seg")
    else:
        found = evaluation.score_arrays(shown, truth, tuple(evaluation.SCORES), sections=sections)
        wrong, names = degenerate(shown, truth), evaluation.DEFAULT_SCORES
    say(f"sections {data.format_sections(sections)}: " + ", ".join(f"{name} {found[name]:.4f}" for name in names))
    if wrong or not cells:
        say(f"WARNING: {wrong}" if wrong else "the prediction beats 'always interior'")
    return found | {"degenerate": wrong}


def score_merged(stacks, sections, cut_of, merger):
    """The challenge's scores of whole sections once the false borders are taken away."""
    maps = [one for _, one in maps_of(sections, cut_of, merger)]
    found = evaluation.score_arrays(maps, stacks.masks.sections[sections], ("v_rand", "v_info"), sections=sections)
    if found["v_rand"] is not None:
        say(f"false borders taken away: v_rand {found['v_rand']:.4f}, v_info {found['v_info']:.4f}")
    return found


def degenerate(interior, truth):
    """Why a prediction is worth nothing, or None.

    "Always interior" scores the Dice 2 f / (1 + f) for a fraction f of interior, 0.877 on the ISBI-2012 labels.
    """
    interior, truth = interior[truth >= 0], truth[truth >= 0]
    if float(interior.std()) < 1e-3:
        return f"the prediction is constant ({float(interior.mean()):.3f}): the network has learned nothing"
    fraction = float(truth.mean())
    always, found = 2 * fraction / (1 + fraction), scores.dice(scores.confusion(interior, truth))
    if found <= always:
        return f"Dice {found:.3f} is no better than 'always interior', which scores {always:.3f}"
    return None


def draw_weights(stacks, weights, path):
    """The first training section with its border weights."""
    i = stacks.split.train[0]
    labels = segments.components(stacks.masks.sections[i] > 0)
    figures.weight_map(weights[i], path, image=stacks.images.sections[i], labels=labels)
