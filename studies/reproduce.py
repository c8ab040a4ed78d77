"""The published tables as rows, each a command line; run them, compare, render.

    python dilatedUnet.py reproduce table --quick                   the 2017 table on a CPU, reduced, 8 minutes a row
    python dilatedUnet.py reproduce table --seeds 3 --folds 5       in full, with 5-fold cross-validation beside it
    python dilatedUnet.py reproduce best                            the strongest recipe, 5-fold
    python dilatedUnet.py reproduce study lr --quick                one factor of the training study; without, all four
    python dilatedUnet.py reproduce study sections                  the learning curve
    python dilatedUnet.py reproduce table --list                    the commands, to run one alone
    python dilatedUnet.py reproduce table --render --output t.md    train nothing: the table of whatever records exist

Every row x seed x fold is a run in a folder of its own, `runs/reproduce/TABLE/ROW-PROTOCOL-fF-sS[-quick]`. A finished
one is not repeated and a half-finished one is resumed, so the same command simply goes on. `--collect` copies the
records, without weights, into `results/TABLE[-quick].json`, which are committed and from which `--render` works in a
fresh clone; `--missing` trains only what that file lacks, for more seeds on another machine.

Exit code 0: every row lies within its tolerance; 1: a row misses it, learned nothing, or lacks a run; 2: bad usage;
130: interrupted.

Where the base of the training study differs from the poster's U-Net: the centre is the six convolutions of the 2017
network (undilated, not summed) in place of two, up-sampling is nearest-neighbour with a convolution, every
convolution is followed by batch norm, an epoch is 50 updates of 3 windows, and "augmented" is `--augment all`.
"""

import csv
import itertools
import json
import math
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from io import StringIO
from pathlib import Path

from studies import comparison

SUITE = Path(__file__).resolve().parent.parent / "dilatedUnet.py"
# Of a run's settings: where it is kept and what it runs on, which do not make it another experiment.
IGNORED = (
    *("verb", "run", "argv", "run_dir", "weight_path", "resume", "force", "tensorboard", "gpu", "precision"),
    *("distribute", "lr_find", "augment_preview", "steps_per_execution", "recipe"),
)
POINTS = 100  # of a history that is committed: a README's curve shows no more
MARK = "<!-- written by `python dilatedUnet.py reproduce"


class Refused(ValueError):
    """Bad usage or a bad file, in one sentence."""


# -- rows -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Row:
    """One line of a table: a command line, and what is to come of it.

    Attributes
    ----------
    name : str
        Of the row and, with protocol, fold and seed, of its runs' folders. Rows of one name are one row.
    argv : tuple of str
        Words that the suite's own parser accepts, without protocol, seed and folders.
    minutes : float
        Expected cost of ONE run: on 2 CPU cores if quick, else on one H200-class GPU.
    published : dict
        Published value per metric.
    tolerance : dict
        Per metric of `published`: stated beforehand, for as long as there are too few seeds to derive it from. A
        metric without one is shown and not judged.
    target : dict
        Per metric, the mean over the held-out runs that must be reached.
    protocols : tuple of str
        published, holdout, kfold.
    """

    name: str
    argv: tuple[str, ...]
    minutes: float
    published: Mapping[str, float] = field(default_factory=dict)
    tolerance: Mapping[str, float] = field(default_factory=dict)
    target: Mapping[str, float] = field(default_factory=dict)
    protocols: tuple[str, ...] = ("holdout",)


@dataclass(frozen=True)
class Comparison:
    """ "It makes no difference": row `ours` against row `base`; smaller than `margin` would not matter."""

    words: str
    ours: str
    base: str
    metric: str
    margin: float
    held_out: bool = True


@dataclass(frozen=True)
class Factor:
    """Levels of one factor: label -> name of the row; `x`, where a score is drawn against a number."""

    name: str
    title: str
    levels: Mapping[str, str]
    base: str
    chosen: str = ""
    x: str = ""
    metric: str = "held_out_v_rand"


@dataclass(frozen=True)
class Table:
    name: str
    title: str
    rows: tuple[Row, ...]
    quick: bool
    comparisons: tuple[Comparison, ...] = ()
    factors: tuple[Factor, ...] = ()
    note: str = ""
    shown: tuple[str, ...] = ()


def words(settings: Mapping[str, object]) -> tuple[str, ...]:
    """Settings as the words of a command line; None for a flag without a value.

    >>> words({"lr": "1e-5", "dilate": 0})
    ('--lr', '1e-5', '--dilate', '0')
    """
    pairs = ((f"--{key}",) if value is None else (f"--{key}", str(value)) for key, value in settings.items())
    return tuple(itertools.chain.from_iterable(pairs))


# The four rows of the README of 2017, their commands word for word but for the name of the weights.
PUBLISHED_2017 = {
    "unet": ((0, 1, 1), (0.056, 0.106, 0.985, 0.979)),
    "dilated": ((1, 2, 1), (0.057, 0.111, 0.985, 0.978)),
    "unet-a": ((0, 1, 0), (0.073, 0.0864, 0.981, 0.980)),
    "dilated-a": ((1, 2, 0), (0.0579, 0.114, 0.985, 0.978)),
}
ONE_FACTOR = {"dilate-alone": (1, 1, 1), "dilate_rate-alone": (0, 2, 1)}
STATED = {"loss": 0.03, "val_loss": 0.03, "dice": 0.01, "val_dice": 0.01}
STATED_QUICK = {"loss": 0.15, "val_loss": 0.15, "dice": 0.05, "val_dice": 0.05}  # "always interior" misses these
QUICK_2017 = {"epochs": 30, "window": 192, "step_size": 150}  # 300 updates: one whole cycle
MARGINS = {"held_out_v_rand": 0.005, "held_out_dice": 0.002, "val_loss": 0.01}


def table_rows(quick: bool) -> Table:
    """The table of 2017, and its two factors one at a time."""
    rows = [row_2017(name, flags, quick, values) for name, (flags, values) in PUBLISHED_2017.items()]
    rows += [row_2017(name, flags, quick) for name, flags in ONE_FACTOR.items()]
    pairs = {
        "dilated against standard": ("dilated", "unet"),
        "dilated against standard, no addition": ("dilated-a", "unet-a"),
        "the centre's dilation alone": ("dilate-alone", "unet"),
        "the encoder's dilation alone": ("dilate_rate-alone", "unet"),
    }
    comparisons = tuple(
        Comparison(words_, *pair, metric, margin, held_out=metric.startswith("held_out"))
        for words_, pair in pairs.items()
        for metric, margin in MARGINS.items()
    )
    return Table("table", "The dilated U-net study of 2017", tuple(rows), quick, comparisons)


def row_2017(name, flags, quick, values=()):
    dilate, dilate_rate, addition = flags
    recipe = {"lr": "0.00001", "max_lr": "0.01", "epochs": 500, "dilate_rate": dilate_rate, "dilate": dilate}
    argv = words(recipe | {"addition": addition} | (QUICK_2017 if quick else {}))
    published = dict(zip(comparison.SHOWN, values, strict=False))
    stated = STATED_QUICK if quick else STATED
    tolerances = {metric: stated[metric] for metric in published}
    return Row(name, argv, 4 if quick else 2.5, published, tolerances, protocols=("published", "holdout"))


# What trains well on held-out sections; `best`, the learning curve and the receptive field start from it.
STRONG = {
    **{"dilate": 0, "dilate_rate": 1, "addition": 1, "dropout": 0.1, "inner_sections": 0, "augment": "all"},
    **{"optimizer": "adam", "clr_mode": "cosine", "lr": "1e-5", "max_lr": "1.5e-3"},
    **{"batch_size": 4, "epochs": 40, "steps_per_epoch": 100, "ema": 0.99},
}
STRONG_QUICK = {"filters": "16,32,64", "window": 192, "epochs": 5, "ema": 0.98}
BEST = {"epochs": 80, "ema": 0.999, "tta": 8}
BEST_QUICK = {"window": 256, "epochs": 5, "ema": 0.98}  # as start.py


def best_rows(quick: bool) -> Table:
    """The strongest recipe, its last weights, rotations averaged, every fold reported."""
    networks = {"best-standard": {}, "best-dilated": {"dilate": 1, "dilate_rate": 2}}
    target = {"held_out_v_rand": 0.97 if quick else 0.985}
    rows = (
        Row(
            name,
            words(STRONG | BEST | (BEST_QUICK if quick else {}) | network),
            minutes=11 if quick else 6,
            target=target,
            protocols=("kfold",),
        )
        for name, network in networks.items()
    )
    comparisons = tuple(
        Comparison("dilated against standard", "best-dilated", "best-standard", metric, margin)
        for metric, margin in MARGINS.items()
        if metric.startswith("held_out")
    )
    return Table("best", "The strongest recipe on held-out sections", tuple(rows), quick, comparisons)


STUDY = {
    **{"filters": "64,128,256,512", "dilate": 0, "dilate_rate": 1, "addition": 0, "dropout": 0},
    **{"window": 512, "epochs": 40, "steps_per_epoch": 50, "augment": "all", "loss": "bce"},
    **{"optimizer": "adam", "clr_mode": "none", "lr": "1e-4"},
}
STUDY_QUICK = {"filters": "16,32,64,128", "window": 192, "steps_per_epoch": 10}
FACTORS = {
    "depth": Factor("depth", "Depth", {"3": "depth-3", "4": "base"}, "4", "4"),
    "augmentation": Factor(
        "augmentation", "Augmentation", {"raw": "raw", "augmented": "base"}, "augmented", "augmented"
    ),
    "lr": Factor("lr", "Learning rate (Adam)", {"1e-5": "lr-1e-5", "1e-4": "base", "1e-3": "lr-1e-3"}, "1e-4", "1e-4"),
    "optimizer": Factor("optimizer", "Optimizer", {"SGD": "sgd", "Adam": "base", "Adamax": "adamax"}, "Adam", "Adamax"),
    "sections": Factor(
        "sections",
        "Labelled sections",
        {str(n): f"sections-{n}" for n in (1, 2, 5, 10, 24)},
        "24",
        x="labelled training sections",
    ),
    "receptive": Factor(
        "receptive",
        "Receptive field",
        {"off": "dilation-off", "encoder": "dilation-encoder", "centre": "dilation-centre"},
        "off",
        x="receptive field, px",
    ),
}
POSTER = ("depth", "augmentation", "lr", "optimizer")


def study_rows(quick: bool, factor: str | None = None) -> Table:
    """The levels of one factor, or of the poster's four; the level that is the base is one row for all."""
    factors = tuple(FACTORS[name] for name in ([factor] if factor else POSTER))
    changes = study_changes(quick)
    names = dict.fromkeys(row for f in factors for row in f.levels.values())
    rows = tuple(Row(name, words(changes[name]), minutes=2 if quick else 4) for name in names)
    pairs = [("the encoder's dilation", "dilation-encoder"), ("the centre's dilation", "dilation-centre")]
    comparisons = [
        Comparison(what, ours, "dilation-off", metric, MARGINS[metric])
        for what, ours in pairs
        for metric in ("held_out_v_rand", "held_out_dice")
        if ours in names
    ]
    return Table("study", "The training study", rows, quick, tuple(comparisons), factors)


def study_changes(quick):
    """Settings of every row of the study, each a base with one setting changed."""
    base = STUDY | (STUDY_QUICK if quick else {})
    strong = STRONG | (STRONG_QUICK if quick else {})
    # Who has one labelled section has none to choose weights by.
    curve = strong | {"protocol": "holdout"}
    rows = {
        "base": base,
        "depth-3": base | {"filters": base["filters"].rpartition(",")[0]},
        "raw": base | {"augment": "none"},
        "lr-1e-5": base | {"lr": "1e-5"},
        "lr-1e-3": base | {"lr": "1e-3"},
        "sgd": base | {"optimizer": "sgd"},
        "adamax": base | {"optimizer": "adamax"},
        "dilation-off": strong,
        "dilation-encoder": strong | {"dilate_rate": 2},
        "dilation-centre": strong | {"dilate": 1},
    }
    return rows | {f"sections-{n}": curve | {"train_sections": spread_over(n, 24)} for n in (1, 2, 5, 10, 24)}


def spread_over(count: int, available: int) -> str:
    """`count` sections evenly over 0..available - 1, as a user would choose what to label.

    >>> spread_over(5, 24)
    '2,7,12,17,22'
    """
    if count == available:
        return f"0-{available - 1}"
    return ",".join(str(round((i + 0.5) * available / count)) for i in range(count))


MEMBRANES_2015 = {"held_out_warping_error": 0.000353, "held_out_rand_error": 0.0382, "held_out_pixel_error": 0.0611}
CELLS_2015 = {"held_out_mean_iou": 0.7756}
ADAM = {"batch_norm": None, "optimizer": "adam", "clr_mode": "cosine", "lr": "1e-5", "max_lr": "2e-3", "ema": 0.98}
CELLS = ADAM | {"image_path": "dic-hela", "instances": None, "gap": 2, "padding": "same", "batch_size": 2}
LENGTH_2015 = {"epochs": 100, "steps_per_epoch": 100}
LENGTH_2015_QUICK = {"filters": 16, "epochs": 5, "steps_per_epoch": 100}


def unet2015_rows(quick: bool) -> Table:
    """Membranes and touching cells with the network of 2015: as published, with batch norm and Adam, without w0."""
    length = LENGTH_2015_QUICK if quick else LENGTH_2015
    base = {"arch": "unet2015", "tta": 7} | length
    cells = base | CELLS | {"window": 256 if quick else 512}
    published = base | ({"window": 444} if quick else {})
    # batch norm wants several windows, and small ones, which unpadded convolutions would eat up
    membranes = base | ADAM | {"padding": "same", "batch_size": 4, "window": 256}
    rows = (
        Row("isbi-published", words(published), 4 if quick else 12),
        Row("isbi", words(membranes), 4 if quick else 12, MEMBRANES_2015),
        Row("cells", words(cells), 4 if quick else 12, CELLS_2015, target=CELLS_2015),
        Row("cells-flat", words(cells | {"w0": 0}), 4 if quick else 12),
    )
    note = (
        "The paper's values are on test data whose labels are not public (the challenge's test stack; the Cell "
        "Tracking Challenge's test sequences), ours on held-out sections of the training stack and held-out frames of "
        "sequence 01: beside each other, not against each other. isbi-published is the paper's recipe: unpadded, one "
        "large tile a batch, SGD, no batch norm; the others are padded and have batch norm and Adam. cells-flat is "
        "cells without the border weights (w0 = 0)."
    )
    factors = (
        Factor("recipe", "Recipe", {"as published": "isbi-published", "batch norm, Adam": "isbi"}, "batch norm, Adam"),
        Factor(
            "weights",
            "Border weights",
            {"w0 = 10": "cells", "w0 = 0": "cells-flat"},
            "w0 = 0",
            metric="held_out_mean_iou",
        ),
    )
    weights = Comparison("the border weights", "cells", "cells-flat", "held_out_mean_iou", 0.01)
    shown = ("loss", "val_loss", "held_out_dice", "held_out_v_rand", *MEMBRANES_2015, *CELLS_2015, "held_out_seg")
    return Table("unet2015", "The U-Net of 2015", rows, quick, (weights,), factors, note, shown)


TABLES: dict[str, Callable[[bool], Table]] = {
    "table": table_rows,
    "best": best_rows,
    "study": study_rows,
    "unet2015": unet2015_rows,
}


# -- the verb ---------------------------------------------------------------------------------------------------


def add_arguments(parser):
    """Declare the flags of `reproduce` on an argparse parser, in groups."""
    group = parser.add_argument_group("what to reproduce")
    group.add_argument("name", choices=tuple(TABLES), help="table")
    group.add_argument("factor", nargs="?", choices=tuple(FACTORS), help="of study (default: the poster's four)")
    group.add_argument("--quick", action="store_true", help="reduced recipes for 2 CPU cores; every table says so")
    group.add_argument("--seeds", type=int, metavar="N", help="seeds 0..N-1 (default: 3; 1 with --quick)")
    group.add_argument("--folds", type=int, metavar="N", help="held-out runs as N-fold cross-validation (best: 5)")
    group.add_argument("--protocol", choices=("published", "holdout", "kfold"), help="only the runs of this one")
    group.add_argument("--only", nargs="+", metavar="ROW", help="only these rows")
    group = parser.add_argument_group("what to do")
    group.add_argument("--list", action="store_true", help="print the command lines, and train nothing")
    group.add_argument("--render", action="store_true", help="render whatever records exist, and train nothing")
    group.add_argument("--collect", action="store_true", help="copy finished records, no weights, into --records")
    group.add_argument("--missing", action="store_true", help="train only what --records lack, and add it to them")
    group.add_argument("--output", metavar="FILE.md", help="write the Markdown there as well")
    group.add_argument("--figures", metavar="FOLDER", help="draw a PNG per factor of study")
    group.add_argument("--runs", default="runs/reproduce", metavar="FOLDER", help="where the runs are")
    group.add_argument("--records", default="results", metavar="FOLDER", help="committed records, for --render")


def run(args, parse, launch=None) -> int:
    """Train what is missing, compare, render; returns the exit code.

    Parameters
    ----------
    args : argparse.Namespace
        Of the flags that `add_arguments` declares.
    parse : callable
        The suite's own parser: a list of words -> Namespace, or SystemExit.
    launch : callable, optional
        A list of words of the suite -> exit code; a process of its own unless given.
    """
    try:
        table = select(args)
        args.collect |= args.missing  # what was missing is added to the records
        kept = committed(args.records, table) if args.render or args.collect else {}
        jobs = jobs_of(table, args, kept)
        plan = Plan(table, jobs, parse, Path(args.runs), kept if args.render or args.missing else {})
        check(args, plan)
        if args.list:
            print("\n".join(listing(plan, args.missing)))
            return 0
        interrupted = False if args.render else train(plan, args, launch or in_own_process)
        if args.collect:
            collect(plan, args.records)
        return finish(plan, args, interrupted)
    except Refused as error:
        print(f"dilatedUnet.py reproduce: {error}", file=sys.stderr)
        return 2


def finish(plan, args, interrupted):
    """Print and write the tables; the exit code."""
    results = Results(plan)
    if args.figures:
        for path in comparison.draw(plan, results, Path(args.figures)):
            say(f"figure: {path}")
    lines, problems = comparison.report(plan, results)
    text = "\n".join([f"{MARK} {command_words(args)}` -->", *lines])
    print(text)
    if args.output:
        replace_text(args.output, text + "\n")
    for problem in problems:
        say(f"not reproduced: {problem}")
    return 130 if interrupted else 1 if problems else 0


def command_words(args) -> str:
    """The words after `reproduce` that made a text, without the folders."""
    words_ = [args.name, *([args.factor] if args.factor else ()), *(["--quick"] if args.quick else ())]
    given = {"seeds": args.seeds, "folds": args.folds, "protocol": args.protocol}
    words_ += words({key: value for key, value in given.items() if value})
    return shlex.join([*words_, *(["--only", *args.only] if args.only else ()), "--render"])


def say(sentence):
    print(sentence, file=sys.stderr, flush=True)


def select(args) -> Table:
    """The table that was asked for, with the rows that were asked for."""
    if args.factor and args.name != "study":
        raise Refused(f"{args.factor} is a factor of study: `reproduce study {args.factor}`. Received: {args.name}")
    table = study_rows(args.quick, args.factor) if args.name == "study" else TABLES[args.name](args.quick)
    names = [row.name for row in table.rows]
    unknown = [name for name in args.only or () if name not in names]
    if unknown:
        raise Refused(f"--only must name rows of {args.name}: {', '.join(names)}. Received: {', '.join(unknown)}")
    return replace(table, rows=tuple(row for row in table.rows if not args.only or row.name in args.only))


def check(args, plan):
    """Refuse before the work what would fail after it."""
    if args.render and (args.list or args.missing):
        raise Refused("--render trains nothing: choose it, or --list, or --missing.")
    if not plan.jobs:
        raise Refused(f"--protocol must be one that {args.name} has. Received: {args.protocol}")
    if args.output and not is_ours(Path(args.output)):
        raise Refused(f"--output: {args.output} exists and is not a table written by reproduce.")
    for job in plan.jobs:
        plan.settings(job)


def is_ours(path):
    """Whether a file may be replaced: it is not there yet, or was written by this verb."""
    return not path.exists() or (path.is_file() and path.read_bytes().startswith(MARK.encode()))


# -- runs -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Job:
    """One run: a row under a protocol, with a seed and a fold."""

    row: Row
    protocol: str
    fold: int
    folds: int
    seed: int
    quick: bool

    @property
    def key(self):
        protocol = f"kfold{self.folds}" if self.protocol == "kfold" else self.protocol
        return f"{protocol}-f{self.fold}-s{self.seed}"

    @property
    def name(self):
        return f"{self.row.name}-{self.key}" + "-quick" * self.quick

    def argv(self):
        """The words that make the experiment."""
        fold = ("--folds", str(self.folds), "--fold", str(self.fold)) if self.protocol == "kfold" else ()
        fewer = ("--val_windows", "9") if self.quick and self.protocol == "published" else ()
        return [*self.row.argv, "--protocol", self.protocol, *fold, *fewer, "--seed", str(self.seed)]

    def command(self, folder):
        """... and where it is kept."""
        return [*self.argv(), "--run_dir", str(folder), "--weight_path", str(folder / "best"), "--resume"]


@dataclass(frozen=True)
class Plan:
    """The runs of a table, and how to find them."""

    table: Table
    jobs: Sequence[Job]
    parse: Callable
    runs: Path
    committed: Mapping[str, dict]

    def folder(self, job):
        return self.runs / self.table.name / job.name

    def settings(self, job):
        """Resolved settings of a job, from the suite's own parser, as JSON has them."""
        return settings_of(self.parse, tuple(job.argv()))

    def row_settings(self, row):
        return settings_of(self.parse, (*row.argv, "--protocol", row.protocols[0]))


@cache
def settings_of(parse, argv):
    """What makes a command line another experiment: its settings without folders and machine."""
    said = StringIO()
    try:
        with redirect_stderr(said):
            args = parse(list(argv))
    except SystemExit:
        reason = said.getvalue().strip().rpartition("\n")[2]
        raise Refused(f"a row is not taken by the command line (yet): {shlex.join(argv)}: {reason}") from None
    return json.loads(json.dumps({key: value for key, value in vars(args).items() if key not in IGNORED}))


def jobs_of(table: Table, args, kept) -> list[Job]:
    """Seeds outermost: whenever the work stops, there is as much of the whole table as possible."""
    seeds = default_seeds(table, args, kept) if args.seeds is None else args.seeds
    folds = 5 if args.folds is None else args.folds
    if seeds < 1 or folds < 2:
        raise Refused(f"--seeds must be at least 1 and --folds at least 2. Received: {seeds} and {folds}")
    return [
        Job(row, protocol, fold, folds, seed, table.quick)
        for seed in range(seeds)
        for protocol in ("published", "holdout", "kfold")
        for row in table.rows
        if protocol in protocols_of(row, args) and args.protocol in (None, protocol)
        for fold in range(folds if protocol == "kfold" else 1)
    ]


def protocols_of(row, args):
    """--folds turns holdout into k-fold, but not where a row names its training sections."""
    if args.folds is not None and "--train_sections" not in row.argv:
        return tuple("kfold" if protocol == "holdout" else protocol for protocol in row.protocols)
    return row.protocols


def default_seeds(table, args, kept):
    """3, or 1 if quick; for --render as many as there are records of."""
    default = 1 if table.quick else 3
    if not args.render:
        return default
    names = {path.name for path in (Path(args.runs) / table.name).glob("*-s*")} | set(kept)
    quick = [name.removesuffix("-quick") for name in names if name.endswith("-quick") == table.quick]
    rows = tuple(f"{row.name}-" for row in table.rows)
    seeds = [name.rpartition("-s")[2] for name in quick if name.startswith(rows)]
    return max([int(seed) + 1 for seed in seeds if seed.isdigit()], default=default)


def listing(plan, missing=False) -> Iterator[str]:
    """The commands, with their expected cost; only of the runs that are missing, if so asked."""
    for job in plan.jobs:
        if missing and find(plan, job).state == "finished":
            continue
        yield f"# {job.name}: about {job.row.minutes:g} minutes on {machine(job.quick)}"
        yield shlex.join(["python", "dilatedUnet.py", *job.command(plan.folder(job))])


def machine(quick):
    return "2 CPU cores" if quick else "one H200-class GPU"


def train(plan, args, launch) -> bool:
    """Run what is neither finished nor in the way; True if interrupted."""
    states = [(job, find(plan, job)) for job in plan.jobs]
    todo = [(job, found) for job, found in states if found.state in ("absent", "half")]
    minutes = sum(job.row.minutes for job, _ in todo)
    say(f"{len(todo)} of {len(states)} runs to go: about {minutes:.0f} minutes on {machine(plan.table.quick)}")
    for job, found in states:
        if found.state in ("other", "broken"):
            say(f"{job.name} cannot run: {found.words}")
    for number, (job, found) in enumerate(todo, 1):
        say(f"[{number}/{len(todo)}] {job.name}" + f" ({found.words})" * (found.state == "half"))
        try:
            code = launch(job.command(plan.folder(job)))
        except KeyboardInterrupt:
            code = 130
        if code == 130:
            say(f"interrupted in {job.name}: the same command goes on from here")
            return True
        if code:
            say(f"{job.name} failed with exit code {code}; the others go on")
        if args.collect:
            collect(plan, args.records)
    return False


def in_own_process(argv) -> int:
    """The suite in a process of its own; on Ctrl-C it is given the time to leave by itself."""
    process = subprocess.Popen([sys.executable, SUITE, *argv])
    try:
        return process.wait()
    except KeyboardInterrupt:
        with suppress(subprocess.TimeoutExpired):  # a terminal has sent it the same Ctrl-C
            return process.wait(timeout=20) or 130
        process.send_signal(signal.SIGTERM)
        process.wait()
        return 130


# -- records ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """State of a run (finished, half, absent, other, broken), in words, and its result if it is finished."""

    state: str
    words: str
    result: dict | None = None


def look_up(plan, job) -> Found:
    """What there is of a run in its folder."""
    path = plan.folder(job) / "run.json"
    if not path.exists():
        return Found("absent", "no run")
    try:
        record = json.loads(path.read_text())
        differing = difference(plan, job, record["settings"] | {"epochs": record["epochs"]})
        if differing:
            return Found("other", f"{path.parent} holds a run with other settings ({differing}): move it away")
        if not record["finished"]:
            return Found("half", f"half-finished in {path.parent}")
        return Found("finished", "finished", result_of(record, path.parent / "history.csv"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return Found("broken", f"{path} is not a run record ({type(error).__name__}: {error}): move it away")


def find(plan, job) -> Found:
    """What there is of a run, in its folder or else among the committed records."""
    found, kept = look_up(plan, job), plan.committed.get(job.name)
    if found.state != "finished" and kept and not difference(plan, job, kept["settings"]):
        return Found("finished", "committed", kept)
    return found


def difference(plan, job, settings) -> str:
    """The first setting in which a record is not this job; "" if it is. A flag younger than the record: its default."""
    defaults = settings_of(plan.parse, ())
    for key, wanted in plan.settings(job).items():
        was = settings.get(key, defaults.get(key))
        if was != wanted:
            return f"--{key} was {was}, is {wanted}"
    return ""


def result_of(record, history_path) -> dict:
    """What is kept of a finished run: no weights, no curves of scores, a thinned history."""
    history = read_history(history_path)
    at = best_epoch(history)
    metrics = {key: column[at] for key, column in history.items()} or numbers(record["final"])
    for part, prefix in (("held_out", "held_out"), ("training_sections", "seen")):
        metrics |= {f"{prefix}_{key}": value for key, value in numbers(record.get(part)).items()}
    scored = record.get("held_out") or record.get("training_sections") or {}
    kept = {key: record.get(key) for key in ("command", "commit", "precision", "receptive_field_px", "parameters")}
    versions = record.get("versions", {})
    return kept | {
        "settings": {k: v for k, v in record["settings"].items() if k not in IGNORED} | {"epochs": record["epochs"]},
        "device": record.get("hardware", {}).get("device"),
        "versions": {
            k: versions[k] for k in ("python", "backend", "keras", "tensorflow", "jax", "torch") if k in versions
        },
        "data": record.get("data", {}).get("image_sha256"),
        "minutes": round(record["training_seconds"] / 60, 2),
        "degenerate": scored.get("degenerate"),
        "metrics": metrics,
        "history": thinned(history, at),
    }


def numbers(scores):
    """The plain numbers of a dict, to six digits."""
    found = (scores or {}).items()
    return {
        k: short(v) for k, v in found if isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v)
    }


def short(value):
    return float(f"{value:.6g}")


def read_history(path) -> dict[str, list]:
    """Columns of history.csv; those without values are left out."""
    if not path.exists():
        return {}
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    columns = {key: [row[key] for row in rows] for key in (rows[0] if rows else ())}
    return {key: [short(float(v)) for v in column] for key, column in columns.items() if all(column)}


def best_epoch(history) -> int:
    """Of the weights that were kept: lowest validation loss, or the last epoch where there is no validation."""
    losses = history.get("val_loss")
    return losses.index(min(losses)) if losses else -1


def thinned(history, best) -> dict:
    """At most `POINTS` epochs, the kept one and the last among them."""
    count = len(history.get("epoch", ()))
    every = math.ceil(count / POINTS) or 1
    kept = sorted({*range(0, count, every), count - 1, best % count}) if count else []
    return {key: [column[i] for i in kept] for key, column in history.items() if key not in ("update", "learning_rate")}


def record_file(folder, table) -> Path:
    return Path(folder) / f"{table.name}{'-quick' * table.quick}.json"


def committed(folder, table) -> dict[str, dict]:
    """Committed results by the name of the run."""
    path = record_file(folder, table)
    if not path.exists():
        return {}
    try:
        rows = json.loads(path.read_text())["rows"]
        ending = "-quick" * table.quick
        return {f"{row}-{key}{ending}": result for row, runs in rows.items() for key, result in runs.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Refused(f"{path} is not a file of records: {type(error).__name__}: {error}.") from error


def collect(plan, folder):
    """Put what is finished into the committed file, one line per run, beside what is there already."""
    path = record_file(folder, plan.table)
    rows = json.loads(path.read_text())["rows"] if path.exists() else {}
    for job in plan.jobs:
        found = look_up(plan, job)
        if found.state == "finished":
            rows.setdefault(job.row.name, {})[job.key] = found.result
    replace_text(path, as_lines(plan.table, rows))


def as_lines(table, rows) -> str:
    """JSON with a line per run, so that a change of one is a change of one line."""
    blocks = []
    for row, runs in sorted(rows.items()):
        lines = [f"  {json.dumps(key)}: {json.dumps(runs[key], separators=(',', ':'))}" for key in sorted(runs)]
        blocks.append(f" {json.dumps(row)}: {{\n" + ",\n".join(lines) + "\n }")
    head = f'{{"table": {json.dumps(table.name)}, "quick": {json.dumps(table.quick)}, "rows": {{\n'
    return head + ",\n".join(blocks) + "\n}}\n"


def replace_text(path, text):
    """Write beside the place and move there: a kill leaves the old file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        beside.write_text(text)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


class Results:
    """The finished runs of a plan, and the words on those that are missing."""

    def __init__(self, plan):
        self.finished, self.missing, absent = [], [], {}
        for job in plan.jobs:
            found = find(plan, job)
            if found.state == "finished":
                self.finished.append((job, found.result))
            elif found.state == "absent":
                absent.setdefault(job.row.name, []).append(job.key)
            else:
                self.missing.append(f"{job.name}: {found.words}")
        self.missing += [f"{row}: no run of {', '.join(keys)}" for row, keys in absent.items()]

    def of(self, row, held_out):
        """{(seed, fold): result} of a row, held-out or published runs."""
        return {
            (job.seed, job.fold): result
            for job, result in self.finished
            if job.row.name == row and (job.protocol != "published") == held_out
        }

    def metric(self, row, name, held_out):
        """{(seed, fold): value}, where the run has it."""
        found = self.of(row, held_out)
        return {key: result["metrics"][name] for key, result in found.items() if name in result["metrics"]}

    def values(self, row, name, held_out):
        return list(self.metric(row, name, held_out).values())
