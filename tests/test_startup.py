"""The environment is checked before the frameworks read it."""

import json
import os
import signal
import subprocess
import sys
import venv
from unittest.mock import Mock

import pytest
from conftest import ROOT, TINY, cases, strict, with_ctrl_c

import dilatedUnet
import start

LOOKS = "TF_CONFIG must look like"


@cases(
    "name, value, words",
    ("KERAS_BACKEND", "tenserflow", "KERAS_BACKEND must be one of tensorflow, jax, torch. Received: tenserflow"),
    ("TF_CONFIG", "nonsense", LOOKS),
    ("TF_CONFIG", "[1]", LOOKS),
    ("TF_CONFIG", '{"cluster": {"worker": 3}}', LOOKS),
    ("TF_CONFIG", '{"cluster": {"worker": [1]}}', LOOKS),
    ("TF_CONFIG", '{"cluster": {"worker": ["a", "b:1"]}}', LOOKS),
    ("TF_CONFIG", '{"task": {"index": "first"}}', LOOKS),
    ("TF_CONFIG", "[" * 100_000, LOOKS),
    ("KERAS_DISTRIBUTION_NUM_PROCESSES", "two", "must be a whole number. Received: two"),
)
def test_an_environment_that_makes_no_sense_is_named(refuses, monkeypatch, name, value, words):
    monkeypatch.setenv(name, value)
    refuses(words, "--distribute")


def test_the_networks_are_what_they_are_whatever_keras_json_says(suite, small, tmp_path):
    (tmp_path / "keras.json").write_text('{"floatx": "float16", "image_data_format": "channels_first"}')
    stack = f"--image_path {small / 'images.tif'} --mask_path {small / 'labels.tif'}"
    flags = f"{stack} {TINY} --protocol all --epochs 1 --run_dir run"
    suite(*flags.split(), env=os.environ | {"KERAS_HOME": str(tmp_path)})
    assert strict(tmp_path / "run/run.json")["finished"]


def test_a_backend_that_cannot_start_or_is_not_installed_is_one_sentence(refuses, monkeypatch):
    def fails():
        raise AssertionError  # as JAX does with JAX_PLATFORMS=cuda and no GPU

    monkeypatch.setattr("network.device.accelerator", fails)
    refuses("Keras or its backend cannot be loaded: AssertionError", "predict", "--engine", "keras")
    from network import startup

    monkeypatch.setenv("KERAS_BACKEND", "jax")
    monkeypatch.setattr(startup.importlib.util, "find_spec", lambda name: None)
    refuses('pip install "jax[cpu]"', "predict")


def test_a_device_is_chosen_before_keras_is_imported_and_one_that_is_not_there_is_said(monkeypatch, capsys):
    def chosen(*words):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
        dilatedUnet.load_backend(dilatedUnet.parse(words))
        return startup.os.environ["CUDA_VISIBLE_DEVICES"], capsys.readouterr().err

    from network import startup

    monkeypatch.setattr("network.device.accelerator", lambda: None)
    assert chosen() == ("-1", "")
    assert chosen("--gpu", "3") == ("3", "--gpu 3: no such GPU is found here, so the CPU computes\n")


@pytest.mark.parametrize(
    ("error", "free", "code"),
    [
        (OSError(30, "Read-only file system"), 2**40, ".venv could not be made: [Errno 30] Read-only file system"),
        (ValueError("Refusing to create a venv"), 2**40, "Refusing to create a venv"),
        (subprocess.CalledProcessError(1, "ensurepip"), 2**40, "sudo apt install python3-venv"),
        (subprocess.CalledProcessError(1, "ensurepip"), 1000, "the disk is full"),
        (KeyboardInterrupt(), 2**40, 130),
    ],
)
def test_why_no_environment_can_be_made_is_said_in_a_sentence(tmp_path, monkeypatch, error, free, code):
    monkeypatch.setattr(start, "ROOT", tmp_path)
    monkeypatch.setattr(start.venv, "create", Mock(side_effect=error))
    monkeypatch.setattr(start.shutil, "disk_usage", lambda folder: Mock(free=free))
    with pytest.raises(SystemExit) as stopped:
        start.environment("requirements.txt")
    assert stopped.value.code == code or code in stopped.value.code


def test_an_environment_that_was_left_half_made_is_made_again(tmp_path, monkeypatch):
    """As after Ctrl-C while pip was installed: its Python is there, pip is not."""
    (tmp_path / "requirements.txt").touch()
    (tmp_path / "requirements.lock").touch()
    monkeypatch.setattr(start, "ROOT", tmp_path)
    venv.create(tmp_path / ".venv", with_pip=False)
    python = start.environment("requirements.txt")
    assert start.run([python, "-m", "pip", "--version"], stdout=subprocess.DEVNULL) == 0


@cases(
    "finished, codes, how",
    (None, {}, ["--force"]),
    (True, {}, ["--force"]),
    (False, {}, ["--resume"]),
    (False, {"--resume": 2}, ["--resume"]),
    (False, {"--resume": 130}, ["--resume"]),
    (True, {"--force": 2}, ["--force"]),
)
def test_the_main_job_goes_on_with_a_training_that_is_half_done(tmp_path, monkeypatch, capsys, finished, codes, how):
    done = []

    def run(words, **_):
        done.append(words[2:])
        return codes.get(words[-1], 0)

    monkeypatch.setattr(start, "ROOT", tmp_path)
    monkeypatch.setattr(start, "run", run)
    monkeypatch.setattr(start, "show", lambda picture: None)
    if finished is not None:
        (tmp_path / start.RUN).mkdir(parents=True)
        (tmp_path / start.RUN / "run.json").write_text(
            json.dumps({"finished": finished, "settings": {"image_path": "isbi2012"}})
        )
    failed = start.demo("python")
    assert [words[-1] for words in done if words[0] == "--recipe"] == how
    assert failed == codes.get(how[-1], 0)
    assert (done[-1][0] == "predict") == (not failed)
    assert ("remove this folder" in capsys.readouterr().out) == bool(failed and how == ["--resume"])


@cases(
    "text, half",
    ('{"finished": false, "settings": {"image_path": "isbi2012"}}', True),
    ('{"finished": true, "settings": {"image_path": "isbi2012"}}', False),
    ('{"finished": false, "settings": {"image_path": "synthetic"}}', False),
    ("[1]", False),
    ("cut o", False),
)
def test_only_a_training_of_the_same_data_is_gone_on_with(tmp_path, text, half):
    (tmp_path / "run.json").write_text(text)
    assert start.is_half_done(tmp_path / "run.json", "isbi2012") == half


def test_ctrl_c_ends_what_start_runs_after_it_has_saved(tmp_path):
    child = "import time\ntry:\n    print('began', flush=True)\n    time.sleep(60)\nexcept KeyboardInterrupt:\n"
    child += "    time.sleep(1)\n    print('saved', flush=True)"
    words = [sys.executable, "-c", f"import start, sys\nstart.run([sys.executable, '-c', {child!r}])"]
    options = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, **options, start_new_session=True, preexec_fn=with_ctrl_c) as process:
        assert process.stdout.readline() == "began\n"
        os.killpg(process.pid, signal.SIGINT)
        assert process.communicate(timeout=60) == ("saved\n", "")
    assert process.returncode == 130
