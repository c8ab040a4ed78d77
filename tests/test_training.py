"""A training run, whole: what it writes, exact resume, splits that do not leak, flags that act, what goes wrong."""

import errno
import itertools
import json
import math
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tifffile
from conftest import ROOT, call_here, history, with_ctrl_c

import augment
import clr_callback
import data
import dilatedUnet
from network import device, losses, optimizers
from predict import prediction
from train import run as training

JAX = pytest.mark.jax
TENSORFLOW = keras.backend.backend() == "tensorflow"
TINY = "--filters 2,3 --window 32 --precision float32 --batch_size 2 --steps_per_epoch 2 --epochs 2"
HOLDOUT = "--protocol holdout --val_sections 8-9 --gap 1 --inner_sections 2"


class Killed(BaseException):
    """The process dies here, as far as the files can tell."""


@pytest.fixture
def train(call, small):
    """`train` on the small stack with a tiny network; later flags replace earlier ones."""

    def run(words="", *more):
        files = ("--image_path", small / "images.tif", "--mask_path", small / "labels.tif")
        return call(*files, *TINY.split(), *words.split(), *more)

    return run


@pytest.fixture
def plan(small):
    """The pieces a run is made of, without running it: arguments, stacks, split."""

    def parsed(words="", images=None):
        args = dilatedUnet.parse([*TINY.split(), *words.split()])
        return args, images, training.split_of(args, 10 if images is None else len(images))

    return parsed


def trainee(words=""):
    args = dilatedUnet.parse([*TINY.split(), *words.split()])
    return training.make_trainee(args, data.Normalisation(128.0, 40.0), device.choose_precision(args.precision))


def arrays(path):
    """What is in a checkpoint, but for the seconds it took."""
    with np.load(path, allow_pickle=False) as file:
        found = {name: file[name] for name in file.files if name != "meta"}
        meta = json.loads(str(file["meta"]))
    meta.pop("seconds")
    # Keras counts up the names it makes within one process
    meta["names"] = [re.sub(r"_[0-9]+(?=/|$)", "", name) for name in meta["names"]]
    return found, meta


def weights_in(path):
    import h5py

    found = {}
    with h5py.File(path) as file:
        file.visititems(lambda name, item: found.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None)
    assert found
    return found


def same(first, second):
    """Bit for bit, name by name."""
    assert first.keys() == second.keys()
    return all(a.dtype == second[k].dtype and a.tobytes() == second[k].tobytes() for k, a in first.items())


def assert_same_run(run, other):
    """Two run folders hold the same history, checkpoint, best and last weights, bit for bit."""
    assert (run / "history.csv").read_bytes() == (other / "history.csv").read_bytes()
    (mine, my_meta), (theirs, their_meta) = (arrays(folder / "checkpoint.npz") for folder in (run, other))
    assert my_meta == their_meta
    assert same(mine, theirs)
    for name in ("best.weights.h5", "last.weights.h5"):
        assert same(weights_in(run / name), weights_in(other / name)), name
    mine, theirs = (json.loads((folder / "best.json").read_text()) for folder in (run, other))
    assert mine["after"] == theirs["after"]


def files(folder):
    return {path: path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def strict(path):
    """JSON as the standard has it: no NaN, no Infinity."""

    def refuse(word):
        raise AssertionError(f"{path} holds {word}")

    return json.loads(Path(path).read_text(), parse_constant=refuse)


# -- a finished run ----------------------------------------------------------------------------------------------

FINISHED = (
    f"{TINY} {HOLDOUT} --augment all --epochs 3 --lr 1e-4 --max_lr 1e-2 --step_size 4 --clr_mode triangular2 --seed 7"
)


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
    """Folder of a run that ended well, and what it said."""
    folder = tmp_path_factory.mktemp("finished")
    argv = ["--image_path", "images.tif", "--mask_path", "labels.tif", *FINISHED.split()]
    for name in ("images.tif", "labels.tif"):
        shutil.copy(small / name, folder)
    here, stderr = os.getcwd(), sys.stderr
    os.chdir(folder)
    try:
        with open(folder / "stderr.txt", "w") as sys.stderr:
            assert dilatedUnet.main([*argv, "--weight_path", "weights/x.weights"]) == 0
    finally:
        os.chdir(here)
        sys.stderr = stderr
    return folder


@pytest.fixture
def again(finished, tmp_path, monkeypatch, capsys):
    """The command of the finished run in a copy of its folder, with more flags."""
    for path in finished.iterdir():
        (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)
    monkeypatch.chdir(tmp_path)
    words = ["--image_path", "images.tif", "--mask_path", "labels.tif", *FINISHED.split()]
    return lambda more="": call_here(capsys, *words, "--weight_path", "weights/x.weights", *more.split())


def test_a_run_writes_its_record_history_curves_checkpoint_and_weights(finished):
    run = {path.name for path in (finished / "runs/x").iterdir()}
    pictures = {"curves.png", "learning_rate.png", "held_out.png"}
    assert run == {"run.json", "history.csv", "checkpoint.npz", "last.weights.h5", "last.json", *pictures}
    assert {path.name for path in (finished / "weights").iterdir()} == {"x.weights.h5", "x.json"}
    for name in pictures:
        assert (finished / "runs/x" / name).read_bytes().startswith(b"\x89PNG")


def test_the_record_says_what_was_done_with_what(finished, small):
    record = strict(finished / "runs/x/run.json")
    images = tifffile.imread(small / "images.tif")
    assert record["argv"][:2] == ["--image_path", "images.tif"]
    assert shlex.split(record["command"]) == ["python", "dilatedUnet.py", *record["argv"]]
    assert record["settings"]["max_lr"] == 1e-2
    assert record["settings"]["patience"] == 300
    assert (record["seed"], record["epochs"], record["finished"], record["stopped_early"]) == (7, 3, True, False)
    assert record["versions"]["keras"] == keras.__version__
    assert record["versions"]["backend"] == keras.backend.backend()
    assert "commit" in record
    assert record["hardware"]["device"]
    assert record["precision"] == "float32"
    assert record["split"] == {
        "protocol": "holdout", "train": [0, 1, 2, 3, 4], "inner": [5, 6], "held_out": [8, 9], "gap": [7],
    }  # fmt: skip
    assert record["normalisation"]["mean"] == pytest.approx(images[:5].mean())
    assert record["normalisation"]["std"] == pytest.approx(images[:5].std())
    assert record["data"]["image_sha256"] == data.sha256_pixels(images)
    assert record["receptive_field_px"] > 100
    assert record["network"]["filters"] == [2, 3]
    assert 0 < record["training_seconds"] < 600


def test_the_record_ends_with_the_last_row_of_the_history_and_the_held_out_scores(finished):
    record, rows = strict(finished / "runs/x/run.json"), history(finished / "runs/x")
    assert len(rows) == 3
    assert {key: record["final"][key] for key in rows[-1]} == rows[-1]
    assert record["final"]["best_val_loss"] == min(row["val_loss"] for row in rows)
    assert record["held_out"]["sections"] == [8, 9]
    assert 0 <= record["held_out"]["dice"] <= 1
    assert "degenerate" in record["held_out"]


def test_the_threshold_for_cells_is_chosen_on_training_sections_and_kept_with_the_weights(finished, small):
    from score import scores

    images, labels = (tifffile.imread(small / name) for name in ("images.tif", "labels.tif"))
    network, record = prediction.load_network(finished / "weights/x.weights")
    normalisation = data.Normalisation.from_dict(record["normalisation"])
    predict = prediction.section_predictor(network, normalisation, record["network"])
    best = scores.best_threshold([predict(images[i]) for i in (5, 6)], labels[5:7] // 255)
    assert record["threshold"] == best == strict(finished / "runs/x/run.json")["threshold"]


def test_the_commit_is_a_commit_or_nothing(monkeypatch, tmp_path):
    def git(*words):
        subprocess.run(["git", "-C", tmp_path, "-c", "user.name=x", "-c", "user.email=x@y", *words], check=True,
                       capture_output=True)  # fmt: skip

    monkeypatch.setattr(training, "__file__", str(tmp_path / "train" / "run.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert training.commit() is None
    git("init")
    assert training.commit() is None
    for name in ("training.py", "table.json"):
        (tmp_path / name).write_text("1")
    git("add", ".")
    git("commit", "-m", "x")
    (tmp_path / "table.json").write_text("2")  # a record that a run adds to is not the program
    assert len(training.commit()) == 40
    (tmp_path / "training.py").write_text("2")
    assert training.commit()[40:] == "+"


def test_the_history_holds_the_rate_that_the_pure_function_gives(finished):
    for epoch, row in enumerate(history(finished / "runs/x")):
        assert (row["epoch"], row["update"]) == (epoch + 1, 2 * epoch + 2)
        assert row["learning_rate"] == clr_callback.triangular2(2 * epoch + 1, 1e-4, 1e-2, 4)


def test_the_best_weights_are_those_of_the_lowest_validation_loss(finished):
    rows, record = history(finished / "runs/x"), strict(finished / "weights/x.json")
    assert record["after"]["val_loss"] == min(row["val_loss"] for row in rows)
    assert record["format"] == prediction.FORMAT
    assert record["normalisation"] == strict(finished / "runs/x/run.json")["normalisation"]


def test_a_run_says_first_what_it_runs_on_and_at_the_start_where_the_weights_will_be(finished):
    lines = (finished / "stderr.txt").read_text().splitlines()
    assert lines[0].startswith("device: ")
    assert "precision: float32" in lines[0]
    said = [i for i, line in enumerate(lines) if "Keras 3 saves weights as .weights.h5" in line]
    scored = [i for i, line in enumerate(lines) if line.startswith("sections 8-9")]
    assert said < scored
    assert "weights/x.weights.h5" in lines[said[0]]
    assert any("train on 0-4 (5), choose weights on 5-6, leave out 7, hold out 8-9" in line for line in lines)
    assert any("6 updates = 0.75 cycles of 8 updates; WARNING: the run ends in mid-cycle" in line for line in lines)
    assert "\r" not in "".join(lines)


def test_resuming_a_finished_run_says_so_and_changes_nothing(again, tmp_path):
    before = files(tmp_path)
    done = again("--resume")
    assert done.code == 0
    assert "finished after epoch 3 already; raise --epochs to go on" in done.err
    assert files(tmp_path) == before


@pytest.mark.parametrize("gone", [[], ["runs"], ["weights"]])
def test_a_run_and_its_weights_are_never_overwritten_without_force(again, tmp_path, gone):
    for name in gone:
        shutil.rmtree(tmp_path / name)
    before = files(tmp_path)
    done = again("--seed 8")
    assert done.code == 2
    assert "exists: --resume continues the run, --force replaces it." in done.err.splitlines()[-1]
    assert files(tmp_path) == before


def test_force_replaces_the_run(again, tmp_path):
    before = files(tmp_path)
    assert again("--force --epochs 1 --seed 8").code == 0
    after = files(tmp_path)
    assert len(history(tmp_path / "runs/x")) == 1
    for name in ("weights/x.weights.h5", "weights/x.json", "runs/x/run.json", "runs/x/checkpoint.npz"):
        assert before[tmp_path / name] != after[tmp_path / name]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--lr 2e-4", "--lr was 0.0001. Received: 0.0002"),
        ("--seed 8", "--seed was 7. Received: 8"),
        ("--augment none", "--augment was all. Received: none"),
        ("--dropout 0.2", "--dropout was 0.3. Received: 0.2"),
        ("--batch_size 3", "--batch_size was 2. Received: 3"),
        ("--optimizer sgd", "--optimizer was rmsprop. Received: sgd"),
        ("--filters 2,4", "--filters was [2, 3]. Received: [2, 4]"),
        ("--gap 0", "--gap was 1. Received: 0"),
        ("--precision bfloat16", "--precision was float32. Received: bfloat16"),
    ],
)
def test_another_setting_is_refused_by_name_on_resume(again, tmp_path, flags, words):
    before = files(tmp_path)
    done = again(f"--resume --epochs 5 {flags}")
    assert done.code == 2
    assert done.err.splitlines()[-1] == f"dilatedUnet.py: --resume needs the same settings: {words}"
    assert files(tmp_path) == before


@pytest.mark.parametrize(("flags", "code"), [("", 0), ("--tta 8", 2)])
def test_a_run_older_than_a_flag_is_resumed_where_the_flag_has_its_default(again, tmp_path, flags, code):
    (path,) = tmp_path.glob("runs/*/run.json")
    record = json.loads(path.read_text())
    assert record["settings"].pop("tta") == "none"
    path.write_text(json.dumps(record))
    done = again(f"--resume --epochs 4 {flags}")
    assert done.code == code, done.err
    if code:
        assert done.err.splitlines()[-1].endswith("--tta was none. Received: 8")


def test_other_pixels_are_refused_on_resume(again, tmp_path):
    images = tifffile.imread("images.tif")
    images[0, 0, 0] ^= 1
    tifffile.imwrite("images.tif", images)
    done = again("--resume --epochs 5")
    assert done.code == 2
    assert "--resume needs the same data" in done.err.splitlines()[-1]


def damage_cut(path):
    path.write_bytes(path.read_bytes()[:-500])


def damage_text(path):
    path.write_text("not what it was")


def damage_list(path):
    path.write_text("[1, 2]")


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("checkpoint.npz", damage_cut, "checkpoint.npz is not a checkpoint, or a broken one"),
        ("checkpoint.npz", damage_text, "checkpoint.npz is not a checkpoint, or a broken one"),
        ("run.json", damage_text, "run.json is not a run record"),
        ("run.json", damage_list, "run.json is not a run record"),
        ("run.json", Path.unlink, "--force starts anew"),
    ],
)
def test_a_damaged_run_is_not_resumed(again, tmp_path, name, damage, words):
    damage(tmp_path / "runs/x" / name)
    before = files(tmp_path)
    done = again("--resume --epochs 5")
    assert done.code == 2
    assert words in done.err.splitlines()[-1]
    assert files(tmp_path) == before


def test_resume_without_a_checkpoint_does_not_replace_somebody_elses_weights(again, tmp_path):
    shutil.rmtree(tmp_path / "runs")
    before = files(tmp_path)
    done = again("--resume")
    assert done.code == 2
    assert "weights/x.weights.h5 does not belong to a run in this folder" in done.err.splitlines()[-1]
    assert files(tmp_path) == before


def test_a_checkpoint_of_another_network_or_optimizer_is_refused(finished):
    path = finished / "runs/x/checkpoint.npz"
    for words in ("--optimizer adam", "--filters 2,4", "--ema 0.9"):
        with pytest.raises(data.DataError, match="belongs to another network or optimizer"):
            training.load_checkpoint(path, trainee(words)[0].state())


def test_epochs_cannot_be_fewer_than_are_done(again, tmp_path):
    record = strict(tmp_path / "runs/x/run.json") | {"finished": False}
    (tmp_path / "runs/x/run.json").write_text(json.dumps(record))
    done = again("--resume --epochs 2")
    assert done.code == 2
    assert "--epochs must be at least the 3 done. Received: 2" in done.err.splitlines()[-1]


# -- exact resume ------------------------------------------------------------------------------------------------

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
    """Before the first checkpoint, in mid-epoch, between weights, their record and the checkpoint, after the end."""
    assert train(f"{EXACT} --epochs 4 --run_dir whole").code == 0
    deaths = [
        (2, (training, "save_checkpoint", 1, "before")),
        (2, (training.Recorder, "on_train_batch_end", 3, "before")),
        (2, (training, "score", 1, "before")),
        (2, "nothing"),
        (4, "full disk"),
        (4, (training.Recorder, "save_weights", 1, "after")),
        (4, (training.Recorder, "write_history", 1, "after")),
        (4, (training, "save_checkpoint", 1, "after")),
    ]
    for i, (epochs, where) in enumerate(deaths):
        flags = f"{EXACT} --epochs {epochs} --run_dir parts {'--resume' * (i > 0)}"
        with monkeypatch.context() as patch:
            if where == "nothing":
                assert train(flags).code == 0
                assert strict("parts/run.json")["finished"]
            elif where == "full disk":
                full_at(patch, 1)
                assert train(flags).code == 2
            else:
                die_at(patch, where)
                with pytest.raises(Killed):
                    train(flags)
    done = train(f"{EXACT} --epochs 4 --run_dir parts --resume")
    assert done.code == 0, done.err
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    assert len(history(tmp_path / "whole")) == 4


@JAX
def test_adam_with_averaged_weights_resumes_exactly(train, monkeypatch, tmp_path):
    flags = (
        f"{HOLDOUT} --augment elastic --optimizer adam --ema 0.5 --clr_mode cosine --max_lr 1e-2 --steps_per_epoch 1"
    )
    assert train(f"{flags} --run_dir whole").code == 0
    with monkeypatch.context() as patch:
        die_at(patch, (training.Recorder, "on_train_batch_end", 2, "after"))
        with pytest.raises(Killed):
            train(f"{flags} --run_dir parts")
    assert train(f"{flags} --run_dir parts --resume").code == 0
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_the_checkpoint_holds_optimizer_slots_statistics_and_dropout_keys(finished):
    found, meta = arrays(finished / "runs/x/checkpoint.npz")
    names = " ".join(meta["names"])
    for words in ("kernel", "moving_variance", "seed_generator_state", "velocity", "iteration"):
        assert words in names, words
    by_name = dict(zip(meta["names"], found.values(), strict=True))
    assert next(value for name, value in by_name.items() if "iteration" in name) == 6
    assert meta["rows"][-1]["epoch"] == 3


def test_ctrl_c_keeps_the_checkpoint_and_says_how_to_go_on(train, monkeypatch, tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training.Recorder, "validate", interrupt)
        done = train(f"{EXACT} --run_dir run")
    assert done.code == 130
    last = done.err.splitlines()[-1]
    assert last.startswith("interrupted: the checkpoint after epoch 0 (update 0) is in run;")
    assert "--resume" in last
    assert arrays(tmp_path / "run/checkpoint.npz")[1]["rows"] == []


# The command line, except that the epoch after `hold` is never begun: the process cannot end before it is killed.
HELD = """
import sys, time
import dilatedUnet, training
hold, begin = int(sys.argv.pop(1)), training.Recorder.on_epoch_begin
def on_epoch_begin(self, epoch, logs=None):
    while epoch > hold:
        time.sleep(0.1)
    return begin(self, epoch, logs)
training.Recorder.on_epoch_begin = on_epoch_begin
sys.exit(dilatedUnet.main())
"""


@pytest.fixture
def processes(small, tmp_path):
    """The command line in processes that can be killed; one with `hold` waits before epoch hold + 1 for that."""
    flags = f"{TINY} {EXACT} --epochs 24 --steps_per_epoch 3".split()
    flags += ["--image_path", small / "images.tif", "--mask_path", small / "labels.tif"]

    def start(*more, hold=None):
        program = [ROOT / "dilatedUnet.py"] if hold is None else ["-c", HELD, hold]
        words = map(str, [sys.executable, *program, *flags, *more])
        with open(tmp_path / "stderr.txt", "w") as stderr:
            return subprocess.Popen(
                list(words),
                cwd=tmp_path,
                stdout=stderr,
                stderr=stderr,
                preexec_fn=with_ctrl_c,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )

    return start


def wait_for_epoch(folder, epoch, process):
    """Until the checkpoint holds that many epochs; the process must still be at work."""
    for _ in range(6000):
        try:
            if len(arrays(folder / "checkpoint.npz")[1]["rows"]) >= epoch:
                return
        except (OSError, ValueError):
            pass
        assert process.poll() is None, (folder.parent / "stderr.txt").read_text()
        time.sleep(0.02)
    raise AssertionError(f"epoch {epoch} never came")


@pytest.mark.slow
@pytest.mark.skipif(not TENSORFLOW, reason="the promise of the same bits after kill -9 is TensorFlow's, on the CPU")
def test_kill_9_at_three_random_moments_and_ctrl_c_leave_no_trace(processes, tmp_path):
    whole = processes("--run_dir", "whole")
    assert whole.wait(300) == 0, (tmp_path / "stderr.txt").read_text()
    seed = random.SystemRandom().randrange(10**6)
    moments = random.Random(seed)
    print(f"moments drawn from seed {seed}")
    epochs = sorted(moments.sample(range(1, 20), 4))
    for epoch, how in zip(epochs, (signal.SIGKILL, signal.SIGINT, signal.SIGKILL, signal.SIGKILL), strict=True):
        process = processes("--run_dir", "parts", "--resume", hold=epoch + 3)
        wait_for_epoch(tmp_path / "parts", epoch, process)
        time.sleep(moments.random() * 0.2)
        process.send_signal(how)
        code, said = process.wait(120), (tmp_path / "stderr.txt").read_text()
        assert code == (130 if how == signal.SIGINT else -how), said
        assert "Traceback" not in said
    last = processes("--run_dir", "parts", "--resume")
    assert last.wait(300) == 0, (tmp_path / "stderr.txt").read_text()
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


# -- training on every section, and how the end is scored ----------------------------------------------------------


def test_protocol_all_trains_on_every_section_keeps_the_last_weights_and_scores_nothing_as_held_out(train):
    done = train("--protocol all --run_dir run --weight_path w/all")
    assert done.code == 0, done.err
    assert "all: train on 0-9 (10), hold nothing out" in done.err
    record = strict("run/run.json")
    assert record["split"] == {"train": [*range(10)], "inner": [], "held_out": [], "gap": [], "protocol": "all"}
    assert "held_out" not in record
    assert record["training_sections"]["sections"] == [0, 1, 3, 5, 6, 8]
    assert record["final"]["best_val_loss"] is None
    assert all("val_loss" not in row or not row["val_loss"] for row in history(Path("run")))
    network, kept = prediction.load_network("w/all"), prediction.load_network("run/last")
    for ours, last in zip(network[0].variables, kept[0].variables, strict=True):
        np.testing.assert_array_equal(ours, last)
    assert network[1]["threshold"] == record["threshold"]


def test_the_end_is_scored_with_rotations_averaged_where_asked_for(train):
    flags = f"{HOLDOUT} --lr 1e-3 --max_lr 1e-2"
    assert train(f"{flags} --run_dir plain").code == 0
    assert train(f"{flags} --run_dir rotated --tta").code == 0
    plain, rotated = strict("plain/run.json"), strict("rotated/run.json")
    assert rotated["settings"]["tta"] == "8"
    assert Path("plain/history.csv").read_text() == Path("rotated/history.csv").read_text()
    assert plain["held_out"]["bce"] != rotated["held_out"]["bce"]
    assert rotated["held_out"]["warping_error"] >= 0


# -- nothing leaks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("protocol", "unseen"),
    [
        ("--protocol holdout --val_sections 4-5 --gap 1 --inner_sections 2", [3, 4, 5, 6]),
        ("--protocol kfold --folds 5 --fold 4 --gap 1 --inner_sections 1", [7, 8, 9]),
    ],
)
def test_held_out_and_gap_sections_touch_neither_weights_nor_normalisation_nor_history(
    train, tmp_path, small, protocol, unseen
):
    images, labels = (tifffile.imread(small / name) for name in ("images.tif", "labels.tif"))
    rng = np.random.default_rng(0)
    images[unseen] = rng.integers(0, 256, images[unseen].shape, dtype=np.uint8)
    labels[unseen] = 255 * rng.integers(0, 2, labels[unseen].shape, dtype=np.uint8)
    tifffile.imwrite("other.tif", images)
    tifffile.imwrite("other_labels.tif", labels)
    flags = f"{protocol} --augment all --lr 1e-3 --max_lr 1e-2 --epochs 1"
    assert train(f"{flags} --run_dir one").code == 0
    assert train(f"{flags} --run_dir two --image_path other.tif --mask_path other_labels.tif").code == 0
    assert_same_run(tmp_path / "one", tmp_path / "two")
    one, two = (strict(tmp_path / name / "run.json") for name in ("one", "two"))
    assert one["normalisation"] == two["normalisation"]
    assert one["data"]["image_sha256"] != two["data"]["image_sha256"]
    assert one["held_out"]["bce"] != two["held_out"]["bce"]


def test_training_sections_are_named_by_a_flag(plan):
    _, _, split = plan("--protocol holdout --train_sections 0-2,5 --inner_sections 1")
    assert split.train == (0, 1, 2, 5)
    assert split.held_out == (8, 9)
    assert split.inner == (7,)
    _, _, split = plan("--protocol kfold --folds 5 --fold 1 --inner_sections 0")
    assert (split.held_out, split.inner) == ((2, 3), ())


@pytest.mark.parametrize(("sections", "inner"), [(3, 0), (4, 1), (10, 1), (16, 2), (30, 3), (100, 3)])
def test_an_eighth_of_the_sections_chooses_the_weights_by_default(sections, inner):
    args = dilatedUnet.parse(["--protocol", "holdout"])
    assert len(training.split_of(args, sections).inner) == inner


def test_validation_windows_cover_the_inner_sections(plan, small):
    args, images, split = plan(f"{HOLDOUT} --batch_size 4", tifffile.imread(small / "images.tif"))
    stacks = [data.Stack(array, None, [], "") for array in (images, images)]
    validation = training.validation_batches(args, *stacks, split)
    batches = validation(1)
    assert validation(2) is batches
    shown = np.concatenate([batch["image"] for batch in batches])
    assert [len(batch["key"]) for batch in batches] == [4, 4, 4]  # 2 sections x 2 x 3 windows of 32 px
    for section in split.inner:
        assert any((window == images[section, -32:, -32:]).all() for window in shown)
    assert training.grid((64, 80), 32, (5,)) == [
        (5, 0, 0), (5, 0, 24), (5, 0, 48), (5, 32, 0), (5, 32, 24), (5, 32, 48),
    ]  # fmt: skip


def test_a_validation_loss_is_the_mean_over_all_windows(finished, small):
    """Recomputed from the last weights, window by window, in numpy."""
    images, labels = (tifffile.imread(small / name) for name in ("images.tif", "labels.tif"))
    network, record = prediction.load_network(finished / "runs/x/last.weights")
    found = []
    for batch in np.array_split(training.grid((64, 80), 32, (5, 6)), 6):
        x = np.stack([images[s, r : r + 32, c : c + 32] for s, r, c in batch]).astype(np.float32)
        t = np.stack([labels[s, r : r + 32, c : c + 32] for s, r, c in batch]).astype(np.float32) / 255
        p = np.asarray(network(data.Normalisation.from_dict(record["normalisation"])(x)[..., None]))
        found.append(float(losses.bce_dice(t, p)))
    assert history(finished / "runs/x")[-1]["val_loss"] == pytest.approx(np.mean(found), rel=1e-4)


# -- the protocol of 2017 ----------------------------------------------------------------------------------------


def test_the_published_protocol_cuts_windows_from_two_montages_of_all_sections():
    args = dilatedUnet.parse(["--window", "16", "--batch_size", "64"])
    images = np.broadcast_to(np.arange(30, dtype=np.uint8)[:, None, None], (30, 24, 32))
    stacks = [data.Stack(array, None, [], "") for array in (images, images)]
    split = training.split_of(args, 30)
    (shown, _, _), (validated, _, _) = (
        training.windows_source(args, *stacks, split, role) for role in ("train", "validate")
    )
    assert shown.shape == (1, 6 * 24, 5 * 32)
    assert validated.shape == (1, 5 * 24, 6 * 32)
    for montage in (shown, validated):
        assert np.bincount(montage.ravel()).tolist() == [24 * 32] * 30
    assert shown[0, ::24, ::32].ravel().tolist() != validated[0, ::24, ::32].ravel().tolist()
    windows = next(training.training_batches(args, *stacks, split, 0))[0]["image"]
    assert len({section for window in windows for section in np.unique(window)}) > 20
    assert any(len(np.unique(window)) > 1 for window in windows), "windows run across the seams"
    validation = training.validation_batches(args, *stacks, split)
    first, again, second = ([batch["image"] for batch in validation(epoch)] for epoch in (1, 1, 2))
    assert sum(map(len, first)) == 30
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert any((a != b).any() for a, b in zip(first, second, strict=True)), "other windows after every epoch"


@pytest.mark.parametrize(("count", "shape"), [(30, (6, 5)), (12, (4, 3)), (9, (3, 3)), (7, (7, 1)), (1, (1, 1))])
def test_a_montage_is_as_square_as_the_count_allows(count, shape):
    assert training.montage_shape(count) == shape


def test_a_batch_is_a_function_of_seed_epoch_and_index(plan, small):
    def first(words, epoch):
        args, images, split = plan(f"--augment all {words}", tifffile.imread(small / "images.tif"))
        stacks = [data.Stack(array, None, [], "") for array in (images, images)]
        return next(training.training_batches(args, *stacks, split, epoch))[0]

    def unlike(one, two):
        return any(not np.array_equal(one[key], two[key]) for key in one)

    assert not unlike(first("--seed 3", 5), first("--seed 3", 5))
    assert unlike(first("--seed 3", 5), first("--seed 4", 5))
    assert unlike(first("--seed 3", 5), first("--seed 3", 6))


# -- learning ----------------------------------------------------------------------------------------------------


@JAX
def test_the_program_learns(train, tmp_path):
    flags = "--optimizer adam --lr 1e-2 --clr_mode none --epochs 3 --steps_per_epoch 12 --dropout 0.1 --run_dir run"
    done = train(f"{HOLDOUT} {flags}")
    assert done.code == 0, done.err
    rows = history(tmp_path / "run")
    assert rows[-1]["loss"] < 0.85 * rows[0]["loss"]
    assert rows[-1]["dice"] > rows[0]["dice"]
    assert {row["learning_rate"] for row in rows} == {1e-2}


def test_an_update_uses_the_rate_of_its_number(plan, small):
    """Two trainees that differ in the rate of update 1 alone are the same after update 0, and not after update 1."""
    found = {}
    for mode in ("none", "triangular"):
        rates = "--lr 1e-3 --max_lr 2e-3 --step_size 1" if mode == "triangular" else "--lr 1e-3"
        args, images, split = plan(f"--optimizer sgd --clr_mode {mode} {rates}",
                                   tifffile.imread(small / "images.tif"))  # fmt: skip
        made, _ = training.make_trainee(args, data.Normalisation.fit(images), "float32")
        stacks = [data.Stack(array, None, [], "") for array in (images, (images > 128).astype(np.uint8))]
        feed, found[mode] = training.training_batches(args, *stacks, split, 0), []
        for _ in range(2):
            made.train_on_batch(next(feed)[0])
            found[mode].append({v.path: np.asarray(v) for v in made.network.trainable_variables})
    steady, cyclic = found["none"], found["triangular"]
    assert all(np.array_equal(steady[0][k], cyclic[0][k]) for k in steady[0])
    assert any(not np.array_equal(steady[1][k], cyclic[1][k]) for k in steady[1])


def test_several_updates_per_execution_give_the_same_run(again, tmp_path, finished):
    assert again("--force --steps_per_execution 2").code == 0
    for row, expected in zip(history(tmp_path / "runs/x"), history(finished / "runs/x"), strict=True):
        assert row == pytest.approx(expected, rel=1e-4)


def test_early_stopping_waits_its_patience(train, tmp_path):
    flags = f"{HOLDOUT} --clr_mode none --lr 1e-12 --epochs 9 --steps_per_epoch 1 --patience 2 --run_dir run"
    assert train(flags).code == 0
    assert len(history(tmp_path / "run")) == 3
    assert strict("run/run.json")["stopped_early"] is True
    done = train(f"{flags} --resume --epochs 20")
    assert done.code == 0
    assert "it stopped early" in done.err
    assert len(history(tmp_path / "run")) == 3


@pytest.mark.parametrize(
    ("found", "patience", "best", "stops"),
    [
        ([0.5, 0.4, 0.41, 0.3], 2, [True, True, False, True], None),
        ([0.5, 0.5, 0.5], 2, [True, False, False], 2),
        ([0.5, 0.4999, 0.4998, 0.4997], 3, [True, True, True, True], 3),  # better, but by less than 0.001
        ([0.5, 0.6, 0.7, 0.8], 0, [True, False, False, False], None),
    ],
)
def test_the_best_is_any_better_and_patience_wants_a_thousandth(finished, found, patience, best, stops):
    args = dilatedUnet.parse(["--protocol", "holdout", "--patience", str(patience)])
    recorder = training.Recorder(args, finished, finished, {}, [])
    for epoch, (loss, expected) in enumerate(zip(found, best, strict=True)):
        assert recorder.is_best({"val_loss": loss}) is expected
        assert recorder.stopped is (stops is not None and epoch >= stops)


def test_early_stopping_goes_on_waiting_where_it_was_killed(tmp_path):
    """What the recorder remembers is in the checkpoint, every field of it."""
    args = dilatedUnet.parse(["--protocol", "holdout", "--patience", "3"])
    model = SimpleNamespace(state=lambda: [])
    before, after = (training.Recorder(args, tmp_path, tmp_path, {}, []) for _ in range(2))
    before.set_model(model)
    for loss in (0.5, 0.4995, 0.4991):  # better, but not by the thousandth that is waited for
        before.is_best({"val_loss": loss})
        before.rows.append({"val_loss": loss})
    before.save_checkpoint()
    after.set_model(model)
    after.restore()
    own = {"progress", "rate", "spread", "_model"}
    assert {k: v for k, v in vars(after).items() if k not in own} == {
        k: v for k, v in vars(before).items() if k not in own
    }
    assert after.is_best({"val_loss": 0.4990})
    assert after.stopped


def test_without_validation_the_last_weights_are_kept(train, tmp_path):
    assert train("--protocol holdout --inner_sections 0 --lr 1e-3 --max_lr 1e-2 --epochs 1 --run_dir run").code == 0
    assert same(weights_in(tmp_path / "run/best.weights.h5"), weights_in(tmp_path / "run/last.weights.h5"))
    assert "val_loss" not in history(tmp_path / "run")[0]
    assert strict("run/run.json")["final"]["best_val_loss"] is None


# -- what goes wrong while training ------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run_with_the_update_named(train, tmp_path):
    done = train(f"{HOLDOUT} --clr_mode none --lr 2e38 --run_dir run")
    assert done.code == 2
    last = done.err.splitlines()[-1]
    assert last.startswith("dilatedUnet.py: the loss is not finite at update 1 (learning rate 2e+38)")
    assert last.endswith("Try a lower --lr.")
    assert "Traceback" not in done.err
    found, meta = arrays(tmp_path / "run/checkpoint.npz")
    assert meta["rows"] == []
    assert all(np.isfinite(array).all() for array in found.values())


def test_a_validation_loss_that_is_not_finite_stops_the_run(train, monkeypatch, tmp_path):
    monkeypatch.setattr(training.Recorder, "validate", lambda self, epoch: {"val_loss": math.nan, "val_dice": 0.5})
    done = train(f"{HOLDOUT} --run_dir run")
    assert done.code == 2
    assert "the validation loss is not finite at update 1" in done.err.splitlines()[-1]
    assert not list(tmp_path.glob("run/best*"))


def full_at(monkeypatch, nth):
    """The disk is full in the middle of the nth checkpoint."""
    real, calls = np.savez, itertools.count(1)

    def full(file, **named):
        if next(calls) == nth:
            file.write(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file, **named)

    monkeypatch.setattr(np, "savez", full)


def test_a_full_disk_keeps_the_last_checkpoint(train, monkeypatch, tmp_path):
    full_at(monkeypatch, 3)  # the first is of epoch 0
    done = train(f"{EXACT} --epochs 3 --steps_per_epoch 1 --run_dir run")
    assert done.code == 2
    assert done.err.splitlines()[-1] == (
        "dilatedUnet.py: run/checkpoint.npz could not be written: No space left on device."
    )
    assert [row["epoch"] for row in arrays(tmp_path / "run/checkpoint.npz")[1]["rows"]] == [1]
    assert not list(tmp_path.glob("run/.*"))


def test_a_file_too_large_for_the_disk_is_one_sentence_and_exit_code_2(finished, tmp_path):
    """A real limit of the operating system, in a real process: all files stay as they were."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    before = files(tmp_path)
    limit = min((tmp_path / f"runs/x/{name}").stat().st_size for name in ("checkpoint.npz", "last.weights.h5")) // 2
    words = ["--image_path", "images.tif", "--mask_path", "labels.tif", *FINISHED.split(), "--epochs", "9", "--resume"]
    done = subprocess.run(
        [sys.executable, ROOT / "dilatedUnet.py", *words, "--weight_path", "weights/x.weights"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "could not be written" in done.stderr.splitlines()[-1]
    after = files(tmp_path)
    for name in ("checkpoint.npz", "last.weights.h5"):
        assert after[tmp_path / "runs/x" / name] == before[tmp_path / "runs/x" / name]
    assert after[tmp_path / "weights/x.weights.h5"] == before[tmp_path / "weights/x.weights.h5"]
    assert not [path for path in after if ".part" in path.name]


# -- degenerate predictions --------------------------------------------------------------------------------------


def test_a_degenerate_prediction_is_told_from_a_good_one():
    truth = np.ones((2, 10, 10), np.uint8)
    truth[:, ::5] = 0
    noise = np.random.default_rng(0).normal(0, 0.05, truth.shape)
    assert "is constant (0.700)" in training.degenerate(np.full(truth.shape, 0.7, np.float32), truth)
    always = training.degenerate(np.float32(0.7 + noise), truth)
    assert always == "Dice 0.889 is no better than 'always interior', which scores 0.889"
    assert "no better" in training.degenerate(np.float32(0.2 + noise), truth)
    assert training.degenerate(np.float32(0.8 * truth + 0.1), truth) is None


def test_a_network_that_learned_nothing_is_said_to_have_learned_nothing(train, tmp_path):
    done = train(f"{HOLDOUT} --clr_mode none --lr 1e-12 --epochs 1 --steps_per_epoch 1 --run_dir run")
    assert done.code == 0
    assert "WARNING: " in done.err
    assert strict("run/run.json")["held_out"]["degenerate"] in done.err


# -- every flag acts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "kind", "settings"),
    [
        ("", optimizers.RMSprop, {"momentum": 0.0, "use_ema": False}),
        ("--momentum 0.9", optimizers.RMSprop, {"momentum": 0.9}),
        ("--optimizer adam", keras.optimizers.Adam, {"beta_1": 0.9}),
        ("--optimizer adamax", keras.optimizers.Adamax, {}),
        ("--optimizer sgd --momentum 0.5", keras.optimizers.SGD, {"momentum": 0.5}),
        ("--ema 0.9", optimizers.RMSprop, {"use_ema": True, "ema_momentum": 0.9}),
    ],
)
def test_the_optimizer_is_the_one_asked_for(flags, kind, settings):
    optimizer = trainee(flags)[0].optimizer
    assert type(optimizer) is kind
    assert {key: getattr(optimizer, key) for key in settings} == settings


@pytest.mark.parametrize(
    ("flags", "rates"),
    [
        ("--lr 1e-3 --max_lr 5e-3 --step_size 2", [1e-3, 3e-3, 5e-3, 3e-3, 1e-3, 3e-3, 5e-3]),
        ("--lr 1e-3 --max_lr 5e-3 --step_size 2 --clr_mode triangular2", [1e-3, 3e-3, 5e-3, 3e-3, 1e-3, 2e-3, 3e-3]),
        (
            "--lr 1e-3 --max_lr 5e-3 --step_size 2 --clr_mode exp_range --clr_gamma 0.5",
            [1e-3, 2e-3, 2e-3, 1.25e-3, 1e-3],
        ),
        ("--lr 2e-3 --clr_mode none", [2e-3] * 9),
        ("--lr 1e-3 --max_lr 5e-3 --clr_mode cosine --epochs 5 --steps_per_epoch 1", [5e-3, 4.414e-3, 3e-3]),
    ],
)
def test_the_rate_of_every_update_is_the_schedules(flags, rates):
    """What the optimizer itself takes for its rate, at each number of updates done."""
    made, clr = trainee(flags)
    for update, rate in enumerate(rates):
        made.optimizer.iterations.assign(update)
        assert float(made.optimizer.learning_rate) == pytest.approx(rate, rel=1e-3)
        if clr:
            assert clr.rate(update) == pytest.approx(rate)
    assert (clr is None) == ("none" in flags or "cosine" in flags)


@pytest.mark.parametrize("name", losses.LOSSES)
def test_the_loss_is_the_one_asked_for(name):
    mask, interior = np.random.default_rng(0).random((2, 2, 8, 8)).astype(np.float32)
    found = trainee(f"--loss {name}")[0].compute_loss(y_pred=(interior, mask))
    assert float(found) == float(losses.LOSSES[name](mask, interior))


@pytest.mark.parametrize(
    ("flags", "layer", "attribute", "value"),
    [
        ("--precision float32", "down1_conv1", "compute_dtype", "float32"),
        ("--precision bfloat16", "down1_conv1", "compute_dtype", "bfloat16"),
        ("--classes 3", "head_conv", "filters", 3),
        ("--filters 5,7", "down2_conv1", "filters", 7),
        ("--dropout 0", "down1_bn1", "rate", 0.0),
        ("--dropout 0.5", "down1_drop", "rate", 0.5),
        ("--dilate 1", "centre_conv3", "dilation_rate", (4, 4)),
        ("--dilate 0", "centre_conv3", "dilation_rate", (1, 1)),
        ("--dilate_rate 2", "down1_conv2", "dilation_rate", (2, 2)),
    ],
)
def test_the_network_is_the_one_asked_for(flags, layer, attribute, value):
    network = trainee(flags)[0].network
    assert getattr(network.get_layer(layer), attribute) == value


def test_addition_and_seed_change_the_network():
    assert [layer.name for layer in trainee("--addition 0")[0].network.layers].count("centre_sum") == 0
    one, two, three = (trainee(f"--seed {seed}")[0].network.get_layer("down1_conv1").kernel for seed in (1, 1, 2))
    assert np.array_equal(one, two)
    assert not np.array_equal(one, three)


@pytest.mark.parametrize(
    ("has", "speedup", "expected"),
    [("avx512_bf16", 1.6, "bfloat16"), ("avx512_bf16", 0.8, "float32"), ("none", 1.6, "float32")],
)
def test_automatic_precision_is_bfloat16_where_the_processor_is_faster_with_it(monkeypatch, has, speedup, expected):
    monkeypatch.setattr(device, "accelerator", lambda: None)
    monkeypatch.setattr(device, "_cpu_field", lambda field: f"fpu {has} sse")
    monkeypatch.setattr(device, "_speedup_of_bfloat16", lambda: speedup)
    assert device.choose_precision("auto") == (expected if TENSORFLOW else "float32")
    assert device.choose_precision("float32") == "float32"


def test_a_resumed_run_keeps_its_precision_whatever_is_faster_here(train, monkeypatch):
    for epochs, faster in (("1", "float32"), ("2 --resume", "bfloat16")):
        monkeypatch.setattr(device, "choose_precision", lambda asked, faster=faster: faster)
        done = train(f"{HOLDOUT} --run_dir run --precision auto --epochs {epochs}")
        assert done.code == 0, done.err
    assert strict("run/run.json")["precision"] == "float32"


@pytest.mark.parametrize(
    ("asked", "gpu", "expected"), [(None, None, 1), (5, None, 5), (None, "a GPU", 10), (2, "a GPU", 2)]
)
def test_an_accelerator_gets_several_updates_per_call(monkeypatch, asked, gpu, expected):
    monkeypatch.setattr(device, "accelerator", lambda: gpu)
    assert device.steps_per_execution(asked, 20) == expected


@pytest.mark.parametrize(
    ("flags", "field", "value"),
    [
        ("--augment affine", "max_rotation_deg", 180.0),
        ("--augment elastic", "elastic_sd_px", 10.0),
        ("--augment all --elastic_grid 5", "elastic_grid", 5),
        ("--augment all --elastic_sd_px 4", "elastic_sd_px", 4.0),
        ("--augment all --max_rotation_deg 15", "max_rotation_deg", 15.0),
        ("--augment all --max_shear_deg 2", "max_shear_deg", 2.0),
        ("--augment all --max_shift_px 3", "max_shift_px", 3.0),
        ("--augment all --scale 0.9 1.1", "scale", (0.9, 1.1)),
        ("--augment all --noise 0.3", "noise", 0.3),
    ],
)
def test_the_recipe_is_the_one_asked_for(flags, field, value):
    args = dilatedUnet.parse([*TINY.split(), *flags.split()])
    recipe = training.recipe_of(args)
    preset = augment.RECIPES[args.augment]
    assert getattr(recipe, field) == value
    assert asdict(recipe) | {field: None} == asdict(preset) | {field: None}
    assert trainee(flags)[0].recipe == recipe


def test_validation_sees_windows_as_they_are(plan, small):
    made, _ = trainee("--augment all")
    images = tifffile.imread(small / "images.tif")
    batch = training.windows_at(images, images, [(2, 5, 7)], 32)
    _, mask = made(batch, training=False)
    assert np.array_equal(np.asarray(mask)[0], images[2, 5:37, 7:39].astype(np.float32))


def test_the_preview_draws_what_the_network_will_see_and_trains_nothing(train, refuses, small, tmp_path):
    done = train(f"{HOLDOUT} --augment all --augment_preview pictures/seen.png")
    assert done.code == 0, done.err
    assert Path("pictures/seen.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["pictures"]
    paths = ("--image_path", small / "images.tif", "--mask_path", small / "labels.tif")
    refuses("seen.png exists: --force", *paths, *TINY.split(), "--augment_preview", "pictures/seen.png")
    assert train("--augment_preview pictures/seen.png --force").code == 0


def test_the_range_test_draws_a_picture_and_suggests_a_range(train, tmp_path):
    done = train(f"{HOLDOUT} --lr_find 40 --run_dir run --optimizer adam --dropout 0")
    assert done.code == 0, done.err
    words = done.err.splitlines()[-1].split()
    assert words[0] == "suggested:"
    assert 1e-7 < float(words[words.index("--lr") + 1]) < float(words[words.index("--max_lr") + 1]) < 1
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["lr_find.png"]


@pytest.mark.parametrize("found", [[1.0, 2.0, 3.0, 5.0], [math.nan]])
def test_a_range_test_in_which_the_loss_never_falls_says_so(refuses, monkeypatch, small, tmp_path, found):
    values = iter(found)
    monkeypatch.setattr(training.Trainee, "train_on_batch", lambda *_, **__: {"loss": next(values)})
    paths = ("--image_path", small / "images.tif", "--mask_path", small / "labels.tif")
    refuses("the loss never fell in the range test", *paths, *TINY.split(), "--lr_find")
    assert not list(tmp_path.rglob("*.png"))


def test_tensorboard_logs_are_written_or_the_missing_package_is_named(train, tmp_path):
    done = train(f"{HOLDOUT} --tensorboard --epochs 1 --run_dir run")
    logs = list((tmp_path / "run").glob("tensorboard/**/events*"))
    if done.code == 0:
        assert logs
    else:
        assert done.code == 2
        assert "--tensorboard needs the package tensorboard" in done.err.splitlines()[-1]
        assert not list(tmp_path.iterdir())


def test_the_progress_line_shows_dice_loss_rate_speed_and_time_left(capsys, monkeypatch):
    clock = itertools.count(0, 2)
    monkeypatch.setattr(training.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(training.sys.stderr, "isatty", lambda: True, raising=False)
    progress = training.Progress(dilatedUnet.parse(["--epochs", "10", "--steps_per_epoch", "10"]))
    progress.start(4)
    progress.show(4, 10, 0.5, 0.9, 1e-3)
    line = capsys.readouterr().err
    for words in ("epoch 5/10 [##########..........]", "dice 0.900", "loss 0.500", "lr 1.0e-03", "15.00 images/s"):
        assert words in line
    assert "0:00:10 left" in line
    monkeypatch.setattr(training.sys.stderr, "isatty", lambda: False, raising=False)
    quiet = training.Progress(dilatedUnet.parse([]))
    quiet.start(0)
    quiet.show(0, 1, 0.5, 0.9, 1e-3)
    assert capsys.readouterr().err == ""


# -- bad input ---------------------------------------------------------------------------------------------------


@pytest.fixture
def bad(refuses, small, tmp_path):
    """A run on spoilt files that must be refused before it writes anything."""

    def refuse(words, *, images=None, labels=None, flags=""):
        for name, array in (("images.tif", images), ("labels.tif", labels)):
            content = array if isinstance(array, bytes) else None
            if array is None:
                shutil.copy(small / name, tmp_path)
            elif content is not None:
                (tmp_path / name).write_bytes(content)
            else:
                tifffile.imwrite(tmp_path / name, array, photometric="rgb" if array.shape[-1] == 3 else "minisblack")
        before = files(tmp_path)
        said = refuses(words, "--image_path", "images.tif", "--mask_path", "labels.tif", *TINY.split(), *flags.split())
        assert files(tmp_path) == before
        return said

    return refuse


GRAY = np.random.default_rng(0).integers(0, 256, (10, 64, 80), dtype=np.uint8)


@pytest.mark.parametrize(
    ("words", "spoilt"),
    [
        ("empty", {"images": b""}),
        ("not a TIFF", {"images": b"GIF89a, or so it says"}),
        ("RGB", {"images": np.zeros((10, 64, 80, 3), np.uint8)}),
        ("10 sections of 64 x 80 px. Received: 9", {"labels": GRAY[:9] // 128}),
        ("10 sections of 64 x 80 px. Received: 10 sections of 64 x 72 px", {"labels": GRAY[:, :, :72] // 128}),
        ("must hold two label values, and holds 3 (0, 1, 2)", {"labels": GRAY % 3}),
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
        ("cannot be written", {"flags": "--run_dir images.tif/run"}),
        ("cannot be written", {"flags": "--weight_path /proc/nowhere/x.weights"}),
        ("images.tif cannot be written to", {"flags": "--augment_preview images.tif/p.png"}),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_one_sentence_and_nothing_is_written(bad, words, spoilt):
    bad(words, **spoilt)


def test_a_cut_off_file_is_refused(bad, small):
    bad("cut off", images=(small / "images.tif").read_bytes()[:30000])


def test_images_without_labels_are_refused(refuses, small, tmp_path):
    refuses("--mask_path must name the labels", "--image_path", small / "images.tif", *TINY.split())
    assert not list(tmp_path.iterdir())


def test_a_mask_that_is_all_background_is_a_warning(train, tmp_path):
    tifffile.imwrite("none.tif", np.zeros((10, 64, 80), np.uint8))
    done = train(f"{HOLDOUT} --mask_path none.tif --run_dir run --epochs 1")
    assert done.code == 0, done.err
    assert "warning: the mask is all background" in done.err
    assert strict("run/run.json")["finished"]


def test_inverted_labels_are_turned(small, tmp_path):
    tifffile.imwrite(tmp_path / "turned.tif", 255 - tifffile.imread(small / "labels.tif"))
    files = ["--image_path", str(small / "images.tif"), *TINY.split(), "--mask_path"]
    _, plain, _ = training.load(dilatedUnet.parse([*files, str(small / "labels.tif")]))
    _, turned, _ = training.load(dilatedUnet.parse([*files, str(tmp_path / "turned.tif"), "--invert_mask"]))
    assert np.array_equal(plain.sections, turned.sections)
    assert plain.sections.mean() > 0.5


# -- the real stack ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        "--lr 0.00001 --max_lr 0.01 --epochs 500 --dilate_rate 1 --dilate 0 --weight_path "
        "weights/standard_unet.weights --addition 1",
        "--lr 0.00001 --max_lr 0.01 --epochs 500 --dilate_rate 2 --dilate 1 --weight_path "
        "weights/dilated_unet.weights --addition 1",
    ],
)
def test_a_published_command_trains_on_the_real_stack_and_predicts_it(call, isbi, monkeypatch, tmp_path, words):
    """Word for word, with fewer epochs, updates and validation windows; the scores of whole sections are cut short."""
    name = words.split("/")[1].split(".")[0]
    monkeypatch.setattr(training, "score", lambda truth, interior, sections: {"sections": sections})
    monkeypatch.setattr(training, "choose_threshold", lambda *_: {"threshold": 0.5})
    done = call(*words.split(), "--epochs", "1", "--steps_per_epoch", "1", "--val_windows", "1")
    assert done.code == 0, done.err
    assert f"weights: weights/{name}.weights.h5 (Keras 3 saves weights as .weights.h5)" in done.err
    assert sorted(path.name for path in (tmp_path / "weights").iterdir()) == [f"{name}.json", f"{name}.weights.h5"]
    record = strict(f"weights/{name}.json")
    assert record["network"]["dilate"] == ("dilated" in name)
    if "standard" in name:
        return  # one prediction of thirty sections is enough
    done = call("predict", "--weight_path", f"weights/{name}.weights", "--output", "prediction.tif")
    assert done.code == 0, done.err
    with tifffile.TiffFile("prediction.tif") as file:
        found = file.asarray()
        assert file.is_imagej
    assert found.shape == (30, 512, 512)
    assert found.dtype == np.float32
    assert 0 <= found.min() < found.max() <= 1
    assert data.iter_sections("prediction.tif").voxel_nm == pytest.approx((50, 4, 4))
