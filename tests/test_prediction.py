"""Weights in and out, and the `predict` verb: any size, any tile, the training's normalisation, flat memory."""

import functools
import importlib.util
import json
import math
import resource
import weakref
from pathlib import Path

import keras
import numpy as np
import pytest
import tifffile

import data
import dilatedUnet
from network import unet
from predict import engines, prediction, tiling

RECORD = {"normalisation": {"mean": 120.0, "std": 45.0, "epsilon": 1e-10}}
SETTINGS = {
    "filters": [8, 12],
    "dilate": False,
    "dilate_rate": 1,
    "addition": True,
    "dropout": 0.3,
    "classes": 2,
}
FLOAT32 = ("--precision", "float32", "--engine", "keras")
NORMALISATION = data.Normalisation.from_dict(RECORD["normalisation"])
RADIUS = unet.field_from_settings(SETTINGS).radius


@functools.cache
def network_of(seed=0):
    """A network with random filters, its head scaled so that the output is far from constant."""
    network = unet.build(**SETTINGS, seed=seed)
    head, features = network.get_layer("head_conv"), keras.Model(network.input, network.get_layer("head_bn").output)
    found = np.asarray(features(NORMALISATION(section_of(128, 128))[None, ..., None]))
    kernel = np.random.default_rng(seed).normal(size=found.shape[-1])
    logits = found @ kernel
    head.kernel.assign(np.stack([0 * kernel, 2 * kernel / logits.std()], axis=-1)[None, None])
    head.bias.assign([0, -2 * logits.mean() / logits.std()])
    return network


def section_of(height, width, seed=0):
    """Blobs, so that context matters, and no two places are alike."""
    from scipy.ndimage import gaussian_filter

    noise = np.random.default_rng(seed).normal(size=(height, width))
    return np.clip(120 + 250 * gaussian_filter(noise, 2), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "net.weights"
    prediction.save_weights(network_of(), path, RECORD | {"network": SETTINGS})
    return path


@pytest.fixture
def predict(call, weights, tmp_path):
    """`predict` on sections written to a TIFF; returns what it did."""

    def run(sections, *words, **options):
        tifffile.imwrite("stack.tif", np.asarray(sections), photometric="minisblack", **options)
        return call(
            "predict", "--weight_path", weights, "--image_path", "stack.tif", "--output", "out.tif", *FLOAT32, *words
        )

    return run


def expected(section, **options):
    return prediction.section_predictor(network_of(), NORMALISATION, SETTINGS, **options)(section)


# -- sizes and tiles ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(513, 700), (100, 90), (8, 8), (1, 3)])
def test_a_section_of_any_size_is_predicted(predict, shape):
    section = section_of(*shape)
    assert predict(section[None]).code == 0
    with tifffile.TiffFile("out.tif") as file:
        found = file.asarray()
        assert file.is_imagej
    assert found.shape == shape
    assert found.dtype == np.float32
    assert 0 <= found.min() <= found.max() <= 1
    np.testing.assert_allclose(found, expected(section), atol=1e-6)


@pytest.mark.slow
def test_a_section_of_4096_pixels_is_predicted_in_tiles(predict):
    section = np.tile(section_of(512, 512), (8, 8))
    done = predict(section[None])
    assert done.code == 0
    assert "25 tiles" in done.err
    found = tifffile.imread("out.tif")
    assert found.shape == (4096, 4096)
    inner = slice(RADIUS + 4, 512 - RADIUS - 4)  # far from the border of the stack, every period is alike
    np.testing.assert_allclose(
        found[1024:1536, 2048:2560][inner, inner], found[512:1024, 512:1024][inner, inner], atol=1e-5
    )


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize(("shape", "tile"), [((150, 203), 112), ((97, 260), 128)])
def test_tiles_equal_the_whole_image_where_the_halo_covers_the_receptive_field(shape, tile, seed):
    network, section = network_of(seed=seed), section_of(*shape, seed=seed)
    halo = tiling.round_up(RADIUS, 4)

    def predicted(side):
        return prediction.section_predictor(network, NORMALISATION, SETTINGS, tile=side, overlap=halo)(section)

    tiled, whole = predicted(tile), predicted(512)
    assert whole.std() > 0.05, "a constant would prove nothing"
    np.testing.assert_allclose(tiled, whole, atol=1e-5)
    rows, columns = (size // 4 * 4 for size in shape)
    plain = np.asarray(network(NORMALISATION(section)[None, :rows, :columns, None]))[0]
    inner = slice(RADIUS, -RADIUS)
    np.testing.assert_allclose(tiled[:rows, :columns][inner, inner], plain[inner, inner], atol=1e-5)


def test_tiles_differ_from_the_whole_image_where_the_halo_is_too_small():
    network, section = network_of(), section_of(150, 203)
    small, whole = (
        prediction.section_predictor(network, NORMALISATION, SETTINGS, tile=side, overlap=4)(section)
        for side in (64, 512)
    )
    assert np.abs(small - whole).max() > 1e-3


def test_the_engine_is_a_flag_and_says_what_it_is(predict):
    section = section_of(100, 90)
    for engine in ("keras", "openvino"):
        if engine == "openvino" and importlib.util.find_spec("openvino") is None:
            pytest.skip("needs OpenVINO: pip install -r requirements-openvino.txt")
        done = predict(section[None], "--engine", engine, "--force")
        assert done.code == 0
        assert f"engine: {engine}" in done.err.splitlines()[0]
        np.testing.assert_allclose(tifffile.imread("out.tif"), expected(section), atol=1e-4)


def test_the_engines_of_the_command_line_are_those_that_there_are(capsys):
    for name in engines.ENGINES:
        assert dilatedUnet.parse(["predict", "--weight_path", "w", "--engine", name]).engine == name
    with pytest.raises(SystemExit):
        dilatedUnet.parse(["predict", "--weight_path", "w", "--engine", "onnx"])
    assert "choose from" in capsys.readouterr().err


def test_tile_overlap_and_batch_are_flags(predict, monkeypatch):
    section, given, real = section_of(150, 203), [], keras.Model.predict_on_batch
    monkeypatch.setattr(keras.Model, "predict_on_batch", lambda self, x: given.append(x.shape) or real(self, x))
    done = predict(section[None], "--tile", "112", "--overlap", "36", "--batch_size", "3")
    assert done.code == 0
    assert "halo 36" in done.err
    assert {shape[0] for shape in given} == {3}
    assert max(max(shape[1:3]) for shape in given) <= 112
    np.testing.assert_allclose(tifffile.imread("out.tif"), expected(section, tile=112, overlap=36), atol=1e-4)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--overlap 3", "--overlap must be a non-negative multiple of 4. Received: 3"),
        ("--tile 502", "--tile must be a multiple of 4. Received: 502"),
        ("--tile 64 --overlap 32", "--overlap must leave at least 4 px of a tile of 64 uncovered. Received: 32"),
    ],
)
def test_tiles_that_cannot_be_are_refused_in_the_words_of_the_flags(predict, tmp_path, flags, words):
    done = predict(section_of(100, 90)[None], *flags.split())
    assert done.code == 2
    assert done.err.splitlines()[-1].startswith(f"dilatedUnet.py: {words}")
    assert [path.name for path in tmp_path.iterdir()] == ["stack.tif"]


# -- averaging, masks, labels ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("flag", "versions"), [("8", 8), ("4", 4), ("7", 7)])
def test_tta_is_the_mean_over_turned_and_mirrored_versions(predict, flag, versions):
    section = section_of(60, 44)
    assert predict(section[None], "--tta", flag).code == 0
    transforms = tiling.TRANSFORMS[flag]
    assert len(transforms) == versions
    every = []
    for turns, mirrored in transforms:
        found = expected(np.ascontiguousarray(tiling.transform(section, turns, mirrored)))
        every.append(np.rot90(found[:, ::-1] if mirrored else found, -turns))
    found = tifffile.imread("out.tif")
    np.testing.assert_allclose(found, np.mean(every, axis=0), atol=1e-6)
    assert np.abs(found - expected(section)).max() > 1e-3


def test_several_networks_are_averaged_each_with_its_own_normalisation(call, weights, tmp_path):
    """Probabilities, and the threshold that `--segment` takes."""
    other = data.Normalisation(mean=150.0, std=30.0)
    record = RECORD | {"network": SETTINGS, "normalisation": other.to_dict(), "threshold": 0.25}
    prediction.save_weights(network_of(1), tmp_path / "other", record)
    section = section_of(60, 44)
    tifffile.imwrite("stack.tif", section[None], photometric="minisblack")
    words = ("predict", "--weight_path", weights, tmp_path / "other", "--image_path", "stack.tif", *FLOAT32)
    done = call(*words, "--output", "out.tif")
    assert done.code == 0, done.err
    assert str(tmp_path / "other") in done.err
    second = prediction.section_predictor(network_of(1), other, SETTINGS)(section)
    np.testing.assert_allclose(tifffile.imread("out.tif"), (expected(section) + second) / 2, atol=1e-6)
    assert np.abs(second - expected(section)).max() > 0.1
    members = [(None, {"threshold": 0.75, "background": 0.1}), (None, {"threshold": 0.25}), (None, {})]
    assert prediction.segmentation_of(members) == {"threshold": 0.5, "background": 0.1}


def test_an_ensemble_is_not_written_in_chunks(refuses, weights):
    files = ("--weight_path", weights, weights, "--image_path", "synthetic", "--output", "out.zarr")
    refuses("--weight_path must be one for an --output of .zarr. Received: 2", "predict", *files)


def test_tta_without_a_number_is_all_eight():
    assert dilatedUnet.parse(["predict", "--weight_path", "w", "--tta"]).tta == "8"
    assert dilatedUnet.parse(["predict", "--weight_path", "w"]).tta == "none"


@pytest.mark.parametrize("threshold", [0.3, 0.7])
def test_a_threshold_writes_an_8_bit_mask(predict, threshold):
    sections = np.stack([section_of(40, 48, seed) for seed in range(2)])
    assert predict(sections, "--threshold", threshold).code == 0
    found = tifffile.imread("out.tif")
    assert found.dtype == np.uint8
    truth = np.stack([expected(section) for section in sections]) > threshold
    assert np.array_equal(found, 255 * truth.astype(np.uint8))
    assert set(np.unique(found)) == {0, 255}


def test_segment_writes_a_label_per_cell(predict):
    from score import segments

    section = section_of(64, 72)
    assert predict(section[None], "--segment", "--threshold", "0.6").code == 0
    found = tifffile.imread("out.tif")
    assert found.dtype == np.uint16
    assert found.max() > 3
    assert np.array_equal(found, segments.segment(expected(section), 0.6, min_size=prediction.SMALLEST_CELL_PX))


def test_segment_takes_the_threshold_of_the_record(monkeypatch, tmp_path):
    from score import segments

    asked = []
    monkeypatch.setattr(segments, "segment", lambda section, threshold, **_: asked.append(threshold) or section > 2)
    for flags, record in (([], {"threshold": 0.8}), (["--threshold", "0.3"], {"threshold": 0.8}), ([], {})):
        out = str(tmp_path / f"{len(asked)}.tif")
        args = dilatedUnet.parse(["predict", "--weight_path", "w", "--segment", "--output", out, *flags])
        prediction.write(args, iter([np.ones((8, 8), np.float32)]), 1, (8, 8), None, record)
    assert asked == [0.8, 0.3, 0.5]


@pytest.mark.parametrize(("side", "kind"), [(800, "uint16"), (1024, "uint32")])
def test_labels_have_room_for_all_cells_that_fit(tmp_path, side, kind):
    args = dilatedUnet.parse(["predict", "--weight_path", "w", "--segment", "--output", str(tmp_path / "out.tif")])
    prediction.write(args, iter([np.ones((side, side), np.float32)]), 1, (side, side), None, {})
    assert tifffile.imread(tmp_path / "out.tif").dtype == kind


# -- what goes in ------------------------------------------------------------------------------------------------


def test_the_training_normalisation_is_used_and_not_the_stacks_own(predict):
    section = section_of(64, 72) // 2
    results = []
    for shift in (0, 60):
        assert predict((section + shift)[None], "--force").code == 0
        results.append(tifffile.imread("out.tif"))
        x = (section.astype(np.float64) + shift - 120.0) / 45.0
        plain = np.asarray(network_of()(x.astype(np.float32)[None, ..., None]))[0]
        np.testing.assert_allclose(results[-1], plain, atol=1e-5)
    assert np.abs(results[0] - results[1]).max() > 0.01


@pytest.mark.parametrize("kind", ["uint16", "float32"])
def test_16_bit_and_float_stacks_are_read_as_they_are(predict, kind):
    section = section_of(40, 48)
    assert predict(section[None].astype(kind)).code == 0
    np.testing.assert_allclose(tifffile.imread("out.tif"), expected(section), atol=1e-6)


def test_voxel_size_is_carried_over(predict):
    metadata = {"axes": "ZYX", "unit": "um", "spacing": 0.05}
    sections = np.stack([section_of(32, 40, seed) for seed in range(3)])
    assert predict(sections, imagej=True, resolution=(250, 200), metadata=metadata).code == 0
    assert data.iter_sections("out.tif").voxel_nm == pytest.approx((50, 5, 4))


def test_a_folder_of_sections_is_read_in_natural_order(call, weights, tmp_path):
    (tmp_path / "sections").mkdir()
    for i in (1, 2, 10):
        tifffile.imwrite(tmp_path / f"sections/{i}.tif", section_of(32, 40, i))
    done = call("predict", "--weight_path", weights, "--image_path", "sections", "--output", "new/folder/out", *FLOAT32)
    assert done.code == 0, done.err
    found = tifffile.imread("new/folder/out")
    for index, seed in enumerate((1, 2, 10)):
        np.testing.assert_allclose(found[index], expected(section_of(32, 40, seed)), atol=1e-6)


class Lazy:
    """A stack of sections that come into being when they are read; counts how many are alive at once."""

    def __init__(self, count):
        self.shape, self.voxel_nm, self.alive, self.most = (count, 32, 40), None, set(), 0

    def __len__(self):
        return self.shape[0]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def __iter__(self):
        for i in range(len(self)):
            section = section_of(32, 40, i)
            self.alive.add(i)
            self.most = max(self.most, len(self.alive))
            weakref.finalize(section, self.alive.discard, i)
            yield section
            del section


def test_one_section_is_read_predicted_and_written_at_a_time(call, weights, monkeypatch):
    stack = Lazy(40)
    monkeypatch.setattr(data, "resolve", lambda *_, **__: stack)
    monkeypatch.setattr(data, "iter_sections", lambda found: found)
    written = []
    monkeypatch.setattr(prediction, "write", lambda args, finished, *_: written.extend(p.shape for p in finished))
    assert call("predict", "--weight_path", weights).code == 0
    assert written == [(32, 40)] * 40
    assert 1 <= stack.most <= 3


# -- outputs -----------------------------------------------------------------------------------------------------


def test_an_existing_output_is_replaced_with_force_only(predict, tmp_path):
    Path("out.tif").write_bytes(b"precious")
    done = predict(section_of(32, 40)[None])
    assert done.code == 2
    assert "out.tif exists already (--force replaces it)" in done.err.splitlines()[-1]
    assert Path("out.tif").read_bytes() == b"precious"
    assert predict(section_of(32, 40)[None], "--force").code == 0
    assert tifffile.imread("out.tif").shape == (32, 40)


def test_an_output_below_a_file_is_refused(predict):
    Path("file").write_bytes(b"x")
    done = predict(section_of(32, 40)[None], "--output", "file/out.tif")
    assert done.code == 2
    assert "could not be written" in done.err.splitlines()[-1]


def test_a_section_that_cannot_be_read_leaves_no_output(predict, tmp_path):
    sections = np.stack([section_of(32, 40)] * 3).astype(np.float32)
    sections[2, 0, 0] = np.nan
    done = predict(sections)
    assert done.code == 2
    assert "section 2" in done.err.splitlines()[-1]
    assert "NaN" in done.err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["stack.tif"]


# -- weights and their record ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x", "x.weights", "x.weights.h5", "x.h5"])
def test_every_spelling_of_a_weight_path_means_one_file(name):
    assert prediction.weight_file(f"weights/{name}") == Path("weights/x.weights.h5")
    assert prediction.record_file(f"weights/{name}") == Path("weights/x.json")


def test_weights_come_back_as_they_were(weights):
    network, record = prediction.load_network(weights)
    for mine, theirs in zip(network.weights, network_of().weights, strict=True):
        assert np.array_equal(mine, theirs)
    assert record["network"] == SETTINGS
    assert network.name == "standard_unet"


def test_precision_is_that_of_the_prediction(weights):
    network, _ = prediction.load_network(weights, "bfloat16")
    assert network.get_layer("down1_conv1").compute_dtype == "bfloat16"


def spoil_record(**changes):
    def change(folder):
        record = json.loads((folder / "net.json").read_text())
        (folder / "net.json").write_text(json.dumps(record | changes))

    return change


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "net.weights.h5").unlink(), "net.weights.h5 does not exist"),
        (lambda folder: (folder / "net.json").unlink(), "net.json, the record that belongs to the weights"),
        (lambda folder: (folder / "net.json").write_text("{"), "net.json is not a record of weights"),
        (lambda folder: (folder / "net.json").write_text("[1]"), "net.json is not a record of weights"),
        (lambda folder: (folder / "net.json").write_bytes(b"\xff\xfe"), "net.json is not a record of weights"),
        (spoil_record(format="other 7"), "must have the format 'dilated-unet weights 1'. Received: 'other 7'"),
        (spoil_record(network={"filters": [8, 13]}), "is broken, or holds weights of another architecture"),
        (spoil_record(network={"filters": [8, 12, 12]}), "is broken, or holds weights of another architecture"),
        (spoil_record(network={"wings": 2}), "describes no network of this suite"),
        (spoil_record(network=[1]), "describes no network of this suite"),
        (spoil_record(normalisation={"mean": 1}), "normalisation must hold mean, std and epsilon"),
        (spoil_record(normalisation={"mean": 1, "std": -2, "epsilon": 0}), "normalisation must be finite"),
        (lambda folder: (folder / "net.weights.h5").write_bytes(b""), "is broken"),
        (lambda folder: (folder / "net.weights.h5").write_bytes(b"no HDF5"), "is broken"),
        (
            lambda folder: (folder / "net.weights.h5").write_bytes((folder / "net.weights.h5").read_bytes()[:9000]),
            "is broken",
        ),
    ],
)
def test_weights_that_cannot_be_used_are_refused_in_one_sentence(refuses, weights, tmp_path, spoil, words):
    for name in ("net.json", "net.weights.h5"):
        (tmp_path / name).write_bytes((weights.parent / name).read_bytes())
    spoil(tmp_path)
    tifffile.imwrite("stack.tif", section_of(32, 40))
    refuses(words, "predict", "--weight_path", "net.weights", "--image_path", "stack.tif")
    assert not (tmp_path / "prediction.tif").exists()


def test_a_full_disk_leaves_the_old_weights(weights, tmp_path):
    """A real limit on the size of files: HDF5 would crash the process when it closes what it could not write."""
    for name in ("net.json", "net.weights.h5"):
        (tmp_path / name).write_bytes((weights.parent / name).read_bytes())
    before = (tmp_path / "net.weights.h5").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        with pytest.raises(data.DataError, match=r"net.weights.h5 could not be written"):
            prediction.save_weights(network_of(seed=5), tmp_path / "net.weights", {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "net.weights.h5").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.json", "net.weights.h5"]


@pytest.mark.parametrize("filters", [(1,), (2, 3), (8, 16, 32)])
def test_the_room_reserved_for_weights_is_enough(tmp_path, filters):
    network = unet.build(filters=filters)
    prediction.reserve(tmp_path / "room", network)
    prediction.save_weights(network, tmp_path / "net", {})
    assert (tmp_path / "net.weights.h5").stat().st_size <= (tmp_path / "room").stat().st_size


@pytest.mark.parametrize("moment", ["save", "replace"])
def test_a_save_that_is_interrupted_leaves_the_old_weights(weights, monkeypatch, tmp_path, moment):
    for name in ("net.json", "net.weights.h5"):
        (tmp_path / name).write_bytes((weights.parent / name).read_bytes())
    before = (tmp_path / "net.weights.h5").read_bytes()

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    if moment == "save":
        monkeypatch.setattr(keras.Model, "save_weights", interrupted)
    else:
        monkeypatch.setattr(prediction.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prediction.save_weights(network_of(seed=5), tmp_path / "net.weights", {})
    assert (tmp_path / "net.weights.h5").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.json", "net.weights.h5"]


def test_the_halo_of_the_study_is_the_receptive_radius():
    """Standard network: 90 px, so 96; where the dilated network's 553 px would quadruple the work, less, and said."""
    standard = unet.field_from_settings({"dilate": False, "dilate_rate": 1})
    grid = tiling.choose((2000, 2000), standard.radius)
    assert (grid.halo, grid.exact) == (96, True)
    dilated = tiling.choose((2000, 2000), unet.field_from_settings({}).radius)
    assert not dilated.exact
    assert math.prod(dilated.tile) <= tiling.MAX_TILE**2
