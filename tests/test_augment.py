"""augment.py: what each transform does, registration of image and mask, keys, and the pixels' exactness."""
# ruff: noqa: NPY002  (the legacy generator is global, which is why it is looked at here)

import hashlib
import itertools
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pytest
from conftest import python
from keras import ops
from scipy import ndimage

import augment
from augment import RECIPES, Recipe
from network import hashing

WINDOW = 48
NO_GRAY = dict.fromkeys(("gamma", "shade", "blur", "noise", "brightness", "contrast"), 0)
SINGLE = {
    "flips": Recipe(flips=True, quarter_turns=True),
    "rotation": Recipe(max_rotation_deg=180),
    "scale": Recipe(scale=(0.5, 2)),
    "shear": Recipe(max_shear_deg=30),
    "shift": Recipe(max_shift_px=20),
    "elastic": Recipe(elastic_sd_px=3, elastic_grid=5),
    "everything": replace(RECIPES["all"], max_shear_deg=20, elastic_sd_px=4, **NO_GRAY),
}
GEOMETRY = pytest.mark.parametrize("made", SINGLE.values(), ids=SINGLE.keys())


def stack(sections=4, shape=(70, 90), dtype=np.uint8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (sections, *shape)).astype(dtype)


def batch(images, masks, made, *, seed=3, epoch=1, indices=range(6), window=WINDOW):
    sections = range(len(images))
    return augment.batch(images, masks, made, seed=seed, epoch=epoch, indices=indices, window=window, sections=sections)


def draw(made=RECIPES["none"], index=0, *, seed=0, epoch=0, sections=(0,), shape=(64, 64), window=64):
    return augment.draw(made, seed=seed, epoch=epoch, index=index, sections=sections, shape=shape, window=window)


def warp(arrays, made, *, window=WINDOW, mean=0.0, std=1.0):
    image, mask = augment.warp(arrays, made, window=window, mean=mean, std=std)
    return ops.convert_to_numpy(image)[..., 0], ops.convert_to_numpy(mask)


def compiled(function):
    """As the training step runs it: XLA on TensorFlow, jit on JAX."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow

        return tensorflow.function(function, jit_compile=True)
    if keras.backend.backend() == "jax":
        import jax

        return jax.jit(function)
    return function


def compiled_warp(arrays, made):
    run = compiled(lambda tensors: augment.warp(tensors, made, window=WINDOW, mean=0.0, std=1.0))
    image, mask = run({name: ops.convert_to_tensor(array) for name, array in arrays.items()})
    return ops.convert_to_numpy(image)[..., 0], ops.convert_to_numpy(mask)


RUNS = [*((made, warp) for made in SINGLE.values()), (SINGLE["everything"], compiled_warp)]
RUNS = pytest.mark.parametrize(("made", "run"), RUNS, ids=[*SINGLE, "compiled"])


def transformed(images, made, *, window=WINDOW, **changes):
    """The central window of section 0 after the map of `augment.affine(**changes)`, and the same window before."""
    one = draw(made, shape=images.shape[1:], window=window)
    row, column = ((side - window) // 2 for side in images.shape[1:])
    one = replace(one, origin=(row, column), affine=augment.affine(**changes), grid=one.grid * 0)
    image, _ = warp(augment.collate(images, images, [one], made), made, window=window)
    return image[0], images[0, row : row + window, column : column + window]


def source_map(one, window):
    """Rows and columns in the section, in float64, written down pixel by pixel from the definition."""
    nodes = one.grid.shape[-1]
    padded = np.pad(one.grid.astype(float), ((0, 0), (1, 2), (1, 2)), mode="edge")
    place = np.arange(window) * (nodes - 1) / (window - 1)
    first = np.minimum(np.floor(place).astype(int), nodes - 1)

    def keys(t):
        t = abs(t)
        return (1.5 * t - 2.5) * t * t + 1 if t <= 1 else ((-0.5 * t + 2.5) * t - 4) * t + 2 if t < 2 else 0.0

    weights = np.array([[keys(p - f - step) for step in (-1, 0, 1, 2)] for p, f in zip(place, first, strict=True)])
    result = np.empty((2, window, window))
    for r, c in itertools.product(range(window), repeat=2):
        near = padded[:, first[r] : first[r] + 4, first[c] : first[c] + 4]
        pixel = np.array([r, c, np.inf]) - (window - 1) / 2
        pixel[2] = 1
        result[:, r, c] = one.affine.astype(float) @ pixel + near @ weights[c] @ weights[r] + (window - 1) / 2
    return result + np.array(one.origin)[:, None, None]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_a_crop_alone_is_the_sections_pixels_bit_for_bit(dtype):
    images = stack(dtype=dtype) * dtype(3) / 3 if dtype == np.float32 else stack(dtype=dtype)
    masks = (stack(seed=1) > 60).astype(np.uint8)
    arrays = batch(images, masks, RECIPES["none"])
    assert (arrays["image"].dtype, arrays["image"].shape) == (dtype, (6, WINDOW, WINDOW))
    image, mask = warp(arrays, RECIPES["none"])
    for index in range(6):
        one = draw(index=index, seed=3, epoch=1, sections=range(4), shape=(70, 90), window=WINDOW)
        place = np.s_[one.section, one.origin[0] : one.origin[0] + WINDOW, one.origin[1] : one.origin[1] + WINDOW]
        np.testing.assert_array_equal(image[index], images[place])
        np.testing.assert_array_equal(mask[index], masks[place])


@pytest.mark.parametrize("window", [48, 33])
@pytest.mark.parametrize("made", [SINGLE["flips"], SINGLE["everything"]], ids=["exact", "resampled"])
def test_flips_and_quarter_turns_move_pixels_without_changing_them(made, window):
    images = stack()
    for turns, rows, columns in itertools.product(range(4), (False, True), (False, True)):
        image, crop = transformed(images, made, window=window, quarter_turns=turns, flip=(rows, columns))
        expected = np.rot90(crop, turns)
        expected = expected[::-1] if rows else expected
        np.testing.assert_array_equal(image, expected[:, ::-1] if columns else expected)


def test_flips_and_turns_are_drawn_evenly_and_angles_scales_and_shifts_fill_their_ranges():
    for flips, turns, kinds in ((True, True, 8), (True, False, 4), (False, True, 4)):
        made = Recipe(flips=flips, quarter_turns=turns)
        maps = [draw(made, i).affine[:, :2].ravel() for i in range(800)]
        counts = np.unique(maps, axis=0, return_counts=True)[1]
        assert len(counts) == kinds
        np.testing.assert_allclose(counts, 800 / kinds, rtol=0.3)
    made = Recipe(max_rotation_deg=20, scale=(0.5, 2), max_shift_px=16)
    maps = np.array([draw(made, i).affine for i in range(1000)], float)
    log_scales = -np.log2(np.linalg.det(maps[:, :, :2])) / 2
    angles = np.rad2deg(np.arctan2(maps[:, 0, 1], maps[:, 0, 0]))
    assert abs(np.corrcoef(maps[:, :, 2].T)[0, 1]) < 0.15
    drawn = [draw(Recipe(max_shear_deg=20, contrast=1, brightness=0.5, gamma=3), i) for i in range(500)]
    gray, shears = np.array([one.gray for one in drawn]), np.rad2deg(np.arctan([one.affine[1, 0] for one in drawn]))
    geometry = (log_scales, 1), (angles, 20), (maps[:, 0, 2], 16), (maps[:, 1, 2], 16), (shears, 20)
    for found, most in (*geometry, (np.log2(gray[:, 0]), 1), (gray[:, 1], 0.5), (np.log2(gray[:, 2]), 2)):
        assert -most * 1.0001 <= found.min() < -0.97 * most
        assert 0.97 * most < found.max() <= most * 1.0001
        assert abs(found.mean()) < 0.075 * most


def test_the_image_is_normalised_as_the_raw_values_are_and_the_mask_keeps_its_values():
    images = stack()
    arrays = batch(images, images, RECIPES["none"])
    image, _ = warp(arrays, RECIPES["none"], mean=100.5, std=41.25)
    expected = (arrays["image"].astype(np.float32) - np.float32(100.5)) / np.float32(41.25)
    np.testing.assert_allclose(image, expected, rtol=1e-6, atol=1e-7)
    labels = np.random.default_rng(0).integers(0, 60000, (2, 70, 90)).astype(np.uint16)
    weights = labels.astype(np.float32) / 7
    for masks in (labels, weights):
        _, mask = warp(batch(stack(2), masks, RECIPES["all"]), RECIPES["all"])
        assert np.isin(mask, masks.astype(np.float32)).all()


@GEOMETRY
def test_the_warp_keeps_labelled_and_unlabelled_together(made):
    """A third class is moved as the others are, mirrored borders included, and no fourth value arises."""
    masks = np.random.default_rng(0).integers(-1, 2, (4, 70, 90)).astype(np.int8)
    warped, interior, unlabelled = (warp(batch(stack(), m, made), made)[1] for m in (masks, masks == 1, masks == -1))
    np.testing.assert_array_equal(warped, interior - unlabelled)


def test_a_window_without_labels_is_moved_to_some_and_the_others_stay():
    masks = np.full((4, 70, 90), -1, np.int8)
    masks[:, 60, 3], masks[:2, 5, 80] = 0, 1
    plain, moved = (
        [draw(index=i, sections=range(4), shape=(70, 90), window=16) for i in range(60)],
        batch(masks, masks, RECIPES["none"], indices=range(60), window=16),
    )
    assert set(moved["mask"].max(axis=(1, 2))) == {0, 1}, "what is labelled may be background"
    places = set()
    for one in plain:
        after = augment.onto_labels(one, masks)
        held = augment.labelled(masks[one.section], one.origin, 16)
        assert (after == one) if held else augment.labelled(masks[one.section], after.origin, 16)
        places |= set() if held else {(one.section, after.origin)}
    assert places == {*((section, (52, 0)) for section in range(4)), (0, (0, 72)), (1, (0, 72))}


@GEOMETRY
def test_uint8_uint16_and_float32_give_the_same_bits(made):
    first = warp(batch(stack(), stack(), made), made)
    for dtype in (np.uint16, np.float32):
        other = warp(batch(stack(dtype=dtype), stack(dtype=dtype), made), made)
        for a, b in zip(first, other, strict=True):
            np.testing.assert_array_equal(a, b)


@RUNS
def test_image_and_mask_stay_registered_in_every_pixel(made, run):
    """On ramps, whose nearest value is the linear one, rounded; one along the rows, one along the columns."""
    ramps = np.indices((70, 90)).astype(np.uint8)
    image, mask = run(batch(ramps, ramps, made, indices=range(8)), made)
    assert len(np.unique(mask)) > 50
    assert np.abs(image - mask).max() <= 0.5 + 1e-3


@RUNS
def test_the_warp_is_scipys_with_the_same_map_and_mirrored_borders(made, run):
    images, masks = stack(), stack(seed=1)
    draws = [draw(made, i, seed=5, sections=range(4), shape=(70, 90), window=WINDOW) for i in range(3)]
    image, mask = run(augment.collate(images, masks, draws, made), made)
    for k, one in enumerate(draws):
        place = source_map(one, WINDOW)
        section = images[one.section].astype(np.float64)
        expected = ndimage.map_coordinates(section, place, order=1, mode="mirror")
        np.testing.assert_allclose(image[k], expected, atol=0.02)  # 1e-4 px of a step of 255
        nearest = ndimage.map_coordinates(masks[one.section], np.floor(place + 0.5), order=0, mode="mirror")
        near_tie = (np.abs(place % 1 - 0.5) < 1e-4).any(axis=0)
        assert near_tie.mean() < 0.01
        np.testing.assert_array_equal(mask[k][~near_tie], nearest[~near_tie])


def extreme_draws(made, window):
    """Every combination of a recipe's largest changes, with grids whose displacements add up at a corner or side."""
    angles = np.linspace(-made.max_rotation_deg, made.max_rotation_deg, 73)
    weights = augment.bicubic(window, made.elastic_grid)
    worst = np.abs(weights).sum(axis=1).argmax()
    pattern = np.sign(np.outer(weights[worst], weights[worst]))
    ones = np.ones_like(pattern)
    grids = [np.stack(pair) for pair in ([ones, ones], [-ones, -ones], [pattern, -pattern], [-pattern, pattern])]
    for angle, shear, shift, grid, scale in itertools.product(angles, (-1, 1), (-1, 1), grids, made.scale):
        moved = {"shear_deg": shear * made.max_shear_deg, "shift_px": np.multiply((1, -1), shift * made.max_shift_px)}
        affine = augment.affine(rotation_deg=angle, scale=scale, **moved)
        yield affine, np.float32(grid * augment.CLIP_SD * made.elastic_sd_px)


FINE = Recipe(elastic_sd_px=10, elastic_grid=16)  # whose displacements add up between the nodes near a border


@pytest.mark.parametrize("made", [*SINGLE.values(), FINE], ids=[*SINGLE, "fine"])
@pytest.mark.parametrize("window", [16, 31])
def test_no_draw_reaches_beyond_the_source_window_and_little_of_it_is_idle(made, window):
    affines, grids = zip(*extreme_draws(made, window), strict=True)
    arrays = {"affine": np.stack(affines), "grid": np.stack(grids)}
    places = np.stack([ops.convert_to_numpy(p) for p in augment._coordinates(arrays, made, window)])
    last = window + 2 * augment.margin(made, window) - 1
    assert places.min() >= 0
    assert np.floor(places.max()) + made.resamples <= last  # linear sampling reads the next pixel too
    idle = min(places.min(), last - places.max())
    assert idle <= 2 + 0.05 * window + 0.3 * augment.CLIP_SD * made.elastic_sd_px


def test_the_margin_is_nothing_without_resampling_and_the_corners_for_any_angle():
    assert augment.margin(RECIPES["none"], 512) == augment.margin(SINGLE["flips"], 512) == 0
    any_angle = augment.margin(Recipe(max_rotation_deg=180), 512)
    assert any_angle == augment.margin(Recipe(max_rotation_deg=45), 512) == 107  # (sqrt(2) - 1) / 2 * 511, and 1
    assert augment.margin(Recipe(max_rotation_deg=10), 512) < 45
    assert augment.margin(Recipe(max_shift_px=7), 512) == 8
    grids = [draw(Recipe(elastic_sd_px=10, elastic_grid=32), seed=seed).grid for seed in range(20)]
    assert np.abs(grids).max() == pytest.approx(10 * augment.CLIP_SD), "clipped where the margin ends"


def test_rotation_scale_shift_and_shear_do_what_they_say():
    image, crop = transformed(stack(), Recipe(max_rotation_deg=180), rotation_deg=90)
    np.testing.assert_allclose(image, np.rot90(crop), atol=0.02)
    third = augment.affine(rotation_deg=30)[:, :2]
    np.testing.assert_allclose(third @ third @ third, augment.affine(quarter_turns=1)[:, :2], atol=1e-6)
    rows = np.indices((96, 96))[0][None].astype(np.float32)
    image, crop = transformed(rows, Recipe(scale=(0.5, 2)), scale=2)
    np.testing.assert_allclose(image[:, 0], crop.mean() + (np.arange(WINDOW) - 23.5) / 2, atol=1e-4)
    image, crop = transformed(stack(), Recipe(max_shift_px=9), shift_px=(3, -5))
    np.testing.assert_array_equal(image[3:, :-5], crop[:-3, 5:])
    rows, columns = np.indices((2, 96, 96))[1:].astype(np.float32)
    made = Recipe(max_shear_deg=30)
    offset = (np.arange(WINDOW) - 23.5)[:, None] * np.tan(np.deg2rad(20))
    moved, crop = transformed(columns[:1], made, shear_deg=20)
    np.testing.assert_allclose(moved - crop, np.broadcast_to(offset, crop.shape), atol=1e-3)
    np.testing.assert_allclose(*transformed(rows[:1], made, shear_deg=20), atol=1e-3)


def test_the_elastic_grid_is_met_at_its_nodes_which_are_independent_gaussians():
    grid = np.float32(np.random.default_rng(0).normal(size=(3, 3)))
    weights = augment.bicubic(49, 3)
    np.testing.assert_allclose((weights @ grid @ weights.T)[::24, ::24], grid, atol=1e-6)
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-6)  # a constant grid is a shift
    assert np.abs(np.diff(augment.bicubic(512, 3), axis=0)).max() < 0.01  # no jump, and none of slope:
    assert np.abs(np.diff(augment.bicubic(512, 3), 2, axis=0)).max() < 2e-4
    grids = np.stack([draw(RECIPES["elastic"], i).grid for i in range(3000)])
    assert grids.shape == (3000, 2, 3, 3)
    assert grids.std() == pytest.approx(10, abs=0.2)
    assert abs(grids.mean()) < 0.2
    correlation = np.corrcoef(grids.reshape(3000, 18).T) - np.eye(18)
    assert np.abs(correlation).max() < 0.1  # 5 standard deviations of 3000 independent pairs


@pytest.mark.parametrize("shape", [(20, 33), (1, 9), (2, 2), (50, 64)])
@pytest.mark.parametrize("margin", [0, 1, 7, 130])
def test_context_beyond_the_border_is_mirrored_however_far(shape, margin):
    images = np.random.default_rng(0).integers(0, 255, (2, *shape)).astype(np.uint16)
    window = min(shape)
    for index in range(4):
        one = draw(index=index, sections=(0, 1), shape=shape, window=window)
        padded = np.pad(images[one.section], margin, mode="reflect")
        rows, columns = (np.s_[start : start + window + 2 * margin] for start in one.origin)
        source = augment.cut(images, one, margin)
        assert source.dtype == np.uint16
        np.testing.assert_array_equal(source, padded[rows, columns])


def test_context_is_what_a_larger_window_around_the_same_crop_has():
    made, masks = SINGLE["everything"], stack(seed=1)
    one = draw(made, sections=(2,), shape=(70, 90), window=16)
    one = replace(one, origin=(20, 30))
    wide = replace(one, origin=(4, 14), window=48)
    found, expected = (augment.collate(stack(), masks, [each], made, n) for each, n in ((one, 16), (wide, 0)))
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def gray_warp(z, contrast=1.0, brightness=0.0, gamma=1.0):
    made = Recipe(brightness=0.5, contrast=0.5, gamma=1.0)
    gray = np.float32([[contrast, brightness, gamma, 0, 0, 0, 0]])
    return ops.convert_to_numpy(augment._change_gray(np.float32(z)[None, None], gray, made))[0, 0]


@pytest.mark.parametrize("gamma", [0.5, 0.8, 1.25, 2.0])
def test_gamma_is_a_power_law_that_keeps_level_and_slope_at_the_mean(gamma):
    z = np.linspace(-2, 3, 101)
    power = 3 * ((1 + z / 3) ** gamma - 1) / gamma
    np.testing.assert_allclose(gray_warp(z, gamma=gamma), power, atol=0.06 if gamma < 0.8 else 0.02)
    assert gray_warp([0.0], gamma=gamma) == 0
    assert np.ptp(gray_warp([-0.01, 0.01], gamma=gamma)) == pytest.approx(0.02, rel=1e-3)
    far = gray_warp(np.linspace(-9, 30, 500), gamma=gamma)
    assert np.isfinite(far).all()
    assert (np.diff(far) >= 0).all()


def test_gray_values_change_as_drawn_linearly_or_by_gamma_and_only_the_images():
    made = replace(RECIPES["none"], brightness=0.3, contrast=0.25, gamma=0.25)
    images = stack()
    arrays = batch(images, images, made)
    image, mask = warp(arrays, made, mean=127, std=74)
    np.testing.assert_array_equal(mask, arrays["image"])
    for k, (contrast, brightness, gamma, *others) in enumerate(arrays["gray"]):
        z = (arrays["image"][k] - 127.0) / 74
        expected = gray_warp(z.ravel(), contrast, brightness, gamma).reshape(z.shape)
        np.testing.assert_allclose(image[k], expected, atol=1e-4)
        assert 0.8 <= contrast <= 1.25
        assert -0.3 <= brightness <= 0.3
        assert 0.8 <= gamma <= 1.25
        assert not any(others)
    assert np.ptp(arrays["gray"][:, :3], axis=0).min() > 0.1
    z = np.linspace(-2, 4, 13)
    np.testing.assert_allclose(gray_warp(z, contrast=1.3, brightness=-0.2), 1.3 * z - 0.2, atol=1e-5)


@pytest.mark.parametrize("run", [lambda f: f, compiled], ids=["eager", "compiled"])
def test_noise_is_the_byte_sum_of_random_words(run):
    keys = np.int32([0, 1, -5, 2**31 - 1, -(2**31)])
    noise = ops.convert_to_numpy(run(lambda key: augment._noise(key, 33))(ops.convert_to_tensor(keys)))
    hashed = ops.convert_to_numpy(hashing.random_words(33 * 33, (0, keys[:, None]))).astype(np.uint32)
    sums = hashed.view(np.uint8).reshape(5, 33, 33, 4).sum(axis=-1)
    np.testing.assert_array_equal(np.round(noise * np.sqrt(21845) + 510), sums)


def test_noise_is_nearly_gaussian_uncorrelated_and_as_strong_as_drawn():
    noise = ops.convert_to_numpy(augment._noise(np.int32([12, 13, 2**30]), 256)).astype(float)
    assert np.abs(noise.mean(axis=(1, 2))).max() < 0.02
    np.testing.assert_allclose(noise.std(axis=(1, 2)), 1, atol=0.01)
    assert np.mean(noise**4) == pytest.approx(3 - 0.3, abs=0.06)  # the sum of four uniform numbers has 2.7
    pairs = [(noise[0], noise[1]), (noise[1], noise[2]), (noise[:, 1:], noise[:, :-1])]
    pairs += [(noise[..., 1:], noise[..., :-1]), (noise[:, 1:, 1:], noise[:, :-1, :-1])]
    assert max(abs(np.mean(a * b)) for a, b in pairs) < 0.02
    made = replace(RECIPES["none"], noise=0.5)
    flat = np.full((1, 64, 64), 100, np.uint8)
    arrays = batch(flat, flat, made, window=64)
    image, mask = warp(arrays, made, window=64, mean=100, std=10)
    np.testing.assert_allclose(image.std(axis=(1, 2)), arrays["gray"][:, 3], rtol=0.05)
    assert arrays["gray"][:, 3].min() > 0
    assert arrays["gray"][:, 3].max() <= 0.5
    assert (mask == 100).all()


@pytest.mark.parametrize("run", [lambda f: f, compiled], ids=["eager", "compiled"])
def test_blur_is_scipys_gaussian_as_wide_as_drawn_before_the_noise_and_leaves_the_labels(run):
    made = replace(RECIPES["none"], blur=1.5)
    arrays = batch(stack(), stack(), made)
    image, mask = warp(arrays, made)
    np.testing.assert_array_equal(mask, arrays["image"])
    wide = arrays["gray"][:, 4]
    assert 0 < wide.min() < 0.3 < 0.9 < wide.max() < 1.5
    sharp = np.float32(arrays["image"])
    for source, seen, sd in zip(sharp, image, wide, strict=True):
        np.testing.assert_allclose(seen, ndimage.gaussian_filter(source, sd, radius=5, mode="mirror"), atol=1e-3)
    blurred = run(lambda sd: augment._blur(ops.convert_to_tensor(sharp), sd, 1.5))(np.zeros(6, np.float32))
    np.testing.assert_array_equal(ops.convert_to_numpy(blurred), sharp)
    few = sharp[:, :3, :2]  # smaller than the blur reaches
    blurred = run(lambda sd: augment._blur(ops.convert_to_tensor(few), sd, 1.5))(np.ones(6, np.float32))
    assert np.isfinite(ops.convert_to_numpy(blurred)).all()
    noisy = replace(made, noise=0.5)
    arrays = batch(stack(), stack(), noisy)
    quiet = arrays | {"gray": arrays["gray"] * np.float32([1, 1, 1, 0, 1, 1, 1])}
    added = warp(arrays, noisy, std=70)[0] - warp(quiet, noisy, std=70)[0]
    np.testing.assert_allclose(added.std(axis=(1, 2)), arrays["gray"][:, 3], rtol=0.05)  # noise is not blurred


def test_shade_is_a_plane_as_steep_as_drawn_either_way():
    made = replace(RECIPES["none"], shade=0.5)
    flat = np.full((1, 64, 80), 100, np.uint8)
    arrays = batch(flat, flat, made, indices=range(40), window=33)
    image, _ = warp(arrays, made, window=33, mean=100, std=10)
    down, right = arrays["gray"][:, 5:].T
    place = np.linspace(-1, 1, 33)
    planes = down[:, None, None] * place[:, None] + right[:, None, None] * place
    np.testing.assert_allclose(image, planes, atol=1e-6)
    for slope in (down, right):
        assert -0.5 < slope.min() < -0.4 < 0.4 < slope.max() < 0.5


def test_an_element_depends_on_seed_epoch_and_index_and_not_on_the_batch_it_travels_in():
    made = RECIPES["all"]
    together = warp(batch(stack(), stack(), made, indices=[2, 5, 7]), made)
    alone = warp(batch(stack(), stack(), made, indices=[5]), made)
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_array_equal(a[1], b[0])
    for change in ({"seed": 4}, {"epoch": 2}, {"indices": range(6, 12)}):
        first, second = (batch(stack(), stack(), RECIPES["all"], **kwargs) for kwargs in ({}, change))
        for name in ("affine", "grid", "gray", "key", "image"):
            assert not any(np.array_equal(a, b) for a, b in itertools.product(first[name], second[name])), name
    keys = itertools.product((0, 1, 2, 2**32), (0, 1, 2), (0, 1, 2))
    assert len({draw(index=index, seed=seed, epoch=epoch).key for seed, epoch, index in keys}) == 36


def digest():
    """Of the numbers, the source windows and, to 3 decimals, the warped images."""
    arrays = batch(stack(), stack(), RECIPES["all"])
    bits = b"".join(arrays[name].tobytes() for name in sorted(arrays))
    image, mask = warp(arrays, RECIPES["all"])
    return hashlib.sha256(bits + image.tobytes() + mask.tobytes()).hexdigest()


def test_another_process_makes_the_same_batch_and_no_global_generator_is_read_or_moved():
    here = Path(__file__).resolve().parent
    code = f"import sys; sys.path[:0] = {[str(here), str(here.parent)]!r}; import test_augment as t; print(t.digest())"
    assert python("-c", code).stdout.strip() == digest()
    np.random.seed(1)
    before = np.random.get_state()[1].copy()
    first = digest()
    np.testing.assert_array_equal(np.random.get_state()[1], before)
    np.random.seed(2)
    keras.utils.set_random_seed(3)
    assert digest() == first


def test_recipes_share_their_crops_and_each_setting_its_own_numbers():
    recipes = RECIPES["none"], RECIPES["all"], replace(RECIPES["all"], elastic_sd_px=20)
    plain, full, stronger = (draw(made, 2, epoch=4, sections=range(5), shape=(90, 80), window=40) for made in recipes)
    assert (plain.section, plain.origin, plain.key) == (full.section, full.origin, full.key)
    np.testing.assert_allclose(stronger.grid, 2 * full.grid, rtol=1e-6)
    np.testing.assert_array_equal(stronger.affine, full.affine)


def test_sections_are_visited_evenly_in_orders_of_their_own_and_every_place_is_reached():
    sections = (3, 4, 9, 11, 20)
    drawn = [[draw(index=i, epoch=epoch, sections=sections).section for i in range(20)] for epoch in range(3)]
    deals = [epoch[start : start + 5] for epoch in drawn for start in range(0, 20, 5)]
    assert all(sorted(deal) == list(sections) for deal in deals)
    assert len({tuple(deal) for deal in deals}) > 8
    origins = {draw(index=i, shape=(10, 12), window=8).origin for i in range(300)}
    assert origins == set(itertools.product(range(3), range(5)))


def test_the_compiled_warp_is_the_eager_one_in_shape_type_and_value():
    made = RECIPES["all"]
    arrays = batch(stack(), stack(), made)
    (image, mask), (eager_image, eager_mask) = compiled_warp(arrays, made), warp(arrays, made)
    np.testing.assert_allclose(image, eager_image, atol=0.02)
    assert (mask == eager_mask).mean() > 0.9999  # a tie may round either way
    made = RECIPES["all"]
    arrays = batch(stack(), (stack() > 9).astype(np.uint8), made, indices=range(2))
    side = WINDOW + 2 * augment.margin(made, WINDOW)
    shapes = {"affine": (2, 2, 3), "grid": (2, 2, 3, 3), "gray": (2, 7)}
    assert {name: (array.shape, array.dtype.name) for name, array in arrays.items()} == {
        **dict.fromkeys(("image", "mask"), ((2, side, side), "uint8")),
        **{name: (shape, "float32") for name, shape in shapes.items()},
        "key": ((2,), "int32"),
    }
    image, mask = augment.warp(arrays, made, window=WINDOW, mean=127.0, std=50.0)
    for tensor, shape in ((image, (2, WINDOW, WINDOW, 1)), (mask, (2, WINDOW, WINDOW))):
        assert (tuple(tensor.shape), keras.backend.standardize_dtype(tensor.dtype)) == (shape, "float32")


def test_the_preview_shows_raw_like_pictures():
    images, masks = stack(), (stack(seed=1) > 99).astype(np.uint8)
    how = {"seed": 0, "n": 3, "window": 32, "mean": 127.5, "std": 42.5, "sections": range(4)}
    shown, labels = augment.preview_batch(images, masks, RECIPES["none"], **how)
    assert shown.dtype == labels.dtype == np.uint8
    assert shown.shape == labels.shape == (3, 32, 32)
    crop = batch(images, masks, RECIPES["none"], seed=0, epoch=0, indices=range(3), window=32)
    assert np.abs(shown - crop["image"].astype(int)).max() <= 1
    np.testing.assert_array_equal(labels, crop["mask"])


def test_recipes_by_name_take_what_is_given_and_refuse_what_is_wrong_or_has_no_effect():
    with pytest.raises(ValueError, match=r"^scale must .*Received: \(1\.2, 0\.8\)"):
        augment.recipe("all", scale=(1.2, 0.8))
    assert augment.recipe("all") == RECIPES["all"]
    assert augment.recipe("all", elastic_grid=None, scale=[0.9, 1]).scale == (0.9, 1)
    assert augment.recipe("affine", elastic_sd_px=4, elastic_grid=5).elastic_grid == 5
    for name, values, words in [
        ("none", {"elastic_sd_px": 5}, "none takes no elastic_sd_px"),
        ("affine", {"elastic_grid": 5}, "elastic_grid needs elastic_sd_px"),
    ]:
        with pytest.raises(ValueError, match=words):
            augment.recipe(name, **values)
    assert not RECIPES["none"].resamples
    assert all(RECIPES[n].quarter_turns for n in ("affine", "elastic", "all"))
    arrays = batch(stack(), stack(), RECIPES["none"])
    arrays["affine"] = ops.cast(arrays["affine"], "bfloat16")
    with pytest.raises(ValueError, match="affine must be float32"):
        warp(arrays, RECIPES["none"])
