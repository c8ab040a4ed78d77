"""A training step beside the same network in plain PyTorch, other people's U-Nets, and the machine's peak.

    python benchmarks/peers.py --python PEERS/bin/python            PEERS: an environment with torch, and if they are
                                                                    wanted, monai and segmentation_models_pytorch
    python benchmarks/peers.py --python PEERS/bin/python --rounds 1 --window 128      a quick look

A step is forward, backward and RMSprop update, BCE + Dice, 3 windows of 512 x 512 px. "PyTorch" is the dilated network
of 2017, layer by layer, in bfloat16 by autocast, channels last unless it says otherwise; MONAI and
segmentation_models_pytorch (SMP) bring networks of their own, to be compared by GFLOP/s. ", compiled" behind a name
compiles it, its loss too. PyTorch takes an NVIDIA GPU where it finds one. FLOPs are those of the convolutions, forward
and backward, counted by PyTorch; ours are those of "PyTorch", which has the same 2 772 816 parameters, as has the
standard network. The peak is that of a product of two large square matrices. Every candidate lives in a process of its
own; in each round each of one precision is told in turn to do its steps, while the others wait (in up to 20 GB of
memory together). What is not installed, crashes, or has a loss that is not finite after an update is named and left
out.
"""

import argparse
import contextlib
import functools
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

PARAMETERS_2017 = 2_772_816  # moving averages of the batch norms included
MATRIX = 4096  # rows and columns
PRECISIONS = ("float32", "bfloat16")
COMPILED = ", compiled"


# -- the network of 2017 in PyTorch ------------------------------------------------------------------------------


def dilated_network():
    return network_2017(dilate=True)


def standard_network():
    return network_2017(dilate=False)


def network_2017(dilate):
    """`unet.build(dilate=dilate, dilate_rate=2 if dilate else 1)` as a torch.nn.Module: windows to logits."""
    import torch
    from torch import nn

    class Conv(nn.Sequential):
        """Convolution, ReLU, and batch norm and dropout where they follow."""

        def __init__(self, channels, width, dilation=1):
            convolution = nn.Conv2d(channels, width, 3, padding="same", dilation=dilation)
            nn.init.kaiming_normal_(convolution.weight)
            nn.init.zeros_(convolution.bias)
            super().__init__(convolution, nn.ReLU())

    def norm(channels, dropout=0.3):
        batch_norm = nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)
        return nn.Sequential(batch_norm, nn.Dropout(dropout)) if dropout else batch_norm

    class Network(nn.Module):
        def __init__(self, filters=(44, 88, 176), dilations=(1, 2, 4, 8, 16, 32)):
            super().__init__()
            self.down, self.centre, self.up = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
            channels = 1
            for width in filters:
                first = nn.Sequential(Conv(channels, width), norm(width), Conv(width, width, 2 if dilate else 1))
                last = nn.Sequential(norm(width), nn.MaxPool2d(2), nn.Dropout(0.3))
                self.down.append(nn.ModuleList([first, last]))
                channels = width
            for i, dilation in enumerate(dilations):
                conv = Conv(channels, channels, dilation if dilate else 1)
                self.centre.append(nn.Sequential(norm(channels), conv) if i else conv)
            for width in reversed(filters):
                half = width // 2
                first = nn.Sequential(nn.Upsample(scale_factor=2), Conv(channels, half))
                last = (norm(width + half), Conv(width + half, half), norm(half, 0), Conv(half, half))
                self.up.append(nn.ModuleList([first, nn.Sequential(*last)]))
                channels = half
            self.head = nn.Sequential(norm(channels, 0), nn.Conv2d(channels, 2, 1))

        def forward(self, x):
            skips, centre = [], []
            for first, last in self.down:
                skips.append(first(x))
                x = last(skips[-1])
            for conv in self.centre:
                x = conv(x)
                centre.append(x)
            x = sum(centre)
            for first, last in self.up:
                x = last(torch.cat([skips.pop(), first(x)], 1))
            return self.head(x)

    return Network()


def parameters(network):
    """Numbers that a network keeps, the moving averages of the batch norms among them."""
    kept = [*network.parameters(), *(values for values in network.buffers() if values.is_floating_point())]
    return sum(values.numel() for values in kept)


def monai_network():
    from monai.networks.nets import BasicUNet

    return BasicUNet(spatial_dims=2, in_channels=1, out_channels=2)


def smp_network():
    import segmentation_models_pytorch

    return segmentation_models_pytorch.Unet(encoder_weights=None, in_channels=1, classes=2)


NETWORKS = {
    "PyTorch": dilated_network,
    "PyTorch, channels first": dilated_network,
    "PyTorch, standard": standard_network,
    "MONAI BasicUNet": monai_network,
    "SMP Unet": smp_network,
}


# -- one candidate in its process ---------------------------------------------------------------------------------


def torch_step(name, precision, batch, window):
    """A function that does one step and returns the loss, and what is known of it."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    device = torch_device()
    network = NETWORKS[name.removesuffix(COMPILED)]()
    if name.startswith("PyTorch"):
        assert parameters(network) == PARAMETERS_2017
    layout = torch.contiguous_format if "channels first" in name else torch.channels_last
    network.to(device, memory_format=layout).train()
    optimizer = torch.optim.RMSprop(network.parameters(), lr=1e-3, alpha=0.9, eps=1e-7)
    x = torch.randn(batch, 1, window, window, device=device).to(memory_format=layout)
    truth = (torch.rand(batch, window, window, device=device) < 0.78).float()

    def loss_of(x, truth):
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
            logits = network(x)
        interior = torch.softmax(logits.float(), 1)[:, 1]
        overlap = 2 * (truth * interior).sum() + 1
        p = interior.clip(1e-7, 1 - 1e-7)
        bce = -(truth * p.log() + (1 - truth) * (1 - p).log()).mean()
        return bce + 1 - overlap / (truth.sum() + interior.sum() + 1)

    called = torch.compile(loss_of) if name.endswith(COMPILED) else loss_of

    def step(called=called):
        loss = called(x, truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    with FlopCounterMode(display=False) as counter:
        step(loss_of)
    return step, {"flop": counter.get_total_flops(), "parameters": parameters(network)}


def torch_device():
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def our_step(precision, batch, window):
    from training_step import on_fixed_batch

    from network import unet

    network = unet.build(dilate=True, dilate_rate=2, precision=precision)
    return on_fixed_batch(network, batch, window), {"parameters": PARAMETERS_2017}


def torch_product(precision):
    import torch

    side = 2 * MATRIX if torch_device() == "cuda" else MATRIX
    a, b = torch.randn(2, side, side, dtype=getattr(torch, precision), device=torch_device())
    return lambda: (a @ b)[0, 0], {"flop": 2 * side**3}


def tensorflow_product(precision):
    import tensorflow as tf

    a, b = (tf.cast(tf.random.normal((MATRIX, MATRIX)), precision) for _ in range(2))
    product = tf.function(lambda: tf.matmul(a, b)[0, 0])
    return lambda: float(product()), {"flop": 2 * MATRIX**3}


def candidate(name, precision, batch, window):
    """A function that does one step or product and returns a number of it, and what is known of it."""
    if name == "ours":
        return our_step(precision, batch, window)
    if name.endswith("product"):
        return {"PyTorch": torch_product, "TensorFlow": tensorflow_product}[name.split()[0]](precision)
    return torch_step(name, precision, batch, window)


def work(name, precision, batch, window):
    """Prepare a candidate, say what is known of it; for every line on stdin do so many steps, and say what one took."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    def say(**words):
        print(json.dumps(words), flush=True)

    try:
        step, known = candidate(name, precision, batch, window)
        if not all(math.isfinite(step()) for _ in range(2)):
            return say(missing="its loss is not finite")
    except Exception as error:
        return say(missing=f"{type(error).__name__}: {str(error).strip().splitlines()[0]}")
    versions = {"python": platform.python_version()}
    for package in ("tensorflow", "keras", "torch", "monai", "segmentation_models_pytorch"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    say(**known, versions=versions)
    for line in sys.stdin:
        start = time.perf_counter()
        for _ in range(int(line)):
            found = step()
        float(found)  # which a GPU has to finish first
        say(seconds=(time.perf_counter() - start) / int(line))


# -- the parent, which takes turns --------------------------------------------------------------------------------


class Worker:
    """A candidate's process."""

    def __init__(self, python, name, precision, args):
        words = [python, __file__, "--worker", name, precision]
        words += ["--batch_size", args.batch_size, "--window", args.window]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(list(map(str, words)), text=True, **pipes)

    @functools.cached_property
    def known(self):
        """What is known of it, once it is ready."""
        return self.hear()

    def hear(self):
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"missing": "its process ended"}

    def step(self, count=1):
        """Do so many steps; {"seconds": those of one}, or {"missing": why}."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(f"{count}\n")
            self.process.stdin.flush()
        return self.hear()

    def close(self):
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


def names(only):
    found = ("TensorFlow product", "PyTorch product", "ours", *NETWORKS, "PyTorch" + COMPILED)
    return [name for name in found if not only or name in only]


def start(args, precision):
    """The workers that could be started, by (name, precision); the others are named."""
    workers = {}
    for name in names(args.only):
        ours = name == "ours" or name.startswith("TensorFlow")
        workers[name, precision] = Worker(sys.executable if ours else args.python, name, precision, args)
        leave_out_if_missing(workers, (name, precision), workers[name, precision].known)
    return workers


def leave_out_if_missing(workers, key, said):
    if "missing" in said:
        print(f"left out: {', '.join(key)}: {said['missing']}", flush=True)
        workers.pop(key).close()


def measure(workers, rounds, steps):
    """Median and quartiles of the seconds of a step, interleaved; who ends on the way is left out."""
    import numpy as np

    seconds = {key: [] for key in workers}
    for _ in range(rounds):
        for key in [*workers]:
            for _ in range(steps):
                said = workers[key].step()
                leave_out_if_missing(workers, key, said)
                if "missing" in said:
                    break
                seconds[key].append(said["seconds"])
    return {key: np.percentile(seconds[key], (50, 25, 75)).tolist() for key in workers}


def table(workers, found):
    """Rows of the report: seconds, and where the FLOPs are known, GFLOP/s and its fraction of the peak."""
    same = [
        w.known["flop"]
        for (name, _), w in workers.items()
        if NETWORKS.get(name.removesuffix(COMPILED)) is dilated_network
    ]
    rows = []
    for (name, precision), (median, low, high) in found.items():
        known = dict(workers[name, precision].known)
        versions = known.pop("versions")
        if name == "ours" and same:
            known["flop"] = same[0]
        row = {"name": name, "precision": precision, "seconds": [median, low, high], **known, "versions": versions}
        if "flop" in row:
            row["gflop_per_s"] = row["flop"] / median / 1e9
        rows.append(row)
    for row in rows:
        peak = [r["gflop_per_s"] for r in rows if "product" in r["name"] and r["precision"] == row["precision"]]
        if "gflop_per_s" in row and peak:
            row["of_peak"] = row["gflop_per_s"] / max(peak)
    return rows


def print_table(rows):
    for row in rows:
        median, low, high = row["seconds"]
        line = f"{row['name']:24s} {row['precision']:9s} {median:7.3f} s ({low:.3f}..{high:.3f})"
        line += f" {row['parameters']:11,d} parameters" if "parameters" in row else " " * 23
        if "flop" in row:
            line += f" {row['flop'] / 1e9:7.1f} GFLOP {row['gflop_per_s']:7.1f} GFLOP/s"
        if "of_peak" in row:
            line += f" {row['of_peak']:5.2f} of the peak"
        print(line)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="interpreter of the peers (default: this one)")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="steps of each candidate per round")
    known = {"choices": names(None), "help": ", ".join(names(None))}
    parser.add_argument("--only", nargs="+", metavar="NAME", **known)
    parser.add_argument("--json", help="write the record there")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)  # how this script starts its candidates
    args = parser.parse_args()
    if args.worker:
        return work(*args.worker, args.batch_size, args.window)
    if not shutil.which(args.python):
        parser.error(f"--python: there is no {args.python}; benchmarks/README.md says how to make it")
    from training_step import write_record

    from network import device

    print(
        f"device: {device.name()}; {args.batch_size} windows of {args.window} x {args.window} px per step", flush=True
    )
    rows = []
    for precision in PRECISIONS:
        workers = start(args, precision)
        try:
            rows += table(workers, measure(workers, args.rounds, args.steps))
        finally:
            for worker in workers.values():
                worker.close()
    print_table(rows)
    write_record(args.json, candidates=rows, arguments=vars(args))


if __name__ == "__main__":
    main()
