"""Losses and the metric, against values worked out by hand."""

import math

import numpy as np
import pytest

from network import losses

pytestmark = pytest.mark.jax

TRUTH = np.array([[[1.0, 1.0], [0.0, 1.0]]], np.float32)
INTERIOR = np.array([[[0.9, 0.6], [0.2, 0.5]]], np.float32)


def test_soft_dice_is_twice_the_overlap_over_the_sums_with_smoothing_1():
    assert float(losses.soft_dice(TRUTH, INTERIOR)) == pytest.approx((2 * 2.0 + 1) / (3 + 2.2 + 1))


def test_bce_is_the_mean_over_pixels_in_nats():
    expected = -(math.log(0.9) + math.log(0.6) + math.log(0.8) + math.log(0.5)) / 4
    assert float(losses.bce(TRUTH, INTERIOR)) == pytest.approx(expected, rel=1e-5)


def test_the_studys_loss_is_the_sum_of_both():
    total = float(losses.bce(TRUTH, INTERIOR)) + 1 - float(losses.soft_dice(TRUTH, INTERIOR))
    assert float(losses.bce_dice(TRUTH, INTERIOR)) == pytest.approx(total, rel=1e-6)


def test_dice_pools_the_batch():
    two = np.stack([TRUTH[0], np.zeros_like(TRUTH[0])])
    guess = np.stack([TRUTH[0], np.ones_like(TRUTH[0])])
    assert float(losses.soft_dice(two, guess)) == pytest.approx((2 * 3 + 1) / (3 + 7 + 1))


def test_an_empty_mask_predicted_empty_costs_nothing():
    empty = np.zeros((2, 4, 4), np.float32)
    assert float(losses.bce_dice(empty, empty)) == pytest.approx(0, abs=1e-6)


def test_a_sure_and_wrong_prediction_has_a_finite_loss():
    loss = float(losses.bce(np.ones((1, 2, 2), np.float32), np.zeros((1, 2, 2), np.float32)))
    assert 15 < loss < 17


def test_an_unknown_loss_is_refused_with_the_choices():
    with pytest.raises(ValueError, match=r"bce_dice, bce, dice\. Received: tversky"):
        losses.get("tversky")
