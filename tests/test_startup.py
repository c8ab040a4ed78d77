"""The environment is checked before the frameworks read it."""

from conftest import cases

import dilatedUnet

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
