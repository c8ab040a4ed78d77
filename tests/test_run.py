"""A training run, whole: what it writes, exact resume, splits that do not leak, what goes wrong."""

import contextlib
import itertools
import json
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tifffile
from conftest import (
    FINISHED,
    HOLDOUT,
    ROOT,
    TINY,
    arrays,
    assert_same_run,
    cases,
    files,
    history,
    same_weights,
    strict,
    with_,
)

import clr_callback
import data
import dilatedUnet
from files import atomic, shell
from network import device, distribution, losses, unet
from predict import borders, prediction
from score import evaluation, scores
from studies.records import ran_on
from train import feed as feeds
from train import finish, recorder
from train import record as records
from train import run as training

TENSORFLOW = keras.backend.backend() == "tensorflow"


class Killed(BaseException):
    """The process dies here, as far as the files can tell."""


def test_a_run_writes_its_record_history_curves_checkpoint_and_weights_and_the_rates_of_the_pure_function(finished):
    run = {path.name for path in (finished / "runs/x").iterdir()}
    pictures = {"curves.png", "learning_rate.png", "held_out.png"}
    assert run == {"run.json", "history.csv", "checkpoint.npz", "last.weights.h5", "last.json", *pictures}
    assert {path.name for path in (finished / "weights").iterdir()} == {"x.weights.h5", "x.json"}
    for name in pictures:
        assert (finished / "runs/x" / name).read_bytes().startswith(b"\x89PNG")
    for epoch, row in enumerate(history(finished / "runs/x")):
        assert (row["epoch"], row["update"]) == (epoch + 1, 2 * epoch + 2)
        assert row["learning_rate"] == clr_callback.rate_of("triangular2", 1e-4, 1e-2, 4)(2 * epoch + 1)


def test_the_record_says_what_was_done_with_what(finished):
    record = strict(finished / "runs/x/run.json")
    images = tifffile.imread(finished / "images.tif")
    expected = {"argv": FINISHED, "seed": 7, "epochs": 3, "finished": True, "stopped_early": False}
    expected |= {
        "precision": "float32",
        "sittings": [{key: record[key] for key in (*records.PROVENANCE, "precision")} | {"from_epoch": 0}],
    }
    split = {"train": [0, 1, 2, 3, 4], "inner": [5, 6], "held_out": [8, 9], "gap": [7]}
    assert record | expected | {"split": {"protocol": "holdout"} | split} == record
    assert shlex.split(record["command"]) == ["python", "dilatedUnet.py", *record["argv"]]
    assert (record["settings"]["max_lr"], record["settings"]["patience"]) == (1e-2, 300)
    versions = (record["versions"]["keras"], record["versions"]["backend"])
    assert versions == (keras.__version__, keras.backend.backend())
    assert record["hardware"]["device"]
    assert record["normalisation"]["mean"] == pytest.approx(images[:5].mean())
    assert record["normalisation"]["std"] == pytest.approx(images[:5].std())
    assert record["data"]["image_sha256"] == data.sha256_pixels(images)
    assert record["receptive_field_px"] > 100
    assert 0 < record["training_seconds"] < 600
    rows = history(finished / "runs/x")
    assert (len(rows), {key: record["final"][key] for key in rows[-1]}) == (3, rows[-1])
    assert record["final"]["best_val_loss"] == min(row["val_loss"] for row in rows)
    assert record["held_out"]["sections"] == [8, 9]
    assert 0 <= record["held_out"]["dice"] <= 1
    assert "degenerate" in record["held_out"]


def test_the_weights_are_those_of_the_lowest_validation_loss_the_mean_over_all_windows(finished):
    rows, run = history(finished / "runs/x"), strict(finished / "runs/x/run.json")
    images, labels = (tifffile.imread(finished / name) for name in ("images.tif", "labels.tif"))
    network, record = prediction.load_network(finished / "weights/x.weights")
    assert record["after"]["val_loss"] == min(row["val_loss"] for row in rows)
    for key in ("normalisation", "intensity", "network", "data"):
        assert record[key] == run[key]
    assert record["intensity"]["percentiles"][49] == np.percentile(images[:5], 50)
    predict = prediction.section_predictor(network, data.Normalisation.from_dict(record["normalisation"]))
    best = scores.best_threshold([predict(images[i]) for i in (5, 6)], labels[5:7] // 255)
    assert record["threshold"] == best == run["threshold"]
    # recomputed from the last weights, window by window, in numpy
    images, labels = (tifffile.imread(finished / name) for name in ("images.tif", "labels.tif"))
    network, record = prediction.load_network(finished / "runs/x/last.weights")
    found = []
    for batch in np.array_split(feeds.grid((64, 80), 32, (5, 6)), 6):
        x = np.stack([images[s, r : r + 32, c : c + 32] for s, r, c in batch]).astype(np.float32)
        t = np.stack([labels[s, r : r + 32, c : c + 32] for s, r, c in batch]).astype(np.float32) / 255
        p = np.asarray(network(data.Normalisation.from_dict(record["normalisation"])(x)[..., None]))
        found.append(float(losses.bce_dice(t, p)))
    assert history(finished / "runs/x")[-1]["val_loss"] == pytest.approx(np.mean(found), rel=1e-4)


def test_the_held_out_sections_are_scored_by_the_weights_that_are_kept_not_by_the_last(train, small, monkeypatch):
    found = iter((0.5, 0.6))
    monkeypatch.setattr(training.Trainee, "validate", lambda *_: {"val_loss": next(found), "val_dice": 0.5})
    train(f"{HOLDOUT} --clr_mode none --lr 1e-2 --run_dir run")
    network, kept = prediction.load_network("run/best")
    assert kept["after"]["epoch"] == 1
    predict = prediction.section_predictor(network, data.Normalisation.from_dict(kept["normalisation"]))
    images, labels = (tifffile.imread(small / name)[8:10] for name in ("images.tif", "labels.tif"))
    scored = evaluation.score_arrays(np.stack([predict(one) for one in images]), labels // 255, ("bce",))
    assert scored["bce"] == pytest.approx(strict("run/run.json")["held_out"]["bce"], rel=1e-5)


def test_the_averages_of_the_weights_are_saved_and_the_training_keeps_its_own(train):
    train(f"{HOLDOUT} --ema 0.9 --optimizer sgd --clr_mode none --lr 0.1 --epochs 1 --run_dir run")
    held = [*arrays(Path("run/checkpoint.npz"))[0].values()]
    network, _ = prediction.load_network("run/best")
    trained, others = held[: len(network.variables)], held[len(network.variables) :]
    pairs = [pair for pair in zip(network.variables, trained, strict=True) if pair[0].name == "kernel"]
    assert any(not np.array_equal(*pair) for pair in pairs)
    for mine, _ in pairs:
        assert any(np.array_equal(mine, one) for one in others), "the average of the optimizer"


def test_the_pixel_size_is_kept_with_the_weights(train, small):
    images = tifffile.imread(small / "images.tif")
    voxel = {"resolution": (250, 125), "metadata": {"axes": "ZYX", "spacing": 0.05, "unit": "um"}}
    tifffile.imwrite("v.tif", images, imagej=True, **voxel)
    train(f"{HOLDOUT} --epochs 1 --image_path v.tif --run_dir run")
    for name in ("run", "best", "last"):
        assert strict(f"run/{name}.json")["data"]["voxel_nm"] == pytest.approx([50, 8, 4])


def test_borders_are_learned_from_sections_with_noise_as_well(train, monkeypatch):
    """Twice what the training adds to them, and 0.2."""
    levels, seen = [], []
    monkeypatch.setattr(finish, "noisy", lambda section, i, level: levels.append(level) or 255 - section)
    monkeypatch.setattr(borders, "cut", lambda interior, section: interior)
    monkeypatch.setattr(finish, "learn_borders", lambda *how: seen.extend(cut(0) for cut in how[2:]) or (None, None))
    train(f"{HOLDOUT} --merge 1 --augment all --epochs 1 --run_dir run")
    plain, noisy = seen
    assert (plain != noisy).any()
    assert levels == [pytest.approx(0.4)]


def test_a_run_says_first_what_it_runs_on_and_at_the_start_where_the_weights_will_be(finished):
    text = (finished / "stderr.txt").read_text()
    lines = [line for line in text.splitlines() if "--recipe" not in line]
    assert lines[0].startswith("device: ")
    assert "precision: float32" in lines[0]
    (said,) = [i for i, line in enumerate(lines) if "Keras 3 saves weights as .weights.h5" in line]
    (scored,) = [i for i, line in enumerate(lines) if line.startswith("sections 8-9")]
    assert said < scored
    assert "weights/x.weights.h5" in lines[said]
    assert "train on 0-4 (5), choose weights on 5-6, leave out 7, hold out 8-9" in text
    assert "6 updates = 0.75 cycles of 8 updates; WARNING: the run ends in mid-cycle" in text
    assert "\r" not in text


@pytest.mark.parametrize("gone", ["", "runs", "weights", "weights runs/x/checkpoint.npz"])
def test_a_run_and_its_weights_are_never_overwritten_without_force(again, tmp_path, gone):
    for path in map(tmp_path.joinpath, gone.split()):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = files(tmp_path)
    for flags in ("--seed 8", *(["--resume"] if "runs" in gone else [])):
        done = again(flags, code=2)
        assert " exists already (" in done.err.splitlines()[-1]
        assert "--force" in done.err.splitlines()[-1]
    assert files(tmp_path) == before


def test_force_replaces_the_run_and_several_updates_per_call_give_the_same_one(again, tmp_path, finished):
    before = files(tmp_path)
    again("--force --steps_per_execution 2")
    after = files(tmp_path)
    assert before.keys() == after.keys()
    for row, expected in zip(history(tmp_path / "runs/x"), history(finished / "runs/x"), strict=True):
        assert row == pytest.approx(expected, rel=1e-4)


def test_two_trainings_in_one_folder_or_with_one_weight_file_are_refused(again, tmp_path):
    before = files(tmp_path)
    for path in ("runs/x", "weights/x.weights.h5", "runs/x/last.weights.h5"):
        with atomic.locked(tmp_path / path):
            assert "in use by another run" in again("--force", code=2).err.splitlines()[-1]
    assert files(tmp_path) == before


@cases(
    "flags, words",
    ("--lr 2e-4", "same settings: --lr was 0.0001. Received: 0.0002"),
    ("--seed 8", "--seed was 7. Received: 8"),
    ("--filters 2,4", "--filters was [2, 3]. Received: [2, 4]"),
    ("--weight_path y --run_dir runs/x", "--weight_path was weights/x.weights.h5. Received: y.weights.h5"),
    ("--image_path other.tif", "--resume needs the same data"),
)
def test_another_setting_is_refused_by_name_on_resume(again, tmp_path, flags, words):
    tifffile.imwrite("other.tif", tifffile.imread("images.tif") ^ 1)
    before = files(tmp_path)
    done = again(f"--resume --epochs 5 {flags}", code=2)
    assert done.err.splitlines()[-1].startswith("dilatedUnet.py: --resume needs")
    assert words in done.err.splitlines()[-1]
    assert files(tmp_path) == before


def test_a_run_does_not_go_on_with_other_labels_or_another_split(again, tmp_path):
    tifffile.imwrite("other.tif", 255 - tifffile.imread("labels.tif"))
    before = files(tmp_path)
    assert "--resume needs the same data" in again("--resume --epochs 5 --mask_path other.tif", code=2).err
    assert files(tmp_path) == before
    record = strict("runs/x/run.json")
    record["split"]["train"].pop()
    Path("runs/x/run.json").write_text(json.dumps(record))
    assert "--resume needs the same split" in again("--resume --epochs 5", code=2).err


def test_a_cosine_cannot_be_given_more_epochs(train):
    words = f"{HOLDOUT} --clr_mode cosine --run_dir run --epochs"
    train(f"{words} 1")
    assert "--epochs may not change on --resume with --clr_mode cosine" in train(f"{words} 2 --resume", code=2).err


def test_an_older_run_whose_paths_are_spelled_otherwise_goes_on_and_keeps_its_scores(again, tmp_path, monkeypatch):
    """A record without a flag that came later and without sittings; the last epoch's scoring dies."""
    (tmp_path / "runs").rename(tmp_path / "moved")
    shutil.copy("images.tif", "copied.tif")
    path = tmp_path / "moved/x/run.json"
    record = strict(path)
    assert record["settings"].pop("tta") == "none"
    record["versions"]["keras"] = "3.0"
    del record["sittings"]
    path.write_text(json.dumps(record))
    flags = "--resume --epochs 4 --run_dir ./moved/x --weight_path ./weights/../weights/x --image_path ./copied.tif"
    with monkeypatch.context() as patch:
        die_at(patch, (finish, "score", 1, "before"))
        with pytest.raises(Killed):
            again(flags)
    now = strict(path)
    assert (now["finished"], now["held_out"], now["final"]["epoch"]) == (False, record["held_out"], 3)
    again(flags)
    now = strict(path)
    assert (now["finished"], now["final"]["epoch"]) == (True, 4)
    assert (now["versions"]["keras"], [one["from_epoch"] for one in now["sittings"]]) == ("3.0", [0, 3, 4])
    assert "finished after epoch 4 already; raise --epochs to go on" in again(flags).err


def test_a_folder_that_moved_with_its_weights_is_resumed_and_lost_weights_are_missed(train, tmp_path):
    train(f"{HOLDOUT} --run_dir here/r --weight_path here/r/best --epochs 1")
    (tmp_path / "here").rename(tmp_path / "there")
    flags = f"{HOLDOUT} --run_dir there/r --weight_path there/r/best --resume"
    assert "resumed after epoch 1" in train(f"{flags} --epochs 2").err
    (tmp_path / "there/r/best.weights.h5").unlink()
    assert "of the best weights so far, is gone" in train(f"{flags} --epochs 2", code=2).err


def test_a_project_that_moved_is_resumed_and_other_weights_are_not_taken(train, tmp_path, monkeypatch):
    train(f"{HOLDOUT} --run_dir {tmp_path}/a/runs/r --weight_path {tmp_path}/a/weights/r --epochs 1")
    (tmp_path / "a").rename(tmp_path / "b")
    flags = f"{HOLDOUT} --run_dir {tmp_path}/b/runs/r --resume --epochs 2 --weight_path {tmp_path}/b"
    assert "--weight_path was" in train(f"{flags}/weights/s", code=2).err
    assert "resumed after epoch 1" in train(f"{flags}/weights/r").err


def test_a_run_whose_folder_was_not_named_is_resumed_where_both_have_moved_to(train, tmp_path):
    train(f"{HOLDOUT} --weight_path weights/mine --epochs 1")
    for name in ("weights", "runs"):
        (tmp_path / "moved").mkdir(exist_ok=True)
        (tmp_path / name).rename(tmp_path / "moved" / name)
    words = f"--run_dir {tmp_path}/moved/runs/mine --weight_path {tmp_path}/moved/weights/mine"
    assert "resumed after epoch 1" in train(f"{HOLDOUT} --epochs 2 --resume {words}").err


def test_a_run_puts_no_picture_among_the_sections(train, small, tmp_path):
    """They would be sections of the next training."""
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
        for i, section in enumerate(tifffile.imread(small / f"{name}.tif")):
            tifffile.imwrite(tmp_path / name / f"s{i}.tif", section)
    words = f"{HOLDOUT} --image_path images --mask_path labels --weight_path w/x --run_dir"
    for name in ("images", "labels"):
        assert "--run_dir must not be an input, or a file in its folder" in train(f"{words} {name}", code=2).err
        assert len(list((tmp_path / name).iterdir())) == 10


def test_a_name_that_cannot_be_written_is_refused_before_the_training(train, tmp_path):
    name = 238 * "n"  # as a file's name it is short enough, but not while the file is written
    assert f"{name}.weights.h5 could not be written" in train(f"{HOLDOUT} --run_dir r --weight_path {name}", code=2).err
    assert not list((tmp_path / "r").glob("*"))


def test_a_finished_run_does_not_take_the_weights_of_another_for_its_own(again, tmp_path):
    with_(seed=5)(tmp_path / "weights/x.json")
    before = files(tmp_path)
    for words in ("--resume", "--resume --tta 4", "--resume --epochs 5"):
        assert "is of another run now: move it away" in again(words, code=2).err
    assert files(tmp_path) == before


def test_held_out_sections_without_interior_end_a_run_that_learns_borders_with_a_warning(
    train, small, tmp_path, monkeypatch
):
    monkeypatch.setattr(prediction, "section_predictor", lambda *_, **__: lambda section: np.float32(section) / 255)
    monkeypatch.setattr(borders, "ROUNDS", 2)
    labels = tifffile.imread(small / "labels.tif")
    labels[-2:] = 0
    tifffile.imwrite("m.tif", labels)
    words = "--protocol holdout --inner_sections 0 --merge 1 --epochs 1 --mask_path m.tif --run_dir r --weight_path w/x"
    assert "no section of these holds interior" in train(words).err
    record = strict(tmp_path / "r/run.json")
    assert (record["finished"], "merge" in record, "held_out_merged" in record) == (True, True, False)


def test_a_finished_run_may_learn_false_borders_or_average_otherwise_and_predict_uses_it(
    again, call, tmp_path, monkeypatch
):
    """With a network that sees bright pixels as interior, so that there are borders."""
    monkeypatch.setattr(prediction, "section_predictor", lambda *_, **__: lambda section: np.float32(section) / 255)
    monkeypatch.setattr(borders, "ROUNDS", 15)
    before = strict(tmp_path / "runs/x/run.json")
    with monkeypatch.context() as patch:
        die_at(patch, (finish, "score", 1, "before"))
        with pytest.raises(Killed):
            again("--resume --merge 1")
    says = again("--resume --merge 1").err
    now, weights = strict(tmp_path / "runs/x/run.json"), strict(tmp_path / "weights/x.json")
    assert now["final"] == before["final"]
    assert now["merge"] == weights["merge"]
    assert set(now["held_out_merged"]["curves"]) == {"v_rand", "v_info"}
    assert f"false borders taken away: v_rand {now['held_out_merged']['v_rand']:.4f}" in says
    assert "finished after epoch 3 already" in again("--resume --merge 1").err
    assert again("--resume --merge 1 --tta 4").err.count("false borders taken away") == 1
    assert strict(tmp_path / "weights/x.json")["merge"]["tta"] == "4"
    again("--resume --merge 1")

    def predict(words):
        call("predict", "--weight_path", "weights/x", "--image_path", "images.tif", "--force", *words.split())
        return tifffile.imread("prediction.tif")

    plain, maps = predict(""), predict("--merge 1")
    held_out = now["split"]["held_out"]
    truth = tifffile.imread("labels.tif")[held_out]
    assert scores.v_rand(list(maps[held_out]), list(truth)).value == pytest.approx(now["held_out_merged"]["v_rand"])
    assert (maps[held_out] != plain[held_out]).any()
    assert (predict("--segment") != predict("--segment --merge 0")).any()
    kept = (tmp_path / "weights/x.borders.npz").rename("kept.npz")
    done = call(
        "predict", "--weight_path", "weights/x", "--image_path", "images.tif", "--force", "--merge", "1", code=2
    )
    assert "--merge needs weights that were trained with --merge 1. Received: weights/x.borders.npz" in done.err
    kept.rename(tmp_path / "weights/x.borders.npz")
    monkeypatch.setattr(prediction, "section_predictor", lambda *_, **__: lambda section: np.ones(section.shape, "f4"))
    assert "no border is false in the training sections, or all are" in again("--resume --merge 1 --epochs 4").err
    now, weights = strict(tmp_path / "runs/x/run.json"), strict(tmp_path / "weights/x.json")
    assert not {"merge", "held_out_merged"} & (now.keys() | weights.keys())  # they were of the third epoch's weights
    assert not (tmp_path / "weights/x.borders.npz").exists()


def test_a_resumed_run_keeps_its_precision_whatever_is_faster_here(again, monkeypatch):
    monkeypatch.setattr(device, "choose_precision", lambda asked: "bfloat16" if asked == "auto" else asked)
    args = dilatedUnet.parse([*FINISHED, "--resume", "--precision", "auto"])
    assert training.precision_of(args, training.place_of(args)) == "float32"
    args.resume = False
    assert training.precision_of(args, training.place_of(args)) == "bfloat16"


def test_a_run_that_goes_to_another_machine_may_change_its_precision_and_says_so(again, tmp_path):
    assert "precision was float32, is bfloat16" in again("--resume --epochs 4 --precision bfloat16").err
    record = strict(tmp_path / "runs/x/run.json")
    assert [(one["precision"], one["from_epoch"]) for one in record["sittings"]] == [("float32", 0), ("bfloat16", 3)]
    device = record["hardware"]["device"]
    assert ran_on(record) == f"{device} in float32, after epoch 3 {device}"
    assert record["precision"] == "bfloat16"


@cases(
    "name, damage, words",
    ("checkpoint.npz", lambda path: path.write_bytes(path.read_bytes()[:-500]), "or a broken one"),
    ("run.json", lambda path: path.write_text("[1, 2]"), "run.json is not a run record"),
    ("run.json", with_(precision="float99"), "run.json is not a run record: its precision is float99"),
    ("run.json", Path.unlink, "--force starts anew"),
    ("../../weights/x.weights.h5", Path.unlink, "the best weights so far, is gone"),
    ("../../weights/x.json", with_(seed=5), "x.weights.h5 is of another run now"),
    ("../../weights/x.json", with_(after={"epoch": 2, "loss": 0.3}), "x.weights.h5 is of another run now"),
    ("run.json", lambda path: None, "--epochs must be at least the 3 done. Received: 2"),
)
def test_a_damaged_or_longer_run_is_not_resumed(again, tmp_path, name, damage, words):
    unfinish(tmp_path / "runs/x/run.json")
    damage(tmp_path / "runs/x" / name)
    before = files(tmp_path)
    done = again(f"--resume --epochs {2 if '--epochs' in words else 5}", code=2)
    assert words in done.err.splitlines()[-1]
    assert files(tmp_path) == before


def unfinish(path):
    path.write_text(json.dumps(strict(path) | {"finished": False}))


EXACT = f"{HOLDOUT} --augment all --lr 1e-4 --max_lr 1e-2 --step_size 3"


def die_at(monkeypatch, where):
    """Make the run die at one exact place: `where` is (object, name, which call, before or after it)."""
    thing, name, nth, when = where
    real, calls = getattr(thing, name), itertools.count(1)

    def dying(*args, **kwargs):
        last = next(calls) == nth
        if last and when == "before":
            raise Killed
        result = real(*args, **kwargs)
        if last:
            raise Killed
        return result

    monkeypatch.setattr(thing, name, dying)


def test_a_run_that_dies_at_the_worst_moments_ends_as_if_it_had_not(train, monkeypatch, tmp_path):
    """Before the first checkpoint, in mid-epoch, between weights and checkpoint, after the last epoch."""
    exact = f"{EXACT} --optimizer adam --ema 0.5 --average_warmup 1"
    train(f"{exact} --epochs 3 --run_dir whole")
    deaths = [
        (2, (recorder, "save_checkpoint", 1, "before")),
        (2, (recorder.Recorder, "on_train_batch_end", 3, "before")),
        (3, (recorder.Recorder, "save_weights", 1, "after")),
        (3, (finish, "score", 1, "before")),
    ]
    for i, (epochs, where) in enumerate(deaths):
        flags = f"{exact} --epochs {epochs} --run_dir parts {'--resume' * (i > 0)}"
        with monkeypatch.context() as patch:
            die_at(patch, where)
            with pytest.raises(Killed):
                train(flags)
    train(f"{exact} --epochs 3 --run_dir parts --resume")
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.jax
@pytest.mark.skipif(TENSORFLOW, reason="the test above says more of TensorFlow")
def test_adam_with_averaged_weights_resumes_exactly(train, monkeypatch, tmp_path):
    flags = (
        f"{HOLDOUT} --augment elastic --optimizer adam --ema 0.5 --clr_mode cosine --max_lr 1e-2 --steps_per_epoch 1 "
        "--average_warmup 1"
    )
    train(f"{flags} --run_dir whole")
    with monkeypatch.context() as patch:
        die_at(patch, (recorder.Recorder, "on_train_batch_end", 2, "after"))
        with pytest.raises(Killed):
            train(f"{flags} --run_dir parts")
    train(f"{flags} --run_dir parts --resume")
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize("lost", [False, True])
@pytest.mark.parametrize(("stop", "code"), [(KeyboardInterrupt, 130), (shell.Terminated, 143)])
def test_a_signal_keeps_the_checkpoint_and_says_how_to_go_on(capsys, monkeypatch, stop, code, lost):
    """Also where TensorFlow, which was tracing, makes another error of it."""

    def fit(*_, **__):
        if lost:
            monkeypatch.setattr(shell, "received", [stop()])
        raise TypeError("None is no number") if lost else stop

    course = SimpleNamespace(epochs=9, steps_per_epoch=2, updates=18)
    held = recorder.Recorder(records.Place(Path("run"), Path("x")), {}, course, records.Journal(rows=[{}, {}]))
    held.set_model(SimpleNamespace(fit=fit))
    held.journal.rows.append({})  # the checkpoint does not hold it yet
    args = SimpleNamespace(epochs=9, steps_per_epoch=2, force=False)
    assert training.fit(args, held, SimpleNamespace(training=lambda *_: iter([])), [], None) == code
    said = capsys.readouterr().err
    assert said.startswith("interrupted" if code == 130 else "ended by SIGTERM")
    assert "the checkpoint after epoch 2 (update 4) is in run; the same command with --resume goes on" in said


def test_after_force_the_command_that_goes_on_is_another():
    assert training.how_to_go_on(records.Place(Path("run"), Path("x")), force=True) == (
        "the checkpoint is in run; the same command with --resume in place of --force goes on from there"
    )


def wait_for_epoch(folder, epoch, process):
    """Until the checkpoint holds that many epochs; the process must still be at work."""
    for _ in range(6000):
        with contextlib.suppress(OSError, ValueError):
            if len(arrays(folder / "checkpoint.npz")[1]["rows"]) >= epoch:
                return
        assert process.poll() is None, (folder.parent / "stderr.txt").read_text()
        time.sleep(0.02)
    raise AssertionError(f"epoch {epoch} never came")


@pytest.mark.slow
@pytest.mark.skipif(not TENSORFLOW, reason="the promise of the same bits after kill -9 is TensorFlow's, on the CPU")
def test_kill_9_at_random_moments_and_sigterm_leave_no_trace(call, small, tmp_path):
    files_of = ["--image_path", small / "images.tif", "--mask_path", small / "labels.tif"]
    flags = [*files_of, *TINY.split(), *EXACT.split(), "--run_dir"]

    def start(*more):
        words = [sys.executable, ROOT / "dilatedUnet.py", *flags, *more]
        with open(tmp_path / "stderr.txt", "w") as said:
            options = {"cwd": tmp_path, "stdout": said, "stderr": said}
            return subprocess.Popen([*map(str, words)], **options)

    moments, done = random.Random(2017), 0
    for how in (signal.SIGTERM, signal.SIGKILL):
        process = start("parts", "--resume", "--epochs", 10_000)
        wait_for_epoch(tmp_path / "parts", done + moments.randint(1, 4), process)
        time.sleep(moments.random() * 0.2)
        process.send_signal(how)
        code, said = process.wait(120), (tmp_path / "stderr.txt").read_text()
        assert code == (143 if how == signal.SIGTERM else -how), said
        assert "Traceback" not in said
        done = len(arrays(tmp_path / "parts/checkpoint.npz")[1]["rows"])
    for words in (("parts", "--resume"), ("whole",)):
        call(*flags, *words, "--epochs", done + 1, code=0)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    assert not [path for path in files(tmp_path) if ".part" in path.name or path.name.endswith(".lock")]


@pytest.mark.parametrize(("mine", "others"), [(None, False), (None, True), ("bad data", True)])
def test_what_is_refused_in_one_process_ends_all(mine, others):
    def step():
        if mine:
            raise data.DataError(mine)
        return 5

    spread = distribution.Alone()
    spread.any = lambda wrong: wrong or others
    if not others:
        assert training.together(spread, step) == 5
    else:
        with pytest.raises(data.DataError, match=mine or "another process of this run was refused"):
            training.together(spread, step)


def test_protocol_all_trains_on_every_section_keeps_the_last_weights_and_scores_nothing_as_held_out(train, small):
    flags = "--protocol all --run_dir run --weight_path w/all --tta 4 --lr 1e-3 --max_lr 1e-2"
    assert "all: train on 0-9 (10), hold nothing out" in train(flags).err
    record = strict("run/run.json")
    assert record["split"] == {"train": [*range(10)], "inner": [], "held_out": [], "gap": [], "protocol": "all"}
    assert "held_out" not in record
    assert record["training_sections"]["sections"] == [0, 1, 3, 5, 6, 8]
    assert record["final"]["best_val_loss"] is None
    assert all("val_loss" not in row for row in history(Path("run")))
    assert same_weights("w/all.weights.h5", "run/last.weights.h5")
    network, kept = prediction.load_network("w/all")
    assert kept["threshold"] == record["threshold"]
    images, labels = (tifffile.imread(small / name)[[0, 1, 3, 5, 6, 8]] for name in ("images.tif", "labels.tif"))
    normalisation = data.Normalisation.from_dict(kept["normalisation"])
    for tta, equal in (("4", True), ("none", False)):  # rotations are averaged where asked for
        predict = prediction.section_predictor(network, normalisation, tta=tta)
        found = evaluation.score_arrays(np.stack([predict(one) for one in images]), labels // 255, ("bce",))["bce"]
        assert (found == pytest.approx(record["training_sections"]["bce"], rel=1e-6)) is equal


def test_held_out_and_gap_sections_touch_neither_weights_nor_normalisation_nor_history(again, finished, tmp_path):
    rng = np.random.default_rng(0)
    for name, high in (("images.tif", 256), ("labels.tif", 2)):
        stack = tifffile.imread(name)
        stack[7:] = rng.integers(0, high, stack[7:].shape) * (255 if high == 2 else 1)
        tifffile.imwrite(f"other-{name}", stack)
    again("--run_dir other --weight_path other/best --image_path other-images.tif --mask_path other-labels.tif")
    shutil.copytree(finished / "weights", tmp_path / "runs/x", dirs_exist_ok=True)
    assert_same_run(tmp_path / "other", tmp_path / "runs/x", weights=("best", "x"))
    one, two = (strict(tmp_path / name / "run.json") for name in ("other", "runs/x"))
    assert one["normalisation"] == two["normalisation"]
    assert one["data"]["image_sha256"] != two["data"]["image_sha256"]
    assert one["held_out"]["bce"] != two["held_out"]["bce"]


@cases(
    "words, train, inner, held_out",
    ("holdout --train_sections 0-2,5 --inner_sections 1", (0, 1, 2), (5,), (8, 9)),
    ("kfold --folds 5 --fold 1 --inner_sections 0", (0, 1, 4, 5, 6, 7, 8, 9), (), (2, 3)),
)
def test_sections_are_split_as_the_flags_say_and_by_default_an_eighth_chooses(words, train, inner, held_out):
    split = training.split_of(dilatedUnet.parse(["--protocol", *words.split()]), 10)
    assert (split.train, split.inner, split.held_out) == (train, inner, held_out)
    args = dilatedUnet.parse(["--protocol", "holdout"])
    for sections, chosen in ((3, 0), (4, 1), (10, 1), (16, 2), (30, 3), (100, 3)):
        assert len(training.split_of(args, sections).inner) == chosen


def test_the_program_learns(train, tmp_path):
    flags = "--optimizer adam --lr 1e-2 --clr_mode none --epochs 3 --steps_per_epoch 12 --dropout 0.1 --run_dir run"
    train(f"{HOLDOUT} {flags}")
    rows = history(tmp_path / "run")
    assert rows[-1]["loss"] < 0.85 * rows[0]["loss"]
    assert rows[-1]["dice"] > rows[0]["dice"]
    assert {row["learning_rate"] for row in rows} == {1e-2}


def test_a_network_that_learns_nothing_is_stopped_after_its_patience_and_said_to_have_learned_nothing(train, tmp_path):
    flags = f"{HOLDOUT} --clr_mode none --lr 1e-12 --epochs 9 --steps_per_epoch 1 --patience 2 --run_dir run"
    done = train(flags)
    record = strict("run/run.json")
    assert f"WARNING: {record['held_out']['degenerate']}" in done.err
    assert record["stopped_early"] is True
    assert "it stopped early" in train(f"{flags} --resume --epochs 20").err
    assert len(history(tmp_path / "run")) == 3


@cases(
    "flags, words, epochs",
    (f"{HOLDOUT} --lr 2e38", "not finite at update", 0),
    ("--protocol all --lr 1e37 --epochs 1 --steps_per_epoch 1", "prediction of section 0 is not finite", 1),
)
def test_a_run_that_diverges_even_at_its_last_update_is_no_success(train, tmp_path, flags, words, epochs):
    done = train(f"{flags} --clr_mode none --run_dir run", code=2)
    assert words in done.err.splitlines()[-1]
    assert "Traceback" not in done.err
    found, meta = arrays(tmp_path / "run/checkpoint.npz")
    assert len(meta["rows"]) == epochs
    assert all(np.isfinite(array).all() for array in found.values())
    assert strict("run/run.json")["finished"] is False
    assert not [*tmp_path.glob("run/best*"), *tmp_path.glob("run/last*")]


def test_the_preview_draws_what_the_network_will_see_and_trains_nothing(train, tmp_path):
    seen = Path("pictures/seen.png")
    train(f"{HOLDOUT} --augment all --augment_preview {seen}")
    assert seen.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["pictures"]
    assert "seen.png exists already" in train(f"--augment_preview {seen}", code=2).err
    train(f"--augment_preview {seen} --force")


@cases("flags, warned", ("--dilate 1 --window 16", True), ("--dilate 1 --window 20", False), ("--window 16", False))
def test_a_window_that_the_widest_dilation_reaches_beyond_is_warned_of(train, monkeypatch, flags, warned):
    monkeypatch.setattr(unet, "CENTRE_DILATIONS", (1, 2, 4))  # at a quarter of the resolution
    said = train(f"{HOLDOUT} --dilate 0 {flags} --augment_preview seen.png").err
    assert ("the widest dilation looks 16 px far, which windows of 16 px never show" in said) is warned


def test_the_range_test_draws_a_picture_and_suggests_a_range(train, tmp_path):
    done = train(f"{HOLDOUT} --lr_find 40 --run_dir run --optimizer adam --dropout 0")
    words = done.err.splitlines()[-1].split()
    assert words[0] == "suggested:"
    assert 1e-7 < float(words[words.index("--lr") + 1]) < float(words[words.index("--max_lr") + 1]) < 1
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["lr_find.png"]


def test_the_range_test_starts_from_the_weights_that_are_named_also_beside_a_run_that_could_go_on(train, tmp_path):
    train(f"{HOLDOUT} --epochs 1 --run_dir a --weight_path w/a")
    words = f"{HOLDOUT} --init_from w/a --run_dir b --weight_path w/b"
    train(f"{words} --epochs 1")
    assert "starts from w/a.weights.h5" in train(f"{words} --epochs 2 --resume --lr_find 40").err


def test_the_range_test_goes_on_where_single_windows_differ_and_its_advice_is_taken(train, monkeypatch):
    noise = np.random.default_rng(0).uniform(1, 13, 60) * np.r_[np.ones(30), np.linspace(1, 0.1, 30)]
    values = iter([13.4, 11.2, 6.7, 7.9, 2.0, 12.0, *noise, *[100.0] * 34])
    monkeypatch.setattr(training.Trainee, "train_on_batch", lambda *_, **__: {"loss": next(values)})
    words = "--arch unet2015 --depth 1 --filters 2 --window 44 --protocol all"
    said = train(f"{words} --lr_find 100").err.splitlines()[-1]
    rates, lines = re.findall("[0-9.]+e-[0-9]+", said), said.split(": ")[1].split(" (")[0].split(", or ")
    assert 1e-5 < float(rates[0]) < 1
    assert next(values) == 100, "it ended where the loss exploded"
    for line in lines:
        dilatedUnet.parse([*words.split(), *line.split()])


@pytest.mark.parametrize("found", [[1.0, 2.0, 3.0, 50.0], [float("nan")]])
def test_a_range_test_in_which_the_loss_never_falls_says_so(train, monkeypatch, tmp_path, found):
    values = iter(found)
    monkeypatch.setattr(training.Trainee, "train_on_batch", lambda *_, **__: {"loss": next(values)})
    assert "the loss never fell in the range test" in train("--lr_find", code=2).err
    assert not list(tmp_path.rglob("*.png"))


def test_tensorboard_shows_the_rate_of_the_last_update_and_force_removes_the_logs_of_the_old_run(train, tmp_path):
    assert hasattr(keras.callbacks.TensorBoard, "_collect_learning_rate")  # which it asks after every epoch
    assert training.TensorBoard(tmp_path)._collect_learning_rate({"learning_rate": 0.25}) == {"learning_rate": 0.25}
    train(f"{HOLDOUT} --epochs 1 --run_dir run")
    log, mine = (tmp_path / "run/tensorboard/train" / name for name in ("events.out.tfevents.1.a.2.v2", "mine.txt"))
    log.parent.mkdir(parents=True)
    for path in (log, mine):
        path.touch()
    train(f"{HOLDOUT} --epochs 1 --run_dir run --force")
    assert (log.exists(), mine.exists()) == (False, True)


def test_tensorboard_logs_are_written_or_the_missing_package_is_named(train, tmp_path, monkeypatch):
    done = train(f"{HOLDOUT} --tensorboard --epochs 1 --run_dir run", code=None)
    logs = list((tmp_path / "run").glob("tensorboard/**/events*"))
    if done.code == 0:
        assert logs
    else:
        assert done.code == 2
        assert "--tensorboard needs the package tensorboard" in done.err.splitlines()[-1]
        assert not list(tmp_path.iterdir())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/tensorboard").touch()
    done = train(f"{HOLDOUT} --tensorboard --epochs 1 --run_dir other", code=2)
    assert "tensorboard could not be written: File exists" in done.err.splitlines()[-1]


GRAY = np.random.default_rng(0).integers(0, 256, (10, 64, 80), dtype=np.uint8)


@pytest.mark.parametrize(
    ("words", "spoilt"),
    [
        ("not a TIFF", {"images": b""}),
        ("not a TIFF", {"images": b"GIF89a, or so it says"}),
        ("cut off", {"images": "cut off"}),
        ("RGB", {"images": np.zeros((10, 64, 80, 3), np.uint8)}),
        ("10 sections of 64 x 80 px. Received: 9", {"labels": GRAY[:9] // 128}),
        ("10 sections of 64 x 80 px. Received: 10 sections of 64 x 72 px", {"labels": GRAY[:, :, :72] // 128}),
        ("must hold two label values. Received up to section 0: 0, 1, 2", {"labels": GRAY % 3}),
        ("NaN", {"images": np.where(GRAY == 7, np.nan, GRAY).astype(np.float32)}),
        ("--window must fit into the sections", {"flags": "--window 72"}),
        ("too few sections", {"images": GRAY[:2], "labels": GRAY[:2] // 128,
                              "flags": "--protocol holdout --inner_sections 1"}),
        ("--val_sections must lie in 0-9. Received: 9-12", {"flags": "--protocol holdout --val_sections 9-12"}),
        ("sections must be numbers and ranges", {"flags": "--protocol holdout --val_sections last"}),
        ("--train_sections must not be held out", {"flags": "--protocol holdout --train_sections 0-9"}),
        ("--fold must be from 0 to 4. Received: 5", {"flags": "--protocol kfold --fold 5"}),
        ("augment none takes no elastic_sd_px", {"flags": "--elastic_sd_px 5"}),
        ("scale must be two numbers, smallest and largest", {"flags": "--augment all --scale 2 1"}),
        ("could not be written", {"flags": "--run_dir images.tif/run"}),
        ("could not be written", {"flags": "--weight_path /proc/nowhere/x.weights"}),
        ("must not be an input", {"flags": "--augment_preview images.tif/p.png"}),
        ("there are none beside", {"flags": "--image_path images.tif", "unlabelled": True}),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_one_sentence_and_nothing_is_written(refuses, small, tmp_path, words, spoilt):
    for name in ("images", "labels"):
        array, path = spoilt.get(name), tmp_path / f"{name}.tif"
        shutil.copy(small / path.name, tmp_path)
        if isinstance(array, str):
            path.write_bytes(path.read_bytes()[:30000])
        elif isinstance(array, bytes):
            path.write_bytes(array)
        elif array is not None:
            tifffile.imwrite(path, array, photometric="rgb" if array.shape[-1] == 3 else "minisblack")
    before = files(tmp_path)
    labels = () if "unlabelled" in spoilt else ("--mask_path", "labels.tif")
    refuses(words, "--image_path", "images.tif", *labels, *TINY.split(), *spoilt.get("flags", "").split())
    assert files(tmp_path) == before


def test_a_mask_that_is_all_background_is_a_warning_and_inverted_labels_are_turned(train, small, tmp_path):
    tifffile.imwrite("none.tif", np.zeros((10, 64, 80), np.uint8))
    words = f"{HOLDOUT} --mask_path none.tif --run_dir run --epochs 1"
    assert "warning: the mask is all background" in train(words).err
    assert strict("run/run.json")["finished"]
    tifffile.imwrite(tmp_path / "turned.tif", 255 - tifffile.imread(small / "labels.tif"))
    words = ["--image_path", str(small / "images.tif"), *TINY.split(), "--mask_path"]
    plain = training.load(dilatedUnet.parse([*words, str(small / "labels.tif")])).masks
    turned = training.load(dilatedUnet.parse([*words, str(tmp_path / "turned.tif"), "--invert_mask"])).masks
    assert np.array_equal(plain.sections, turned.sections)
    assert plain.sections.mean() > 0.5


@pytest.fixture(scope="module")
def partly(small, tmp_path_factory):
    """Labels 0/255 of which half of every section is 9, and all of sections 0 and 9."""
    labels = tifffile.imread(small / "labels.tif")
    labels[:, :, 40:], labels[[0, 9]] = 9, 9
    path = tmp_path_factory.mktemp("partly") / "labels.tif"
    tifffile.imwrite(path, labels)
    return path


def test_a_partly_labelled_stack_trains_and_is_scored_where_it_is_labelled(train, partly):
    words = f"--protocol holdout --inner_sections 1 --mask_path {partly} --ignore_label 9 --run_dir run --epochs 1"
    train(f"{words} --loss weighted")
    record = strict("run/run.json")
    assert [record["split"][part] for part in ("train", "inner", "held_out")] == [[1, 2, 3, 4, 5], [6], [7, 8]]
    assert record["data"]["labelled"] == pytest.approx(0.4)
    assert record["held_out"]["sections"] == [7, 8]


def test_without_labels_nothing_is_learned_and_nothing_validated(small, partly):
    """An update of no labelled pixel changes no weight; windows without labels do not dilute a validation."""
    words = f"--image_path {small / 'images.tif'} --mask_path {partly} --ignore_label 9 --optimizer sgd"
    args = dilatedUnet.parse([*TINY.split(), *words.split(), "--protocol", "holdout"])
    stacks = training.load(args)
    trainee = training.make_trainee(args, training.course_of(args), stacks.normalisation, "float32")
    feed = training.feed_of(args, stacks)
    before = [np.array(weight) for weight in trainee.network.trainable_variables]
    (batch,) = next(feed.training(0))
    trainee.train_on_batch(batch | {"mask": np.full_like(batch["mask"], -1)})
    assert all(map(np.array_equal, before, trainee.network.trainable_variables))
    trainee.train_on_batch(batch)
    assert not all(map(np.array_equal, before, trainee.network.trainable_variables))
    batches = feed.validation()(1)
    assert all((window >= 0).any() for one in batches for window in one["mask"])
    empty = feed.windows_at([(0, 0, 0), (9, 0, 0)])
    assert trainee.validate([*batches, empty]) == trainee.validate(batches)


@pytest.mark.slow
def test_a_published_command_trains_on_the_real_stack_and_predicts_it(call, isbi, monkeypatch, tmp_path):
    """Word for word, with fewer epochs, updates, validation windows and scored sections; their scores are cut short."""
    network = "--dilate_rate 2 --dilate 1 --weight_path weights/dilated_unet.weights --addition 1"
    words = f"--lr 0.00001 --max_lr 0.01 --epochs 500 {network}"
    monkeypatch.setattr(finish, "score", lambda truth, shown, sections, cells: {"sections": sections})
    monkeypatch.setattr(finish, "choose", lambda *_: {"threshold": 0.5})
    monkeypatch.setattr(finish, "some", lambda sections: sections[:1])
    done = call(*words.split(), "--epochs", "1", "--steps_per_epoch", "1", "--val_windows", "1", code=0)
    assert "weights: weights/dilated_unet.weights.h5 (Keras 3 saves weights as .weights.h5)" in done.err
    written = {path.name for path in (tmp_path / "weights").iterdir()}
    assert written == {"dilated_unet.json", "dilated_unet.weights.h5"}
    assert strict("weights/dilated_unet.json")["network"]["dilate"]
    tifffile.imwrite("two.tif", tifffile.imread(isbi / "test-volume.tif")[:2], photometric="minisblack")
    call("predict", "--weight_path", "weights/dilated_unet.weights", "--image_path", "two.tif", code=0)
    found = tifffile.imread("prediction.tif")
    assert (found.shape, found.dtype) == ((2, 512, 512), np.float32)
    assert 0 <= found.min() < found.max() <= 1
