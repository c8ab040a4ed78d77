"""What one output pixel of a network sees, and which inputs fit: read off its graph, layer by layer.

A layer is followed along one axis, rows and columns being alike. Who writes a new layer gives it `pointwise = True` if
a pixel of its output sees that pixel of its input alone, or the attributes of the Keras layer whose reach it has.

>>> import keras
>>> inputs = keras.Input((None, None, 1))
>>> field_of(keras.Model(inputs, keras.layers.Conv2D(1, 3, dilation_rate=2)(inputs)))
ReceptiveField(size=5, radius=2, multiple=1, shrink=2, remainder=0)
"""

from dataclasses import dataclass
from fractions import Fraction
from math import lcm
from typing import NamedTuple

import numpy as np

POINTWISE = (  # by name, so that Keras need not be there
    *("Activation", "ReLU", "LeakyReLU", "ELU", "Softmax", "Rescaling", "Identity", "Dropout", "SpatialDropout2D"),
    *("GaussianDropout", "GaussianNoise", "Concatenate", "BatchNormalization", "LayerNormalization"),
    *("Add", "Average", "Maximum", "Minimum", "Multiply", "Subtract"),
)


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

    def valid_sizes(self, *, at_least=1, count=3):
        """The first `count` sides of an input, from `at_least` on, that fit.

        >>> ReceptiveField(204, 107, 16, shrink=92, remainder=12).valid_sizes(at_least=570)
        (572, 588, 604)
        """
        first = max(at_least, 2 * self.shrink + 1)
        first += (self.remainder - first) % self.multiple
        return tuple(range(first, first + count * self.multiple, self.multiple))

    def check_size(self, name, size):
        """Refuse a side that does not fit, by the name of its argument, and offer the nearest that do.

        >>> ReceptiveField(204, 107, 16, shrink=92, remainder=12).check_size("window", 570)
        Traceback (most recent call last):
        ValueError: window must be a multiple of 16 plus 12 and at least 188. Received: 570; nearest: 556, 572, 588
        """
        (least,) = self.valid_sizes(count=1)
        if size >= least and size % self.multiple == self.remainder:
            return
        plus = f" plus {self.remainder}" if self.remainder else ""
        offered = ", ".join(map(str, self.valid_sizes(at_least=size - 3 * self.multiple // 2 + 1)))
        rule = f"a multiple of {self.multiple}{plus} and at least {least}"
        raise ValueError(f"{name} must be {rule}. Received: {size}; nearest: {offered}")


def is_a(layer, *kinds):
    """Whether a layer is of a class of one of these names, of Keras or of `outline`."""
    return any(base.__name__ in kinds for base in type(layer).__mro__)


def inputs_of(layer):
    """The tensors that a layer is given."""
    return layer.input if isinstance(layer.input, (list, tuple)) else [layer.input]


def field_of(network):
    """Receptive field of a network, of Keras or of `outline`, of one input and one output of the same resolution.

    The interval of pixels that an output pixel depends on is followed back through every layer, for each place of
    the output pixel in the pooling grid; the widest counts. A side fits if every layer meets a whole number of pixels.
    ValueError if the reach of a layer cannot be told, or its inputs differ in size.
    """
    steps = [(made, _step(made)) for made in network.operations if not is_a(made, "InputLayer")]
    multiple, remainder, shrink = _sides(network, steps)
    output = np.arange(multiple)
    low, high = _seen(network, steps, output)
    centre = output + shrink
    radius = np.maximum(centre - low, high - centre).max()
    return ReceptiveField(int((high - low).max()) + 1, int(radius), multiple, shrink, remainder)


class _Step(NamedTuple):
    """One layer along one axis.

    Output pixel p sees the input pixels (p stride + first) // growth .. (p stride + last) // growth, and an input of
    n px gives an output of (n growth - lost) / stride.
    """

    stride: int = 1
    growth: int = 1
    first: int = 0
    last: int = 0
    lost: int = 0


def _step(layer):
    over_channels = set(np.atleast_1d(getattr(layer, "axis", -1))) <= {-1, 3}
    if getattr(layer, "pointwise", is_a(layer, *POINTWISE) and over_channels):
        return _Step()
    if is_a(layer, "Cropping2D", "ZeroPadding2D"):
        cut = layer.cropping if is_a(layer, "Cropping2D") else -np.array(layer.padding)
        before, after = (_alike(layer, side) for side in zip(*cut, strict=True))
        return _Step(first=before, last=before, lost=before + after)
    if getattr(layer, "interpolation", None) == "nearest":
        return _Step(growth=_alike(layer, layer.size))
    window = getattr(layer, "kernel_size", None) or getattr(layer, "pool_size", None)
    if window is None or len(window) != 2 or getattr(layer, "output_padding", None):
        kind = type(layer).__name__
        raise ValueError(f"the reach of the layer {layer.name} ({kind}) cannot be told: see network/field.py")
    dilation = _alike(layer, getattr(layer, "dilation_rate", 1))
    reach, stride = (_alike(layer, window) - 1) * dilation + 1, _alike(layer, layer.strides)
    overlap = max(reach - stride, 0)
    padded = overlap if layer.padding == "same" else 0
    if is_a(layer, "Conv2DTranspose"):
        before = padded // 2
        return _Step(growth=stride, first=before - reach + stride, last=before, lost=padded - overlap)
    return _Step(stride=stride, first=-(padded // 2), last=reach - 1 - padded // 2, lost=overlap - padded)


def _alike(layer, pair):
    """A setting for rows and columns as one number."""
    first, *others = np.unique(pair)
    if others:
        raise ValueError(f"the layer {layer.name} must treat rows and columns alike. Received: {tuple(pair)}")
    return int(first)


def _sides(network, steps):
    """Multiple and remainder of the sides that fit, and px that the output lacks on each side."""
    sides = {id(network.inputs[0]): (Fraction(1), Fraction(0))}  # a, b of every tensor, whose side is a n + b
    for layer, step in steps:
        found = {sides[id(tensor)] for tensor in inputs_of(layer)}
        if len(found) != 1:
            raise ValueError(f"what the layer {layer.name} joins must be of one size")
        ((scale, offset),) = found
        sides[id(layer.output)] = (scale * step.growth / step.stride, (offset * step.growth - step.lost) / step.stride)
    scale, offset = sides[id(network.outputs[0])]
    multiple = lcm(*(scale.denominator for scale, _ in sides.values()))
    fit = [n for n in range(multiple) if all((a * n + b).denominator == 1 for a, b in sides.values())]
    if not fit or scale != 1 or offset % 2:
        raise ValueError("a network's output must be its input, or the centre of it, in resolution and size")
    return multiple, fit[0], int(-offset) // 2


def _seen(network, steps, pixels):
    """First and last input pixel that the output pixels depend on, ignoring the image's border."""
    seen = {id(network.outputs[0]): (pixels, pixels)}
    for layer, step in reversed(steps):
        if id(layer.output) in seen:
            low, high = seen[id(layer.output)]
            low, high = (low * step.stride + step.first) // step.growth, (high * step.stride + step.last) // step.growth
            for tensor in inputs_of(layer):
                other = seen.get(id(tensor), (low, high))
                seen[id(tensor)] = np.minimum(low, other[0]), np.maximum(high, other[1])
    return seen[id(network.inputs[0])]
