"""Twins: stock Keras layers say what ours say, bit for bit; ONNX and TorchScript for any size, to rounding."""

import keras
import numpy as np
import pytest
from conftest import ROOT, cases
from test_engines import trained_like, windows_of

import data
from network import onednn, unet
from predict import prediction, tiling, twins

onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra: pip install -r requirements-export.txt")
pytest.importorskip("onnx", reason="needs the extra: pip install -r requirements-export.txt")

NEAR = 1e-5  # of a probability in float32


def stock(network, path):
    twins.stock_twin(network).save(path / "x.keras")
    twin = keras.saving.load_model(path / "x.keras")
    assert {type(layer).__module__.split(".")[0] for layer in twin.layers} == {"keras"}
    return lambda windows: np.asarray(twin(windows[:, None], training=False))[:, 0]


def onnx(network, path):
    twins.write_onnx(network, path / "x.onnx", {"mean": 1.5})
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path / "x.onnx", options)
    assert session.get_modelmeta().custom_metadata_map == {"mean": "1.5"}
    return lambda windows: session.run(["interior"], {"section": windows[:, None]})[0][:, 0]


def torchscript(network, path):
    torch = pytest.importorskip("torch", reason="TorchScript needs PyTorch: pip install torch")
    (side,) = unet.field_of(network).valid_sizes(count=1)
    twins.write_torchscript(network, path / "x.pt", side)
    traced = torch.jit.load(path / "x.pt")
    assert sum(number.numel() for number in traced.buffers()) == sum(w.numpy().size for w in network.weights)
    return lambda windows: traced(torch.from_numpy(windows[:, None])).numpy()[:, 0]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@cases(
    "settings",
    {"filters": (3, 4)},
    {"filters": (3, 4, 5), "dilate": False, "dilate_rate": 1},
    {"filters": (3,), "addition": False, "centre_dilations": (1, 3), "classes": 4},
    {"arch": "resunet", "filters": (2, 3, 4), "classes": 3},
    {"arch": "unet2015", "filters": 2, "levels": 2},
    {"arch": "unet2015", "filters": 2, "levels": 1, "batch_norm": True, "classes": 3},
    {"arch": "unet2015", "filters": 2, "levels": 3, "padding": "same", "batch_norm": True},
)
def test_twins_of_every_architecture_agree_for_every_size(settings, monkeypatch, tmp_path):
    """Keras's bit for bit with the plain arithmetic."""
    monkeypatch.setattr(onednn, "serves", lambda: False)
    field = unet.field_from_settings(settings)
    small, middle, large = field.valid_sizes(at_least=2 * field.shrink + 16)
    network = trained_like(settings, windows_of(1, large, large))
    written = [(write(network, tmp_path), near) for write, near in ((stock, 0), (onnx, NEAR), (torchscript, NEAR))]
    for shape in ((1, small, small), (2, large, middle)):
        windows = windows_of(*shape)
        expected = np.asarray(network(windows[..., None], training=False))
        assert expected.std() > 0.05
        for predict, near in written:
            found = predict(windows)
            assert (found.shape, found.dtype) == (expected.shape, np.float32)
            assert np.abs(found - expected).max() <= near


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_twins_of_the_shipped_network_agree_on_a_real_section_in_tiles(isbi, tmp_path):
    network, record = prediction.load_network(ROOT / "weights" / "isbi2012")
    norm, field = data.Normalisation.from_dict(record["normalisation"]), unet.field_of(network)
    with data.iter_sections(data.resolve(str(isbi), "test")) as sections:
        section = norm(sections[3][:200, :184])
    networks = [lambda windows: np.asarray(network(windows[..., None], training=False))]
    networks += [write(network, tmp_path) for write in (stock, onnx, torchscript)]
    for grid in (tiling.choose(section.shape, field), tiling.choose(section.shape, field, max_tile=160, halo=48)):
        expected, *found = (tiling.predict_section(section, predict, grid) for predict in networks)
        assert expected.std() > 0.2
        assert max(np.abs(each - expected).max() for each in found) <= NEAR
