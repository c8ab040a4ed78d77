"""What the program runs on: the precision and the updates per call that are fastest there."""

import keras
from conftest import cases

from network import device

TENSORFLOW = keras.backend.backend() == "tensorflow"


@cases("asked, gpu, expected", (None, None, 1), (5, None, 5), (None, "a GPU", 10), (2, "a GPU", 2))
def test_an_accelerator_gets_several_updates_per_call(monkeypatch, asked, gpu, expected):
    monkeypatch.setattr(device, "accelerator", lambda: gpu)
    assert device.steps_per_execution(asked, 20) == expected


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
