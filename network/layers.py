"""The layers of the networks, with Keras's own. Their class names are keys in the files of weights."""

import functools

import keras
from keras import Input, Model, ops
from keras.layers import Add, Cropping2D, MaxPooling2D

from network import device, distribution, onednn, optimizers
from network.hashing import random_bytes
from network.outline import EPSILON, MOMENTUM

__all__ = ["Add", "BatchNormDropout", "Concatenate", "Conv2D", "Conv2DTranspose", "Cropping2D", "Dropout", "Input"]
__all__ += ["Interior", "MaxPooling2D", "Model", "Upsample"]

# What the networks are made for, whatever ~/.keras/keras.json says.
keras.config.set_image_data_format("channels_last")
keras.config.set_floatx("float32")

# -- convolution ------------------------------------------------------------------------------------------------


class Conv2D(keras.layers.Conv2D):
    """Keras's. On a processor with TensorFlow it is `onednn.convolution`; on a GPU with JAX the same sums for cuDNN."""

    def convolution_op(self, inputs, kernel):
        if onednn.serves():
            return onednn.convolution(self, inputs, kernel, super().convolution_op)
        if not device.computes_with_cudnn():
            return super().convolution_op(inputs, kernel)
        width = kernel.shape[-1]
        if inputs.dtype == "bfloat16":
            inputs, kernel = _aligned(inputs, kernel)
        return self._every_nth(inputs, kernel)[..., :width]

    def _every_nth(self, x, kernel):
        """A dilated convolution as a plain one of every `rate`-th row and column, where these fit.

        cuDNN has no fast kernels for dilated convolutions in bfloat16: on an H200 the dilated network of 2017 took 3
        times as long as the standard one.
        """
        (rate, across), (rows, columns, channels) = self.dilation_rate, x.shape[1:]
        fits = rows and columns and rate == across > 1 and rows % rate == columns % rate == 0
        if not (fits and self.padding == "same" and self.strides == (1, 1)):
            return super().convolution_op(x, kernel)
        x = ops.reshape(x, (-1, rows // rate, rate, columns // rate, rate, channels))
        x = ops.reshape(ops.transpose(x, (0, 2, 4, 1, 3, 5)), (-1, rows // rate, columns // rate, channels))
        x = ops.conv(x, kernel, padding="same", data_format=self.data_format)
        x = ops.reshape(x, (-1, rate, rate, rows // rate, columns // rate, kernel.shape[-1]))
        return ops.reshape(ops.transpose(x, (0, 3, 1, 4, 2, 5)), (-1, rows, columns, kernel.shape[-1]))


class Conv2DTranspose(keras.layers.Conv2DTranspose):
    """Keras's. On a GPU with JAX an up-convolution is a product of matrices: its inputs do not meet.

    Of the gradient of its weights XLA makes a convolution with a kernel of the size of a section (JAX 0.10).
    """

    def call(self, x):
        if not (device.computes_with_cudnn() and self.kernel_size == self.strides):
            return super().call(x)
        (_, rows, columns, channels), (down, across) = x.shape, self.strides
        kernel = ops.reshape(ops.transpose(self.kernel, (3, 0, 1, 2)), (channels, down * across * self.filters))
        y = ops.reshape(ops.matmul(x, kernel), (-1, rows, columns, down, across, self.filters))
        y = ops.reshape(ops.transpose(y, (0, 1, 3, 2, 4, 5)), (-1, rows * down, columns * across, self.filters))
        return self.activation(y + ops.convert_to_tensor(self.bias))


def _aligned(x, kernel):
    """Both with channels of zeros up to a multiple of 16, but for a few outputs such as the classes.

    cuDNN's fast bfloat16 kernels want that: on an H200 an update of the networks of 2017, of 44 channels, takes 10.4 ms
    in place of 14.3.
    """
    more_in, more_out = (-width % 16 for width in kernel.shape[2:])
    more_out *= kernel.shape[-1] >= 8
    widened = ops.pad(kernel, ((0, 0), (0, 0), (0, more_in), (0, more_out)))
    return ops.pad(x, ((0, 0), (0, 0), (0, 0), (0, more_in))), widened


# -- dropout and batch norm -------------------------------------------------------------------------------------
# On a CPU stock dropout (a float32 uniform number per element) and stock batch norm (generic reductions) cost more
# than half of an update. The mathematics below is the same; the random bits are fewer, and the kernels oneDNN's.


class _Masking(keras.layers.Layer):
    """A layer that drops out elements where a byte is not among the `kept` values; a new key for every update."""

    pointwise = True

    def __init__(self, rate=0.0, seed=0, **kwargs):
        super().__init__(**kwargs)
        if not (rate == 0 or 1 / 512 < rate < 1):
            raise ValueError(f"dropout must be 0, or above 1/512 and below 1. Received: {rate}")
        self.kept = max(1, round(256 * (1 - rate)))
        self.seed_generator = keras.random.SeedGenerator(seed) if self.kept < 256 else None

    @property
    def factor(self):
        """What keeps the expectation."""
        return 1.0 if self.seed_generator is None else 256 / self.kept

    def drop(self, x, factor=1.0):
        """x where an element survives, times `factor`; 0 elsewhere."""
        if self.seed_generator is None:
            return x
        key, dropped = self.seed_generator.next(), _dropping(self.kept, factor)
        if onednn.serves() and distribution.replicas() == 1:
            return onednn.drop(x, key, dropped)
        return dropped(x, key)

    def compute_output_shape(self, input_shape):
        return input_shape


@functools.cache
def _dropping(kept, factor):
    """A function of x and a key: x times `factor` where its byte is among the `kept` values."""

    def dropped(x, key):
        survives = random_bytes(ops.shape(x), key, distribution.replica()) < ops.cast(kept, "uint8")
        return x * (ops.cast(survives, x.dtype) * ops.cast(factor, x.dtype))

    return dropped


class Dropout(_Masking):
    """Inverted dropout with an 8-bit random mask: probabilities in steps of 1/256, the expectation kept.

    In bfloat16 the factor is rounded, and the expectation with it, by up to 0.2 % (at a rate of 0.3, 0.03 %).
    """

    def call(self, x, training=False):
        return self.drop(x, self.factor) if training else x


class BatchNormDropout(_Masking):
    """Batch norm over all but the last axis, then dropout, as one layer ("BN-drop"; `rate=0` is plain batch norm).

    Batch statistics are means over (batch, rows, columns) in float32, the variance the biased one; moving averages
    with `momentum`, epsilon 1e-3 (Ioffe & Szegedy 2015, arXiv 1502.03167). Four float32 parameters a channel.
    """

    update = None  # a function that gives the number of the update, where the averages are warmed up

    def __init__(self, rate=0.0, seed=0, momentum=MOMENTUM, **kwargs):
        super().__init__(rate, seed, **kwargs)
        self.momentum = momentum

    def build(self, input_shape):
        def add(name, initializer, trainable=True):
            options = {"initializer": initializer, "trainable": trainable, "autocast": False}
            return self.add_weight(shape=(input_shape[-1],), name=name, **options)

        self.gamma, self.beta = add("gamma", "ones"), add("beta", "zeros")
        self.moving_mean = add("moving_mean", "zeros", trainable=False)
        self.moving_variance = add("moving_variance", "ones", trainable=False)

    def call(self, x, training=False):
        if not training:
            return _normalise(x, self.gamma, self.beta, self.moving_mean, self.moving_variance)
        y, mean, variance = _normalise_by_batch(x, self.gamma * self.factor, self.beta * self.factor)
        momentum = optimizers.warmed_up(self.momentum, self.update()) if self.update else self.momentum
        for moving, batch in ((self.moving_mean, mean), (self.moving_variance, variance)):
            moving.assign(moving * momentum + ops.stop_gradient(batch) * (1 - momentum))
        return self.drop(y)


def _normalise_by_batch(x, gamma, beta):
    """x (B, h, w, C) normalised by its batch, and that batch's mean and biased variance, (C,) each, in float32."""
    alone = distribution.replicas() == 1 and device.accelerator() is None
    if keras.backend.backend() == "tensorflow" and alone:
        return onednn.batch_norm(x, gamma, beta)
    mean, variance = _moments(x)
    return _normalise(x, gamma, beta, mean, variance), mean, variance


def _moments(x):
    """Mean and biased variance of each channel over the whole batch, float32."""
    # Sums of what is left after the mean of the first rows: far from 0 the difference of large sums would cancel.
    near = ops.stop_gradient(ops.mean(ops.cast(x[:, 0], "float32"), axis=(0, 1)))
    near = distribution.total(near) / distribution.replicas()
    away = ops.cast(x, "float32") - near
    sums = ops.stack([ops.sum(power, axis=(0, 1, 2)) for power in (away, away * away)])
    mean, square = ops.unstack(distribution.total(sums) / _count(x))
    return mean + near, ops.maximum(square - mean * mean, 0.0)


def _count(x):
    """Elements of each channel of the whole batch."""
    return ops.cast(ops.prod(ops.shape(x)[:-1]) * distribution.replicas(), "float32")


def _normalise(x, gamma, beta, mean, variance):
    scale = gamma * ops.rsqrt(variance + EPSILON)
    return x * ops.cast(scale, x.dtype) + ops.cast(beta - mean * scale, x.dtype)


class Concatenate(keras.layers.Concatenate):
    """Keras's; what it gives knows its `parts`, for `onednn.convolution`."""

    def call(self, inputs):
        joined = super().call(inputs)
        if onednn.serves():
            joined.parts = inputs
        return joined


class Upsample(keras.layers.Layer):
    """Nearest-neighbour 2x upsampling as a broadcast, several times faster on a CPU than a gather.

    What it gives knows what was `small`, for `onednn.convolution`.
    """

    size, interpolation = (2, 2), "nearest"

    def call(self, x):
        small, (batch, rows, columns, channels) = x, ops.shape(x)
        x = ops.reshape(x, (batch, rows, 1, columns, 1, channels))
        x = ops.broadcast_to(x, (batch, rows, 2, columns, 2, channels))
        x = ops.reshape(x, (batch, 2 * rows, 2 * columns, channels))
        if onednn.serves():
            x.small = small
        return x

    def compute_output_shape(self, input_shape):
        batch, rows, columns, channels = input_shape
        return batch, rows and 2 * rows, columns and 2 * columns, channels


class Interior(keras.layers.Layer):
    """Softmax over the classes, float32; of it the interior, class 1: (B, h, w, classes) -> (B, h, w)."""

    pointwise = True

    def call(self, x):
        return ops.softmax(x, axis=-1)[..., 1]

    def compute_output_shape(self, input_shape):
        return input_shape[:-1]
