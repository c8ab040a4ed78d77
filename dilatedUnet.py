"""The dilated U-net training suite, from the shell:

    python dilatedUnet.py --recipe quick --image_path mine.tif --mask_path mine-labels.tif    train (the default verb)
    python dilatedUnet.py predict  --image_path mine.tif --output prediction.tif
    python dilatedUnet.py evaluate --prediction prediction.tif --mask_path labels.tif
    python dilatedUnet.py reproduce table --quick
    python dilatedUnet.py fetch isbi2012
    python dilatedUnet.py check --image_path X --mask_path Y
    python dilatedUnet.py export --output network.zip

`python dilatedUnet.py VERB --help` lists the flags of a verb.
"""

import sys

if __name__ == "__main__":  # from here on Ctrl-C ends without a traceback, also while the rest is being imported
    sys.excepthook = lambda kind, error, trace: (
        sys.exit(130) if issubclass(kind, KeyboardInterrupt) else sys.__excepthook__(kind, error, trace)
    )

import argparse
import difflib
import re
import textwrap
from functools import partial
from pathlib import Path

from files import shell
from files.atomic import DataError, read_json
from files.flags import channel, devices, file, filter_list, in_words, label_value, number, path, up_to
from files.shell import say

VERBS = {
    "train": "train a network (the default verb)",
    "predict": "predict a stack, to TIFF or OME-Zarr",
    "evaluate": "score a prediction as the ISBI-2012 challenge did",
    "reproduce": "train the published tables row by row, compare and render",
    "fetch": "download a data set into the cache",
    "check": "say what the files are, before any training",
    "export": "write a trained network for other programs: bioimage.io, ONNX, TorchScript",
}
DATA_SETS = ("isbi2012", "dic-hela", "phc-u373")
WEIGHTS = Path(__file__).resolve().parent / "weights"
SHIPPED = WEIGHTS / "isbi2012"  # what predicts, and what `finetune` goes on from
NOT_GIVEN = object()  # of a flag that a recipe may set

OWN = {  # for one's own sections
    **{"protocol": "holdout", "inner_sections": 0, "dilate": 0, "dropout": 0.1, "augment": "all", "batch_size": 4},
    **{"steps_per_epoch": 100, "optimizer": "adam", "clr_mode": "cosine", "lr": 1e-5},
}
# Named sets of defaults: destination -> value. A flag given by hand wins over them.
RECIPES = {
    "published": {
        **{"protocol": "published", "augment": "none", "window": 512, "batch_size": 3},
        **{"epochs": 500, "steps_per_epoch": 10, "optimizer": "rmsprop", "loss": "bce_dice"},
        **{"clr_mode": "triangular", "lr": 1e-5, "max_lr": 1e-2, "step_size": 2000, "patience": 300},
    },
    "quick": OWN
    | {"arch": "resunet", "window": 256, "epochs": 7, "optimizer": "muon", "max_lr": 4e-3, "ema": 0.98}
    | {"bn_momentum": 0.9, "average_warmup": 1, "tta": "8", "merge": 1},
    "cells": {
        **{"arch": "unet2015", "instances": True, "batch_norm": True, "padding": "same", "filters": (16,), "tta": "7"},
        **{"protocol": "holdout", "gap": 2, "window": 256, "batch_size": 2, "epochs": 5, "steps_per_epoch": 100},
        **{"optimizer": "adam", "clr_mode": "cosine", "lr": 1e-5, "max_lr": 2e-3},
        **{"ema": 0.98, "augment": "all", "loss": "weighted"},
    },
}
RECIPES["finetune"] = RECIPES["quick"] | {"epochs": 2, "max_lr": 2e-3, "init_from": str(SHIPPED)}
RECIPES["strong"] = RECIPES["quick"] | {"augment": "broad", "epochs": 40, "ema": 0.99}
COSTS = {
    "published": "the study of 2017, validated on its training sections. Estimated: 4 to 9 hours on 2 CPU cores",
    "quick": "for your own sections. 4 to 9 minutes on 2 CPU cores",
    "cells": "for cells that touch, as in a light microscope; the labels number them. 2 to 10 minutes on 2 CPU cores",
    "finetune": "for a few sections: goes on from a trained network. Estimated: 2 to 4 minutes on 2 CPU cores",
    "strong": "almost six times the updates of quick, and more augmentation. 20 to 70 minutes on 2 CPU cores",
}
# What depends on the network: defaults of flags that are not given.
ARCHITECTURES = {
    "unet2017": {
        **{"filters": (44, 88, 176), "dropout": 0.3, "window": 512, "augment": "none", "loss": "bce_dice"},
        **{"batch_size": 3, "optimizer": "rmsprop", "momentum": 0.0, "clr_mode": "triangular", "lr": 1e-5},
    },
    "unet2015": {
        **{"filters": (64,), "dropout": 0.5, "window": 572, "augment": "all", "loss": "weighted"},
        **{"batch_size": 1, "optimizer": "sgd", "momentum": 0.99, "clr_mode": "none", "lr": 1e-3},
    },
}
ARCHITECTURES["resunet"] = ARCHITECTURES["unet2017"] | {"filters": (16, 32, 64, 128, 128), "dropout": 0.0}
ARCHITECTURES = {name: {"dilate": 1, "dilate_rate": 1, "addition": 1} | own for name, own in ARCHITECTURES.items()}
# ... and what is filled in once no flag contradicts another: until then "not given" must be seen.
LATE = {
    **{"depth": 4, "padding": "valid", "w0": 10.0, "sigma": 5.0, "max_lr": 5e-4, "step_size": 2000},
    **{"clr_gamma": 0.9994, "patience": 300},
}

OPTIMIZERS = ("rmsprop", "adam", "adamax", "sgd", "muon")
MANY = 10**6  # epochs, updates, sections: more of them would not be finished in a year
SIDE = 2**14  # px
BATCH = 1024
BATCH_PX = 2**30  # of all windows of an update together
rate = number(float, 1e-12, 3.4e38)  # the optimizers compute in float32
fraction = number(float, 0, 1)
count, margin = number(int, 0, MANY), number(int, 0, SIDE)
png, rois = partial(file, endings=(".png",)), partial(file, endings=(".zip",))
stack = partial(file, endings=(".tif", ".tiff", ".zarr"))


class Parser(argparse.ArgumentParser):
    """Refuses in one sentence, without the usage of forty flags."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults in the help, except where there is none to show; paragraphs as they are written."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False or "default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


# -- the flags, each declared once -------------------------------------------------------------------------------


def flag(name, words, **options):
    return name, {"help": words, **options}


def tta(what=""):
    words = f"{what}mean over 4 rotations, 8 turned and mirrored versions (without a number, too), or 7 of them"
    return flag("--tta", words, nargs="?", const="8", default="none", choices=("none", "4", "7", "8"))


BINARY = {"type": int, "choices": (0, 1), "metavar": "0|1", "default": 1}
IMAGE = (
    "TIFF, MRC, HDF5 (file.h5:/array) or Zarr (folder.zarr:/array), folder of sections, folder with the challenge's "
    "files, or a data set: isbi2012, dic-hela, phc-u373, synthetic"
)
CHANNEL = flag("--channel", "channel of --image_path, from 0, where it has several", type=channel)
DATA = (
    flag("--image_path", IMAGE, default="isbi2012", metavar="PATH"),
    flag("--mask_path", "its labels, likewise (default: those of the data set)", metavar="PATH"),
    CHANNEL,
    flag("--invert_mask", "labels mark the membrane, not the interior", action="store_true"),
    flag("--instances", "labels number the cells, 0 = background: cells, not membranes", action="store_true"),
    flag("--ignore_label", "label value that means 'not labelled': neither trains nor is scored", type=label_value),
)
PROTOCOL = (
    flag(
        "--protocol",
        "published: validates on the training sections, as in 2017, and says nothing about new data; holdout: a "
        "contiguous block is scored once, at the end; kfold: block --fold of --folds; all: trains on every section and "
        "keeps the last weights, for a recipe that has been scored already",
        default="published",
        choices=("published", "holdout", "kfold", "all"),
    ),
    flag("--val_sections", "sections to hold out, counted from 0 (default: the last fifth)", metavar="24-29"),
    flag("--train_sections", "train on these only, counted from 0 (default: all that are left)", metavar="0-9"),
    flag("--fold", "which block of kfold, from 0 (default: 0)", type=number(int, 0, 999)),
    flag("--folds", "blocks of kfold (default: 5)", type=number(int, 2, 1000)),
    flag("--gap", "sections left out beside the held-out block", type=count, default=0),
    flag("--inner_sections", "sections that choose weights; 0: keep the last (default: an eighth, 1-3)", type=count),
    flag("--val_windows", "windows that validate each epoch of --protocol published (default: 30)", type=up_to(1000)),
    tta("of the scoring at the end: "),
)
NETWORK = (
    flag("--arch", "network of 2017, of 2015, or a residual one", default="unet2017", choices=tuple(ARCHITECTURES)),
    flag("--dilate", "dilate the centre of unet2017: 1, 2, 4, 8, 16, 32 (default: 1)", **BINARY | {"default": None}),
    flag("--dilate_rate", "dilation of each level's second convolution in unet2017 (default: 1)", type=up_to(64)),
    flag("--addition", "sum the centre's six convolutions in unet2017 (default: 1)", **BINARY | {"default": None}),
    flag(
        "--filters", "filters per level (44,88,176; resunet: 16,32,64,128,128; unet2015: first, 64)", type=filter_list
    ),
    flag("--depth", "poolings of unet2015 (default: 4)", type=up_to(8)),
    flag("--batch_norm", "batch norm in unet2015, which the paper lacks", action="store_true"),
    flag("--bn_momentum", "batch norm's momentum; few updates want 0.9", type=number(float, 0, 0.9999), default=0.99),
    flag("--padding", "convolutions of unet2015, unpadded or padded (default: valid)", choices=("valid", "same")),
    flag("--dropout", "fraction dropped (default: 0.3; unet2015: 0.5; resunet: 0)", type=number(float, 0, 0.95)),
    flag("--classes", "channels of the softmax; class 1 is the interior", type=number(int, 2, 256), default=2),
)
AUGMENTATION = (
    flag("--window", "side of a window, px: a multiple of 8, of 16 for resunet (512; unet2015: 572)", type=up_to(SIDE)),
    flag(
        "--augment",
        "affine: flips, turns, rotation, scale, shear, shift; elastic: flips, turns, 3 x 3 grid with a standard "
        "deviation of 10 px (U-Net 2015); all: both, and gray values; broad: gray values more, with shade, blur and "
        "noise, for other microscopes (default: none; unet2015: all)",
        choices=("none", "affine", "elastic", "all", "broad"),
    ),
    flag("--elastic_grid", "nodes per side of the displacement grid", type=number(int, 2, 32)),
    flag("--elastic_sd_px", "standard deviation of a node, px", type=number(float, 0, 100)),
    flag("--max_rotation_deg", "rotation, degrees either way", type=number(float, 0, 180)),
    flag("--max_shear_deg", "shear, degrees either way", type=number(float, 0, 44)),
    flag("--max_shift_px", "shift, px either way", type=number(float, 0, 1024)),
    flag("--scale", "magnification", type=number(float, 0.25, 4), nargs=2, metavar=("MIN", "MAX")),
    flag("--noise", "gray-value noise, standard deviations of the data", type=number(float, 0, 5)),
    flag("--augment_preview", "draw what the network will see; train nothing", type=png, metavar="FILE.png"),
)
TRAINING = (
    flag("--epochs", "epochs of --steps_per_epoch updates", type=up_to(MANY), default=300),
    flag(
        "--minutes",
        "train about so long, in place of --epochs: the first updates are timed, and the schedule is laid out for that",
        type=number(float, 0, 10**5, above=True),
    ),
    flag("--steps_per_epoch", "updates per epoch", type=up_to(MANY), default=10),
    flag("--batch_size", "windows per update (default: 3; unet2015: 1)", type=up_to(BATCH)),
    flag("--lr", "base learning rate (default: 0.00001; unet2015: 0.001)", type=rate),
    flag("--max_lr", "highest learning rate (default: 0.0005)", type=rate),
    flag(
        "--clr_mode",
        "cycles between --lr and --max_lr; cosine: falls from --max_lr to --lr over the run; none: --lr (default: "
        "triangular; unet2015: none)",
        choices=("triangular", "triangular2", "exp_range", "cosine", "none"),
    ),
    flag("--step_size", "half a cycle, updates (default: 2000)", type=up_to(10**9)),
    flag("--clr_gamma", "decay of exp_range (default: 0.9994)", type=number(float, 0, 1, above=True)),
    flag(
        "--lr_find",
        "learning-rate range test of that many updates (100), with its plot and a suggestion",
        type=number(int, 10, 10_000),
        nargs="?",
        const=100,
        metavar="UPDATES",
    ),
    flag("--optimizer", "how weights are updated (default: rmsprop; unet2015: sgd)", choices=OPTIMIZERS),
    flag("--momentum", "momentum of rmsprop and sgd (default: 0; unet2015: 0.99)", type=number(float, 0, 0.9999)),
    flag("--ema", "momentum of a moving average of the weights", type=number(float, 0, 0.99999), default=0.0),
    flag(
        "--average_warmup",
        "the averages of the weights and of batch norm soon forget their start: at update t a momentum of at most "
        "(1 + t) / (10 + t)",
        **BINARY | {"default": 0},
    ),
    flag("--merge", "learn at the end which borders between cells are false", **BINARY | {"default": 0}),
    flag(
        "--loss",
        "binary cross-entropy, 1 - soft Dice, or their sum (default); weighted: softmax cross-entropy with class and "
        "border weights (default of unet2015)",
        choices=("bce_dice", "bce", "dice", "weighted"),
    ),
    flag("--w0", "weight of the gaps between cells in --loss weighted (default: 10)", type=number(float, 0, 1000)),
    flag("--sigma", "its reach, standard deviation in px (default: 5)", type=number(float, 0, 1000, above=True)),
    flag(
        "--patience", "stop after so many epochs without a better validation loss; 0: never (default: 300)", type=count
    ),
    flag(
        "--init_from",
        "weights to start from, of the same network, such as weights/isbi2012; the gray values are normalised "
        "by your own sections",
        metavar="FILE",
    ),
    flag("--seed", "seed of all random numbers", type=number(int, 0, 2**31 - 1), default=0),
)
MACHINE = (
    flag("--precision", "auto: bfloat16 where it is faster", default="auto", choices=("auto", "float32", "bfloat16")),
    flag("--gpu", 'GPUs to use, such as 0,1; "-1": the CPU (default: "0")', type=devices, metavar="N"),
)
OUTPUT = (
    flag("--weight_path", "kept weights: weights/x gives weights/x.weights.h5 and x.json", type=file, metavar="FILE"),
    flag("--run_dir", "run record, history, checkpoint (default: runs/<name>)", metavar="FOLDER"),
    flag("--resume", "go on from the checkpoint, bit for bit", action="store_true"),
    flag("--force", "replace an earlier run, its weights, or a picture", action="store_true"),
    flag("--tensorboard", "TensorBoard logs in the run folder", action="store_true"),
    *MACHINE,
    flag(
        "--distribute",
        "share every batch among all GPUs, of all machines that TF_CONFIG or KERAS_DISTRIBUTION_* name; N: the first N "
        "of this machine, on a CPU N virtual devices",
        type=up_to(64),
        nargs="?",
        const=0,
        metavar="N",
    ),
    flag("--steps_per_execution", "updates per compiled call (default: 1 on a CPU, else up to 10)", type=up_to(MANY)),
)
TRAIN = {
    "recipe": (flag("--recipe", "defaults, see below; a flag by hand wins (default: none)", choices=tuple(RECIPES)),),
    "data": DATA,
    "which sections train, which are held out": PROTOCOL,
    "network": NETWORK,
    "augmentation (numbers below replace those of the preset)": AUGMENTATION,
    "training": TRAINING,
    "output and machine": OUTPUT,
}
ENGINE = "what computes; auto: on a CPU OpenVINO where it is installed (requirements-openvino.txt), else Keras"
NORMALISE = "by mean and standard deviation of the training sections, or by the stack's own (another microscope)"
PREDICT = {
    "files": (
        flag(
            "--weight_path",
            "weights, with their record beside them; several networks are averaged (default: the "
            f"shipped network, weights/{SHIPPED.name})",
            type=file,
            nargs="+",
            metavar="FILE",
        ),
        flag("--image_path", "as in training; of a data set's name its test stack", default="isbi2012", metavar="PATH"),
        CHANNEL,
        flag("--output", "float32 0..1; .zarr: by blocks", type=stack, default="prediction.tif", metavar="FILE.tif"),
        flag("--threshold", "8-bit 0/255 mask of probability > threshold; with --segment, cut there", type=fraction),
        flag("--segment", "write labels, one per cell, by seeded watershed", action="store_true"),
        flag("--merge", "take false borders away (default: 1 with --segment if learned)", **BINARY | {"default": None}),
        flag("--rois", "with --segment: the cells' outlines, for ImageJ's ROI Manager", type=rois, metavar="FILE.zip"),
        flag("--force", "replace an existing output", action="store_true"),
        flag("--resume", "go on with an --output of .zarr, chunk by chunk", action="store_true"),
    ),
    "tiles and machine": (
        flag("--tile", "largest side of the network's input, px (default: 1024 or 1020)", type=up_to(SIDE)),
        flag("--overlap", "context around a tile, px (default: the receptive radius, if affordable)", type=margin),
        tta(),
        flag("--batch_size", "tiles per call", type=up_to(BATCH), default=1),
        flag("--engine", ENGINE, default="auto", choices=("auto", "keras", "openvino")),
        flag("--normalise", NORMALISE, default="training", choices=("training", "own")),
        flag(
            "--rescale",
            "resample to the pixel size of the training sections; the output has the stack's size",
            action="store_true",
        ),
        *MACHINE,
        flag("--workers", "processes for an --output of .zarr; 0: this one (default: 1)", type=number(int, 0, 1024)),
        flag("--scheduler", "dask scheduler that computes instead, such as tcp://host:8786", metavar="ADDRESS"),
    ),
}
WINDOW = flag("--window", "side of a training window, px (default: the recipe's, or one that fits)", type=up_to(SIDE))
MEANT = flag("--recipe", "the recipe that is meant (default: all are judged)", choices=tuple(RECIPES))
CHECK = {"data": DATA, "training that is meant": (MEANT, WINDOW)}


def build_parser(verbs_with_flags=tuple(VERBS)):
    """The parser; flags are declared for the named verbs only, since `evaluate` brings numpy along."""
    parser = Parser(prog="dilatedUnet.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    for name, words in VERBS.items():
        about = words[0].upper() + words[1:] + "."
        verb = verbs.add_parser(name, help=words, description=about, formatter_class=Formatter)
        if name in verbs_with_flags:
            verb.set_defaults(run=globals().get(f"run_{name}"))
            add_flags(name, verb)
    parser.of_verb = verbs.choices
    return parser


def add_flags(name, verb):
    """Declare the flags of a verb; whatever is a file or a folder is a `path`."""
    if name == "evaluate":
        from score import evaluation

        evaluation.add_arguments(verb)
        verb.set_defaults(run=evaluation.run)
    elif name == "reproduce":
        from studies import reproduce

        reproduce.add_arguments(verb)
        verb.set_defaults(run=partial(reproduce.run, parse=parse))
    elif name == "export":
        from predict.export import add_arguments

        add_arguments(verb, SHIPPED)
    elif name == "fetch":
        verb.add_argument("name", choices=DATA_SETS, help="data set")
    for title, flags in {"train": TRAIN, "predict": PREDICT, "check": CHECK}.get(name, {}).items():
        group = verb.add_argument_group(title)
        for flag_name, options in flags:
            group.add_argument(flag_name, **options)
    if name == "train":
        verb.epilog = "\n".join(describe_recipes())
    for action in verb._actions:
        if action.type is None and str(action.metavar).startswith(("PATH", "FILE", "FOLDER", "DIR")):
            action.type = path


# -- recipes, defaults, and flags that contradict each other -------------------------------------------------------


def describe_recipes():
    """What each recipe costs and sets."""
    yield "recipes:"
    for name, values in RECIPES.items():
        yield f"  --recipe {name}: {COSTS[name]}."
        yield textwrap.indent(textwrap.fill(" ".join(in_words(values)), 106, break_on_hyphens=False), "    ")


def parse(argv):
    """Arguments of a command line; without a verb it is `train`."""
    words = [*argv] if argv and argv[0] in (*VERBS, "-h", "--help") else ["train", *argv]
    parser = build_parser(words[:1])
    if argv and words[0] == "train" and argv[0] != "train" and not argv[0].startswith("-"):
        near = difflib.get_close_matches(argv[0], VERBS, 1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        parser.error(f"the verbs are {', '.join(VERBS)}. Received: {argv[0]}{meant}")
    for word in words:
        if re.fullmatch("--[a-z_]+=--", word):  # of which argparse makes an empty list
            parser.error(f"argument {word[:-3]}: must have a value. Received: --")
    args = parser.parse_args(words)
    if args.verb == "train":
        args = with_recipe(args, parser, words)
    args.argv = [*argv]
    return args


def with_recipe(args, parser, words):
    """The recipe's values where no flag was given by hand, then the defaults that depend on other flags."""
    recipe, plain = {"epochs": args.epochs} | RECIPES.get(args.recipe, {}), args
    parser.of_verb["train"].set_defaults(**dict.fromkeys(recipe, NOT_GIVEN))
    args = parser.parse_args(words)
    if args.minutes and args.epochs is not NOT_GIVEN:
        parser.error("--minutes takes the place of --epochs: choose one")
    taken = {key for key in recipe if getattr(args, key) is NOT_GIVEN}
    if plain.padding == "valid" or (args.arch == "unet2015" != recipe.get("arch") and plain.padding != "same"):
        taken.discard("window")  # whose sides are of its own
    if any(getattr(args, key) not in (None, NOT_GIVEN) for key in ("dilate", "dilate_rate", "addition")):
        taken.discard("arch")  # for the network that has these flags
    if "arch" not in taken and plain.arch != recipe.get("arch", plain.arch):
        taken.discard("filters")  # each has its own
    for key in recipe:
        if getattr(args, key) is NOT_GIVEN:
            setattr(args, key, recipe[key] if key in taken else getattr(plain, key))
    return settle(args, plain, taken, parser)


def settle(args, plain, taken, parser):
    """Fill in; where a recipe's value is of no use with a flag given by hand, the default takes its place."""
    while wrong := next((words for wrong, words in contradictions(args, filled_in(args)) if wrong), None):
        of_recipe = taken.intersection(re.findall(r"--(\w+)", wrong))
        useless = set() if "at least --lr" in wrong else of_recipe - {"protocol", "clr_mode", "optimizer", "loss"}
        if not useless:
            parser.error(wrong + "".join(f"; --recipe {args.recipe} sets --{k} {getattr(args, k)}" for k in of_recipe))
        for key in useless:
            setattr(args, key, getattr(plain, key))
        taken -= useless
    args = filled_in(args)
    for key, value in (LATE | {"val_windows": 30 if args.protocol == "published" else 9}).items():
        if getattr(args, key) is None:  # val_windows is of no use elsewhere, and 9 in old records
            setattr(args, key, value)
    return args


def filled_in(args):
    """A copy with the defaults that depend on the network, or on another of them."""
    own = ARCHITECTURES[args.arch]
    if args.optimizer not in (None, own["optimizer"]):
        own = own | {"momentum": 0.0}
    if args.padding == "same":
        own = own | {"window": 512}
    return argparse.Namespace(**{k: own.get(k) if v is None else v for k, v in vars(args).items()})


def contradictions(given, args):
    """Pairs (whether it is so, words); `given` by flags or recipe, `args` with the network's defaults."""
    published, kfold = args.protocol == "published", args.protocol == "kfold"
    nothing = args.protocol in ("published", "all")
    no_validation = args.inner_sections == 0 or args.protocol == "all"
    cyclic = args.clr_mode in ("triangular", "triangular2", "exp_range")
    multiple, execution = 2 ** (len(args.filters) - (args.arch == "resunet")), args.steps_per_execution or 1
    of_2015, weighted = args.arch == "unet2015", args.loss == "weighted"
    only_2015 = args.depth or args.padding or args.batch_norm
    dilated = given.dilate or given.dilate_rate or given.addition is not None
    pixels, high = args.batch_size * args.window**2, args.max_lr or LATE["max_lr"]
    return (
        (args.val_sections and args.protocol != "holdout", "--val_sections goes with --protocol holdout"),
        (not kfold and {args.fold, args.folds} != {None}, "--fold and --folds go with --protocol kfold"),
        (args.gap and nothing, "--gap needs held-out sections: --protocol holdout or kfold"),
        (args.inner_sections is not None and nothing, "--inner_sections goes with --protocol holdout or kfold"),
        (args.val_windows and not published, "--val_windows goes with --protocol published"),
        (args.patience and no_validation, "--patience needs validation: --inner_sections of at least 1"),
        (args.step_size and not cyclic, f"--step_size is of no use with --clr_mode {args.clr_mode}"),
        (args.clr_gamma and args.clr_mode != "exp_range", "--clr_gamma goes with --clr_mode exp_range"),
        (args.max_lr and args.clr_mode == "none", "--max_lr is of no use with --clr_mode none"),
        (high < args.lr and args.clr_mode != "none", f"--max_lr must be at least --lr, {args.lr}. Received: {high}"),
        (given.momentum and args.optimizer not in ("rmsprop", "sgd"), "--momentum goes with rmsprop and sgd"),
        (args.lr_find and args.distribute is not None, "--lr_find runs on one device: without --distribute"),
        (args.minutes and args.distribute is not None, "--minutes runs on one device: without --distribute"),
        (args.lr_find and args.augment_preview, "--lr_find and --augment_preview are two different jobs: choose one"),
        (args.resume and args.force, "--resume goes on with a run and --force replaces it: choose one"),
        (args.steps_per_epoch % execution, "--steps_per_execution must be a divisor of --steps_per_epoch"),
        (args.window % multiple and not of_2015, f"--window must be a multiple of {multiple}. Received: {args.window}"),
        (0 < args.dropout <= 1 / 512, f"--dropout must be 0, or above 1/512. Received: {args.dropout}"),
        (pixels > BATCH_PX, f"--batch_size windows must hold at most {BATCH_PX} px together. Received: {pixels}"),
        (of_2015 and len(args.filters) > 1, "--filters of unet2015 is one number, doubled at every level"),
        (of_2015 and not args.batch_norm and args.bn_momentum != 0.99, "--bn_momentum goes with --batch_norm"),
        (args.average_warmup and of_2015 and not (args.batch_norm or args.ema), "--average_warmup goes with --ema"),
        (only_2015 and not of_2015, "--depth, --padding and --batch_norm go with --arch unet2015"),
        (args.arch != "unet2017" and dilated, "--dilate, --dilate_rate and --addition go with --arch unet2017"),
        ((args.w0 is not None or args.sigma) and not weighted, "--w0 and --sigma go with --loss weighted"),
        (args.merge and args.instances, "--merge is of no use with --instances"),
        (args.merge and args.protocol == "published", "--merge goes with --protocol holdout, kfold or all"),
        (args.instances and args.invert_mask, "--invert_mask is of no use with --instances"),
        (args.instances and published, "--instances goes with --protocol holdout, kfold or all"),
    )


# -- verbs -------------------------------------------------------------------------------------------------------


def run_train(args):
    if args.protocol == "published" and not args.recipe and args.image_path not in (*DATA_SETS, "synthetic"):
        say("without --recipe the settings are those of 2017, for hours; for your own sections: --recipe quick")
    look_for(image=args.image_path, mask=args.mask_path)
    load_backend(args)
    from train import run as training

    return training.run(args, vars(parse([])))


def run_predict(args):
    if args.weight_path is None:
        args.weight_path = [str(SHIPPED)]
        say(f"no --weight_path: the shipped network, {SHIPPED} (what it is worth: weights/README.md)")
    look_for(test=args.image_path)
    load_backend(args)
    from predict import prediction

    return prediction.run(args)


def look_for(**paths):
    """Refuse a file that is missing before Keras is loaded, which takes seconds."""
    import data

    for role, name in paths.items():
        if name and name.removesuffix("-test") not in data.DATA_SETS:
            data.resolve(name, role)


def load_backend(args):
    from network import startup

    shared, engine = getattr(args, "distribute", None) is not None, getattr(args, "engine", "keras")
    startup.prepare(args.gpu, shared=shared, engine=engine)


def run_fetch(args):
    import data

    print(data.fetch(args.name, log=say))
    return 0


def run_check(args):
    import data

    images = data.resolve(args.image_path, "image")
    masks = data.resolve(args.mask_path or args.image_path, "mask")
    masks = masks if args.mask_path or masks != images else None  # there are none beside the images
    recipe = RECIPES.get(args.recipe, {"inner_sections": 0})
    inner = recipe.get("inner_sections")
    lines = data.describe(
        images,
        masks,
        channel=args.channel,
        shipped_nm=read_json(f"{SHIPPED}.json", "weights")["data"]["voxel_nm"],
        window=args.window or recipe.get("window"),
        multiple=8 if recipe.get("arch", "unet2017") == "unet2017" else 16,
        windows={name: values["window"] for name, values in RECIPES.items()},
        split={"protocol": recipe.get("protocol", "holdout"), "gap": recipe.get("gap", 0), "inner": inner},
        invert_mask=args.invert_mask,
        instances=args.instances or recipe.get("instances", False),
        ignore=args.ignore_label,
    )
    print("\n".join([*lines, *describe_recipes()]))
    return 2 if any(line.startswith("problem:") for line in lines) else 0


def run_export(args):
    from network import startup
    from predict import export

    export.check(args)
    look_for(test=args.image_path)
    startup.prepare("-1")
    return export.run(args)


def main(argv=None):
    """What a command line does; its exit code."""
    args = parse(sys.argv[1:] if argv is None else argv)
    try:
        return args.run(args)
    except (DataError, OSError) as error:
        say(f"dilatedUnet.py: {error}")
    except RecursionError:
        say("dilatedUnet.py: a file is nested too deep to be read")
    except Exception as error:
        if not (words := shell.known(error)):
            raise
        say(f"dilatedUnet.py: {words}")
    except KeyboardInterrupt as stop:
        say(f"dilatedUnet.py: {str(stop) or 'interrupted'}")
        return getattr(stop, "code", 130)
    return 2


if __name__ == "__main__":
    sys.exit(shell.ends(main))
