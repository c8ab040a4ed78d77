"""Segmentation scores from arrays: those of the ISBI-2012 challenge, and the usual ones.

    curves = v_scores(probabilities, references)        # both leaderboard scores, border thinning done once
    curves["v_rand"].value, curves["v_rand"].threshold  # the score, and the threshold at which it was reached

A proposal is the probability of the cell INTERIOR, 1 = interior and 0 = membrane; a reference is a mask whose pixels
> 0 are interior, and < 0 not labelled: no score counts those, and segments, of the reference as of the proposal, end
there as they end at the border of a section. Stacks are sequences of sections of shape (H, W), axes (row, column),
read one after the other, so memory is linear in one section. References: [1]_ V_rand, V_info,
doi:10.3389/fnana.2015.00142; [2]_ warping error, doi:10.1109/CVPR.2010.5539950; [3]_ U-Net, arXiv:1505.04597;
[4]_ SEG, doi:10.1093/bioinformatics/btu080; [5]_ calibration, arXiv:1706.04599.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from score.segments import DAM, above, components, pairs_of_labels, segment, thin_borders, topology_errors

FIXED_THRESHOLD = 0.5
BINS = 15  # of the calibration
NO_INTERIOR = "references must hold interior pixels (> 0). Received: none in any section"
# 0.0, then += 0.1 in double arithmetic: the fourth is 0.30000000000000004, the last 0.9999999999999999.
THRESHOLDS: tuple[float, ...] = tuple(itertools.accumulate([0.0] + [0.1] * 10))


@dataclass(frozen=True)
class Score:
    """A score and how it is shown; tables, reports and comparisons read it from here."""

    function: Callable
    title: str  # its name in a sentence
    words: str  # what it tells
    of: str  # "thresholds": two stacks, for a Curve; "stack": two, for a number; "counts": `confusion`'s; "cells": two
    higher_is_better: bool = True
    digits: int = 5
    chart: str = ""  # shows its curve; each chart has one axis, and the warping error is a thousand times smaller


SCORES: dict[str, Score] = {}


def declare(title: str, words: str, of: str, **options) -> Callable:
    """Enter the function below into `SCORES` under its name: a new score is one such entry."""

    def keep(function):
        SCORES[function.__name__] = Score(function, title, words, of, **options)
        return function

    return keep


@dataclass(frozen=True)
class Curve:
    """A score over a stack against the threshold.

    `value` is the best, `threshold` the first that reaches it; `thresholds` and `curve`, of shape (T,), all of them.
    `per_section`, of shape (S,), is each section's at the stack's best threshold, NaN without reference interior.
    `details` holds what the score is made of, of shape (T,): precision and recall, or splits and mergers in pixels.
    """

    value: float
    threshold: float
    thresholds: np.ndarray
    curve: np.ndarray
    per_section: np.ndarray
    details: dict[str, np.ndarray] = field(default_factory=dict)


class Overlap(NamedTuple):
    """Pixel counts of two labelled sections, over the pixels with reference label > 0."""

    reference: np.ndarray  # one count per reference segment, dams of the proposal included
    proposal: np.ndarray  # one count per proposal segment, dams excluded
    joint: np.ndarray  # one count per pair of segments that meet, dams excluded
    dams: int  # pixels with proposal label 0: each is a segment of its own


# --- building blocks


def overlap(reference_labels: np.ndarray, proposal_labels: np.ndarray) -> Overlap:
    """Count the pixels of every segment, and of every pair of segments, where the reference label is > 0."""
    inside = reference_labels > 0
    reference, proposal = reference_labels[inside], proposal_labels[inside]
    _, _, joint = pairs_of_labels(np.maximum(reference_labels, 0), proposal_labels)
    return Overlap(np.bincount(reference)[1:], np.bincount(proposal)[1:], joint, int(np.sum(proposal == DAM)))


def rand_sums(table: Overlap) -> np.ndarray:
    """Return (AB, B, A): joint, proposal and reference sums of squared counts, each dam its own segment.

    A = sum_i n_i^2, B = sum_{j>=1} n_j^2 + n_0, AB = sum_{i, j>=1} n_ij^2 + n_0 [1]_: precision is AB / B,
    recall AB / A. Counts rather than fractions, so that sections add up weighted by n^2; within one section n
    cancels out.
    """
    squares = [np.sum(counts.astype(np.float64) ** 2) for counts in (table.joint, table.proposal, table.reference)]
    return np.array(squares) + np.array([table.dams, table.dams, 0])


def rand_score(sums: np.ndarray) -> tuple[float, float, float]:
    """Return (F, precision, recall) of `rand_sums`, F = 2 AB / (A + B); NaN without reference interior."""
    joint, proposal, reference = sums
    return _ratio(2 * joint, proposal + reference), _ratio(joint, proposal), _ratio(joint, reference)


def information_score(table: Overlap) -> tuple[float, float, float]:
    """Return (F, precision, recall) of the mutual information I of truth T and proposal S [1]_.

    F = 2 I / (H(T) + H(S)), precision I / H(S), recall I / H(T), with I = H(T) + H(S) - H(T, S). H(S) and
    H(T, S) each gain p_0 ln n for the dams. A proposal of one segment scores 0; without reference
    interior all are NaN.
    """
    pixels = int(table.reference.sum())
    if pixels == 0:
        return np.nan, np.nan, np.nan
    dams = table.dams / pixels * np.log(pixels)
    truth, proposal = _entropy(table.reference, pixels), _entropy(table.proposal, pixels) + dams
    mutual = max(truth + proposal - _entropy(table.joint, pixels) - dams, 0.0)
    parts = (2 * mutual, truth + proposal), (mutual, proposal), (mutual, truth)
    return tuple(_ratio(part, whole, empty=0.0) for part, whole in parts)


def _entropy(counts: np.ndarray, pixels: int) -> float:
    shares = counts[counts > 0] / pixels
    return float(-np.sum(shares * np.log(shares)))


def _ratio(part: float, whole: float, empty: float = np.nan) -> float:
    return float(part / whole) if whole > 0 else empty


# --- scores of the challenge


def v_scores(
    probabilities: Iterable, references: Iterable, thresholds: Sequence[float] = THRESHOLDS
) -> dict[str, Curve]:
    """Return the two leaderboard scores, ``{"v_rand": Curve, "v_info": Curve}``; higher is better.

    They are F-scores after `thin_borders`, over the pixels with reference > 0, whose 4-connected components are the
    true segments [1]_. Each score is the maximum over the thresholds of the MEAN over the sections, so the two may
    choose different thresholds. Sections without reference interior do not count.
    """

    def both(probability, truth, threshold):
        table = overlap(truth, thin_borders(above(probability, threshold)))
        return rand_score(rand_sums(table)), information_score(table)

    values = _tabulate(both, probabilities, references, thresholds)  # (S, T, score, F / precision / recall)
    counted = ~np.isnan(values[:, 0, 0, 0])
    if not counted.any():
        raise ValueError(NO_INTERIOR)
    curves = {}
    for k, name in enumerate(("v_rand", "v_info")):
        f, precision, recall = values[counted, :, k].mean(axis=0).T
        curves[name] = _curve(thresholds, f, values[:, :, k, 0], np.argmax, precision=precision, recall=recall)
    return curves


@declare(
    "V_rand",
    "Take two pixels of the same cell: are they together in the prediction as well, and the other way round? "
    "Thick membranes are forgiven, one gap that joins two large cells costs much.",
    "thresholds",
    chart="scores",
)
def v_rand(probabilities: Iterable, references: Iterable, thresholds: Sequence[float] = THRESHOLDS) -> Curve:
    """Foreground-restricted Rand score after border thinning, see `v_scores`."""
    return v_scores(probabilities, references, thresholds)["v_rand"]


@declare(
    "V_info",
    "How much the predicted segments and the true ones tell of each other, in bits rather than in pairs of "
    "pixels: large cells weigh less than in V_rand.",
    "thresholds",
    chart="scores",
)
def v_info(probabilities: Iterable, references: Iterable, thresholds: Sequence[float] = THRESHOLDS) -> Curve:
    """Foreground-restricted information-theoretic score after border thinning, see `v_scores`."""
    return v_scores(probabilities, references, thresholds)["v_info"]


@declare(
    "Rand error",
    "The pairs of pixels again, but without forgiving thick membranes: every pixel predicted as membrane inside "
    "a cell counts. The figure of the U-Net paper.",
    "thresholds",
    higher_is_better=False,
    chart="errors",
)
def rand_error(probabilities: Iterable, references: Iterable, thresholds: Sequence[float] = THRESHOLDS) -> Curve:
    """1 - max over thresholds of the Rand F-score without thinning [3]_; lower is better.

    The sums of `rand_sums` are added over the sections and divided once, and every membrane pixel is a
    segment of its own.
    """

    def count(probability, truth, threshold):
        return rand_sums(overlap(truth, components(above(probability, threshold))))

    sums = _tabulate(count, probabilities, references, thresholds)
    f, precision, recall = np.apply_along_axis(rand_score, -1, sums.sum(axis=0)).T
    if np.isnan(f).any():
        raise ValueError(NO_INTERIOR)
    sections = np.apply_along_axis(rand_score, -1, sums)[..., 0]
    return _curve(thresholds, 1 - f, 1 - sections, np.argmin, precision=precision, recall=recall)


@declare(
    "pixel error",
    "1 - F1 of the interior pixels at the best threshold. Predicting cell everywhere already scores about 0.12 "
    "on ISBI-2012: not a measure of segmentation.",
    "thresholds",
    higher_is_better=False,
    chart="errors",
)
def pixel_error(probabilities: Iterable, references: Iterable, thresholds: Sequence[float] = THRESHOLDS) -> Curve:
    """1 - max over thresholds of the pixel F1, interior being the positive class, pooled counts [3]_."""
    counts = _tabulate(confusion, probabilities, references, thresholds)
    stack, sections = (1 - np.apply_along_axis(dice, -1, one) for one in (counts.sum(axis=0), counts))
    return _curve(thresholds, stack, sections, np.argmin)


@declare(
    "warping error",
    "The share of pixels at which a cell is split or two are merged, after the truth was bent onto the "
    "prediction: shifted membranes cost nothing.",
    "thresholds",
    higher_is_better=False,
    digits=6,
    chart="warping",
)
def warping_error(
    probabilities: Iterable, references: Iterable, thresholds: Sequence[float] = THRESHOLDS[:10]
) -> Curve:
    """Splits and mergers left after warping the reference onto the proposal, per pixel; their minimum [2]_.

    `details` holds the number of split and of merger pixels of the stack at each threshold. The sections are
    padded with one pixel of membrane; the error is divided by the pixels of the sections themselves.
    """

    def count(probability, truth, threshold):
        splits, mergers = topology_errors(probability, truth, threshold)
        return int(splits.sum()), int(mergers.sum()), int(np.sum(truth >= 0))

    counts = _tabulate(count, probabilities, references, thresholds)  # (S, T, splits / mergers / pixels)
    splits, mergers, pixels = counts.sum(axis=0).T
    sections = counts[..., :2].sum(axis=2) / counts[..., 2]
    return _curve(thresholds, (splits + mergers) / pixels, sections, np.argmin, splits=splits, mergers=mergers)


# --- pixels and cells


def confusion(probability: np.ndarray, reference: np.ndarray, threshold: float = FIXED_THRESHOLD) -> np.ndarray:
    """Return (TP, FP, FN, TN): true and false positives, false and true negatives; positive = interior."""
    labelled, truth = np.asarray(reference) >= 0, np.asarray(reference) > 0
    proposal = above(probability, threshold) & labelled
    both = int(np.sum(proposal & truth))
    proposed, true = int(proposal.sum()), int(truth.sum())
    return np.array([both, proposed - both, true - both, int(labelled.sum()) - proposed - true + both])


@declare("Dice", "Overlap of predicted and true interior at threshold 0.5, 2 TP / (2 TP + FP + FN).", "counts")
def dice(counts: np.ndarray) -> float:
    """Of `confusion` counts, summed over the sections first; 1 if nothing is positive."""
    tp, fp, fn, _ = counts
    return _ratio(2 * tp, 2 * tp + fp + fn, empty=1.0)


@declare("IoU", "Overlap of predicted and true interior at threshold 0.5, TP / (TP + FP + FN).", "counts")
def iou(counts: np.ndarray) -> float:
    """Of `confusion` counts, the Jaccard index; 1 if nothing is positive."""
    tp, fp, fn, _ = counts
    return _ratio(tp, tp + fp + fn, empty=1.0)


@declare("precision", "The share of the predicted interior (threshold 0.5) that is interior.", "counts")
def precision(counts: np.ndarray) -> float:
    """TP / (TP + FP) of `confusion` counts; 1 if nothing is proposed."""
    tp, fp, _, _ = counts
    return _ratio(tp, tp + fp, empty=1.0)


@declare("recall", "The share of the true interior that was predicted (threshold 0.5).", "counts")
def recall(counts: np.ndarray) -> float:
    """TP / (TP + FN) of `confusion` counts; 1 if there is no interior."""
    tp, _, fn, _ = counts
    return _ratio(tp, tp + fn, empty=1.0)


@declare("BCE", "Binary cross-entropy, nats a pixel; sure and wrong costs most.", "stack", higher_is_better=False)
def bce(probabilities: Iterable, references: Iterable) -> float:
    """-mean(y ln P + (1 - y) ln(1 - P)), P clipped as Keras does."""
    total = pixels = 0
    for probability, reference in _sections(probabilities, references):
        labelled = reference >= 0
        p = np.clip(probability[labelled].astype(np.float64), 1e-7, 1 - 1e-7)
        total -= np.sum(np.log(np.where(reference[labelled] > 0, p, 1 - p)))
        pixels += p.size
    return float(total / pixels)


def calibration(probabilities: Iterable, references: Iterable) -> dict[str, np.ndarray]:
    """Collect `BINS` reliability bins over a stack: does P = 0.8 mean interior in 80 % of the pixels?

    It bins the interior probability itself, k / BINS <= P < (k + 1) / BINS (the last one closed), not the
    confidence in the class chosen. Each bin has the number of its "pixels", the sum of their "probability", and how
    many of them are "interior".
    """
    sums = np.zeros((3, BINS))
    for probability, reference in _sections(probabilities, references):
        labelled = reference >= 0
        p = np.asarray(probability[labelled], np.float64)
        index = np.minimum((p * BINS).astype(np.int64), BINS - 1)
        for row, weights in zip(sums, (np.ones_like(p), p, reference[labelled] > 0), strict=True):
            row += np.bincount(index, weights, minlength=BINS)
    return dict(zip(("pixels", "probability", "interior"), sums, strict=True))


@declare(
    "ECE",
    "Expected calibration error: how far a predicted probability is from the share of interior pixels found at "
    "that probability, on average.",
    "stack",
    higher_is_better=False,
)
def ece(probabilities: Iterable, references: Iterable) -> float:
    """Sum over the bins of `calibration` of |interior - P|, divided by all pixels [5]_."""
    bins = calibration(probabilities, references)
    return float(np.abs(bins["interior"] - bins["probability"]).sum() / bins["pixels"].sum())


@declare("SEG", "The mean IoU of the true cells with the predicted cell that holds more than half of them.", "cells")
def seg(predictions: Iterable, references: Iterable) -> float:
    """SEG of the Cell Tracking Challenge [4]_ for instance masks: mean Jaccard index of the reference cells.

    A predicted cell S matches a reference cell R where |R and S| > |R| / 2 (at most one does); a cell without a match
    scores 0. Cells that only the prediction holds are not punished.

    >>> seg([np.array([[1, 1, 1, 0]])], [np.array([[5, 5, 5, 5]])])
    0.75
    """
    return _mean_jaccard(predictions, references, majority=True)


@declare("mean IoU", "The mean over the true cells of their best overlap (IoU) with a predicted one.", "cells")
def mean_iou(predictions: Iterable, references: Iterable) -> float:
    """Mean over all reference cells of the best IoU with any predicted cell, 0 where none overlaps.

    The U-Net paper [3]_ reports an "average intersection over union" without a formula. This is SEG without its
    majority rule, so never below `seg`, which is the challenge's own measure and the likelier one.
    """
    return _mean_jaccard(predictions, references, majority=False)


def _mean_jaccard(predictions: Iterable, references: Iterable, majority: bool) -> float:
    total, cells = 0.0, 0
    for prediction, reference in _sections(predictions, references):
        best = _best_jaccard(prediction, np.maximum(reference, 0), majority)
        total, cells = total + best.sum(), cells + best.size
    if cells == 0:
        raise ValueError("references must hold labelled cells (> 0). Received: none in any section")
    return float(total / cells)


def _best_jaccard(prediction: np.ndarray, reference: np.ndarray, majority: bool) -> np.ndarray:
    from skimage.segmentation import relabel_sequential

    truth, labels = (relabel_sequential(x.astype(np.int64))[0] for x in (reference, prediction))
    sizes, widths = np.bincount(truth.ravel()), np.bincount(labels.ravel())
    i, j, shared = pairs_of_labels(truth, labels)
    jaccard = shared / (sizes[i] + widths[j] - shared)
    if majority:
        jaccard = np.where(2 * shared > sizes[i], jaccard, 0.0)
    best = np.zeros(sizes.size)
    np.maximum.at(best, i, jaccard)
    return best[1:]


# --- the threshold to segment with


def best_threshold(probabilities: Iterable, references: Iterable) -> float:
    """Return the threshold of the highest V_rand on these (training) sections; of equals that nearest to 0.5.

    >>> best_threshold(np.full((1, 4, 4), 0.7), np.ones((1, 4, 4)))
    0.5
    """
    result = v_rand(probabilities, references)
    best = result.thresholds[result.curve >= result.curve.max()]
    return float(best[np.argmin(np.abs(best - 0.5))])


def best_segmentation(probabilities: Sequence, references: Sequence) -> dict[str, float]:
    """Return the settings of `segment` of the highest mean IoU on these (training) sections, for a record of weights.

    Seeds are P > threshold and hold at least a tenth of the median reference cell; cells end at P = background, 0.3 or
    0.5. Of equals, the first.
    """
    sizes = np.concatenate([np.unique(one[one > 0], return_counts=True)[1] for one in references])
    smallest = max(1, int(np.median(sizes)) // 10)

    def score(pair):
        options = {"min_size": smallest, "background": pair[1], "lines": False}
        return mean_iou((segment(one, pair[0], **options) for one in probabilities), references)

    threshold, background = max(itertools.product((0.5, 0.6, 0.7, 0.8, 0.9), (0.3, 0.5)), key=score)
    return {"threshold": threshold, "background": background, "smallest_cell_px": smallest}


# --- machinery


def _tabulate(count: Callable, probabilities: Iterable, references: Iterable, thresholds: Sequence) -> np.ndarray:
    """Return `count(probability, true segments, threshold)` of every section and threshold, shape (S, T, ...)."""
    pairs = ((p, np.where(r < 0, -1, components(r > 0))) for p, r in _sections(probabilities, references))
    return np.array([[count(p, truth, t) for t in thresholds] for p, truth in pairs])


def _curve(thresholds: Sequence, curve: np.ndarray, sections: np.ndarray, pick: Callable, **details) -> Curve:
    best, thresholds = int(pick(curve)), np.asarray(thresholds, np.float64)
    return Curve(float(curve[best]), float(thresholds[best]), thresholds, curve, sections[:, best], details)


def _sections(probabilities: Iterable, references: Iterable) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Go through two stacks together, section by section, and refuse what does not fit.

    Of the first, nothing is left where the second is not labelled.
    """
    number = -1
    for number, pair in enumerate(itertools.zip_longest(probabilities, references, fillvalue=())):
        shapes = [np.shape(section) for section in pair]
        if len(shapes[0]) != 2 or shapes[0] != shapes[1]:
            raise ValueError(
                "probabilities and references must be as many sections, of one shape (H, W). Received: "
                f"{shapes[0]} and {shapes[1]} in section {number}"
            )
        proposal, reference = map(np.asarray, pair)
        yield proposal * (reference >= 0) if (reference < 0).any() else proposal, reference
    if number < 0:
        raise ValueError("probabilities must hold at least one section. Received: 0")
