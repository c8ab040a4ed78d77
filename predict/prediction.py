"""Weights in and out, and the `predict` verb: a stack of any size to a TIFF, one section at a time."""

import contextlib
import json
import math
import os
from pathlib import Path
from urllib.parse import quote

import numpy as np

import data
from data import DataError, Normalisation
from files import atomic, rois
from files.ahead import ahead
from files.sections import is_voxel, memory_words, require_memory, size_words
from files.shell import say
from files.writing import rows_of
from network import device, outline, startup, unet
from predict import blocks, borders, engines, intensity, rescale, tiling

FORMAT = "dilated-unet weights 1"
SUFFIX = ".weights.h5"
HASHED_PX = 2**34  # most pixels of a stack that is read from end to end before it is predicted in blocks
LARGE_PX = 2**26  # of a section: from there on it is read in parts, and no second one is predicted ahead
MERGE_BYTES = 130  # a pixel, to judge borders by the neighbouring sections, too; measured on ISBI-2012, tiled
SAID_BYTES = 2**30  # of memory: less is nothing to speak of
SMALLEST_CELL_PX = 9  # of a seed for `--segment`; smaller ones are specks
SEEN = ("train", "inner")  # parts of a split that a network has seen
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


def borders_file(path):
    """What was learned of false borders: weights/x.weights -> weights/x.borders.npz."""
    file = record_file(path)
    return file.with_name(file.name.removesuffix(".json") + borders.SUFFIX)


def save_weights(network, path, record):
    """Write the weights and their record, both whole before either is moved to its place."""
    with atomic.replacing(weight_file(path), record_file(path), force=True) as (weights, beside):
        reserve(weights, network)
        network.save_weights(weights)
        beside.write_text(json.dumps({"format": FORMAT} | record, indent=1) + "\n")


def reserve(path, network):
    """Fail here where the disk is full: HDF5 crashes the process when it closes a file that it could not write."""
    size = sum(4096 + 8 * math.prod(variable.shape) for variable in network.variables)
    with open(path, "wb") as file:
        file.write(bytes(size))
        file.flush()
        os.fsync(file.fileno())


def _whole(least, most):
    return lambda value: type(value) is int and least <= value <= most


def _number(least, most):
    return lambda value: type(value) in (int, float) and least <= value <= most


def _list_of(rule, most):
    return lambda value: type(value) is list and 0 < len(value) <= most and all(map(rule, value))


def _flag(value):
    return type(value) in (bool, int) and value in (0, 1)


def _dropout(value):
    return _number(0, 1)(value) and (value == 0 or 1 / 512 < value < 1)  # as `network.layers.Dropout` has it


# What a record must hold of each architecture, and the rule of each value: without `dilate` another network were built.
SETTINGS = {
    "unet2017": {
        **{"filters": _list_of(_whole(1, 2**14), 10), "dilate": _flag, "dilate_rate": _whole(1, 2**10)},
        **{"addition": _flag, "classes": _whole(2, 256), "dropout": _dropout},
    },
    "resunet": {"filters": _list_of(_whole(1, 2**14), 10), "classes": _whole(2, 256), "dropout": _dropout},
    "unet2015": {"filters": _whole(1, 2**14), "levels": _whole(1, 8), "padding": ("same", "valid").__contains__},
}
EITHER = {"arch": SETTINGS.__contains__, "bn_momentum": _number(0, 0.9999)}
OPTIONAL = {
    "resunet": EITHER,
    "unet2017": EITHER | {"centre_dilations": _list_of(_whole(1, 2**10), 32)},
    "unet2015": EITHER | {"batch_norm": _flag, "classes": _whole(2, 256), "dropout": _dropout},
}
OTHERS = {
    "threshold": _number(0, 1),
    "background": lambda value: value is None or _number(0, 1)(value),
    "smallest_cell_px": _whole(0, 2**31),
    "intensity": intensity.is_record,
    "data": lambda value: type(value) is dict and is_voxel(value.get("voxel_nm")),
    "merge": lambda value: (
        type(value) is dict and _number(0, 1)(value.get("threshold")) and value.get("tta") in (*tiling.TRANSFORMS,)
    ),
}


def read_record(path):
    """The record beside the weights, or a DataError that says what is wrong with it."""
    file, weights = record_file(path), weight_file(path)
    if not weights.is_file():
        raise DataError(f"--weight_path: {weights} does not exist.")
    if not file.is_file():
        raise DataError(f"--weight_path: {file}, the record that belongs to the weights, does not exist.")
    record = atomic.read_json(file, "--weight_path")
    if record.get("format") != FORMAT:
        found = f"Received: {record.get('format')!r:.60}"
        raise DataError(f"--weight_path: {file} must have the format '{FORMAT}'. {found}")
    settings = record.get("network")
    arch = settings.get("arch", "unet2017") if isinstance(settings, dict) else None
    rules = SETTINGS.get(arch) if isinstance(arch, str) else None
    if rules is None:
        raise DataError(f"--weight_path: {file} describes no network of this suite. Received: {settings!r:.60}")
    _check(file, "network", settings, rules | OPTIONAL[arch], rules | settings)
    _check(file, "record", record, OTHERS, OTHERS.keys() & record)
    widest = settings["filters"] * 2 ** settings["levels"] if arch == "unet2015" else max(settings["filters"])
    if 36 * widest**2 > (size := weights.stat().st_size):  # 3 x 3 float32 numbers for each pair of filters
        words = f"is broken, or holds weights of another architecture: {size} bytes for {widest} filters"
        raise DataError(f"--weight_path: {weights} {words}")
    try:
        Normalisation.from_dict(record.get("normalisation"))
    except DataError as error:
        raise DataError(f"--weight_path: {file}: {error!s:.200}") from error
    return record


def _check(file, what, values, rules, keys):
    """Refuse a key that has no rule, and a value that is missing or breaks its rule."""
    for key in keys:
        if key not in rules:
            raise DataError(f"--weight_path: {file} describes no network of this suite. Received: {key}")
        if key not in values:
            raise DataError(f"--weight_path: {file} lacks {key} of the {what}.")
        if not rules[key](values[key]):
            found = f"Received: {values[key]!r:.60}"
            raise DataError(f"--weight_path: {file} must hold a valid {key} of the {what}. {found}")


def part_of(record, name, kind=dict):
    """What a record says, if it is of the kind that `train` writes, else an empty one; old records lack some."""
    return record[name] if isinstance(record.get(name), kind) else kind()


def sections_seen(record):
    """Sections that a network, and those that it started from, were trained on or chosen by: {pixels' hash: list}."""
    split, of, start = (part_of(record, key) for key in ("split", "data", "init_from"))
    found = [*part_of(start, "trained_on").items(), *((of.get("image_sha256"), split.get(key)) for key in SEEN)]
    seen = {}
    for pixels, sections in found:
        if isinstance(pixels, str) and isinstance(sections, list):
            seen.setdefault(pixels, set()).update(i for i in sections if isinstance(i, int))
    return {pixels: sorted(sections) for pixels, sections in seen.items() if sections}


def trained_on(records, pixels):
    """What a prediction tells `evaluate` of the sections, of a stack of that hash, that trained its networks."""
    seen = {i for record in records for i in sections_seen(record).get(pixels, ())}
    if seen:
        which = data.format_sections(seen)
        say(f"sections {which} of these trained the network: a score of them says nothing about new sections")
    return {"trained_on": which} if seen else {}


def load_network(path, precision="float32", engine="keras"):
    """Network and record of `--weight_path`, or a DataError; built from the record, and only numbers are loaded.

    For the `engine` OpenVINO it is one of `outline`, unless Keras knows a layer that `outline` or OpenVINO does not.
    """
    record, file = read_record(path), weight_file(path)
    network = made_without_keras(record["network"]) if engines.choose(engine) == "openvino" else None
    if network is None:
        network = unet.from_settings(record["network"], precision=precision)
    try:
        network.load_weights(file)
    except Exception as error:  # h5py and Keras have a dozen kinds for a broken or foreign file
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        words = f"is broken, or holds weights of another architecture: {first}"
        raise DataError(f"--weight_path: {file} {words}") from error
    for variable in network.weights:
        if not np.isfinite(np.asarray(variable, np.float32)).all():
            raise DataError(f"--weight_path: {file} holds NaN or infinite numbers, in {variable.path}.")
    return network, record


def made_without_keras(settings):
    """The network that a record describes, of `outline`; or None if somebody has added a layer that is not told."""
    with contextlib.suppress(AttributeError):
        network = unet.from_settings(settings, kinds=outline)
        if engines.tells(network):
            return network
    startup.load_backend()
    return None


# -- prediction -------------------------------------------------------------------------------------------------


def section_predictor(
    network,
    normalisation,
    *,
    engine="keras",
    precision="float32",
    tile=None,
    overlap=None,
    tta="none",
    batch=1,
    by_rows=False,
):
    """A function from a raw section (H, W) of any size to its interior probability (H, W), float32.

    `normalisation` is that of the TRAINING sections; `engine` and `precision` as in `engines.forward`; `tile`, the
    largest side of the network's input, and `overlap`, the context around a tile, in px, as in `tiling.choose`; `tta`
    is a name in `tiling.TRANSFORMS`; `batch` counts the tiles of a call; `by_rows`, the probability comes as some rows
    after the other.
    """
    forward, field = windows_predictor(network, normalisation, engine, precision), unet.field_of(network)
    predicted = tiling.predict_rows if by_rows else tiling.predict_section

    def predict(section):
        grid = tiling.choose(section.shape, field, max_tile=tile, halo=overlap)
        return predicted(section, forward, grid, tta=tta, batch=batch)

    return predict


def windows_predictor(network, normalisation, engine, precision):
    """A function from raw windows (B, h, w) to their interior probability."""
    forward = engines.forward(network, engine, precision)
    return lambda windows: forward(normalisation(windows))


def mean_of(predictors):
    """The ensemble: the mean of several predictors' probabilities, each section normalised as each was trained."""
    if len(predictors) == 1:
        return predictors[0]

    def predict(section):
        total = predictors[0](section)
        for other in predictors[1:]:
            total += other(section)
        total /= len(predictors)
        return total

    return predict


def segmentation_of(records):
    """The first record, with the means of what was chosen for the networks, in whatever order they are named."""
    found = {key: [record[key] for record in records if record.get(key) is not None] for key in SEGMENTATION}
    means = {key: sum(values) / len(values) for key, values in found.items() if values}
    means |= {"smallest_cell_px": round(means["smallest_cell_px"])} if "smallest_cell_px" in means else {}
    return records[0] | {key: mean for key, mean in means.items() if key == "threshold" or key in records[0]}


def at_size(record, shape, seen):
    """A record whose smallest cell is in pixels of sections of `shape`, which the network sees at the size `seen`."""
    smallest = record.get("smallest_cell_px")
    if smallest is None or tuple(shape) == tuple(seen):
        return record
    return record | {"smallest_cell_px": max(1, round(smallest * math.prod(shape) / math.prod(seen)))}


def load_windows_predictor(weights, precision, engine, normalisation):
    """For a worker of `blocks`: `windows_predictor` of weights; `normalisation` as JSON."""
    startup.prepare(None, engine=engine)
    network, _ = load_network(weights, precision, engine)
    return windows_predictor(network, Normalisation.from_dict(json.loads(normalisation)), engine, precision)


# -- the verb ---------------------------------------------------------------------------------------------------


def run(args):
    """The `predict` verb; returns the exit code."""
    in_blocks = check_output(args)
    engine = engines.choose(args.engine)
    begun = blocks.precision_of(args.output) if in_blocks and args.resume and args.precision == "auto" else None
    precision = begun or device.choose_precision(args.precision, engine)
    say(f"{device.describe(precision, engine)}; engine: {engine}")
    records = [read_record(path) for path in args.weight_path]
    if args.segment and len({"background" in record for record in records}) > 1:
        raise DataError("--segment takes networks that were all trained with --instances, or all without it.")
    source = data.resolve(args.image_path, "test", log=say)
    if in_blocks and isinstance(source, data.Stack):
        raise DataError(f"--image_path must be a file or folder, which workers can read. Received: {args.image_path}")
    used = [file(path) for path in args.weight_path for file in (weight_file, record_file, borders_file)]
    for flag, output in (("--output", args.output), ("--rois", args.rois)):
        if output:
            atomic.refuse_inputs(flag, output, source, *used)
    with data.iter_sections(source, channel=args.channel) as sections:
        pixels, remarks = intensity.sample(sections), {}  # what several networks remark is said once
        norms = [intensity.normalisation_for(pixels, one, args.normalise, remarks.setdefault) for one in records]
        for words in remarks:
            say(words)
        sizes = rescale.seen_sizes(sections, records, args.rescale, say)
        mergers = mergers_of(args, records, in_blocks, sections.shape)
        how = {"engine": args.engine, "precision": precision}
        if in_blocks:
            run_blocks(args, sections, records[0], norms[0], how)
        else:
            run_sections(args, sections, records, norms, sizes, how, mergers)
    return 0


def mergers_of(args, records, in_blocks, shape):
    """What the networks know of false borders, if that is asked for, or can be used for --segment; else nothing.

    Sets `args.merge` where it was not given, and `args.tta` to that with which the borders were learned.
    """
    missing = [file for file in map(borders_file, args.weight_path) if not file.is_file()]
    missing += [record_file(path) for path, one in zip(args.weight_path, records, strict=True) if "merge" not in one]
    learned = sorted({one["merge"]["tta"] for one in records if "merge" in one})
    large, most = math.prod(shape[1:]) > LARGE_PX, f"{LARGE_PX} px"
    ttas, lost, apart = ", ".join(learned), missing and missing[0], "the networks learned them with different --tta"
    obstacles = (  # whether it is so; the rule, and what was received; why --segment leaves false borders in
        (lost, "needs weights that were trained with --merge 1", lost, f"{lost} is missing, or says nothing of them"),
        (in_blocks, "goes with a TIFF --output", args.output, "the output has blocks"),
        (args.rescale, "goes without --rescale", "both", "with --rescale they cannot be judged"),
        (len(learned) > 1, "takes networks that learned it with one --tta", ttas, f"{apart} ({ttas})"),
        (large, f"takes sections of at most {most}", size_words(shape), f"a section has more than {most}"),
    )
    rule, received, why = next((words for so, *words in obstacles if so), (None, None, None))
    if args.merge is None:
        args.merge = int(args.segment and not rule)
        if args.segment and learned and rule:
            say(f"--merge 0: false borders stay, for {why}")
    if not args.merge:
        return []
    if rule:
        raise DataError(f"--merge {rule}. Received: {received}")
    if args.tta not in learned:
        say(f"--merge: with --tta {learned[0]}, with which its borders were learned")
        args.tta = learned[0]
    return [borders.load(borders_file(path)) for path in args.weight_path]


def check_output(args):
    """Whether the output is OME-Zarr; refuse flags that contradict that or each other."""
    in_blocks, count = args.output.lower().endswith(".zarr"), len(args.weight_path)
    of_blocks = args.resume or args.scheduler or args.workers is not None
    masks = args.threshold is not None or args.segment
    contradictions = (
        (of_blocks and not in_blocks, "--resume, --scheduler and --workers go with an --output of .zarr", args.output),
        (masks and in_blocks, "--threshold and --segment go with a TIFF --output", args.output),
        (args.rois and not args.segment, "--rois goes with --segment", args.rois),
        (args.rescale and in_blocks, "--rescale goes with a TIFF --output", args.output),
        (count > 1 and in_blocks, "--weight_path must be one for an --output of .zarr", count),
        (args.resume and args.force, "--resume goes on with a prediction, --force replaces it: choose one", "both"),
        (args.scheduler and args.workers is not None, "--workers is of no use with --scheduler", args.workers),
    )
    for wrong, words, received in contradictions:
        if wrong:
            raise DataError(f"{words}. Received: {received}")
    if args.rois:
        rois.require()
    return in_blocks


def run_blocks(args, sections, record, norm, how):
    """`predict` to OME-Zarr: the workers load the network, so this process does not."""
    (weights,) = args.weight_path
    settings = {"network": record["network"], "normalisation": norm.to_dict(), "engine": engines.choose(how["engine"])}
    if math.prod(sections.shape) <= HASHED_PX:
        settings[blocks.PIXELS] = data.sha256_pixels(sections)
        settings |= trained_on([record], settings[blocks.PIXELS])
    how |= {"normalisation": json.dumps(norm.to_dict())}
    about = {"weights": weight_file(weights), "how": how, "settings": settings, "log": say}
    blocks.run(args, sections, unet.field_from_settings(record["network"]), load=load_windows_predictor, **about)
    say(f"{args.output}: 1 = interior")


def run_sections(args, sections, records, norms, sizes, how, mergers=()):
    """`predict` to TIFF, section by section; large ones by rows of tiles, if that is possible."""
    networks = [load_network(path, how["precision"], how["engine"])[0] for path in args.weight_path]
    names = ", ".join(f"{network.name} of {path}" for network, path in zip(networks, args.weight_path, strict=True))
    say(f"{args.image_path}: {len(sections)} sections of {size_words(sections.shape)} px; {names}")
    for field, size in {(unet.field_of(network), size) for network, size in zip(networks, sizes, strict=True)}:
        grid = tiling.choose(size, field, max_tile=args.tile, halo=args.overlap)
        say(f"sections of {size_words(size)} px: {grid.words}")
    large = math.prod(sections.shape[1:]) > LARGE_PX
    by_rows = large and args.tta == "none" and not (args.segment or args.rescale or len(networks) > 1)
    how |= {"tile": args.tile, "overlap": args.overlap, "tta": args.tta, "batch": args.batch_size, "by_rows": by_rows}
    predictors = (section_predictor(*one, **how) for one in zip(networks, norms, strict=True))
    predict = mean_of([rescale.seen_at(*one) for one in zip(sizes, predictors, strict=True)])
    if mergers:
        records = [record | {"threshold": record["merge"]["threshold"]} for record in records]
    if large or args.merge:
        say_memory(args, sections, grid.tile[0] if by_rows else sections.shape[1])
    weights = ",".join(quote(weight_file(path).name) for path in args.weight_path)
    made_of = {"pixels_sha256": data.sha256_pixels(sections), "weights": weights, "normalise": args.normalise}
    made_of |= ({"merged": 1} if mergers else {}) | trained_on(records, made_of["pixels_sha256"])
    made_of |= {"rescaled": ",".join("{}x{}".format(*size) for size in sizes)} if args.rescale else {}
    about = {"count": len(sections), "shape": sections.shape[1:], "voxel_nm": sections.voxel_nm, "made_of": made_of}
    with contextlib.ExitStack() as threads:  # they end here, also after Ctrl-C, and not when Python's modules are gone
        if large:
            predictions = (predict(Unread(sections, index)) for index in range(len(sections)))
        else:  # the next section is read while one is predicted, and predicted while one is written
            read = threads.enter_context(contextlib.closing(ahead(sections)))
            cuts = (borders.cut(predict(section), section) for section in read) if mergers else ()
            predicted = borders.maps(cuts, mergers) if mergers else map(predict, read)
            predictions = threads.enter_context(contextlib.closing(ahead(predicted)))
        records = [at_size(record, about["shape"], size) for record, size in zip(records, sizes, strict=True)]
        write(args, tiling.counted(predictions, "section", len(sections)), segmentation_of(records), **about)
    say(f"{args.output}: {len(sections)} sections, {'one number per cell' if args.segment else '1 = interior'}")


def say_memory(args, sections, rows):
    """Say what so many rows of a section take, if it is large or that is much, and refuse what does not fit."""
    bytes_per_px = 4 * min(2, len(args.weight_path)) + 40 * args.segment + MERGE_BYTES * args.merge
    bytes_per_px += sections.dtype.itemsize if args.tta != "none" else 0
    bytes_per_px += 12 * args.rescale
    needed = bytes_per_px * rows * sections.shape[2]
    require_memory(needed, f"--image_path: the prediction of a section of {size_words(sections.shape)} px")
    if needed > SAID_BYTES or math.prod(sections.shape[1:]) > LARGE_PX:
        say(f"each section takes about {memory_words(needed)} of memory, and the network its own")


class Unread:
    """A section of a file as an array of which only what is asked for is read."""

    def __init__(self, sections, index):
        self.sections, self.index, self.shape = sections, index, sections.shape[1:]

    def __getitem__(self, part):
        return self.sections.part(self.index, *part)


def write(args, finished, record, **about):
    """Write probabilities, or with --threshold a 0/255 mask, or with --segment labels."""
    about |= {"force": args.force}
    if args.segment:
        how = record if args.threshold is None else record | {"threshold": args.threshold}
        smallest = how.get("smallest_cell_px", SMALLEST_CELL_PX)
        few = math.prod(about["shape"]) // (smallest + 1) < 2**16  # no more cells than that fit into a section
        about["dtype"] = "uint16" if few else "uint32"
        with rois.writing(args.rois, force=args.force) if args.rois else contextlib.nullcontext(lambda x, _: x) as add:
            labels = (add(section, index) for index, section in enumerate(segment_stack(finished, how)))
            data.write_mask(args.output, labels, **about)
    elif args.threshold is not None:
        above = ((rows > args.threshold for rows in rows_of(section)) for section in finished)
        data.write_mask(args.output, above, **about)
    else:
        data.write_prediction(args.output, finished, **about)


def segment_stack(sections, record):
    """Labels of each section: neurites that fill it, or where the record has a background, cells on it."""
    from score import segments

    threshold, background = record.get("threshold", 0.5), record.get("background")
    if background is not None:
        background = min(background, threshold)  # a --threshold below it finds fainter cells
    options = {"min_size": record.get("smallest_cell_px", SMALLEST_CELL_PX), "background": background}
    for section in sections:
        yield segments.segment(section, threshold, lines=background is None, **options)
