"""The layers' arithmetic where TensorFlow computes with oneDNN on a processor: the same numbers, sooner.

There one kernel runs after the other and nothing fuses them. How much sooner, of forward and backward pass together,
was measured on 2 cores of an Intel Xeon, in float32.
"""

import functools
import math
from itertools import accumulate, pairwise, product
from operator import add

import numpy as np

from network import device
from network.outline import EPSILON

LANES = 16  # float32 numbers of a register


def serves():
    """Whether TensorFlow computes with oneDNN here: on a processor, and in a build that has it."""
    return device.backend() == "tensorflow" and device.accelerator() is None and _is_there()


@functools.cache
def _is_there():
    """oneDNN knows the gradients of a dilated convolution, TensorFlow's own kernels do not."""
    import tensorflow as tf

    @tf.function(autograph=False)
    def gradients(x, kernel):
        return tf.gradients(tf.nn.conv2d(x, kernel, 1, "SAME", dilations=2), [x, kernel])

    with tf.init_scope():
        try:
            gradients(tf.zeros((1, 8, 8, 2)), tf.zeros((3, 3, 2, 2)))
        except tf.errors.OpError:
            return False
    return True


# -- convolution ------------------------------------------------------------------------------------------------


def convolution(layer, x, kernel, plain):
    """What `plain`, Keras's, makes of x. A dilated one is 1.0 to 3 times as fast as by Keras, which takes x apart.

    In bfloat16 it is left to Keras: oneDNN's gradients of dilated kernels are not finite there, or end the process,
    where the channels are no multiple of 16 (TensorFlow 2.21).

    One of what `Upsample` has enlarged is a transposed one of what that was given, 2 to 2.6 times as fast; where it was
    joined with others, they have convolutions of their own.
    """
    if max(layer.dilation_rate) > 1:
        import tensorflow as tf

        if x.dtype != tf.float32:
            return plain(x, kernel)
        return tf.nn.conv2d(x, kernel, layer.strides, layer.padding.upper(), dilations=layer.dilation_rate)
    parts = getattr(x, "parts", [x])
    if not can_enlarge(layer) or not any(hasattr(part, "small") for part in parts):
        return plain(x, kernel)
    kernels = shares(kernel, [part.shape[-1] for part in parts])
    return functools.reduce(add, (_of_part(*each, plain) for each in zip(parts, kernels, strict=True)))


def _of_part(x, kernel, plain):
    from keras import ops

    if not hasattr(x, "small"):
        return plain(x, kernel)
    return ops.conv_transpose(x.small, enlarging(kernel, ops), 2, "same", data_format="channels_last")


def can_enlarge(layer):
    """Whether `enlarging` can stand for a convolution of what is enlarged: 3 x 3, padded, of every pixel."""
    about = (layer.kernel_size, layer.strides, getattr(layer, "dilation_rate", (1, 1)), layer.padding)
    return about == ((3, 3), (1, 1), (1, 1), "same")


def shares(kernel, channels):
    """What of a kernel sees each of the inputs that are joined, which have so many channels."""
    return [kernel[:, :, first:end] for first, end in pairwise(accumulate(channels, initial=0))]


def enlarging(kernel, ops=np):
    """Of a kernel (3, 3, in, out) that of a transposed convolution with stride 2, (4, 4, out, in), that enlarges first.

    By nearest neighbours: each of its numbers is the sum of those that see the same pixel.
    """
    turned = ops.transpose(ops.flip(kernel, (0, 1)), (0, 1, 3, 2))
    moved = (ops.pad(turned, (*sides, (0, 0), (0, 0))) for sides in product([(0, 1), (1, 0)], repeat=2))
    return functools.reduce(add, moved)


# -- dropout ----------------------------------------------------------------------------------------------------


def drop(x, key, dropped):
    """`dropped(x, key)`, of the shape of x, as one pass, 2 to 3 times as fast; backwards the mask is made anew."""
    import tensorflow as tf

    compiled = _compiled(dropped, tuple(x.shape), x.dtype)

    @tf.custom_gradient
    def forward(x):
        return compiled({"x": x, "key": key}), lambda dy: compiled({"x": dy, "key": key})

    return forward(x)


@functools.cache
def _compiled(dropped, shape, dtype):
    """One for each shape: TensorFlow warns of a function that is traced again and again."""
    return device.fused(lambda given: dropped(given["x"], given["key"]))


# -- batch norm -------------------------------------------------------------------------------------------------


# Kernels are 3 to 9 times as slow for channels that do not fill the registers. So neighbouring pixels, so many that
# they do, are taken for one pixel of more channels; these have statistics of their own, which are joined.


def batch_norm(x, gamma, beta):
    """x (B, h, w, C) normalised by its batch, and that batch's mean and biased variance, (C,) each, in float32."""
    near = neighbours(x)
    if near and near > 1:
        return _of_neighbours(x, gamma, beta, near)
    y, mean, variance, *_ = _kernel(x, gamma, beta, is_training=True)
    return y, mean, variance * _biased(_count(x))


def neighbours(x):
    """How many pixels are taken for one; None if they do not fill the rows, or if it is not known whether they do."""
    near, pixels = LANES // math.gcd(x.shape[-1], LANES), math.prod(side or 0 for side in x.shape[1:3])
    return near if serves() and pixels and pixels % near == 0 else None


def _kernel(x, scale, offset, mean=(), variance=(), is_training=False):
    import tensorflow as tf

    about = {"mean": mean, "variance": variance, "epsilon": EPSILON, "is_training": is_training}
    return tf.raw_ops.FusedBatchNormV3(x=x, scale=scale, offset=offset, **about)


def _count(x):
    import tensorflow as tf

    return tf.cast(tf.size(x, tf.int64) // x.shape[-1], tf.float32)


def _biased(count):
    return (count - 1) / count


def _of_neighbours(x, gamma, beta, near):
    import tensorflow as tf

    channels = x.shape[-1]

    def apart(numbers):
        return tf.tile(numbers, [near])

    def joined(numbers, how):
        return how(tf.reshape(numbers, (near, channels)), 0)

    def wide(x):
        return tf.reshape(x, (1, 1, -1, near * channels))

    @tf.custom_gradient
    def normalise(x, gamma, beta):
        ones = tf.ones(near * channels)
        _, means, variances, *_ = _kernel(wide(x), ones, ones, is_training=True)
        mean = joined(means, tf.reduce_mean)
        variances = variances * _biased(_count(x) / near) + (means - apart(mean)) ** 2
        variance = joined(variances, tf.reduce_mean)
        moments = apart(mean), apart(variance)
        y, *_ = _kernel(wide(x), apart(gamma), apart(beta), *moments)

        def gradients(dy, *_):
            about = {"scale": apart(gamma), "epsilon": EPSILON, "is_training": False}
            about |= dict(zip(("reserve_space_1", "reserve_space_2", "reserve_space_3"), (*moments, ()), strict=True))
            dx, *sums = tf.raw_ops.FusedBatchNormGradV3(y_backprop=wide(dy), x=wide(x), **about)[:3]
            dgamma, dbeta = (joined(each, tf.reduce_sum) for each in sums)
            # So far of fixed statistics; since they depend on x, a batch norm by other numbers comes to it.
            share = -gamma * tf.math.rsqrt(variance + EPSILON) / _count(x)
            dx += _kernel(wide(x), apart(share * dgamma), apart(share * dbeta), *moments)[0]
            return tf.reshape(dx, tf.shape(x)), dgamma, dbeta

        return (tf.ensure_shape(tf.reshape(y, tf.shape(x)), x.shape), mean, variance), gradients

    return normalise(x, gamma, beta)
