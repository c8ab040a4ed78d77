"""Overlap-tile prediction: cut, mirror, predict, stitch; rotations averaged; one section in memory at a time.

The strategy of U-Net (Ronneberger, Fischer, Brox 2015, arXiv 1505.04597, figure 2): a section of any size is covered
by tiles of one fixed shape, each read with a `halo` of context around the part of it that is kept, and what lies
outside the section is mirrored. The network is a callable, (B, h, w) -> (B, h - 2 shrink, w - 2 shrink), and nothing
here knows what is behind it. `predict_part` is the one loop: a whole section is one part, a block of OME-Zarr another.

Two conditions make the stitched prediction the same numbers as the prediction of the whole section, mirrored by the
same halo:

- *The halo covers the receptive radius.* A 'same' convolution sees zeros beyond its tile, and what the zeros touch
  reaches inwards by the receptive radius; exactly that rim is thrown away. Unpadded networks (`shrink` > 0) throw it
  away themselves.
- *Tile origins differ by multiples of `multiple`*, 2 ** levels. A network with pooling commutes with those shifts only:
  at any other offset the 2x2 pooling windows group other pixels, and the prediction changes everywhere, not only near
  the seams.

Where the halo is too small for the first, tiles are butted, not blended: a linear blend of the overlaps averages the
better informed side of a seam with the rim of its neighbour, which has seen the least context. Measured with small
networks trained on ISBI-2012 (512 x 512 section, tiles with a core of 128, root mean square difference from the whole
prediction, butted | blended): standard, radius about 90, halo 16: 0.0124 | 0.0141; 32: 0.0031 | 0.0074; 64: 0.00004 |
0.0040. Dilated, radius about 550, halo 32: 0.065 | 0.064; 96: 0.059 | 0.057. The blend halves the step at a seam, and
moves the pixel accuracy by less than 0.0005 either way.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import NamedTuple

import numpy as np

from files.stacks import DataError
from network.mirror import reflect

MAX_TILE = 1024
"""Default largest side of a network input, in pixels."""

Part = tuple[slice, slice]
"""Rows and columns of a section."""

TRANSFORMS: dict[str, tuple[tuple[int, bool], ...]] = {
    "none": ((0, False),),
    "4": tuple((turns, False) for turns in range(4)),
    "7": tuple(product(range(4), (False, True)))[:7],
    "8": tuple(product(range(4), (False, True))),
}
"""Test-time transforms by name, each as (counter-clockwise quarter turns, then mirrored left-right or not).

"8" is the dihedral group of the square, "4" its rotations. The 2015 U-Net averages 7 rotated versions of the input and
does not say which. Eight versions need no interpolation, so "7" is read here as seven of those: the identity and all
others but the transposition.
"""


# -- where the tiles lie ----------------------------------------------------------------------------------------


class Grid(NamedTuple):
    """The tiles of a section: all of one shape, their kept parts disjoint; everything in pixels.

    Attributes
    ----------
    shape : tuple of int
        Rows and columns of the section.
    tile : tuple of int
        Height and width of the network's input, halo included.
    halo : int
        Context around the kept part of a tile, on each side; at least `shrink`.
    multiple : int, default=8
        2 ** levels of the network: tile origins differ by multiples of it.
    shrink : int, default=0
        Pixels that an unpadded network loses on each side.
    radius : int, default=0
        How far an output pixel can see.
    """

    shape: tuple[int, int]
    tile: tuple[int, int]
    halo: int
    multiple: int = 8
    shrink: int = 0
    radius: int = 0

    @property
    def cuts(self) -> list[list[slice]]:
        """Rows, and columns, that the tiles fill.

        The input of a tile begins a halo before what it fills. The last tile of a row or column reaches into the
        mirrored surroundings, so that all inputs have one shape.

        >>> Grid((100, 16), (64, 48), 16).cuts[0]
        [slice(0, 32, None), slice(32, 64, None), slice(64, 100, None)]
        """
        sides = zip(self.shape, self.tile, strict=True)
        return [_cuts(length, side - 2 * self.halo, self.multiple) for length, side in sides]

    @property
    def count(self) -> int:
        """Tiles of the whole section."""
        return math.prod(map(len, self.cuts))

    @property
    def exact(self) -> bool:
        """Whether stitched tiles equal the whole-section prediction up to rounding."""
        return self.count == 1 or self.shrink > 0 or self.halo >= self.radius

    @property
    def words(self) -> str:
        """What the grid does, and whether stitched equals whole."""
        size = f"{self.tile[0]} x {self.tile[1]} px"
        if self.count == 1:
            return f"one piece, input {size}, halo {self.halo}, mirrored at the borders: no seams"
        tiled = f"{self.count} tiles of {size}"
        if self.shrink:
            return f"{tiled}, unpadded network, halo {self.halo}: tiles meet exactly, stitched equals whole"
        if self.exact:
            return f"{tiled}, halo {self.halo} >= receptive radius {self.radius}: stitched equals whole exactly"
        return (
            f"{tiled}, halo {self.halo} < receptive radius {self.radius}: stitched equals whole approximately, "
            "least well at the seams; a larger halo costs time, a larger tile memory"
        )

    def parts(self, tall: int, wide: int) -> list[list[slice]]:
        """Rows, and columns, of parts that are so many tiles tall and wide; the last ones may be smaller."""
        return [
            [slice(cuts[i].start, cuts[min(i + most, len(cuts)) - 1].stop) for i in range(0, len(cuts), most)]
            for cuts, most in zip(self.cuts, (tall, wide), strict=True)
        ]

    def turned(self, version: tuple[int, bool]) -> "Grid":
        """The grid of a turned section."""
        return self._replace(shape=self.shape[::-1], tile=self.tile[::-1]) if version[0] % 2 else self


def round_up(length: int, multiple: int, remainder: int = 0) -> int:
    """Smallest integer >= `length` that leaves `remainder` modulo `multiple`.

    >>> round_up(513, 8), round_up(512, 8), round_up(389, 16, 4)
    (520, 512, 404)
    """
    return length + (remainder - length) % multiple


def choose(
    shape: tuple[int, int],
    radius: int,
    *,
    multiple: int = 8,
    max_tile: int = MAX_TILE,
    halo: int | None = None,
    shrink: int = 0,
    remainder: int = 0,
) -> Grid:
    """Choose the tile and the halo for sections of one shape.

    A section that fits into one input is predicted in one piece, mirrored up to the next valid size: there are no
    seams, and the network sees the borders as it saw those of its training windows. A larger one is tiled with a halo
    of the receptive radius, or, where that would fill more than half of the tile (so that the work would more than
    quadruple), with an eighth of `max_tile`. Tiles are then made as small as their number allows, so that the last of
    a row is not mostly mirror.

    Parameters
    ----------
    shape, radius, multiple, shrink
        As in `Grid`.
    max_tile : int, default=1024
        Largest side of the network's input, in pixels: memory.
    halo : int, optional
        Overrides the choice of the halo, also for a section predicted in one piece.
    remainder : int, default=0
        Valid sides of an input are `remainder` modulo `multiple` (unpadded U-Net of 2015: 572 = 12 modulo 16).

    Raises
    ------
    DataError
        If an argument breaks a rule; the message names it.

    Examples
    --------
    >>> choose((513, 700), 92).tile
    (520, 704)
    >>> choose((4096, 4096), 92).words
    '25 tiles of 1016 x 1016 px, halo 96 >= receptive radius 92: stitched equals whole exactly'
    """
    if len(shape) != 2 or min(shape) < 1:
        raise DataError(f"a section must have two axes of at least 1 pixel. Received: shape {tuple(shape)}")
    if max_tile < 1 or max_tile % multiple != remainder:
        rule = f"a multiple of {multiple}" + (f" plus {remainder}" if remainder else "")
        raise DataError(f"--tile must be {rule}. Received: {max_tile}")
    wanted = _choose_halo(shape, radius, multiple, max_tile, shrink) if halo is None else halo
    _check_halo(wanted, max_tile, multiple, shrink)
    tile = tuple(_fit(length, wanted, max_tile, multiple, remainder) for length in shape)
    return Grid(tuple(shape), tile, wanted, multiple, shrink, radius)


def _check_halo(halo: int, side: int, multiple: int, shrink: int) -> None:
    """Refuse a halo that breaks the alignment, or leaves nothing of the tile."""
    if halo < shrink or (halo - shrink) % multiple:
        rule = f"{shrink} (the network's own loss) plus a" if shrink else "a non-negative"
        raise DataError(f"--overlap must be {rule} multiple of {multiple}. Received: {halo}")
    if side - 2 * halo < multiple:
        raise DataError(f"--overlap must leave at least {multiple} px of a tile of {side} uncovered. Received: {halo}")


def _choose_halo(shape: tuple[int, int], radius: int, multiple: int, max_tile: int, shrink: int) -> int:
    """Halo of `choose` when none is asked for."""
    if shrink or max(shape) <= max_tile:
        return shrink
    covering = round_up(radius, multiple)
    return covering if covering <= max_tile // 4 else max_tile // 8 // multiple * multiple


def _fit(length: int, halo: int, max_tile: int, multiple: int, remainder: int) -> int:
    """Smallest valid side of a tile that covers `length` pixels with no more tiles than `max_tile` needs."""
    count = len(_cuts(length, max_tile - 2 * halo, multiple))
    smallest = multiple * -(-length // (multiple * count)) if count > 1 else length
    return round_up(smallest + 2 * halo, multiple, remainder)


def _cuts(length: int, usable: int, multiple: int) -> list[slice]:
    """Cut an axis into the parts its tiles fill, in steps of the pooling grid; the last may be wider."""
    step = usable // multiple * multiple
    count = 1 if length <= usable else 1 + -(-(length - usable) // step)
    return [slice(i * step, length if i == count - 1 else (i + 1) * step) for i in range(count)]


# -- turned and mirrored ----------------------------------------------------------------------------------------


def transform(section: np.ndarray, turns: int, mirrored: bool) -> np.ndarray:
    """Turn a section of shape (H, W) by quarters counter-clockwise, then mirror it left-right; a view.

    >>> transform(np.array([[1, 2, 3]]), 1, False).ravel()
    array([3, 2, 1])
    """
    turned = np.rot90(section, turns)
    return turned[:, ::-1] if mirrored else turned


def place(part: Part, shape: tuple[int, int], turns: int, mirrored: bool) -> Part:
    """Where a part of a section of `shape` lies after `transform`.

    >>> place((slice(0, 1), slice(0, 2)), (4, 5), 1, False)
    (slice(3, 5, None), slice(0, 1, None))
    """
    (rows, columns), (height, width) = part, shape
    for _ in range(turns):
        rows, columns, height, width = _flipped(columns, width), rows, width, height
    return rows, _flipped(columns, width) if mirrored else columns


def _flipped(part: slice, length: int) -> slice:
    return slice(length - part.stop, length - part.start)


def _versions(grid: Grid, part: Part, tta: str) -> Iterator[tuple]:
    """Each version of a section: its transform, its grid, where the part lies in it, and the tiles that touch that."""
    for version in TRANSFORMS[tta]:
        turned, placed = grid.turned(version), place(part, grid.shape, *version)
        touched = (
            [cut for cut in cuts if cut.start < along.stop and along.start < cut.stop]
            for cuts, along in zip(turned.cuts, placed, strict=True)
        )
        yield version, turned, placed, list(product(*touched))


# -- prediction -------------------------------------------------------------------------------------------------


def predict_section(
    section: np.ndarray,
    predict: Callable[[np.ndarray], np.ndarray],
    grid: Grid,
    *,
    tta: str = "none",
    batch: int = 1,
) -> np.ndarray:
    """Predict a section of any size, (H, W) of any dtype, from tiles of one shape; see `predict_part`.

    Of a section that is no array but gives one for `section[rows, columns]`, a row of tiles is read at a time.

    Returns
    -------
    ndarray of shape (H, W)
        float32.
    """
    total, (rows, columns) = np.zeros(grid.shape, np.float32), grid.cuts
    tall = len(rows) if isinstance(section, np.ndarray) or tta != "none" else 1
    how = {"tta": tta, "batch": even_batch(tall * len(columns), batch)}
    for part in product(*grid.parts(tall, len(columns))):
        around = pixels_read(grid, part, tta)
        corner = [along.start for along in around]
        predict_part(grid, part, section[around], predict, total[part], corner=corner, **how)
    return total


def even_batch(count: int, most: int) -> int:
    """Tiles per call, at most `most`, so that the last call needs the fewest repeats to be filled."""
    return -(-count // -(-count // most))


def pixels_read(grid: Grid, part: Part, tta: str = "none") -> Part:
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


def predict_part(
    grid: Grid,
    part: Part,
    pixels: np.ndarray,
    predict: Callable[[np.ndarray], np.ndarray],
    total: np.ndarray,
    *,
    corner: tuple[int, int] = (0, 0),
    tta: str = "none",
    batch: int = 1,
) -> None:
    """Predict a part of a section: its tiles, and the mean over the turned and mirrored versions of the section.

    A version has tiles of its own, counted from the corner that is its first; turned back, each tile is added where
    it belongs. So the numbers of a part are those that the whole section has there. No copy of `pixels` is made but
    of the tiles of one call, which `predict` gets in their dtype.

    Parameters
    ----------
    grid : Grid
    part : tuple of slice
        Rows and columns of the section.
    pixels : ndarray of shape (h, w)
        What the tiles read (`pixels_read`) or more, from the row and column `corner` of the section on.
    predict : callable
        (B, h, w) -> (B, h - 2 shrink, w - 2 shrink). B is `batch` in all calls, a last one is filled with repeats, and
        (h, w) is the tile: one compilation serves them all.
    total : ndarray of the shape of the part
        Zeros, float32, for the result.
    corner : tuple of int
    tta : str
        A name in `TRANSFORMS`.
    batch : int

    Raises
    ------
    ValueError
        If `predict` returns another shape than it should.
    """
    held = tuple(slice(start, start + length) for start, length in zip(corner, pixels.shape, strict=True))
    for version, turned, placed, tiles in _versions(grid, part, tta):
        source, into = transform(pixels, *version), transform(total, *version)
        origin = [along.start for along in place(held, grid.shape, *version)]
        for start in range(0, len(tiles), batch):
            group = tiles[start : start + batch]
            windows = [_window(source, origin, turned, tile) for tile in group]
            windows += windows[-1:] * (batch - len(group))
            outputs = _checked(predict(np.stack(windows)), (batch, *turned.tile), grid.shrink)
            for tile, output in zip(group, outputs, strict=False):  # but for the repeats
                _add(into, placed, tile, output, grid.halo - grid.shrink)
    total /= np.float32(len(TRANSFORMS[tta]))


def _window(source: np.ndarray, origin: list[int], grid: Grid, tile: Part) -> np.ndarray:
    """Input of a tile, mirrored beyond the section; `source` begins at `origin`."""
    starts = (cut.start - grid.halo for cut in tile)
    indices = (
        reflect(start, start + side, length) - first
        for start, side, length, first in zip(starts, grid.tile, grid.shape, origin, strict=True)
    )
    return source[np.ix_(*indices)]


def _add(into: np.ndarray, part: Part, tile: Part, output: np.ndarray, rim: int) -> None:
    """Add to the part what a tile fills of it."""
    shared = [slice(max(p.start, t.start), min(p.stop, t.stop)) for p, t in zip(part, tile, strict=True)]
    kept = (slice(rim + s.start - t.start, rim + s.stop - t.start) for s, t in zip(shared, tile, strict=True))
    filled = (slice(s.start - p.start, s.stop - p.start) for s, p in zip(shared, part, strict=True))
    into[tuple(filled)] += output[tuple(kept)]


def _checked(outputs: np.ndarray, given: tuple[int, int, int], shrink: int) -> np.ndarray:
    """Refuse a prediction of another shape than the geometry promises."""
    expected = (given[0], given[1] - 2 * shrink, given[2] - 2 * shrink)
    if np.shape(outputs) != expected:
        words = f"predict must return shape {expected} for an input of shape {given}"
        raise ValueError(f"{words}. Received: {np.shape(outputs)}")
    return np.asarray(outputs)


def predict_stack(
    sections: Iterable[np.ndarray], predict_one: Callable[[np.ndarray], np.ndarray]
) -> Iterator[np.ndarray]:
    """Predict a stack section by section; the next section is read while the present one is predicted.

    At most two sections are alive at any time, however many the stack has: the one at work and the one being read.
    """
    for section in ahead(sections):
        prediction = predict_one(section)
        # While the caller writes, only the prediction and the next section are held.
        del section
        yield prediction
        del prediction


def ahead(items: Iterable) -> Iterator:
    """The items of an iterable, the next one being made in another thread while the caller is at work with one.

    `items` is never advanced further than one ahead. An error in it arrives after the items before it.

    >>> list(ahead(range(3)))
    [0, 1, 2]
    """
    reader, end = iter(items), object()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="ahead") as pool:
        coming = pool.submit(next, reader, end)
        while (ready := [coming.result()])[0] is not end:
            coming = pool.submit(next, reader, end)
            yield ready.pop()  # so that it is not held here
