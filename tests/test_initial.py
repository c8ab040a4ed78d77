"""Where a training starts from: weights of another run, and the time that it may take."""

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
from conftest import HOLDOUT, TINY, assert_same_run, cases, files, same_weights, strict

import data
import dilatedUnet
from network import unet
from predict import prediction
from train import initial, run


def test_a_network_starts_as_the_other_one_ended_but_for_a_head_of_other_classes(finished, capsys):
    weights = finished / "weights/x"
    theirs, record = prediction.load_network(weights)
    for classes in (2, 3):
        ours = unet.from_settings(record["network"] | {"classes": classes}, seed=5)
        before = [np.array(w) for w in ours.get_layer("head_conv").weights]
        initial.start_from(ours, weights)
        for layer in ours.layers:
            same = [
                np.array_equal(a, b) for a, b in zip(layer.weights, theirs.get_layer(layer.name).weights, strict=True)
            ]
            assert all(same) == (classes == 2 or layer.name != "head_conv"), layer.name
        kept = [np.array_equal(a, b) for a, b in zip(ours.get_layer("head_conv").weights, before, strict=True)]
        assert (all(kept), "but for head_conv" in capsys.readouterr().err) == (classes == 3, classes == 3)


@pytest.mark.parametrize(
    "flags", ["--filters 2,4", "--filters 2,3,4", "--filters 2,3 --dilate 0", "--filters 2,3 --addition 0"]
)
def test_another_network_is_refused_by_its_flags(train, refuses, finished, small, flags):
    files = ("--image_path", small / "images.tif", "--mask_path", small / "labels.tif", "--window", "32")
    said = refuses("holds another network", *files, *flags.split(), "--init_from", finished / "weights/x")
    assert "holds another network: --arch unet2017 --filters 2,3 --dilate 1 --dilate_rate 1 --addition 1." in said
    refuses("--init_from: gone.weights.h5 does not exist", *files, "--init_from", "gone")


def test_a_fine_tuned_run_has_its_own_normalisation_names_its_start_and_needs_it_once(train, finished):
    """The weights of a first update at a rate of nearly nothing are those that it started from."""
    for suffix in (".weights.h5", ".json"):
        shutil.copy(finished / f"weights/x{suffix}", f"start{suffix}")
    flags = f"{HOLDOUT} --inner_sections 0 --clr_mode none --lr 1e-12 --steps_per_epoch 1 --train_sections 0-2"
    flags += " --bn_momentum 0 --run_dir run --init_from start --epochs"
    train(f"{flags} 1")
    run, there = strict("run/run.json"), prediction.read_record("start")
    assert run["normalisation"] != there["normalisation"]
    sha256 = hashlib.sha256(Path("start.weights.h5").read_bytes()).hexdigest()
    begun = {"weights": "start", "sha256": sha256, "trained_on": prediction.sections_seen(there)}
    assert run["init_from"] == strict("run/best.json")["init_from"] == begun
    network, record = prediction.load_network("run/best")
    assert record["network"]["bn_momentum"] == 0
    theirs = prediction.load_network("start")[0]
    for layer in network.layers:
        if hasattr(layer, "kernel"):
            np.testing.assert_allclose(layer.kernel, theirs.get_layer(layer.name).kernel, atol=1e-6)
    before = files("run")
    train(f"{flags} 1 --force --filters 2,4", code=2)
    assert files("run") == before, "what is refused costs nothing"
    for path in Path.cwd().glob("start*"):
        path.unlink()
    train(f"{flags} 2 --resume")
    assert strict("run/run.json")["init_from"] == run["init_from"]
    without, _ = flags.split(" --init_from")
    said = "--init_from was start. Received: None"
    assert said in train(f"{without} --epochs 3 --resume", code=2).err
    shutil.copy("run/best.weights.h5", "other.weights.h5")
    other = flags.replace("--init_from start", "--init_from other")
    assert "--init_from was start. Received: other" in train(f"{other} 3 --resume", code=2).err
    shutil.copy(finished / "weights/x.weights.h5", "other.weights.h5")
    train(f"{other} 3 --resume")


def test_the_weights_that_a_run_starts_from_are_never_its_own_output(train):
    train(f"{HOLDOUT} --epochs 1 --run_dir a --weight_path w/a")
    before = files("w")
    words = f"{HOLDOUT} --epochs 1 --run_dir b --init_from w/a --weight_path w/a --force"
    assert "--weight_path must not be an input" in train(words, code=2).err
    assert files("w") == before


@cases("asked, flags, painted", ("--threshold 0.5", (), 255), ("--segment", ("--instances",), 99))
def test_a_prediction_corrected_in_napari_is_trained_on(call, finished, small, asked, flags, painted):
    """It writes labels of 32 bits without a voxel size, and 3 or 4 sections as the colours of one picture."""
    start = finished / "weights/x"
    tifffile.imwrite("raw.tif", tifffile.imread(small / "images.tif")[:4], imagej=True, metadata={"axes": "ZYX"})
    predicted = ("--image_path", "raw.tif", "--weight_path", start, "--output", "predicted.tif", "--engine", "keras")
    assert call("predict", *predicted, *asked.split()).code == 0
    corrected = tifffile.imread("predicted.tif").astype(np.uint32)
    corrected[:, 9:30, 20:50], corrected[:, 30, 20:50] = painted, 0
    planes = {"photometric": "rgb", "planarconfig": "separate"}
    tifffile.imwrite("corrected.tif", corrected, compression="zlib", **planes)
    pair = ("--image_path", "raw.tif", "--mask_path", "corrected.tif", *flags)
    assert call("check", *pair, "--window", 32).code == 0
    train = f"{TINY} --protocol all --epochs 1 --steps_per_epoch 1 --run_dir run --init_from"
    done = call(*pair, *train.split(), start)
    assert done.code == 0, done.err
    assert strict("run/run.json")["init_from"]["weights"] == str(start)


def test_a_run_laid_out_for_minutes_is_resumed_as_it_was_laid_out(call, train, small, monkeypatch, tmp_path):
    """However long an update takes by then; and it is the run with as many epochs by hand."""
    stack = f"--image_path {small / 'images.tif'} --mask_path {small / 'labels.tif'}"
    timed = f"{stack} {TINY.removesuffix(' --epochs 2')} {HOLDOUT} --clr_mode cosine --minutes 3 --run_dir run"
    for updates, more in ((12, []), (700, ["--resume"])):
        monkeypatch.setattr(initial, "updates_in", lambda minutes, trainee, batches, n=updates: n)
        assert call(*timed.split(), *more).code == 0
    record = strict("run/run.json")
    assert (record["epochs"], record["settings"]["steps_per_epoch"]) == (6, 2)
    train(f"{HOLDOUT} --clr_mode cosine --epochs 6 --run_dir by-hand")
    assert_same_run(tmp_path / "run", tmp_path / "by-hand")
    assert same_weights(tmp_path / "run/best.weights.h5", tmp_path / "by-hand/best.weights.h5")


def test_held_out_sections_that_the_other_network_was_trained_on_are_warned_of_and_kept_in_the_record(train, finished):
    flags = f"{HOLDOUT.replace('8-9', '4-5')} --epochs 1 --init_from {finished / 'weights/x'} --run_dir run"
    assert "was trained on sections 4-5, which are held out here: their scores mean nothing" in train(flags).err
    assert strict("run/run.json")["init_from"]["held_out_seen"] == [4, 5]
    again = flags.replace(f"{finished / 'weights/x'} --run_dir run", "run/best --run_dir again")
    assert "was trained on sections 4-5" in train(again).err, "by the network before that one"
    assert strict("again/run.json")["init_from"]["held_out_seen"] == [4, 5]
    record = strict(finished / "weights/x.json")
    stack = data.read_stack(finished / "images.tif")
    for held_out, images, seen in (
        ((4, 5, 8), stack, [4, 5]), ((8, 9), stack, []), ((4, 5), replace(stack, sections=stack.sections[::-1]), [])
    ):  # fmt: skip
        assert (
            initial.seen_before(record, SimpleNamespace(images=images, split=SimpleNamespace(held_out=held_out)))
            == seen
        )


def test_the_flags_of_another_network_can_be_typed():
    for words in (
        "--arch resunet --filters 4,8",
        "--arch unet2015 --filters 4 --depth 2 --padding same --batch_norm",
        "--arch unet2015 --filters 4 --depth 2 --padding valid",
        "--arch unet2017 --filters 4,8 --dilate 1 --dilate_rate 2 --addition 0",
    ):
        assert initial._flags(run.network_settings(dilatedUnet.parse(words.split()))) == words


def test_the_updates_of_some_minutes_follow_from_the_time_of_an_update(monkeypatch):
    clock = iter([0.0, 8.0])  # four updates took 8 s
    monkeypatch.setattr(initial.time, "monotonic", lambda: next(clock))
    made = []

    class Trainee:
        def train_on_batch(self, batch):
            made.append(batch)

    assert initial.updates_in(10, Trainee(), iter((n,) for n in range(99))) == int(0.9 * 600 / 2)
    assert len(made) == 6
