"""Prediction in blocks: OME-Zarr in and out, on one machine or several, resumable chunk by chunk.

A block is predicted from the very tiles that `tiling.predict_section` cuts for it, out of no more of the section than
they read, so the result is the same numbers, and no section need fit into memory. That holds for the mean over
rotated and mirrored versions too, whose tiles are counted from other corners of the section.

The output's chunks are the parts that the tiles fill, a block is a whole number of chunks, and two workers never write
to the same one. A chunk's file is whole or absent, for zarr (>= 3.1.3) writes it beside its place and moves it there;
it is never left out for being empty, for what is not written reads as NaN and a probability is not NaN. So a block is
finished when the files of its chunks are there to the last byte, and `--resume` predicts the others.

Blocks are sent to the workers of dask, which are processes on this machine, or of the cluster whose scheduler is named.
A worker loads the network once; it must see image, weights, output and this folder under the same paths, and no more
than the number of a block goes over the wire.

Metadata: OME-NGFF 0.4 (zarr v2) and 0.5 (zarr v3), https://ngff.openmicroscopy.org/specifications/.
"""

import contextlib
import functools
import hashlib
import importlib
import itertools
import json
import logging
import math
import re
import shutil
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np

from files import atomic, omezarr, stacks
from files.atomic import DataError
from files.sections import size_words
from predict import intensity, tiling

FORMAT = "dilated-unet prediction 1"
SPAN = 4  # tiles along a block with rotated versions, whose tiles are computed for every block that they touch
DEPTH = 16  # most sections of a block: those that share the chunks of the image, which are read once
SLAB_BYTES = 2**27  # pixels of a block, unless one section has more
SAMPLE_PX = 512  # side of the pixels that tell images apart
PIXELS = "pixels_sha256"  # of all sections, which `evaluate` compares; older outputs have it not
IN_FLIGHT = 256  # blocks that the scheduler is told of at a time
CONNECT_S = 10
ADDRESS = re.compile(r"(?:(?:tcp|tls|ws|wss|ucx)://)?(?:[^:/\s]+|\[[0-9a-fA-F:.]+\]):[0-9]{1,5}/?")
IGNORE_CTRL_C = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"  # of workers here: their client ends them


# -- blocks ------------------------------------------------------------------------------------------------------


class Job(NamedTuple):
    """What is to be predicted, from what and how; small and of plain types, for every block is sent with it.

    Attributes
    ----------
    image, output, weights : str
        Paths that every machine sees.
    load : str
        "module:function" of the network, see `run`.
    how : tuple of (str, str)
        Its keyword arguments.
    shape : tuple of int
        Of the output: all axes of an OME-Zarr image, or (S, H, W).
    depth : int
        Sections of a block.
    zarr_format : int
        Of the output.
    grid : tuple
        The fields of a `tiling.Grid`.
    tta : str
        A name in `tiling.TRANSFORMS`.
    batch : int
        Most windows in one call.
    made_of : str
        What the numbers depend on, as JSON: a worker that outlives a run loads anew when any of it has changed.
    """

    image: str
    output: str
    weights: str
    load: str
    how: tuple[tuple[str, str], ...]
    shape: tuple[int, ...]
    depth: int
    zarr_format: int
    grid: tuple
    tta: str
    batch: int
    made_of: str


@functools.lru_cache(maxsize=2)
def tiles_of(job):
    """Grid of a section, and the rows and columns that its tiles fill."""
    grid = tiling.Grid(*job.grid)
    return grid, grid.cuts


def chunk_size(job):
    """Rows and columns of a chunk: those that the first tile fills."""
    return tuple(cuts[0].stop for cuts in tiles_of(job)[1])


def chunks_of(job):
    """Chunks of the output: of one section each."""
    return (1,) * (len(job.shape) - 2) + chunk_size(job)


def span(job):
    """Tiles along the rows, and along the columns, of a block: as many as one call takes, or SPAN."""
    if job.tta != "none":
        return SPAN, SPAN
    return 1, tiling.even_batch(len(tiles_of(job)[1][1]), job.batch)


@functools.lru_cache(maxsize=2)
def block_parts(job):
    """Sections, rows and columns of the blocks, as slices along each axis."""
    count = math.prod(job.shape[:-2])
    sections = [slice(i, min(i + job.depth, count)) for i in range(0, count, job.depth)]
    return sections, *tiles_of(job)[0].parts(*span(job))


def block_count(job):
    """Blocks of the whole stack."""
    return math.prod(len(parts) for parts in block_parts(job))


def block(job, number):
    """Sections, rows and columns of a block, as slices."""
    sections, rows, columns = block_parts(job)
    number, column = divmod(number, len(columns))
    number, row = divmod(number, len(rows))
    return sections[number], (rows[row], columns[column])


def is_finished(job, number):
    """Whether all chunks of a block are written."""
    sections, part = block(job, number)
    return all(is_written(job, index, part) for index in range(sections.start, sections.stop))


def is_written(job, index, part):
    """Whether the files of all chunks of a part of a section are whole."""
    place, sides = omezarr.place(len(job.shape), index), chunk_size(job)
    folder = Path(job.output, "0", *(["c"] if job.zarr_format == 3 else []), *map(str, place))
    keys = (range(along.start // side, -(-along.stop // side)) for along, side in zip(part, sides, strict=True))
    return all(omezarr.is_whole(folder / str(row) / str(column)) for row, column in itertools.product(*keys))


# -- predicting a block ------------------------------------------------------------------------------------------


def predict_block(job, number):
    """Predict a block and write its chunks, section by section; what a worker does."""
    read, predict, array = _tools(job)
    (sections, part), (grid, _) = block(job, number), tiles_of(job)
    around = tiling.pixels_read(grid, part, job.tta)
    how = {"corner": [along.start for along in around], "tta": job.tta, "batch": batch_size(job)}
    for index, pixels in enumerate(read(sections, *around), sections.start):
        if not is_written(job, index, part):
            values = np.zeros([along.stop - along.start for along in part], np.float32)
            tiling.predict_part(grid, part, pixels, predict, values, **how)
            if not np.isfinite(values).all():
                raise DataError(f"{job.output}: the prediction of section {index} is not finite.")
            try:
                array[(*omezarr.place(len(job.shape), index), *part)] = np.clip(values, 0.0, 1.0, out=values)
            except OSError as error:
                raise atomic.could_not_be_written(job.output, error) from error


def batch_size(job):
    """Windows in one call: no more than a block has tiles."""
    return min(job.batch, math.prod(map(min, span(job), map(len, tiles_of(job)[1]))))


_ONE_AT_A_TIME = threading.Lock()  # a worker's threads: one predicts while the other reads or writes


def _tools(job):
    with _ONE_AT_A_TIME:
        return _load(job)


@functools.lru_cache(maxsize=1)
def _load(job):
    """Reader of parts, network and output, once per process."""
    import zarr

    module, name = job.load.split(":")
    network = getattr(importlib.import_module(module), name)(job.weights, **dict(job.how))

    def predict(windows):
        with _ONE_AT_A_TIME:
            return network(windows)

    return _part_reader(open_sections(job.image)), predict, zarr.open_array(f"{job.output}/0", mode="r+")


def _part_reader(reader):
    """A function (sections, rows, columns), slices -> pixels (S, H, W); of a file, small sections are kept."""
    if isinstance(reader, omezarr.ZarrReader):
        return reader.slab
    small = math.prod(reader.shape[1:]) * reader.dtype.itemsize <= SLAB_BYTES
    section = functools.lru_cache(maxsize=2)(reader.__getitem__) if small else None

    def read(sections, rows, columns):
        with _ONE_AT_A_TIME:
            if not small:
                return reader.slab(sections, rows, columns)
            return np.stack([section(index)[rows, columns] for index in range(sections.start, sections.stop)])

    return read


def open_sections(path):
    """Open an OME-Zarr image, or another file or folder of sections."""
    return omezarr.open_zarr(path) if omezarr.is_zarr(path) else stacks.open_stack(Path(path))


# -- the whole stack ---------------------------------------------------------------------------------------------


def run(args, source, *, load, weights, how, settings, choose, log):
    """Predict a stack to an OME-Zarr image, block by block.

    Parameters
    ----------
    args : Namespace
        Of the `predict` verb.
    source : Path or Stack
        A Stack in memory is refused, for workers read the sections themselves.
    load : callable
        (weights, **how) -> predict, with predict: raw windows (B, h, w) -> interior probability (B, h - 2 shrink, w -
        2 shrink), float32. A function of a module, which workers import.
    weights : str or Path
        The file that `load` reads.
    how : dict of str
        What else `load` takes, such as the precision.
    settings : dict
        What else the numbers depend on, for JSON: the network and its normalisation.
    choose : callable
        (H, W) -> tiling.Grid.
    log : callable
        Told what is done, in words.

    Raises
    ------
    DataError
        Where flags contradict each other, an input is bad, or the output is there or is made of something else.
    """
    _check_flags(args, source)
    with open_sections(source) as reader, atomic.locked(args.output):
        grid = choose(reader.shape[1:])
        log(f"sections of {size_words(reader.shape)} px: {grid.words}")
        made_of = {
            "weights_sha256": _sha256(weights),
            "image_sha256": _sample_sha256(reader),
            "image_shape": reader.shape,
            "tile": grid.tile,
            "halo": grid.halo,
            "tta": args.tta,
            **how,
            **settings,
        }
        job = Job(
            image=str(Path(source).resolve()),
            output=str(Path(args.output).resolve()),
            weights=str(Path(weights).resolve()),
            load=f"{load.__module__}:{load.__name__}",
            how=tuple(how.items()),
            shape=omezarr.array_shape(reader),
            depth=1,
            zarr_format=omezarr.zarr_format(reader),
            grid=tuple(grid),
            tta=args.tta,
            batch=args.batch_size,
            made_of=json.dumps(made_of),
        )
        job = job._replace(depth=_depth(job, reader))
        _check_output(args, job)
        with _client(args) as client:
            if args.resume and Path(job.output).exists():
                omezarr.remove_partials(job.output)  # nobody else writes here: it is locked
            else:
                _begin(args, job, reader)
            _finish(args, job, client, log)


def _finish(args, job, client, log):
    """Predict the blocks that are not finished, and count them on a terminal."""
    count = block_count(job)
    todo = [number for number in range(count) if not is_finished(job, number)] if args.resume else range(count)
    log(f"{count} blocks" + (f", {count - len(todo)} of them finished before" if args.resume else ""))
    finished = _streamed(client, job, todo) if client else (predict_block(job, number) for number in todo)
    for done, _ in enumerate(finished, count - len(todo) + 1):
        if sys.stderr.isatty():
            print(f"\rblock {done}/{count}", end="\n" if done == count else "", file=sys.stderr, flush=True)


def _check_flags(args, source):
    masks = args.threshold is not None or args.segment
    contradictions = (
        (masks, "--threshold and --segment go with a TIFF --output"),
        (args.resume and args.force, "--resume goes on with a prediction and --force replaces it: choose one"),
        (args.scheduler and args.workers is not None, "--workers is of no use with --scheduler, which has its own"),
        (isinstance(source, stacks.Stack), "--image_path must be a file or folder, which workers can read"),
    )
    for wrong, words in contradictions:
        if wrong:
            raise DataError(f"{words}. Received: --image_path {args.image_path} --output {args.output}")
    if args.scheduler and not ADDRESS.fullmatch(args.scheduler):
        raise DataError(f"--scheduler must be an address such as tcp://host:8786. Received: {args.scheduler}")
    atomic.refuse_inputs("--output", args.output, source)


def _depth(job, reader):
    """Sections of a block: those that lie in the same chunks of the image, where that is not too much at a time."""
    if not isinstance(reader, omezarr.ZarrReader) or reader.array.ndim < 3:
        return 1
    tile = tiles_of(job)[0].tile
    sides = (min(n, s * side) for n, s, side in zip(reader.shape[1:], span(job), tile, strict=True))
    return max(1, min(reader.array.chunks[-3], DEPTH, SLAB_BYTES // (math.prod(sides) * reader.dtype.itemsize)))


def _sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sample_sha256(reader):
    """SHA-256 of the central pixels of the first, the middle and the last section: the whole may be terabytes."""
    samples = [stacks.sha256_pixels(pixels) for pixels in intensity.sample(reader, SAMPLE_PX)]
    return hashlib.sha256("".join(samples).encode()).hexdigest()


def _check_output(args, job):
    """Refuse an output that is there, but with --force a prediction, and with --resume one that is made of the same."""
    if not Path(job.output).exists():
        return
    if not (args.resume or args.force):
        raise DataError(f"{args.output} exists already (--resume goes on with it, --force replaces it).")
    found, made_of = _record(job.output), json.loads(job.made_of)
    if not found:
        raise DataError(f"--resume and --force are for a prediction of this suite, and {args.output} is none.")
    known = {*made_of, *found} - ({PIXELS} if PIXELS not in found else set())
    other = [key for key in sorted(known) if made_of.get(key) != found.get(key)]
    if args.resume and other:
        words = f"is made of another {', '.join(other)} (--force begins anew)"
        raise DataError(f"--resume goes on with a prediction that is made of the same, and {args.output} {words}.")
    if args.resume:
        omezarr.check_array(job.output, job.shape, chunks_of(job))


def _record(output):
    """What an output says that it is made of, or None where it is no prediction of this suite."""
    with omezarr.extra():
        import zarr
    try:
        record = zarr.open_group(output, mode="r").attrs[omezarr.RECORD]
        return record["made_of"] if record["format"] == FORMAT else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _begin(args, job, reader):
    """Make the output, without chunks yet, beside its place, and move it there."""
    output = Path(job.output)
    record = {"format": FORMAT, "image": job.image, "weights": job.weights, "made_of": json.loads(job.made_of)}
    partial, old = atomic.beside(output), atomic.beside(output.with_name(f"old-{output.name}"))
    try:
        atomic.remove_abandoned(output.parent)
        omezarr.create(partial, reader, job.shape, chunks_of(job), record)
        if output.exists():
            output.rename(old)
        partial.rename(output)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise atomic.could_not_be_written(args.output, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# -- workers -----------------------------------------------------------------------------------------------------


def _streamed(client, job, todo):
    """Send blocks to the workers, a bounded number at a time; dask sends those of a worker that died to another."""
    import distributed

    call, waiting = _by_value(job), iter(todo)
    _check_workers(client, call)

    def send():
        return (client.submit(call, "predict_block", number, pure=False) for number in waiting)

    running = distributed.as_completed(list(itertools.islice(send(), IN_FLIGHT)), loop=client.loop)
    try:
        for future in running:
            yield future.result()
            for following in itertools.islice(send(), 1):
                running.add(following)
    except distributed.KilledWorker as error:
        words = "out of memory? A smaller --tile takes less"
        raise DataError(f"{error.allowed_failures + 1} workers died with the same block: {words}.") from error


def _by_value(job):
    """A function (name, ...) that calls the function of that name of this file with the job, wherever the file is seen.

    Being local it is sent by value: the scheduler need not import this suite, and workers find it by its folder.
    """
    folder, module, fields = str(Path(__file__).resolve().parent.parent), __name__, job._asdict()

    def call(name, *arguments):
        import importlib
        import sys

        if folder not in sys.path:
            sys.path.insert(0, folder)
        here = importlib.import_module(module)
        return getattr(here, name)(here.Job(**fields), *arguments)

    return call


def _check_workers(client, call):
    """Wait for a worker, and refuse those that do not see what they are to work on."""
    client.wait_for_workers(1)
    try:
        unseen = client.run(call, "unseen")
    except Exception as error:  # whatever keeps a worker from importing the suite
        raise DataError(f"--scheduler: a worker cannot run this suite: {error!r}") from error
    for worker, paths in unseen.items():
        if paths:
            raise DataError(f"--scheduler: the worker {worker} does not see {', '.join(paths)}")


def unseen(job):
    """Paths of a job that this machine does not see."""
    return [path for path in (job.image, job.weights, job.output) if not Path(path).exists()]


@contextlib.contextmanager
def _client(args):
    """Client of the scheduler that was named, or of a cluster of processes here, or None with --workers 0."""
    if args.workers == 0:
        yield None
        return
    with omezarr.extra():
        import distributed
    if not args.scheduler:
        with _local_cluster(args.workers or 1) as cluster, distributed.Client(cluster, set_as_default=False) as client:
            yield client
        return
    try:
        client = distributed.Client(args.scheduler, set_as_default=False, timeout=CONNECT_S)
    except (OSError, ValueError) as error:
        raise DataError(f"--scheduler: {args.scheduler} cannot be reached: {error}") from error
    with client:
        yield client


@contextlib.contextmanager
def _local_cluster(workers):
    """Processes that share the cores, each with two threads: one reads and writes while the other predicts."""
    import dask.system
    import distributed

    cores = max(1, dask.system.CPU_COUNT // workers)
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TF_NUM_INTRAOP_THREADS")
    threads = {f"distributed.nanny.pre-spawn-environ.{name}": cores for name in names}  # dask would set them to 1
    options = {"n_workers": workers, "threads_per_worker": 2, "memory_limit": None, "dashboard_address": ":0"}
    options["silence_logs"] = logging.CRITICAL + 1  # what goes wrong is raised; the rest is how processes end
    options["preload"] = [IGNORE_CTRL_C]
    with dask.config.set(threads), distributed.LocalCluster(**options) as cluster:
        yield cluster
