"""Segments of a section: probability to labels, border thinning, watershed, where two labellings differ, and warping.

Sections have shape (H, W), axes (row, column); 1 = cell interior, 0 = membrane. What needs a loop over pixels
in a fixed order is compiled by numba, see `compiled`.
"""

import functools
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

# Labels of the flooding: segments are positive, DAM separates them, the other two exist only while it runs.
DAM, UNVISITED, QUEUED = 0, -1, -2
MIN_SHARE, MIN_PIXELS = 0.1, 50  # of two segments that meet, see `split_merge_maps`
# The 8 neighbours (row, column) of a pixel; bit k of a ring code says that neighbour k is white.
RING = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))


def above(probability: np.ndarray, threshold: float) -> np.ndarray:
    """Return ``P > t`` as a bool array: P rounded to float32, t a double, compared strictly and in double.

    >>> above(np.float32([0.1, 0.2]), 0.1)  # float32(0.1) lies just above the double 0.1
    array([ True,  True])
    """
    return np.asarray(probability, np.float32).astype(np.float64) > threshold


def components(mask: np.ndarray) -> np.ndarray:
    """Label the 4-connected components of a mask of shape (H, W) as int32, background 0."""
    from scipy import ndimage

    return ndimage.label(mask)[0].astype(np.int32, copy=False)


def thin_borders(interior: np.ndarray) -> np.ndarray:
    """Flood the membrane from the segments until only dams, one pixel wide, are left between them.

    The 4-connected components of `interior`, bool of shape (H, W), are the basins; the result, int32, holds segments
    1..K and dams 0, or one segment where nothing is interior. This is the border thinning of
    doi:10.3389/fnana.2015.00142, in the order of the challenge's scorer: first in, first out; the first pixels are
    queued column by column.

    >>> thin_borders(np.array([[1, 1, 0, 0, 0, 1]], bool))
    array([[1, 1, 1, 0, 2, 2]], dtype=int32)
    """
    labels = components(interior)
    if not labels.any():
        return np.ones_like(labels)
    labels[labels == 0] = UNVISITED
    compiled(_flood)(labels)
    return labels


def pairs_of_labels(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (i, j, n_ij) of the positive labels that share pixels; memory is linear in the section."""
    from skimage.metrics import contingency_table

    table = contingency_table(first, second, ignore_labels=[0]).tocoo()
    both = (table.row > 0) & (table.col > 0)
    return table.row[both], table.col[both], table.data[both]


def segment(
    probability: np.ndarray, threshold: float, *, min_size: int = 0, background: float | None = None, lines: bool = True
) -> np.ndarray:
    """Turn an interior probability P, (H, W), into instances by a seeded watershed: uint32, 0 = line or background.

    Parameters
    ----------
    threshold, min_size : float, int
        The seeds are the 4-connected components of P > threshold. Those of fewer pixels are dropped and taken over by
        their neighbours; without any seed all is 0, or one segment where there is no `background`.
    background : float or None
        Pixels with P <= background stay 0; None: the segments fill the section, as neurites do.
    lines : bool
        Leave a line of zeros, one pixel wide, between segments that touch.
    """
    from skimage.segmentation import watershed

    probability = np.asarray(probability, np.float32)
    seeds = components(above(probability, threshold))
    sizes = np.bincount(seeds.ravel())
    kept = 1 + np.flatnonzero(sizes[1:] >= min_size)
    order = np.zeros(sizes.size, np.int32)
    order[kept] = np.arange(1, kept.size + 1)
    mask = np.ones(seeds.shape, bool) if background is None else above(probability, background)
    if kept.size == 0:
        return np.full(seeds.shape, background is None, np.uint32)
    return watershed(-probability, order[seeds], mask=mask, watershed_line=lines).astype(np.uint32)


class Maps(NamedTuple):
    """Where a binary prediction goes wrong, bool arrays of shape (H, W); see `split_merge_maps`."""

    splits: np.ndarray  # reference segments, whole, of which two or more predicted segments hold a tenth
    mergers: np.ndarray  # those, whole, in a predicted segment with another one at least a tenth as large
    missed: np.ndarray  # the centre line of the reference membrane where it is predicted interior
    cuts: np.ndarray  # predicted membrane lines inside the split segments: where the false walls stand


def split_merge_maps(reference: np.ndarray, prediction: np.ndarray) -> Maps:
    """Mark the reference segments that a prediction splits or merges, and the membrane it misses; interior > 0.

    Two segments meet if they share a tenth of the smaller one, and 50 pixels: borders a few pixels off and specks do
    not count. A cell that swallows a sliver is not marked as merged, the sliver is.
    """
    truth, proposal = components(np.asarray(reference) > 0), thin_borders(np.asarray(prediction) > 0)
    inside = truth > 0
    i, j, shared = pairs_of_labels(truth, proposal)
    sizes, widths = np.bincount(truth[inside]), np.bincount(proposal[inside])
    meet = shared >= np.maximum(MIN_SHARE * np.minimum(sizes[i], widths[j]), MIN_PIXELS)
    i, j, shared = i[meet], j[meet], shared[meet]
    large = shared >= MIN_SHARE * sizes[i]
    splits = inside & np.isin(truth, np.flatnonzero(np.bincount(i[large]) >= 2))
    mergers = inside & np.isin(truth, i[_largest_partner(j, shared) >= np.maximum(MIN_SHARE * sizes[i], 1)])
    missed = (thin_borders(inside) == DAM) & (np.asarray(prediction) > 0)
    return Maps(splits, mergers, missed, splits & (proposal == DAM))


def _largest_partner(group: np.ndarray, shared: np.ndarray) -> np.ndarray:
    """For each entry return the largest `shared` among the OTHER entries of its group, 0 if there is none."""
    count = int(group.max(initial=-1)) + 1
    first, second = np.zeros((2, count))
    np.maximum.at(first, group, shared)
    top = shared == first[group]
    np.maximum.at(second, group[~top], shared[~top])
    second = np.where(np.bincount(group[top], minlength=count) > 1, first, second)
    return np.where(top, second[group], first[group])


@functools.cache
def compiled(kernel: Callable) -> Callable:
    """Compile a kernel with numba at its first use; numba takes 0.3 s to import, so not before.

    The machine code is cached beside this file, or in the user's cache folder where that cannot be written; where
    neither can, it is compiled for this process alone. Without numba the function runs, hundreds of times slower.
    """
    try:
        import numba
    except ImportError:
        warnings.warn(
            "numba is not installed: scoring runs in plain Python, minutes a section", RuntimeWarning, stacklevel=3
        )
        return kernel
    try:
        return numba.njit(cache=True)(kernel)
    except RuntimeError:  # "cannot cache function: no locator available"
        return numba.njit(kernel)


def _flood(labels):
    """Flood UNVISITED pixels of int32 labels of shape (H, W) in place, see `thin_borders`."""
    height, width = labels.shape
    queue = np.empty(labels.size, np.int64)
    head = tail = 0
    for x in range(width):
        for y in range(height):
            if labels[y, x] == UNVISITED and (
                (x > 0 and labels[y, x - 1] > 0)
                or (y > 0 and labels[y - 1, x] > 0)
                or (x < width - 1 and labels[y, x + 1] > 0)
                or (y < height - 1 and labels[y + 1, x] > 0)
            ):
                labels[y, x] = QUEUED
                queue[tail] = y * width + x
                tail += 1
    flag = True
    while head < tail:
        y, x = queue[head] // width, queue[head] % width
        head += 1
        for k in range(4):
            v, u = y + (k == 3) - (k == 1), x + (k == 2) - (k == 0)
            if u < 0 or v < 0 or u >= width or v >= height:
                continue
            own, c = labels[y, x], labels[v, u]
            if c > 0:
                if own == QUEUED or (own == DAM and flag):
                    labels[y, x] = c
                elif own > 0 and own != c:
                    labels[y, x] = DAM
                    flag = False
            elif c == DAM:
                if own == QUEUED:
                    labels[y, x] = DAM
                    flag = True
            elif c == UNVISITED:  # a QUEUED neighbour is neither: it waits its turn and says nothing
                labels[v, u] = QUEUED
                queue[tail] = v * width + u
                tail += 1


# --- the warping error: what is left of the topology's errors once the truth is bent onto a proposal


def topology_errors(probability: np.ndarray, reference: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Warp one reference section onto ``P > t``; return the (splits, mergers) left, bool of shape (H, W).

    Jain et al., Boundary learning by optimization with topological constraints, doi:10.1109/CVPR.2010.5539950.
    """
    proposal = np.pad(np.asarray(probability, np.float32), 1)
    target, warped = above(proposal, threshold), np.pad(np.asarray(reference) > 0, 1)
    columns, rows = np.nonzero((target != warped).T)  # column by column, as the reference scorer scans
    distance = np.abs(proposal[rows, columns].astype(np.float64) - threshold).astype(np.float32)
    order = np.argsort(-distance, kind="stable")
    order = (rows * warped.shape[1] + columns)[order]
    # A flip only ever removes a mismatch, so sorting once equals sorting anew before every pass.
    left = order[: compiled(_warp)(warped, order, _simple_points())]
    return _classify(warped, left)


def _classify(warped: np.ndarray, left: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sort the mismatches left (flat indices, padded section) into splits and mergers; drop the padding.

    Black with two or more objects in its 8-ring: merger. White with two or more objects in it, or whose
    turning black would leave two or more where there was one: split. That second case asks for the components
    of the WHOLE section, not of the ring alone, which is to ask for the cut pixels (articulation points) of
    the 4-connected objects. All else is not an error of topology.
    """
    objects = components(warped)
    rows, columns = np.unravel_index(left, warped.shape)
    ring = np.sort([objects[rows + dr, columns + dc] for dr, dc in RING], axis=0)
    several = np.sum(np.diff(ring, axis=0, prepend=0) > 0, axis=0) >= 2
    white, cut = warped[rows, columns], compiled(_cut_pixels)(warped)[rows, columns]
    maps = np.zeros((2, *warped.shape), bool)
    maps[0, rows, columns], maps[1, rows, columns] = white & (several | cut), ~white & several
    return maps[0, 1:-1, 1:-1], maps[1, 1:-1, 1:-1]


@functools.cache
def _simple_points() -> np.ndarray:
    """For each of the 256 ring codes: is the centre simple, with white 4-connected and black 8-connected?"""
    from scipy import ndimage

    simple = np.zeros(256, bool)
    for code in range(256):
        window = np.zeros((3, 3), bool)
        for bit, (dr, dc) in enumerate(RING):
            window[1 + dr, 1 + dc] = code >> bit & 1
        black = ~window
        black[1, 1] = False
        touching = set(components(window)[[0, 1, 1, 2], [1, 0, 2, 1]]) - {0}
        simple[code] = len(touching) == 1 and ndimage.label(black, np.ones((3, 3)))[1] == 1
    return simple


def _warp(warped, order, simple):
    """Flip the mismatches `order` of a padded section in place; return how many are left, now in front."""
    width = warped.shape[1]
    count = order.size
    while True:
        left = 0
        for k in range(count):
            row, column = order[k] // width, order[k] % width
            code = 0
            for bit in range(8):
                if warped[row + RING[bit][0], column + RING[bit][1]]:
                    code |= 1 << bit
            if simple[code]:
                warped[row, column] = not warped[row, column]
            else:
                order[left] = order[k]
                left += 1
        if left == count:
            return left
        count = left


def _cut_pixels(white):
    """Mark the pixels of a padded mask without which their 4-connected object falls apart.

    Tarjan's algorithm for articulation points (doi:10.1137/0201010) without recursion: linear in the pixels.
    """
    height, width = white.shape
    flat = white.ravel()
    seen = np.zeros(flat.size, np.int32)  # when the walk first came here, 0 = never
    low = np.zeros(flat.size, np.int32)  # the earliest pixel that can be reached from here without going back
    parent = np.full(flat.size, -1, np.int32)
    tried = np.zeros(flat.size, np.int8)
    cut = np.zeros(flat.size, np.bool_)
    clock = 0
    for start in range(flat.size):
        if not flat[start] or seen[start] > 0:
            continue
        node, branches = start, 0
        clock += 1
        seen[node] = low[node] = clock
        while node >= 0:
            up = parent[node]
            if tried[node] < 4:
                k = int(tried[node])
                tried[node] += 1
                other = node + ((k == 3) - (k == 1)) * width + (k == 2) - (k == 0)
                if not flat[other] or other == up:
                    continue
                if seen[other] > 0:
                    low[node] = min(low[node], seen[other])
                    continue
                clock += 1
                seen[other] = low[other] = clock
                parent[other] = node
                node = other
                continue
            if up == start:
                branches += 1
            elif up >= 0 and low[node] >= seen[up]:
                cut[up] = True
            if up >= 0:
                low[up] = min(low[up], low[node])
            node = up
        cut[start] = branches >= 2
    return cut.reshape((height, width))
