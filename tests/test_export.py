"""The `export` verb: the package passes its own test offline; what it says; what is refused."""

import argparse
import io
import json
import re
import socket
import sys
import zipfile
from functools import partial

import numpy as np
import pytest
import tifffile
from conftest import ROOT, cases, file_limit
from test_engines import trained_like, windows_of

from data import Normalisation
from predict import export as exporting
from predict import prediction

pytest.importorskip("onnx", reason="needs the extra: pip install -r requirements-export.txt")
pytest.importorskip("bioimageio.spec", reason="needs the extra: pip install -r requirements-export.txt")
pytestmark = pytest.mark.filterwarnings("ignore")  # of other people's packages

NETWORKS = {
    "unet2017": {"filters": [2, 3], "dilate": False, "dilate_rate": 1, "addition": True, "dropout": 0, "classes": 2},
    "unet2015": {"arch": "unet2015", "filters": 2, "levels": 2, "padding": "valid"},
}


@pytest.fixture
def export(call, tmp_path):
    """`export` of a tiny network whose record tells of somebody's files."""

    def write(name="unet2017"):
        network = trained_like(NETWORKS[name], windows_of(1, 64, 64))
        norm = {"mean": 30000.0, "std": 5000.0, "epsilon": 1e-10}
        about = {"images": "/home/ada/secret.tif", "voxel_nm": [40, 8, 8]}
        record = {"network": NETWORKS[name], "normalisation": norm, "data": about, "split": {"train": [0, 1, 2]}}
        prediction.save_weights(network, tmp_path / "mine", record | {"command": "/home/ada/train"})
        return lambda *words: call("export", "--weight_path", "mine", *words)

    return write


def description(package):
    from ruyaml import YAML

    return YAML(typ="safe").load(package.read("rdf.yaml"))


@cases(("name", "halo", "offset", "least"), ("unet2017", 44, 0, 92), ("unet2015", None, -40, 44))
def test_a_package_passes_the_test_of_bioimage_io_offline_in_every_format(
    export, tmp_path, monkeypatch, name, halo, offset, least
):
    core = pytest.importorskip("bioimageio.core", reason="needs the extra: pip install -r requirements-export.txt")
    assert export(name)("--output", "x.zip").code == 0
    package = zipfile.ZipFile(tmp_path / "x.zip")
    said = description(package)
    y = said["outputs"][0]["axes"][2]
    assert (y.get("halo"), y["size"]["offset"], y["scale"]) == (halo, offset, 0.008)
    assert said["inputs"][0]["axes"][3]["size"] == {"min": least, "step": 4}

    def refuse(*_):
        raise AssertionError("offline")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("KERAS_BACKEND", "tensorflow")
    formats = {"keras_v3", "onnx"} | ({"torchscript"} if "torch" in sys.modules else set())
    assert set(said["weights"]) == formats
    for kind in formats:
        summary = core.test_description(tmp_path / "x.zip", weight_format=kind)
        assert summary.status == "passed", summary.format()


def test_a_package_that_was_changed_fails_the_test_of_bioimage_io(export, tmp_path):
    core = pytest.importorskip("bioimageio.core", reason="needs the extra: pip install -r requirements-export.txt")
    assert export()("--output", "x.zip").code == 0
    with zipfile.ZipFile(tmp_path / "x.zip") as package, zipfile.ZipFile(tmp_path / "y.zip", "w") as other:
        for file in package.namelist():
            text = package.read(file)
            other.writestr(file, text.replace(b"mean: 30000.0", b"mean: 20000.0") if file == "rdf.yaml" else text)
    assert core.test_description(tmp_path / "y.zip", weight_format="onnx").status != "passed"


def test_a_package_says_what_is_known_and_nothing_of_somebodys_files(export, tmp_path):
    words = ("--name", "Ada net (2)", "--author", "Ada Lovelace", "--license", "CC-BY-4.0", "--image_path", "raw.tif")
    words += ("--channel", "1")
    raw = np.arange(3 * 2 * 90 * 70, dtype=np.uint16).reshape(3, 2, 90, 70)
    tifffile.imwrite(tmp_path / "raw.tif", raw, imagej=True, metadata={"axes": "ZCYX"})
    run = export()
    assert run("--output", "x.zip", *words).code == 0
    assert run("--output", "y.zip").code == 0
    ours, plain = (zipfile.ZipFile(tmp_path / f"{name}.zip") for name in "xy")
    said = description(ours)
    assert (said["name"], said["authors"], said["license"]) == ("Ada net (2)", [{"name": "Ada Lovelace"}], "CC-BY-4.0")
    section = np.load(io.BytesIO(ours.read("test-input.npy")))
    assert section.shape[2] >= 2 * 44 + 128
    np.testing.assert_array_equal(section[0, 0, 63:153, 73:143], raw[1, 1])
    assert b"3 sections" in ours.read("README.md")
    said = description(plain)
    assert (said["authors"], said["license"], said["training_data"]) == ([], None, None)
    painted = np.load(io.BytesIO(plain.read("test-input.npy")))
    assert 29000 < painted.mean() < 31000
    for package in (ours, plain):
        assert not [name for name in package.namelist() if b"/home/ada" in package.read(name)]


def test_the_shipped_network_is_exported_with_its_card_licence_and_training_data(call, tmp_path):
    assert call("export", "--output", "x.zip").code == 0
    package = zipfile.ZipFile(tmp_path / "x.zip")
    said, text = description(package), package.read("README.md").decode()
    assert said["license"] == "MIT"
    assert said["training_data"]["name"].startswith("ISBI-2012")
    assert "# Model card: `isbi2012`" in text
    assert "## Where it fails" in text
    assert "](../" not in text
    from PIL import Image

    with Image.open(package.open("cover.png")) as cover:
        assert cover.width == 2 * cover.height
        assert np.std(np.asarray(cover)[:, cover.height :]) > 40, "the network sees no membranes in its own cover"


def test_a_section_of_another_bit_depth_is_mapped_to_the_gray_values_of_the_training(tmp_path):
    record = prediction.read_record(ROOT / "weights/isbi2012")
    norm = Normalisation.from_dict(record["normalisation"])
    made = partial(exporting._section, side=256, norm=norm, record=record)
    painted = made(argparse.Namespace(image_path=None))
    tifffile.imwrite(tmp_path / "raw.tif", (painted * 257).astype(np.uint16))
    given = argparse.Namespace(image_path=str(tmp_path / "raw.tif"), channel=None)
    np.testing.assert_allclose(made(given), painted, rtol=1e-6)


def test_a_card_is_that_of_the_weights_in_its_title_and_of_no_other_word_in_it(tmp_path):
    names = re.findall(r"`(\w+)`", (ROOT / "weights/README.md").read_text())
    assert {"isbi2012", "strong"} <= set(names)
    (tmp_path / "README.md").write_text((ROOT / "weights/README.md").read_text())
    found = [exporting._card(argparse.Namespace(weight_path=str(tmp_path / name))) for name in ("isbi2012", "strong")]
    assert found[0].startswith("# Model card: `isbi2012`")
    assert not found[1]


@pytest.mark.parametrize("ending", ["onnx", "pt"])
def test_onnx_and_torchscript_alone_are_written_and_replaced_with_force_only(export, refuses, tmp_path, ending):
    if ending == "pt":
        pytest.importorskip("torch", reason="TorchScript needs PyTorch: pip install torch")
    run = export()
    done = run("--output", f"x.{ending}")
    assert done.code == 0
    assert "(gray value - 30000) / 5000" in done.err
    before = (tmp_path / f"x.{ending}").read_bytes()
    refuses("exists already", "export", "--weight_path", "mine", "--output", f"x.{ending}")
    assert (tmp_path / f"x.{ending}").read_bytes() == before
    assert run("--output", f"x.{ending}", "--force").code == 0
    if ending == "onnx":
        import onnx

        props = {each.key: each.value for each in onnx.load(tmp_path / "x.onnx").metadata_props}
        assert props == {"mean": "30000.0", "std": "5000.0", "min": "92", "step": "4", "shrink": "0", "halo": "44"}


@cases(
    ("words", "flags"),
    ("--output", ""),
    ("must be a file that ends in .zip or .onnx or .pt", "--output x.tif"),
    ("must end in .onnx. Received: x.zip", "--output x.zip --format onnx"),
    ("--author goes with --format bioimageio", "--output x.onnx --author Ada"),
    ("--name must be 5 to 128 letters", "--output x.zip --name Ada"),
    ("--author must be a name, without slashes", "--output x.zip --author a/b"),
    ("--license must be an SPDX identifier", "--output x.zip --license mine"),
    ("does not exist", "--output x.zip --weight_path none"),
    ("does not exist", "--output x.zip --image_path none.tif"),
)
def test_what_cannot_be_exported_is_refused_in_one_sentence_and_nothing_is_written(refuses, tmp_path, words, flags):
    refuses(words, "export", *flags.split())
    assert not list(tmp_path.iterdir())


@cases(
    ("module", "output", "install"),
    ("onnx", "x.onnx", "-r requirements-export.txt"),
    ("bioimageio.spec", "x.zip", "-r requirements-export.txt"),
    ("torch", "x.pt", "torch"),
)
def test_what_is_not_installed_is_named_with_the_command_that_installs_it(
    refuses, monkeypatch, module, output, install
):
    monkeypatch.setitem(sys.modules, module, None)
    said = refuses(f"needs {module}, which is not installed: pip install {install}", "export", "--output", output)
    assert said.endswith(install)


@pytest.mark.parametrize("ending", ["zip", "onnx", "pt"])
def test_a_full_disk_is_a_sentence_and_leaves_nothing_behind(export, refuses, tmp_path, ending):
    if ending != "onnx":
        pytest.importorskip("torch", reason="TorchScript needs PyTorch: pip install torch")
    export()
    before = sorted(tmp_path.rglob("*"))
    with file_limit(2000):
        refuses(f"x.{ending} could not be written", "export", "--weight_path", "mine", "--output", f"x.{ending}")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_record_that_says_little_is_exported(export, tmp_path):
    run = export()
    record = json.loads((tmp_path / "mine.json").read_text())
    (tmp_path / "mine.json").write_text(json.dumps({"split": 3} | {k: record[k] for k in record if k[0] in "fn"}))
    assert run("--output", "x.zip").code == 0
    assert "scale" not in description(zipfile.ZipFile(tmp_path / "x.zip"))["inputs"][0]["axes"][2]


def test_gray_values_that_hardly_differ_are_refused(export, refuses, tmp_path):
    export()
    record = json.loads((tmp_path / "mine.json").read_text())
    record["normalisation"]["std"] = 1e-7
    (tmp_path / "mine.json").write_text(json.dumps(record))
    refuses("standard deviation of at least 1e-6", "export", "--weight_path", "mine", "--output", "x.zip")
    assert not (tmp_path / "x.zip").exists()


def test_height_and_width_of_a_pixel_are_not_taken_for_each_other():
    sizes = {"min": 92, "step": 4, "shrink": 0, "halo": 44}
    for part in exporting._axes({"data": {"voxel_nm": [40, 8, 4]}}, sizes):
        scales = {axis["id"]: axis["scale"] for axis in part["axes"] if axis["type"] == "space"}
        assert scales == {"y": 0.008, "x": 0.004}
