"""Which borders of a prediction are false: learned on the training sections, kept beside the weights.

A prediction is cut into superpixels by a watershed of its membrane. Between two that touch lies a border, and how it
looks (its probability and gray value, its length, the two sizes) tells whether a membrane is there or one process was
split by a smear. Gradient boosting learns that from the labels of the training sections alone, in seconds. Source of
the design: the learned mergers of the ISBI-2012 challenge's best entries (doi:10.3389/fnana.2015.00142).
"""

import zipfile
from typing import NamedTuple

import numpy as np

from data import DataError
from files import atomic

SUFFIX = ".borders.npz"
SMOOTHING = 1.0  # of the membrane, px
MEMBRANE = 0.3  # the probability from which on a pixel is no place for a cell's middle
WIDER = 2.0  # px by which a seed must be further from membranes than its surroundings
DEPTH = 0.1  # the probability of membrane by which a narrow cell must lie below its surroundings, to have a seed, too
HEIGHT = 20.0  # px of distance that a membrane is worth
PERCENTILES = (0, 5, 10, 25, 50, 75, 90, 100)
FEATURES = 36
MOST = 10**6  # borders that are learned from
LARGEST = MOST * (4 * FEATURES + 1) + 1000  # bytes of a file, unpacked
FORESTS = 3  # whose mean is taken: one depends on its seed


# -- superpixels and their borders --------------------------------------------------------------------------------


def superpixels(probability):
    """Labels 1..K of a section's interior probability (H, W), int32, without lines between them.

    One for every place that lies further from membranes than its surroundings, so that they meet in narrow passages,
    and one for every basin of the membrane that has no such place.
    """
    from scipy import ndimage
    from skimage.morphology import h_maxima, h_minima
    from skimage.segmentation import watershed

    membrane = ndimage.gaussian_filter(1 - np.asarray(probability, np.float32), SMOOTHING)
    distance = ndimage.distance_transform_edt(membrane < MEMBRANE).astype(np.float32)
    distance = ndimage.gaussian_filter(distance, 1.5 * SMOOTHING)
    wide, lowest = h_maxima(distance, WIDER) > 0, h_minima(membrane, DEPTH) > 0
    basins = watershed(membrane, ndimage.label(lowest)[0])
    narrow = np.bincount(basins.ravel(), wide.ravel()) == 0
    seeds = ndimage.label(wide | (lowest & narrow[basins]))[0]
    return watershed(HEIGHT * membrane - distance, seeds).astype(np.int32, copy=False)


def borders_of(labels):
    """Pairs of superpixels that touch, (N, 2), and the flat indices of the pixels on either side of each border."""
    index = np.arange(labels.size).reshape(labels.shape)
    sides = []
    for before, after in ((np.s_[:, :-1], np.s_[:, 1:]), (np.s_[:-1], np.s_[1:])):
        touching = labels[before] != labels[after]
        sides.append(np.stack([x[part][touching] for x in (labels, index) for part in (before, after)], axis=1))
    first, second, *_ = both = np.concatenate(sides).T
    order = np.lexsort((np.maximum(first, second), np.minimum(first, second)))
    pairs, pixels = np.sort(np.stack(both[:2], axis=1)[order], axis=1), np.stack(both[2:], axis=1)[order]
    starts = np.flatnonzero(np.r_[True, (pairs[1:] != pairs[:-1]).any(axis=1)])[: len(pairs)]
    return pairs[starts], np.split(pixels, starts[1:])[: len(starts)]


def features_of(probability, section, labels, pairs, pixels):
    """What is measured at each border: float32 (N, FEATURES), of the probability and the gray values (H, W)."""
    from scipy import ndimage

    section = np.asarray(section, np.float32)
    gray = ndimage.gaussian_filter(section, 1)
    gray = (gray - gray.mean()) / (gray.std() + 1e-6)
    edge = ndimage.gaussian_gradient_magnitude(section, 1.5)
    inside = ndimage.distance_transform_edt(probability > 0.5)
    flat = {"p": probability, "gray": gray, "edge": edge / (edge.mean() + 1e-6), "inside": inside}
    flat |= {"least": ndimage.minimum_filter(probability, 5), "mean": ndimage.uniform_filter(probability, 7)}
    flat["smooth"] = ndimage.gaussian_filter(probability, 2)
    flat = {name: np.ravel(values) for name, values in flat.items()}
    size = np.bincount(labels.ravel())
    count = np.maximum(size, 1)
    mean_p, mean_gray = (np.bincount(labels.ravel(), flat[name]) / count for name in ("p", "gray"))
    widest = np.append(ndimage.maximum(inside, labels, np.arange(size.size)), 0)
    lengths = np.array([len(one) for one in pixels])
    perimeter = np.bincount(pairs.ravel(), np.repeat(lengths, 2), minlength=size.size)
    found = np.empty((len(pairs), FEATURES), np.float32)
    for row, (i, j), sides, length in zip(found, pairs, pixels, lengths, strict=True):
        lower_p, lower_gray = (flat[name][sides].min(axis=1) for name in ("p", "gray"))
        small, large = (i, j) if size[i] < size[j] else (j, i)
        passage, narrow = flat["inside"][sides].max(), max(min(widest[i], widest[j]), 1)
        row[:] = [
            *np.percentile(lower_p, PERCENTILES),
            lower_p.mean(),
            *np.percentile(lower_gray, (5, 25, 50, 75, 95)),
            lower_gray.mean(),
            *(length, length / min(perimeter[i], perimeter[j]), length / max(perimeter[i], perimeter[j])),
            *(np.log(size[small]), np.log(size[large]), mean_p[small], mean_p[large]),
            *(mean_gray[small], mean_gray[large], abs(mean_gray[small] - mean_gray[large])),
            *(flat["least"][sides].max(), flat["least"][sides].mean(), flat["mean"][sides].mean()),
            *(flat["smooth"][sides].max(), flat["smooth"][sides].mean(), flat["edge"][sides].mean()),
            *(widest[small], widest[large], passage, passage / narrow, length / (2 * narrow)),
        ]
    return found


class Cut(NamedTuple):
    """A section in superpixels: `labels` (H, W), and of their borders `pairs`, `pixels` and `features`, as above."""

    labels: np.ndarray
    pairs: np.ndarray
    pixels: list
    features: np.ndarray


def cut(probability, section):
    """The cut of a section, of its interior probability and its gray values, both (H, W)."""
    labels = superpixels(probability)
    pairs, pixels = borders_of(labels)
    return Cut(labels, pairs, pixels, features_of(probability, section, labels, pairs, pixels))


def examples(cut, truth):
    """Features of a labelled section's borders, and whether one cell lies on both sides; of labelled ones only.

    `truth` is a mask (H, W): > 0 interior, < 0 not labelled. A superpixel belongs to the cell that most of it shows.
    """
    from score import segments

    labels, pairs, pixels, features = cut
    cells = segments.components(truth > 0)
    owner = np.zeros(labels.max() + 1, int)
    of_superpixel, of_cell, shared = segments.pairs_of_labels(labels, cells)
    order = np.argsort(shared, kind="stable")
    owner[of_superpixel[order]] = of_cell[order]  # the largest comes last
    known = np.array([(truth.ravel()[sides] >= 0).all() for sides in pixels], bool)
    first, second = owner[pairs].T
    return features[known], ((first == second) & (first > 0))[known]


# -- learning -----------------------------------------------------------------------------------------------------


class Merger:
    """Probability that a border is false, learned from `features` (N, FEATURES) and `joined` (N,), bool."""

    def __init__(self, features, joined):
        from sklearn.ensemble import HistGradientBoostingClassifier

        self.features, self.joined = features, joined
        how = {"max_iter": 150, "learning_rate": 0.06, "max_leaf_nodes": 15, "min_samples_leaf": 20}
        how |= {"l2_regularization": 1.0, "max_features": 0.5, "early_stopping": False}
        self.forests = [HistGradientBoostingClassifier(**how, random_state=seed) for seed in range(FORESTS)]
        for forest in self.forests:
            forest.fit(features, joined)

    @classmethod
    def learned(cls, parts):
        """From `examples` of several sections; None where all borders are alike, so that nothing can be learned."""
        features, joined = (np.concatenate(each) for each in zip(*parts, strict=True))
        step = -(-len(joined) // MOST)
        return cls(features[::step], joined[::step]) if 0 < joined.sum() < len(joined) else None

    def false_borders(self, features):
        return np.mean([forest.predict_proba(features)[:, 1] for forest in self.forests], axis=0)


def merged(cut, mergers):
    """Map of a section, (H, W) float32: 1 inside superpixels, on a border the probability that it is false.

    Above a threshold it holds segments, as the challenge's scorer takes them. Of several mergers the mean counts.
    """
    found = (cut.labels.ravel() > 0).astype(np.float32)  # all membrane: no superpixel
    if len(cut.pairs):
        false = np.mean([merger.false_borders(cut.features) for merger in mergers], axis=0)
        sides = np.concatenate(cut.pixels)
        values = np.repeat(false, [len(one) for one in cut.pixels])
        np.minimum.at(found, sides.ravel(), np.repeat(values, 2).astype(np.float32))
    return found.reshape(cut.labels.shape)


# -- the file beside the weights ----------------------------------------------------------------------------------


def save(path, merger):
    """Write what it was learned from: numbers alone, no pickled object, so that it is safe to load."""
    with atomic.replacing(path, force=True) as partial, open(partial, "wb") as file:
        np.savez_compressed(file, features=merger.features, joined=merger.joined)


def load(path):
    """The merger of such a file, learned again, the same; or a DataError that says what is wrong with it."""
    try:
        with zipfile.ZipFile(path) as parts:
            if sum(part.file_size for part in parts.infolist()) > LARGEST:
                raise ValueError(f"it holds more than {LARGEST} bytes")
        with np.load(path, allow_pickle=False) as file:
            features, joined = file["features"], file["joined"]
        if features.ndim != 2 or features.shape[1] != FEATURES or features.dtype != np.float32:
            raise ValueError(f"features must be float32 (N, {FEATURES})")
        if joined.shape != features.shape[:1] or joined.dtype != bool or not 0 < joined.sum() < len(joined) <= MOST:
            raise ValueError("joined must be bool, of both kinds, one for each row of features")
        if not np.isfinite(features).all():
            raise ValueError("features must be finite")
    except Exception as error:  # a broken zip shows itself as one of a dozen kinds
        raise DataError(f"--weight_path: {path} is broken: {error!s:.200}") from error
    return Merger(features, joined)
