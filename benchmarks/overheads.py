"""What a run costs beside its updates: starting, loading, writing the checkpoint; no data needed.

    python benchmarks/overheads.py

The command line is timed as processes, in turn, beside Python's own start. The checkpoint (weights, optimizer,
statistics, history, and the best weights, as after every epoch) is that of the dilated network of 2017 with RMSprop,
beside an epoch of the study: 10 updates of 3 windows of 512 x 512 px. Sections are read from a TIFF of 30 sections of
512 x 512 px, LZW-compressed, with its labels.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import tifffile
from training_step import Program, measure, write_record  # also sets the path to the suite

import data
from network import device
from predict import prediction
from train import run as training
from train.record import HISTORY

PROGRAM = Path(training.__file__).parent.parent / "dilatedUnet.py"
SAVING = "checkpoint, history, best weights"
FLAGS = "--dilate 1 --dilate_rate 2 --addition 1 --augment all --image_path synthetic --protocol holdout"


def started(*words):
    """A function that runs Python with those words to its end."""
    command = [sys.executable, *map(str, words)]
    return lambda: subprocess.run(command, cwd=PROGRAM.parent, capture_output=True, check=True)


def starts():
    """What is started, by its name."""
    return {
        "python -c pass": started("-c", "pass"),
        "dilatedUnet.py --help": started(PROGRAM, "--help"),
        "dilatedUnet.py train --help": started(PROGRAM, "train", "--help"),
        "reproduce table --list": started(PROGRAM, "reproduce", "table", "--list"),
        "import train.run": started("-c", "import train.run"),
    }


def written_stack(folder):
    """Paths of 30 sections and their labels."""
    images, masks = data.synthetic()
    paths = [Path(folder) / name for name in ("images.tif", "labels.tif")]
    for path, stack in zip(paths, (images, masks), strict=True):
        tifffile.imwrite(path, stack.sections, compression="lzw", photometric="minisblack")
    return paths


def after_an_epoch(recorder):
    """A function that writes what is written after every epoch."""
    recorder.journal.rows = [dict.fromkeys(HISTORY, 0.5)]

    def write():
        recorder.journal.write_history(recorder.place.history)
        prediction.save_weights(recorder.alone.network, recorder.place.weights, {})
        recorder.save_checkpoint()

    return write


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--json", help="write the record there")
    args = parser.parse_args()
    precision = device.choose_precision("auto")
    with tempfile.TemporaryDirectory() as folder:
        program = Program([*FLAGS.split(), "--window", str(args.window)], folder, precision)
        program(1)
        update = statistics.median(program(max(3, args.rounds)))
        stack = written_stack(folder)
        rest = {
            "loading and checking a stack": lambda: data.load_pair(*stack),
            SAVING: after_an_epoch(program.recorder),
        }
        found = measure(starts() | rest, args.rounds, 1)
        size = (Path(folder) / "checkpoint.npz").stat().st_size / 2**20
    epoch, saving = 10 * update, found[SAVING][0]
    print(device.describe(precision))
    for name, (median, low, high) in found.items():
        print(f"{name:36s} {1000 * median:8.0f} ms ({1000 * low:.0f}..{1000 * high:.0f})")
    share = saving / (epoch + saving)
    print(f"an epoch of 10 updates: {epoch:.1f} s; checkpoint of {size:.0f} MiB: {100 * share:.2f} % of it (limit 2 %)")
    write_record(args.json, seconds=found, update_seconds=update, checkpoint_share=share, checkpoint_mib=size)


if __name__ == "__main__":
    main()
