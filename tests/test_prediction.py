"""Weights in and out, and the `predict` verb: any size, any tile, the training's normalisation, flat memory."""

import functools
import importlib.util
import json
import math
import os
import re
import shutil
import threading
import weakref
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
import tifffile
from conftest import ROOT, cases, refused, with_

import data
import dilatedUnet
from files import sections, writing
from network import device, outline, unet
from predict import borders, engines, intensity, prediction, rescale, tiling

RECORD = {"normalisation": {"mean": 120.0, "std": 45.0, "epsilon": 1e-10}}
SETTINGS = {"filters": [8, 12], "dilate": False, "dilate_rate": 1, "addition": True, "dropout": 0.3, "classes": 2}
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
def copied(weights, tmp_path):
    """A folder with a copy of the weights and their record."""
    return shutil.copytree(weights.parent, tmp_path, dirs_exist_ok=True)


@pytest.fixture
def predict(call, weights):
    """`predict` on sections written to a TIFF; returns what it did."""

    def run(sections, *words, code=0, **options):
        tifffile.imwrite("stack.tif", np.asarray(sections), photometric="minisblack", **options)
        files = ("--weight_path", weights, "--image_path", "stack.tif", "--output", "out.tif")
        done = call("predict", *files, *FLOAT32, *words)
        assert done.code == code, done.err
        return done

    return run


def expected(section, **options):
    return prediction.section_predictor(network_of(), NORMALISATION, **options)(section)


@pytest.mark.parametrize("shape", [(513, 700), (100, 90), (8, 8), (1, 3)])
def test_a_section_of_any_size_is_predicted(predict, shape):
    section = section_of(*shape)
    predict(section[None])
    with tifffile.TiffFile("out.tif") as file:
        found = file.asarray()
        assert file.is_imagej
    assert (found.shape, found.dtype) == (shape, np.float32)
    assert 0 <= found.min() <= found.max() <= 1
    np.testing.assert_allclose(found, expected(section), atol=1e-6)


def test_the_channel_that_is_named_is_predicted(predict):
    channels = np.stack([section_of(64, 80, seed=seed) for seed in (0, 1)])
    predict(channels[None], "--channel", "1", imagej=True, metadata={"axes": "ZCYX"})
    np.testing.assert_allclose(tifffile.imread("out.tif"), expected(channels[1]), atol=1e-6)


@cases("shape, tile", ((150, 203), 112), ((97, 260), 128))
def test_tiles_equal_the_whole_image_where_the_halo_covers_the_receptive_field(shape, tile):
    network, section = network_of(seed=1), section_of(*shape, seed=1)
    halo = tiling.round_up(RADIUS, 4)

    def predicted(side):
        return prediction.section_predictor(network, NORMALISATION, tile=side, overlap=halo)(section)

    tiled, whole = predicted(tile), predicted(512)
    assert whole.std() > 0.05, "a constant would prove nothing"
    np.testing.assert_allclose(tiled, whole, atol=1e-5)
    rows, columns = (size // 4 * 4 for size in shape)
    plain = np.asarray(network(NORMALISATION(section)[None, :rows, :columns, None]))[0]
    inner = slice(RADIUS, -RADIUS)
    np.testing.assert_allclose(tiled[:rows, :columns][inner, inner], plain[inner, inner], atol=1e-5)


def test_the_engine_is_a_flag_and_says_what_it_is(predict):
    section = section_of(100, 90)
    for engine in ("keras", "openvino"):
        if engine == "openvino" and importlib.util.find_spec("openvino") is None:
            pytest.skip("needs OpenVINO: pip install -r requirements-openvino.txt")
        done = predict(section[None], "--engine", engine, "--force")
        assert f"engine: {engine}" in done.err.splitlines()[0]
        np.testing.assert_allclose(tifffile.imread("out.tif"), expected(section), atol=1e-4)


def test_tile_overlap_and_batch_are_flags(predict, monkeypatch, tmp_path):
    section, given, real = section_of(150, 203), [], keras.Model.predict_on_batch
    monkeypatch.setattr(keras.Model, "predict_on_batch", lambda self, x: given.append(x.shape) or real(self, x))
    done = predict(section[None], "--overlap", "3", code=2)
    assert done.err.splitlines()[-1].startswith("dilatedUnet.py: --overlap must be a non-negative multiple of 4")
    assert [path.name for path in tmp_path.iterdir()] == ["stack.tif"]
    done = predict(section[None], "--tile", "112", "--overlap", "36", "--batch_size", "3")
    assert "halo 36" in done.err
    assert {shape[0] for shape in given} == {3}
    assert max(max(shape[1:3]) for shape in given) <= 112
    np.testing.assert_allclose(tifffile.imread("out.tif"), expected(section, tile=112, overlap=36), atol=1e-4)


@cases(
    "flags, words",
    ("--output x.tif --resume", "--scheduler and --workers go with an --output of .zarr. Received: x.tif"),
    ("--output x.zarr --threshold 0.5", "--threshold and --segment go with a TIFF"),
    ("--output x.zarr --segment", "--threshold and --segment go with a TIFF"),
    ("--output x.zarr --rescale", "--rescale goes with a TIFF --output. Received: x.zarr"),
    ("--output x.zarr --resume --force", "choose one"),
    ("--output x.zarr --scheduler tcp://127.0.0.1:1 --workers 2", "--workers is of no use with --scheduler"),
    ("--output x.zarr --weight_path a b", "--weight_path must be one for an --output of .zarr. Received: 2"),
    ("--output x.zarr --image_path synthetic", "--image_path must be a file or folder, which workers can read"),
)
def test_flags_that_contradict_each_other_are_refused(refuses, weights, monkeypatch, tmp_path, flags, words):
    monkeypatch.setattr(data, "_painted", lambda *_: (section_of(16, 16)[None],) * 2)
    refuses(words, "predict", "--image_path", ROOT / "weights", "--weight_path", weights, *flags.split())
    assert not list(tmp_path.glob("x.*"))


@pytest.fixture
def trained_at_4_nm(call, copied):
    """`predict`, with a network trained on pixels of 4 x 4 nm, on a section with pixels of so many nm."""
    record = json.loads((copied / "net.json").read_text()) | {"data": {"voxel_nm": [50, 4, 4]}}
    (copied / "net.json").write_text(json.dumps(record))

    def run(section, nm, *words):
        size = {"resolution": [1e3 / side for side in nm[::-1]], "metadata": {"axes": "YX", "unit": "um"}} if nm else {}
        tifffile.imwrite("stack.tif", section.astype(np.uint8), imagej=True, **size)
        files = ("--weight_path", copied / "net.weights", "--image_path", "stack.tif", "--output", "out.tif")
        return call("predict", *files, *FLOAT32, "--force", *words)

    return run


def test_rescaled_a_section_is_seen_as_in_training_and_comes_back_in_its_own_size(trained_at_4_nm):
    def halved(array):
        return array.reshape(64, 2, 96).mean(axis=1)

    fine = section_of(128, 96)
    wanted, away = halved(expected(fine)), {}
    for words, said in (((), "warning: pixels are 8 x 4 nm"), (("--rescale",), "resampled to 128 x 96 px and back")):
        assert said in trained_at_4_nm(halved(fine), (8, 4), *words).err
        with data.iter_sections("out.tif") as found:
            assert found.voxel_nm == pytest.approx((None, 8, 4))
            away[words] = np.abs(found[0] - wanted).mean()
    assert away["--rescale",] < away[()] / 2
    assert trained_at_4_nm(halved(fine), (8, 4), "--rescale", "--segment").code == 0
    assert tifffile.imread("out.tif").shape == (64, 96)


@cases(
    "nm, words, code, said",
    ((4.3, 4), "--rescale", 0, "nothing is resampled"),
    (None, "--rescale", 2, "pixel size of the stack, and no file says it"),
    ((100, 4), "", 0, "warning: pixels are 100 x 4 nm, those of the training 4 x 4 nm: too far apart to resample"),
    ((100, 4), "--rescale", 2, "must change a section by at most 16 times. Received: 25 x 1"),
)
def test_other_pixel_sizes_are_said_and_refused_where_they_make_no_sense(trained_at_4_nm, nm, words, code, said):
    done = trained_at_4_nm(section_of(16, 24), nm, *words.split())
    assert (done.code, said in done.err) == (code, True), done.err


@pytest.mark.parametrize(("words", "name"), [(("--tta",), "8"), (("--tta", "4"), "4"), (("--tta", "7"), "7")])
def test_tta_is_the_mean_over_turned_and_mirrored_versions(predict, words, name):
    section, every = section_of(60, 44), []
    predict(section[None], *words)
    for turns, mirrored in tiling.TRANSFORMS[name]:
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
    second = prediction.section_predictor(network_of(1), other)(section)
    np.testing.assert_allclose(tifffile.imread("out.tif"), (expected(section) + second) / 2, atol=1e-6)
    assert np.abs(second - expected(section)).max() > 0.1
    records = [{"threshold": 0.75, "background": 0.1}, {"threshold": 0.25}, {}]
    assert prediction.segmentation_of(records) == {"threshold": 0.5, "background": 0.1}
    of_cells = [{"threshold": 0.5, "background": 0.3, "smallest_cell_px": 10}, RECORD | {"background": 0.5}]
    of_cells[1] |= {"threshold": 0.9, "smallest_cell_px": 80}
    found = [prediction.segmentation_of(order) for order in (of_cells, of_cells[::-1])]
    assert all((one["background"], one["smallest_cell_px"], one["threshold"]) == (0.4, 45, 0.7) for one in found)


def test_cells_keep_their_size_when_pixels_do_not_and_a_low_threshold_finds_faint_ones():
    cells = np.zeros((1, 40, 40), np.float32)
    cells[0, 5:11, 5:11], cells[0, 22:28, 22:28] = 0.9, 0.4
    record = {"threshold": 0.5, "background": 0.5, "smallest_cell_px": 200}
    record = prediction.at_size(record, (40, 40), (160, 160))  # 36 px of these are 576 of the training
    assert record["smallest_cell_px"] == 12
    assert prediction.at_size({"threshold": 0.5}, (40, 40), (160, 160)) == {"threshold": 0.5}
    for threshold, count in ((0.5, 1), (0.3, 2)):
        (labels,) = prediction.segment_stack(cells, record | {"threshold": threshold})
        assert labels.max() == count


def test_networks_that_do_not_go_together_are_not_averaged(refuses, weights, tmp_path):
    """Whatever their order: those of cells and of membranes, and false borders learned with different rotations."""
    tifffile.imwrite("stack.tif", section_of(60, 44)[None], photometric="minisblack")
    record = RECORD | {"network": SETTINGS, "threshold": 0.5}
    for name, more in (
        ("cells", {"background": 0.1}),
        ("four", {"merge": {"tta": "4", "threshold": 0.5}}),
        ("eight", {"merge": {"tta": "8", "threshold": 0.5}}),
    ):
        prediction.save_weights(network_of(), tmp_path / name, record | more)
        prediction.borders_file(str(tmp_path / name)).write_bytes(b"")
    flags = ("predict", "--image_path", "stack.tif", "--output", "out.tif", "--segment", *FLOAT32, "--weight_path")
    for pair in ((weights, tmp_path / "cells"), (tmp_path / "cells", weights)):
        refuses("--segment takes networks that were all trained with --instances", *flags, *pair)
    for pair in (("four", "eight"), ("eight", "four")):
        refuses("--merge takes networks that learned it with one --tta. Received: 4, 8", *flags, *pair, "--merge", 1)
        args = dilatedUnet.parse([*map(str, flags), *pair])
        records = [prediction.read_record(path) for path in pair]
        assert prediction.mergers_of(args, records, False, (1, 60, 44)) == []
        assert (args.merge, args.tta) == (0, "none")


def test_segment_says_why_false_borders_stay(weights, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, more in (("a", {"tta": "4", "threshold": 0.5}), ("b", {"tta": "8", "threshold": 0.5})):
        prediction.save_weights(network_of(), tmp_path / name, RECORD | {"network": SETTINGS, "merge": more})
        prediction.borders_file(str(tmp_path / name)).write_bytes(b"")

    def said(*words, shape=(1, 60, 44)):
        capsys.readouterr()
        args = dilatedUnet.parse(["predict", "--segment", "--image_path", "x", "--weight_path", *map(str, words)])
        records = [prediction.read_record(path) for path in args.weight_path]
        assert prediction.mergers_of(args, records, False, shape) == []
        return capsys.readouterr().err

    borders_stay = "--merge 0: false borders stay, for "
    assert said("a", "b") == f"{borders_stay}the networks learned them with different --tta (4, 8)\n"
    assert said("a", "--rescale") == f"{borders_stay}with --rescale they cannot be judged\n"
    assert said("a", shape=(1, 2**14, 2**14)) == f"{borders_stay}a section has more than {prediction.LARGE_PX} px\n"
    missing = prediction.borders_file(str(weights))
    assert said("a", weights) == f"{borders_stay}{missing} is missing, or says nothing of them\n"
    assert said(weights) == said("a", "--merge", "0") == ""


@pytest.mark.parametrize("threshold", [0.3, 0.7])
def test_a_threshold_writes_an_8_bit_mask(predict, threshold):
    sections = np.stack([section_of(40, 48, seed) for seed in range(2)])
    predict(sections, "--threshold", threshold)
    found = tifffile.imread("out.tif")
    assert found.dtype == np.uint8
    truth = np.stack([expected(section) for section in sections]) > threshold
    np.testing.assert_array_equal(found, np.where(truth, 255, 0))
    assert 0 < truth.mean() < 1


def test_segment_writes_a_label_per_cell(predict):
    from score import segments

    section = section_of(64, 72)
    predict(section[None], "--segment", "--threshold", "0.6")
    found = tifffile.imread("out.tif")
    assert found.dtype == np.uint16
    assert found.max() > 3
    assert np.array_equal(found, segments.segment(expected(section), 0.6, min_size=prediction.SMALLEST_CELL_PX))


@cases(
    "words, record, side, threshold, kind",
    ("", {"threshold": 0.8}, 8, 0.8, "uint16"),
    ("--threshold 0.3", {"threshold": 0.8}, 800, 0.3, "uint16"),
    ("", {}, 1024, 0.5, "uint32"),
)
def test_segment_takes_the_recorded_threshold_and_has_room_for_all_cells(
    monkeypatch, tmp_path, words, record, side, threshold, kind
):
    from score import segments

    asked = []
    monkeypatch.setattr(segments, "segment", lambda section, threshold, **_: asked.append(threshold) or section > 2)
    out = str(tmp_path / "out.tif")
    args = dilatedUnet.parse(["predict", "--weight_path", "w", "--segment", "--output", out, *words.split()])
    prediction.write(args, iter([np.ones((side, side), np.float32)]), record, count=1, shape=(side, side))
    assert (asked, tifffile.imread(out).dtype) == ([threshold], kind)


def test_the_training_normalisation_is_used_and_not_the_stacks_own(predict):
    section = section_of(64, 72) // 2
    results = []
    for shift in (0, 60):
        predict((section + shift)[None], "--force")
        results.append(tifffile.imread("out.tif"))
        x = (section.astype(np.float64) + shift - 120.0) / 45.0
        plain = np.asarray(network_of()(x.astype(np.float32)[None, ..., None]))[0]
        np.testing.assert_allclose(results[-1], plain, atol=1e-5)
    assert np.abs(results[0] - results[1]).max() > 0.01


def test_one_section_is_read_predicted_and_written_at_a_time(call, weights, monkeypatch):
    alive, most, written = set(), [0], []

    def read(index, rows, columns):
        section = section_of(32, 40, index)[rows, columns].copy()
        alive.add(index)
        most[0] = max(most[0], len(alive))
        weakref.finalize(section, alive.discard, index)
        return section

    stack = data.StackReader(read, (40, 32, 40), np.uint8, source="stack")
    monkeypatch.setattr(data, "resolve", lambda *_, **__: "stack")
    monkeypatch.setattr(data, "iter_sections", lambda found, **_: stack)
    monkeypatch.setattr(prediction, "write", lambda args, finished, *_, **__: written.extend(p.shape for p in finished))
    assert (call("predict", "--weight_path", weights).code, written) == (0, [(32, 40)] * 40)
    assert 1 <= most[0] <= 3


def test_the_threads_of_a_prediction_that_is_interrupted_end_with_it(call, weights, small, monkeypatch):
    """Left to the end of Python they would find its modules gone, and say so in a traceback."""

    def write(args, finished, *_, **__):
        next(iter(finished))
        kept.append(finished)
        raise KeyboardInterrupt

    kept = []  # so that nothing but the program ends them
    monkeypatch.setattr(prediction, "write", write)
    assert call("predict", "--weight_path", weights, "--image_path", small / "images.tif").code == 130
    assert len(kept) == 1
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("ahead")]


@cases("words, taken, rows", ("", "0.04", 40), ("--threshold 0.5", "0.04", 40), ("--tta 4", "0.18", 400))
def test_a_large_section_is_read_and_written_by_rows_of_tiles_where_that_is_possible(
    predict, monkeypatch, words, taken, rows
):
    """The prediction is the same, and the memory that it takes is said."""
    read, written, real, append = [], [], data.StackReader.part, writing._append
    monkeypatch.setattr(data.StackReader, "part", lambda self, i, *part: read.append(part) or real(self, i, *part))
    monkeypatch.setattr(writing, "_append", lambda file, rows, *how: written.append(rows) or append(file, rows, *how))
    section, words = section_of(400, 90), ("--tile", "112", "--overlap", "36", *words.split())
    predict(section[None], *words)
    whole, done = tifffile.imread("out.tif"), len(read)
    monkeypatch.setattr(prediction, "LARGE_PX", 1000)
    monkeypatch.setattr(data, "sha256_pixels", lambda sections: "")
    assert f"each section takes about {taken} MB of memory" in predict(section[None], *words, "--force").err
    np.testing.assert_array_equal(tifffile.imread("out.tif"), whole)
    assert max(rows.stop - rows.start for rows, _ in read[done + 1 :]) <= rows + 72
    assert max(map(len, written[1:])) == rows


def test_a_section_that_cannot_fit_into_memory_is_refused_before_it_is_predicted(predict, monkeypatch):
    monkeypatch.setattr(prediction, "LARGE_PX", 1000)
    monkeypatch.setattr(sections, "memory_limit", lambda: 10_000)
    done = predict(section_of(64, 64)[None], code=2)
    assert "the prediction of a section of 64 x 64 px would take" in done.err


def looks(dtype=np.uint8, seed=0, size=300):
    """Skewed gray values, as of membranes; the same pixels whatever the type."""
    return (255 * np.random.default_rng(seed).beta(3, 2, (2, size, size))).astype(np.uint8).astype(dtype)


def dim(dtype=np.uint8, seed=0):
    """Values that do not reach the white of their 8 bits."""
    return np.minimum(looks(seed=seed), 180).astype(dtype)


def trained_on(sections):
    percentiles = np.percentile(sections, range(1, 100)).tolist()
    kept = {"dtype": str(sections.dtype), "min": float(sections.min()), "max": float(sections.max())}
    normalisation = data.Normalisation.fit(sections).to_dict()
    return {"normalisation": normalisation, "intensity": kept | {"percentiles": percentiles}}


@cases(
    "trained, given, said, mapped",
    (looks(), looks(seed=1), "", looks(seed=1)),
    (looks(), looks(np.uint16, 1), "", looks(seed=1)),
    (looks(), looks(np.uint16, 1) * 257, "uint16 is read as the uint8", looks(seed=1)),
    (looks(), (looks(seed=1) / 255).astype(np.float32), "times 255", looks(seed=1)),
    (looks(), looks(np.float32, 1), "", looks(seed=1)),
    (looks(np.uint16) * 257, looks(seed=1), "times 257", looks(np.uint16, 1) * 257),
    ((looks() / 255).astype(np.float32), looks(seed=1), "times 0.003922", looks(seed=1) / 255),
    (dim(np.float32), dim(np.uint16, 1) * 257, "uint16 is read as the float32 of the training", dim(seed=1)),
    (dim(np.float32), (dim(seed=1) / 255).astype(np.float32), "times 255", dim(seed=1)),
    (looks(), 255 - looks(seed=1), "warning: the stack looks inverted", 255 - looks(seed=1)),
    (looks(), looks(seed=1) // 4, "warning: most gray values", looks(seed=1) // 4),
    (looks(), looks() * 0 + np.uint8(9), "warning: most gray values", looks() * 0 + np.uint8(9)),
)
def test_gray_values_are_mapped_where_that_is_certain_and_warned_about_where_not(trained, given, said, mapped):
    record, words = trained_on(trained), []
    found = intensity.normalisation_for(given, record, "training", words.append)
    expected = data.Normalisation.from_dict(record["normalisation"])(mapped)
    np.testing.assert_allclose(found(given), expected, atol=1e-5)
    assert len(words) == bool(said) + ("inverted" in said), "of which the gray values are others, too"
    assert said in "".join(words)


def test_blank_sections_at_the_ends_of_a_stack_say_nothing_about_its_gray_values():
    whole, words = looks(), []
    given = np.stack([whole[0] * 0, whole[0], whole[0] * 0])
    record = trained_on(whole)
    intensity.normalisation_for(given, record, "training", words.append)
    assert words == []
    own = intensity.normalisation_for(given, record, "own", words.append)
    assert (own.mean, own.std) == pytest.approx((whole[0].mean(), whole[0].std()))


def test_thin_lines_tell_what_the_percentiles_of_the_shipped_weights_do_not(isbi):
    record = prediction.read_record(ROOT / "weights" / "isbi2012")
    painted = data.synthetic(3, (300, 300))[0].sections
    real = data.read_stack(isbi / "test-volume.tif").sections[::10]
    for stack, contrast in ((real, 0.3), (painted, 1), (painted, 0.3)):
        for inverted in (False, True):
            given, words = stack * contrast + 90 * (1 - contrast), []
            intensity.normalisation_for(255 - given if inverted else given, record, "own", words.append)
            assert any("inverted" in said for said in words) == inverted
    sections = data.read_stack(isbi / "train-volume.tif").sections
    found, expected = record["intensity"]["percentiles"], trained_on(sections)["intensity"]["percentiles"]
    assert found == pytest.approx(expected, abs=1)
    assert record["intensity"]["dark_lines"] == intensity.dark_lines(sections[[0, 15, -1]])


def test_gray_values_beyond_all_sense_are_refused_but_with_the_stacks_own_normalisation():
    record, given, words = trained_on(looks()), looks(np.uint16, 1) * 16, []
    with pytest.raises(data.DataError, match=r"the network knows no such values \(`predict --normalise own"):
        intensity.normalisation_for(given, record, "training", words.append)
    found = intensity.normalisation_for(given, record, "own", words.append)(given)
    assert abs(found.mean()) < 1e-4
    assert abs(found.std() - 1) < 1e-4
    with pytest.raises(data.DataError, match="needs sections of more than one gray value"):
        intensity.normalisation_for(given * 0, record, "own", words.append)


def test_an_existing_output_is_replaced_with_force_only(predict):
    section = section_of(32, 40)[None]
    Path("out.tif").write_bytes(b"precious")
    assert "out.tif exists already (--force replaces it)" in predict(section, code=2).err.splitlines()[-1]
    assert Path("out.tif").read_bytes() == b"precious"
    predict(section, "--force")
    assert tifffile.imread("out.tif").shape == (32, 40)
    done = predict(section, "--output", "stack.tif", "--force", code=2)
    assert "--output must not be an input" in done.err.splitlines()[-1]
    np.testing.assert_array_equal(tifffile.imread("stack.tif"), section)


def test_a_section_that_cannot_be_read_leaves_no_output_and_a_prediction_says_what_it_is_made_of(predict, tmp_path):
    sections = np.stack([section_of(32, 40)] * 3).astype(np.float32)
    sections[2, 0, 0] = np.nan
    assert re.search(r"section 2 .*NaN", predict(sections, code=2).err.splitlines()[-1])
    assert [path.name for path in tmp_path.iterdir()] == ["stack.tif"]
    sections = np.stack([section_of(32, 40, seed) for seed in range(2)])
    metadata = {"axes": "ZYX", "unit": "um", "spacing": 0.05}
    predict(sections, "--output", "new/out.tif", imagej=True, resolution=(250, 200), metadata=metadata)
    with data.iter_sections("new/out.tif") as found:
        assert found.voxel_nm == pytest.approx((50, 5, 4))
        assert found.made_of["pixels_sha256"] == data.sha256_pixels(sections)
        assert found.made_of["weights"] == "net.weights.h5"


def test_a_prediction_of_sections_that_trained_the_network_says_which_they_are(predict, weights):
    sections = np.stack([section_of(32, 40, seed) for seed in range(4)])
    file = prediction.record_file(weights)
    record = json.loads(file.read_text()) | {"split": {"train": [0, 1], "inner": [2], "held_out": [3]}}
    for pixels, which in ((data.sha256_pixels(sections), "0-2"), ("another", None)):
        file.write_text(json.dumps(record | {"data": {"image_sha256": pixels}}))
        done = predict(sections, "--force")
        assert ("sections 0-2 of these trained the network" in done.err) is bool(which)
        assert data.read_stack("out.tif").made_of.get("trained_on") == which
    pytest.importorskip("dask")
    file.write_text(json.dumps(record | {"data": {"image_sha256": data.sha256_pixels(sections)}}))
    predict(sections, "--output", "out.zarr", "--workers", "0")
    with data.iter_sections("out.zarr") as reader:
        assert reader.made_of["trained_on"] == "0-2"


def test_a_resumed_prediction_keeps_its_precision_whatever_is_faster_here(predict, monkeypatch):
    pytest.importorskip("dask")
    to_zarr = ("--output", "out.zarr", "--workers", "0", "--precision", "auto")
    for faster, more, said in (("float32", (), "float32"), ("bfloat16", ("--resume",), "float32")):
        monkeypatch.setattr(device, "choose_precision", lambda asked, *_, f=faster: f if asked == "auto" else asked)
        assert f"precision: {said}" in predict(section_of(32, 40)[None], *to_zarr, *more).err
    other = predict(section_of(32, 40)[None], *to_zarr, "--resume", "--precision", "bfloat16", code=2)
    assert "is made of another precision" in other.err


def test_the_smallest_cell_is_in_pixels_of_the_stack(trained_at_4_nm, copied, monkeypatch):
    with_(smallest_cell_px=100)(copied / "net.json")
    seen = []
    monkeypatch.setattr(prediction, "write", lambda args, _, how, **__: seen.append(how["smallest_cell_px"]))
    for words in ((), ("--rescale",)):
        assert trained_at_4_nm(section_of(64, 96), (8, 4), "--segment", *words).code == 0
    assert seen == [100, 50]


@pytest.fixture
def with_borders(call, copied, monkeypatch):
    """`predict --segment` by a network that knows false borders; a function that is called in place of `write`."""
    with_(threshold=0.8, merge={"tta": "4", "threshold": 0.3})(copied / "net.json")
    (copied / "net.borders.npz").touch()
    tifffile.imwrite("stack.tif", section_of(32, 40))
    monkeypatch.setattr(borders, "load", lambda path: None)
    words = ("predict", "--weight_path", "net", "--image_path", "stack.tif", "--segment", *FLOAT32)

    def run(*more, write=lambda *_, **__: None, code=0):
        monkeypatch.setattr(prediction, "write", write)
        return call(*words, *more, code=code)

    return run


def test_maps_are_cut_at_their_own_threshold_and_predicted_as_their_borders_were_learned(with_borders):
    seen = []
    for more in ((), ("--merge", 0)):
        with_borders(*more, write=lambda args, _, how, **__: seen.append((args.tta, how["threshold"])))
    assert seen == [("4", 0.3), ("none", 0.8)]


def test_what_it_takes_to_judge_borders_is_said_where_it_is_much_and_refused_where_it_is_too_much(
    with_borders, monkeypatch
):
    assert "of memory" not in with_borders().err
    monkeypatch.setattr(prediction, "SAID_BYTES", 32 * 40 * 130)
    assert "each section takes about 0.22 MB of memory" in with_borders().err
    assert "of memory" not in with_borders("--merge", 0).err
    monkeypatch.setattr(sections, "memory_limit", lambda: 32 * 40 * 130)
    assert "the prediction of a section of 32 x 40 px would take" in with_borders(code=2).err


def test_every_spelling_of_a_weight_path_means_one_file_and_the_halo_of_the_study_is_the_receptive_radius():
    for name in ("x", "x.weights", "x.weights.h5", "x.h5"):
        files = prediction.weight_file(f"weights/{name}"), prediction.record_file(f"weights/{name}")
        assert files == (Path("weights/x.weights.h5"), Path("weights/x.json"))
    # 90 px, so 96; where the dilated network's 553 px would quadruple the work, less, and said
    standard = tiling.choose((2000, 2000), unet.field_from_settings({"dilate": False, "dilate_rate": 1}))
    assert (standard.halo, standard.exact) == (96, True)
    dilated = tiling.choose((2000, 2000), unet.field_from_settings({}))
    assert not dilated.exact
    assert math.prod(dilated.tile) <= tiling.MAX_TILE**2


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_weights_come_back_as_they_were_in_the_precision_of_the_prediction(weights, precision):
    network, record = prediction.load_network(weights, precision)
    for mine, theirs in zip(network.weights, network_of().weights, strict=True):
        assert np.array_equal(mine, theirs)
    assert (record["network"], network.name) == (SETTINGS, "standard_unet")
    assert network.get_layer("down1_conv1").compute_dtype == precision


def test_predicting_with_openvino_imports_no_keras(suite, weights, tmp_path):
    """In this process and in a worker, for labels and for the mean of two networks."""
    pytest.importorskip("openvino", reason="needs OpenVINO: pip install -r requirements-openvino.txt")
    for name in ("keras", "tensorflow", "jax", "torch"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not wanted')")
    tifffile.imwrite(tmp_path / "stack.tif", section_of(64, 80))
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    engine = ("--weight_path", weights, "--image_path", "stack.tif", "--engine", "openvino")
    suite("predict", *engine, "--output", "a.zarr", "--workers", "1", env=environment)
    suite("predict", *engine[:2], weights, *engine[2:], "--output", "a.tif", "--segment", "--tta", env=environment)
    assert tifffile.imread(tmp_path / "a.tif").shape == (64, 80)


@cases("gone", (outline, "Upsample"), (engines, "_is_told"))
def test_a_layer_that_only_keras_knows_is_left_to_keras(weights, monkeypatch, gone):
    pytest.importorskip("openvino", reason="needs OpenVINO: pip install -r requirements-openvino.txt")
    assert isinstance(prediction.load_network(weights, engine="auto")[0], outline.Model)
    monkeypatch.delattr(*gone) if gone[0] is outline else monkeypatch.setattr(*gone, lambda layer: False)
    assert isinstance(prediction.load_network(weights, engine="auto")[0], keras.Model)


def record_with(**changes):
    return lambda record, weights: with_(**changes)(record)


def network_with(**changes):
    return record_with(network={key: value for key, value in (SETTINGS | changes).items() if value is not None})


def bias_of(number):
    def change(record, weights):
        network = unet.build(**SETTINGS)
        network.get_layer("head_conv").bias.assign([0, number])
        network.save_weights(weights)

    return change


def elsewhere(record, weights):
    """A file whose numbers are in another one."""
    weights.rename(weights.with_name("other.h5"))
    with h5py.File(weights, "w") as file:
        file["layers"] = h5py.ExternalLink("other.h5", "layers")
    with weights.open("ab") as file:
        file.write(bytes(10**5))  # so that its size is no reason


BROKEN = "is broken, or holds weights of another architecture"


@cases(
    "spoil, words",
    (lambda record, weights: weights.unlink(), "net.weights.h5 does not exist"),
    (lambda record, weights: record.unlink(), "net.json, the record that belongs to the weights"),
    (lambda record, weights: record.write_text("{"), "net.json is no JSON file"),
    (lambda record, weights: record.write_text("[1]"), "net.json must hold a JSON object"),
    (lambda record, weights: record.write_text("[" * 10**6), "net.json is no JSON file"),
    (lambda record, weights: record.write_bytes(b"\xff\xfe"), "net.json is no JSON file"),
    (record_with(format="other 7"), "must have the format 'dilated-unet weights 1'. Received: 'other 7'"),
    (network_with(filters=[8, 13]), BROKEN),
    (network_with(filters=[8, 12, 12]), BROKEN),
    (network_with(filters=[10**4]), BROKEN),
    (network_with(filters=[10**9]), "must hold a valid filters of the network"),
    (network_with(filters=8), "must hold a valid filters of the network"),
    (network_with(dilate_rate=10**6), "must hold a valid dilate_rate of the network"),
    (network_with(dropout="much"), "must hold a valid dropout of the network"),
    (network_with(dropout=0.001), "must hold a valid dropout of the network"),
    (network_with(dilate=None), "lacks dilate of the network"),
    (network_with(batch_norm=True), "describes no network of this suite. Received: batch_norm"),
    (network_with(arch="unet2026"), "describes no network of this suite"),
    (network_with(arch="unet2015", filters=8), "lacks levels of the network"),
    (record_with(network=[1]), "describes no network of this suite"),
    (record_with(threshold="0.5"), "must hold a valid threshold of the record"),
    (record_with(background=[0.1]), "must hold a valid background of the record"),
    (record_with(smallest_cell_px=-1), "must hold a valid smallest_cell_px of the record"),
    (record_with(intensity={"dtype": "uint8"}), "must hold a valid intensity of the record"),
    (record_with(normalisation={"mean": 10**400, "std": 1, "epsilon": 0}), "normalisation must hold mean"),
    (record_with(normalisation=None), "normalisation must hold mean, std and epsilon"),
    (record_with(normalisation={"mean": 1}), "normalisation must hold mean, std and epsilon"),
    (record_with(normalisation={"mean": 1, "std": -2, "epsilon": 0}), "normalisation must hold mean"),
    (bias_of(np.nan), "net.weights.h5 holds NaN or infinite numbers, in head_conv/bias"),
    (bias_of(np.inf), "net.weights.h5 holds NaN or infinite numbers, in head_conv/bias"),
    (elsewhere, BROKEN),
    (lambda record, weights: weights.write_bytes(b""), "is broken"),
    (lambda record, weights: weights.write_bytes(b"no HDF5"), "is broken"),
    (lambda record, weights: weights.write_bytes(weights.read_bytes()[:9000]), "is broken"),
)
def test_weights_that_cannot_be_used_are_refused_in_one_sentence(refuses, copied, spoil, words):
    spoil(copied / "net.json", copied / "net.weights.h5")
    tifffile.imwrite("stack.tif", section_of(32, 40))
    refuses(words, "predict", "--weight_path", "net.weights", "--image_path", "stack.tif")
    assert not (copied / "prediction.tif").exists()


@pytest.mark.parametrize("filters", [(1,), (2, 3), (8, 16, 32)])
def test_the_room_reserved_for_weights_is_enough(tmp_path, filters):
    network = unet.build(filters=filters)
    prediction.reserve(tmp_path / "room", network)
    prediction.save_weights(network, tmp_path / "net", {})
    assert (tmp_path / "net.weights.h5").stat().st_size <= (tmp_path / "room").stat().st_size


def test_blocks_are_made_of_the_engine_that_computes_not_of_the_word_auto(predict, weights, monkeypatch):
    seen = []
    monkeypatch.setattr(prediction.blocks, "run", lambda *_, how, settings, **__: seen.append((how, settings)))
    for has in (True, False):
        monkeypatch.setattr(prediction.engines.device, "has_openvino", lambda has=has: has)
        predict(section_of(64, 72)[None], "--output", "x.zarr", "--engine", "auto")
    assert [how["engine"] for how, _ in seen] == ["auto", "auto"]
    assert [settings["engine"] for _, settings in seen] == ["openvino", "keras"]


def test_a_section_is_smoothed_before_it_shrinks_and_so_is_its_probability_on_the_way_back():
    stripes, seen = np.arange(63) % 2 * 200.0 * np.ones((63, 1)), []
    rescale.seen_at((21, 21), lambda section: seen.append(section) or section)(stripes)
    assert np.ptp(seen[0][3:-3, 3:-3]) < 20
    back = rescale.seen_at((63, 63), lambda section: np.float32(stripes))(np.zeros((21, 21)))
    assert np.ptp(back[3:-3, 3:-3]) < 20


def test_each_network_sees_its_own_pixel_size_and_an_unknown_one_is_refused():
    stack, said = data.Stack(np.zeros((1, 64, 96)), voxel_nm=(50, 8, 4)), []
    records = [{"data": {"voxel_nm": [50, y, x]}} for y, x in ((4, 4), (8, 8), (8, 4))]
    assert rescale.seen_sizes(stack, records, True, said.append) == [(128, 96), (64, 48), (64, 96)]
    words = "pixel size of the training sections, and no file says it"
    refused(words, rescale.seen_sizes, stack, [records[0], {}], True, said.append)


def test_a_network_of_bright_lines_takes_dark_ones_for_inverted_and_not_its_own():
    bright = 255 - data.synthetic(3, (300, 300))[0].sections
    record = trained_on(bright)
    record["intensity"]["dark_lines"] = intensity.dark_lines(bright)
    for given, inverted in ((bright, False), (255 - bright, True)):
        words = []
        intensity.normalisation_for(given, record, "training", words.append)
        assert any("inverted" in said for said in words) == inverted


def test_the_centres_of_the_first_the_middle_and_the_last_section_are_looked_at():
    stack = np.arange(5 * 6 * 8).reshape(5, 6, 8)
    with data.iter_sections(data.Stack(stack)) as reader:
        np.testing.assert_array_equal(intensity.sample(reader, side=4), stack[[0, 2, 4], 1:5, 2:6])
    wide = np.random.default_rng(0).integers(0, 255, (1, 512, 1024), dtype=np.uint8)
    wide[..., 256:768] //= np.indices((512, 512), np.uint8).sum(axis=0) % 8 + 1
    centre = wide[..., 256:768]
    assert intensity.dark_lines(wide) == intensity.dark_lines(centre)
    assert intensity.dark_lines(wide.swapaxes(1, 2)) == intensity.dark_lines(centre.swapaxes(1, 2))


@cases("times, more", (9, 0), (1 / 9, 0), (1, 600), (1, -600))
def test_gray_values_that_are_far_too_wide_or_narrow_or_elsewhere_are_refused_but_of_a_few_pixels(times, more):
    words = r"the network knows no such values \(`predict --normalise own"
    given, said = (looks(np.float32, 1) - 153) * times + 153 + more, []
    refused(words, intensity.normalisation_for, given, trained_on(looks()), "training", print)
    intensity.normalisation_for(given[:1, :30, :30], trained_on(looks()), "training", said.append)
    assert said[-1].startswith("warning: most gray values")
