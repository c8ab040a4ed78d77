"""What the program runs on: device, backend, and the precision and compilation that are fastest there.

Keras is imported where it is needed: who predicts with OpenVINO does without it.
"""

import functools
import importlib.util
import math
import os
import sys
import time
from pathlib import Path

import numpy as np

PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}
GPU_FILES = ("nvidia[0-9]*", "kfd", "dxg", "accel*", "vfio/[0-9]*")  # in /dev: of NVIDIA, AMD, Windows, TPUs


def backend():
    """Name of Keras's backend."""
    import keras

    return keras.backend.backend()


def name():
    """The accelerator's name, or the processor's with its number of usable cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return accelerator() or f"{_cpu_field('model name') or 'CPU'}, {cores} core{'s' * (cores != 1)}"


def accelerator():
    """Name of the first GPU or TPU that the backend sees, or None; also as long as no Keras is loaded."""
    if "keras" not in sys.modules:
        return None
    if backend() == "tensorflow":
        import tensorflow as tf

        found = tf.config.list_physical_devices("GPU")
        return tf.config.experimental.get_device_details(found[0]).get("device_name", "GPU") if found else None
    if backend() == "jax":
        import jax

        first = jax.devices()[0]
        return None if first.platform == "cpu" else first.device_kind
    import keras
    import torch

    kind = keras.ops.zeros(1).device.type  # where Keras puts what it makes
    return None if kind == "cpu" else torch.cuda.get_device_name(0) if kind == "cuda" else f"{kind.upper()} device"


def may_have_accelerator():
    """Whether a backend is worth asking, which takes seconds: on Linux, whether there is a device file."""
    return sys.platform != "linux" or any(next(Path("/dev").glob(name), None) for name in GPU_FILES)


def _cpu_field(field):
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(field)), "")


def choose_precision(asked, engine="keras"):
    """The precision to compute in: what was asked for, or for "auto" bfloat16 where it is the faster one.

    That is on GPUs, and with TensorFlow or the engine OpenVINO on processors with AVX512-BF16 or AMX whose bfloat16
    products are the faster ones: on some of them they are not. XLA's CPU convolutions gain nothing. PyTorch's dilated
    bfloat16 convolutions give NaN gradients on some processors (2.13), and nobody has tried its GPUs.
    """
    if asked != "auto":
        return asked
    if engine == "keras" and accelerator() and backend() != "torch":
        return "bfloat16"
    has = {"avx512_bf16", "amx_bf16"} & set(_cpu_field("flags").split())
    gains = has and (engine == "openvino" or backend() == "tensorflow") and _speedup_of_bfloat16(engine) > 1.15
    return "bfloat16" if gains else "float32"


def _speedup_of_bfloat16(engine):
    """How many times faster two large matrices are multiplied in bfloat16 than in float32, by what computes; 0.2 s."""
    products = {precision: _product(engine, precision) for precision in PRECISIONS}
    fastest = dict.fromkeys(products, math.inf)
    for _ in range(6):  # in turn, so that whatever else runs here delays both
        for precision, product in products.items():
            begin = time.perf_counter()
            product()
            fastest[precision] = min(fastest[precision], time.perf_counter() - begin)
    return fastest["float32"] / fastest["bfloat16"]


def _product(engine, precision):
    """A function that multiplies two matrices of 1024 x 1024 numbers."""
    if engine == "openvino":
        matrix, ops = np.full((1024, 1024), 0.5, np.float32), openvino().opset13
        given = ops.parameter(matrix.shape, np.float32)
        compute = compiled(openvino().Model([ops.matmul(given, matrix, False, False)], [given]), precision)
        return lambda: compute(matrix)
    import tensorflow as tf

    matrix = tf.fill((1024, 1024), tf.cast(0.5, precision))
    return lambda: tf.matmul(matrix, matrix).numpy()


def has_openvino():
    return importlib.util.find_spec("openvino") is not None


@functools.cache
def _core():
    """OpenVINO's, one for the process: each that goes points the stack of signal handlers to freed memory."""
    return openvino().Core()


def openvino():
    """OpenVINO, without the report to Google Analytics that it sends whenever it is imported."""
    sys.modules.setdefault("openvino_telemetry", None)  # so that it takes its own stand-in for a missing module
    import openvino

    return openvino


def compiled(model, precision):
    """A model of OpenVINO as a function of an array, computed by the processor.

    It is compiled for the shape of the array, for then it takes a third less memory than for any shape. Rotated
    versions of a section that is not square have two.
    """
    # Threads bound to cores wait for whatever else runs there: three times as long beside a training.
    core, options = _core(), {"INFERENCE_PRECISION_HINT": PRECISIONS[precision], "ENABLE_CPU_PINNING": False}

    @functools.lru_cache(maxsize=2)
    def for_shape(shape):
        model.reshape(shape)
        return core.compile_model(model, "CPU", options)

    return lambda array: for_shape(array.shape)(np.ascontiguousarray(array, np.float32))[0]


def use_xla(replicas):
    """`jit_compile` of the model: XLA's CPU convolutions are several times slower than oneDNN's.

    TensorFlow's sums over several replicas do not compile. PyTorch's compiler needs another one, of C++.
    """
    wanted = accelerator() is not None and replicas == 1
    return {"tensorflow": wanted, "torch": False}.get(backend(), "auto")


def computes_with_cudnn():
    """Whether convolutions are rearranged for it; tried with JAX only."""
    return backend() == "jax" and accelerator() is not None


def fused(function):
    """`function` of a dict of tensors, its element-wise operations fused: XLA inside TensorFlow's plain CPU graph.

    The other backends, and TensorFlow on a GPU, compile the whole step with a fusing compiler anyway.
    """
    if backend() != "tensorflow":
        return function
    import tensorflow as tf

    return tf.function(function, jit_compile=True)


def start_copying(variables):
    """Begin to fetch them to the host, all together: with JAX on a GPU one by one each waits half a millisecond."""
    for variable in variables if backend() == "jax" else ():
        variable.value.copy_to_host_async()


def one_update_per_call(replicas):
    """Whether Keras makes one update per call only: PyTorch, and replicas of TensorFlow (3.15 fails in its loop)."""
    return backend() == "torch" or (backend() == "tensorflow" and replicas > 1)


def steps_per_execution(asked, steps_per_epoch, replicas=1):
    """Updates per call of the compiled step: several on an accelerator, whose queue must not run dry, where it can."""
    if asked or not accelerator() or one_update_per_call(replicas):
        return asked or 1
    return max(n for n in range(1, min(10, steps_per_epoch) + 1) if steps_per_epoch % n == 0)


def describe(precision, engine="keras"):
    """The first line of a run."""
    if engine == "openvino":
        return f"device: {name()}; precision: {precision}"
    import keras

    return f"device: {name()}; backend: {backend()}, Keras {keras.__version__}; precision: {precision}"
