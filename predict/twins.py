"""A network for other programs: a model of stock Keras layers, ONNX, TorchScript.

All three take (B, 1, rows, columns), standardised, and give the interior (B, 1, rows, columns): channels first, as
Fiji's and ilastik's runtimes want it. ONNX is written operator by operator, which needs no other framework
(Keras goes through tf2onnx or PyTorch); PyTorch runs the same few operators, so its tensors follow a model to a GPU.
"""

import io
from pathlib import Path

import numpy as np

from network.field import inputs_of, is_a
from network.outline import EPSILON

OPSET, IR = 13, 7  # of 2020: what there is in it suffices, and old runtimes read it


# -- stock Keras layers -----------------------------------------------------------------------------------------


def stock_twin(network):
    """The network for inference as a model that Keras loads without this suite, the same numbers but for rounding."""
    import keras

    section = keras.Input((1, None, None), name="section")
    made = {id(network.inputs[0]): keras.layers.Permute((2, 3, 1), name="channels_last")(section)}
    for layer in network.operations[1:]:
        inputs = [made[id(tensor)] for tensor in inputs_of(layer)]
        twin = _stock(layer)
        made[id(layer.output)] = twin(inputs if len(inputs) > 1 else inputs[0])
        twin.set_weights(layer.get_weights())
    x = keras.layers.Permute((3, 1, 2), name="channels_first")(made[id(network.outputs[0])])
    others = keras.layers.Cropping2D(((1, x.shape[1] - 2), (0, 0)), "channels_last", name="class_1")
    return keras.Model(section, others(x), name=network.name)


def _stock(layer):
    from keras import layers

    about = {"name": layer.name, "dtype": "float32"}
    if is_a(layer, "BatchNormDropout"):
        return layers.BatchNormalization(momentum=layer.momentum, epsilon=EPSILON, **about)
    if is_a(layer, "Upsample"):
        return layers.UpSampling2D(layer.size, "channels_last", layer.interpolation, **about)
    if is_a(layer, "Interior"):
        return layers.Softmax(**about)
    if is_a(layer, "Dropout"):  # of which inference makes nothing
        return layers.Identity(**about)
    return getattr(layers, type(layer).__name__).from_config(layer.get_config() | about)


# -- ONNX -------------------------------------------------------------------------------------------------------


class Graph:
    """The network as ONNX operators: `nodes` of (operator, name of its output, its inputs, attributes).

    Inputs are names of nodes, of `weights` (float32) or of `sizes` (what a slice or a resize is told).
    """

    def __init__(self, network):
        self.nodes, self.weights, self.sizes = [], {}, {}
        names = {id(network.inputs[0]): "section"}
        for layer in network.operations[1:]:
            inputs = [names[id(tensor)] for tensor in inputs_of(layer)]
            names[id(layer.output)] = OPERATORS[type(layer).__name__](self, layer, *inputs)

    def add(self, operator, name, *inputs, **attributes):
        self.nodes.append((operator, name, inputs, attributes))
        return name

    def weight(self, layer, name, axes=(0,)):
        value = np.asarray(getattr(layer, name))
        key = f"{layer.name}_{name}"
        self.weights[key] = np.ascontiguousarray(value.transpose(axes), np.float32)
        return key

    def slice(self, name, x, starts, ends, axes):
        keys = [f"{name}_{part}" for part in ("starts", "ends", "axes")]
        self.sizes |= {key: np.array(value, np.int64) for key, value in zip(keys, (starts, ends, axes), strict=True)}
        return self.add("Slice", name, x, *keys)


def _convolution(graph, layer, x):
    # Kernels (rows, columns, in, out) become (out, in, rows, columns), those of transposed ones (in, out, ...)
    inputs = (x, graph.weight(layer, "kernel", (3, 2, 0, 1)), graph.weight(layer, "bias"))
    transposed = is_a(layer, "Conv2DTranspose")
    about = {"strides": layer.strides} if transposed else {"dilations": layer.dilation_rate}
    if layer.padding == "same" and not transposed:  # of odd kernels, stride 1
        about["pads"] = [(k - 1) // 2 * d for k, d in zip(layer.kernel_size, layer.dilation_rate, strict=True)] * 2
    x = graph.add("ConvTranspose" if transposed else "Conv", layer.name, *inputs, **about)
    return graph.add("Relu", f"{layer.name}_relu", x) if layer.activation.__name__ == "relu" else x


def _batch_norm(graph, layer, x):
    statistics = [graph.weight(layer, name) for name in ("gamma", "beta", "moving_mean", "moving_variance")]
    return graph.add("BatchNormalization", layer.name, x, *statistics, epsilon=EPSILON)


def _upsample(graph, layer, x):
    graph.sizes["scales"] = np.array([1, 1, *layer.size], np.float32)
    how = {"mode": "nearest", "nearest_mode": "floor", "coordinate_transformation_mode": "asymmetric"}
    return graph.add("Resize", layer.name, x, "", "scales", **how)


def _max_pooling(graph, layer, x):
    return graph.add("MaxPool", layer.name, x, kernel_shape=layer.pool_size, strides=layer.strides)


def _crop(graph, layer, x):
    (top, bottom), (left, right) = layer.cropping  # of the paper's network, never 0
    return graph.slice(layer.name, x, [top, left], [-bottom, -right], [2, 3])


def _interior(graph, layer, x):
    return graph.slice("interior", graph.add("Softmax", "softmax", x, axis=1), [1], [2], [1])


OPERATORS = {
    "Add": lambda graph, layer, *xs: graph.add("Sum", layer.name, *xs),
    "Concatenate": lambda graph, layer, *xs: graph.add("Concat", layer.name, *xs, axis=1),
    "Conv2D": _convolution,
    "Conv2DTranspose": _convolution,
    "Cropping2D": _crop,
    "MaxPooling2D": _max_pooling,
    "BatchNormDropout": _batch_norm,
    "Dropout": lambda graph, layer, x: x,
    "Interior": _interior,
    "Upsample": _upsample,
}


def write_onnx(network, path, about):
    """Write the network as ONNX for any size that fits; `about`: what the file says of itself, by key."""
    import onnx
    from onnx import helper, numpy_helper

    graph = Graph(network)
    nodes = [helper.make_node(kind, inputs, [name], name, **more) for kind, name, inputs, more in graph.nodes]
    numbers = [numpy_helper.from_array(value, key) for key, value in (graph.weights | graph.sizes).items()]
    ends = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 1, f"rows{sides}", f"columns{sides}"])
        for name, sides in (("section", ""), ("interior", "_out"))
    ]
    opset = helper.make_opsetid("", OPSET)
    made = helper.make_graph(nodes, network.name, ends[:1], ends[1:], numbers)
    model = helper.make_model(made, opset_imports=[opset], ir_version=IR, producer_name="dilatedUnet.py")
    helper.set_model_props(model, {key: str(value) for key, value in about.items()})
    onnx.checker.check_model(model)
    onnx.save(model, path)


# -- TorchScript ------------------------------------------------------------------------------------------------


def write_torchscript(network, path, side):
    """Write the network as TorchScript for any size that fits; it is traced on a section of `side` px."""
    import warnings

    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # TorchScript's; ilastik reads nothing else
        traced = torch.jit.trace(_torch_module(Graph(network)), torch.zeros(1, 1, side, side), check_trace=False)
        written = io.BytesIO()  # PyTorch's own writer of files aborts the process where the disk is full
        torch.jit.save(traced, written)
    Path(path).write_bytes(written.getbuffer())


def _torch_module(graph):
    """The operators of a graph in PyTorch."""
    import torch
    from torch.nn import functional as f

    operators = {
        "BatchNormalization": lambda x, gamma, beta, *moments, **how: f.batch_norm(
            x, *moments, gamma, beta, eps=how["epsilon"]
        ),
        "Concat": lambda *xs, axis: torch.cat(xs, axis),
        "Conv": lambda x, kernel, bias, dilations, pads=(0, 0): f.conv2d(x, kernel, bias, 1, pads[:2], dilations),
        "ConvTranspose": lambda x, kernel, bias, strides: f.conv_transpose2d(x, kernel, bias, strides),
        "MaxPool": lambda x, kernel_shape, strides: f.max_pool2d(x, kernel_shape, strides),
        "Relu": lambda x: torch.relu(x),
        "Resize": lambda x, _, scales, **how: f.interpolate(x, scale_factor=scales[2:].tolist()),
        "Slice": lambda x, starts, ends, axes: _sliced(x, *(each.tolist() for each in (starts, ends, axes))),
        "Softmax": lambda x, axis: torch.softmax(x, axis),
        "Sum": lambda *xs: sum(xs[1:], xs[0]),
    }

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for key, value in graph.weights.items():
                self.register_buffer(key, torch.tensor(value))

        def forward(self, section):
            made = {"section": section, "": None} | graph.sizes
            for kind, name, inputs, how in graph.nodes:
                values = (made[key] if key in made else getattr(self, key) for key in inputs)
                made[name] = operators[kind](*values, **how)
            return made[name]

    return Network().train(False)


def _sliced(x, starts, ends, axes):
    parts = dict(zip(axes, map(slice, starts, ends), strict=True))
    return x[tuple(parts.get(axis, slice(None)) for axis in range(x.ndim))]
