"""What a prediction costs, engine by engine, beside stock Keras's `model.predict`; no data needed.

    python benchmarks/prediction.py                     milliseconds per 512 x 512 section
    python benchmarks/prediction.py --large             megapixels per second, a section of 8192 x 8192 px in tiles
    python benchmarks/prediction.py --memory            peak memory of `dilatedUnet.py predict`

The dilated network of 2017 with its initial weights, which cost what trained ones cost. Every round times each
candidate in turn, so that a busy moment of the machine hits them all; what counts are the ratios of the medians.
"stock" is the same architecture with Keras's own batch norm, dropout and upsampling. --memory runs the command line
on stacks of 2, 8 and 32 sections of 512 x 512 px, then on one section of 512, 1024, 2048 and 4096 px a side; "stock"
is there a script of a few lines that gives the whole stack to `model.predict`.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import tifffile
from training_step import measure, stock_network, write_record

import data
from network import device, unet
from predict import engines, prediction, tiling

PROGRAM = Path(unet.__file__).parent.parent / "dilatedUnet.py"
NETWORK = {"dilate": True, "dilate_rate": 2}
RECORDED = NETWORK | {"filters": [*unet.FILTERS], "addition": True, "classes": 2, "dropout": 0.3}
STOCK = "stock float32, model.predict"
STOCK_LIMIT = 1024  # px a side: `model.predict` takes a section whole, which is gigabytes for larger ones


def engines_present():
    """(engine, precision) of every candidate that this machine has."""
    present = ["keras", "openvino"] if engines.choose("auto") == "openvino" else ["keras"]
    precisions = dict.fromkeys(("float32", device.choose_precision("auto")))
    return [(engine, precision) for engine in present for precision in precisions]


def forwards():
    """The candidates as functions of windows, (B, h, w) -> (B, h, w), by name."""
    found = {}
    for engine, precision in engines_present():
        network = unet.build(**NETWORK, precision="float32" if engine == "openvino" else precision)
        found[f"{engine} {precision}"] = engines.forward(network, engine, precision)
    return found


def painted(side, sections=1):
    """A synthetic stack (sections, side, side), uint8; sides above 512 px repeat."""
    images, _ = data.synthetic(sections, (512, 512))
    return np.tile(images.sections, (1, side // 512, side // 512))


# -- seconds ----------------------------------------------------------------------------------------------------


def small(args):
    """Seconds of one section of 512 x 512 px, by candidate."""
    section = standardised(painted(512))[0]
    stock, ours = stock_network(**NETWORK), forwards()
    candidates = {STOCK: lambda: stock.predict(section[None, ..., None], verbose=0)}
    for name, forward in ours.items():
        candidates[name] = lambda forward=forward: forward(section[None])
    name, forward = [*ours.items()][-1]
    whole = tiling.Grid(section.shape, section.shape, 0)
    candidates[f"{name}, --tta"] = lambda: tiling.predict_section(section, forward, whole, tta="8")
    for run in candidates.values():
        run()
    return measure(candidates, args.rounds or 5, 2)


def large(args):
    """Seconds of one section of `--side`, cut into tiles and stitched, by candidate."""
    section = standardised(painted(args.side))[0]
    field = unet.field_from_settings(NETWORK)
    grid = tiling.choose(section.shape, field)
    print(f"section of {args.side} x {args.side} px: {grid.words}")
    candidates = {}
    for name, forward in forwards().items():
        forward(np.zeros((args.batch_size, *grid.tile), np.float32))
        candidates[name] = lambda forward=forward: tiling.predict_section(section, forward, grid, batch=args.batch_size)
    return measure(candidates, args.rounds or 1, 1)


def standardised(sections):
    return ((sections - sections.mean()) / sections.std()).astype(np.float32)


# -- peak memory ------------------------------------------------------------------------------------------------


def memory(args):
    """Peak resident memory in MiB, by candidate and then by the shape of the stack."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        weights, stacks = random_weights(folder), write_stacks(folder, args.sections, args.sides)
        for engine, precision in engines_present():
            found[f"{engine} {precision}"] = {
                name: peak_mib(predict_command(weights, file, engine, precision)) for name, file in stacks.items()
            }
        found[STOCK] = {
            name: peak_mib([sys.executable, __file__, "--stock", file])
            for name, file in stacks.items()
            if tifffile.imread(file).shape[-1] <= STOCK_LIMIT
        }
    return found


def predict_command(weights, file, engine, precision):
    """The command that is measured."""
    words = ["--weight_path", weights, "--image_path", file, "--output", file.with_suffix(".out.tif"), "--force"]
    return [sys.executable, PROGRAM, "predict", *words, "--precision", precision, "--engine", engine]


def random_weights(folder):
    """Weights and record of an untrained network, as a run writes them."""
    path = Path(folder) / "weights"
    record = {"network": RECORDED, "normalisation": {"mean": 127.0, "std": 42.0, "epsilon": 1e-10}}
    prediction.save_weights(unet.build(**NETWORK), path, record)
    return path


def write_stacks(folder, counts, sides):
    """The stacks as TIFF files, by the words of their shape."""
    files = {}
    for sections, side in (*((n, 512) for n in counts), *((1, side) for side in sides)):
        name = f"{sections} x {side} x {side}"
        files[name] = Path(folder) / f"{sections}-{side}.tif"
        tifffile.imwrite(files[name], painted(side, sections), photometric="minisblack")
    return files


OF_CHILD = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def peak_mib(command):
    """Largest resident memory of a process, MiB; started by a small one, since what starts it counts, too."""
    words = [sys.executable, "-c", OF_CHILD, *map(str, command)]
    found = subprocess.run(words, capture_output=True, text=True)
    if found.returncode:
        raise SystemExit(f"failed: {' '.join(map(str, command))}")
    return int(found.stdout) / (2**20 if sys.platform == "darwin" else 2**10)


def stock_script(file):
    """What a few lines of stock Keras would do with a stack."""
    sections = tifffile.imread(file)
    sections = standardised(sections if sections.ndim == 3 else sections[None])
    interior = stock_network(**NETWORK).predict(sections[..., None], batch_size=1, verbose=0)
    tifffile.imwrite(file.with_suffix(".out.tif"), interior, photometric="minisblack")


# -- report -----------------------------------------------------------------------------------------------------


def print_seconds(found, pixels):
    reference = STOCK if STOCK in found else next(iter(found))
    for name, (median, low, high) in found.items():
        speed = f"{pixels / median / 1e6:7.2f} megapixels / s"
        ratio = f"{median / found[reference][0]:5.2f} of {reference}"
        print(f"{name:32s} {1000 * median:9.0f} ms ({1000 * low:.0f}..{1000 * high:.0f})  {speed}  {ratio}")


def print_memory(found):
    columns = list(dict.fromkeys(name for row in found.values() for name in row))
    print(f"{'peak memory, MiB':32s}" + "".join(f"{name:>16s}" for name in columns))
    for name, row in found.items():
        print(f"{name:32s}" + "".join(f"{row[c]:16.0f}" if c in row else f"{'-':>16s}" for c in columns))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    job = parser.add_mutually_exclusive_group()
    job.add_argument("--large", action="store_true", help="megapixels per second of a large section")
    job.add_argument("--memory", action="store_true", help="peak memory of the command line")
    job.add_argument("--stock", type=Path, help=argparse.SUPPRESS)  # how --memory calls this script
    parser.add_argument("--side", type=int, default=8192, help="of the large section, a multiple of 512 px")
    counts, sides = (2, 8, 32), (512, 1024, 2048, 4096)
    parser.add_argument("--sections", type=int, nargs="+", default=counts, help="of --memory, of 512 x 512 px")
    parser.add_argument("--sides", type=int, nargs="+", default=sides, help="of --memory, multiples of 512 px")
    parser.add_argument("--batch_size", type=int, default=1, help="tiles per call, with --large")
    parser.add_argument("--rounds", type=int, help="default: 5, with --large 1")
    parser.add_argument("--json", help="write the record there")
    args = parser.parse_args()
    if args.stock:
        return stock_script(args.stock)
    print(device.describe(device.choose_precision("auto")))
    if args.memory:
        found = {"peak_mib": memory(args)}
        print_memory(found["peak_mib"])
    else:
        found = {"seconds": large(args) if args.large else small(args)}
        print_seconds(found["seconds"], (args.side if args.large else 512) ** 2)
    arguments = {name: value for name, value in vars(args).items() if name != "stock"}
    write_record(args.json, **found, arguments=arguments)


if __name__ == "__main__":
    main()
