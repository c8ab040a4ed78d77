"""Dropout's random bits, and batch norm beside Keras's own."""

import keras
import numpy as np
import pytest
from keras import ops

from network import layers

TENSORFLOW = keras.backend.backend() == "tensorflow"


def test_random_bytes_are_uniform_and_independent_of_their_neighbours():
    x = np.asarray(layers.random_bytes((64, 64, 64), ops.array([5, 9], "uint32"))).astype(int)
    counts = np.bincount(x.ravel(), minlength=256)
    assert x.size * 1.0 == counts.sum()
    chi_squared = ((counts - x.size / 256) ** 2 / (x.size / 256)).sum()
    assert 170 < chi_squared < 360  # 255 degrees of freedom, six standard deviations either way
    for axis in range(3):
        assert abs(np.corrcoef(x[:-1].ravel() if axis == 0 else np.moveaxis(x, axis, 0)[:-1].ravel(),
                               np.moveaxis(x, axis, 0)[1:].ravel())[0, 1]) < 0.012  # fmt: skip


@pytest.mark.jax
def test_random_bytes_are_a_function_of_their_key():
    def draw(*key):
        return np.asarray(layers.random_bytes((40, 50), ops.array(key, "uint32"))).astype(float).ravel()

    assert (draw(1, 2) == draw(1, 2)).all()
    for other in ((1, 3), (2, 2), (0, 1)):
        assert abs(np.corrcoef(draw(1, 2), draw(*other))[0, 1]) < 0.1


@pytest.mark.jax
def test_random_bytes_are_the_same_on_every_backend():
    x = np.asarray(layers.random_bytes((2, 5), ops.array([7, 1], "uint32")))
    assert x.tolist() == BYTES_7_1


BYTES_7_1 = [[96, 93, 181, 209, 163], [57, 198, 132, 103, 139]]


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5])
def test_dropout_drops_its_rate_and_keeps_the_expectation(rate):
    layer = layers.Dropout(rate, seed=1)
    y = np.asarray(layer(ops.ones((4, 64, 64, 8)), training=True))
    assert abs((y == 0).mean() - rate) < 0.005
    assert abs(y.mean() - 1) < 0.01
    assert (np.asarray(layer(ops.ones((1, 4, 4, 2)))) == 1).all()


@pytest.mark.jax
def test_dropout_masks_differ_from_update_to_update():
    layer = layers.Dropout(0.5, seed=1)
    x = ops.ones((1, 32, 32, 4))
    first, second = (np.asarray(layer(x, training=True)) > 0 for _ in range(2))
    assert 0.4 < (first == second).mean() < 0.6


@pytest.mark.jax
def test_batch_norm_equals_kerass_own_in_training_and_inference():
    x = np.random.default_rng(0).normal(2, 3, size=(3, 16, 24, 5)).astype("float32")
    ours, stock = layers.BatchNormDropout(), keras.layers.BatchNormalization()
    for _ in range(3):
        mine, theirs = ours(x, training=True), stock(x, training=True)
        np.testing.assert_allclose(mine, theirs, atol=2e-5)
    for name in ("moving_mean", "moving_variance"):
        np.testing.assert_allclose(getattr(ours, name), getattr(stock, name), rtol=1e-5)
    np.testing.assert_allclose(ours(x), stock(x), atol=2e-5)


@pytest.mark.skipif(not TENSORFLOW, reason="the gradient is written by hand for TensorFlow only")
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_the_written_gradient_equals_automatic_differentiation(rate):
    import tensorflow as tf

    rng = np.random.default_rng(1)
    x = tf.constant(rng.normal(1, 2, size=(2, 8, 12, 6)), tf.float32)
    gamma, beta = (tf.constant(rng.normal(size=6), tf.float32) for _ in range(2))
    mask = tf.constant(rng.random(x.shape) > rate, tf.float32) if rate else None
    weights = tf.constant(rng.normal(size=x.shape), tf.float32)

    def gradients(normalise, stop):
        with tf.GradientTape() as tape:
            tape.watch((x, gamma, beta))
            mean, variance = layers._moments(x)
            if stop:
                mean, variance = tf.stop_gradient(mean), tf.stop_gradient(variance)
            y = normalise(x, gamma, beta, mean, variance, mask, 256 / layers.kept_levels(rate))
            loss = tf.reduce_sum(weights * y)
        return tape.gradient(loss, (x, gamma, beta))

    for mine, automatic in zip(
        gradients(layers._normalise_by_hand, True), gradients(layers._normalise, False), strict=True
    ):
        np.testing.assert_allclose(mine, automatic, atol=3e-5, rtol=1e-4)
