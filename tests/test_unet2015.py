"""The U-Net of 2015: shapes, parameters, initialisation, overlap-tile."""

import keras
import numpy as np
import pytest
from conftest import cases

from network import layers, unet
from predict import tiling

# Name, side for an input of 572 px, channels: figure 1 of arXiv 1505.04597.
GOLDEN = """
    down1_conv1 570 64, down1_conv2 568 64, down1_pool 284 64, down2_conv1 282 128, down2_conv2 280 128,
    down2_pool 140 128, down3_conv1 138 256, down3_conv2 136 256, down3_pool 68 256, down4_conv1 66 512,
    down4_conv2 64 512, down4_drop 64 512, down4_pool 32 512, centre_conv1 30 1024, centre_conv2 28 1024,
    centre_drop 28 1024, up4_upconv 56 512, up4_crop 56 512, up4_concatenate 56 1024, up4_conv1 54 512,
    up4_conv2 52 512, up3_upconv 104 256, up3_crop 104 256, up3_concatenate 104 512, up3_conv1 102 256,
    up3_conv2 100 256, up2_upconv 200 128, up2_crop 200 128, up2_concatenate 200 256, up2_conv1 198 128,
    up2_conv2 196 128, up1_upconv 392 64, up1_crop 392 64, up1_concatenate 392 128, up1_conv1 390 64, up1_conv2
    388 64, head_conv 388 2
"""
GOLDEN = [(name, int(a), int(b)) for name, a, b in map(str.split, GOLDEN.split(","))]


@pytest.fixture(scope="module")
def published():
    return unet.build_2015()


def image(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def shapes(network, *size):
    """Shape of every layer's output, without computing it."""
    layers = network.layers[1:-1]
    spied = keras.Model(network.input, [layer.output for layer in layers])
    specs = spied.compute_output_spec(keras.KerasTensor((1, *size, 1)))
    return {layer.name: spec.shape[1:] for layer, spec in zip(layers, specs, strict=True)}


def test_the_published_network_is_that_of_the_papers_figure_in_parameters_shapes_and_activations(published):
    def conv(size, incoming, outgoing):
        return (size * size * incoming + 1) * outgoing

    down = sum(conv(3, a, b) for a, b in [(1, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256)])
    down += conv(3, 256, 512) + conv(3, 512, 512) + conv(3, 512, 1024) + conv(3, 1024, 1024)
    up = sum(conv(2, 2 * n, n) + conv(3, 2 * n, n) + conv(3, n, n) for n in (512, 256, 128, 64))
    assert published.count_params() == down + up + conv(1, 64, 2) == 31_030_658
    expected = {name: (side, side, channels) for name, side, channels in GOLDEN}
    assert shapes(published, 572, 572) == expected
    assert published.compute_output_shape((1, 572, 572, 1)) == (1, 388, 388)
    convs = [layer for layer in published.layers if hasattr(layer, "kernel")]
    assert len(convs) == 23
    linear = {layer.name for layer in convs if layer.activation is not keras.activations.relu}
    assert linear == {"up4_upconv", "up3_upconv", "up2_upconv", "up1_upconv", "head_conv"}


def test_weights_are_gaussian_with_the_standard_deviation_of_their_incoming_connections(published):
    for name, incoming in (
        ("down2_conv2", 9 * 128),
        ("centre_conv1", 9 * 512),
        ("up4_conv1", 9 * 1024),
        ("up4_upconv", 1024),  # with stride 2, an output pixel sees one input pixel
        ("up1_conv2", 9 * 64),
    ):
        layer = published.get_layer(name)
        scaled = np.asarray(layer.kernel).ravel() / np.sqrt(2 / incoming)
        assert abs(scaled.std() - 1) < 0.01, name
        assert abs(scaled.mean()) < 0.02, name
        assert (np.abs(scaled) > 2.5).mean() == pytest.approx(0.0124, abs=0.003), name  # not truncated at two
        assert not np.asarray(layer.bias).any()


def test_weights_are_a_function_of_the_seed_and_differ_from_layer_to_layer():
    made = (unet.build_2015(filters=2, levels=2, dropout=0.0, seed=seed) for seed in (1, 1, 2))
    first, again, other = ([np.asarray(w) for w in network.weights] for network in made)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    kernels = [w for w in first if w.ndim > 1]
    for one in [w for w in other if w.ndim > 1] + kernels:
        assert not any((one == w).any() for w in kernels if w is not one and w.shape == one.shape)


def test_the_two_deepest_maps_of_the_contracting_path_are_dropped_out_and_batch_norm_stands_behind_convolutions():
    network = unet.build_2015(filters=2, levels=3)
    dropped = [layer.name for layer in network.layers if isinstance(layer, layers.Dropout)]
    assert dropped == ["down3_drop", "centre_drop"]
    for reader, source in (("down3_pool", "down3_drop"), ("up3_crop", "down3_drop"), ("up3_upconv", "centre_drop")):
        assert network.get_layer(reader).input._keras_history.operation.name == source
    x = image(1, 100, 100, 1)
    assert (np.asarray(network(x)) == np.asarray(network(x))).all()
    assert (np.asarray(network(x, training=True)) != np.asarray(network(x, training=True))).any()
    crops = {level: unet.build_2015(filters=1).get_layer(f"up{level}_crop").cropping for level in (1, 2, 3, 4)}
    assert crops == {4: ((4, 4),) * 2, 3: ((16, 16),) * 2, 2: ((40, 40),) * 2, 1: ((88, 88),) * 2}
    plain, normed = (unet.build_2015(filters=2, levels=2, batch_norm=wanted) for wanted in (False, True))
    added = {layer.name for layer in normed.layers} - {layer.name for layer in plain.layers}
    convolutions = [layer.name for layer in plain.layers if "_conv" in layer.name and "head" not in layer.name]
    assert added == {name.replace("_conv", "_bn") for name in convolutions}
    assert normed.output_shape == plain.output_shape
    assert unet.build_2015(filters=2, levels=2, padding="same").count_params() == plain.count_params()
    widths = sum(plain.get_layer(name).filters for name in convolutions)
    assert normed.count_params() == plain.count_params() + 4 * widths


@cases("padding, largest, count, halo, more", ("valid", 380, 16, 92, (8, 12)), ("same", 464, 9, 112, (4, 8)))
def test_tiles_meet_exactly_and_equal_the_whole_image(padding, largest, count, halo, more):
    """More rows and columns: what the sides of the whole image lack to a size that fits."""

    def predictor(windows):
        return np.asarray(network.predict_on_batch(windows[..., None]))

    section, network = image(700, 600), unet.build_2015(filters=4, padding=padding)
    field = unet.field_from_settings({"arch": "unet2015", "padding": padding})
    grid = tiling.choose(section.shape, field, max_tile=largest)
    assert (grid.exact, grid.count, grid.halo) == (True, count, halo)
    tiled = tiling.predict_section(section, predictor, grid)
    whole = predictor(np.pad(section, [(halo, halo + n) for n in more], mode="reflect")[None])[0]
    start = halo - field.shrink
    assert np.ptp(whole) > 0.1
    np.testing.assert_allclose(tiled, whole[start : start + 700, start : start + 600], atol=1e-5)
