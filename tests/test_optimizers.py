"""RMSprop as in 2017, and averages that forget their start."""

import keras
import numpy as np
import pytest

from network import optimizers


@pytest.mark.jax
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_rmsprop_divides_by_the_root_plus_epsilon(momentum):
    """Against the formula in numpy, with gradients as small as epsilon matters for."""
    gradients = np.float32([[1e-5, -1e-4, 1e-2], [3e-5, 2e-4, -1e-2], [-1e-6, 1e-3, 2e-2]])
    weights = keras.Variable(np.zeros(3, np.float32))
    optimizer = optimizers.RMSprop(learning_rate=0.01, momentum=momentum)
    optimizer.build([weights])
    expected, v, m = np.zeros(3), np.zeros(3), np.zeros(3)
    for g in gradients.astype(np.float64):
        optimizer.apply([keras.ops.convert_to_tensor(np.float32(g))], [weights])
        v = 0.9 * v + 0.1 * g**2
        m = momentum * m + 0.01 * g / (np.sqrt(v) + 1e-7)
        expected -= m
    np.testing.assert_allclose(np.array(weights), expected, rtol=1e-4)
    assert abs(expected[0]) > 0.02, "Keras 3's own would hardly have moved this one"


@pytest.mark.jax
def test_a_warmed_up_average_of_the_weights_soon_forgets_its_start():
    weight = keras.Variable(np.float32([8]))
    optimizer = type("sgd", (optimizers.Warm, keras.optimizers.SGD), {})(1.0, use_ema=True, ema_momentum=0.22)
    optimizer.build([weight])
    expected = 8
    for momentum, value in ((0, 7), (2 / 11, 6), (0.22, 5), (0.22, 4)):
        optimizer.apply([keras.ops.ones(1)], [weight])
        expected = momentum * expected + (1 - momentum) * value
    np.testing.assert_allclose(optimizer._model_variables_moving_average[0], expected, rtol=1e-6)
