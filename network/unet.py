"""The networks: the standard and the dilated U-net of the 2017 study, and the U-Net of 2015, each built by one loop.

>>> network = build(filters=(4, 8), centre_dilations=(1, 2))
>>> network.output_shape
(None, None, None)
>>> receptive_field(filters=(4, 8), centre_dilations=(1, 2)).radius > 0
True
>>> build_2015(filters=2).compute_output_shape((1, 572, 572, 1))
(1, 388, 388)
"""

from dataclasses import dataclass
from math import sqrt

import keras
from keras import ops

from network import distribution

FILTERS = (44, 88, 176)
CENTRE_DILATIONS = (1, 2, 4, 8, 16, 32)
PARAMETERS_2017 = 2_772_816
PARAMETERS_2015 = 31_030_658  # 64 filters, 4 levels, 1 channel, 2 classes
PADDINGS = ("valid", "same")
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


# -- the networks of 2017 ---------------------------------------------------------------------------------------


def build(
    *,
    filters=FILTERS,
    dilate=True,
    dilate_rate=2,
    addition=True,
    centre_dilations=CENTRE_DILATIONS,
    dropout=0.3,
    channels=1,
    classes=2,
    precision="float32",
    seed=0,
):
    """The U-net of the 2017 study, or a wider, deeper or shallower one of the same design.

    Parameters
    ----------
    filters : sequence of int
        Filters of the contracting levels; the centre has as many as the last level.
    dilate : bool
        Centre convolutions dilated by `centre_dilations` instead of 1.
    dilate_rate : int
        Dilation of the second convolution of each contracting level.
    addition : bool
        The centre's output is the sum of its convolutions instead of the last one alone.
    dropout : float
        Fraction dropped after each batch norm but the last two, and after each pooling.
    channels : int
        Channels of the input.
    classes : int
        Channels of the softmax; class 1 is the interior.
    precision : {"float32", "bfloat16"}
        bfloat16 computes in bfloat16 and keeps float32 weights, statistics and softmax.
    seed : int
        Of the initial weights and the dropout masks.

    Returns
    -------
    keras.Model
        (B, h, w, channels) float32, standardised, h and w multiples of 2 ** len(filters), to the interior
        probability (B, h, w), float32.

    Raises
    ------
    ValueError
        If an argument is out of its range.
    """
    _check(filters, dilate_rate, centre_dilations, channels, classes, precision)
    make = _Layers(precision, dropout, seed)
    inputs = keras.Input((None, None, channels), name="section")
    x, skips = inputs, []
    for level, width in enumerate(filters, 1):
        x = make.conv(x, width, f"down{level}_conv1")
        x = make.bn_drop(x, f"down{level}_bn1")
        x = make.conv(x, width, f"down{level}_conv2", dilation=dilate_rate)
        skips.append(x)
        x = make.bn_drop(x, f"down{level}_bn2")
        x = make.pool(x, f"down{level}_pool")
        x = make.drop(x, f"down{level}_drop")
    centre = []
    for i, dilation in enumerate(centre_dilations, 1):
        x = make.conv(x, filters[-1], f"centre_conv{i}", dilation=dilation if dilate else 1)
        centre.append(x)
        if i < len(centre_dilations):
            x = make.bn_drop(x, f"centre_bn{i}")
    if addition and len(centre) > 1:
        x = make.add(centre, "centre_sum")
    for level in range(len(filters), 0, -1):
        width = max(1, filters[level - 1] // 2)
        x = make.upsample(x, f"up{level}_upsample")
        x = make.conv(x, width, f"up{level}_conv1")
        x = make.concatenate([skips[level - 1], x], f"up{level}_concatenate")
        x = make.bn_drop(x, f"up{level}_bn1")
        x = make.conv(x, width, f"up{level}_conv2")
        x = make.batch_norm(x, f"up{level}_bn2")
        x = make.conv(x, width, f"up{level}_conv3")
    x = make.batch_norm(x, "head_bn")
    x = make.head(x, classes, "head_conv")
    name = ("dilated" if dilate else "standard") + "_unet"
    return keras.Model(inputs, Interior(dtype="float32", name="interior")(x), name=name)


def _check(filters, dilate_rate, centre_dilations, channels, classes, precision):
    if not filters or min(filters) < 1:
        raise ValueError(f"filters must be one positive number per level. Received: {filters}")
    if not centre_dilations or min(centre_dilations) < 1:
        raise ValueError(f"centre_dilations must be positive whole numbers. Received: {centre_dilations}")
    _check_at_least(("dilate_rate", dilate_rate, 1), ("channels", channels, 1), ("classes", classes, 2))
    _check_precision(precision)


def _check_at_least(*rules):
    for name, value, least in rules:
        if value < least:
            raise ValueError(f"{name} must be at least {least}. Received: {value}")


def _check_precision(precision):
    if precision not in ("float32", "bfloat16"):
        raise ValueError(f"precision must be float32 or bfloat16. Received: {precision}")


class _Layers:
    """The layers of one network: dtype policy, dropout rate, and a seed of its own for every layer."""

    def __init__(self, precision, dropout, seed):
        self.dtype = {"float32": "float32", "bfloat16": "mixed_bfloat16"}[precision]
        self.rate = dropout
        self.seeds = iter(range(seed * 1000, seed * 1000 + 1000))

    def _conv(self, width, size, name, dilation=1, activation="relu", initial=keras.initializers.HeNormal):
        return keras.layers.Conv2D(
            width,
            size,
            padding="same",
            dilation_rate=dilation,
            activation=activation,
            kernel_initializer=initial(next(self.seeds)),
            dtype=self.dtype,
            name=name,
        )

    def conv(self, x, width, name, dilation=1):
        return self._conv(width, 3, name, dilation)(x)

    def head(self, x, classes, name):
        # Only its 3 x 3 convolutions are He-normal in the study's script; this one has the framework's default.
        return self._conv(classes, 1, name, activation=None, initial=keras.initializers.GlorotUniform)(x)

    def bn_drop(self, x, name):
        return BatchNormDropout(self.rate, seed=next(self.seeds), dtype=self.dtype, name=name)(x)

    def batch_norm(self, x, name):
        return BatchNormDropout(dtype=self.dtype, name=name)(x)

    def drop(self, x, name):
        return Dropout(self.rate, seed=next(self.seeds), dtype=self.dtype, name=name)(x)

    def pool(self, x, name):
        return keras.layers.MaxPooling2D(2, dtype=self.dtype, name=name)(x)

    def upsample(self, x, name):
        return Upsample(dtype=self.dtype, name=name)(x)

    def add(self, xs, name):
        return keras.layers.Add(dtype=self.dtype, name=name)(xs)

    def concatenate(self, xs, name):
        return keras.layers.Concatenate(dtype=self.dtype, name=name)(xs)


class Upsample(keras.layers.Layer):
    """Nearest-neighbour 2x upsampling as a broadcast, several times faster on a CPU than a gather."""

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

    def call(self, x):
        return ops.softmax(x, axis=-1)[..., 1]

    def compute_output_shape(self, input_shape):
        return input_shape[:-1]


# -- the network of 2015 ----------------------------------------------------------------------------------------


def build_2015(
    *,
    filters=64,
    levels=4,
    padding="valid",
    dropout=0.5,
    batch_norm=False,
    channels=1,
    classes=2,
    precision="float32",
    seed=0,
):
    """The U-Net of Ronneberger, Fischer & Brox 2015 (arXiv 1505.04597, figure 1): 23 convolutions at 4 levels.

    Parameters
    ----------
    filters : int
        Filters of the first level; each level down doubles them.
    levels : int
        Poolings of the contracting path.
    padding : {"valid", "same"}
        "valid" as published: the output lacks `receptive_field_2015(...).shrink` px on each side (572 in, 388
        out), and only the sizes of `valid_sizes` fit. "same" keeps the size, a multiple of 2 ** levels.
    dropout : float
        Fraction dropped at the end of the contracting path.
    batch_norm : bool
        Batch norm behind every 3 x 3 convolution, which the paper (of the same year) does not have.
    channels : int
        Channels of the input.
    classes : int
        Channels of the softmax; class 1 is the interior.
    precision : {"float32", "bfloat16"}
        bfloat16 computes in bfloat16 and keeps float32 weights and softmax.
    seed : int
        Of the initial weights and the dropout masks.

    Returns
    -------
    keras.Model
        (B, h, w, channels) float32, standardised, to the interior probability (B, h - 2 shrink, w - 2 shrink),
        float32; `with_logits` gives the logits as well.

    Raises
    ------
    ValueError
        If an argument is out of its range; when called, if h or w does not fit.

    Notes
    -----
    What the paper leaves open is done as its authors' released network does it: the two deepest feature maps of
    the contracting path are dropped out, the upper of them before it is pooled and copied. One difference: that
    network has a ReLU behind each up-convolution, the paper's figure has none, and neither has this one.
    """
    _check_2015(filters, levels, padding, channels, classes, precision)
    make = _Layers2015(precision, dropout, seed, padding, batch_norm)
    inputs = keras.Input((None, None, channels), name="section")
    x, skips = InputSize(levels, padding, name="input_size")(inputs), []
    for level in range(1, levels + 1):
        x = make.two_convs(x, filters * 2 ** (level - 1), f"down{level}")
        if level == levels:
            x = make.drop(x, f"down{level}_drop")
        skips.append(x)
        x = make.pool(x, f"down{level}_pool")
    x = make.two_convs(x, filters * 2**levels, "centre")
    x = make.drop(x, "centre_drop")
    for level in range(levels, 0, -1):
        width = filters * 2 ** (level - 1)
        x = make.up_conv(x, width, f"up{level}_upconv")
        skip = make.crop(skips[level - 1], levels - level, f"up{level}_crop")
        x = make.concatenate([skip, x], f"up{level}_concatenate")
        x = make.two_convs(x, width, f"up{level}")
    x = make.head(x, classes, "head_conv")
    return keras.Model(inputs, Interior(dtype="float32", name="interior")(x), name="unet2015")


def from_settings(settings, **more):
    """The network that a record of weights describes: {"arch": "unet2015", ...} for `build_2015`, else `build`."""
    settings = dict(settings)
    return ARCHITECTURES[settings.pop("arch", "unet2017")][0](**settings, **more)


def field_from_settings(settings):
    """Receptive field of the same network."""
    return ARCHITECTURES[settings.get("arch", "unet2017")][1](**{k: v for k, v in settings.items() if k != "arch"})


def with_logits(network):
    """The same network, weights shared, with a second output: (interior (B, h, w), logits (B, h, w, classes)).

    Both float32, from one forward pass: a softmax cross-entropy is stable from logits only. For any network of
    `build` or `build_2015`; train this model, save and predict with `network`.
    """
    logits = keras.layers.Activation("linear", dtype="float32", name="logits")(network.get_layer("head_conv").output)
    return keras.Model(network.input, (network.output, logits), name=f"{network.name}_with_logits")


def valid_sizes(levels=4, padding="valid", *, at_least=1, count=3):
    """The first `count` sides, in px, from `at_least` on, of an input that `build_2015` can pool at every level.

    >>> valid_sizes(4, at_least=570)
    (572, 588, 604)
    >>> valid_sizes(4, "same", count=2)
    (16, 32)
    """
    multiple, shrink, remainder = _geometry(levels, padding)
    first = max(at_least, 2 * shrink + 1)
    first += (remainder - first) % multiple
    return tuple(range(first, first + count * multiple, multiple))


def check_size(name, size, levels=4, padding="valid"):
    """Refuse a side of an input that does not fit, by the name of its argument, and offer the nearest that do.

    >>> check_size("window", 570)
    Traceback (most recent call last):
    ValueError: window must be a multiple of 16 plus 12 and at least 188. Received: 570; nearest: 556, 572, 588
    """
    multiple, _, remainder = _geometry(levels, padding)
    least = valid_sizes(levels, padding, count=1)[0]
    if size >= least and size % multiple == remainder:
        return
    rule = f"a multiple of {multiple}" + (f" plus {remainder}" if remainder else "") + f" and at least {least}"
    nearest = valid_sizes(levels, padding, at_least=size - 3 * multiple // 2 + 1)
    offered = ", ".join(str(valid) for valid in nearest)
    raise ValueError(f"{name} must be {rule}. Received: {size}; nearest: {offered}")


def shrink(levels=4, padding="valid"):
    """Pixels that the network of `build_2015` loses on each side.

    >>> shrink()
    92
    """
    return _geometry(levels, padding)[1]


def _geometry(levels, padding):
    """Multiple and remainder of valid sides, and px lost on each side: (multiple, shrink, remainder).

    Followed up from the bottom: a valid side n of level k is 2 m + 4, m the side of level k + 1; what is lost below
    counts twice, and each level loses 2 px on its way down and 2 on its way up.
    """
    _check_at_least(("levels", levels, 1))
    if padding not in PADDINGS:
        raise ValueError(f"padding must be {' or '.join(PADDINGS)}. Received: {padding}")
    multiple, shrink, offset = 1, 2, 0
    for _ in range(levels):
        multiple, shrink, offset = 2 * multiple, 2 * shrink + 4, 2 * offset + 4
    return (multiple, shrink, offset % multiple) if padding == "valid" else (multiple, 0, 0)


def _check_2015(filters, levels, padding, channels, classes, precision):
    _check_at_least(("filters", filters, 1), ("channels", channels, 1), ("classes", classes, 2))
    _check_precision(precision)
    _geometry(levels, padding)


class _Layers2015(_Layers):
    """The layers of the 2015 network: the published padding and initialisation, batch norm on request."""

    def __init__(self, precision, dropout, seed, padding, norm):
        super().__init__(precision, dropout, seed)
        self.padding, self.norm = padding, norm

    def gaussian(self, incoming):
        """Standard deviation sqrt(2 / N), N the incoming connections of a neuron; not truncated, as HeNormal is."""
        return keras.initializers.RandomNormal(stddev=sqrt(2 / incoming), seed=next(self.seeds))

    def conv(self, x, width, name, size=3, activation="relu"):
        return keras.layers.Conv2D(
            width,
            size,
            padding=self.padding,
            activation=activation,
            kernel_initializer=self.gaussian(size * size * x.shape[-1]),
            dtype=self.dtype,
            name=name,
        )(x)

    def two_convs(self, x, width, name):
        for number in (1, 2):
            x = self.conv(x, width, f"{name}_conv{number}")
            x = self.batch_norm(x, f"{name}_bn{number}") if self.norm else x
        return x

    def head(self, x, classes, name):
        return self.conv(x, classes, name, size=1, activation=None)

    def up_conv(self, x, width, name):
        # With stride 2 each output pixel sees one input pixel, so N is the number of channels alone.
        initializer = self.gaussian(x.shape[-1])
        return keras.layers.Conv2DTranspose(
            width, 2, strides=2, kernel_initializer=initializer, dtype=self.dtype, name=name
        )(x)

    def crop(self, skip, levels_below, name):
        """Cut a skip to the size of what comes up from below it: 4, 16, 40, 88 px a side for 0, 1, 2, 3 levels."""
        if self.padding == "same":
            return skip
        lost = 4  # by the centre, in px of the level that the skip belongs to
        for _ in range(levels_below):
            lost = 2 * (lost + 4)
        return keras.layers.Cropping2D(lost, dtype=self.dtype, name=name)(skip)


class InputSize(keras.layers.Layer):
    """Hands its input on, and refuses one whose rows or columns do not fit, before a layer far below fails."""

    def __init__(self, levels, padding, **kwargs):
        super().__init__(**kwargs)
        self.levels, self.padding = levels, padding

    def call(self, x):
        self.compute_output_shape(x.shape)
        return x

    def compute_output_shape(self, input_shape):
        for name, size in zip(("rows of the input", "columns of the input"), input_shape[1:3], strict=True):
            if size is not None:
                check_size(name, size, self.levels, self.padding)
        return input_shape


# -- receptive field --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReceptiveField:
    """What one output pixel can see, and how that ties the sides of an input; everything in px.

    `size` of the window, `radius` to its farther side; a side is `remainder` modulo `multiple`, and the output lacks
    `shrink` on each side (0 for padded networks).
    """

    size: int
    radius: int
    multiple: int
    shrink: int = 0
    remainder: int = 0


def receptive_field(
    *, filters=FILTERS, dilate=True, dilate_rate=2, centre_dilations=CENTRE_DILATIONS, **_
) -> ReceptiveField:
    """Receptive field of the network that `build` makes of the same arguments.

    The interval of pixels that an output pixel depends on is followed back through every layer, for each place of
    the output pixel in the pooling grid; the widest counts.

    >>> receptive_field(filters=(4,), dilate=False, dilate_rate=1, centre_dilations=(1,))
    ReceptiveField(size=16, radius=8, multiple=2, shrink=0, remainder=0)
    """
    multiple = 2 ** len(filters)
    seen = [(p, *input_interval(p, filters, dilate, dilate_rate, centre_dilations)) for p in range(multiple)]
    return _widest(seen, multiple)


def receptive_field_2015(*, levels=4, padding="valid", **_) -> ReceptiveField:
    """Receptive field of the network that `build_2015` makes of the same arguments.

    >>> receptive_field_2015()
    ReceptiveField(size=204, radius=107, multiple=16, shrink=92, remainder=12)
    """
    multiple, shrink, remainder = _geometry(levels, padding)
    seen = [(p + shrink, *input_interval_2015(p, levels, padding)) for p in range(multiple)]
    return _widest(seen, multiple, shrink, remainder)


def _widest(seen, multiple, *unpadded):
    """Of (input pixel at the place of the output pixel, first, last pixel it depends on), the extremes."""
    return ReceptiveField(
        max(high - low + 1 for _, low, high in seen),
        max(max(p - low, high - p) for p, low, high in seen),
        multiple,
        *unpadded,
    )


def input_interval(pixel, filters, dilate, dilate_rate, centre_dilations):
    """First and last input row that output row `pixel` depends on (columns alike), ignoring the image's border."""
    low = high = pixel
    for _ in filters:  # expansive path, backwards: conv 3, conv 2, conv 1, upsampling
        low, high = (low - 3) // 2, (high + 3) // 2
    reach = sum(centre_dilations) if dilate else len(centre_dilations)
    low, high = low - reach, high + reach
    for _ in filters:  # contracting path, backwards: pooling, dilated conv, conv
        low, high = 2 * low - dilate_rate - 1, 2 * high + 1 + dilate_rate + 1
    return low, high


def input_interval_2015(pixel, levels, padding="valid"):
    """First and last input row that output row `pixel` depends on, ignoring the image's border.

    Rows are counted from the first of the input and of the output, so an unpadded network sees output row 0 at input
    row `shrink`.
    """
    before, after = (0, 4) if padding == "valid" else (2, 2)  # reach of two convolutions
    low = high = pixel
    for _ in range(levels):  # expansive path, backwards: two convolutions, up-convolution
        low, high = (low - before) // 2, (high + after) // 2
    low, high = low - before, high + after
    for _ in range(levels):  # contracting path, backwards: pooling, two convolutions
        low, high = 2 * low - before, 2 * high + 1 + after
    return low, high


ARCHITECTURES = {"unet2017": (build, receptive_field), "unet2015": (build_2015, receptive_field_2015)}
