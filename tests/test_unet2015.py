"""The U-Net of 2015: shapes, parameters, initialisation, overlap-tile."""

import keras
import numpy as np
import pytest
from keras import ops

from network import layers, unet
from predict import tiling

# Name, side for an input of 572 px, channels: figure 1 of arXiv 1505.04597.
GOLDEN = [
    ("down1_conv1", 570, 64), ("down1_conv2", 568, 64), ("down1_pool", 284, 64),
    ("down2_conv1", 282, 128), ("down2_conv2", 280, 128), ("down2_pool", 140, 128),
    ("down3_conv1", 138, 256), ("down3_conv2", 136, 256), ("down3_pool", 68, 256),
    ("down4_conv1", 66, 512), ("down4_conv2", 64, 512), ("down4_drop", 64, 512), ("down4_pool", 32, 512),
    ("centre_conv1", 30, 1024), ("centre_conv2", 28, 1024), ("centre_drop", 28, 1024),
    ("up4_upconv", 56, 512), ("up4_crop", 56, 512), ("up4_concatenate", 56, 1024),
    ("up4_conv1", 54, 512), ("up4_conv2", 52, 512),
    ("up3_upconv", 104, 256), ("up3_crop", 104, 256), ("up3_concatenate", 104, 512),
    ("up3_conv1", 102, 256), ("up3_conv2", 100, 256),
    ("up2_upconv", 200, 128), ("up2_crop", 200, 128), ("up2_concatenate", 200, 256),
    ("up2_conv1", 198, 128), ("up2_conv2", 196, 128),
    ("up1_upconv", 392, 64), ("up1_crop", 392, 64), ("up1_concatenate", 392, 128),
    ("up1_conv1", 390, 64), ("up1_conv2", 388, 64),
    ("head_conv", 388, 2),
]  # fmt: skip


@pytest.fixture(scope="module")
def published():
    return unet.build_2015()


def image(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def shapes(network, *size):
    """Shape of every layer's output, without computing it."""
    layers = [layer for layer in network.layers[1:] if layer.name not in ("input_size", "interior")]
    spied = keras.Model(network.input, [layer.output for layer in layers])
    specs = spied.compute_output_spec(keras.KerasTensor((1, *size, 1)))
    return {layer.name: spec.shape[1:] for layer, spec in zip(layers, specs, strict=True)}


# -- network


def test_the_published_network_has_the_parameters_of_the_papers_figure(published):
    def conv(size, incoming, outgoing):
        return (size * size * incoming + 1) * outgoing

    down = sum(conv(3, a, b) for a, b in [(1, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256)])
    down += conv(3, 256, 512) + conv(3, 512, 512) + conv(3, 512, 1024) + conv(3, 1024, 1024)
    up = sum(conv(2, 2 * n, n) + conv(3, 2 * n, n) + conv(3, n, n) for n in (512, 256, 128, 64))
    assert published.count_params() == down + up + conv(1, 64, 2) == unet.PARAMETERS_2015 == 31_030_658


def test_every_layer_of_the_published_network_has_the_shape_of_the_papers_figure(published):
    expected = {name: (side, side, channels) for name, side, channels in GOLDEN}
    assert shapes(published, 572, 572) == expected
    assert published.compute_output_shape((1, 572, 572, 1)) == (1, 388, 388)


def test_the_published_network_has_23_convolutions_all_but_the_last_and_the_up_convolutions_with_relu(published):
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


def test_weights_are_a_function_of_the_seed():
    first, again, other = (
        [np.asarray(weight) for weight in unet.build_2015(filters=2, levels=2, dropout=0.0, seed=seed).weights]
        for seed in (1, 1, 2)
    )
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert all((a != b).all() for a, b in zip(first, other, strict=True) if a.ndim > 1)


def test_each_layer_draws_weights_of_its_own():
    network = unet.build_2015(filters=2, levels=2)
    one, two = network.get_layer("up1_conv2").kernel, network.get_layer("down1_conv2").kernel
    assert one.shape == two.shape
    assert (np.asarray(one) != np.asarray(two)).all()


def test_the_two_deepest_maps_of_the_contracting_path_are_dropped_out_and_the_skip_is_one_of_them():
    network = unet.build_2015(filters=2, levels=3)
    dropped = [layer.name for layer in network.layers if isinstance(layer, layers.Dropout)]
    assert dropped == ["down3_drop", "centre_drop"]
    for reader, source in (("down3_pool", "down3_drop"), ("up3_crop", "down3_drop"), ("up3_upconv", "centre_drop")):
        assert network.get_layer(reader).input._keras_history.operation.name == source
    x = image(1, 100, 100, 1)
    assert (np.asarray(network(x)) == np.asarray(network(x))).all()
    assert (np.asarray(network(x, training=True)) != np.asarray(network(x, training=True))).any()


def test_the_centre_of_a_skip_is_kept():
    crops = {level: unet.build_2015(filters=1).get_layer(f"up{level}_crop").cropping for level in (1, 2, 3, 4)}
    assert crops == {4: ((4, 4),) * 2, 3: ((16, 16),) * 2, 2: ((40, 40),) * 2, 1: ((88, 88),) * 2}


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_padded_convolutions_keep_the_size_and_the_parameters(levels):
    padded, unpadded = (unet.build_2015(filters=2, levels=levels, padding=padding) for padding in unet.PADDINGS[::-1])
    side = 3 * 2**levels
    interior = np.asarray(padded(image(2, side, 2 * side, 1)))
    assert interior.shape == (2, side, 2 * side)
    assert ((interior >= 0) & (interior <= 1)).all()
    assert np.ptp(interior) > 0.01
    assert padded.count_params() == unpadded.count_params()


def test_channels_and_classes_are_free():
    network = unet.build_2015(filters=2, levels=1, channels=3, classes=4)
    x = image(1, 18, 20, 3)
    interior, logits = unet.with_logits(network)(x)
    assert logits.shape == (1, 2, 4, 4)
    assert network(x).shape == interior.shape == (1, 2, 4)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("network", [unet.build_2015, unet.build], ids=["2015", "2017"])
def test_the_logits_belong_to_the_probability_and_share_its_weights(network, precision):
    made = network(
        precision=precision, **({"filters": 2, "levels": 2} if network is unet.build_2015 else {"filters": (2, 4)})
    )
    both = unet.with_logits(made)
    x = image(1, 44, 48, 1)
    interior, logits = both(x)
    assert keras.backend.standardize_dtype(logits.dtype) == "float32"
    np.testing.assert_allclose(ops.softmax(logits)[..., 1], made(x), atol=1e-6)
    np.testing.assert_array_equal(interior, made(x))
    assert [id(w) for w in both.weights] == [id(w) for w in made.weights]


def test_precision_bfloat16_agrees_with_float32_and_keeps_float32_weights():
    x = image(1, 100, 100, 1)
    full, half = (unet.build_2015(filters=4, levels=3, seed=3, precision=p) for p in ("float32", "bfloat16"))
    assert {w.dtype for w in half.weights} == {"float32"}
    assert half.get_layer("up2_upconv").compute_dtype == "bfloat16"
    assert keras.backend.standardize_dtype(half(x).dtype) == "float32"
    difference = np.abs(np.asarray(half(x)) - np.asarray(full(x)))
    assert 0 < difference.max() < 0.05


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"filters": 0}, "filters must be at least 1. Received: 0"),
        ({"levels": 0}, "levels must be at least 1"),
        ({"padding": "full"}, "padding must be valid or same. Received: full"),
        ({"classes": 1}, "classes must be at least 2"),
        ({"channels": 0}, "channels must be at least 1"),
        ({"dropout": 1.0}, "dropout"),
        ({"precision": "float16"}, "precision must be"),
    ],
)
def test_wrong_arguments_are_refused_by_name(wrong, words):
    with pytest.raises(ValueError, match=words):
        unet.build_2015(**({"filters": 2} | wrong))


# -- overlap-tile


def test_unpadded_tiles_meet_exactly_and_equal_the_whole_image():
    section = image(700, 600)
    network = unet.build_2015(filters=4)
    field = unet.field_from_settings({"arch": "unet2015"})
    grid = tiling.choose(section.shape, field.radius, multiple=16, max_tile=380, shrink=field.shrink, remainder=12)
    assert (grid.count, grid.halo) == (16, 92)
    tiled = tiling.predict_section(section, predictor(network), grid)
    whole = np.pad(section, ((92, 92 + 8), (92, 92 + 12)), mode="reflect")
    whole = predictor(network)(whole[None])[0]
    assert whole.shape == (708, 612)
    assert np.ptp(whole) > 0.1
    np.testing.assert_allclose(tiled, whole[:700, :600], atol=1e-5)


def test_padded_tiles_with_the_receptive_radius_as_halo_equal_the_whole_image():
    section = image(700, 600)
    network = unet.build_2015(filters=4, padding="same")
    field = unet.field_from_settings({"arch": "unet2015", "padding": "same"})
    grid = tiling.choose(section.shape, field.radius, multiple=16, max_tile=464)
    assert grid.exact
    assert (grid.count, grid.halo) == (9, 112)
    tiled = tiling.predict_section(section, predictor(network), grid)
    whole = np.pad(section, ((112, 112 + 4), (112, 112 + 8)), mode="reflect")
    whole = predictor(network)(whole[None])[0]
    assert np.ptp(whole) > 0.1
    np.testing.assert_allclose(tiled, whole[112:812, 112:712], atol=1e-5)


def predictor(network):
    return lambda windows: np.asarray(network.predict_on_batch(windows[..., None]))


def test_batch_norm_on_request_normalises_behind_every_3_x_3_convolution():
    plain, normed = (unet.build_2015(filters=2, levels=2, batch_norm=wanted) for wanted in (False, True))
    added = {layer.name for layer in normed.layers} - {layer.name for layer in plain.layers}
    convolutions = [layer.name for layer in plain.layers if "_conv" in layer.name and "head" not in layer.name]
    assert added == {name.replace("_conv", "_bn") for name in convolutions}
    assert normed.output_shape == plain.output_shape
    widths = sum(plain.get_layer(name).filters for name in convolutions)
    assert normed.count_params() == plain.count_params() + 4 * widths
