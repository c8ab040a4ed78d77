"""Engines: OpenVINO says what Keras says, for any size; what is refused."""

import importlib.util
import os
import sys

import keras
import numpy as np
import pytest
from conftest import ROOT, cases, python, refused
from scipy.ndimage import gaussian_filter

import data
from data import DataError
from network import device, layers, outline, unet
from predict import engines, prediction

SHIPPED = sorted(path.stem for path in (ROOT / "weights").glob("isbi2012*.json"))
AGREE = 0.9995  # of all pixels, thresholded at 0.5

openvino = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="needs OpenVINO: pip install -r requirements-openvino.txt"
)
NETWORKS = {
    "dilated": ({"filters": (8, 12)}, [(1, 64, 96), (2, 128, 40)]),
    "standard": (
        {"filters": (8, 12, 16), "dilate": False, "dilate_rate": 1, "addition": False, "classes": 3},
        [(1, 64, 96), (2, 128, 40)],
    ),
    "2015": ({"arch": "unet2015", "filters": 4, "levels": 3}, [(1, 92, 100), (2, 124, 92)]),
    "residual": ({"arch": "resunet", "filters": (4, 6, 8, 10)}, [(1, 64, 96), (2, 128, 40)]),
    "2015 padded": ({"arch": "unet2015", "filters": 4, "padding": "same"}, [(1, 64, 96), (2, 128, 48)]),
}


def windows_of(*shape, seed=0):
    """Smooth blobs of mean 0 and standard deviation 1."""
    noise = gaussian_filter(np.random.default_rng(seed).normal(size=shape), (0, 2, 2))
    return (noise / noise.std()).astype(np.float32)


def trained_like(settings, window, precision="float32"):
    """A network whose biases and batch-norm statistics are not the initial ones, and whose output is not constant."""
    network, rng = unet.from_settings(settings, precision=precision), np.random.default_rng(1)
    for layer in network.layers:
        if isinstance(layer, layers.BatchNormDropout):
            channels = layer.gamma.shape
            layer.gamma.assign(rng.uniform(0.5, 1.5, channels))
            layer.beta.assign(rng.normal(0, 0.3, channels))
            layer.moving_mean.assign(rng.normal(0.5, 0.3, channels))
            layer.moving_variance.assign(rng.uniform(0.3, 3, channels))
        elif hasattr(layer, "bias"):
            layer.bias.assign(rng.normal(0, 0.1, layer.bias.shape))
    head = network.get_layer("head_conv")
    logits = np.asarray(keras.Model(network.input, head.output)(window[..., None]), np.float32)
    centre = logits.mean((0, 1, 2))
    head.kernel.assign(head.kernel * (2 / logits.std()))
    head.bias.assign((head.bias - centre) * (2 / logits.std()))
    return network


def agreement(found, expected):
    """Fraction of pixels on the same side of 0.5."""
    assert (found.shape, found.dtype) == (expected.shape, np.float32)
    assert 0.1 < (expected > 0.5).mean() < 0.9, "hardly any pixel could be wrong"
    return np.mean((found > 0.5) == (expected > 0.5))


@openvino
@pytest.mark.parametrize(
    "name", [pytest.param("dilated", marks=pytest.mark.jax), "standard", "2015", "2015 padded", "residual"]
)
def test_openvino_agrees_with_keras_for_every_size_of_input_and_needs_no_keras(name, tmp_path):
    settings, shapes = NETWORKS[name]
    network, without = trained_like(settings, windows_of(*shapes[0])), unet.from_settings(settings, kinds=outline)
    network.save_weights(tmp_path / "x.weights.h5")
    without.load_weights(tmp_path / "x.weights.h5")
    assert (unet.field_of(without), without.name) == (unet.field_of(network), network.name)
    slow, fast = (engines.forward(network, engine, "float32") for engine in ("keras", "openvino"))
    same = engines.forward(without, "openvino", "float32")
    for seed, shape in enumerate(shapes):
        windows = windows_of(*shape, seed=seed)
        expected, found = slow(windows), fast(windows)
        assert agreement(found, expected) >= AGREE
        np.testing.assert_allclose(found, expected, atol=1e-4)
        assert np.array_equal(same(windows), found)


@openvino
@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPED or [pytest.param("", marks=pytest.mark.skip("no weights in weights/"))])
def test_openvino_agrees_with_float32_keras_on_real_sections(isbi, name):
    network, record = prediction.load_network(ROOT / "weights" / name)
    with data.iter_sections(data.resolve(str(isbi), "test")) as sections:
        window = data.Normalisation.from_dict(record["normalisation"])(next(iter(sections)))[None]
    expected = engines.forward(network, "keras", "float32")(window)
    for precision in device.PRECISIONS:
        assert agreement(engines.forward(network, "openvino", precision)(window), expected) >= AGREE, precision


@openvino
def test_openvino_in_bfloat16_is_near_and_takes_the_float32_weights_of_a_bfloat16_network():
    settings, (_, shape) = NETWORKS["dilated"]
    windows = windows_of(*shape)
    network, reduced = (trained_like(settings, windows, precision) for precision in device.PRECISIONS)
    exact, rounded = (engines.forward(network, "openvino", precision)(windows) for precision in device.PRECISIONS)
    assert rounded.dtype == np.float32
    np.testing.assert_allclose(rounded, exact, atol=0.15)
    assert np.sqrt(np.mean((rounded - exact) ** 2)) < 0.03
    reduced.set_weights(network.get_weights())
    np.testing.assert_array_equal(engines.forward(reduced, "openvino", "float32")(windows), exact)


@openvino
@cases(
    "layer",
    lambda: keras.layers.AveragePooling2D(2, name="odd"),
    lambda: keras.layers.Conv2D(1, 3, activation="gelu", name="odd"),
    lambda: keras.layers.LayerNormalization(name="odd"),
    lambda: keras.layers.MaxPooling2D(padding="same", name="odd"),
    lambda: keras.layers.Conv2DTranspose(1, 3, padding="same", name="odd"),
)
def test_what_openvino_is_not_told_about_is_refused_by_name_and_left_to_keras_by_auto(layer, capsys):
    inputs = keras.Input((None, None, 1))
    network = keras.Model(inputs, layer()(inputs))
    with pytest.raises(DataError, match="--engine openvino cannot compute the layer odd, but --engine keras can"):
        engines.forward(network, "openvino", "float32")
    windows = windows_of(1, 16, 16)
    found, expected = (engines.forward(network, engine, "float32")(windows) for engine in ("auto", "keras"))
    np.testing.assert_array_equal(found, expected)
    assert len(capsys.readouterr().err.splitlines()) == 1


@openvino
def test_convolutions_without_bias_and_one_sided_crops_are_told():
    inputs = keras.Input((None, None, 1))
    x = keras.layers.Conv2D(3, 3, strides=2, padding="same", use_bias=False, activation="relu")(inputs)
    x = layers.Interior()(keras.layers.Cropping2D(((1, 0), (0, 2)))(x))
    network, windows = keras.Model(inputs, x), windows_of(1, 16, 20)
    found, expected = (engines.forward(network, engine, "float32")(windows) for engine in ("openvino", "keras"))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@openvino
def test_nothing_is_reported_to_anybody(tmp_path):
    """OpenVINO, when imported, writes an identifier into the home folder and sends an event to Google Analytics."""
    code = "import sys; from network import device; device.openvino().Core(); "
    code += "print([m for m in sys.modules if 'telemetry.' in m])"
    outside_ci = {k: v for k, v in os.environ.items() if k not in ("CI", "TF_BUILD", "JENKINS_URL")}
    assert python("-c", code, env=outside_ci | {"HOME": str(tmp_path)}).stdout.strip() == "[]"
    assert not (tmp_path / "intel").exists()


STACK_OF_SIGNALS = """
import ctypes
from network import device
device._speedup_of_bfloat16("openvino")
stack = (ctypes.c_void_p * 3)()  # its address, flags, size
ctypes.CDLL(None).sigaltstack(None, stack)
areas = [line.split()[0].split("-") for line in open("/proc/self/maps")]
print(not stack[0] or any(int(a, 16) <= stack[0] < int(b, 16) for a, b in areas))
"""


@openvino
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_ctrl_c_finds_its_stack_after_openvino_has_measured():
    """Every Core that goes puts back the stack that was there when it came, be it freed: a signal then crashes."""
    assert python("-c", STACK_OF_SIGNALS).stdout.strip() == "True"


@cases(
    "asked, installed, accelerator, chosen",
    ("auto", True, None, "openvino"),
    ("auto", True, "NVIDIA H200", "keras"),
    ("auto", False, None, "keras"),
    ("auto", False, "NVIDIA H200", "keras"),
    ("openvino", True, "NVIDIA H200", "openvino"),
    ("keras", True, None, "keras"),
    ("openvino", False, None, None),
)
def test_auto_is_openvino_where_it_is_installed_without_an_accelerator(
    monkeypatch, asked, installed, accelerator, chosen
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    monkeypatch.setattr(device, "accelerator", lambda: accelerator)
    if chosen:
        assert engines.choose(asked) == chosen
    else:
        refused(r"^--engine openvino needs .*pip install -r requirements-openvino\.txt$", engines.choose, asked)
        assert "openvino" in (ROOT / "requirements-openvino.txt").read_text()
