"""Random bits as a pure function of a key, the same on every backend and device: no generator has a state."""

import math

import keras
import numpy as np
from keras import ops


def random_words(count, key, part=0):
    """Uniform random 32-bit words, (count,) or (B, count); of stock dropout's cost on a CPU a third is the generator.

    uint32, and int32 of the same bits with PyTorch, which has no uint32 to compute with. `key` is a pair of integers or
    tensors, each a scalar or of shape (B, 1); `part` says which part of a larger array this is, all of `count` words.

    A counter goes through a multiply-xorshift mixer, the finaliser family of MurmurHash3 and PCG. Unsigned, since
    TensorFlow multiplies and adds int32 on the host, whatever the device; its ranges on a GPU are of 64 bits.
    """
    backend = keras.backend.backend()
    kind = "int32" if backend == "torch" else "uint32"

    def number(value):
        return ops.convert_to_tensor(np.uint32(value).astype(kind))

    def mix(words, shift, factor):
        # The mask turns the arithmetic right shift of a signed integer into a logical one.
        shifted = ops.bitwise_and(ops.right_shift(words, number(shift)), number(2 ** (32 - shift) - 1))
        return ops.bitwise_xor(words, shifted) * number(factor)

    first, second = (ops.cast(half, kind) for half in (key[0], key[1]))
    counter = ops.arange(count, dtype="int64" if backend == "tensorflow" else kind)
    words = (ops.cast(counter, kind) + ops.cast(part * count, kind)) * number(0x9E3779B1)  # 2^32 / golden ratio, odd
    words = mix(ops.bitwise_xor(words, first * number(0x2C9277B5) + second * number(0xAC564B05)), 15, 0x85EBCA6B)
    words = mix(words + second * number(0x5BD1E995), 13, 0xC2B2AE35)
    return mix(words, 16, 1)


def random_bytes(shape, key, part=0):
    """Uniform random bytes, uint8 of `shape`: four of each word, so that the size of a part is a multiple of 4."""
    count = math.prod(shape)
    words = random_words((count + 3) // 4, key, part)
    if keras.backend.backend() == "tensorflow":  # whose `ops.view` needs a static shape
        import tensorflow as tf

        found = tf.bitcast(words, tf.uint8)
    else:
        found = ops.view(words, dtype="uint8")
    return ops.reshape(ops.reshape(found, (-1,))[:count], shape)
