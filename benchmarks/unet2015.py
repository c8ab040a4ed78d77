"""The U-Net paper's "segmentation of a 512 x 512 image takes less than a second", on this machine; no data needed.

    python benchmarks/unet2015.py --json unet2015.json

The network of 31 million parameters, one 512 x 512 section, mirrored to the unpadded network's input of 700 x 700 px as
`predict` does it; initial weights, which cost what trained ones cost. Every round times each engine in turn.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from functools import partial

from training_step import measure, write_record

import data
from network import device, unet
from predict import engines, prediction

SETTINGS = {"arch": "unet2015", "filters": 64, "levels": 4, "padding": "valid"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="write the record there")
    args = parser.parse_args()
    precision = device.choose_precision("auto")
    print(device.describe(precision))
    images, _ = data.synthetic(1, (512, 512))
    normalisation = data.Normalisation.fit(images.sections)
    candidates = {}
    for engine in ("keras", "openvino") if engines.choose("auto") == "openvino" else ("keras",):
        network = unet.from_settings(SETTINGS, precision=precision)
        options = {"engine": engine, "precision": precision}
        predict = prediction.section_predictor(network, normalisation, **options)
        candidates[f"{engine} {precision}"] = partial(predict, images.sections[0])
    measure(candidates, 1, 1)  # compiles
    found = measure(candidates, args.rounds, 1)
    for name, (median, low, high) in found.items():
        print(f"{name:24s} {median:6.2f} s a section ({low:.2f}..{high:.2f})")
    write_record(args.json, parameters=network.count_params(), seconds=found)


if __name__ == "__main__":
    main()
