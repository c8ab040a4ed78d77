"""The networks: standard and dilated U-net of 2017, the U-Net of 2015, a residual one, each built by one loop.

They are made of the layers of `layers`, of Keras, or of their namesakes in `outline`, which compute nothing.

>>> network = build(filters=(4, 8), centre_dilations=(1, 2))
>>> network.output_shape
(None, None, None)
>>> field_of(network).multiple
4
>>> build_2015(filters=2).compute_output_shape((1, 572, 572, 1))
(1, 388, 388)
"""

from math import sqrt

from network import outline
from network.field import field_of
from network.outline import MOMENTUM

FILTERS, RESIDUAL_FILTERS = (44, 88, 176), (16, 32, 64, 128, 128)
CENTRE_DILATIONS = (1, 2, 4, 8, 16, 32)
PRECISIONS = {"float32": "float32", "bfloat16": "mixed_bfloat16"}  # and the dtype policy of each


def build(
    *,
    filters=FILTERS,  # of the contracting levels; the centre has as many as the last level
    dilate=True,  # centre convolutions dilated by `centre_dilations` instead of 1
    dilate_rate=2,  # dilation of the second convolution of each contracting level
    addition=True,  # the centre's output is the sum of its convolutions instead of the last one alone
    centre_dilations=CENTRE_DILATIONS,
    dropout=0.3,  # fraction dropped after each batch norm but the last two, and after each pooling
    bn_momentum=MOMENTUM,  # of batch norm's moving averages, in [0, 1); a run of few updates wants 0.9
    classes=2,  # channels of the softmax; class 1 is the interior
    precision="float32",  # "bfloat16" computes in it and keeps float32 weights, statistics and softmax
    seed=0,  # of the initial weights and the dropout masks
    kinds=None,  # `network.outline` for a network without Keras; by default `network.layers`
):
    """The U-net of the 2017 study, or a wider, deeper or shallower one of the same design, as a keras.Model.

    (B, h, w, 1) float32, standardised, h and w multiples of 2 ** len(filters), to the interior probability (B, h, w),
    float32.
    """
    make = _Layers(kinds, precision, dropout, seed, bn_momentum)
    inputs = make.input()
    x, skips = inputs, []
    for level, width in enumerate(filters, 1):
        x = make.conv(x, width, f"down{level}_conv1")
        x = make.bn_drop(x, f"down{level}_bn1")
        x = make.conv(x, width, f"down{level}_conv2", dilation=dilate_rate)
        skips.append(x)
        x = make.bn_drop(x, f"down{level}_bn2")
        x = make("MaxPooling2D", x, f"down{level}_pool")
        x = make.drop(x, f"down{level}_drop")
    centre = []
    for i, dilation in enumerate(centre_dilations, 1):
        x = make.conv(x, filters[-1], f"centre_conv{i}", dilation=dilation if dilate else 1)
        centre.append(x)
        if i < len(centre_dilations):
            x = make.bn_drop(x, f"centre_bn{i}")
    if addition and len(centre) > 1:
        x = make("Add", centre, "centre_sum")
    for level in range(len(filters), 0, -1):
        width = max(1, filters[level - 1] // 2)
        x = make("Upsample", x, f"up{level}_upsample")
        x = make.conv(x, width, f"up{level}_conv1")
        x = make("Concatenate", [skips[level - 1], x], f"up{level}_concatenate")
        x = make.bn_drop(x, f"up{level}_bn1")
        x = make.conv(x, width, f"up{level}_conv2")
        x = make.batch_norm(x, f"up{level}_bn2")
        x = make.conv(x, width, f"up{level}_conv3")
    x = make.batch_norm(x, "head_bn")
    return make.model(inputs, make.interior(x, classes), "dilated_unet" if dilate else "standard_unet")


def build_2015(
    *,
    filters=64,  # of the first level; each level down doubles them
    levels=4,  # poolings of the contracting path
    padding="valid",  # as published; "same" keeps the size, a multiple of 2 ** levels
    dropout=0.5,  # fraction dropped at the end of the contracting path
    batch_norm=False,  # behind every 3 x 3 convolution, which the paper (of the same year) does not have
    bn_momentum=MOMENTUM,
    classes=2,
    precision="float32",
    seed=0,
    kinds=None,
):
    """The U-Net of Ronneberger, Fischer & Brox 2015 (arXiv 1505.04597, figure 1): 23 convolutions at 4 levels.

    (B, h, w, 1) float32, standardised, to the interior probability (B, h - 2 shrink, w - 2 shrink), float32. Unpadded,
    the output lacks `field_of(...).shrink` px on each side (572 in, 388 out), and only the sizes of its `valid_sizes`
    fit. `with_logits` gives the logits as well.

    What the paper leaves open is done as its authors' released network does it: the two deepest feature maps of
    the contracting path are dropped out, the upper of them before it is pooled and copied. One difference: that
    network has a ReLU behind each up-convolution, the paper's figure has none, and neither has this one.
    """
    make = _Layers2015(kinds, precision, dropout, seed, bn_momentum, padding)
    inputs = make.input()
    x, skips = inputs, []
    for level in range(1, levels + 1):
        x = make.two_convs(x, filters * 2 ** (level - 1), f"down{level}", batch_norm)
        if level == levels:
            x = make.drop(x, f"down{level}_drop")
        skips.append(x)
        x = make("MaxPooling2D", x, f"down{level}_pool")
    x = make.two_convs(x, filters * 2**levels, "centre", batch_norm)
    x = make.drop(x, "centre_drop")
    for level in range(levels, 0, -1):
        width, skip = filters * 2 ** (level - 1), skips[level - 1]
        x = make.up_conv(x, width, f"up{level}_upconv")
        if padding == "valid":  # what comes up has lost 4, 16, 40, 88 px a side, from the lowest level up
            lost = 12 * 2 ** (levels - level) - 8
            skip = make("Cropping2D", skip, f"up{level}_crop", cropping=((lost, lost), (lost, lost)))
        x = make("Concatenate", [skip, x], f"up{level}_concatenate")
        x = make.two_convs(x, width, f"up{level}", batch_norm)
    return make.model(inputs, make.interior(x, classes), "unet2015")


def build_residual(
    *,
    filters=RESIDUAL_FILTERS,  # of the levels; the last is the centre
    dropout=0.0,  # fraction dropped in the centre
    bn_momentum=MOMENTUM,
    classes=2,
    precision="float32",
    seed=0,
    kinds=None,
):
    """A residual U-net that spends its work at low resolution: few channels on top, residual blocks further down.

    (B, h, w, 1) float32, standardised, h and w multiples of 2 ** (len(filters) - 1), to the interior (B, h, w). A block
    adds to its input what two convolutions make of it (He et al. 2016, arXiv 1512.03385). Behind each convolution
    but the head stand a ReLU and a batch norm, as in `build`.
    """
    make = _Layers(kinds, precision, dropout, seed, bn_momentum)
    inputs = make.input()
    x, skips = inputs, []
    for level, width in enumerate(filters, 1):
        if skips:
            x = make("MaxPooling2D", x, f"down{level - 1}_pool")
        x = make.conv_norm(x, width, f"down{level}_conv1")
        for block in range(1, min(level, 3)):
            y = make.conv_norm(x, width, f"down{level}_block{block}_conv1")
            y = make.conv_norm(y, width, f"down{level}_block{block}_conv2")
            x = make("Add", [x, y], f"down{level}_block{block}_sum")
        skips.append(x)
    x = make.drop(x, "centre_drop")
    for level in range(len(filters) - 1, 0, -1):
        x = make("Upsample", x, f"up{level}_upsample")
        x = make("Concatenate", [skips[level - 1], x], f"up{level}_concatenate")
        for number in (1, 2):
            x = make.conv_norm(x, filters[level - 1], f"up{level}_conv{number}")
    return make.model(inputs, make.interior(x, classes), "residual_unet")


ARCHITECTURES = {"unet2017": build, "unet2015": build_2015, "resunet": build_residual}


def from_settings(settings, **more):
    """The network that a record of weights describes: its "arch" is a name in `ARCHITECTURES`, the rest is for that."""
    settings = dict(settings)
    return ARCHITECTURES[settings.pop("arch", "unet2017")](**settings, **more)


def field_from_settings(settings):
    """Receptive field of the network that a record of weights describes, without making its weights."""
    return field_of(from_settings(settings, kinds=outline))


def with_logits(network):
    """The same network, weights shared, with a second output: (interior (B, h, w), logits (B, h, w, classes)).

    Both float32, from one forward pass: a softmax cross-entropy is stable from logits only. For any network of
    this file; train this model, save and predict with `network`.
    """
    import keras

    logits = keras.layers.Activation("linear", dtype="float32", name="logits")(network.get_layer("head_conv").output)
    return keras.Model(network.input, (network.output, logits), name=f"{network.name}_with_logits")


class _Layers:
    """The layers of one network: dtype policy, dropout rate, and a seed of its own for every layer."""

    def __init__(self, kinds, precision, dropout, seed, bn_momentum, padding="same"):
        if kinds is None:
            from network import layers as kinds
        self.kinds, self.dtype, self.padding = kinds, PRECISIONS[precision], padding
        self.rate, self.momentum = dropout, bn_momentum
        self.seeds = (number % 2**31 for number in range(seed * 1000, seed * 1000 + 1000))  # as backends take them

    def __call__(self, kind, x, name, **settings):
        return getattr(self.kinds, kind)(dtype=self.dtype, name=name, **settings)(x)

    def input(self):
        return self.kinds.Input((None, None, 1), name="section")

    def model(self, inputs, outputs, name):
        return self.kinds.Model(inputs, outputs, name=name)

    def initial(self, size, channels):
        """Only the 3 x 3 convolutions are He-normal in the study's script; the head has the framework's default."""
        kind = "HeNormal" if size == 3 else "GlorotUniform"
        return {"class_name": kind, "config": {"seed": next(self.seeds)}}

    def conv(self, x, width, name, *, size=3, dilation=1, activation="relu"):
        options = {"padding": self.padding, "dilation_rate": (dilation, dilation), "activation": activation}
        options |= {"kernel_size": (size, size), "kernel_initializer": self.initial(size, x.shape[-1])}
        return self("Conv2D", x, name, filters=width, **options)

    def conv_norm(self, x, width, name):
        return self.batch_norm(self.conv(x, width, name), name.replace("conv", "bn"))

    def interior(self, x, classes):
        x = self.conv(x, classes, "head_conv", size=1, activation=None)
        return self.kinds.Interior(dtype="float32", name="interior")(x)

    def bn_drop(self, x, name):
        return self("BatchNormDropout", x, name, rate=self.rate, seed=next(self.seeds), momentum=self.momentum)

    def batch_norm(self, x, name):
        return self("BatchNormDropout", x, name, momentum=self.momentum)

    def drop(self, x, name):
        return self("Dropout", x, name, rate=self.rate, seed=next(self.seeds))


class _Layers2015(_Layers):
    """The layers of the 2015 network, initialised as published."""

    def initial(self, size, channels):
        """Standard deviation sqrt(2 / N), N the incoming connections of a neuron; not truncated, as HeNormal is."""
        config = {"stddev": sqrt(2 / (size * size * channels)), "seed": next(self.seeds)}
        return {"class_name": "RandomNormal", "config": config}

    def two_convs(self, x, width, name, norm):
        for number in (1, 2):
            x = self.conv(x, width, f"{name}_conv{number}")
            x = self.batch_norm(x, f"{name}_bn{number}") if norm else x
        return x

    def up_conv(self, x, width, name):
        initial = self.initial(1, x.shape[-1])  # with stride 2 each output pixel sees one input pixel
        options = {"kernel_size": (2, 2), "strides": (2, 2), "kernel_initializer": initial}
        return self("Conv2DTranspose", x, name, filters=width, **options)
