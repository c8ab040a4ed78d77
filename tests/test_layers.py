"""Dropout, and batch norm beside Keras's own."""

import keras
import numpy as np
import pytest
from keras import ops

from network import device, layers, onednn, unet


@pytest.mark.jax
def test_dropout_drops_its_rate_keeps_the_expectation_and_differs_from_update_to_update():
    for rate in (0.1, 0.5):
        layer, x = layers.Dropout(rate, seed=1), ops.ones((4, 64, 64, 8))
        y, other = (np.asarray(layer(x, training=True)) for _ in range(2))
        assert abs((y == 0).mean() - rate) < 0.005
        assert abs(y.mean() - 1) < 0.01
        assert abs(((y == 0) == (other == 0)).mean() - (rate**2 + (1 - rate) ** 2)) < 0.01
        assert (np.asarray(layer(x)) == 1).all()
    for rate in (1 / 512, 0.001, 1.0, -0.1, float("nan")):  # that the mask cannot have
        with pytest.raises(ValueError, match="dropout must be 0, or above 1/512 and below 1"):
            layers.Dropout(rate)


@pytest.mark.jax
def test_batch_norm_equals_kerass_own_and_its_averages_take_in_what_their_momentum_leaves():
    x = np.random.default_rng(0).normal(2, 3, size=(3, 16, 24, 5)).astype("float32")
    ours, stock = layers.BatchNormDropout(), keras.layers.BatchNormalization()
    for _ in range(3):
        mine, theirs = ours(x, training=True), stock(x, training=True)
        np.testing.assert_allclose(mine, theirs, atol=2e-5)
    for name in ("moving_mean", "moving_variance"):
        np.testing.assert_allclose(getattr(ours, name), getattr(stock, name), rtol=1e-5)
    np.testing.assert_allclose(ours(x), stock(x), atol=2e-5)
    network = unet.build(filters=(2,), centre_dilations=(1,), bn_momentum=0.75)
    layer = network.get_layer("down1_bn1")
    layer(np.full((1, 4, 4, 2), 8, np.float32), training=True)
    np.testing.assert_allclose(layer.moving_mean, 2)
    layer.update = lambda: 2  # from where on its momentum is (1 + 2) / (10 + 2)
    layer(np.full((1, 4, 4, 2), 8, np.float32), training=True)
    np.testing.assert_allclose(layer.moving_mean, 2 / 4 + 8 * 3 / 4)
    assert unet.build(filters=(2,), centre_dilations=(1,)).get_layer("down1_bn1").momentum == 0.99
    padded = unet.build_2015(filters=1, levels=1, batch_norm=True, bn_momentum=0.9)
    for made in (padded, unet.build_residual(filters=(1, 1), bn_momentum=0.9)):
        assert made.get_layer("up1_bn1").momentum == 0.9


@pytest.mark.jax
@pytest.mark.parametrize(
    ("fits", "size", "padding"), [(True, (24, 16), "same"), (False, (22, 16), "same"), (False, (24, 16), "valid")]
)
def test_a_dilated_convolution_of_every_nth_pixel_is_the_dilated_convolution(fits, size, padding, monkeypatch):
    x = np.random.default_rng(0).normal(size=(2, *size, 3)).astype("float32")
    layer = layers.Conv2D(5, 3, padding=padding, dilation_rate=4)
    stock = np.asarray(layer(x))
    assert not device.computes_with_cudnn()  # on a processor
    monkeypatch.setattr(device, "computes_with_cudnn", lambda: True)
    if fits:
        monkeypatch.setattr(keras.layers.Conv2D, "convolution_op", None)  # it is not asked
    np.testing.assert_allclose(layer(x), stock, atol=1e-5)


@pytest.mark.jax
@pytest.mark.parametrize(("width", "size", "made"), [(44, 3, (32, 48)), (8, 3, (32, 16)), (2, 1, (32, 2))])
def test_channels_are_aligned_in_bfloat16_and_the_sums_are_the_same(width, size, made, monkeypatch):
    x = ops.cast(np.random.default_rng(0).normal(size=(2, 12, 16, 22)), "bfloat16")
    layer = layers.Conv2D(width, size, padding="same", dtype="mixed_bfloat16")
    stock, seen, plain = layer(x), [], keras.layers.Conv2D.convolution_op

    def convolution_op(self, inputs, kernel):
        seen.append((inputs.shape[-1], *kernel.shape[2:]))
        return plain(self, inputs, kernel)

    monkeypatch.setattr(device, "computes_with_cudnn", lambda: True)
    monkeypatch.setattr(onednn, "serves", lambda: False)  # TensorFlow on a processor
    monkeypatch.setattr(keras.layers.Conv2D, "convolution_op", convolution_op)
    mine = layer(x)
    assert mine.shape == stock.shape
    assert seen == [(made[0], *made)]
    np.testing.assert_allclose(ops.cast(mine, "float32"), ops.cast(stock, "float32"), atol=0.03)


@pytest.mark.jax
@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16"])
def test_an_up_convolution_as_a_product_of_matrices_is_the_up_convolution(precision, monkeypatch):
    x = np.random.default_rng(0).normal(size=(2, 6, 5, 4)).astype("float32")
    layer = layers.Conv2DTranspose(3, (2, 2), (2, 2), activation="relu", dtype=precision)
    overlapping = layers.Conv2DTranspose(3, (3, 3), (2, 2), padding="same")
    layer.build(x.shape), overlapping.build(x.shape)
    layer.bias.assign([0.5, -0.5, 1])
    stock = [ops.cast(one(x), "float32") for one in (layer, overlapping)]
    monkeypatch.setattr(device, "computes_with_cudnn", lambda: True)
    np.testing.assert_array_equal(overlapping(x), stock[1])
    monkeypatch.setattr(keras.layers.Conv2DTranspose, "call", None)  # it is not asked
    mine = layer(x)
    assert mine.dtype == layer.compute_dtype
    np.testing.assert_allclose(ops.cast(mine, "float32"), stock[0], atol=1e-5 if precision == "float32" else 0.03)


@pytest.mark.parametrize("found", [None, pytest.param("a GPU", marks=pytest.mark.jax)])
@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16"])
def test_the_variance_is_right_where_the_mean_is_many_standard_deviations(precision, found, monkeypatch):
    monkeypatch.setattr(device, "accelerator", lambda: found)
    x = np.random.default_rng(0).normal(100, 1, size=(2, 64, 96, 6))
    x = ops.cast(x, precision.removeprefix("mixed_"))
    exact = ops.convert_to_numpy(ops.cast(x, "float32")).astype(np.float64)
    layer = layers.BatchNormDropout(momentum=0.0, dtype=precision)
    layer(x, training=True)
    np.testing.assert_allclose(layer.moving_mean, exact.mean((0, 1, 2)), atol=1e-3)
    np.testing.assert_allclose(layer.moving_variance, exact.var((0, 1, 2)), rtol=1e-3)
