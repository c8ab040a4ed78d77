"""oneDNN on a processor: values and gradients of the layers' plain arithmetic, by other kernels."""

import os

import keras
import numpy as np
import pytest
from conftest import cases, python

from network import layers, onednn, unet

TENSORFLOW = keras.backend.backend() == "tensorflow"
pytestmark = pytest.mark.skipif(not (TENSORFLOW and onednn.serves()), reason="TensorFlow computes without oneDNN here")
POLICIES = {"float32": ("float32", 2e-5), "mixed_bfloat16": ("bfloat16", 0.1)}  # dtype, and tolerance
policies = pytest.mark.parametrize("policy", POLICIES)


def random(*shape, policy="float32", mean=0.0):
    numbers = np.random.default_rng(sum(shape)).normal(mean, 1, size=shape)
    return keras.ops.cast(numbers, POLICIES[policy][0])


def value_and_gradients(function, *tensors):
    """The gradients are by the tensors, of the value weighted at random."""
    import tensorflow as tf

    with tf.GradientTape() as tape:
        tape.watch(tensors)
        y = function(*tensors)
        loss = tf.reduce_sum(tf.cast(y, tf.float32) * random(*y.shape))
    return [y, *tape.gradient(loss, tensors)]


def assert_both_ways_agree(monkeypatch, function, *tensors, policy="float32"):
    """Values and gradients; returns the kinds of operations that are in one of the graphs only."""
    import tensorflow as tf

    found, kinds = [], []
    for way in (True, False):
        monkeypatch.setattr(onednn, "serves", lambda way=way: way)
        traced = tf.function(lambda *tensors: value_and_gradients(function, *tensors)).get_concrete_function(*tensors)
        found.append([np.asarray(keras.ops.cast(each, "float32")) for each in traced(*tensors)])
        kinds.append({operation.type for operation in traced.graph.get_operations()})
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, atol=POLICIES[policy][1] * max(1, np.abs(other).max()))
    return kinds[0] ^ kinds[1]


@policies
def test_a_convolution_of_what_was_enlarged_is_a_transposed_one_of_what_was_small(monkeypatch, policy):
    def convolution(channels):
        layer = layers.Conv2D(6, 3, padding="same", dtype=policy)
        layer.build((None, None, None, channels))
        return layer

    enlarged, alone, of_two = layers.Upsample(dtype=policy), convolution(5), convolution(8)
    joined = layers.Concatenate(dtype=policy)
    x, skip = random(2, 6, 4, 5, policy=policy), random(2, 12, 8, 3, policy=policy)
    for function, given in (
        (lambda x: alone(enlarged(x)), (x,)),
        (lambda x, skip: of_two(joined([skip, enlarged(x)])), (x, skip)),
        (lambda x, skip: of_two(joined([enlarged(x), skip])), (x, skip)),
    ):
        assert "Pad" in assert_both_ways_agree(monkeypatch, function, *given, policy=policy)  # of the kernel
    assert not assert_both_ways_agree(monkeypatch, lambda x: layers.Upsample(dtype=policy)(x), x, policy=policy)


@policies
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_a_dilated_convolution_is_kerass_and_in_bfloat16_by_its_way(monkeypatch, policy, padding):
    layer = layers.Conv2D(6, 3, padding=padding, dilation_rate=3, dtype=policy)
    x = random(2, 9, 12, 4, policy=policy)
    layer.build(x.shape)
    kinds = assert_both_ways_agree(monkeypatch, layer, x, policy=policy)
    assert ("SpaceToBatchND" in kinds) == bool(kinds) == (policy == "float32")


@policies
def test_what_is_dropped_out_is_the_same_and_so_is_its_gradient(monkeypatch, policy):
    layer, key = layers.Dropout(0.3, dtype=policy), keras.ops.convert_to_tensor(np.array([1, 2], np.uint32))
    monkeypatch.setattr(layer.seed_generator, "next", lambda: key)
    x = random(2, 8, 8, 6, policy=policy)
    kinds = assert_both_ways_agree(monkeypatch, lambda x: layer(x, training=True), x, policy=policy)
    assert {"BitwiseXor", "Range"} <= kinds  # in a function of their own


@policies
@pytest.mark.parametrize("channels", [6, 16, 22, 66])
def test_batch_norm_of_any_number_of_channels_is_the_generic_one(monkeypatch, policy, channels):
    def generic(x, gamma, beta):
        moments = layers._moments(x)
        return layers._normalise(x, gamma, beta, *moments), *moments

    def by_the_batch(x, gamma, beta):
        return (onednn.batch_norm if onednn.serves() else generic)(x, gamma, beta)[0]

    x, gamma, beta = random(2, 8, 16, channels, policy=policy, mean=1.0), random(channels), random(channels) + 1
    assert "FusedBatchNormV3" in assert_both_ways_agree(monkeypatch, by_the_batch, x, gamma, beta, policy=policy)
    exact = np.asarray(keras.ops.cast(x, "float64"))
    moments = np.array(onednn.batch_norm(x, gamma, beta)[1:])
    np.testing.assert_allclose(moments, [exact.mean((0, 1, 2)), exact.var((0, 1, 2))], rtol=1e-4, atol=1e-5)


@cases("shape, expected", ((2, 8, 4, 22), 8), ((2, 8, 3, 48), 1), ((2, 2, 2, 22), None), ((2, None, 8, 22), None))
def test_neighbours_are_taken_for_one_pixel_only_where_they_fill_the_rows(shape, expected):
    assert onednn.neighbours(keras.KerasTensor(shape)) == expected


@pytest.mark.parametrize("build", [unet.build, unet.build_residual])
def test_what_is_small_passes_through_a_network_of_keras(monkeypatch, build):
    assert "Pad" in assert_both_ways_agree(monkeypatch, build(filters=(4, 6, 10)), random(2, 32, 48, 1))


def test_tensorflow_without_onednn_computes_the_plain_arithmetic():
    program = """
import numpy as np
from network import losses, onednn, unet
network = unet.build(filters=(2, 3))
network.compile("sgd", loss=losses.bce_dice)
x = np.random.default_rng(0).normal(size=(1, 16, 16, 1))
assert np.isfinite(network.train_on_batch(x, x[..., 0] > 0)) and np.isfinite(network.predict_on_batch(x)).all()
print(onednn.serves())
"""
    done = python("-c", program, env=os.environ | {"TF_ENABLE_ONEDNN_OPTS": "0"})
    assert done.stdout.split()[-1] == "False"
