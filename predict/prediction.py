"""Weights in and out, and the `predict` verb: a stack of any size to a TIFF, one section at a time."""

import functools
import json
import math
import os
import sys
from pathlib import Path

import data
from data import DataError
from network import device, unet
from predict import engines, tiling

FORMAT = "dilated-unet weights 1"
SUFFIX = ".weights.h5"
SMALLEST_CELL_PX = 9  # of a seed for `--segment`; smaller ones are specks
SEGMENTATION = ("threshold", "background", "smallest_cell_px")  # of a record: how `--segment` cuts cells


# -- weights and their record -----------------------------------------------------------------------------------


def weight_file(path):
    """The file Keras 3 writes for `--weight_path`: weights/x, weights/x.weights, ... -> weights/x.weights.h5."""
    path = Path(path)
    return path.with_name(path.name.removesuffix(".h5").removesuffix(".weights") + SUFFIX)


def record_file(path):
    """The record beside the weights: weights/x.weights -> weights/x.json."""
    file = weight_file(path)
    return file.with_name(file.name.removesuffix(SUFFIX) + ".json")


def save_weights(network, path, record):
    """Write the weights, then their record; each file replaced as a whole."""
    file = weight_file(path)
    with data.replacing(file, force=True) as partial:
        reserve(partial, network)
        network.save_weights(partial)
    write_json(record_file(file), {"format": FORMAT} | record)


def write_json(path, record):
    """Write a record, replacing the file as a whole."""
    with data.replacing(path, force=True) as partial:
        partial.write_text(json.dumps(record, indent=1) + "\n")


def reserve(path, network):
    """Fail here where the disk is full: HDF5 crashes the process when it closes a file that it could not write."""
    size = sum(4096 + 8 * math.prod(variable.shape) for variable in network.variables)
    with open(path, "wb") as file:
        file.write(bytes(size))
        file.flush()
        os.fsync(file.fileno())


def add_to_record(path, **values):
    """Add values to the record beside the weights."""
    write_json(record_file(path), read_record(path) | values)


def read_record(path):
    """The record beside the weights, or a DataError that says what is wrong with it."""
    file = record_file(path)
    if not weight_file(path).is_file():
        raise DataError(f"--weight_path: {weight_file(path)} does not exist.")
    if not file.is_file():
        raise DataError(f"--weight_path: {file}, the record that belongs to the weights, does not exist.")
    try:
        record = json.loads(file.read_text())
        known = record["format"] == FORMAT and record["network"] and record["normalisation"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"--weight_path: {file} is not a record of weights: {error!r}.") from error
    if not known:
        raise DataError(f"--weight_path: {file} must have the format '{FORMAT}'. Received: {record['format']!r}")
    return record


def load_network(path, precision="float32"):
    """Network and record of `--weight_path`; the network is built from the record and only numbers are loaded.

    Raises
    ------
    DataError
        Where a file is missing or broken, or the weights belong to another architecture.
    """
    record = read_record(path)
    try:
        network = unet.from_settings(record["network"], precision=precision)
    except (TypeError, ValueError) as error:
        raise DataError(f"--weight_path: {record_file(path)} describes no network of this suite: {error}") from error
    try:
        network.load_weights(weight_file(path))
    except Exception as error:  # h5py and Keras have a dozen kinds for a broken or foreign file
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"--weight_path: {weight_file(path)} is broken, or holds weights of another architecture: {first}"
        ) from error
    return network, record


# -- prediction -------------------------------------------------------------------------------------------------


def section_predictor(
    network,
    normalisation,
    settings,
    *,
    engine="keras",
    precision="float32",
    tile=None,
    overlap=None,
    tta="none",
    batch=1,
    log=None,
):
    """A function from a raw section (H, W) of any size to its interior probability (H, W), float32.

    Parameters
    ----------
    network : keras.Model
    normalisation : data.Normalisation
        Of the TRAINING sections.
    settings : dict
        The network's settings, for its receptive field.
    engine, precision : str
        What computes, and for OpenVINO in which numbers; see `engines.forward`.
    tile, overlap : int, optional
        Largest side of the network's input, and context on each side of a tile, in px.
    tta : str
        A name in `tiling.TRANSFORMS`.
    batch : int
        Tiles per call.
    log : callable, optional
        Told once per shape of section how it is tiled.
    """
    predict_windows = windows_predictor(network, normalisation, engine, precision)
    choose = chooser(unet.field_of(network), tile, overlap, log)
    return lambda section: tiling.predict_section(section, predict_windows, choose(section.shape), tta=tta, batch=batch)


def windows_predictor(network, normalisation, engine, precision):
    """A function from raw windows (B, h, w) to their interior probability."""
    forward = engines.forward(network, engine, precision)
    return lambda windows: forward(normalisation(windows))


def predictor_of(network, record, **how):
    """`section_predictor` of a network and its record."""
    return section_predictor(network, data.Normalisation.from_dict(record["normalisation"]), record["network"], **how)


def mean_of(predictors):
    """The ensemble: the mean of several predictors' probabilities, each section normalised as each was trained."""

    def predict(section):
        total = predictors[0](section)
        for other in predictors[1:]:
            total = total + other(section)
        return total / len(predictors)

    return predictors[0] if len(predictors) == 1 else predict


def segmentation_of(members):
    """The first member's record, with the mean of the thresholds that were chosen for them."""
    records = [record for _, record in members]
    thresholds = [record["threshold"] for record in records if "threshold" in record]
    return records[0] | ({"threshold": sum(thresholds) / len(thresholds)} if thresholds else {})


def chooser(field, tile, overlap, log=None):
    """A function from the shape of a section to its `tiling.Grid`; `log` is told once per shape."""

    @functools.cache
    def choose(shape):
        largest = tiling.MAX_TILE - (tiling.MAX_TILE - field.remainder) % field.multiple
        sides = {"multiple": field.multiple, "remainder": field.remainder, "shrink": field.shrink}
        grid = tiling.choose(shape, field.radius, max_tile=tile or largest, halo=overlap, **sides)
        if log:
            log(f"sections of {shape[0]} x {shape[1]} px: {grid.words}")
        return grid

    return choose


def load_windows_predictor(weights, precision, engine):
    """For a worker of `blocks`: `windows_predictor` of weights."""
    network, record = load_network(weights, precision)
    return windows_predictor(network, data.Normalisation.from_dict(record["normalisation"]), engine, precision)


def run_chunked(args, precision, engine, say):
    """`predict` to OME-Zarr: the workers load the network, so this process does not."""
    from predict import blocks

    if len(args.weight_path) > 1:
        raise DataError(f"--weight_path must be one for an --output of .zarr. Received: {len(args.weight_path)}")
    (weights,) = args.weight_path
    record = read_record(weights)
    blocks.run(
        args,
        data.resolve(args.image_path, "test", log=say),
        load=load_windows_predictor,
        weights=weight_file(weights),
        how={"precision": precision, "engine": engine},
        settings={key: record[key] for key in ("network", "normalisation")},
        choose=chooser(unet.field_from_settings(record["network"]), args.tile, args.overlap),
        log=say,
    )
    say(f"{args.output}: 1 = interior")
    return 0


def run(args):
    """The `predict` verb; returns the exit code."""

    def say(words):
        print(words, file=sys.stderr, flush=True)

    engine = engines.choose(args.engine)
    precision = device.choose_precision(args.precision, engine)
    say(f"{device.describe(precision)}; engine: {engine}")
    if args.output.endswith(".zarr"):
        return run_chunked(args, precision, engine, say)
    if args.resume or args.scheduler or args.workers is not None:
        raise DataError(f"--resume, --scheduler and --workers go with an --output of .zarr. Received: {args.output}")
    members = [load_network(path, precision) for path in args.weight_path]
    source = data.resolve(args.image_path, "test", log=say)
    with data.iter_sections(source) as sections:
        count, (height, width) = len(sections), sections.shape[1:]
        names = ", ".join(
            f"{member.name} of {path}" for (member, _), path in zip(members, args.weight_path, strict=True)
        )
        say(f"{args.image_path}: {count} sections of {height} x {width} px; {names}")
        how = {"engine": engine, "precision": precision, "tile": args.tile, "overlap": args.overlap}
        how |= {"tta": args.tta, "batch": args.batch_size, "log": say}
        predict = mean_of([predictor_of(*member, **how) for member in members])
        predictions = tiling.ahead(tiling.predict_stack(sections, predict))  # the next one, while one is written
        finished = reported(predictions, count)
        write(args, finished, count, (height, width), sections.voxel_nm, segmentation_of(members))
    say(f"{args.output}: {count} sections, {'one number per cell' if args.segment else '1 = interior'}")
    return 0


def write(args, finished, count, shape, voxel_nm, record):
    """Write probabilities, or with --threshold a 0/255 mask, or with --segment labels."""
    place = {"count": count, "shape": shape, "voxel_nm": voxel_nm, "force": args.force}
    if args.segment:
        how = record if args.threshold is None else record | {"threshold": args.threshold}
        labels = segment_stack(finished, how)
        smallest = how.get("smallest_cell_px", SMALLEST_CELL_PX)
        few = shape[0] * shape[1] // (smallest + 1) < 2**16  # no more cells than that fit into a section
        data.write_mask(args.output, labels, dtype="uint16" if few else "uint32", **place)
    elif args.threshold is not None:
        data.write_mask(args.output, (section > args.threshold for section in finished), **place)
    else:
        data.write_prediction(args.output, finished, **place)


def segment_stack(sections, record):
    """Labels of each section: neurites that fill it, or where the record has a background, cells on it."""
    from score import segments

    background = record.get("background")
    options = {"min_size": record.get("smallest_cell_px", SMALLEST_CELL_PX), "background": background}
    for section in sections:
        yield segments.segment(section, record.get("threshold", 0.5), lines=background is None, **options)


def reported(predictions, count):
    """Pass predictions on, and count them on a terminal."""
    for i, prediction in enumerate(predictions, 1):
        if sys.stderr.isatty():
            print(f"\rsection {i}/{count}", end="\n" if i == count else "", file=sys.stderr, flush=True)
        yield prediction
