"""The weighted loss of 2015: the map against a brute-force computation, the loss against values worked out by hand."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from keras import ops

from network import losses

LABELS = hnp.arrays(
    np.uint16, hnp.array_shapes(min_dims=2, max_dims=2, max_side=20), elements=st.sampled_from([0] * 5 + [1, 2, 3, 900])
)


def brute_force(labels, w0, sigma):
    """The border term, float64: every background pixel against every pixel of every instance."""
    term = np.zeros(labels.shape)
    cells = [np.argwhere(labels == number) for number in np.unique(labels) if number]
    if len(cells) < 2:
        return term
    for pixel in np.argwhere(labels == 0):
        d1, d2 = sorted(np.sqrt(((cell - pixel) ** 2).sum(axis=1)).min() for cell in cells)[:2]
        term[tuple(pixel)] = w0 * math.exp(-((d1 + d2) ** 2) / (2 * sigma**2))
    return term


@given(labels=LABELS, w0=st.floats(0, 50), sigma=st.floats(0.3, 9))
@settings(max_examples=300)
def test_the_border_term_equals_brute_force(labels, w0, sigma):
    found = losses.border_weights(labels, w0=w0, sigma=sigma)
    expected = 1 + brute_force(labels, w0, sigma)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=2e-7, atol=losses.NEGLIGIBLE * w0)
    kept = expected - 1 > losses.NEGLIGIBLE * w0
    np.testing.assert_allclose(found[kept], expected[kept], rtol=2e-7)  # the rounding of float32: not left out


@pytest.mark.parametrize("sigma", [0.7, 2.0, 5.0])
def test_only_what_is_negligible_is_left_out_however_far_the_instances(sigma):
    labels = np.zeros((3, 90), int)
    for gap in range(1, 80):
        labels[:] = 0
        labels[1, 0], labels[1, gap + 1] = 1, 2
        found = losses.border_weights(labels, w0=1e6, sigma=sigma)
        assert np.abs(found - 1 - brute_force(labels, 1e6, sigma)).max() < 1.1
    assert losses.border_weights(labels, sigma=sigma).max() == 1


def balanced(labels, **options):
    balance = losses.class_weights(np.count_nonzero(labels), labels.size)
    return losses.border_weights(labels, balance=balance, **options)


def test_the_papers_constants_are_the_defaults_and_the_map_turns_with_the_mask():
    labels = np.array([[1, 1, 0, 2], [1, 1, 0, 2]])
    weights = balanced(labels)
    np.testing.assert_allclose(weights[labels > 0], 8 / (2 * 6), rtol=1e-6)
    np.testing.assert_allclose(weights[labels == 0], 8 / (2 * 2) + 10 * math.exp(-4 / 50), rtol=1e-6)
    labels = np.array([[1, 0, 0, 0, 2]])
    expected = [1, 1 + 10 * math.exp(-16 / 50), 1 + 10 * math.exp(-16 / 50), 1 + 10 * math.exp(-16 / 50), 1]
    np.testing.assert_allclose(losses.border_weights(labels)[0], expected, rtol=1e-6)
    labels = np.random.default_rng(0).integers(0, 9, (30, 40)) * (np.random.default_rng(1).random((30, 40)) < 0.05)
    other = np.array([0, 2**40, 900, 4, 3, 77, 8, 1, 2])[labels]
    turned = losses.border_weights(np.rot90(other))
    np.testing.assert_allclose(turned, np.rot90(losses.border_weights(labels)), rtol=1e-6)


@given(labels=LABELS)
def test_both_classes_weigh_the_same_without_borders(labels):
    weights = balanced(labels, w0=0).astype(float)
    assert weights.mean() == pytest.approx(1)
    if 0 < (labels > 0).mean() < 1:
        assert weights[labels > 0].sum() == pytest.approx(weights[labels == 0].sum())


@pytest.mark.parametrize(
    "labels",
    [np.zeros((5, 7), np.uint8), np.ones((5, 7), np.uint8), np.eye(1, dtype=np.uint16), np.zeros((1, 1), int)],
    ids=["empty", "one cell and no background", "one pixel that is a cell", "one pixel of background"],
)
def test_masks_of_one_class_weigh_1_everywhere(labels):
    np.testing.assert_array_equal(balanced(labels), np.ones(labels.shape, np.float32))


@given(labels=LABELS)
def test_an_instances_pixel_is_taken_exactly_where_another_instance_is_its_neighbour(labels):
    apart = losses.separate(labels)
    assert apart.dtype == labels.dtype
    for (row, column), label in np.ndenumerate(labels):
        near = labels[max(0, row - 1) : row + 2, max(0, column - 1) : column + 2]
        touched = ((near != 0) & (near != label)).any()
        assert apart[row, column] == (0 if touched else label)


def test_the_border_between_touching_cells_is_background_and_bright_and_a_thin_instance_goes_without_harm():
    labels = np.repeat([[1, 2]], 10, axis=0).repeat(10, axis=1)
    apart = losses.separate(labels)
    weights = losses.border_weights(apart)
    np.testing.assert_array_equal(apart[5], [1] * 9 + [0, 0] + [2] * 9)
    np.testing.assert_allclose(weights[:, 9:11], 1 + 10 * math.exp(-9 / 50), rtol=1e-6)
    np.testing.assert_array_equal(weights[apart > 0], 1)
    apart = losses.separate(np.array([[1, 1, 2, 3, 3]]))
    np.testing.assert_array_equal(apart, [[1, 0, 0, 0, 3]])
    np.testing.assert_allclose(losses.border_weights(apart)[0, 2], 1 + 10 * math.exp(-16 / 50))


def test_real_cells_that_nearly_touch_are_bright_between(hela):
    import tifffile

    labels = tifffile.imread(hela / "01_ST" / "SEG" / "man_seg000.tif")
    apart = losses.separate(labels)
    weights = balanced(apart)
    assert 8 < weights.max() < 12
    assert 0.001 < (weights > 5).mean() < 0.02
    assert not apart[weights > 5].any()


TRUTH = np.array([[[1, 0]]], np.float32)
LOGITS = np.array([[[[0.0, 2.0], [1.0, -1.0]]]], np.float32)
WEIGHTS = np.array([[[3.0, 0.5]]], np.float32)


@pytest.mark.jax
def test_the_loss_is_the_exact_mean_of_weight_times_cross_entropy_summed_in_float32():
    expected = (3.0 * math.log(1 + math.exp(-2)) + 0.5 * math.log(1 + math.exp(-2))) / 2
    assert float(losses.weighted_cross_entropy(TRUTH, LOGITS, WEIGHTS)) == pytest.approx(expected, rel=1e-6)
    other = (3.0 * math.log(1 + math.exp(2)) + 0.5 * math.log(1 + math.exp(-2))) / 2
    assert float(losses.weighted_cross_entropy(TRUTH * 0, LOGITS, WEIGHTS)) == pytest.approx(other, rel=1e-6)
    rng = np.random.default_rng(0)
    logits, truth = rng.normal(size=(2, 5, 6, 2)).astype(np.float32), rng.integers(0, 2, (2, 5, 6)).astype(np.float32)
    found = losses.weighted_cross_entropy(truth, logits, np.ones_like(truth))
    assert float(found) == pytest.approx(float(losses.bce(truth, ops.softmax(logits)[..., 1])), rel=1e-5)
    logits = np.array([[[[500.0, 0.0]]]], np.float32)
    one = np.ones((1, 1, 1), np.float32)
    assert float(losses.weighted_cross_entropy(one, logits, one)) == pytest.approx(500)
    assert float(losses.weighted_cross_entropy(one * 0, logits, one)) == pytest.approx(0, abs=1e-6)
    logits = ops.cast(np.tile(LOGITS[:, :, :1], (1, 64, 64, 1)), "bfloat16")
    one = np.ones((1, 64, 64), np.float32)
    found = float(losses.weighted_cross_entropy(one, logits, one))
    assert found == pytest.approx(math.log(1 + math.exp(-2)), rel=1e-5)
    wild = LOGITS.copy()
    wild[0, 0, 1] = [-80.0, 90.0]
    weights = WEIGHTS * [1, 0]
    found = [float(losses.weighted_cross_entropy(TRUTH, logits, weights)) for logits in (LOGITS, wild)]
    assert found[0] == found[1]
