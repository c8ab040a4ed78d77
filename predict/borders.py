"""Which borders of a prediction are false: learned on the training sections, kept beside the weights.

A prediction is cut into superpixels by a watershed of its membrane. Between two that touch lies a border, and how it
looks (its probability and gray value, its length, the two sizes) tells whether a membrane is there or one process was
split by a smear. Gradient boosting learns that from the labels of the training sections alone, in seconds. A second one
also sees the neighbouring sections: whether what lies on both sides is one segment there. Source of the design: the
learned mergers of the ISBI-2012 challenge's best entries (doi:10.3389/fnana.2015.00142).
"""

import itertools
import zipfile
from typing import NamedTuple

import numpy as np
import threadpoolctl

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
FORESTS = 3  # whose mean is taken: one depends on its seed
ROUNDS = 150  # trees of a forest
PARTS = 4  # of the sections: what is learned from neighbours takes each as judged by the other parts
JOINED_AT = (0.5, 0.85)  # a neighbour's pieces are joined over borders that are false with more than this probability
REACH = 100  # px around a border within which its sides are looked for in the neighbours
EVIDENCE = 1 + 2 * len(JOINED_AT)
LARGEST = MOST * (4 * (FEATURES + EVIDENCE) + 1) + 1000  # bytes of a file, unpacked


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


# -- the neighbouring sections ------------------------------------------------------------------------------------


def segments_of(cut, false):
    """Segments of a section, a (H, W) of labels for each of JOINED_AT; `false` is the probability for each border."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    count, found = int(cut.labels.max()) + 1, []
    for least in JOINED_AT:
        first, second = cut.pairs[false > least].T
        graph = coo_array((np.ones(len(first), bool), (first, second)), shape=(count, count))
        found.append(connected_components(graph, directed=False)[1][cut.labels])
    return found


def shared(cut, neighbours):
    """How much of both sides of a border lies in the same segments of a neighbour: float32 (N, 2 len(JOINED_AT)), 0..1.

    `neighbours` are one or two of `segments_of`; the least of them, then the most. NaN where there are none.
    """
    found = np.full((len(cut.pairs), EVIDENCE - 1), np.nan, np.float32)
    if not neighbours:
        return found
    width = cut.labels.shape[1]
    for row, pair, pixels in zip(found, cut.pairs, cut.pixels, strict=True):
        around = tuple(slice(max(0, x.min() - REACH), x.max() + REACH + 1) for x in np.divmod(pixels, width))
        sides = [cut.labels[around] == label for label in pair]
        both = [[_overlap(*(segments[around][side] for side in sides)) for segments in one] for one in neighbours]
        row[:] = [*np.min(both, axis=0), *np.max(both, axis=0)]
    return found


def _overlap(*sides):
    """The intersection of two histograms of labels."""
    bins = max(side.max() for side in sides) + 1
    return np.min([np.bincount(side, minlength=bins) / side.size for side in sides], axis=0).sum()


def with_neighbours(items):
    """Each item, and a list of the one before and the one after; the items are drawn one ahead.

    >>> list(with_neighbours("abc"))
    [('a', ['b']), ('b', ['a', 'c']), ('c', ['b'])]
    """
    items, before = iter(items), []
    here = list(itertools.islice(items, 1))
    while here:
        after = list(itertools.islice(items, 1))
        yield here[0], before + after
        before, here = here, after


# -- learning -----------------------------------------------------------------------------------------------------


class Merger:
    """Probability that a border is false, learned from `features` (N, FEATURES) and `joined` (N,), bool.

    `evidence` (N, EVIDENCE) is that probability, as sections that were not learned from would have it, and `shared`.
    It is None, and NaN in the rows of sections without neighbours, where nothing is known of neighbours.
    """

    def __init__(self, features, joined, evidence=None):
        self.features, self.joined, self.evidence = features, joined, evidence
        self.alone, self.beside = _forests(features, joined), None
        known = np.zeros(len(joined), bool) if evidence is None else ~np.isnan(evidence).any(axis=1)
        if _both(joined[known]):
            self.beside = _forests(np.hstack([features, evidence])[known], joined[known])

    @classmethod
    def learned(cls, *readings):
        """From (cut, truth) of labelled sections, in stretches of neighbours; None where nothing can be learned.

        Further `readings` are other cuts of the same sections in the same order.
        """
        pairs = [list(itertools.chain.from_iterable(stretches)) for stretches in readings]
        parts = [[examples(*pair) for pair in reading] for reading in pairs]
        features, joined = (np.concatenate(each) for each in zip(*itertools.chain(*parts), strict=True))
        if not _both(joined):
            return None
        evidence, false = None, unseen([[cut for cut, _ in reading] for reading in pairs], parts)
        if false is not None:
            false = itertools.chain.from_iterable(false)
            rows = (_evidence(each, itertools.islice(false, len(each))) for each in itertools.chain(*readings))
            evidence = np.concatenate(list(itertools.chain.from_iterable(rows)))
        step = -(-len(joined) // MOST)
        return cls(*(each if each is None else each[::step] for each in (features, joined, evidence)))

    def look(self, cut):
        """What a section alone tells: the probability of each border, and the segments that neighbours are shown."""
        false = _mean(self.alone, cut.features)
        return false, self.beside and segments_of(cut, false)

    def judge(self, cut, look, neighbours):
        """The probability that each border is false, by what `look` gave for the section and for its neighbours."""
        if not (self.beside and neighbours):
            return look[0]
        return _mean(self.beside, np.hstack([cut.features, _row(cut, look, neighbours)]))


def unseen(cuts, parts):
    """The probability of each border, by forests learned from other sections; None where these are too few.

    `cuts`, their `parts` (features, joined) and what is found are lists of readings of the same sections.
    """
    found = [[] for _ in cuts]
    sections = np.arange(len(cuts[0]))
    for held in np.array_split(sections, min(PARTS, len(sections))):
        others = [reading[i] for reading in parts for i in sections if i not in held]
        features, joined = (np.concatenate(each) for each in zip(*others, strict=True)) if others else ((), ())
        if not _both(joined):
            return None
        forests = _forests(features, joined, 1)
        for of_reading, reading in zip(found, cuts, strict=True):
            of_reading += [_mean(forests, reading[i].features) for i in held]
    return found


def _evidence(stretch, probabilities):
    """Of the labelled borders of neighbouring sections, (cut, truth), with the probability that each is false."""
    looked = ((pair, (false, segments_of(pair[0], false))) for pair, false in zip(stretch, probabilities, strict=True))
    for ((cut, truth), look), neighbours in with_neighbours(looked):
        yield examples(cut._replace(features=_row(cut, look, [other for _, other in neighbours])), truth)[0]


def _row(cut, look, neighbours):
    """Evidence of each border, float32 (N, EVIDENCE)."""
    found = shared(cut, [segments for _, segments in neighbours])
    return np.column_stack([look[0], found]).astype(np.float32)


def _both(joined):
    """Whether there are true borders and false ones."""
    return 0 < np.sum(joined) < len(joined)


def _one_thread():
    """For the forests: two gain a tenth, and on a busy machine they wait for each other, fifty times as long."""
    return threadpoolctl.threadpool_limits(1, "openmp")


def _forests(features, joined, count=FORESTS):
    from sklearn.ensemble import HistGradientBoostingClassifier

    how = {"max_iter": ROUNDS, "learning_rate": 0.06, "max_leaf_nodes": 15, "min_samples_leaf": 20}
    how |= {"l2_regularization": 1.0, "max_features": 0.5, "early_stopping": False}
    step = -(-len(joined) // MOST)
    forests = (HistGradientBoostingClassifier(**how, random_state=seed) for seed in range(count))
    with _one_thread():
        return [forest.fit(features[::step], joined[::step]) for forest in forests]


def _mean(forests, features):
    if not len(features):
        return np.empty(0)
    with _one_thread():
        return np.mean([forest.predict_proba(features)[:, 1] for forest in forests], axis=0)


def maps(cuts, mergers):
    """Maps of neighbouring sections, one after the other, each (H, W) float32.

    A map is 1 inside superpixels, and on a border the probability that it is false. Above a threshold it holds
    segments, as the challenge's scorer takes them. Of several mergers the mean counts. `cuts` are drawn one ahead.
    """
    looked = ((cut, [merger.look(cut) for merger in mergers]) for cut in cuts)
    for (cut, looks), neighbours in with_neighbours(looked):
        others = zip(*(looks for _, looks in neighbours), strict=True) if neighbours else [()] * len(mergers)
        judged = (each.judge(cut, *of_it) for each, *of_it in zip(mergers, looks, others, strict=True))
        yield _painted(cut, np.mean(list(judged), axis=0))


def _painted(cut, false):
    found = (cut.labels.ravel() > 0).astype(np.float32)  # all membrane: no superpixel
    if len(cut.pairs):
        sides = np.concatenate(cut.pixels)
        values = np.repeat(false, [len(one) for one in cut.pixels])
        np.minimum.at(found, sides.ravel(), np.repeat(values, 2).astype(np.float32))
    return found.reshape(cut.labels.shape)


# -- the file beside the weights ----------------------------------------------------------------------------------


def save(path, merger):
    """Write what it was learned from: numbers alone, no pickled object, so that it is safe to load."""
    arrays = {"features": merger.features, "joined": merger.joined, "evidence": merger.evidence}
    with atomic.replacing(path, force=True) as partial, open(partial, "wb") as file:
        np.savez_compressed(file, **{name: array for name, array in arrays.items() if array is not None})


def load(path):
    """The merger of such a file, learned again, the same; or a DataError that says what is wrong with it."""
    try:
        with zipfile.ZipFile(path) as parts:
            if sum(part.file_size for part in parts.infolist()) > LARGEST:
                raise ValueError(f"it holds more than {LARGEST} bytes")
        with np.load(path, allow_pickle=False) as file:
            features, joined, evidence = file["features"], file["joined"], file.get("evidence")
        if features.ndim != 2 or features.shape[1] != FEATURES or features.dtype != np.float32:
            raise ValueError(f"features must be float32 (N, {FEATURES})")
        if joined.shape != features.shape[:1] or joined.dtype != bool or not 0 < joined.sum() < len(joined) <= MOST:
            raise ValueError("joined must be bool, of both kinds, one for each row of features")
        if not np.isfinite(features).all():
            raise ValueError("features must be finite")
        if evidence is not None:
            if (evidence.shape, evidence.dtype) != ((len(joined), EVIDENCE), np.float32):
                raise ValueError(f"evidence must be float32 (N, {EVIDENCE}), one for each row of features")
            if np.isinf(evidence).any():
                raise ValueError("evidence must not be infinite")
        merger = Merger(features, joined, evidence)
    except Exception as error:  # a broken zip shows itself as one of a dozen kinds
        raise DataError(f"--weight_path: {path} is broken: {error!s:.200}") from error
    return merger
