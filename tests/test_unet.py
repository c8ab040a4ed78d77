"""The networks of 2017: shapes, parameters, gradients, dropout, receptive field."""

import keras
import numpy as np
import pytest
from conftest import positive
from keras import ops

from network import unet

VARIANTS = [(0, 1, 1), (1, 2, 1), (0, 1, 0), (1, 2, 0)]
TINY = {"filters": (4, 6, 8), "centre_dilations": (1, 2, 4)}
TENSORFLOW = keras.backend.backend() == "tensorflow"

# Name, height relative to the input, channels: spec of the study, layer by layer.
GOLDEN = [
    ("down1_conv1", 1, 44), ("down1_bn1", 1, 44), ("down1_conv2", 1, 44), ("down1_bn2", 1, 44),
    ("down1_pool", 2, 44), ("down1_drop", 2, 44),
    ("down2_conv1", 2, 88), ("down2_bn1", 2, 88), ("down2_conv2", 2, 88), ("down2_bn2", 2, 88),
    ("down2_pool", 4, 88), ("down2_drop", 4, 88),
    ("down3_conv1", 4, 176), ("down3_bn1", 4, 176), ("down3_conv2", 4, 176), ("down3_bn2", 4, 176),
    ("down3_pool", 8, 176), ("down3_drop", 8, 176),
    ("centre_conv1", 8, 176), ("centre_bn1", 8, 176), ("centre_conv2", 8, 176), ("centre_bn2", 8, 176),
    ("centre_conv3", 8, 176), ("centre_bn3", 8, 176), ("centre_conv4", 8, 176), ("centre_bn4", 8, 176),
    ("centre_conv5", 8, 176), ("centre_bn5", 8, 176), ("centre_conv6", 8, 176), ("centre_sum", 8, 176),
    ("up3_upsample", 4, 176), ("up3_conv1", 4, 88), ("up3_concatenate", 4, 264), ("up3_bn1", 4, 264),
    ("up3_conv2", 4, 88), ("up3_bn2", 4, 88), ("up3_conv3", 4, 88),
    ("up2_upsample", 2, 88), ("up2_conv1", 2, 44), ("up2_concatenate", 2, 132), ("up2_bn1", 2, 132),
    ("up2_conv2", 2, 44), ("up2_bn2", 2, 44), ("up2_conv3", 2, 44),
    ("up1_upsample", 1, 44), ("up1_conv1", 1, 22), ("up1_concatenate", 1, 66), ("up1_bn1", 1, 66),
    ("up1_conv2", 1, 22), ("up1_bn2", 1, 22), ("up1_conv3", 1, 22),
    ("head_bn", 1, 22), ("head_conv", 1, 2),
]  # fmt: skip


@pytest.mark.parametrize(("dilate", "rate", "addition"), VARIANTS)
def test_every_published_variant_has_the_published_parameters(dilate, rate, addition):
    network = unet.build(dilate=dilate, dilate_rate=rate, addition=addition)
    assert network.count_params() == unet.PARAMETERS_2017 == 2_772_816


def test_the_3x3_convolutions_start_he_normal_and_the_head_glorot_uniform():
    network = unet.build()
    for layer in network.layers:
        if hasattr(layer, "kernel"):
            kind = "GlorotUniform" if layer.name == "head_conv" else "HeNormal"
            assert type(layer.kernel_initializer).__name__ == kind
    limit = np.sqrt(6 / (22 + 2))
    assert np.abs(network.get_layer("head_conv").kernel).max() == pytest.approx(limit, rel=0.2)


@pytest.mark.jax
def test_every_layer_has_the_shape_of_the_study():
    network = unet.build(dilate=True, dilate_rate=2, addition=True)
    layers = network.layers[1:-1]
    outputs = keras.Model(network.input, [layer.output for layer in layers])(np.zeros((1, 32, 64, 1), np.float32))
    found = []
    for layer, (_, rows, columns, channels) in zip(layers, [y.shape for y in outputs], strict=True):
        assert columns == 2 * rows
        found.append((layer.name, 32 // rows, channels))
    assert sorted(found) == sorted(GOLDEN)


def test_the_flags_dilate_what_the_study_dilated():
    def dilations(**flags):
        return {c.name: c.dilation_rate[0] for c in unet.build(**flags).layers if hasattr(c, "dilation_rate")}

    dilated = dilations(dilate=1, dilate_rate=2)
    assert [dilated[f"centre_conv{i}"] for i in range(1, 7)] == [1, 2, 4, 8, 16, 32]
    assert [dilated[f"down{k}_conv{i}"] for k in (1, 2, 3) for i in (1, 2)] == [1, 2] * 3
    assert {dilated[name] for name in dilated if name.startswith(("up", "head"))} == {1}
    assert set(dilations(dilate=0, dilate_rate=1).values()) == {1}


@pytest.mark.jax
def test_addition_sums_the_convolutions_before_their_batch_norms():
    summed = unet.build(**TINY, addition=True)
    feeding = summed.get_layer("centre_sum")._inbound_nodes[0].input_tensors
    assert [t._keras_history.operation.name for t in feeding] == ["centre_conv1", "centre_conv2", "centre_conv3"]
    assert "centre_sum" not in [layer.name for layer in unet.build(**TINY, addition=False).layers]


@pytest.mark.parametrize("shape", [(8, 8), (16, 40), (72, 24)])
def test_any_multiple_of_8_goes_in_and_a_probability_comes_out(shape):
    interior = np.asarray(unet.build(**TINY)(np.zeros((2, *shape, 1), np.float32)))
    assert interior.shape == (2, *shape)
    assert interior.dtype == np.float32
    assert ((interior > 0) & (interior < 1)).all()


@pytest.mark.jax
def test_precision_bfloat16_agrees_with_float32_and_keeps_float32_weights():
    x = np.random.default_rng(0).normal(size=(1, 32, 32, 1)).astype("float32")
    full, half = unet.build(**TINY, seed=3), unet.build(**TINY, seed=3, precision="bfloat16")
    assert {w.dtype for w in half.weights} == {"float32"}
    assert half(x).dtype == full(x).dtype
    difference = np.abs(np.asarray(half(x)) - np.asarray(full(x)))
    assert 0 < difference.max() < 0.05


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"filters": ()}, "filters"),
        ({"dilate_rate": 0}, "dilate_rate must be at least 1"),
        ({"classes": 1}, "classes must be at least 2"),
        ({"dropout": 1.0}, "dropout"),
        ({"precision": "float16"}, "precision must be"),
        ({"centre_dilations": (0,)}, "centre_dilations"),
    ],
)
def test_wrong_arguments_are_refused_by_name(wrong, words):
    with pytest.raises(ValueError, match=words):
        unet.build(**wrong)


# -- dropout and batch norm


def test_random_bytes_are_uniform_and_independent_of_their_neighbours():
    x = np.asarray(unet.random_bytes((64, 64, 64), ops.array([5, 9], "uint32"))).astype(int)
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
        return np.asarray(unet.random_bytes((40, 50), ops.array(key, "uint32"))).astype(float).ravel()

    assert (draw(1, 2) == draw(1, 2)).all()
    for other in ((1, 3), (2, 2), (0, 1)):
        assert abs(np.corrcoef(draw(1, 2), draw(*other))[0, 1]) < 0.1


@pytest.mark.jax
def test_random_bytes_are_the_same_on_every_backend():
    x = np.asarray(unet.random_bytes((2, 5), ops.array([7, 1], "uint32")))
    assert x.tolist() == BYTES_7_1


BYTES_7_1 = [[96, 93, 181, 209, 163], [57, 198, 132, 103, 139]]


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5])
def test_dropout_drops_its_rate_and_keeps_the_expectation(rate):
    layer = unet.Dropout(rate, seed=1)
    y = np.asarray(layer(ops.ones((4, 64, 64, 8)), training=True))
    assert abs((y == 0).mean() - rate) < 0.005
    assert abs(y.mean() - 1) < 0.01
    assert (np.asarray(layer(ops.ones((1, 4, 4, 2)))) == 1).all()


@pytest.mark.jax
def test_dropout_masks_differ_from_update_to_update():
    layer = unet.Dropout(0.5, seed=1)
    x = ops.ones((1, 32, 32, 4))
    first, second = (np.asarray(layer(x, training=True)) > 0 for _ in range(2))
    assert 0.4 < (first == second).mean() < 0.6


@pytest.mark.jax
def test_batch_norm_equals_kerass_own_in_training_and_inference():
    x = np.random.default_rng(0).normal(2, 3, size=(3, 16, 24, 5)).astype("float32")
    ours, stock = unet.BatchNormDropout(), keras.layers.BatchNormalization()
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
            mean, variance = unet._moments(x)
            if stop:
                mean, variance = tf.stop_gradient(mean), tf.stop_gradient(variance)
            y = normalise(x, gamma, beta, mean, variance, mask, 256 / unet.kept_levels(rate))
            loss = tf.reduce_sum(weights * y)
        return tape.gradient(loss, (x, gamma, beta))

    for mine, automatic in zip(
        gradients(unet._normalise_by_hand, True), gradients(unet._normalise, False), strict=True
    ):
        np.testing.assert_allclose(mine, automatic, atol=3e-5, rtol=1e-4)


# -- receptive field


@pytest.mark.parametrize(
    "settings",
    [
        {"filters": (2, 2), "dilate": True, "dilate_rate": 2, "centre_dilations": (1, 2)},
        {"filters": (2, 2, 2), "dilate": False, "dilate_rate": 1, "centre_dilations": (1, 2, 4)},
        {"filters": (2,), "dilate": True, "dilate_rate": 3, "centre_dilations": (1, 3)},
    ],
)
def test_an_impulse_reaches_exactly_the_reported_receptive_field(settings):
    """Every input row is disturbed in turn; the outputs that change are those whose field holds the row."""
    field = unet.receptive_field(**settings)
    size = -(-2 * field.size // 8) * 8
    network = positive(unet.build(**settings, dropout=0.0), "up1_conv3")
    multiple = field.multiple
    rows = [size // 2 // multiple * multiple + i for i in range(multiple)]
    x = np.zeros((len(rows) + 1, size, multiple, 1), np.float32)
    for i, row in enumerate(rows):
        x[i, row] = 1e3
    y = np.asarray(network(x), np.float64).max(axis=(2, 3))
    shape = [settings[k] for k in ("filters", "dilate", "dilate_rate", "centre_dilations")]
    intervals = [unet.input_interval(p, *shape) for p in range(size)]
    for i, row in enumerate(rows):
        sees = np.array([low <= row <= high for low, high in intervals])
        np.testing.assert_array_equal(y[i] > y[-1] * (1 + 1e-6), sees)
    widths = [high - low + 1 for low, high in intervals]
    assert max(widths) == field.size


def test_dilation_widens_the_receptive_field_sixfold():
    standard = unet.receptive_field(dilate=False, dilate_rate=1)
    dilated = unet.receptive_field(dilate=True, dilate_rate=2)
    assert (standard.size, standard.radius, standard.multiple) == (180, 90, 8)
    assert (dilated.size, dilated.radius) == (1106, 553)
