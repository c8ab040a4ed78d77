"""What `network/onednn.py` is worth: an update and a prediction with its ways and by the plain arithmetic, in turn.

    python benchmarks/onednn.py --json onednn.json

The dilated network of 2017 (3 windows of 512 x 512 px an update) and `resunet` (4 of 256 x 256 px), with Keras and with
OpenVINO where it is installed. Read the ratios.
"""

import argparse

import numpy as np
from training_step import measure, on_fixed_batch, write_record  # also sets the path to the suite

from network import device, onednn, unet
from predict import engines

NETWORKS = {"dilated, 2017": (unet.build, 3, 512), "resunet": (unet.build_residual, 4, 256)}


def with_and_without(make):
    """What `make` gives, traced by either way."""
    serves, is_enlarged = onednn.serves, engines._is_enlarged
    made = {"ours": make()}
    try:
        onednn.serves, engines._is_enlarged = (lambda: False), lambda x: False
        made["plain"] = make()
    finally:
        onednn.serves, engines._is_enlarged = serves, is_enlarged
    return made


def traced(run):
    run()
    return run


def candidates(precision, tiny):
    for name, (build, batch, window) in NETWORKS.items():
        window //= 4 if tiny else 1
        sections = np.random.default_rng(0).normal(size=(batch, window, window)).astype(np.float32)

        def update(build=build, batch=batch, window=window):
            return traced(on_fixed_batch(build(precision=precision), batch, window))

        def prediction(engine, build=build, sections=sections):
            forward = engines.forward(build(precision=precision), engine, precision)
            return traced(lambda: forward(sections))

        yield f"{name}, update", with_and_without(update)
        for engine in ("keras", "openvino") if device.has_openvino() else ("keras",):
            yield f"{name}, {engine}", with_and_without(lambda engine=engine, make=prediction: make(engine))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", choices=("auto", *device.PRECISIONS), default="auto")
    parser.add_argument("--tiny", action="store_true", help="small windows: to see whether it runs")
    parser.add_argument("--json", help="write the record there")
    args = parser.parse_args()
    precision, found = device.choose_precision(args.precision), {}
    for name, ways in candidates(precision, args.tiny):
        found[name] = measure(ways, args.rounds, 1)
        seconds = {way: median for way, (median, *_) in found[name].items()}
        print(f"{name:24s} {seconds['ours']:7.3f} s, {seconds['ours'] / seconds['plain']:.2f} of plain", flush=True)
    write_record(args.json, precision=precision, seconds=found)


if __name__ == "__main__":
    main()
