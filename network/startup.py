"""What must be right before Keras is imported: backend, cluster, devices; then the backend is loaded, quietly.

Only who predicts with OpenVINO goes without: `device.accelerator` then finds none.
"""

import importlib.util
import json
import os
import re

from files.atomic import DataError
from files.shell import quiet_stderr, say
from network import device

INSTALL = {"tensorflow": "tensorflow", "jax": '"jax[cpu]"', "torch": "torch"}
CLUSTER = 'TF_CONFIG must look like {"cluster": {"worker": ["host:1234"]}, "task": {"type": "worker", "index": 0}}'
COUNTS = ("KERAS_DISTRIBUTION_NUM_PROCESSES", "KERAS_DISTRIBUTION_PROCESS_ID")


def prepare(gpu, shared=False, engine="keras"):
    """Load the backend, if `engine` needs it, for the devices named by `gpu`, or for all in a run that is `shared`.

    A DataError where the environment names a backend that is not there, or no cluster that makes sense.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    if gpu == "-1":
        os.environ["KERAS_TORCH_DEVICE"] = "cpu"  # no Apple GPU either
    if shared:
        check_cluster()
    else:
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    without = device.has_openvino() and not device.may_have_accelerator() if engine == "auto" else engine == "openvino"
    if not without:
        load_backend(shared)
    if gpu not in (None, "-1") and not shared and engine != "openvino" and not device.accelerator():
        say(f"--gpu {gpu}: no such GPU is found here, so the CPU computes")


def load_backend(shared=False):
    """Import Keras and let its backend look for its devices."""
    check_backend(os.environ.get("KERAS_BACKEND") or "tensorflow")
    try:
        with quiet_stderr():
            import keras

            check_backend(keras.backend.backend())  # ~/.keras/keras.json can name another
            if not (shared and keras.backend.backend() == "jax"):  # whose processes first find each other
                device.accelerator()
    except DataError:
        raise
    except Exception as error:  # JAX says in many ways that it dislikes a variable of the environment
        raise DataError(f"Keras or its backend cannot be loaded: {str(error) or type(error).__name__}") from error


def check_backend(name):
    """Refuse a backend that does not exist or is not installed."""
    if name not in INSTALL:
        raise DataError(f"KERAS_BACKEND must be one of {', '.join(INSTALL)}. Received: {name}")
    if importlib.util.find_spec(name) is None:
        raise DataError(f"KERAS_BACKEND={name} needs {name}, which is not installed: pip install {INSTALL[name]}")


def check_cluster():
    """Refuse an environment that names other processes in a way that the frameworks stumble over."""
    try:
        config = json.loads(os.environ.get("TF_CONFIG") or "{}")
        cluster, task = config.get("cluster", {}), config.get("task", {})
        hosts = [host for kind in cluster.values() for host in kind]
        good = all(re.fullmatch(r"\S+:[0-9]{1,5}", host) for host in hosts) and int(task.get("index", 0)) >= 0
    except (ValueError, TypeError, AttributeError, RecursionError):
        good = False
    if not good:
        raise DataError(f"{CLUSTER}. Received: {os.environ['TF_CONFIG'][:80]}")
    for name in COUNTS:
        if not os.environ.get(name, "0").isdecimal():
            raise DataError(f"{name} must be a whole number. Received: {os.environ[name]}")
