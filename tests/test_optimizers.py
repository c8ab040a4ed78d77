"""RMSprop as in 2017, Muon, and averages that forget their start."""

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
@pytest.mark.parametrize("shape", [(3, 3, 4, 10), (1, 1, 8, 20)])
def test_muons_steps_of_a_kernel_are_near_orthogonal_and_of_the_size_of_adams(shape):
    """Against the polar factor of the momentum, by numpy's singular values, after two updates."""
    random = np.random.default_rng(0)
    kernel = keras.Variable(np.zeros(shape, np.float32))
    optimizer = optimizers.Muon(learning_rate=1.0)
    optimizer.build([kernel])
    gradients = random.standard_normal((2, *shape)).astype(np.float32)
    rows, columns = np.prod(shape[:-1]), shape[-1]
    before, average = np.zeros(shape), 0
    for gradient in gradients:
        optimizer.apply([keras.ops.convert_to_tensor(gradient)], [kernel])
        step, before = (before - np.array(kernel)).reshape(rows, columns), np.array(kernel)
        average = 0.95 * average + gradient
        left, _, right = np.linalg.svd((gradient + 0.95 * average).reshape(rows, columns), full_matrices=False)
        along = np.diag(left.T @ step @ right.T) / (0.2 * np.sqrt(max(rows, columns)))
        np.testing.assert_allclose(along, 0.95, atol=0.35, err_msg="one speed along every singular direction")
    assert 0.1 < np.sqrt(np.mean(step**2)) < 0.3


@pytest.mark.jax
@pytest.mark.parametrize("shape", [(12,), (3, 3, 16, 2)])
def test_muon_is_adam_for_biases_and_for_the_head(shape):
    values = {}
    for kind in (optimizers.Muon, keras.optimizers.Adam):
        weights = keras.Variable(np.ones(shape, np.float32))
        optimizer = kind(0.1)
        optimizer.build([weights])
        for gradient in np.random.default_rng(0).standard_normal((3, *shape)).astype(np.float32):
            optimizer.apply([keras.ops.convert_to_tensor(gradient)], [weights])
        values[kind] = np.array(weights)
    np.testing.assert_array_equal(*values.values())


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
