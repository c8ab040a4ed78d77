"""Losses and the metric, against values worked out by hand."""

import math

import numpy as np
import pytest

from network import losses

pytestmark = pytest.mark.jax

TRUTH = np.array([[[1.0, 1.0], [0.0, 1.0]]], np.float32)
INTERIOR = np.array([[[0.9, 0.6], [0.2, 0.5]]], np.float32)


def test_loss_and_metric_are_those_worked_out_by_hand_and_finite():
    assert float(losses.soft_dice(TRUTH, INTERIOR)) == pytest.approx((2 * 2.0 + 1) / (3 + 2.2 + 1))
    two = np.stack([TRUTH[0], np.zeros_like(TRUTH[0])])
    guess = np.stack([TRUTH[0], np.ones_like(TRUTH[0])])
    assert float(losses.soft_dice(two, guess)) == pytest.approx((2 * 3 + 1) / (3 + 7 + 1))
    expected = -(math.log(0.9) + math.log(0.6) + math.log(0.8) + math.log(0.5)) / 4
    assert float(losses.bce(TRUTH, INTERIOR)) == pytest.approx(expected, rel=1e-5)
    total = expected + 1 - float(losses.soft_dice(TRUTH, INTERIOR))
    assert float(losses.bce_dice(TRUTH, INTERIOR)) == pytest.approx(total, rel=1e-5)
    empty = np.zeros((2, 4, 4), np.float32)
    assert float(losses.bce_dice(empty, empty)) == pytest.approx(0, abs=1e-6)
    assert 15 < float(losses.bce(empty + 1, empty)) < 17


@pytest.mark.parametrize("name", [*losses.LOSSES, "weighted"])
def test_what_is_not_labelled_counts_nowhere_in_a_loss(name):
    """The loss is that of the labelled pixels alone, and exactly the same whatever the network says elsewhere."""
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, (2, 6, 8)).astype(np.float32)
    labelled = np.zeros_like(truth)
    labelled[0, :, :5] = 1
    mask = np.where(labelled > 0, truth, -1).astype(np.float32)
    logits, weights = (rng.normal(size=(2, 6, 8, n)).astype(np.float32) for n in (2, 1))
    other = np.where(labelled[..., None] > 0, logits, 20 * logits[::-1]).astype(np.float32)

    def loss(logits, *where, cut=np.s_[:]):
        interior = 1 / (1 + np.exp(logits[..., 0] - logits[..., 1]))
        if name == "weighted":
            return float(losses.weighted_cross_entropy(mask[cut] > 0, logits[cut], weights[cut][..., 0], *where))
        return float(losses.LOSSES[name](mask[cut], interior[cut], *where))

    assert loss(logits, labelled) == pytest.approx(loss(logits, cut=np.s_[:1, :, :5]), rel=1e-5)
    assert loss(logits, labelled) == loss(other, labelled)
    assert math.isfinite(loss(logits, 0 * labelled))
