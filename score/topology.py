"""What is left of the topology's errors once the truth is bent onto a proposal: the warping error of one section.

Jain et al., Boundary learning by optimization with topological constraints, CVPR 2010,
doi:10.1109/CVPR.2010.5539950. Sections have shape (H, W), axes (row, column); 1 = interior, 0 = membrane.
"""

from __future__ import annotations

import functools

import numpy as np

from score.segments import above, compiled, components

# The 8 neighbours (row, column) of a pixel; bit k of a ring code says that neighbour k is white.
RING = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))


def topology_errors(probability: np.ndarray, reference: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Warp one reference section onto ``P > t``; return the (splits, mergers) left, bool of shape (H, W)."""
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
