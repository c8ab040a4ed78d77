"""One section of 512 x 512 px by onnxruntime and by OpenVINO, float32, in turn: the ratio of the median times.

python benchmarks/onnx_engine.py --json results/benchmarks/onnx_engine.json
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
import training_step  # noqa: F401 - sets the path to the suite

from dilatedUnet import SHIPPED
from files import atomic
from predict import engines, prediction, twins
from train.record import hardware, versions


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the numbers there")
    args = parser.parse_args()
    network, _ = prediction.load_network(str(SHIPPED))
    with tempfile.TemporaryDirectory() as folder:
        twins.write_onnx(network, f"{folder}/network.onnx", {})
        session = onnxruntime.InferenceSession(f"{folder}/network.onnx", providers=["CPUExecutionProvider"])
    engine = engines.forward(network, "openvino", "float32")
    computes = {"OpenVINO": engine, "onnxruntime": lambda x: session.run(None, {"section": x[:, None]})[0][:, 0]}
    section = np.random.default_rng(0).standard_normal((1, 512, 512)).astype(np.float32)
    difference = float(np.abs(np.subtract(*(compute(section) for compute in computes.values()))).max())
    seconds = {name: [] for name in computes}
    for _ in range(args.rounds):
        for name, compute in computes.items():
            begin = time.perf_counter()
            compute(section)
            seconds[name].append(time.perf_counter() - begin)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    found = {"seconds": medians, "ratio": medians["onnxruntime"] / medians["OpenVINO"], "difference": difference}
    print(found)
    if args.json:
        about = {"versions": versions() | {"onnxruntime": onnxruntime.__version__}, "hardware": hardware()}
        atomic.write_json(args.json, about | found, force=True)


if __name__ == "__main__":
    main()
