"""Stitching as an identity, tiles against the whole, mirrored borders, rotations averaged, memory."""

import math
from typing import NamedTuple

import numpy as np
import pytest
from conftest import cases
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

import data
from predict import tiling


class Field(NamedTuple):
    """What `choose` asks of a receptive field."""

    radius: int
    multiple: int = 8
    shrink: int = 0
    remainder: int = 0


def identity(shrink=0):
    return lambda batch: batch[:, shrink : batch.shape[1] - shrink, shrink : batch.shape[2] - shrink]


def pixels(shape, seed=0):
    """Distinct values, so that a swapped pixel is a wrong pixel; all exact in float32."""
    return np.random.default_rng(seed).permutation(math.prod(shape)).reshape(shape).astype(np.float32)


def stitched(section, predict, tile, halo, multiple=8, shrink=0, **how):
    tile = (tile, tile) if np.ndim(tile) == 0 else tile
    return tiling.predict_section(section, predict, tiling.Grid(section.shape, tile, halo, multiple, shrink), **how)


def whole(section, predict, halo, multiple=8, shrink=0, remainder=0):
    """By definition: the section mirrored by the halo (numpy's own padding), predicted at once, cropped."""
    far = [tiling.round_up(n + 2 * halo, multiple, remainder) - n - halo for n in section.shape]
    padded = np.pad(section, [(halo, far[0]), (halo, far[1])], mode="reflect" if min(section.shape) > 1 else "edge")
    rim = halo - shrink
    rows, columns = section.shape
    return predict(padded[None])[0, rim : rim + rows, rim : rim + columns]


# A network in numpy: two zero-padded 3x3 filters, a 2x2 maximum and a mean over 4x4 pooled together by 8, two
# more filters there, nearest upsampling, the skip added, one more filter. Not shift-equivariant but for
# multiples of 8, and it sees zeros beyond its input, as Keras does.
FILTERS = np.random.default_rng(7).normal(size=(5, 3, 3)).astype(np.float32)
RADIUS = 2 + 7 + 2 * 8 + 8 + 1  # filters + pooling block + two filters at stride 8 + upsampling block + filter


def convolve(array, kernel):
    filtered = ndimage.correlate(array, kernel, mode="constant")
    return np.maximum(filtered, filtered / 4)


def pooled_network(batch):
    outputs = []
    for image in batch:
        skip = convolve(convolve(image, FILTERS[0]), FILTERS[1])
        rows, columns = skip.shape
        halves = skip.reshape(rows // 2, 2, columns // 2, 2).max(axis=(1, 3))
        low = halves.reshape(rows // 8, 4, columns // 8, 4).mean(axis=(1, 3))
        low = convolve(convolve(low, FILTERS[2]), FILTERS[3])
        outputs.append(convolve(skip + low.repeat(8, axis=0).repeat(8, axis=1), FILTERS[4]))
    return np.stack(outputs)


def unpadded_network(batch):
    """Two valid filters, 2x2 maximum, a valid one, upsampling, cropped skip, a valid one: 5 px lost."""
    outputs = []
    for image in batch:
        skip = convolve(convolve(image, FILTERS[0]), FILTERS[1])[2:-2, 2:-2]
        rows, columns = skip.shape
        low = skip.reshape(rows // 2, 2, columns // 2, 2).max(axis=(1, 3))
        up = convolve(low, FILTERS[2])[1:-1, 1:-1].repeat(2, axis=0).repeat(2, axis=1)
        outputs.append(convolve(up + skip[2:-2, 2:-2], FILTERS[4])[1:-1, 1:-1])
    return np.stack(outputs)


SHRINK = 5


@settings(max_examples=200)
@given(
    shape=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    levels=st.integers(0, 4),
    shrink=st.sampled_from([0, 0, 1, 5, 20]),
    halos=st.integers(0, 6),
    usable=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    batch=st.integers(1, 7),
    tta=st.sampled_from(["none", "4", "8"]),
)
def test_stitching_the_identity_returns_the_section_exactly(shape, levels, shrink, halos, usable, batch, tta):
    """Of an unpadded network, too, whose tiles need not be a multiple of anything."""
    multiple = 2**levels
    section, halo = pixels(shape), shrink + halos * multiple
    tile = tuple(multiple + (side if shrink else side // 8 * multiple) + 2 * halo for side in usable)
    found = stitched(section, identity(shrink), tile, halo, multiple, shrink, batch=batch, tta=tta)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, section)


@settings(max_examples=100)
@given(
    shape=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    ends=st.tuples(*[st.floats(0, 1)] * 4),
    halos=st.integers(0, 3),
    cores=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    tta=st.sampled_from(["none", "7", "8"]),
    padded=st.booleans(),
)
def test_a_part_has_the_numbers_of_the_whole_section_from_the_pixels_it_reads(shape, ends, halos, cores, tta, padded):
    """Also where the halo is too small: then the places of the tiles show in the numbers."""
    section, halo = pixels(shape) / 1000, 8 * halos if padded else SHRINK
    network, multiple = (pooled_network, 8) if padded else (unpadded_network, 2)
    tile = tuple(8 * core + 2 * halo for core in cores)
    grid = tiling.Grid(shape, tile, halo, multiple, 0 if padded else SHRINK)
    part = []
    for length, a, b in zip(shape, ends[:2], ends[2:], strict=True):
        start, stop = sorted((int(a * (length - 1)), int(b * (length - 1))))
        part.append(slice(start, stop + 1))
    around = tiling.pixels_read(grid, tuple(part), tta)
    total = np.zeros([along.stop - along.start for along in part], np.float32)
    corner = [along.start for along in around]
    tiling.predict_part(grid, tuple(part), section[around], network, total, corner=corner, tta=tta)
    np.testing.assert_array_equal(total, tiling.predict_section(section, network, grid, tta=tta)[tuple(part)])


@pytest.mark.parametrize("shape", [(100, 90), (131, 77), (64, 200), (5, 90)])
@pytest.mark.parametrize("core", [8, 32, 40])
def test_tiles_equal_the_whole_exactly_where_the_halo_covers_the_receptive_radius(shape, core):
    section, halo = pixels(shape) / 1000, tiling.round_up(RADIUS, 8)
    found = stitched(section, pooled_network, core + 2 * halo, halo, batch=3)
    np.testing.assert_array_equal(found, whole(section, pooled_network, halo))


def test_a_halo_below_the_receptive_radius_shows_at_the_seams_and_tiles_keep_the_pooling_grid():
    section = pixels((128, 128)) / 1000
    difference = np.abs(stitched(section, pooled_network, 96, 16) - whole(section, pooled_network, 16))
    assert difference.max() > 0
    assert difference[RADIUS - 16 : 64 - (RADIUS - 16), RADIUS - 16 : 64 - (RADIUS - 16)].max() == 0
    rows, _ = tiling.Grid((1500, 388), (572, 572), 92, 16).cuts
    assert [cut.start for cut in rows] == [0, 384, 768, 1152]
    with pytest.raises(ValueError, match=r"predict must return the shape \(1, 16, 16\). Received: \(1, 12, 12\)"):
        stitched(pixels((16, 16)), identity(2), 16, 0)


@settings(max_examples=100)
@given(length=st.integers(1, 30), before=st.integers(0, 100), after=st.integers(0, 100))
def test_mirroring_agrees_with_numpy_however_often_it_repeats(length, before, after):
    expected = np.pad(np.arange(length), (before, after), mode="reflect" if length > 1 else "edge")
    np.testing.assert_array_equal(tiling.reflect(-before, length + after, length), expected)


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 100])
def test_every_call_has_the_same_shape_and_type_and_no_more_tiles_than_allowed(batch):
    calls = []
    stitched(pixels((15, 9)).astype(np.uint8), lambda tiles: calls.append(tiles) or tiles, (6, 7), 1, 1, batch=batch)
    assert {(tiles.shape, tiles.dtype.name) for tiles in calls} == {((len(calls[0]), 6, 7), "uint8")}
    assert len(calls[0]) <= batch
    assert 8 <= sum(map(len, calls)) < 8 + len(calls)


@settings(max_examples=100)
@given(
    shape=st.tuples(st.integers(1, 3000), st.integers(1, 3000)),
    radius=st.integers(0, 700),
    levels=st.integers(1, 4),
    largest=st.integers(8, 80),
)
def test_a_grid_fits_its_limits_and_the_network(shape, radius, levels, largest):
    field = Field(radius, 2**levels)
    most = largest * field.multiple
    grid = tiling.choose(shape, field, max_tile=most)
    assert max(grid.tile) <= most
    assert not [n for n in (*grid.tile, grid.halo) if n % field.multiple]
    assert grid.halo <= most // 4
    assert grid.exact == (grid.count == 1 or grid.halo >= radius)
    assert ("approximately" in grid.words) == (not grid.exact)
    assert tiling.choose(shape[::-1], field, max_tile=most) == grid.turned((1, False))


PAPER = Field(107, 16, 92, 12)


@cases(
    "shape, field, asked, tile, halo, words",
    ((512, 512), Field(560), {}, (512, 512), 0, "input 512 x 512 px, halo 0, nothing around it: no seams"),
    ((513, 700), Field(560), {}, (520, 704), 0, "one piece, input 520 x 704 px, halo 0, mirrored"),
    ((100, 90), Field(92), {}, (104, 96), 0, "no seams"),
    ((4096, 4096), Field(92), {}, (1016, 1016), 96, "25 tiles of 1016 x 1016 px, halo 96 >= receptive radius 92"),
    ((4096, 4096), Field(560), {}, (944, 944), 128, "halo 128 < receptive radius 560: stitched equals"),
    ((388, 388), PAPER, {"max_tile": 572}, (572, 572), 92, "one piece"),
    ((389, 389), PAPER, {"max_tile": 572}, (396, 396), 92, "4 tiles of 396 x 396 px, unpadded network, halo 92"),
    ((836, 836), PAPER, {}, (1020, 1020), 92, "one piece"),
    ((512, 512), Field(560), {"halo": 32}, (576, 576), 32, "one piece"),
    ((2048, 512), Field(560), {"halo": 32}, (752, 576), 32, "3 tiles"),
)
def test_a_grid_says_in_words_what_it_does(shape, field, asked, tile, halo, words):
    grid = tiling.choose(shape, field, **asked)
    assert (grid.tile, grid.halo) == (tile, halo)
    assert words in grid.words


@cases(
    "field, asked, words",
    (Field(92), {"max_tile": 500}, "--tile must be a multiple of 8. Received: 500"),
    (PAPER, {"max_tile": 576}, "--tile must be a multiple of 16 plus 12. Received: 576"),
    (Field(92), {"halo": 12}, "--overlap must be a non-negative multiple of 8. Received: 12"),
    (Field(92), {"halo": -8}, "--overlap must be a non-negative multiple of 8. Received: -8"),
    (Field(92), {"halo": 32}, "--overlap must leave at least 8 px of a tile of 64 uncovered. Received: 32"),
    (PAPER, {"max_tile": 188, "halo": None}, "--tile must be at least 204 for this network, whose output lacks 92 px"),
    (Field(92, 8, 4), {}, "--overlap must be 4 (the network's own loss) plus a multiple of 8. Received: 16"),
)
def test_tiles_that_cannot_be_are_refused_by_argument_rule_and_value(field, asked, words):
    with pytest.raises(data.DataError) as caught:
        tiling.choose((70, 70), field, **{"max_tile": 64, "halo": 16} | asked)
    assert words in str(caught.value)


def test_transforms_are_distinct_turns_and_mirrorings_that_begin_with_the_identity():
    section = np.arange(6).reshape(2, 3)
    np.testing.assert_array_equal(tiling.transform(section, 1, False), [[2, 5], [1, 4], [0, 3]])
    np.testing.assert_array_equal(tiling.transform(section, 0, True), [[2, 1, 0], [5, 4, 3]])
    np.testing.assert_array_equal(tiling.transform(section, 1, True), [[5, 2], [4, 1], [3, 0]])
    for name, count in {"none": 1, "4": 4, "7": 7, "8": 8}.items():
        versions = [tiling.transform(section, *one).tolist() for one in tiling.TRANSFORMS[name]]
        assert versions[0] == section.tolist()
        assert len({str(version) for version in versions}) == len(versions) == count
    (left_out,) = set(tiling.TRANSFORMS["8"]) - set(tiling.TRANSFORMS["7"])
    np.testing.assert_array_equal(tiling.transform(section, *left_out), section.T)


@pytest.mark.parametrize("name", ["4", "7", "8"])
@pytest.mark.parametrize("shape", [(70, 90), (40, 33)])
def test_the_average_is_that_of_predictions_of_turned_sections_turned_back(shape, name):
    """By definition: each version is a section of its own, with tiles from its own corner."""
    section, every = pixels(shape) / 1000, []
    for turns, mirrored in tiling.TRANSFORMS[name]:
        turned = np.rot90(section, turns)[:, :: -1 if mirrored else 1].copy()
        found = stitched(turned, pooled_network, (40, 32) if turns % 2 else (32, 40), 8)
        every.append(np.rot90(found[:, :: -1 if mirrored else 1], -turns))
    averaged = stitched(section, pooled_network, (32, 40), 8, tta=name, batch=2)
    np.testing.assert_array_equal(averaged, np.add.accumulate(every)[-1] / np.float32(len(every)))
