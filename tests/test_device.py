"""What the program runs on: the precision and the updates per call that are fastest there."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tifffile
from conftest import HOLDOUT, ROOT, TINY, assert_same_run, cases

from network import device

TENSORFLOW = keras.backend.backend() == "tensorflow"


@cases("asked, gpu, expected", (None, None, 1), (5, None, 5), (None, "a GPU", 10), (2, "a GPU", 2))
def test_an_accelerator_gets_several_updates_per_call(monkeypatch, asked, gpu, expected):
    monkeypatch.setattr(device, "accelerator", lambda: gpu)
    assert device.steps_per_execution(asked, 20) == expected
    several = 1 if TENSORFLOW or not gpu else 10  # a replica of TensorFlow's takes one
    assert device.steps_per_execution(None, 20, replicas=2) == several


@cases(
    "has, speedup, expected",
    ("avx512_bf16", 1.6, "bfloat16"),
    ("avx512_bf16", 0.8, "float32"),
    ("none", 1.6, "float32"),
)
def test_automatic_precision_is_bfloat16_where_the_processor_is_faster_with_it(monkeypatch, has, speedup, expected):
    monkeypatch.setattr(device, "accelerator", lambda: None)
    monkeypatch.setattr(device, "_cpu_field", lambda field: f"fpu {has} sse")
    monkeypatch.setattr(device, "_speedup_of_bfloat16", lambda engine: speedup)
    assert device.choose_precision("auto") == (expected if TENSORFLOW else "float32")
    assert device.choose_precision("auto", "openvino") == expected
    assert device.choose_precision("float32") == "float32"


ON_PYTORCH = """
import os, sys
sys.modules["tensorflow"] = sys.modules["jax"] = None  # neither is needed
import dilatedUnet
print(*[dilatedUnet.main(words.split()) for words in sys.argv[1:]], os.environ["KERAS_TORCH_DEVICE"])
"""


def test_a_run_on_pytorch_resumes_bit_for_bit_and_predicts_what_the_other_backends_predict(call, small, tmp_path):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    files = f"--image_path {small}/images.tif --gpu -1 --precision float32"
    train = f"{TINY} {HOLDOUT} --augment all {files} --mask_path {small}/labels.tif --run_dir"
    predict = f"predict {files} --weight_path whole/best --engine keras --output"
    runs = (f"{train} whole", f"{train} parts --epochs 1", f"{train} parts --resume")
    more = (f"{predict} torch.tif", f"{train} no --augment_preview seen.png", f"{train} no --steps_per_execution 2")
    command = [sys.executable, "-c", ON_PYTORCH, *runs, *more]
    env = os.environ | {"KERAS_BACKEND": "torch", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
    assert done.stdout.split()[-7:] == ["0", "0", "0", "0", "0", "2", "cpu"], done.stderr
    assert "--steps_per_execution must be 1 with PyTorch. Received: 2" in done.stderr
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    assert call(*predict.split(), "here.tif").code == 0
    found, expected = (tifffile.imread(tmp_path / name) for name in ("torch.tif", "here.tif"))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert found.std() > 1e-4
