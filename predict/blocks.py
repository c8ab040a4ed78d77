"""Prediction in blocks: OME-Zarr out, on one machine or several, resumable chunk by chunk.

A block is predicted from the very tiles that `tiling.predict_section` cuts, out of no more of the section than they
read: the same numbers, and no section need fit into memory. The output's chunks are what the tiles fill, a block is a
whole number of them, and so two workers never write to the same one. A chunk's file is whole or absent, for zarr
(>= 3.1.3) moves it to its place, and never left out for being empty, for what is not written reads as NaN. So a block
is finished when the files of its chunks are there to the last byte, and `--resume` predicts the others.

The workers are those of dask: processes here, or of the cluster whose scheduler is named. They see image, weights,
output and this folder under the same paths; no more than the number of a block goes over the wire.
"""

import asyncio
import contextlib
import functools
import hashlib
import importlib
import itertools
import json
import logging
import math
import shutil
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np

import data
from data import DataError
from files import atomic, omezarr
from files.sections import size_words
from network import device
from predict import intensity, tiling

FORMAT = "dilated-unet prediction 1"
SPAN = 4  # tiles along a block with rotated versions, whose tiles are computed for every block that they touch
DEPTH = 16  # most sections of a block: those that share the chunks of the image, which are read once
SLAB_BYTES = 2**27  # pixels of a block, unless one section has more
SAMPLE_PX = 512  # side of the pixels that tell images apart
PIXELS = "pixels_sha256"  # of all sections, which `evaluate` compares; older outputs have it not
IN_FLIGHT = 256  # blocks that the scheduler is told of at a time
CONNECT_S = 10
IGNORE_CTRL_C = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"  # of workers here: their client ends them


# -- blocks ------------------------------------------------------------------------------------------------------


class Job(NamedTuple):
    """What is to be predicted, from what and how; small and of plain types, for every block is sent with it."""

    image: str  # paths that every machine sees
    output: str
    weights: str
    load: str  # "module:function" of the network, see `run`
    how: tuple[tuple[str, str], ...]  # its keyword arguments
    shape: tuple[int, ...]  # of the output: all axes of an OME-Zarr image, or (S, H, W)
    chunks: tuple[int, ...]  # of one section each, and of what the first tile fills
    channel: int | None  # of the image
    zarr_format: int
    grid: tuple  # the fields of a `tiling.Grid`
    block: tuple[int, int, int]  # sections, and tiles along the rows and columns
    tta: str
    batch: int  # windows in one call
    made_of: str  # what the numbers depend on, as JSON: a worker that outlives a run loads anew when it has changed


@functools.lru_cache(maxsize=2)
def block_parts(job):
    """Sections, rows and columns of the blocks, as slices along each axis."""
    count, (depth, *span) = math.prod(job.shape[:-2]), job.block
    sections = [slice(i, min(i + depth, count)) for i in range(0, count, depth)]
    return sections, *tiling.Grid(*job.grid).parts(*span)


def block(job, number):
    """Sections of a block, and its rows and columns, as slices."""
    parts = block_parts(job)
    place = np.unravel_index(number, [len(along) for along in parts])
    sections, *part = (along[i] for along, i in zip(parts, place, strict=True))
    return sections, tuple(part)


def is_written(job, index, part):
    """Whether the files of all chunks of a part of a section are whole."""
    place = omezarr.place(len(job.shape), index)
    folder = Path(job.output, "0", *(["c"] if job.zarr_format == 3 else []), *map(str, place))
    sides = zip(part, job.chunks[-2:], strict=True)
    keys = (range(along.start // side, -(-along.stop // side)) for along, side in sides)
    return all(omezarr.is_whole(folder / str(row) / str(column)) for row, column in itertools.product(*keys))


# -- predicting a block ------------------------------------------------------------------------------------------

_ONE_AT_A_TIME = threading.Lock()  # a worker's threads: one predicts while the other reads or writes


def predict_block(job, number):
    """Predict a block and write its chunks, section by section; what a worker does."""
    with _ONE_AT_A_TIME:
        read, predict, array = _load(job)
    (sections, part), grid = block(job, number), tiling.Grid(*job.grid)
    around = tiling.pixels_read(grid, part, job.tta)
    how = {"corner": [along.start for along in around], "tta": job.tta, "batch": job.batch}
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


@functools.lru_cache(maxsize=1)
def _load(job):
    """Reader of parts, network and output, once per process."""
    import zarr

    module, name = job.load.split(":")
    network = getattr(importlib.import_module(module), name)(job.weights, **dict(job.how))

    def predict(windows):
        with _ONE_AT_A_TIME:
            return network(windows)

    reader = data.iter_sections(Path(job.image), channel=job.channel)
    return _part_reader(reader), predict, zarr.open_array(Path(job.output, "0"), mode="r+")


def _part_reader(reader):
    """A function (sections, rows, columns), slices -> pixels (S, H, W); of a file, small sections are kept."""
    if isinstance(reader, omezarr.ZarrReader):
        return reader.slab
    small = math.prod(reader.shape[1:]) * reader.dtype.itemsize <= SLAB_BYTES
    section = functools.lru_cache(maxsize=2)(reader.__getitem__)

    def read(sections, rows, columns):
        with _ONE_AT_A_TIME:
            if not small:
                return reader.slab(sections, rows, columns)
            return np.stack([section(index)[rows, columns] for index in range(sections.start, sections.stop)])

    return read


# -- the whole stack ---------------------------------------------------------------------------------------------


def run(args, reader, field, *, load, weights, how, settings, log):
    """Predict a stack to an OME-Zarr image, block by block; a DataError where an input or the output is bad.

    Parameters
    ----------
    args, log : Namespace, callable
        Of the `predict` verb; told what is done, in words.
    reader, field : StackReader, network.field.ReceptiveField
        Of a file or folder, which workers read themselves; of the network.
    load : callable
        A function of a module, which workers import: (weights, **how) -> predict, with predict: raw windows (B, h, w)
        -> interior probability (B, h - 2 shrink, w - 2 shrink), float32.
    settings : dict
        What else the numbers depend on, for JSON: the network and its normalisation.
    """
    with atomic.locked(args.output):
        grid = tiling.choose(reader.shape[1:], field, max_tile=args.tile, halo=args.overlap)
        log(f"sections of {size_words(reader.shape)} px: {grid.words}")
        made_of = {"weights_sha256": atomic.sha256(weights)}
        made_of |= {"image_sha256": _sample_sha256(reader), "image_shape": reader.shape}
        made_of |= {"tile": grid.tile, "halo": grid.halo, "tta": args.tta} | how | settings
        shape, block = omezarr.array_shape(reader), _block(args, grid, reader)
        job = Job(
            image=str(Path(reader.source).resolve()),
            output=str(Path(args.output).resolve()),
            weights=str(Path(weights).resolve()),
            load=f"{load.__module__}:{load.__name__}",
            how=tuple(how.items()),
            shape=shape,
            chunks=(1,) * (len(shape) - 2) + tuple(cuts[0].stop for cuts in grid.cuts),
            channel=args.channel,
            zarr_format=omezarr.zarr_format(reader),
            grid=tuple(grid),
            block=block,
            tta=args.tta,
            batch=min(args.batch_size, math.prod(map(min, block[1:], map(len, grid.cuts)))),
            made_of=json.dumps(made_of),
        )
        _check_output(args, job)
        with _client(args) as client:
            if args.resume and Path(job.output).exists():
                omezarr.remove_partials(job.output)  # nobody else writes here: it is locked
            else:
                _begin(args, job, reader)
            _finish(args, job, client, log)


def _finish(args, job, client, log):
    """Predict the blocks that are not finished."""

    def is_finished(number):
        sections, part = block(job, number)
        return all(is_written(job, index, part) for index in range(sections.start, sections.stop))

    count = math.prod(map(len, block_parts(job)))
    todo = [number for number in range(count) if not (args.resume and is_finished(number))]
    log(f"{count} blocks" + (f", {count - len(todo)} of them finished before" if args.resume else ""))
    finished = _streamed(client, job, todo) if client else (predict_block(job, number) for number in todo)
    for _ in tiling.counted(finished, "block", count, count - len(todo)):
        pass


def _block(args, grid, reader):
    """Sections of a block, where they lie in the same chunks of the image and are not too many, and tiles along it."""
    span = (SPAN, SPAN) if args.tta != "none" else (1, tiling.even_batch(len(grid.cuts[1]), args.batch_size))
    if not isinstance(reader, omezarr.ZarrReader) or reader.array.ndim < 3:
        return 1, *span
    sides = (min(n, s * side) for n, s, side in zip(reader.shape[1:], span, grid.tile, strict=True))
    affordable = SLAB_BYTES // (math.prod(sides) * reader.dtype.itemsize)
    return max(1, min(reader.array.chunks[-3], DEPTH, affordable)), *span


def _sample_sha256(reader):
    """SHA-256 of the central pixels of the first, the middle and the last section: the whole may be terabytes."""
    samples = [data.sha256_pixels(pixels) for pixels in intensity.sample(reader, SAMPLE_PX)]
    return hashlib.sha256("".join(samples).encode()).hexdigest()


def _check_output(args, job):
    """Refuse an output that is there, but with --force a prediction, and with --resume one that is made of the same."""
    if not (args.resume or args.force):
        atomic.refuse_existing(args.output, words="--resume goes on with it, --force replaces it")
    if not Path(job.output).exists():
        return
    found, made_of = _record(job.output), json.loads(job.made_of)
    if not found:
        raise DataError(f"--resume and --force are for a prediction of this suite, and {args.output} is none.")
    if args.resume:
        known = {*made_of, *found} - ({PIXELS, "trained_on"} - found.keys())  # which older ones lack
        if other := [key for key in sorted(known) if made_of.get(key) != found.get(key)]:
            words = f"is made of another {', '.join(other)} (--force begins anew)"
            raise DataError(f"--resume goes on with a prediction that is made of the same, and {args.output} {words}.")
        omezarr.check_array(job.output, job.shape, job.chunks)


def _record(output):
    """What an output says that it is made of, or None where it is no prediction of this suite."""
    with omezarr.extra():
        import zarr
    try:
        record = zarr.open_group(Path(output), mode="r").attrs[omezarr.RECORD]
        return record["made_of"] if record["format"] == FORMAT else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def precision_of(output):
    """That of the prediction which `output` holds, finished or not; None where it holds none."""
    found = Path(output).exists() and _record(output)
    precision = found.get("precision") if isinstance(found, dict) else None
    return precision if precision in device.PRECISIONS else None


def _begin(args, job, reader):
    """Make the output, without chunks yet, beside its place, and move it there."""
    output = Path(job.output)
    record = {"format": FORMAT, "image": job.image, "weights": job.weights, "made_of": json.loads(job.made_of)}
    partial, old = atomic.beside(output), atomic.beside(output.with_name(f"old-{output.name}"))
    try:
        atomic.remove_abandoned(output.parent)
        omezarr.create(partial, reader, job.shape, job.chunks, record)
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

    call = _by_value(job)
    _check_workers(client, call)
    sent = (client.submit(call, "predict_block", number, pure=False) for number in todo)
    running = distributed.as_completed(list(itertools.islice(sent, IN_FLIGHT)), loop=client.loop)
    try:
        for future in running:
            yield future.result()
            running.update(list(itertools.islice(sent, 1)))
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
    return [path for path in (job.image, job.weights, job.output) if not Path(atomic.within(path)[0]).exists()]


@contextlib.contextmanager
def _client(args):
    """Client of the scheduler that was named, or of a cluster of processes here, or None with --workers 0."""
    if args.workers == 0:
        yield None
        return
    with omezarr.extra():
        import distributed
    cluster = contextlib.nullcontext(args.scheduler) if args.scheduler else _local_cluster(args.workers or 1)
    try:
        if args.scheduler:
            asyncio.run(_identity(args.scheduler))
    except Exception as error:  # whatever dask makes of the address, or of what answers there
        words = str(error) or f"no answer within {CONNECT_S} s"
        rule = "--scheduler must be the address of a scheduler of dask, such as tcp://host:8786"
        raise DataError(f"{rule}. Received: {args.scheduler}: {words}") from error
    with cluster as address, distributed.Client(address, set_as_default=False, timeout=CONNECT_S) as client:
        yield client


async def _identity(address):
    """Ask a scheduler who it is: `distributed.Client` waits for ever where somebody listens and says nothing."""
    import distributed

    security = distributed.Security().get_connection_args("client")
    async with distributed.rpc(address, timeout=CONNECT_S, connection_args=security) as scheduler:
        found = await asyncio.wait_for(scheduler.identity(), CONNECT_S)
    if found["type"] != "Scheduler":
        raise ValueError(f"there is a {found['type']}")


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
