"""The dilated U-net training suite, from the shell:

    python dilatedUnet.py --dilate 1 --dilate_rate 2 --protocol holdout --augment all        train (the default verb)
    python dilatedUnet.py predict  --weight_path W --image_path test-volume.tif --output prediction.tif
    python dilatedUnet.py evaluate --prediction prediction.tif --mask_path labels.tif
    python dilatedUnet.py reproduce table --quick
    python dilatedUnet.py fetch isbi2012
    python dilatedUnet.py check --image_path X --mask_path Y

`python dilatedUnet.py VERB --help` lists the flags of a verb. Nothing heavy is imported before the flags are parsed.
"""

import argparse
import contextlib
import math
import os
import sys
import tempfile
from functools import partial

VERBS = {
    "train": "train a network (the default verb)",
    "predict": "predict a stack to TIFF",
    "evaluate": "score a prediction as the ISBI-2012 challenge did",
    "reproduce": "train the published tables row by row, compare and render",
    "fetch": "download a data set into the cache",
    "check": "say what the files are, before any training",
}
DATA_SETS = ("isbi2012", "dic-hela", "phc-u373")
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


class Parser(argparse.ArgumentParser):
    """Refuses in one sentence, without the usage of forty flags."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults in the help, except where there is none to show."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False or "default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


# -- types: each refuses by naming the rule and the value --------------------------------------------------------


def number(kind, low, high, *, above=False):
    """An argparse type: a number of `kind` within low..high (`above`: greater than low)."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            word = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"must be a {word}. Received: {text}") from None
        if not (low < value if above else low <= value) or not value <= high or math.isinf(value):
            rule = f"above {low}" if above else f"at least {low}"
            rule += "" if high == float("inf") else f" and at most {high}"
            raise argparse.ArgumentTypeError(f"must be {rule}. Received: {text}")
        return value

    return parse


INF = float("inf")
count = number(int, 1, INF)
whole = number(int, 0, INF)
positive = number(float, 0.0, INF, above=True)
fraction = number(float, 0.0, 1.0)


def filter_list(text):
    """44,88,176 -> (44, 88, 176)."""
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or min(values) < 1:
        raise argparse.ArgumentTypeError(f"must be whole numbers such as 44,88,176. Received: {text}")
    return values


# -- the flags, each declared once -------------------------------------------------------------------------------


def build_parser(verbs_with_flags=tuple(VERBS)):
    """The parser; flags are declared for the named verbs only, since `evaluate` brings numpy along."""
    parser = Parser(prog="dilatedUnet.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    for name, words in VERBS.items():
        verb = verbs.add_parser(
            name, help=words, description=words[0].upper() + words[1:] + ".", formatter_class=Formatter
        )
        if name in verbs_with_flags:
            globals()[f"add_{name}"](verb)
    return parser


def add_train(parser):
    for add in (add_data, add_protocol, add_network, add_augmentation, add_schedule, add_output):
        add(parser)
    parser.set_defaults(run=run_train)


def add_data(parser):
    group = parser.add_argument_group("data")
    group.add_argument(
        "--image_path",
        default="isbi2012",
        metavar="PATH",
        help="TIFF stack, folder of sections, folder with the challenge's files, or a name: isbi2012, synthetic",
    )
    group.add_argument("--mask_path", metavar="PATH", help="its labels, likewise (default: as --image_path)")
    group.add_argument("--invert_mask", action="store_true", help="labels mark the membrane, not the interior")
    group.add_argument(
        "--instances", action="store_true", help="labels number the cells, 0 = background: cells, not membranes"
    )


def add_protocol(parser):
    group = parser.add_argument_group("which sections train, which are held out")
    group.add_argument(
        "--protocol",
        default="published",
        choices=("published", "holdout", "kfold", "all"),
        help="published: validates on the training sections, as in 2017, and says nothing about new data; holdout: a "
        "contiguous block is scored once, at the end; kfold: block --fold of --folds; all: trains on every section and "
        "keeps the last weights, for a recipe that has been scored already",
    )
    group.add_argument("--val_sections", metavar="24-29", help="sections to hold out (default: the last fifth)")
    group.add_argument("--train_sections", metavar="0-9", help="train on these only (default: all that are left)")
    group.add_argument("--fold", type=whole, help="which block of kfold, from 0 (default: 0)")
    group.add_argument("--folds", type=number(int, 2, INF), help="blocks of kfold (default: 5)")
    group.add_argument("--gap", type=whole, default=0, help="sections left out beside the held-out block")
    group.add_argument(
        "--inner_sections",
        type=whole,
        help="training sections set aside for validation, early stopping and the choice of weights; 0 keeps the last "
        "weights (default: an eighth, at most 3)",
    )
    group.add_argument(
        "--val_windows", type=count, help="validation windows of --protocol published, others each epoch (default: 30)"
    )
    add_tta(group, "of the scoring at the end: ")


def add_network(parser):
    group = parser.add_argument_group("network")
    binary = {"type": int, "choices": (0, 1), "metavar": "0|1"}
    group.add_argument(
        "--arch",
        default="unet2017",
        choices=tuple(ARCHITECTURES),
        help="unet2017: standard or dilated network of the 2017 study; unet2015: the U-Net paper's network and recipe",
    )
    group.add_argument("--dilate", default=1, help="dilate the centre: 1, 2, 4, 8, 16, 32", **binary)
    group.add_argument("--dilate_rate", type=count, default=1, help="dilation of each level's second convolution")
    group.add_argument("--addition", default=1, help="sum the centre's six convolutions", **binary)
    group.add_argument(
        "--filters",
        type=filter_list,
        help="filters of each level, top to bottom (default: 44,88,176); of unet2015, of the first level (default: 64)",
    )
    group.add_argument("--depth", type=number(int, 1, 8), help="poolings of unet2015 (default: 4)")
    group.add_argument("--batch_norm", action="store_true", help="batch norm in unet2015, which the paper lacks")
    group.add_argument("--padding", choices=("valid", "same"), help="convolutions of unet2015 (default: valid)")
    group.add_argument(
        "--dropout", type=number(float, 0.0, 0.95), help="fraction dropped (default: 0.3; unet2015: 0.5)"
    )
    group.add_argument(
        "--classes", type=number(int, 2, 256), default=2, help="channels of the softmax; class 1 is the interior"
    )


def add_augmentation(parser):
    group = parser.add_argument_group("augmentation (numbers below replace those of the preset)")
    group.add_argument(
        "--window",
        type=count,
        help="side of the network's input in training, px; a multiple of 8 (default: 512); unet2015: 572, 556, ...",
    )
    group.add_argument(
        "--augment",
        choices=("none", "affine", "elastic", "all"),
        help="affine: flips, turns, rotation, scale, shear, shift; elastic: flips, turns, 3 x 3 grid with a standard "
        "deviation of 10 px (U-Net 2015); all: both, and gray values (default: none; unet2015: all)",
    )
    group.add_argument("--elastic_grid", type=number(int, 2, 32), help="nodes per side of the displacement grid")
    group.add_argument("--elastic_sd_px", type=number(float, 0, 100), help="standard deviation of a node, px")
    group.add_argument("--max_rotation_deg", type=number(float, 0, 180), help="rotation, degrees either way")
    group.add_argument("--max_shear_deg", type=number(float, 0, 44), help="shear, degrees either way")
    group.add_argument("--max_shift_px", type=number(float, 0, 1024), help="shift, px either way")
    group.add_argument("--scale", type=number(float, 0.25, 4), nargs=2, metavar=("MIN", "MAX"), help="magnification")
    group.add_argument("--noise", type=number(float, 0, 5), help="gray-value noise, standard deviations of the data")
    group.add_argument(
        "--augment_preview", metavar="FILE.png", help="draw what the network will see, and train nothing"
    )


def add_schedule(parser):
    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=count, default=300, help="epochs of --steps_per_epoch updates")
    group.add_argument("--steps_per_epoch", type=count, default=10, help="updates per epoch")
    group.add_argument("--batch_size", type=count, help="windows per update (default: 3; unet2015: 1)")
    group.add_argument("--lr", type=positive, help="base learning rate (default: 0.00001; unet2015: 0.001)")
    group.add_argument("--max_lr", type=positive, help="highest learning rate (default: 0.0005)")
    group.add_argument(
        "--clr_mode",
        choices=("triangular", "triangular2", "exp_range", "cosine", "none"),
        help="cycles between --lr and --max_lr; cosine: falls from --max_lr to --lr over the run; none: --lr "
        "(default: triangular; unet2015: none)",
    )
    group.add_argument("--step_size", type=count, help="half a cycle, updates (default: 2000)")
    group.add_argument("--clr_gamma", type=number(float, 0, 1, above=True), help="of exp_range (default: 0.9994)")
    group.add_argument(
        "--lr_find",
        type=number(int, 10, INF),
        nargs="?",
        const=100,
        metavar="UPDATES",
        help="learning-rate range test of that many updates (100), with its plot and a suggestion",
    )
    group.add_argument(
        "--optimizer",
        choices=("rmsprop", "adam", "adamax", "sgd"),
        help="the framework's own (default: rmsprop; unet2015: sgd)",
    )
    group.add_argument(
        "--momentum", type=number(float, 0, 0.9999), help="of rmsprop and sgd (default: 0; unet2015: 0.99)"
    )
    group.add_argument(
        "--ema", type=number(float, 0, 0.99999), default=0.0, help="momentum of a moving average of the weights"
    )
    group.add_argument(
        "--loss",
        choices=("bce_dice", "bce", "dice", "weighted"),
        help="binary cross-entropy, 1 - soft Dice, or their sum (default); weighted: softmax cross-entropy with class "
        "and border weights (default of unet2015)",
    )
    group.add_argument("--w0", type=number(float, 0, 1000), help="weight of a border of --loss weighted (default: 10)")
    group.add_argument("--sigma", type=positive, help="its reach, standard deviation in px (default: 5)")
    group.add_argument(
        "--patience",
        type=whole,
        help="epochs without a better validation loss (by 0.001) before stopping; 0: never (default: 300)",
    )
    group.add_argument("--seed", type=number(int, 0, 2**31 - 1), default=0, help="of everything that is drawn")


def add_output(parser):
    group = parser.add_argument_group("output and machine")
    group.add_argument(
        "--weight_path", metavar="FILE", help="best weights; weights/x.weights becomes weights/x.weights.h5 and x.json"
    )
    group.add_argument("--run_dir", metavar="FOLDER", help="run record, history, checkpoint (default: runs/<name>)")
    group.add_argument("--resume", action="store_true", help="go on from the checkpoint, bit for bit")
    group.add_argument("--force", action="store_true", help="replace an earlier run, its weights, or a picture")
    group.add_argument("--tensorboard", action="store_true", help="TensorBoard logs in the run folder")
    add_machine(group)
    group.add_argument(
        "--distribute",
        type=count,
        nargs="?",
        const=0,
        metavar="N",
        help="share every batch among all GPUs, of all machines that TF_CONFIG or KERAS_DISTRIBUTION_* name; N: the "
        "first N of this machine, on a CPU N virtual devices",
    )
    group.add_argument(
        "--steps_per_execution",
        type=count,
        help="updates per compiled call, a divisor of --steps_per_epoch (default: 1 on a CPU, else up to 10)",
    )


def add_machine(group):
    group.add_argument(
        "--precision",
        default="auto",
        choices=("auto", "float32", "bfloat16"),
        help="auto: bfloat16 where it is faster",
    )
    group.add_argument("--gpu", metavar="N", help='CUDA devices to use; "-1" for the CPU (default: "0")')


def add_tta(group, what=""):
    group.add_argument(
        "--tta",
        nargs="?",
        const="8",
        default="none",
        choices=("none", "4", "7", "8"),
        help=f"{what}mean over rotations and mirrored versions; without a number, all 8",
    )


def add_predict(parser):
    group = parser.add_argument_group("files")
    group.add_argument(
        "--weight_path",
        required=True,
        nargs="+",
        metavar="FILE",
        help="weights, their record beside them; of several networks: the mean of their probabilities",
    )
    group.add_argument(
        "--image_path",
        default="isbi2012",
        metavar="PATH",
        help="TIFF stack, folder of sections, or a data set's name (its test stack)",
    )
    group.add_argument("--output", default="prediction.tif", metavar="FILE.tif", help="float32, 0..1, 1 = interior")
    group.add_argument("--threshold", type=fraction, help="write an 8-bit 0/255 mask of probability > threshold")
    group.add_argument("--segment", action="store_true", help="write labels, one per cell, by seeded watershed")
    group.add_argument("--force", action="store_true", help="replace an existing output")
    group.add_argument("--resume", action="store_true", help="go on with an --output of .zarr, chunk by chunk")
    group = parser.add_argument_group("tiles and machine")
    group.add_argument("--tile", type=count, help="largest side of the network's input, px (default: 1024 or 1020)")
    group.add_argument(
        "--overlap",
        type=whole,
        help="context on each side of a tile, px (default: the receptive radius, if affordable)",
    )
    add_tta(group)
    group.add_argument("--batch_size", type=count, default=1, help="tiles per call")
    group.add_argument(
        "--engine",
        default="auto",
        choices=("auto", "keras", "openvino"),
        help="what computes; auto: on a CPU OpenVINO where it is installed (requirements-openvino.txt), else Keras",
    )
    add_machine(group)
    group.add_argument("--workers", type=whole, help="processes for an --output of .zarr; 0: this one (default: 1)")
    group.add_argument("--scheduler", metavar="ADDRESS", help="dask's scheduler instead, such as tcp://host:8786")
    parser.set_defaults(run=run_predict)


def add_evaluate(parser):
    from score import evaluation

    evaluation.add_arguments(parser)
    parser.set_defaults(run=run_evaluate)


def add_reproduce(parser):
    from studies import reproduce

    reproduce.add_arguments(parser)
    parser.set_defaults(run=run_reproduce)


def add_fetch(parser):
    parser.add_argument("name", choices=DATA_SETS, help="data set")
    parser.set_defaults(run=run_fetch)


def add_check(parser):
    add_data(parser)
    group = parser.add_argument_group("training that is meant")
    group.add_argument("--window", type=count, default=512, help="side of a training window, px")
    parser.set_defaults(run=run_check)


# -- flags that contradict each other ----------------------------------------------------------------------------


def fill_in(args):
    """The defaults that depend on the network, or on another of them."""
    own = ARCHITECTURES[args.arch]
    if args.optimizer not in (None, own["optimizer"]):
        own = own | {"momentum": 0.0}
    if args.padding == "same":
        own = own | {"window": 512}
    for name in own:
        if getattr(args, name) is None:
            setattr(args, name, own[name])


def check_train(args, parser):
    """Refuse contradictions, then fill in the defaults that depend on other flags."""
    momentum = args.momentum
    fill_in(args)
    published, kfold = args.protocol == "published", args.protocol == "kfold"
    nothing = args.protocol in ("published", "all")
    no_validation = args.inner_sections == 0 or args.protocol == "all"
    fold = args.fold is not None or args.folds is not None
    cyclic = args.clr_mode in ("triangular", "triangular2", "exp_range")
    multiple, execution = 2 ** len(args.filters), args.steps_per_execution or 1
    of_2015 = args.arch == "unet2015"
    weighted = args.loss == "weighted"
    contradictions = (
        (args.val_sections and args.protocol != "holdout", "--val_sections goes with --protocol holdout"),
        (fold and not kfold, "--fold and --folds go with --protocol kfold"),
        (args.gap and nothing, "--gap needs held-out sections: --protocol holdout or kfold"),
        (args.inner_sections is not None and nothing, "--inner_sections goes with --protocol holdout or kfold"),
        (args.val_windows and not published, "--val_windows goes with --protocol published"),
        (args.patience and no_validation, "--patience needs validation: --inner_sections of at least 1"),
        (args.step_size and not cyclic, f"--step_size is of no use with --clr_mode {args.clr_mode}"),
        (args.clr_gamma and args.clr_mode != "exp_range", "--clr_gamma goes with --clr_mode exp_range"),
        (args.max_lr and args.clr_mode == "none", "--max_lr is of no use with --clr_mode none"),
        ((args.max_lr or 5e-4) < args.lr and args.clr_mode != "none", "--max_lr must be at least --lr"),
        (momentum and args.optimizer not in ("rmsprop", "sgd"), "--momentum goes with rmsprop and sgd"),
        (args.lr_find and args.distribute is not None, "--lr_find runs on one device: without --distribute"),
        (args.lr_find and args.augment_preview, "--lr_find and --augment_preview are two different jobs: choose one"),
        (args.resume and args.force, "--resume goes on with a run and --force replaces it: choose one"),
        (args.steps_per_epoch % execution, "--steps_per_execution must be a divisor of --steps_per_epoch"),
        (args.window % multiple and not of_2015, f"--window must be a multiple of {multiple}. Received: {args.window}"),
        (of_2015 and len(args.filters) > 1, "--filters of unet2015 is one number, doubled at every level"),
        (
            (args.depth or args.padding or args.batch_norm) and not of_2015,
            "--depth, --padding and --batch_norm go with --arch unet2015",
        ),
        ((args.w0 is not None or args.sigma) and not weighted, "--w0 and --sigma go with --loss weighted"),
        (args.instances and args.invert_mask, "--invert_mask is of no use with --instances"),
        (args.instances and published, "--instances goes with --protocol holdout, kfold or all"),
    )
    for wrong, words in contradictions:
        if wrong:
            parser.error(words)
    args.depth, args.padding = args.depth or 4, args.padding or "valid"
    args.w0, args.sigma = 10.0 if args.w0 is None else args.w0, args.sigma or 5.0
    args.val_windows = args.val_windows or (30 if published else 9)  # elsewhere of no use, and 9 in old records
    args.max_lr = args.max_lr or 5e-4
    args.step_size = args.step_size or 2000
    args.clr_gamma = args.clr_gamma or 0.9994
    args.patience = 300 if args.patience is None else args.patience


# -- verbs -------------------------------------------------------------------------------------------------------


def prepare_machine(args):
    """What must be in the environment before Keras is imported."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    shared = getattr(args, "distribute", None) is not None
    if args.gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = args.gpu
    if not shared:
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    with quiet_stderr():
        from network import device

        device.load(shared)


@contextlib.contextmanager
def quiet_stderr():
    """Hold back what the frameworks' C++ writes while they load; it is shown if loading fails."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        except BaseException:
            file.seek(0)
            os.write(kept, file.read())
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def run_train(args):
    prepare_machine(args)
    from train import run as training

    return training.run(args, vars(parse([])))


def run_predict(args):
    prepare_machine(args)
    from predict import prediction

    return prediction.run(args)


def run_evaluate(args):
    from score import evaluation

    return evaluation.run(args)


def run_reproduce(args):
    from studies import reproduce

    return reproduce.run(args, parse)


def run_fetch(args):
    import data

    print(data.fetch(args.name, log=partial(print, file=sys.stderr)))
    return 0


def run_check(args):
    import data

    images = data.resolve(args.image_path, "image")
    masks = data.resolve(args.mask_path or args.image_path, "mask")
    if masks == images and not args.mask_path:  # there are none beside the images
        masks = None
    lines = data.describe(images, masks, invert_mask=args.invert_mask, window=args.window)
    print("\n".join(lines))
    return 2 if any(line.startswith("problem:") for line in lines) else 0


def parse(argv):
    """Arguments of a command line; without a verb it is `train`."""
    words = [*argv] if argv and argv[0] in (*VERBS, "-h", "--help") else ["train", *argv]
    parser = build_parser(words[:1])
    args = parser.parse_args(words)
    args.argv = [*argv]
    if args.verb == "train":
        check_train(args, parser)
    return args


def main(argv=None):
    args = parse(sys.argv[1:] if argv is None else argv)
    from data import DataError

    try:
        return args.run(args)
    except (DataError, OSError) as error:
        print(f"dilatedUnet.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dilatedUnet.py: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
