"""What computes a forward pass: Keras, or on a CPU OpenVINO, which is faster where it is installed.

The network is handed to OpenVINO layer by layer, as the graph that its convolutions want: channels first, dilations
as they are. Keras's own way there, `network.export(format="openvino")`, goes through TensorFlow, which writes a
dilated convolution of a size not known in advance as a rearrangement of its input, an ordinary one, and back: the same
numbers for 1.25 (float32) to 1.45 (bfloat16) times the processor's time, and a conversion of seconds instead of
hundredths.
"""

import importlib.util
import sys

import keras
import numpy as np

from data import DataError
from network import device, layers

ENGINES = ("auto", "keras", "openvino")
PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}  # in the words of OpenVINO
ROWS_AND_COLUMNS = [2, 3]  # of (B, channels, rows, columns)


def choose(asked):
    """The engine that was asked for, or for "auto" the fastest one present: "keras" or "openvino".

    Raises
    ------
    DataError
        If OpenVINO is asked for and not installed.
    """
    installed = importlib.util.find_spec("openvino") is not None
    if asked == "openvino" and not installed:
        raise DataError("--engine openvino needs OpenVINO: pip install -r requirements-openvino.txt")
    if asked == "auto":
        return "openvino" if installed and device.accelerator() is None else "keras"
    return asked


def forward(network, engine, precision):
    """The network as a function of windows, (B, h, w) float32 -> interior probability (B, h - 2 shrink, w - 2 shrink).

    Parameters
    ----------
    network : keras.Model
        Of `unet`, one channel. OpenVINO takes its numbers as they are now, always from the float32 weights.
    engine : {"keras", "openvino"}
        As `choose` returns it.
    precision : {"float32", "bfloat16"}
        OpenVINO computes in it; Keras computes in the precision that the network was built with.

    Returns
    -------
    callable
        Any batch and any side that the network can pool, the result float32.
    """
    if engine == "openvino":
        return _compiled(_openvino_model(network), precision)
    return lambda windows: np.asarray(network.predict_on_batch(windows[..., None]), np.float32)


# -- OpenVINO ---------------------------------------------------------------------------------------------------


def _openvino():
    """OpenVINO, without the report to Google Analytics that it sends whenever it is imported."""
    sys.modules.setdefault("openvino_telemetry", None)  # so that it takes its own stand-in for a missing module
    import openvino

    return openvino


def _compiled(model, precision):
    # Threads bound to cores wait for whatever else runs there: three times as long beside a training.
    options = {"INFERENCE_PRECISION_HINT": PRECISIONS[precision], "ENABLE_CPU_PINNING": False}
    compiled = _openvino().Core().compile_model(model, "CPU", options)
    return lambda windows: compiled(np.ascontiguousarray(windows, np.float32))[0]


def _openvino_model(network):
    """The network's inference graph: (B, rows, columns) -> interior (B, rows, columns), all three of any size."""
    openvino = _openvino()
    from openvino import opset13 as ops

    section = ops.parameter([-1, -1, -1], np.float32, name="section")
    made = {id(network.input): ops.unsqueeze(section, _integers([1]))}
    for layer in network.layers:
        if isinstance(layer, keras.layers.InputLayer):
            continue
        if type(layer) not in LAYERS:
            raise DataError(f"--engine openvino cannot compute the layer {layer.name}, but --engine keras can.")
        inputs = [made[id(tensor)] for tensor in keras.tree.flatten(layer.input)]
        made[id(layer.output)] = LAYERS[type(layer)](ops, layer, *inputs)
    return openvino.Model([made[id(network.output)]], [section], network.name)


def _convolution(ops, layer, x):
    kernel = _numbers(layer.kernel).transpose(3, 2, 0, 1)  # (rows, columns, in, out) -> (out, in, rows, columns)
    padding = {"same": "same_upper", "valid": "valid"}[layer.padding]
    nothing = [0, 0]
    x = ops.convolution(
        x, np.ascontiguousarray(kernel), layer.strides, nothing, nothing, layer.dilation_rate, auto_pad=padding
    )
    return _bias_and_activation(ops, layer, x)


def _transposed_convolution(ops, layer, x):
    kernel = _numbers(layer.kernel).transpose(3, 2, 0, 1)  # (rows, columns, out, in) -> (in, out, rows, columns)
    x = ops.convolution_backprop_data(x, np.ascontiguousarray(kernel), layer.strides, auto_pad="valid")
    return _bias_and_activation(ops, layer, x)


def _bias_and_activation(ops, layer, x):
    x = ops.add(x, _per_channel(layer.bias))
    return {"relu": ops.relu, "linear": lambda x: x}[layer.activation.__name__](x)


def _batch_norm(ops, layer, x):
    scale = _numbers(layer.gamma) / np.sqrt(_numbers(layer.moving_variance) + layers.EPSILON)
    shift = _numbers(layer.beta) - _numbers(layer.moving_mean) * scale
    return ops.add(ops.multiply(x, _per_channel(scale)), _per_channel(shift))


def _max_pooling(ops, layer, x):
    nothing = [0, 0]
    return ops.max_pool(x, layer.strides, [1, 1], nothing, nothing, layer.pool_size).output(0)


def _upsample(ops, layer, x):
    twice = np.array([2, 2], np.float32)
    how = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    return ops.interpolate(x, twice, "nearest", "scales", axes=_integers(ROWS_AND_COLUMNS), **how)


def _crop(ops, layer, x):
    (top, bottom), (left, right) = layer.cropping
    return ops.slice(x, *map(_integers, ([top, left], [-bottom, -right], [1, 1], ROWS_AND_COLUMNS)))


def _sum(ops, layer, *xs):
    total = xs[0]
    for x in xs[1:]:
        total = ops.add(total, x)
    return total


def _interior(ops, layer, x):
    return ops.gather(ops.softmax(x, 1), _integers(1), _integers(1))


def _same(ops, layer, x):
    return x


def _numbers(variable):
    return keras.ops.convert_to_numpy(variable).astype(np.float32)


def _per_channel(values):
    return _numbers(values).reshape(1, -1, 1, 1)


def _integers(values):
    return np.array(values, np.int64)


LAYERS = {
    keras.layers.Add: _sum,
    keras.layers.Concatenate: lambda ops, layer, *xs: ops.concat(list(xs), 1),
    keras.layers.Conv2D: _convolution,
    keras.layers.Conv2DTranspose: _transposed_convolution,
    keras.layers.Cropping2D: _crop,
    keras.layers.MaxPooling2D: _max_pooling,
    layers.BatchNormDropout: _batch_norm,
    layers.Dropout: _same,
    layers.InputSize: _same,
    layers.Interior: _interior,
    layers.Upsample: _upsample,
}
