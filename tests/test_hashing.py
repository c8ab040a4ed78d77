"""Random bits: the written-down hash on every backend, uniform, a function of the key, and on the device."""

import keras
import numpy as np
import pytest
from keras import ops

from network import device, hashing, layers

pytestmark = pytest.mark.jax


def reference(count, first, second):
    """The words, in numpy."""
    first, second = (np.array(half).astype(np.uint32) for half in (first, second))
    words = np.arange(count, dtype=np.uint32) * np.uint32(0x9E3779B1)
    words = words ^ (first * np.uint32(747796405) + second * np.uint32(0xAC564B05))
    words = (words ^ (words >> 15)) * np.uint32(0x85EBCA6B) + second * np.uint32(1540483477)
    words = (words ^ (words >> 13)) * np.uint32(0xC2B2AE35)
    return words ^ (words >> 16)


def draw(shape, key):
    return np.asarray(hashing.random_bytes(shape, ops.array(key, "uint32")))


def test_words_and_bytes_are_those_of_the_hash_on_every_backend_uniform_and_a_function_of_their_key():
    keys = np.array([[0], [1], [-5], [2**31 - 1], [-(2**31)]], np.int32)
    for first, second in ((keys, 0), (3, keys), (keys[1, 0], keys[2, 0])):
        words = ops.convert_to_numpy(hashing.random_words(1000, (first, second))).astype(np.uint32)
        np.testing.assert_array_equal(words, reference(1000, first, second))
    assert draw((2, 5), (7, 1)).tolist() == [[96, 93, 181, 209, 163], [57, 198, 132, 103, 139]]
    np.testing.assert_array_equal(draw((3, 8), (7, 1)).ravel(), reference(6, 7, 1).view(np.uint8))
    first = draw((40, 50), (1, 2)).ravel()
    for other in ((1, 3), (2, 2), (0, 1)):
        assert abs(np.corrcoef(first, draw((40, 50), other).ravel())[0, 1]) < 0.1
    key = ops.array([3, 5], "uint32")
    parts = [ops.convert_to_numpy(hashing.random_bytes((2, 3, 8), key, part)) for part in range(2)]
    assert np.array_equal(np.concatenate(parts), draw((4, 3, 8), (3, 5)))
    x = draw((64, 64, 64), (5, 9)).astype(int)
    counts = np.bincount(x.ravel(), minlength=256)
    chi_squared = ((counts - x.size / 256) ** 2 / (x.size / 256)).sum()
    assert 170 < chi_squared < 360  # 255 degrees of freedom, six standard deviations either way
    for axis in range(3):
        y = np.moveaxis(x, axis, 0)
        assert abs(np.corrcoef(y[:-1].ravel(), y[1:].ravel())[0, 1]) < 0.012


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="TensorFlow computes with int32 on the host")
def test_a_mask_is_made_on_the_gpu(monkeypatch):
    """Every operation on more than a few numbers has a kernel there that keeps neither input nor output on the host."""
    import tensorflow as tf
    from tensorflow.python.framework.kernels import get_registered_kernels_for_op

    def on_gpu(operation):
        kinds = {name: tf.as_dtype(value.type) for name, value in operation.node_def.attr.items() if value.type}
        inputs = zip(operation.op_def.input_arg, operation.inputs, strict=False)
        large = {arg.name for arg, x in inputs if (x.shape.num_elements() or 0) > 100}
        large |= {arg.name for arg in operation.op_def.output_arg}
        for kernel in get_registered_kernels_for_op(operation.type).kernel:
            asked = {one.name: one.allowed_values.list.type for one in kernel.constraint}
            fits = all(kinds[name].as_datatype_enum in allowed for name, allowed in asked.items())
            if kernel.device_type in ("GPU", "DEFAULT") and fits and not large & set(kernel.host_memory_arg):
                return True
        return False

    monkeypatch.setattr(device, "accelerator", lambda: "a GPU")
    layer = layers.Dropout(0.5)
    graph = tf.function(lambda x: layer.drop(x)).get_concrete_function(tf.TensorSpec((2, 64, 64, 8))).graph
    heavy = [one for one in graph.get_operations() if any((x.shape.num_elements() or 0) > 100 for x in one.outputs)]
    assert {"Range", "Mul", "AddV2", "BitwiseXor", "Bitcast", "Less", "Cast"} <= {one.type for one in heavy}
    assert [one.name for one in heavy if not on_gpu(one)] == []
