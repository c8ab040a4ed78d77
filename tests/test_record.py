"""The run folder: whose files stand there, what a run remembers, what must be the same when it goes on."""

import argparse
import contextlib
import json
import math
import random
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import arrays, cases, files, refused, strict
from test_trainee import trainee

import dilatedUnet
from data import DataError
from predict import intensity, prediction
from train import record as records
from train import run as training

ROW = {"epoch": 1, "update": 2, "learning_rate": 0.1, "loss": 0.5, "dice": 0.6, "val_loss": 0.7, "val_dice": 0.8}


def place_of(*words):
    return training.place_of(dilatedUnet.parse([str(word) for word in words]))


@cases(
    "found, patience, best, stops",
    ([0.5, 0.4, 0.41, 0.3], 2, [True, True, False, True], None),
    ([0.5, 0.5, 0.5], 2, [True, False, False], 2),
    ([0.5, 0.4999, 0.4998, 0.4997], 3, [True, True, True, True], 3),  # better, but by less than 0.001
    ([0.5, 0.6, 0.7, 0.8], 0, [True, False, False, False], None),
)
def test_the_best_is_any_better_and_patience_wants_a_thousandth(found, patience, best, stops):
    journal = records.Journal()
    for epoch, (loss, expected) in enumerate(zip(found, best, strict=True)):
        assert journal.judge(loss, patience) is expected
        assert journal.stopped is (stops is not None and epoch >= stops)


def test_what_a_run_remembers_is_in_its_checkpoint_and_it_goes_on_waiting_where_it_was_killed(tmp_path):
    before = records.Journal(seconds=3.5)
    for loss in (0.5, 0.4995, 0.4991):  # better, but not by the thousandth that is waited for
        before.judge(loss, patience=3)
        before.rows.append(ROW | {"val_loss": loss})
    records.save_checkpoint(tmp_path / "c.npz", [], before)
    after = records.load_checkpoint(tmp_path / "c.npz", [])
    assert after == before
    assert not after.stopped
    assert after.judge(0.4990, patience=3)
    assert after.stopped
    records.save_checkpoint(tmp_path / "c.npz", [], records.Journal())
    assert records.load_checkpoint(tmp_path / "c.npz", []).best == math.inf


def test_a_checkpoint_holds_everything_and_that_of_another_network_or_optimizer_is_refused(finished):
    path = finished / "runs/x/checkpoint.npz"
    found, meta = arrays(path)
    names = " ".join(meta["names"])
    for words in ("kernel", "moving_variance", "seed_generator_state", "velocity", "iteration"):
        assert words in names, words
    by_name = dict(zip(meta["names"], found.values(), strict=True))
    assert next(value for name, value in by_name.items() if "iteration" in name) == 6
    assert meta["rows"][-1]["epoch"] == 3
    for words in ("--optimizer adam", "--filters 2,4", "--ema 0.9"):
        refused("belongs to another network or optimizer", records.load_checkpoint, path, trainee(words).state())


def test_a_run_that_goes_on_keeps_its_scores_its_first_provenance_and_a_list_of_its_sittings(capsys):
    old = {"versions": {"backend": "tensorflow"}, "commit": "a", "hardware": {"device": "CPU"}, "command": "one"}
    new = old | {"versions": {"backend": "jax"}, "command": "two", "precision": "float32"}
    before = old | {"finished": True, "held_out": {"dice": 0.9}, "epochs": 1, "precision": "float32"}
    found = records.continued(new | {"finished": False, "epochs": 2, "sittings": [new]}, before, epoch=1)
    assert (found["finished"], found["epochs"], found["held_out"]) == (False, 2, {"dice": 0.9})
    assert found["versions"] == {"backend": "tensorflow"}
    assert found["sittings"] == [old | {"precision": "float32", "from_epoch": 0}, new | {"from_epoch": 1}]
    assert "backend was tensorflow, is jax" in capsys.readouterr().err
    third = records.continued(new | {"sittings": [new]}, found, epoch=2)
    assert ([one["from_epoch"] for one in third["sittings"]], capsys.readouterr().err) == ([0, 1, 2], "")


def test_the_commit_is_a_commit_or_nothing(monkeypatch, tmp_path):
    def git(*words):
        subprocess.run(["git", "-C", tmp_path, "-c", "user.name=x", "-c", "user.email=x@y", *words], check=True,
                       capture_output=True)  # fmt: skip

    monkeypatch.setattr(records, "__file__", str(tmp_path / "train" / "record.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert records.commit() is None
    git("init")
    assert records.commit() is None
    for name in ("program.py", "shipped.weights.h5", "table.json"):
        (tmp_path / name).write_text("1")
    git("add", ".")
    git("commit", "-m", "x")
    (tmp_path / "table.json").write_text("2")  # a record that a run adds to is not the program
    assert len(records.commit()) == 40
    for name in ("program.py", "shipped.weights.h5"):  # --init_from may start from the latter
        (tmp_path / name).write_text("2")
        assert records.commit()[40:] == "+"
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(records, "__file__", str(tmp_path / "copy" / "train" / "record.py"))
    (tmp_path / "copy").mkdir()
    assert records.commit() is None  # the suite without its own .git, inside of another repository


def test_intensities_are_type_range_and_percentiles():
    sections = np.arange(101, dtype=np.uint16)[None, :, None].repeat(3, axis=2)
    found = records.intensity(sections)
    assert (found["dtype"], found["min"], found["max"]) == ("uint16", 0, 100)
    assert found["percentiles"] == list(range(1, 100))
    assert len(records.intensity(np.ones((2, 64, 64), np.float32), pixels=100)["percentiles"]) == 99
    assert records.intensity(sections > 50)["percentiles"][48:51] == [0, 0, 1]


@cases(
    "flags",
    "--filters 4096 --dilate_rate 64 --dropout 0.95 --classes 256 --bn_momentum 0.9999",
    "--filters 1,1,1,1,1,1,1,1 --window 256 --dilate 0 --addition 0 --dropout 0 --bn_momentum 0",
    "--arch unet2015 --filters 1 --depth 8 --padding same --batch_norm --bn_momentum 0.5 --classes 256",
)
def test_weights_of_every_network_that_flags_can_describe_are_read(tmp_path, flags):
    kept = {"format": prediction.FORMAT, "normalisation": {"mean": 0.5, "std": 0.1, "epsilon": 1e-7}}
    network = training.network_settings(dilatedUnet.parse(flags.split()))
    (tmp_path / "x.json").write_text(json.dumps(kept | {"network": network}))
    with open(tmp_path / "x.weights.h5", "wb") as file:
        file.truncate(2**32)  # as large as any
    assert prediction.read_record(tmp_path / "x")["network"] == json.loads(json.dumps(network))


CASES = 200  # of each kind
ODD = (None, True, 0, -1, 1.5, "", "x", [], {}, [None], {"": None}, 10**400, 1e308, [[]], math.nan, "9" * 500)


def spoilt(record, rng):
    """A copy in which something, anywhere, is gone, of another type or beyond all sense."""
    record = inside = json.loads(json.dumps(record))
    while True:
        key = rng.choice([*inside] if isinstance(inside, dict) else range(len(inside)))
        if not (isinstance(inside[key], dict | list) and inside[key] and rng.random() < 0.8):
            break
        inside = inside[key]
    if rng.random() < 0.3:
        del inside[key]
    else:
        inside[key] = rng.choice(ODD)
    return record


@pytest.mark.parametrize("kind", ["run record", "checkpoint", "record of weights"])
def test_a_file_that_is_damaged_anywhere_is_refused_in_a_sentence_or_read(finished, tmp_path, monkeypatch, kind):
    """Some cases, drawn once and for all; whatever is neither is a traceback for somebody."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    place = records.Place(tmp_path / "runs/x", tmp_path / "weights/x.weights.h5")
    whole, rng, read, gray = strict(place.record), random.Random(14), 0, np.arange(81, dtype=np.uint8).reshape(1, 9, 9)
    path = prediction.record_file(place.weights) if kind == "record of weights" else place.record
    good = arrays(place.checkpoint)[1] | {"seconds": 1.0, "names": []} if kind == "checkpoint" else strict(path)

    def use(found):
        if kind == "checkpoint":
            np.savez(place.checkpoint, meta=np.array(json.dumps(found)))
            return records.load_checkpoint(place.checkpoint, []).write_history(place.history)
        path.write_text(json.dumps(found))
        if kind == "record of weights":
            kept = prediction.read_record(place.weights)
            intensity.normalisation_for(gray, kept, "own", lambda _: None)
            prediction.segmentation_of([kept, kept])
            return kept["network"] == good["network"] or prediction.load_network(place.weights)
        before = records.prepare(place, whole, resume=True, force=False, inputs=(), defaults={})
        args = argparse.Namespace(epochs=3, merge=0, tta="none", minutes=None)
        return records.nothing_left(place, before, args), json.dumps(records.continued(whole, before, 2))

    for _ in range(CASES):
        with contextlib.suppress(DataError):
            use(spoilt(good, rng))
            read += 1
    assert CASES / 10 < read < CASES - CASES / 10


def test_a_run_that_was_laid_out_cannot_be_given_more_epochs_and_one_without_weights_is_not_finished(tmp_path):
    place, said = records.Place(tmp_path, tmp_path / "x.weights.h5"), []
    before = {"settings": {"clr_mode": "cosine"}, "finished": True, "epochs": 2, "stopped_early": False, "final": {}}
    args = argparse.Namespace(epochs=2, merge=0, tta="none", minutes=None)
    assert records.nothing_left(place, before, args) is None
    for path in (place.weights, prediction.record_file(place.weights)):
        path.touch()
    for mode, minutes, stopped in (
        ("none", None, False),
        ("none", 3, False),
        ("cosine", None, False),
        ("none", 3, True),
    ):
        args.minutes, before["settings"]["clr_mode"], before["stopped_early"] = minutes, mode, stopped
        said.append(records.nothing_left(place, before, args).split("; ")[1])
    more, laid_out = "raise --epochs to go on", "it was laid out for these epochs: --force trains anew"
    assert said == [more, laid_out, laid_out, "it stopped early, so more --epochs change nothing"]


@pytest.mark.parametrize("name", ["r/history.csv", "r/checkpoint.npz", "r/last.weights.h5", "r/last.json",
                                  "r/curves.png", "r/held_out.png", "w/x.weights.h5", "w/x.json"])  # fmt: skip
@pytest.mark.parametrize("resume", [False, True])
def test_somebodys_file_is_replaced_with_force_only(tmp_path, name, resume):
    place = records.Place(tmp_path / "r", tmp_path / "w/x.weights.h5")
    theirs = tmp_path / name
    theirs.parent.mkdir()
    theirs.write_text("not a run's")
    before = files(tmp_path)
    with pytest.raises(DataError, match=f"{theirs.name} exists already"):
        records.prepare(place, {}, resume=resume, force=False, inputs=(), defaults={})
    assert files(tmp_path) == before
    assert records.prepare(place, {}, resume=False, force=True, inputs=(), defaults={}) is None
    assert not files(tmp_path), "an old file beside a new run would be taken for the run's"


@cases(
    "weights, words",
    *((path, "--weight_path must not be .*the run's own") for path in ("r/run", "r/last", "link/run")),
    ("images", "--weight_path must not be .*an input"),
    ("folder", "folder.weights.h5 is a folder"),
)
def test_no_file_is_written_twice_and_none_is_an_input_even_with_force(tmp_path, weights, words):
    for name in ("r", "folder.weights.h5"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "r")
    (tmp_path / "images.json").write_text("a stack, for all that is known")
    place = place_of("--run_dir", tmp_path / "r", "--weight_path", tmp_path / weights)
    with pytest.raises(DataError, match=words):
        records.prepare(place, {}, resume=False, force=True, inputs=(str(tmp_path / "images.json"), None), defaults={})
    assert (tmp_path / "images.json").exists()


def test_a_run_folder_is_named_after_the_weights_or_the_network():
    folder = Path("runs/dilated_unet-published-0")
    assert place_of() == records.Place(folder, folder / "best.weights.h5")
    assert place_of("--weight_path", "w/x.h5") == records.Place(Path("runs/x"), Path("w/x.weights.h5"))
