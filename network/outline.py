"""A network's layers without a framework: names, settings and weights, which are all that OpenVINO's graph needs.

`unet` makes a network of these classes or of those of `layers`, which have the same names: Keras and its backend take
670 MiB and seconds to load, and to predict with OpenVINO they are not needed.
"""

from collections import Counter

import numpy as np

EPSILON = 1e-3  # batch norm, the framework's default and so the study's
MOMENTUM = 0.99  # the study's


class Tensor:
    """What a layer gives: its shape, and the layers that its network has so far."""

    def __init__(self, channels, layers):
        self.shape, self.layers = (None, None, None, channels), layers


class Weight(np.ndarray):
    """The float32 numbers of one weight, and its name, `path`."""

    path = ""


class Layer:
    """A layer; its settings are attributes, and called it takes its place behind others."""

    weights, stored_as = (), None  # the layer's name in a file of weights

    def __init__(self, name, dtype=None, **settings):
        self.name = name
        vars(self).update(settings)

    def __call__(self, x):
        self.input, first = x, x[0] if isinstance(x, list) else x
        first.layers.append(self)
        self.output = Tensor(self.channels(first.shape[-1]), first.layers)
        return self.output

    def channels(self, incoming):
        return incoming

    def shapes(self):
        """The weights' names and shapes, in the order of the file."""
        return {}


# what these do is in their settings, and a pixel of the latter sees that pixel of its input alone
InputLayer, Cropping2D, Add = (type(name, (Layer,), {}) for name in ("InputLayer", "Cropping2D", "Add"))
Dropout, Interior = (type(name, (Layer,), {"pointwise": True}) for name in ("Dropout", "Interior"))


class Conv2D(Layer):
    stored_as, strides = "conv2d", (1, 1)

    def channels(self, incoming):
        return self.filters

    def shapes(self):
        return {"kernel": (*self.kernel_size, self.input.shape[-1], self.filters), "bias": (self.filters,)}


class Conv2DTranspose(Conv2D):
    stored_as, padding, activation = "conv2d_transpose", "valid", None

    def shapes(self):
        return {"kernel": (*self.kernel_size, self.filters, self.input.shape[-1]), "bias": (self.filters,)}


class BatchNormDropout(Layer):
    stored_as, pointwise = "batch_norm_dropout", True

    def shapes(self):
        return dict.fromkeys(("gamma", "beta", "moving_mean", "moving_variance"), self.input.shape[-1:])


class MaxPooling2D(Layer):
    pool_size, strides, padding = (2, 2), (2, 2), "valid"


class Upsample(Layer):
    size, interpolation = (2, 2), "nearest"


class Concatenate(Layer):
    def channels(self, incoming):
        return sum(x.shape[-1] for x in self.input)


def Input(shape, name):
    layer, layers = InputLayer(name), []
    layer.input, layer.output = [], Tensor(shape[-1], layers)
    layers.append(layer)
    return layer.output


class Model:
    """A network: its layers in the order in which they were made."""

    def __init__(self, inputs, outputs, name):
        self.inputs, self.outputs, self.operations, self.name = [inputs], [outputs], outputs.layers, name

    @property
    def weights(self):
        return [weight for layer in self.operations for weight in layer.weights]

    def load_weights(self, path):
        """Read what Keras wrote; ValueError, KeyError or OSError if the file holds no such network."""
        import h5py

        before = Counter()  # Keras counts the layers of a class: conv2d, conv2d_1, conv2d_2
        with h5py.File(path) as file:
            for layer in self.operations:
                number = before[layer.stored_as]
                before[layer.stored_as] += 1
                group = f"layers/{layer.stored_as}" + f"_{number}" * bool(number)
                layer.weights = []
                for place, (name, shape) in enumerate(layer.shapes().items()):
                    weight = _read(file, f"{group}/vars/{place}", shape).view(Weight)
                    weight.path = f"{layer.name}/{name}"
                    setattr(layer, name, weight)
                    layer.weights.append(weight)


def _read(file, name, shape):
    found = file[name]
    if found.shape != shape:
        raise ValueError(f"{name} must have the shape {shape}. Received: {found.shape}")
    if found.file.filename != file.filename or found.external or found.is_virtual:
        raise ValueError(f"{name} must hold its numbers itself: another file is not read")
    return found[()].astype(np.float32)
