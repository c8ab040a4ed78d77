"""What the program runs on: device, backend, and the precision and compilation that are fastest there."""

import math
import os
import time
from pathlib import Path

import keras


def name():
    """The accelerator's name, or the processor's with its number of usable cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return accelerator() or f"{_cpu_field('model name') or 'CPU'}, {cores} core{'s' * (cores != 1)}"


def accelerator():
    """Name of the first GPU or TPU that the backend sees, or None."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        found = tf.config.list_physical_devices("GPU")
        return tf.config.experimental.get_device_details(found[0]).get("device_name", "GPU") if found else None
    if backend == "jax":
        import jax

        first = jax.devices()[0]
        return None if first.platform == "cpu" else first.device_kind
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def _cpu_field(field):
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(field)), "")


def choose_precision(asked, engine="keras"):
    """The precision to compute in: what was asked for, or for "auto" bfloat16 where it is the faster one.

    That is on GPUs, and with TensorFlow or the engine OpenVINO on processors with AVX512-BF16 or AMX whose bfloat16
    products are the faster ones: on some of them they are not. XLA's CPU convolutions gain nothing.
    """
    if asked != "auto":
        return asked
    if accelerator():
        return "bfloat16"
    has = {"avx512_bf16", "amx_bf16"} & set(_cpu_field("flags").split())
    gains = has and (engine == "openvino" or keras.backend.backend() == "tensorflow") and _speedup_of_bfloat16() > 1.15
    return "bfloat16" if gains else "float32"


def _speedup_of_bfloat16():
    """How many times faster TensorFlow multiplies two large matrices in bfloat16 than in float32; 0.2 s."""
    try:
        import tensorflow as tf
    except ImportError:
        return 1.0
    matrices = {kind: tf.cast(tf.fill((1024, 1024), 0.5), kind) for kind in ("float32", "bfloat16")}
    fastest = dict.fromkeys(matrices, math.inf)
    for _ in range(6):  # in turn, so that whatever else runs here delays both
        for kind, matrix in matrices.items():
            begin = time.perf_counter()
            tf.matmul(matrix, matrix).numpy()
            fastest[kind] = min(fastest[kind], time.perf_counter() - begin)
    return fastest["float32"] / fastest["bfloat16"]


def use_xla(replicas):
    """`jit_compile` of the model: XLA's CPU convolutions are several times slower than oneDNN's.

    TensorFlow's sums over several replicas do not compile.
    """
    wanted = accelerator() is not None and replicas == 1
    return wanted if keras.backend.backend() == "tensorflow" else "auto"


def fused(function):
    """`function` of a dict of tensors, its element-wise operations fused: XLA inside TensorFlow's plain CPU graph.

    The other backends, and TensorFlow on a GPU, compile the whole step with a fusing compiler anyway.
    """
    if keras.backend.backend() != "tensorflow":
        return function
    import tensorflow as tf

    return tf.function(function, jit_compile=True)


def steps_per_execution(asked, steps_per_epoch):
    """Updates per call of the compiled step: several on an accelerator, whose queue must not run dry."""
    if asked or not accelerator():
        return asked or 1
    return max(n for n in range(1, min(10, steps_per_epoch) + 1) if steps_per_epoch % n == 0)


def describe(precision):
    """The first line of a run."""
    return f"device: {name()}; backend: {keras.backend.backend()}, Keras {keras.__version__}; precision: {precision}"
