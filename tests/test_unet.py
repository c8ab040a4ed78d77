"""The networks of 2017 and the residual one: shapes, initialisation; of all: precision, logits, records."""

import keras
import numpy as np
import pytest
from conftest import ROOT, cases

import data
import dilatedUnet
from network import outline, unet
from predict import prediction
from train.run import network_settings

TINY = {"filters": (4, 6, 8), "centre_dilations": (1, 2, 4)}
TINY_2015 = {"arch": "unet2015", "filters": 4, "levels": 3, "padding": "same"}
RESIDUAL = {"arch": "resunet", "filters": (2, 4, 6, 8)}
WIDER = {"arch": "resunet", "filters": (8, 16)}  # a few random filters in many layers make much of rounding

# Name, height relative to the input, channels: spec of the study, layer by layer.
GOLDEN = """
    down1_conv1 1 44, down1_bn1 1 44, down1_conv2 1 44, down1_bn2 1 44, down1_pool 2 44, down1_drop 2 44,
    down2_conv1 2 88, down2_bn1 2 88, down2_conv2 2 88, down2_bn2 2 88, down2_pool 4 88, down2_drop 4 88,
    down3_conv1 4 176, down3_bn1 4 176, down3_conv2 4 176, down3_bn2 4 176, down3_pool 8 176, down3_drop 8 176,
    centre_conv1 8 176, centre_bn1 8 176, centre_conv2 8 176, centre_bn2 8 176, centre_conv3 8 176, centre_bn3 8
    176, centre_conv4 8 176, centre_bn4 8 176, centre_conv5 8 176, centre_bn5 8 176, centre_conv6 8 176,
    centre_sum 8 176, up3_upsample 4 176, up3_conv1 4 88, up3_concatenate 4 264, up3_bn1 4 264, up3_conv2 4 88,
    up3_bn2 4 88, up3_conv3 4 88, up2_upsample 2 88, up2_conv1 2 44, up2_concatenate 2 132, up2_bn1 2 132,
    up2_conv2 2 44, up2_bn2 2 44, up2_conv3 2 44, up1_upsample 1 44, up1_conv1 1 22, up1_concatenate 1 66,
    up1_bn1 1 66, up1_conv2 1 22, up1_bn2 1 22, up1_conv3 1 22, head_bn 1 22, head_conv 1 2
"""
GOLDEN = [(name, int(a), int(b)) for name, a, b in map(str.split, GOLDEN.split(","))]


def test_the_published_variants_have_the_published_parameters_he_normal_but_for_the_glorot_uniform_head():
    for variant in ({"dilate": 0, "dilate_rate": 1, "addition": 0}, {"dilate": 1, "dilate_rate": 2, "addition": 1}):
        network = unet.build(**variant)
        assert network.count_params() == 2_772_816
    for layer in network.layers:
        if hasattr(layer, "kernel"):
            kind = "GlorotUniform" if layer.name == "head_conv" else "HeNormal"
            assert type(layer.kernel_initializer).__name__ == kind
    limit = np.sqrt(6 / (22 + 2))
    assert np.abs(network.get_layer("head_conv").kernel).max() == pytest.approx(limit, rel=0.2)


def test_the_layers_of_every_seed_have_seeds_of_their_own_that_every_backend_takes():
    for seed in (3, 20_240_115, 2**31 - 1):
        found = [*unet._Layers(outline, "float32", 0.0, seed, 0.99).seeds]
        assert len(set(found)) == 1000
        assert min(found) >= 0
        assert max(found) < 2**31
        assert found[0] == seed * 1000 % 2**31


def test_every_layer_has_the_shape_of_the_study_and_the_flags_dilate_and_add_what_it_did():
    network = unet.build(dilate=True, dilate_rate=2, addition=True)
    layers = network.layers[1:-1]
    model = keras.Model(network.input, [layer.output for layer in layers])
    outputs = model.compute_output_spec(keras.KerasTensor((1, 32, 64, 1)))
    found = []
    for layer, (_, rows, columns, channels) in zip(layers, [y.shape for y in outputs], strict=True):
        assert columns == 2 * rows
        found.append((layer.name, 32 // rows, channels))
    assert sorted(found) == sorted(GOLDEN)

    def dilations(**flags):
        return {c.name: c.dilation_rate[0] for c in unet.build(**flags).layers if hasattr(c, "dilation_rate")}

    dilated = dilations(dilate=1, dilate_rate=2)
    assert [dilated[f"centre_conv{i}"] for i in range(1, 7)] == [1, 2, 4, 8, 16, 32]
    assert [dilated[f"down{k}_conv{i}"] for k in (1, 2, 3) for i in (1, 2)] == [1, 2] * 3
    assert {dilated[name] for name in dilated if name.startswith(("up", "head"))} == {1}
    assert set(dilations(dilate=0, dilate_rate=1).values()) == {1}
    summed = unet.build(**TINY, addition=True)
    feeding = summed.get_layer("centre_sum")._inbound_nodes[0].input_tensors
    assert [t._keras_history.operation.name for t in feeding] == ["centre_conv1", "centre_conv2", "centre_conv3"]
    assert "centre_sum" not in [layer.name for layer in unet.build(**TINY, addition=False).layers]


def test_the_residual_network_adds_to_its_input_what_two_convolutions_make_of_it_below_the_first_level():
    network = unet.build_residual()
    convolutions = [layer for layer in network.layers if hasattr(layer, "kernel")]
    sums = {layer.name: layer for layer in network.layers if layer.name.endswith("_sum")}
    assert (len(convolutions), len(sums)) == (28, 7)
    assert unet.field_of(network).multiple == 16
    added = sums["down3_block2_sum"]._inbound_nodes[0].input_tensors
    assert [x._keras_history.operation.name for x in added] == ["down3_block1_sum", "down3_block2_bn2"]
    widths = {layer.name: layer.filters for layer in convolutions if layer.name.endswith("conv1")}
    assert [widths[f"down{level}_conv1"] for level in range(1, 6)] == [16, 32, 64, 128, 128]
    assert [widths[f"up{level}_conv1"] for level in range(1, 5)] == [16, 32, 64, 128]


@pytest.mark.parametrize("shape", [(8, 8), (16, 40), (72, 24)])
@pytest.mark.parametrize("settings", [TINY, TINY_2015, RESIDUAL], ids=["2017", "2015", "residual"])
def test_any_multiple_of_8_goes_in_and_a_probability_comes_out(settings, shape):
    x = np.random.default_rng(0).normal(size=(2, *shape, 1)).astype(np.float32)
    interior = np.asarray(unet.from_settings(settings)(x))
    assert (interior.shape, interior.dtype) == ((2, *shape), np.float32)
    assert ((interior > 0) & (interior < 1)).all()
    assert np.ptp(interior) > 0.01


@pytest.mark.jax
@pytest.mark.parametrize("settings", [TINY, TINY_2015, WIDER], ids=["2017", "2015", "residual"])
def test_precision_bfloat16_agrees_with_float32_and_keeps_float32_weights(settings):
    x = np.random.default_rng(0).normal(size=(1, 64, 64, 1)).astype("float32")
    full, half = (unet.from_settings(settings, seed=3, precision=precision) for precision in unet.PRECISIONS)
    assert {w.dtype for w in half.weights} == {"float32"}
    assert (half.get_layer("up1_conv1").compute_dtype, half(x).dtype) == ("bfloat16", full(x).dtype)
    difference = np.abs(np.asarray(half(x)) - np.asarray(full(x)))
    assert 0 < difference.max() < 0.05


@pytest.mark.parametrize("settings", [TINY, TINY_2015 | {"classes": 4}, RESIDUAL], ids=["2017", "2015", "residual"])
def test_the_logits_belong_to_the_probability_and_share_its_weights(settings):
    network = unet.from_settings(settings, precision="bfloat16")
    both = unet.with_logits(network)
    x = np.random.default_rng(0).normal(size=(1, 64, 72, 1)).astype(np.float32)
    interior, logits = both(x)
    assert logits.shape == (*interior.shape, settings.get("classes", 2))
    assert keras.backend.standardize_dtype(logits.dtype) == "float32"
    np.testing.assert_allclose(keras.ops.softmax(logits)[..., 1], network(x), atol=1e-6)
    np.testing.assert_array_equal(interior, network(x))
    assert [id(w) for w in both.weights] == [id(w) for w in network.weights]


@cases(
    "settings, words",
    (TINY | {"dropout": 1.0}, "dropout must be 0, or above 1/512 and below 1. Received: 1.0"),
    (TINY_2015 | {"padding": "full"}, "padding"),
    (RESIDUAL | {"dropout": 1.0}, "dropout must be 0"),
)
def test_wrong_arguments_are_refused_by_name(settings, words):
    with pytest.raises(ValueError, match=words):
        unet.from_settings(settings)


FLAGS = ("--bn_momentum 0.9 --classes 256", "--arch unet2015 --batch_norm --bn_momentum 0.9", "--arch resunet")


@pytest.mark.parametrize("flags", FLAGS)
def test_a_network_of_any_flags_is_read_back_from_its_record(flags, tmp_path):
    settings = network_settings(dilatedUnet.parse([*flags.split(), "--filters", "4"]))
    normalisation = {"mean": 120.0, "std": 45.0, "epsilon": 1e-10}
    network = unet.from_settings(settings)
    prediction.save_weights(network, tmp_path / "net", {"network": settings, "normalisation": normalisation})
    found, _ = prediction.load_network(tmp_path / "net")
    assert all((np.array(a) == np.array(b)).all() for a, b in zip(found.weights, network.weights, strict=True))


# Interior of the first painted section, means of squares of 32 px, in thousandths.
SHIPPED = [[734, 664, 773, 723], [724, 617, 789, 889], [783, 871, 671, 614], [687, 719, 825, 793]]


@pytest.mark.jax
def test_the_shipped_weights_predict_what_they_did_when_they_were_trained():
    network, record = prediction.load_network(ROOT / "weights" / "isbi2012")
    images, _ = data.synthetic(1, (128, 128), seed=0)
    windows = data.Normalisation.from_dict(record["normalisation"])(images.sections)[..., None]
    interior = np.asarray(network(windows)).reshape(4, 32, 4, 32)
    np.testing.assert_allclose(interior.mean(axis=(1, 3)) * 1000, SHIPPED, atol=1.5)


def test_what_is_dropped_out_stands_behind_each_batch_norm_but_the_last_two_and_each_pooling():
    made = unet.build(filters=(2, 3), centre_dilations=(1, 2), dropout=0.5)
    dropped = {layer.name for layer in made.layers if getattr(layer, "kept", 256) == 128}
    names = "down1_bn1 down1_bn2 down1_drop down2_bn1 down2_bn2 down2_drop centre_bn1 up1_bn1 up2_bn1"
    assert dropped == {*names.split()}
