"""What computes a forward pass: Keras, or on a CPU OpenVINO, which is faster where it is installed.

The network is handed to OpenVINO layer by layer, as the graph that its convolutions want: channels first, dilations
as they are. The ways there through TensorFlow (`network.export(format="openvino")`, `openvino.convert_model`) write a
dilated convolution of a size not known in advance as a rearrangement of its input, an ordinary one, and back: the same
numbers for 1.4 (float32) or 1.2 (bfloat16) times the processor's time (OpenVINO 2026.4), and ten times the conversion.
A convolution of what was enlarged is a transposed one of what it was made of, as in `network/onednn.py`.
"""

import functools

import numpy as np

from data import DataError
from files.shell import say
from network import device
from network.field import inputs_of, is_a
from network.onednn import can_enlarge, enlarging, shares
from network.outline import EPSILON


def choose(asked):
    """The engine that was asked for, or for "auto" the fastest one present; a DataError if OpenVINO is not there."""
    installed = device.has_openvino()
    if asked == "openvino" and not installed:
        raise DataError("--engine openvino needs OpenVINO: pip install -r requirements-openvino.txt")
    if asked == "auto":
        return "openvino" if installed and device.accelerator() is None else "keras"
    return asked


def forward(network, engine, precision):
    """The network as a function of windows, (B, h, w) float32 -> interior (B, h - 2 shrink, w - 2 shrink), float32.

    Parameters
    ----------
    network : keras.Model or outline.Model
        Of `unet`, one channel. OpenVINO takes its numbers as they are now, always from the float32 weights. Keras
        computes those of Keras only.
    engine : {"auto", "keras", "openvino"}
        "auto" is what `choose` says, but Keras for a network that OpenVINO is not told about, with a line on stderr.
    precision : {"float32", "bfloat16"}
        OpenVINO computes in it; Keras computes in the precision that the network was built with.
    """
    if choose(engine) == "openvino":
        try:
            return device.compiled(_openvino_model(network), precision)
        except DataError as error:
            if engine == "openvino":
                raise
            say(f"engine: keras, for {error}")
    return lambda windows: np.asarray(network.predict_on_batch(windows[..., None]), np.float32)


# -- OpenVINO ---------------------------------------------------------------------------------------------------


def _openvino_model(network):
    """The network's inference graph: (B, rows, columns) -> interior (B, rows, columns), all three of any size."""
    openvino = device.openvino()
    ops = openvino.opset13
    section = ops.parameter([-1, -1, -1], np.float32, name="section")
    made = {id(network.inputs[0]): ops.unsqueeze(section, [1])}
    for layer in network.operations[1:]:
        if not _is_told(layer):
            raise DataError(f"--engine openvino cannot compute the layer {layer.name}, but --engine keras can.")
        inputs = [made[id(tensor)] for tensor in inputs_of(layer)]
        made[id(layer.output)] = LAYERS[type(layer).__name__](ops, layer, *inputs)
    return openvino.Model([made[id(network.outputs[0])]], [section], network.name)


def tells(network):
    """Whether OpenVINO can be told of every layer of a network."""
    return all(map(_is_told, network.operations[1:]))


def _is_told(layer):
    """Whether the graph below has this layer, with all of its settings."""
    usual = {"groups": 1, "data_format": "channels_last", "output_padding": None}
    if is_a(layer, "MaxPooling2D", "Conv2DTranspose"):
        usual |= {"padding": "valid", "dilation_rate": (1, 1)}
    return (
        type(layer).__name__ in LAYERS
        and all(getattr(layer, name, value) == value for name, value in usual.items())
        and getattr(layer, "axis", -1) in (-1, 3)
        and _activation(layer) in ("relu", "linear", None)
    )


def _activation(layer):
    """Its name: Keras has functions, and `linear` for None."""
    activation = getattr(layer, "activation", None)
    return getattr(activation, "__name__", activation)


def _convolution(ops, layer, x):
    x = functools.reduce(ops.add, (_of_part(ops, layer, *part) for part in _parts(layer, x)))
    x = x if layer.bias is None else ops.add(x, _per_channel(layer.bias))
    return ops.relu(x) if _activation(layer) == "relu" else x


def _parts(layer, x):
    """What x joins, of each its part of the kernel, and whether it is still to be enlarged; x itself if nothing is."""
    kernel = _numbers(layer.kernel)  # (rows, columns, in, out)
    x = x if hasattr(x, "get_node") else x.output(0)
    joined = x.get_node().input_values() if x.get_node().get_type_name() == "Concat" else [x]
    if not can_enlarge(layer) or not any(map(_is_enlarged, joined)):
        return [(x, kernel, False)]
    kernels = shares(kernel, [part.get_partial_shape()[1].get_length() for part in joined])
    return [
        (part.get_node().input_value(0), enlarging(of_part), True) if _is_enlarged(part) else (part, of_part, False)
        for part, of_part in zip(joined, kernels, strict=True)
    ]


def _is_enlarged(x):
    return x.get_node().get_type_name() == "Interpolate"


def _of_part(ops, layer, x, kernel, enlarges):
    kernel = np.ascontiguousarray(kernel.transpose(3, 2, 0, 1))  # of transposed ones (in, out, rows, columns)
    if enlarges:
        return ops.convolution_backprop_data(x, kernel, [2, 2], pads_begin=[1, 1], pads_end=[1, 1])
    padding = {"same": "same_upper", "valid": "valid"}[layer.padding]
    if is_a(layer, "Conv2DTranspose"):
        return ops.convolution_backprop_data(x, kernel, layer.strides, auto_pad=padding)
    return ops.convolution(x, kernel, layer.strides, [0, 0], [0, 0], layer.dilation_rate, auto_pad=padding)


def _batch_norm(ops, layer, x):
    scale = _numbers(layer.gamma) / np.sqrt(_numbers(layer.moving_variance) + EPSILON)
    shift = _numbers(layer.beta) - _numbers(layer.moving_mean) * scale
    return ops.add(ops.multiply(x, _per_channel(scale)), _per_channel(shift))


def _max_pooling(ops, layer, x):
    return ops.max_pool(x, layer.strides, [1, 1], [0, 0], [0, 0], layer.pool_size).output(0)


def _upsample(ops, layer, x):
    how = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    return ops.interpolate(x, np.array(layer.size, np.float32), "nearest", "scales", axes=np.array([2, 3]), **how)


def _crop(ops, layer, x):
    (top, bottom), (left, right) = layer.cropping
    return ops.slice(x, *map(np.array, ([top, left], [-bottom or 2**31, -right or 2**31], [1, 1], [2, 3])))


def _numbers(variable):
    return np.asarray(variable, np.float32)


def _per_channel(values):
    return _numbers(values).reshape(1, -1, 1, 1)


LAYERS = {
    "Add": lambda ops, layer, *xs: functools.reduce(ops.add, xs),
    "Concatenate": lambda ops, layer, *xs: ops.concat(list(xs), 1),
    "Conv2D": _convolution,
    "Conv2DTranspose": _convolution,
    "Cropping2D": _crop,
    "MaxPooling2D": _max_pooling,
    "BatchNormDropout": _batch_norm,
    "Dropout": lambda ops, layer, x: x,
    "Interior": lambda ops, layer, x: ops.gather(ops.softmax(x, 1), np.int64(1), np.int64(1)),
    "Upsample": _upsample,
}
