"""Stitching as an identity, tiles against the whole, mirrored borders, rotations averaged, memory."""

import gc
import math
import threading
import time
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

import data
from predict import tiling


def identity(batch):
    return batch


def unpadded_identity(shrink):
    return lambda batch: batch[:, shrink:-shrink, shrink:-shrink]


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


@settings(max_examples=150, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    levels=st.integers(0, 4),
    halos=st.integers(0, 6),
    cores=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    batch=st.integers(1, 7),
    tta=st.sampled_from(["none", "4", "8"]),
)
def test_stitching_the_identity_returns_the_section_exactly(shape, levels, halos, cores, batch, tta):
    multiple = 2**levels
    section, halo = pixels(shape), halos * multiple
    tile = tuple(core * multiple + 2 * halo for core in cores)
    found = stitched(section, identity, tile, halo, multiple, batch=batch, tta=tta)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, section)


@settings(max_examples=100, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    shrink=st.integers(1, 20),
    extra=st.integers(0, 2),
    usable=st.tuples(st.integers(4, 40), st.integers(4, 40)),
    batch=st.integers(1, 5),
)
def test_stitching_the_unpadded_identity_returns_the_section_exactly(shape, shrink, extra, usable, batch):
    halo = shrink + 4 * extra
    tile = tuple(side + 2 * halo for side in usable)
    section = pixels(shape)
    found = stitched(section, unpadded_identity(shrink), tile, halo, 4, shrink, batch=batch)
    np.testing.assert_array_equal(found, section)


@settings(max_examples=100, deadline=None)
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


def test_the_test_network_has_the_radius_it_claims():
    blank = np.zeros((1, 160, 160), np.float32)
    reach = 0
    for offset in range(8):
        impulse = blank.copy()
        impulse[0, 80 + offset, 80 + offset] = 1000.0
        changed = np.argwhere(pooled_network(impulse)[0] != pooled_network(blank)[0])
        reach = max(reach, np.abs(changed - 80 - offset).max())
    assert RADIUS - 8 <= reach <= RADIUS


def test_a_halo_below_the_receptive_radius_shows_at_the_seams_but_not_in_the_middle_of_tiles():
    section = pixels((128, 128)) / 1000
    difference = np.abs(stitched(section, pooled_network, 96, 16) - whole(section, pooled_network, 16))
    assert difference.max() > 0
    assert difference[RADIUS - 16 : 64 - (RADIUS - 16), RADIUS - 16 : 64 - (RADIUS - 16)].max() == 0


def test_tile_origins_off_the_pooling_grid_would_change_the_prediction():
    """The same tiles on a grid of 2 are wrong for a network of stride 8."""
    section = pixels((128, 128)) / 1000
    expected = whole(section, pooled_network, 40)
    np.testing.assert_array_equal(stitched(section, pooled_network, 120, 40), expected)
    assert not np.allclose(stitched(section, pooled_network, 120, 42, multiple=2), expected)


@pytest.mark.parametrize("tile", [20, 26, 46])
@pytest.mark.parametrize("shape", [(61, 40), (33, 90)])
def test_unpadded_tiles_meet_exactly(shape, tile):
    section = pixels(shape) / 1000
    found = stitched(section, unpadded_network, tile, SHRINK, 2, SHRINK, batch=2)
    np.testing.assert_array_equal(found, whole(section, unpadded_network, SHRINK, multiple=2, shrink=SHRINK))


def test_the_2015_tile_of_572_keeps_the_pooling_grid_though_388_is_no_multiple_of_16():
    rows, _ = tiling.Grid((1500, 388), (572, 572), 92, 16).cuts
    assert [cut.start for cut in rows] == [0, 384, 768, 1152]


@settings(max_examples=100, deadline=None)
@given(length=st.integers(1, 30), before=st.integers(0, 100), after=st.integers(0, 100))
def test_mirroring_agrees_with_numpy_however_often_it_repeats(length, before, after):
    expected = np.pad(np.arange(length), (before, after), mode="reflect" if length > 1 else "edge")
    np.testing.assert_array_equal(tiling.reflect(-before, length + after, length), expected)


@pytest.mark.parametrize("shape", [(1, 1), (1, 37), (3, 2)])
def test_sections_smaller_than_the_halo_are_mirrored_again_and_again(shape):
    section, seen = pixels(shape), []
    np.testing.assert_array_equal(stitched(section, lambda batch: seen.append(batch) or batch, 144, 48), section)
    expected = section
    for axis, length in enumerate(shape):
        widths = [(0, 0), (0, 0)]
        widths[axis] = (48, 96 - length)
        expected = np.pad(expected, widths, mode="reflect" if length > 1 else "edge")
    np.testing.assert_array_equal(seen[0][0], expected)


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 100])
def test_every_call_has_the_same_shape_and_no_more_tiles_than_allowed(batch):
    shapes = []
    stitched(pixels((150, 90)), lambda tiles: shapes.append(tiles.shape) or tiles, (48, 64), 8, batch=batch)
    assert len(set(shapes)) == 1
    assert shapes[0][1:] == (48, 64)
    assert shapes[0][0] <= batch
    assert 10 <= sum(shape[0] for shape in shapes) < 10 + len(shapes)


def test_tiles_are_handed_on_in_the_type_of_the_section():
    kinds = []
    stitched(pixels((20, 10)).astype(np.uint8), lambda tiles: kinds.append(tiles.dtype) or tiles / 255, 16, 0)
    assert set(kinds) == {np.dtype(np.uint8)}


def test_a_prediction_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"predict must return shape \(1, 16, 16\) .* Received: \(1, 12, 12\)"):
        stitched(pixels((16, 16)), unpadded_identity(2), 16, 0)


# -- the choice of tiles -----------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3000), st.integers(1, 3000)),
    radius=st.integers(0, 700),
    levels=st.integers(1, 4),
    largest=st.integers(8, 80),
)
def test_a_grid_fits_its_limits_and_the_network(shape, radius, levels, largest):
    multiple = 2**levels
    grid = tiling.choose(shape, radius, multiple=multiple, max_tile=largest * multiple)
    assert max(grid.tile) <= largest * multiple
    assert all(side % multiple == 0 for side in grid.tile)
    assert grid.halo % multiple == 0
    assert grid.halo <= largest * multiple // 4
    assert grid.exact == (grid.count == 1 or grid.halo >= radius)
    assert ("approximately" in grid.words) == (not grid.exact)
    assert tiling.choose(shape[::-1], radius, multiple=multiple, max_tile=largest * multiple) == grid.turned((1, False))


@pytest.mark.parametrize(
    ("shape", "radius", "tile", "halo", "words"),
    [
        ((512, 512), 560, (512, 512), 0, "one piece, input 512 x 512 px"),
        ((513, 700), 560, (520, 704), 0, "one piece, input 520 x 704 px"),
        ((100, 90), 92, (104, 96), 0, "no seams"),
        ((4096, 4096), 92, (1016, 1016), 96, "halo 96 >= receptive radius 92: stitched equals whole exactly"),
        ((4096, 4096), 560, (944, 944), 128, "halo 128 < receptive radius 560: stitched equals whole approximately"),
    ],
)
def test_a_grid_says_in_words_what_it_does(shape, radius, tile, halo, words):
    grid = tiling.choose(shape, radius)
    assert (grid.tile, grid.halo) == (tile, halo)
    assert words in grid.words


def test_unpadded_networks_get_their_valid_sizes():
    geometry = {"multiple": 16, "max_tile": 572, "shrink": 92, "remainder": 12}
    one, four = (tiling.choose((side, side), 0, **geometry) for side in (388, 389))
    assert (one.tile, one.count) == ((572, 572), 1)
    assert four.exact
    assert "meet exactly" in four.words
    assert four.tile[0] % 16 == 12
    assert four.count == 4


def test_a_halo_asked_for_is_used_in_one_piece_as_in_tiles():
    assert tiling.choose((512, 512), 560, halo=32)[1:3] == ((576, 576), 32)
    assert tiling.choose((2048, 512), 560, halo=32)[1:3] == ((752, 576), 32)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"max_tile": 500}, "--tile must be a multiple of 8. Received: 500"),
        ({"max_tile": 0}, "--tile must be a multiple of 8. Received: 0"),
        ({"multiple": 16, "max_tile": 576, "remainder": 12}, "--tile must be a multiple of 16 plus 12. Received: 576"),
        ({"halo": 12}, "--overlap must be a non-negative multiple of 8. Received: 12"),
        ({"halo": -8}, "--overlap must be a non-negative multiple of 8. Received: -8"),
        ({"halo": 32}, "--overlap must leave at least 8 px of a tile of 64 uncovered. Received: 32"),
        ({"shrink": 4, "halo": 16}, "--overlap must be 4 (the network's own loss) plus a multiple of 8. Received: 16"),
        ({"shape": (4,)}, "a section must have two axes of at least 1 pixel. Received: shape (4,)"),
        ({"shape": (0, 5)}, "a section must have two axes of at least 1 pixel. Received: shape (0, 5)"),
    ],
)
def test_tiles_that_cannot_be_are_refused_by_argument_rule_and_value(arguments, words):
    with pytest.raises(data.DataError) as caught:
        tiling.choose(**{"shape": (70, 70), "radius": 92, "max_tile": 64, "halo": 16} | arguments)
    assert words in str(caught.value)


# -- turned and mirrored -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["none", "4", "7", "8"])
def test_transforms_are_distinct_and_begin_with_the_identity(name):
    section = pixels((3, 3))
    versions = [tiling.transform(section, *one).tobytes() for one in tiling.TRANSFORMS[name]]
    assert len(set(versions)) == len(versions) == {"none": 1}.get(name) or int(name)
    assert versions[0] == section.tobytes()


def test_transforms_are_the_rotations_and_mirrorings_of_the_square():
    section = np.arange(6).reshape(2, 3)
    np.testing.assert_array_equal(tiling.transform(section, 1, False), [[2, 5], [1, 4], [0, 3]])
    np.testing.assert_array_equal(tiling.transform(section, 0, True), [[2, 1, 0], [5, 4, 3]])
    np.testing.assert_array_equal(tiling.transform(section, 1, True), [[5, 2], [4, 1], [3, 0]])
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


# -- a stack, one section at a time ------------------------------------------------------------------------------


class Stack:
    """A lazy stack that knows how many of its sections are alive, with the predictions made of them."""

    def __init__(self, count):
        self.count, self.read, self.alive, self.most = count, 0, weakref.WeakSet(), 0
        self.threads = set()

    def __iter__(self):
        for index in range(self.count):
            section = self.watch(np.full((4, 4), index, np.float32))
            self.read += 1
            self.threads.add(threading.current_thread())
            yield section
            del section

    def watch(self, array):
        watched = array.view(Watched)
        self.alive.add(watched)
        self.most = max(self.most, len(self.alive))
        return watched


class Watched(np.ndarray):
    """An array that can be held in a set."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__


@pytest.mark.parametrize("count", [3, 40])
def test_sections_alive_do_not_grow_with_the_stack(count):
    stack = Stack(count)

    def predict_one(section):
        end = time.monotonic() + 10
        while stack.read < min(section[0, 0] + 2, count):
            assert time.monotonic() < end, "the next section was not read"
        return np.asarray(section) + 1

    for index, prediction in enumerate(tiling.predict_stack(stack, predict_one)):
        assert prediction[0, 0] == index + 1
        assert len(stack.alive) <= 1, "while the caller writes, only the next section may be held"
    gc.collect()
    assert stack.read == count
    assert stack.most <= 2
    assert not stack.alive


def test_a_prediction_handed_over_is_not_kept():
    made = []

    def predict_one(section):
        assert all(reference() is None for reference in made)
        prediction = np.zeros(4)
        made.append(weakref.ref(prediction))
        return prediction

    for prediction in tiling.predict_stack(Stack(4), predict_one):
        del prediction
    assert len(made) == 4


def test_the_next_section_is_read_while_this_one_is_predicted():
    read_second, stack = threading.Event(), Stack(3)

    def sections():
        for index, section in enumerate(stack):
            if index == 1:
                read_second.set()
            yield section

    def predict_one(section):
        assert read_second.wait(10), "the second section was not read during the prediction of the first"
        return section

    assert len(list(tiling.predict_stack(sections(), predict_one))) == 3
    assert threading.current_thread() not in stack.threads


def test_reading_stays_one_section_ahead_and_stops_when_the_caller_stops():
    stack = Stack(10)
    predictions = tiling.predict_stack(stack, lambda section: section)
    next(predictions)
    next(predictions)
    predictions.close()
    assert stack.read <= 3


def test_an_error_while_reading_arrives_after_the_sections_before_it():
    def sections():
        yield np.zeros((2, 2))
        raise OSError("page 1 is truncated")

    predictions = tiling.predict_stack(sections(), lambda section: section)
    assert next(predictions).shape == (2, 2)
    with pytest.raises(OSError, match="page 1 is truncated"):
        next(predictions)
