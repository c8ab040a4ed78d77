"""One run on several devices and in several processes: the loss curve of one device, and what a death leaves."""

import json
import os
import socket
import subprocess
import sys
import time

import keras
import numpy as np
import pytest
from conftest import ROOT, call_quietly, history, strict

import dilatedUnet
from network import distribution

TENSORFLOW = keras.backend.backend() == "tensorflow"
pytestmark = pytest.mark.jax
# Stochastic gradient descent at a low rate, for rounding would grow: RMSprop divides by gradients near 0.
FLAGS = (
    "--protocol holdout --inner_sections 2 --filters 4,8 --window 32 --batch_size 4 --epochs 16 --steps_per_epoch 2 "
    "--augment all --dropout 0.3 --optimizer sgd --clr_mode none --lr 0.002 --precision float32"
)


@pytest.fixture(scope="module")
def start(small, tmp_path_factory):
    """Start the command line in a process of its own; `.folder` is where."""
    folder = tmp_path_factory.mktemp("distributed")
    started = []

    def process(name, *more, environment=None):
        words = [sys.executable, ROOT / "dilatedUnet.py", *process.flags, *more]
        with open(folder / f"{name}.txt", "w") as said:
            options = {"cwd": folder, "stdout": said, "stderr": said, "env": os.environ | (environment or {})}
            started.append(subprocess.Popen(list(map(str, words)), **options))
        return started[-1]

    process.folder = folder
    process.flags = ("--image_path", small / "images.tif", "--mask_path", small / "labels.tif", *FLAGS.split())
    yield process
    for left in started:
        left.kill()
        left.wait()


def said(start, name):
    return (start.folder / f"{name}.txt").read_text()


def workers(start, name, *more, folders=("run", "run")):
    """Two processes of one run, on this machine."""
    addresses = [f"localhost:{port}" for port in free_ports(2)]
    found = []
    for i, folder in enumerate(folders):
        if TENSORFLOW:
            task = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": i}}
            environment = {"TF_CONFIG": json.dumps(task)}
        else:
            environment = {
                "KERAS_DISTRIBUTION_JOB_ADDRESSES": ",".join(addresses),
                "KERAS_DISTRIBUTION_NUM_PROCESSES": "2",
                "KERAS_DISTRIBUTION_PROCESS_ID": str(i),
            }
        words = ("--distribute", "--run_dir", folder, *more)
        found.append(start(f"{name}-{i}", *words, environment=environment))
    return found


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for opened in sockets:
        opened.bind(("localhost", 0))
    ports = [opened.getsockname()[1] for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports


@pytest.fixture(scope="module")
def alone(start):
    """History of the run on one device."""
    call_quietly(start.folder, (*start.flags, "--run_dir", "alone"))
    return history(start.folder / "alone")


def assert_same_curve(found, expected):
    assert [row["update"] for row in found] == [row["update"] for row in expected]
    for key in ("loss", "dice", "val_loss", "val_dice"):
        ours, theirs = ([row[key] for row in rows] for rows in (found, expected))
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, err_msg=key)


@pytest.mark.slow
def test_two_processes_give_the_loss_curve_of_one_and_where_one_dies_two_devices_go_on(start, alone):
    run = start.folder / "run"
    chief, other = workers(start, "dying", folders=("run", "second"))
    wait_for_epochs(run, 2, chief)
    other.kill()
    other.wait()
    assert chief.wait(300) not in (0, 2), said(start, "dying-0")
    if TENSORFLOW:  # JAX's own service ends the process, after 100 s without a sign of life
        assert chief.returncode == 1
        assert "another process of this run is lost" in said(start, "dying-0").splitlines()[-1]
    done = len(history(run))
    assert 2 <= done < 16, "the process died too late"
    assert "2 processes, this one number 1" in said(start, "dying-1")
    assert not (start.folder / "second").exists()  # only the first process writes
    assert start("rest", "--run_dir", "run", "--resume", "--distribute", 2).wait(300) == 0, said(start, "rest")
    assert "every batch shared by 2 devices" in said(start, "rest")
    assert f"resumed after epoch {done}," in said(start, "rest")
    both = history(run)
    assert both[done:] != alone[done:]  # rounding: two devices were at work
    assert_same_curve(both, alone)
    assert alone[-1]["loss"] < alone[0]["loss"]  # it learns
    scored = unfinish(run)
    chief, other = workers(start, "scoring", "--resume")
    assert (chief.wait(300), other.wait(300)) == (0, 0), said(start, "scoring-0") + said(start, "scoring-1")
    now = strict(run / "run.json")
    assert (now["finished"], now["held_out"]["dice"]) == (True, scored["held_out"]["dice"])


def unfinish(folder):
    """As if the process had died after the last epoch, before the scores; the record as it was."""
    record = strict(folder / "run.json")
    (folder / "run.json").write_text(json.dumps(record | {"finished": False, "held_out": None}))
    return record


def wait_for_epochs(folder, count, process):
    for _ in range(6000):
        if (folder / "history.csv").exists() and len(history(folder)) >= count:
            return
        assert process.poll() is None
        time.sleep(0.02)
    raise AssertionError(f"epoch {count} never came")


def test_a_batch_that_cannot_be_shared_is_refused_and_one_device_shares_nothing(refuses, start, monkeypatch):
    spread = distribution.start(dilatedUnet.parse([]).distribute)
    assert (spread.replicas, spread.chief, spread.agree(7)) == (1, True, 7)
    assert list(spread.feed(lambda slices: iter(slices))) == [0]
    two = distribution.Alone()
    two.replicas = 2
    monkeypatch.setattr(distribution, "start", lambda devices: two)
    words = "--batch_size must be a multiple of the 2 devices that share it. Received: 3"
    refuses(words, *start.flags, "--batch_size", 3, "--distribute", 2)
    if TENSORFLOW:
        words = "--steps_per_execution must be 1 with several devices of TensorFlow. Received: 2"
        refuses(words, *start.flags, "--steps_per_execution", 2, "--distribute", 2)
    assert not os.listdir()
