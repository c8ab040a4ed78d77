"""Overlap-tile prediction: cut, mirror, predict, stitch; turned and mirrored versions averaged.

The strategy of U-Net (Ronneberger, Fischer, Brox 2015, arXiv 1505.04597, figure 2): tiles of one shape cover a section
of any size, each read with a `halo` of context around the part of it that is kept; what lies outside the section is
mirrored. Stitched tiles are the numbers of the whole section, mirrored by the same halo, on two conditions:

- The halo covers the receptive radius: a 'same' convolution sees zeros beyond its tile, and what they touch reaches
  that far inwards. Unpadded networks (`shrink` > 0) throw that rim away themselves.
- Tile origins differ by multiples of `multiple`, 2 ** levels: at any other offset pooling groups other pixels.
"""

import math
import sys
from itertools import product
from typing import NamedTuple

import numpy as np

from files.atomic import DataError
from files.sections import reflect

MAX_TILE = 1024  # default largest side of a network's input, px

# Test-time transforms by name: (counter-clockwise quarter turns, then mirrored left-right or not). "8" is the dihedral
# group of the square, "4" its rotations. The 2015 U-Net averages 7 rotated versions of the input and does not say
# which; read here as the identity and all others but the transposition, for eight need no interpolation.
TRANSFORMS = {
    "none": ((0, False),),
    "4": tuple((turns, False) for turns in range(4)),
    "7": tuple(product(range(4), (False, True)))[:7],
    "8": tuple(product(range(4), (False, True))),
}


# -- where the tiles lie ----------------------------------------------------------------------------------------


class Grid(NamedTuple):
    """The tiles of a section: all of one shape, their kept parts disjoint; everything in pixels.

    `shape` of the section; `tile`, the shape of the network's input, halo included; `halo`, the context on each side of
    what is kept, at least `shrink`, which an unpadded network loses there; `multiple`, by multiples of which tile
    origins differ; `radius`, how far an output pixel can see.
    """

    shape: tuple[int, int]
    tile: tuple[int, int]
    halo: int
    multiple: int = 8
    shrink: int = 0
    radius: int = 0

    @property
    def cuts(self):
        """Rows, and columns, that the tiles fill: two lists of slices.

        The input of a tile begins a halo before what it fills. The last tile of a row or column reaches into the
        mirrored surroundings, so that all inputs have one shape.

        >>> Grid((100, 16), (64, 48), 16).cuts[0]
        [slice(0, 32, None), slice(32, 64, None), slice(64, 96, None), slice(96, 100, None)]
        """
        sides = zip(self.shape, self.tile, strict=True)
        return [_cuts(length, side - 2 * self.halo, self.multiple) for length, side in sides]

    @property
    def count(self):
        """Tiles of the whole section."""
        return math.prod(map(len, self.cuts))

    @property
    def exact(self):
        """Whether stitched tiles equal the whole-section prediction up to rounding."""
        return self.count == 1 or self.shrink > 0 or self.halo >= self.radius

    @property
    def words(self):
        """What the grid does, and whether stitched equals whole."""
        size = f"{self.tile[0]} x {self.tile[1]} px"
        if self.count == 1:
            around = "mirrored at the borders" if self.tile != self.shape else "nothing around it"
            return f"one piece, input {size}, halo {self.halo}, {around}: no seams"
        tiled = f"{self.count} tiles of {size}"
        if self.shrink:
            return f"{tiled}, unpadded network, halo {self.halo}: tiles meet exactly, stitched equals whole"
        if self.exact:
            return f"{tiled}, halo {self.halo} >= receptive radius {self.radius}: stitched equals whole exactly"
        return (
            f"{tiled}, halo {self.halo} < receptive radius {self.radius}: stitched equals whole approximately, "
            "least well at the seams; a larger halo costs time, a larger tile memory"
        )

    def parts(self, tall, wide):
        """Rows, and columns, of parts that are so many tiles tall and wide; the last ones may be smaller."""
        return [
            [slice(cuts[i].start, cuts[min(i + most, len(cuts)) - 1].stop) for i in range(0, len(cuts), most)]
            for cuts, most in zip(self.cuts, (tall, wide), strict=True)
        ]

    def turned(self, version):
        """The grid of a turned section."""
        return self._replace(shape=self.shape[::-1], tile=self.tile[::-1]) if version[0] % 2 else self


def round_up(length, multiple, remainder=0):
    """Smallest integer >= `length` that leaves `remainder` modulo `multiple`.

    >>> round_up(513, 8), round_up(512, 8), round_up(389, 16, 4)
    (520, 512, 404)
    """
    return length + (remainder - length) % multiple


def choose(shape, field, *, max_tile=None, halo=None):
    """Choose the `Grid` for sections of one shape, (H, W); a DataError where `max_tile` or `halo` breaks a rule.

    A section that fits into one input is predicted in one piece, mirrored up to the next valid size: there are no
    seams, and the network sees the borders as it saw those of its training windows. A larger one is tiled with a halo
    of the receptive radius, or, where that would fill more than half of the tile (so that the work would more than
    quadruple), with an eighth of `max_tile`. Tiles are then made as small as their number allows, so that the last of
    a row is not mostly mirror.

    `max_tile` is the largest side of the network's input, in px: memory; without it the largest valid one up to
    `MAX_TILE`. `halo` overrides the choice of the halo, also for a section predicted in one piece.
    """
    multiple, shrink, plus = field.multiple, field.shrink, field.remainder
    most = max_tile or MAX_TILE - (MAX_TILE - plus) % multiple
    if most % multiple != plus:
        raise DataError(f"--tile must be a multiple of {multiple}{f' plus {plus}' if plus else ''}. Received: {most}")
    asked = halo is not None
    if halo is None and (shrink or max(shape) <= most):
        halo = shrink
    elif halo is None:
        covering = round_up(field.radius, multiple)
        halo = covering if covering <= most // 4 else most // 8 // multiple * multiple
    if halo < shrink or (halo - shrink) % multiple:
        rule = f"{shrink} (the network's own loss) plus a" if shrink else "a non-negative"
        raise DataError(f"--overlap must be {rule} multiple of {multiple}. Received: {halo}")
    if most - 2 * halo < multiple and shrink and not asked:
        least = round_up(2 * halo + multiple, multiple, plus)
        rule = f"at least {least} for this network, whose output lacks {shrink} px on each side"
        raise DataError(f"--tile must be {rule}. Received: {most}")
    if most - 2 * halo < multiple:
        raise DataError(f"--overlap must leave at least {multiple} px of a tile of {most} uncovered. Received: {halo}")
    tile = []
    for length in shape:
        count = len(_cuts(length, most - 2 * halo, multiple))
        filled = length if count == 1 else multiple * -(-length // (multiple * count))
        tile.append(round_up(filled + 2 * halo, multiple, plus))
    return Grid(tuple(shape), tuple(tile), halo, multiple, shrink, field.radius)


def _cuts(length, usable, multiple):
    """Cut an axis into the parts its tiles fill, in steps of the pooling grid; the last may be wider."""
    step = usable // multiple * multiple
    count = 1 if length <= usable else 1 + -(-(length - usable) // step)
    return [slice(i * step, length if i == count - 1 else (i + 1) * step) for i in range(count)]


# -- turned and mirrored ----------------------------------------------------------------------------------------


def transform(section, turns, mirrored):
    """Turn a section of shape (H, W) by quarters counter-clockwise, then mirror it left-right; a view."""
    turned = np.rot90(section, turns)
    return turned[:, ::-1] if mirrored else turned


def place(part, shape, turns, mirrored):
    """Where a part of a section of `shape` lies after `transform`.

    >>> place((slice(0, 1), slice(0, 2)), (4, 5), 1, False)
    (slice(3, 5, None), slice(0, 1, None))
    """
    (rows, columns), (height, width) = part, shape
    for _ in range(turns):
        rows, columns, height, width = _flipped(columns, width), rows, width, height
    return rows, _flipped(columns, width) if mirrored else columns


def _flipped(part, length):
    return slice(length - part.stop, length - part.start)


def _versions(grid, part, tta):
    """Each version of a section: its transform, its grid, where the part lies in it, and the tiles that touch that."""
    for version in TRANSFORMS[tta]:
        turned, placed = grid.turned(version), place(part, grid.shape, *version)
        touched = (
            [cut for cut in cuts if cut.start < along.stop and along.start < cut.stop]
            for cuts, along in zip(turned.cuts, placed, strict=True)
        )
        yield version, turned, placed, list(product(*touched))


# -- prediction -------------------------------------------------------------------------------------------------


def predict_section(section, predict, grid, *, tta="none", batch=1):
    """Predict a section of any size, (H, W) of any dtype: (H, W), float32; see `predict_part`."""
    total = np.zeros(grid.shape, np.float32)
    for _ in predict_rows(section, predict, grid, tta=tta, batch=batch, total=total):
        pass
    return total


def predict_rows(section, predict, grid, *, tta="none", batch=1, total=None):
    """The same as the prediction of some rows after the other, (h, W), parts of `total` if that is given.

    Of a section that is no array but gives one for `section[rows, columns]`, a row of tiles is read at a time.
    """
    rows, columns = grid.cuts
    tall = len(rows) if isinstance(section, np.ndarray) or tta != "none" else 1
    how = {"tta": tta, "batch": even_batch(tall * len(columns), batch)}
    for part in product(*grid.parts(tall, len(columns))):
        around = pixels_read(grid, part, tta)
        corner = [along.start for along in around]
        shape = [along.stop - along.start for along in part]
        found = np.zeros(shape, np.float32) if total is None else total[part]
        predict_part(grid, part, section[around], predict, found, corner=corner, **how)
        yield found


def even_batch(count, most):
    """Tiles per call, at most `most`, so that the last call needs the fewest repeats to be filled."""
    return -(-count // -(-count // most))


def pixels_read(grid, part, tta="none"):
    """Rows and columns of a section that the tiles of a part read."""
    read = []
    for (turns, mirrored), turned, _, tiles in _versions(grid, part, tta):
        ends = []
        for first, last, side, length in zip(tiles[0], tiles[-1], turned.tile, turned.shape, strict=True):
            indices = reflect(first.start - grid.halo, last.start - grid.halo + side, length)
            ends.append(slice(int(indices.min()), int(indices.max()) + 1))
        back = (turns, True) if mirrored else (-turns % 4, False)  # a mirrored version is its own inverse
        read.append(place(tuple(ends), turned.shape, *back))
    return tuple(slice(min(s.start for s in along), max(s.stop for s in along)) for along in zip(*read, strict=True))


def predict_part(grid, part, pixels, predict, total, *, corner=(0, 0), tta="none", batch=1):
    """Predict a part of a section, rows and columns: its tiles, and the mean over turned and mirrored versions (`tta`).

    A version has tiles of its own, counted from the corner that is its first; turned back, each tile is added where
    it belongs. So the numbers of a part are those that the whole section has there.

    Parameters
    ----------
    pixels : ndarray of shape (h, w)
        What the tiles read (`pixels_read`) or more, from the row and column `corner` of the section on.
    predict : callable
        (B, h, w) in the dtype of `pixels` -> (B, h - 2 shrink, w - 2 shrink). B is `batch` in all calls, a last one is
        filled with repeats, and (h, w) is the tile: one compilation serves them all.
    total : ndarray of the shape of the part
        Zeros, float32, for the result.
    """
    held = tuple(slice(start, start + length) for start, length in zip(corner, pixels.shape, strict=True))
    for version, turned, placed, tiles in _versions(grid, part, tta):
        source, into = transform(pixels, *version), transform(total, *version)
        origin = [along.start for along in place(held, grid.shape, *version)]
        expected = (batch, *(side - 2 * grid.shrink for side in turned.tile))
        for start in range(0, len(tiles), batch):
            group = tiles[start : start + batch]
            windows = [_window(source, origin, turned, tile) for tile in group]
            windows += windows[-1:] * (batch - len(group))
            outputs = predict(np.stack(windows))
            if np.shape(outputs) != expected:
                raise ValueError(f"predict must return the shape {expected}. Received: {np.shape(outputs)}")
            for tile, output in zip(group, outputs, strict=False):  # but for the repeats
                _add(into, placed, tile, output, grid.halo - grid.shrink)
    total /= np.float32(len(TRANSFORMS[tta]))


def _window(source, origin, grid, tile):
    """Input of a tile, mirrored beyond the section; `source` begins at `origin`."""
    starts = (cut.start - grid.halo for cut in tile)
    indices = (
        reflect(start, start + side, length) - first
        for start, side, length, first in zip(starts, grid.tile, grid.shape, origin, strict=True)
    )
    return source[np.ix_(*indices)]


def _add(into, part, tile, output, rim):
    """Add to the part what a tile fills of it."""
    shared = [slice(max(p.start, t.start), min(p.stop, t.stop)) for p, t in zip(part, tile, strict=True)]
    kept = (slice(rim + s.start - t.start, rim + s.stop - t.start) for s, t in zip(shared, tile, strict=True))
    filled = (slice(s.start - p.start, s.stop - p.start) for s, p in zip(shared, part, strict=True))
    into[tuple(filled)] += output[tuple(kept)]


# -- a stack ----------------------------------------------------------------------------------------------------


def counted(items, word, count, done=0):
    """Pass items on, and count them on a terminal; `done` of them were before."""
    for i, item in enumerate(items, done + 1):
        if sys.stderr.isatty():
            print(f"\r{word} {i}/{count}", end="\n" if i == count else "", file=sys.stderr, flush=True)
        yield item
