"""What a GPU gives: seconds an update and share of the matrix peak, beside PyTorch; feed, full table, time to quality.

    KERAS_BACKEND=jax python benchmarks/gpu.py --json gpu.json                      everything, in this order
    KERAS_BACKEND=jax python benchmarks/gpu.py --json gpu.json --only step peers    some of it
    KERAS_BACKEND=jax python benchmarks/gpu.py --json gpu.json --show               the table of what a record holds
    KERAS_BACKEND=jax python benchmarks/gpu.py --json tiny.json --tiny              whether it runs; not how fast

Every number is in the record as soon as it is there, so a run that is killed keeps what it has, and the next one adds
to it; what fails is named and left out. An update is forward, backward and RMSprop on 3 windows of 512 x 512 px, BCE +
Dice. Ten are done in a row, then the device is waited for. Candidates take turns. Parts:

    step     the networks, on a batch that is there, and the product of two large matrices in the same framework
    peers    the same in PyTorch, and segmentation_models_pytorch (SMP), where they are installed (peers.py)
    feed     the program with augmentation: fed as a run is, by a thread that draws ahead, with batches that are there
    quality  `--recipe quick` until the held-out V_rand is 0.978, scored in between with the clock stopped
    table    rows of `reproduce table`: their first epochs, as the command runs them, counted up to all
    layers   the dilated network with batch norm, dropout or both as Keras ships them
    kernels  what an update of each network spends its time on, with JAX
"""

import argparse
import collections
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch wants memory, too
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/dilated-unet/jax"))
import keras
import numpy as np
import peers
import time_to_quality
import training_step  # sets the path to the suite

import dilatedUnet
from files import atomic
from files.ahead import ahead
from network import device, losses, unet
from studies import reproduce, rows
from train.record import hardware, versions

NETWORKS = {
    "standard": {"dilate": False, "dilate_rate": 1},
    "dilated": {"dilate": True, "dilate_rate": 2},
    "unet2015": {"arch": "unet2015", "padding": "same", "batch_norm": True},
}
NETWORKS |= {arch: {"arch": arch} for arch in unet.ARCHITECTURES if arch not in ("unet2017", *NETWORKS)}
PEERS = ("PyTorch product", "PyTorch, compiled", "PyTorch, standard, compiled", "SMP Unet, compiled")
PEERS += ("PyTorch", "SMP Unet")
TARGET = 0.978
EPOCHS = 12  # of a row that is measured
AS_FAST = {"unet": "unet", "unet-a": "unet"}  # as which row; the others as the dilated one
FOUR = ("unet", "dilated", "unet-a", "dilated-a")
KINDS = {  # a word in a kernel's name with JAX, and what it does; the first that fits
    "bw-filter": "gradients of the weights",
    "bw-input": "gradients of the inputs",
    "cudnn-conv": "convolutions",
    "reduce_window": "pooling",
    "scatter": "pooling",
    "input_": "sums over pixels",
    "pad_fusion": "channels of zeros",
    "transpose": "other orders of pixels",
}
TINY = "--filters 4,8 --window 64 --image_path synthetic"


class Record:
    """What is found, written whenever something is added."""

    def __init__(self, args, precision):
        self.path = Path(args.json)
        before = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.found = {key: before[key] for key in PARTS if key in before} | {"failed": {}, "arguments": vars(args)}
        self.found |= {"versions": versions(), "hardware": hardware(), "precision": precision}

    def add(self, part, name, **values):
        self.found.setdefault(part, {}).setdefault(name, {}).update(values)
        atomic.write_json(self.path, self.found)

    def trying(self, part, name, function):
        """What `function()` returns; None where it fails, which is written down."""
        try:
            return function()
        except Exception as error:
            words = f"{type(error).__name__}: {str(error).strip()[-300:]}"
            print(f"left out: {part}, {name}: {words}", flush=True)
            self.add("failed", f"{part}, {name}", why=words)


# -- updates ------------------------------------------------------------------------------------------------------


def in_a_row(model, batches, calls, *callbacks):
    """Seconds of an update, for each of `calls` calls of the compiled step; its numbers are waited for after each."""
    clock, each = training_step.Clock(), model.steps_per_execution
    length = {"steps_per_epoch": (calls + 1) * each, "shuffle": False, "verbose": 0}
    model.fit((batch for batch in batches), **length, callbacks=[*callbacks, clock])
    return [seconds / each for seconds in clock.seconds[1:]]


def built(**settings):
    return unet.from_settings(settings)


def on_resident_batch(make, settings, precision, args):
    """A network's updates on one batch that lies on the device, and what is known of it."""
    small = {"filters": 4, "levels": 2} if settings.get("arch") == "unet2015" else {"filters": (4, 8)}
    network = make(**settings | (small if args.tiny else {}), precision=precision)
    rng, shape = np.random.default_rng(0), (args.batch_size, args.window, args.window)
    x = keras.ops.convert_to_tensor(rng.normal(size=(*shape, 1)).astype("float32"))
    y = keras.ops.convert_to_tensor((rng.random(shape) < 0.78).astype("float32"))
    how = {"steps_per_execution": args.updates, "jit_compile": device.use_xla(1)}
    network.compile("rmsprop", loss=losses.bce_dice, **how)
    known = {"flop": flop(network, args.batch_size, args.window), "parameters": network.count_params()}
    return lambda: in_a_row(network, itertools.repeat((x, y)), args.calls), known


def flop(network, batch, side):
    """Of the convolutions, forward and backward; the first one's input needs no gradient."""
    layers = [layer for layer in network.layers if hasattr(layer, "kernel")]
    inside = keras.Model(network.input, [layer.output for layer in layers])
    found = 0
    for layer, shape in zip(layers, inside.compute_output_shape((batch, side, side, 1)), strict=True):
        shared = math.prod(layer.strides) if "Transpose" in type(layer).__name__ else 1
        once = 2 * math.prod(layer.kernel.shape) * math.prod(shape[:-1]) // shared
        found += once * (3 if found else 2)
    return found


def product(precision, args):
    """Products of large matrices in Keras's backend."""
    rng, ops = np.random.default_rng(0), keras.ops
    a, b = (ops.cast(rng.normal(size=(args.side, args.side)).astype("float32"), precision) for _ in range(2))

    def run():
        start = time.perf_counter()
        for _ in range(args.updates):
            found = ops.matmul(a, b)
        float(found[0, 0])
        return [(time.perf_counter() - start) / args.updates]

    return run, {"flop": 2 * args.side**3}


def of_peer(worker, args):
    """A candidate of peers.py in its process."""

    def run():
        said = worker.step(args.updates) if "missing" not in worker.known else worker.known
        if "missing" in said:
            raise RuntimeError(said["missing"])
        return [said["seconds"]]

    return run, worker.known


def compare(part, candidates, record, rounds):
    """Prepare the candidates one by one, then let them take turns; medians and quartiles of all that was measured."""
    running, seconds = {}, {}

    def prepare(name):
        begin = time.perf_counter()
        running[name], known = candidates[name]()
        running[name]()  # compiles
        ready = round(time.perf_counter() - begin, 1)
        record.add(part, name, **known, ready_after_s=ready)
        measure(name)
        print(f"{part}, {name}: {statistics.median(seconds[name]):.5f} s; ready after {ready} s", flush=True)

    def measure(name):
        seconds.setdefault(name, []).extend(running[name]())
        record.add(part, name, seconds=np.percentile(seconds[name], (50, 25, 75)).tolist())

    for name in candidates:
        record.trying(part, name, partial(prepare, name))
    names, seconds = [*seconds], {}  # what compiled beside the first ones delayed them
    for name in names * rounds:
        record.trying(part, name, partial(measure, name))


def step(record, precision, args):
    """Parts step and peers, in one interleaved run."""
    candidates, workers = {}, []
    if "step" in args.only:
        candidates["product"] = partial(product, precision, args)
        for name in args.networks:
            candidates[name] = partial(on_resident_batch, built, NETWORKS[name], precision, args)
    if "peers" in args.only:
        names = ("PyTorch",) if args.tiny else args.peers
        workers = [peers.Worker(args.python, name, precision, args) for name in names]  # they compile meanwhile
        candidates |= {name: partial(of_peer, worker, args) for name, worker in zip(names, workers, strict=True)}
    try:
        compare("step", candidates, record, args.rounds)
    finally:
        for worker in workers:
            worker.close()


def layers(record, precision, args):
    class StockNorm(training_step.StockLayers):
        drop, __call__ = unet._Layers.drop, unet._Layers.__call__

    class StockDropout(training_step.StockLayers):
        batch_norm, __call__ = unet._Layers.batch_norm, unet._Layers.__call__

    stock = {"stock batch norm": StockNorm, "stock dropout": StockDropout, "all stock": training_step.StockLayers}
    kinds = {"ours": unet.build} | {name: partial(training_step.stock_network, kind) for name, kind in stock.items()}
    candidates = {name: partial(on_resident_batch, make, {}, precision, args) for name, make in kinds.items()}
    compare("layers", candidates, record, args.rounds)


def kernels(record, precision, args):
    """Milliseconds of an update in each kind of kernel, by JAX's profiler."""
    for name in args.networks:
        run, _ = on_resident_batch(built, NETWORKS[name], precision, args)
        run()
        updates, spent = args.updates * (args.calls + 1), collections.Counter()
        for kernel, duration in traced(run):
            spent[kind_of(kernel)] += duration
        record.add("kernels", name, **{kind: round(ns / updates / 1e6, 3) for kind, ns in spent.most_common()})


def kind_of(kernel):
    return next((kind for word, kind in KINDS.items() if word in kernel), "the rest")


def traced(run):
    """Every kernel that a GPU computes in `run`: its name behind that of its operation, and nanoseconds."""
    import jax

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        (found,) = Path(folder).rglob("*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(found)).planes
    lines = (line for plane in planes if plane.name.startswith("/device") for line in plane.lines)
    for event in (event for line in lines if line.name.startswith("Stream") for event in line.events):
        yield f"{dict(event.stats).get('hlo_op')} {event.name}", event.duration_ns


# -- runs ---------------------------------------------------------------------------------------------------------


def feed(record, precision, args):
    words = f"--dilate 1 --dilate_rate 2 --image_path synthetic --protocol holdout --augment all --window {args.window}"
    words += f" --batch_size {args.batch_size} --steps_per_execution {args.updates} --steps_per_epoch {args.updates}"
    with tempfile.TemporaryDirectory() as folder:
        program = training_step.Program([*words.split(), *(TINY.split() if args.tiny else ())], folder, precision)
        begin, few = time.perf_counter(), 2 * args.updates
        there = [next(program.feed) for _ in range(few)]
        record.add("feed", "drawing one batch", seconds=[(time.perf_counter() - begin) / few] * 3)
        fed = {"batches there": itertools.cycle(there), "drawn when needed": program.feed}
        fed["as a run"] = ahead(program.batches.training(0), args.updates)

        def candidate(batches):
            return lambda: in_a_row(program.trainee, batches, 3 * args.calls, program.recorder), {}

        compare("feed", {name: partial(candidate, b) for name, b in fed.items()}, record, args.rounds)
    found = {name: known["seconds"][0] for name, known in record.found["feed"].items()}
    for name in [*fed][1:]:
        record.add("feed", name, waiting=1 - found["batches there"] / found[name])


def quality(record, precision, args):
    time_to_quality.RECIPES["start.py"] += f" {TINY} --epochs 2 --steps_per_epoch 2" * args.tiny
    points = time_to_quality.Run("start.py", args.image_path, seed=0).points(minutes=3, every=0)
    reached = next((point for point in points if point[2] >= TARGET), None)
    record.add("quality", "start.py", points=points, reached=reached)


def table(record, precision, args):
    """The standard and the dilated row under both protocols; the other rows take as long as one of them."""
    whole, as_fast = rows.table_rows(quick=False), lambda row: AS_FAST.get(row, "dilated")
    for job in rows.jobs_of(whole, 1, None, None):
        if job.row.name in ("unet", "dilated"):
            name = f"{job.row.name}, {job.protocol}"
            if found := record.trying("table", name, partial(first_epochs, job, args)):
                record.add("table", name, **found)
                print(f"table, {name}: {found}", flush=True)
    minutes = {name: known["minutes"] for name, known in record.found["table"].items()}
    record.add("table", "four rows, published", minutes=sum(minutes[f"{as_fast(row)}, published"] for row in FOUR))
    every = [minutes[f"{as_fast(job.row.name)}, {job.protocol}"] for job in rows.jobs_of(whole, 3, None, None)]
    record.add("table", f"all {len(every)} runs of three seeds", minutes=sum(every))


def first_epochs(job, args):
    """Seconds of an epoch of a row, of all else in its run, and minutes of the whole run."""
    with tempfile.TemporaryDirectory() as folder:
        words = [*job.command(Path(folder) / "run"), "--image_path", args.image_path, "--epochs", str(EPOCHS)]
        words += TINY.split() if args.tiny else ()
        begin, ends, history = time.perf_counter(), [], Path(folder) / "run" / "history.csv"
        with open(Path(folder) / "log", "w+") as log:
            process = subprocess.Popen([sys.executable, reproduce.SUITE, *words], stdout=log, stderr=log)
            while process.poll() is None:
                time.sleep(0.002)
                if history.exists() and history.read_bytes().count(b"\n") - 1 > len(ends):
                    ends.append(time.perf_counter())
            whole = time.perf_counter() - begin
            log.seek(0)
            if process.returncode or len(ends) < EPOCHS // 2:
                raise RuntimeError(f"exit code {process.returncode}, {len(ends)} epochs seen: {log.read()}")
    epoch, epochs = statistics.median(np.diff(ends)), dilatedUnet.parse(job.argv()).epochs
    rest = whole - (ends[-1] - ends[0]) - epoch  # start, compilation, scores at the end
    return {"epoch_s": epoch, "rest_s": rest, "epochs": epochs, "minutes": (rest + epochs * epoch) / 60}


PARTS = {"step": step, "peers": step} | {part.__name__: part for part in (feed, quality, table, layers, kernels)}

# -- the report ---------------------------------------------------------------------------------------------------


def report(found):
    """Lines of what a record holds."""
    yield f"{found['hardware']['device']}, {found['precision']}, {found['versions']['backend']}"
    peak = {}
    updates = [(part, *item) for part in ("step", "layers") for item in found.get(part, {}).items()]
    for part, name, known in updates:
        framework = "PyTorch" if name.startswith(("PyTorch", "SMP")) else "Keras"
        median, low, high = known.get("seconds", [math.nan] * 3)  # of what was ready when it was killed
        tflop = known["flop"] / median / 1e12
        peak |= {framework: tflop} if name.endswith("product") else {}
        share = f" {tflop / peak[framework]:.3f} of the peak" if framework in peak else ""
        words = f"{1000 * median:10.2f} ms ({1000 * low:.2f}..{1000 * high:.2f}) {tflop:8.3f} TFLOP/s"
        yield f"{part:8s}{name:30s}{words}{share}"
    for name, known in found.get("feed", {}).items():
        share = f"  waiting {100 * known['waiting']:.1f} % (limit 10 %)" if "waiting" in known else ""
        yield f"feed    {name:30s}{1000 * known['seconds'][0]:10.2f} ms{share}"
    for name, known in found.get("quality", {}).items():
        first, last, reached = known["points"][0], known["points"][-1], known["reached"]
        when = f"after {reached[0]} s, {reached[1]} updates" if reached else "not reached"
        end = f"at the end {last[2]} after {last[0]} s; of these {first[0]} s for the first epoch, which compiles"
        yield f"quality {name}: V_rand {TARGET} {when}; {end}"
    for name, known in found.get("table", {}).items():
        epoch = f" (an epoch {known['epoch_s']:.3f} s, the rest {known['rest_s']:.0f} s)" if "epoch_s" in known else ""
        yield f"table   {name:30s}{known['minutes']:10.2f} minutes{epoch}"
    for name, known in found.get("kernels", {}).items():
        yield f"kernels {name:30s}" + ", ".join(f"{kind} {ms:.2f} ms" for kind, ms in known.items())
    yield from (f"left out: {name}: {known['why']}" for name, known in found["failed"].items())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True, help="the record; what an earlier one holds of other parts stays")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=[*PARTS], metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=[*NETWORKS], metavar="NAME", help="of step")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=PEERS, metavar="NAME", help="of peers")
    parser.add_argument("--image_path", default="isbi2012", help="of quality and table")
    parser.add_argument("--python", default=sys.executable, help="interpreter with PyTorch (default: this one)")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="whether everything runs")
    parser.add_argument("--show", action="store_true", help="measure nothing, print what the record holds")
    args = parser.parse_args()
    if not args.show:
        measure(args)
    print("\n".join(report(json.loads(Path(args.json).read_text()))))


def measure(args):
    # updates in a call of the compiled step, calls in a turn, side of the matrices
    args.updates, args.calls, args.side = (2, 1, 256) if args.tiny else (10, 2, 8192)
    if args.tiny:
        args.window, args.rounds, args.image_path = 64, 1, "synthetic"
    precision = device.choose_precision("auto")
    record = Record(args, precision)
    print(device.describe(precision), flush=True)
    for part in dict.fromkeys(PARTS[name] for name in PARTS if name in args.only):
        record.trying(part.__name__, "as a whole", partial(part, record, precision, args))


if __name__ == "__main__":
    main()
