"""Files are replaced as a whole or not at all, belong to one run at a time, and an input is never an output."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from conftest import ROOT, file_limit, refused

from files import atomic
from files.atomic import DataError
from files.writing import write_prediction
from network import unet
from predict import prediction
from train.record import Journal, save_checkpoint

DEAD = 2**22 + 1  # beyond Linux's largest process number


def half_written(partial, failure):
    if failure:
        partial.write_text("half")
        raise failure


FAILURES = [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left"), OSError("what a library says"), None]


@pytest.mark.parametrize("failure", FAILURES, ids=repr)
@pytest.mark.parametrize("old", [None, "old"])
def test_whatever_happens_the_old_file_stays_and_no_partial_one(tmp_path, failure, old):
    file = tmp_path / "x.weights.h5"
    if old:
        file.write_text(old)
    with pytest.raises((DataError, KeyboardInterrupt)) as caught, atomic.replacing(file, force=True) as partial:
        half_written(partial, failure)
    assert partial.parent == tmp_path
    assert partial.name.endswith(".weights.h5")
    assert isinstance(failure, KeyboardInterrupt) or str(file) in str(caught.value)
    assert os.listdir(tmp_path) == [file.name] * bool(old)
    assert not old or file.read_text() == old


WRITERS = {
    "a.tif": lambda path: write_prediction(path, np.zeros((9, 64, 64)), count=9, shape=(64, 64), force=True),
    "a.weights.h5": lambda path: prediction.save_weights(unet.build(filters=(9,)), path, {}),  # HDF5 would crash
    "a.npz": lambda path: save_checkpoint(path, unet.build(filters=(9,)).weights, Journal()),
    "a.json": lambda path: atomic.write_json(path, "x" * 99_999),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_the_old_file_and_no_partial_one(tmp_path, name):
    """A real limit on the size of files."""
    (tmp_path / name).write_text("old")
    with file_limit(9000), pytest.raises(DataError, match=rf"{name} could not be written"):
        WRITERS[name](tmp_path / name)
    assert ((tmp_path / name).read_text(), os.listdir(tmp_path)) == ("old", [name])


@pytest.mark.parametrize("force", [True, False])
def test_files_that_belong_together_are_moved_when_all_are_on_the_disk(tmp_path, force, monkeypatch):
    done = []
    for name in ("fsync", "replace"):
        call = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, call=call: done.append(name) or call(*a))
    with atomic.replacing(tmp_path / "new/a.h5", tmp_path / "new/a.json", force=force) as partials:
        for partial in partials:
            partial.write_text("new")
    assert done[:4] == ["fsync", "fsync", "replace", "replace"]
    assert sorted(os.listdir(tmp_path / "new")) == ["a.h5", "a.json"]


def test_a_link_stays_a_link_and_what_is_no_file_stays(tmp_path):
    (tmp_path / "far").write_text("old")
    (tmp_path / "link").symlink_to("far")
    atomic.write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "far").read_text() == "new"
    for path in (tmp_path, Path(os.devnull)):
        refused("cannot be replaced", atomic.write_text, path, "new")
    refused("--force", atomic.write_text, tmp_path / "far", "newer", force=False)


@pytest.mark.skipif(os.name == "nt", reason="Windows' processes cannot be asked for so")
def test_what_a_dead_process_left_half_written_goes_and_nothing_else(tmp_path):
    kept = [f".part{os.getpid()}_{atomic.HOST}-p.tif", f".part{DEAD}_000000-of-another-machine", ".party-x"]
    for name in [*kept, f".part{DEAD}_{atomic.HOST}-p.tif", f".part{DEAD}_000000-of-yesterday"]:
        (tmp_path / name).write_text("half")
    os.utime(tmp_path / f".part{DEAD}_000000-of-yesterday", (0, 0))
    (tmp_path / f".part{DEAD}_{atomic.HOST}-p.zarr").mkdir()
    atomic.write_text(tmp_path / "other", "new")
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, "other"])


def test_what_a_process_of_another_user_is_writing_stays(tmp_path, monkeypatch):
    (tmp_path / f".part{DEAD}_{atomic.HOST}-p.tif").write_text("half")
    monkeypatch.setattr(os, "kill", Mock(side_effect=PermissionError))
    atomic.write_text(tmp_path / "other", "new")
    assert len(os.listdir(tmp_path)) == 2


def test_a_file_system_without_locks_keeps_nobody_out(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl", reason="no such locks on this system")
    monkeypatch.setattr(fcntl, "flock", Mock(side_effect=OSError(errno.ENOLCK, "No locks available")))
    with atomic.locked(tmp_path / "x"), atomic.locked(tmp_path / "x"):
        pass


NO_RECORDS = [b"", b'{"a": ', b"\xff\xfe\xff", b"[" * 100_000, b"1" * 5000, b"[1]", b"null"]


@pytest.mark.parametrize("text", [None, *NO_RECORDS], ids=lambda text: repr(text)[:12])
def test_a_record_is_a_dict_or_one_sentence(tmp_path, text):
    file = tmp_path / "run.json"
    if text is not None:
        file.write_bytes(text)
    with pytest.raises(DataError, match=r"cannot be read|is no JSON|must hold a JSON object") as caught:
        atomic.read_json(file, "--resume")
    assert str(caught.value).startswith(f"--resume: {file} ")


def test_what_is_written_is_read_and_what_exists_or_cannot_be_written_is_named(tmp_path):
    record = {"name": "N\u00e4\udcff", "loss": [0.1, 1e-30], "none": None}
    atomic.write_json(tmp_path / "a.json", record)
    assert atomic.read_json(tmp_path / "a.json", "") == record
    (tmp_path / "file").write_text("")
    refused("file exists already", atomic.refuse_existing, tmp_path / "new", tmp_path / "file")
    refused("could not be written", atomic.make_writable, tmp_path / "good", tmp_path / "file" / "run")
    assert os.listdir(tmp_path / "good") == []


HOLDER = (
    "import sys, time; from files.atomic import locked\nwith locked(sys.argv[1]): print(1, flush=True); time.sleep(60)"
)


@pytest.mark.parametrize("is_folder", [True, False])
def test_a_lock_keeps_others_out_and_dies_with_its_process(tmp_path, is_folder):
    place = tmp_path / "runs" / "x"
    if is_folder:
        place.mkdir(parents=True)
    command = [sys.executable, "-c", HOLDER, str(place)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline()
        with pytest.raises(DataError, match="in use"), atomic.locked(place):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    again = tmp_path / "runs" / ".." / "runs" / "x"
    with atomic.locked(place), pytest.raises(DataError, match="in use"), atomic.locked(again):
        pass
    assert os.listdir(tmp_path / "runs") == ["x"] * is_folder


def test_an_output_is_no_input(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.tif", "b.tif", "folder/s1.png"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("pixels")
    Path("link.tif").symlink_to("a.tif")
    os.link("a.tif", "hard.tif")
    for output in ("a.tif", "./folder/../a.tif", "link.tif", "hard.tif", "folder/s1.png", "folder", "folder/new.tif"):
        with pytest.raises(DataError, match="--output must not be an input"):
            atomic.refuse_inputs("--output", output, "isbi2012", None, Path("folder"), str(tmp_path / "a.tif"))
    Path("folder/in").mkdir()
    Path("folder/in/old.tif").touch()  # as an interrupted prediction, which goes on
    for output in ("b.tif", "new.tif", "folder/new.json", "folder/in/new.tif", "folder/in/old.tif", "isbi2012"):
        atomic.refuse_inputs("--output", output, "isbi2012", None, Path("folder"), str(tmp_path / "a.tif"))
    for name in ("3.zarr/zarr.json", "2.zarr/.zgroup", "array.zarr/.zarray"):
        Path(name).parent.mkdir()
        Path(name).touch()
        with pytest.raises(DataError, match="--output must not be an input"):
            atomic.refuse_inputs("--output", Path(name).with_name("new.zarr"), f"{Path(name).parent}:/raw")
