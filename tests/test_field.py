"""The receptive field and the sizes that fit, read off the graph: what an impulse reaches, in any network."""

from functools import partial

import keras
import numpy as np
import pytest
from conftest import cases
from keras import layers

from network import field, unet

PADDED = {padded: {"arch": "unet2015", "padding": "same" if padded else "valid"} for padded in (False, True)}


def chain(*steps):
    """A network of layers in a row."""
    inputs = x = keras.Input((None, None, 1))
    for step in steps:
        x = step(x)
    return keras.Model(inputs, x)


def conv(size=3, **more):
    return layers.Conv2D(1, size, **more)


def back(size=2, **more):
    return layers.Conv2DTranspose(1, size, strides=2, **more)


def skipped():
    """Convolutions of other reach side by side, joined."""
    inputs = keras.Input((None, None, 1))
    near, far = (layers.DepthwiseConv2D(3, padding="same", dilation_rate=rate)(inputs) for rate in (1, 5))
    return keras.Model(inputs, layers.Concatenate()([near, layers.Maximum()([far, inputs])]))


NETWORKS = {
    "dilated": lambda: unet.build(filters=(2, 2), centre_dilations=(1, 2)),
    "deep": lambda: unet.build(filters=(2, 2, 2), dilate=False, dilate_rate=1, centre_dilations=(1, 2, 4)),
    "wide rate": lambda: unet.build(filters=(2,), dilate_rate=3, centre_dilations=(1, 3)),
    **{
        f"2015 {padding} {levels}": partial(unet.build_2015, filters=1, levels=levels, padding=padding)
        for levels in (1, 2, 3)
        for padding in ("valid", "same")
    },
    "even kernel": lambda: chain(conv(4, padding="same"), conv(3, dilation_rate=2, padding="same")),
    "strided": lambda: chain(conv(5, strides=2, padding="same"), layers.BatchNormalization(), back(padding="same")),
    "pooled": lambda: chain(layers.AveragePooling2D(3), conv(padding="same"), layers.UpSampling2D(3), layers.ReLU()),
    "transposed": lambda: chain(layers.MaxPooling2D(), back(4, padding="same"), conv(padding="same")),
    "overlapping": lambda: chain(layers.MaxPooling2D(), back(4), layers.Cropping2D(1)),
    "cropped": lambda: chain(layers.ZeroPadding2D(3), conv(), layers.Cropping2D(((1, 2), (1, 2))), conv(2)),
    "skipped": skipped,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_an_impulse_reaches_exactly_the_reported_receptive_field(name):
    """Every input row is disturbed in turn, every kernel being positive: which of them does an output row see?"""
    network = NETWORKS[name]()
    found = field.field_of(network)
    for layer in network.layers:
        if hasattr(layer, "kernel"):
            layer.kernel.assign(np.full(layer.kernel.shape, 0.3, np.float32))
    names = {layer.name for layer in network.layers}
    last = next((name for name in ("up1_conv3", "up1_conv2") if name in names), network.layers[-1].name)
    before_the_softmax = keras.Model(network.input, network.get_layer(last).output)
    (tall,) = found.valid_sizes(at_least=3 * found.size + 2 * found.shrink, count=1)
    (narrow,) = found.valid_sizes(count=1)
    x = np.zeros((2 * found.size + found.multiple, tall, narrow, 1), np.float32)
    x[np.arange(len(x)), np.arange(len(x)) + (tall - len(x)) // 2] = 1e3
    reached = np.asarray(before_the_softmax(x)).max(axis=(2, 3)) > 0
    assert reached.shape[1] == tall - 2 * found.shrink
    rows = reached.shape[1] // 2 + np.arange(found.multiple)
    seen = [np.flatnonzero(reached[:, row])[[0, -1]] + (tall - len(x)) // 2 for row in rows]
    assert max(last - first + 1 for first, last in seen) == found.size
    centres = rows + found.shrink
    assert max(max(c - first, last - c) for c, (first, last) in zip(centres, seen, strict=True)) == found.radius


def test_the_published_receptive_fields():
    assert unet.field_from_settings({"dilate": False, "dilate_rate": 1}) == field.ReceptiveField(180, 90, 8)
    assert unet.field_from_settings({}) == field.ReceptiveField(1106, 553, 8)
    assert unet.field_from_settings(PADDED[True]) == field.ReceptiveField(204, 107, 16)
    assert unet.field_from_settings(PADDED[False]) == field.ReceptiveField(204, 107, 16, shrink=92, remainder=12)
    assert field.field_of(unet.build()) == unet.field_from_settings({})


@cases(
    "network, words",
    (lambda: chain(layers.GroupNormalization(1, name="groups")), "layer groups .GroupNormalization. cannot be told"),
    (lambda: chain(layers.Softmax(1, name="rows")), "reach of the layer rows"),
    (lambda: chain(layers.Conv2D(1, (3, 1), name="tall")), "tall must treat rows and columns alike"),
    (lambda: chain(layers.MaxPooling2D()), "output must be its input"),
    (lambda: chain(layers.Cropping2D(((1, 0), (1, 0)))), "output must be its input"),
)
def test_a_network_whose_reach_cannot_be_told_is_refused_by_the_layers_name(network, words):
    with pytest.raises(ValueError, match=words):
        field.field_of(network())


def output_side(side, levels, lost):
    """Side of the output, or None where a pooling sees an odd side or nothing is left; `lost` by two convolutions."""
    for _ in range(levels):
        side -= lost
        if side < 2 or side % 2:
            return None
        side //= 2
    for _ in range(levels):
        side = 2 * (side - lost)
    return side - lost if side > lost else None


@pytest.mark.parametrize(("padding", "lost"), [("valid", 4), ("same", 0)])
@pytest.mark.parametrize("levels", [1, 3, 5])
def test_valid_sizes_are_those_whose_poolings_all_see_even_sides(levels, padding, lost):
    sides = {side: output for side in range(1, 600) if (output := output_side(side, levels, lost))}
    found = unet.field_from_settings({"arch": "unet2015", "levels": levels, "padding": padding})
    assert list(found.valid_sizes(count=len(sides))) == list(sides)
    assert all(side - 2 * found.shrink == output for side, output in sides.items())
    assert all(side % found.multiple == found.remainder for side in sides)


@cases(
    "padded, size, rule, offered",
    (False, 570, "16 plus 12 and at least 188", "556, 572, 588"),
    (False, 580, "16 plus 12 and at least 188", "572, 588, 604"),
    (False, 190, "16 plus 12 and at least 188", "188, 204, 220"),
    (False, 10, "16 plus 12 and at least 188", "188, 204, 220"),
    (True, 520, "16 and at least 16", "512, 528, 544"),
)
def test_a_size_that_does_not_fit_is_refused_with_the_nearest_that_do(padded, size, rule, offered):
    found = unet.field_from_settings(PADDED[padded])
    words = f"^--window must be a multiple of {rule}. Received: {size}; nearest: {offered}$"
    with pytest.raises(ValueError, match=words):
        found.check_size("--window", size)
    for side in found.valid_sizes(count=5):
        found.check_size("--window", side)
