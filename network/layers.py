"""The layers of the networks, and the random bits of their dropout. Class names are keys in the files of weights."""

import keras
from keras import ops

from network import distribution

EPSILON = 1e-3  # batch norm, the framework's default and so the study's
MOMENTUM = 0.99

# -- dropout and batch norm -------------------------------------------------------------------------------------
# On a CPU the convolutions of this network run near the hardware's peak, while stock dropout (a float32 uniform
# number per element) and stock batch norm (generic reductions) cost more than half of an update. The mathematics
# below is the same; only the random bits are fewer and the sums are matrix products.


def random_bytes(shape, key, part=0):
    """Uniform random bytes, a pure function of (shape, key), the same on every backend.

    Parameters
    ----------
    shape : tuple of int or scalar tensors
    key : tensor of shape (2,), integer
        For instance the state of a `keras.random.SeedGenerator`.
    part : int or scalar tensor
        Which part of a larger array this is, all parts being of one shape, their sizes a multiple of 4.

    Returns
    -------
    tensor of dtype uint8 and shape `shape`

    Notes
    -----
    A 32-bit counter goes through a multiply-xorshift mixer (the finaliser family of MurmurHash3 and PCG), and each
    hash yields four bytes: a third of the cost of stock dropout on a CPU is the generator.
    """
    count = 1
    for size in shape:
        count = count * size
    key = ops.cast(key, "int32")
    words = ops.arange((count + 3) // 4, dtype="int32") + part * ((count + 3) // 4)
    words = words * -1640531535  # 2^32 / golden ratio, odd
    words = _mix(ops.bitwise_xor(words, key[0] * 747796405 + key[1] * -1403630843), 15, 0x1FFFF, -2048144789)
    words = _mix(words + key[1] * 1540483477, 13, 0x7FFFF, -1028477387)
    words = ops.bitwise_xor(words, ops.bitwise_and(ops.right_shift(words, 16), 0xFFFF))
    return ops.reshape(ops.reshape(_bytes_of(words), (-1,))[:count], shape)


def _bytes_of(words):
    if keras.backend.backend() == "tensorflow":  # whose `ops.view` needs a static shape
        import tensorflow as tf

        return tf.bitcast(words, tf.uint8)
    return ops.view(words, dtype="uint8")


def _mix(words, shift, mask, factor):
    # The mask turns the arithmetic right shift of a signed integer into a logical one.
    return ops.bitwise_xor(words, ops.bitwise_and(ops.right_shift(words, shift), mask)) * factor


def kept_levels(rate):
    """Number of the 256 byte values that survive dropout, so that 1 - kept / 256 is nearest to `rate`."""
    if not 0 <= rate < 1:
        raise ValueError(f"dropout must be at least 0 and below 1. Received: {rate}")
    return max(1, round(256 * (1 - rate)))


def _keep_mask(x, rate, key):
    """1 where an element survives, 0 elsewhere, in the dtype of x; and the factor that keeps the expectation."""
    kept = kept_levels(rate)
    survives = random_bytes(ops.shape(x), key, distribution.replica()) < ops.cast(kept, "uint8")
    return ops.cast(survives, x.dtype), 256 / kept


class Dropout(keras.layers.Layer):
    """Inverted dropout with an 8-bit random mask (probabilities in steps of 1/256, the expectation kept exactly)."""

    pointwise = True

    def __init__(self, rate, seed=0, **kwargs):
        super().__init__(**kwargs)
        self.rate = rate
        self.seed_generator = keras.random.SeedGenerator(seed) if kept_levels(rate) < 256 else None

    def call(self, x, training=False):
        if not training or self.seed_generator is None:
            return x
        mask, factor = _keep_mask(x, self.rate, self.seed_generator.next())
        return x * (mask * ops.cast(factor, x.dtype))

    def compute_output_shape(self, input_shape):
        return input_shape


class BatchNormDropout(keras.layers.Layer):
    """Batch norm over all but the last axis, then dropout, as one layer ("BN-drop"; `rate=0` is plain batch norm).

    Batch statistics are means over (batch, rows, columns), the variance the biased one; moving averages with
    momentum 0.99, epsilon 1e-3 (Ioffe & Szegedy 2015, arXiv 1502.03167). Four float32 parameters a channel.
    """

    pointwise = True

    def __init__(self, rate=0.0, seed=0, **kwargs):
        super().__init__(**kwargs)
        self.rate = rate
        self.seed_generator = keras.random.SeedGenerator(seed) if kept_levels(rate) < 256 else None

    def build(self, input_shape):
        def add(name, initializer, trainable):
            return self.add_weight(
                shape=(input_shape[-1],), name=name, initializer=initializer, trainable=trainable, autocast=False
            )

        self.gamma = add("gamma", "ones", True)
        self.beta = add("beta", "zeros", True)
        self.moving_mean = add("moving_mean", "zeros", False)
        self.moving_variance = add("moving_variance", "ones", False)

    def call(self, x, training=False):
        if not training:
            scale = self.gamma * ops.rsqrt(self.moving_variance + EPSILON)
            return _affine(x, scale, self.beta - self.moving_mean * scale)
        mean, variance = _moments(x)
        for moving, batch in ((self.moving_mean, mean), (self.moving_variance, variance)):
            moving.assign(moving * MOMENTUM + ops.stop_gradient(batch) * (1 - MOMENTUM))
        mask, factor = None, 1.0
        if self.seed_generator is not None:
            mask, factor = _keep_mask(x, self.rate, self.seed_generator.next())
        normalise = _normalise_by_hand if keras.backend.backend() == "tensorflow" else _normalise
        return normalise(x, self.gamma, self.beta, mean, variance, mask, factor)

    def compute_output_shape(self, input_shape):
        return input_shape


def _moments(x):
    """Mean and biased variance of each channel over the whole batch, float32."""
    mean, square = ops.unstack(distribution.total(ops.stack([_channel_sums(x), _channel_sums(x * x)])) / _count(x))
    return mean, ops.maximum(square - mean * mean, 0.0)


def _count(x):
    """Elements of each channel of the whole batch."""
    return ops.cast(ops.prod(ops.shape(x)[:-1]) * distribution.replicas(), "float32")


def _channel_sums(x):
    """Sum over all but the last axis, accumulated in float32."""
    if keras.backend.backend() != "tensorflow":
        return ops.sum(ops.cast(x, "float32"), axis=(0, 1, 2))
    batch, rows, columns, channels = ops.shape(x)
    # A product with a row of ones is four times faster than TensorFlow's CPU reduction over the leading axes.
    lines = ops.reshape(x, (batch * rows, columns, channels))
    partial = ops.matmul(ops.ones((batch * rows, 1, columns), dtype=x.dtype), lines)
    return ops.sum(ops.cast(partial, "float32"), axis=(0, 1))


def _affine(x, scale, shift=None):
    """x * scale + shift per channel."""
    if keras.backend.backend() != "tensorflow" or x.dtype != "bfloat16":
        product = x * ops.cast(scale, x.dtype)
        return product if shift is None else product + ops.cast(shift, x.dtype)
    # oneDNN's bfloat16 product with a diagonal matrix, bias fused, beats the broadcast multiply and add by 2.5.
    flat = ops.reshape(x, (-1, x.shape[-1]))
    product = ops.matmul(flat, ops.diag(ops.cast(scale, x.dtype)))
    if shift is not None:
        product = product + ops.cast(shift, x.dtype)
    return ops.reshape(product, ops.shape(x))


def _normalise(x, gamma, beta, mean, variance, mask, factor):
    scale = gamma * ops.rsqrt(variance + EPSILON) * factor
    y = _affine(x, scale, beta * factor - mean * scale)
    return y if mask is None else y * mask


def _normalise_by_hand(x, gamma, beta, mean, variance, mask, factor):
    """`_normalise` with its gradient written out: two sums and two scalings instead of a dozen generic passes."""
    mean, variance = ops.stop_gradient(mean), ops.stop_gradient(variance)
    inverse = ops.rsqrt(variance + EPSILON)
    count = _count(x)

    @ops.custom_gradient
    def forward(x, gamma, beta):
        y = _normalise(x, gamma, beta, mean, variance, mask, factor)

        def gradient(upstream):
            g = upstream if mask is None else upstream * mask
            sum_g = _channel_sums(g)
            sum_gx = (_channel_sums(g * x) - mean * sum_g) * inverse  # against the normalised x
            all_g, all_gx = ops.unstack(distribution.total(ops.stack([sum_g, sum_gx])))
            scale = gamma * inverse * factor
            slope = -scale * inverse * all_gx / count
            grad_x = _affine(g, scale, -scale * all_g / count - slope * mean) + _affine(x, slope)
            return grad_x, factor * sum_gx, factor * sum_g

        return y, gradient

    return forward(x, 1.0 * gamma, 1.0 * beta)  # tensors: a variable would be watched behind the gradient's back


class Upsample(keras.layers.Layer):
    """Nearest-neighbour 2x upsampling as a broadcast, several times faster on a CPU than a gather."""

    size, interpolation = (2, 2), "nearest"

    def call(self, x):
        batch, rows, columns, channels = ops.shape(x)
        x = ops.reshape(x, (batch, rows, 1, columns, 1, channels))
        x = ops.broadcast_to(x, (batch, rows, 2, columns, 2, channels))
        return ops.reshape(x, (batch, 2 * rows, 2 * columns, channels))

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


class InputSize(keras.layers.Layer):
    """Hands its input on; refuses one whose sides do not fit the network's `field`, before a layer far below fails."""

    pointwise, field = True, None

    def call(self, x):
        self.compute_output_shape(x.shape)
        return x

    def compute_output_shape(self, input_shape):
        for name, size in zip(("rows of the input", "columns of the input"), input_shape[1:3], strict=True):
            if self.field is not None and size is not None:
                self.field.check_size(name, size)
        return input_shape
