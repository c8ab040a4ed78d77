"""The `export` verb: a trained network for other programs, as a bioimage.io package, ONNX or TorchScript."""

import importlib.util
import json
import re
import shlex
import tempfile
import zipfile
from functools import partial
from pathlib import Path

import numpy as np

import data
from data import DataError, Normalisation
from files import atomic
from files.flags import channel, file
from files.sections import reflect
from files.shell import say
from network.field import field_of
from predict import intensity, prediction, tiling, twins
from predict.prediction import part_of

EXTRA = "-r requirements-export.txt"
FORMATS = {  # ending, what to install, modules that write it
    "bioimageio": (".zip", EXTRA, "onnx", "bioimageio.spec"),
    "onnx": (".onnx", EXTRA, "onnx"),
    "torchscript": (".pt", "torch", "torch"),
}
PACKAGE_FLAGS = ("image_path", "name", "author", "license")
SPEC = "0.5.9"  # what ilastik's reader knows (tiktorch 26.3: bioimageio.core 0.10.2); newer ones read it too
LEAST_STD = 1e-6  # of the package's normalisation
SEEN_PX, COVER_PX = 128, 384  # sides: what the test section shows beside its rim; at most in the cover
UNET = {"text": "Ronneberger, Fischer, Brox: U-Net, 2015", "doi": "10.1007/978-3-319-24574-4_28"}
CELLS = {
    "name": "Cell Tracking Challenge",
    "description": "Time-lapse sequences of cells, with labels.",
    "source": "http://celltrackingchallenge.net/2d-datasets/",
    "cite": [{"text": "Ulman et al. 2017", "doi": "10.1038/nmeth.4473"}],
}
TRAINING_DATA = {
    "isbi2012": {
        "name": "ISBI-2012 EM segmentation challenge",
        "description": "30 sections of the ventral nerve cord of a Drosophila larva. They may be used for generating "
        "or testing non-commercial segmentation software.",
        "source": "https://imagej.net/events/isbi-2012-segmentation-challenge",
        "cite": [
            {"text": "Arganda-Carreras et al. 2015", "doi": "10.3389/fnana.2015.00142"},
            {"text": "Cardona et al. 2010", "doi": "10.1371/journal.pbio.1000502"},
        ],
    },
    "dic-hela": CELLS,
    "phc-u373": CELLS,
}


def add_arguments(parser, shipped):
    """Declare the flags; `shipped` are the weights that come with the suite."""
    files = parser.add_argument_group("files").add_argument
    known = f"weights, their record beside them (default: the shipped network, weights/{shipped.name})"
    files("--weight_path", help=known, type=file, default=str(shipped), metavar="FILE")
    output = {"type": partial(file, endings=tuple(kind[0] for kind in FORMATS.values())), "required": True}
    files("--output", help="bioimage.io package, ONNX or TorchScript", metavar="FILE.zip|.onnx|.pt", **output)
    files("--format", help="default: by the ending of --output", choices=tuple(FORMATS))
    files("--force", help="replace an existing output", action="store_true")
    says = parser.add_argument_group("what the package says").add_argument
    section = "stack whose middle is its test section and cover (default: a painted one, nothing of yours)"
    says("--image_path", help=section, metavar="PATH")
    says("--channel", help="channel of --image_path, from 0, where it has several", type=channel)
    says("--name", help="of the network (default: that of the weights)")
    says("--author", help="one or several, in quotes", nargs="+", metavar="NAME")
    says("--license", help="SPDX identifier such as CC-BY-4.0 (default: none; of the shipped network MIT)")


# -- what can be refused before Keras is loaded -------------------------------------------------------------------


def check(args):
    """Fill in the format by the output's ending; refuse what cannot be written."""
    endings = {ending: name for name, (ending, *_) in FORMATS.items()}
    args.format = args.format or endings[Path(args.output).suffix.lower()]
    ending, install, *modules = FORMATS[args.format]
    if not args.output.lower().endswith(ending):
        raise DataError(f"--output of --format {args.format} must end in {ending}. Received: {args.output}")
    given = [f"--{name}" for name in PACKAGE_FLAGS if getattr(args, name)]
    if given and args.format != "bioimageio":
        raise DataError(f"{given[0]} goes with --format bioimageio. Received: {args.format}")
    for module in modules:
        _require(args.format, module, install)
    _check_words(args)
    atomic.refuse_inputs("--output", args.output, args.image_path)
    if not args.force:
        atomic.refuse_existing(args.output)


def _require(format, module, install):
    """Import what writes a format, or say how to install it; bioimageio.spec stumbles over a newer pydantic."""
    try:
        importlib.import_module(module)
    except Exception as error:
        why = "is not installed" if isinstance(error, ModuleNotFoundError) else f"cannot be loaded ({error!s:.100})"
        advice = "" if isinstance(error, RuntimeError) else f": pip install {install}"  # such as no home folder
        raise DataError(f"--format {format} needs {module}, which {why}{advice}") from error


def _check_words(args):
    rules = (
        ("--name", args.name, r"[A-Za-z0-9_+\-() ]{5,128}", "5 to 128 letters, digits, spaces or _+-()"),
        *(("--author", author, r"[^/\\]*\w[^/\\]*", "a name, without slashes") for author in args.author or ()),
    )
    for flag, value, pattern, rule in rules:
        if value is not None and not re.fullmatch(pattern, value):
            raise DataError(f"{flag} must be {rule}. Received: {value}")
    if args.license is not None:
        from bioimageio.spec.generic.v0_3 import LicenseId

        try:
            LicenseId(args.license)
        except ValueError as error:
            rule = "an SPDX identifier such as MIT or CC-BY-4.0"
            raise DataError(f"--license must be {rule}. Received: {args.license}") from error


# -- the verb ---------------------------------------------------------------------------------------------------


def run(args):
    """The `export` verb; returns the exit code."""
    files = (prediction.weight_file(args.weight_path), prediction.record_file(args.weight_path))
    atomic.refuse_inputs("--output", args.output, *files)
    network, record = prediction.load_network(args.weight_path)
    norm, sizes = Normalisation.from_dict(record["normalisation"]), _sizes(field_of(network))
    with atomic.replacing(args.output, force=args.force) as partial:
        if args.format == "onnx":
            twins.write_onnx(network, partial, {"mean": norm.mean, "std": norm.std, **sizes})
        elif args.format == "torchscript":
            twins.write_torchscript(network, partial, sizes["min"])
        else:
            _write_package(args, network, record, sizes, partial)
    if args.format != "bioimageio":
        say(f"{args.output} takes (gray value - {norm.mean:.6g}) / {norm.std:.6g}, batch x 1 x rows x columns")
    sides = f"a side of {sizes['min']} px or more, in steps of {sizes['step']}"
    say(f"{args.output}: {sides}; of tiles {sizes['halo']} px a side are to be cut off; 1 = interior")
    return 0


def _sizes(field):
    """Smallest side of a tile and its steps, what the output lacks and what is to be cut off, px a side."""
    halo = tiling.choose((10**5, 10**5), field).halo - field.shrink
    (least,) = field.valid_sizes(at_least=2 * (halo + field.shrink) + field.multiple, count=1)
    return {"min": least, "step": field.multiple, "shrink": field.shrink, "halo": halo}


# -- the package ------------------------------------------------------------------------------------------------


def _write_package(args, network, record, sizes, path):
    from bioimageio.spec import InvalidDescr, load_description
    from loguru import logger
    from ruyaml import YAML

    logger.disable("bioimageio")
    if (std := record["normalisation"]["std"]) < LEAST_STD:
        raise DataError(f"--format bioimageio needs a standard deviation of at least 1e-6. Received: {std}")
    beside = {"dir": path.parent, "prefix": f"{path.name[:60]}-"}  # on the disk that has to hold it
    with tempfile.TemporaryDirectory(**beside) as folder, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as package:
        folder = Path(folder)
        _write_tensors(args, network, record, sizes, folder)
        weights = _write_weights(network, sizes, folder)
        content = _description(args, network, record, sizes) | {"weights": weights}
        for entry in (*weights.values(), *(content[ends][0]["test_tensor"] for ends in ("inputs", "outputs"))):
            entry["sha256"] = atomic.sha256(folder / entry["source"])
        (folder / "README.md").write_text(_documentation(args, record, sizes), encoding="utf-8")
        YAML().dump(json.loads(json.dumps(content)), folder / "rdf.yaml")  # without references from one part to another
        for part in sorted(folder.iterdir()):
            package.write(part, part.name)
    found = load_description(path)
    if isinstance(found, InvalidDescr):
        raise DataError(f"{args.output}: bioimageio.spec refuses the package: {found.get_reason()!s:.300}")
    test = shlex.join(["bioimageio", "test", str(args.output), "--weight-format", "all"])
    say(f"{args.output} holds {', '.join(weights)}; to test it: {test}")
    if "torchscript" not in weights:
        say("without TorchScript, which ilastik reads: pip install torch, and export again")


def _write_weights(network, sizes, folder):
    """Write the network in every format that can be written here; how the package describes them."""
    import keras

    twins.stock_twin(network).save(folder / "weights.keras")
    twins.write_onnx(network, folder / "weights.onnx", {})
    backend = keras.backend.backend()
    version = importlib.import_module(backend).__version__
    weights = {
        "keras_v3": {"source": "weights.keras", "keras_version": keras.__version__, "backend": [backend, version]},
        "onnx": {"source": "weights.onnx", "opset_version": twins.OPSET, "parent": "keras_v3"},
    }
    if importlib.util.find_spec("torch"):
        import torch

        twins.write_torchscript(network, folder / "weights.pt", sizes["min"])
        version = torch.__version__.split("+")[0]
        weights["torchscript"] = {"source": "weights.pt", "pytorch_version": version, "parent": "keras_v3"}
    return weights


def _write_tensors(args, network, record, sizes, folder):
    """A section, what Keras makes of it, and both side by side as the cover."""
    from PIL import Image

    least, step, shrink, halo = sizes.values()
    side = least + -(-(2 * (halo + shrink) + SEEN_PX - least) // step) * step
    norm = Normalisation.from_dict(record["normalisation"])
    section = _section(args, side, norm, record)
    interior = prediction.windows_predictor(network, norm, "keras", "float32")(section[None])
    np.save(folder / "test-input.npy", section[None, None].astype(np.float32))
    np.save(folder / "test-output.npy", interior[:, None])
    seen = min(side - 2 * shrink, COVER_PX)
    gray, interior = (_centre(each, seen).astype(np.float32) for each in (section, interior[0]))
    low, high = np.percentile(gray, (1, 99))
    cover = np.hstack([(gray - low) / max(high - low, 1e-6), interior])
    Image.fromarray((np.clip(cover, 0, 1) * 255).astype(np.uint8)).save(folder / "cover.png")


def _section(args, side, norm, record):
    """The middle of the middle section of a stack; without one a painted section with the training's gray values."""
    if args.image_path:
        with data.iter_sections(data.resolve(args.image_path, "test", log=say), channel=args.channel) as sections:
            parts = intensity.sample(sections, side)
        seen = intensity.normalisation_for(parts, record, "training", say)
        return _centre(parts[len(parts) // 2], side) * (norm.std / seen.std)
    painted = data.synthetic(1, (side, side))[0].sections[0].astype(np.float32)
    painted = norm.mean + norm.std * (painted - painted.mean()) / painted.std()
    dtype = np.dtype((record.get("intensity") or {"dtype": "float32"})["dtype"])
    if dtype.kind in "ui":
        painted = np.clip(np.round(painted), *(getattr(np.iinfo(dtype), end) for end in ("min", "max")))
    return painted


def _centre(section, side):
    """The centre of a section, mirrored where the section is smaller."""
    return section[np.ix_(*(reflect((n - side) // 2, (n - side) // 2 + side, n) for n in section.shape))]


def _description(args, network, record, sizes):
    """What bioimageio.yaml says, but for the weights."""
    norm, dataset, shipped = record["normalisation"], _training_data(record), bool(_card(args))
    normalise = {"id": "fixed_zero_mean_unit_variance", "kwargs": {"mean": norm["mean"], "std": norm["std"]}}
    authors = args.author or ["The dilated U-net training suite authors"] * shipped
    seen = f" Trained on {dataset['name']}." if dataset else ""
    before, after = _axes(record, sizes)
    return {
        **{"type": "model", "format_version": SPEC, "version": "1.0.0"},
        "name": args.name or re.sub(r"[^A-Za-z0-9_+\-() ]", "_", f"{network.name} {_stem(args)}")[:128],
        "description": f"Probability that a pixel lies inside a cell: 1 is interior, 0 membrane or background.{seen}",
        **{"authors": [{"name": name} for name in authors], "license": args.license or ("MIT" if shipped else None)},
        **{"documentation": "README.md", "covers": ["cover.png"]},
        "cite": [UNET, *(dataset["cite"] if dataset else ())],
        "tags": ["unet", "2d", "semantic-segmentation", "tensorflow"],
        "training_data": dataset and {"type": "dataset", "format_version": "0.3.0", **dataset},
        "inputs": [
            {"id": "section", **before, "test_tensor": {"source": "test-input.npy"}, "preprocessing": [normalise]}
        ],
        "outputs": [{"id": "interior", **after, "test_tensor": {"source": "test-output.npy"}}],
    }


def _axes(record, sizes):
    """Axes of the section and of the interior, batch x 1 x rows x columns."""
    voxel_nm = part_of(record, "data").get("voxel_nm") or (None, None, None)
    before, after = ([{"type": "batch"}, {"type": "channel", "channel_names": [name]}] for name in ("raw", "interior"))
    for name, nm in zip("yx", voxel_nm[1:], strict=True):
        axis = {"type": "space", "id": name} | ({"scale": nm / 1000, "unit": "micrometer"} if nm else {})
        before.append(axis | {"size": {"min": sizes["min"], "step": sizes["step"]}})
        size = {"tensor_id": "section", "axis_id": name, "offset": -2 * sizes["shrink"]}
        after.append(axis | {"size": size} | ({"halo": sizes["halo"]} if sizes["halo"] else {}))
    return {"axes": before}, {"axes": after}


def _training_data(record):
    """The data set of that name; what else somebody's stack is called is nobody's business."""
    return TRAINING_DATA.get(part_of(part_of(record, "data"), "images", str).removesuffix("-test"))


def _stem(args):
    return prediction.record_file(args.weight_path).stem


def _card(args):
    """The model card beside the weights, if its title names them; its links into the repository become plain words."""
    card = prediction.record_file(args.weight_path).with_name("README.md")
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    theirs = re.match(f"#[^\n]*`{re.escape(_stem(args))}`", text)
    return re.sub(r"\[([^]]*)\]\((?!http)[^)]*\)", r"\1", text) if theirs else ""


def _documentation(args, record, sizes):
    norm, split = record["normalisation"], part_of(record, "split")
    trained, held_out = (len(part_of(split, part, list)) for part in ("train", "held_out"))
    return f"""{_card(args) or f"# {_stem(args)}"}

## In this package

The input is one section: batch x 1 x rows x columns of gray values. The package itself subtracts {norm["mean"]:.6g} and
divides by {norm["std"]:.6g}, the mean and standard deviation of the training sections. The output is the probability
that a pixel lies inside a cell. Sides: {sizes["min"]} px or more, in steps of {sizes["step"]}. The output lacks
{sizes["shrink"]} px on each side. Of tiles, another {sizes["halo"]} px on each side are to be cut off.

Trained on {trained} sections; {held_out} were held out.

## Validation

Predict labelled sections that the network has not seen, and count the cells that were split or merged (V_rand and
V_info of the ISBI-2012 challenge): the suite's verb `evaluate` does so. Scores of training sections say nothing.
"""
