"""The published tables as rows: a row is a name, a command line, and what is to come of it.

Where the base of the training study differs from the poster's U-Net: the centre is the six convolutions of the 2017
network (undilated, not summed) in place of two, up-sampling is nearest-neighbour with a convolution, every
convolution is followed by batch norm, an epoch is 50 updates of 3 windows, and "augmented" is `--augment all`.
"""

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from files.atomic import DataError
from files.flags import in_words
from studies import comparison

# Of a run's settings: where it is kept and what it runs on, which do not make it another experiment.
IGNORED = (
    *("verb", "run", "argv", "run_dir", "weight_path", "resume", "force", "tensorboard", "gpu", "precision", "recipe"),
    *("distribute", "lr_find", "augment_preview", "steps_per_execution", "minutes"),
)


@dataclass(frozen=True, eq=False)
class Row:
    """One line of a table: a command line, and what is to come of it. Rows of one name are one row."""

    name: str  # of its runs' folders too
    argv: tuple[str, ...]  # without protocol, seed and folders
    minutes: float  # of ONE run: measured on 2 CPU cores if quick, else expected on one H200-class GPU
    published: Mapping[str, float] = field(default_factory=dict)  # by metric
    tolerance: Mapping[str, float] = field(default_factory=dict)  # stated beforehand; a metric without is not judged
    target: Mapping[str, float] = field(default_factory=dict)  # the mean that the held-out runs must reach
    protocols: tuple[str, ...] = ("holdout",)


@dataclass(frozen=True)
class Comparison:
    """ "It makes no difference": row `ours` against row `base`; smaller than `margin` would not matter."""

    words: str
    ours: str
    base: str
    metric: str
    margin: float

    @property
    def held_out(self):
        return self.metric.startswith("held_out")


@dataclass(frozen=True)
class Factor:
    """Levels of one factor: label -> name of the row; `x`, where a score is drawn against a number.

    Levels that are `alike` were scored on the same sections with as many labels: one of them can be chosen.
    """

    name: str
    title: str
    levels: Mapping[str, str]
    chosen: str = ""
    x: str = ""
    metric: str = "held_out_v_rand"
    alike: bool = True


@dataclass(frozen=True)
class Table:
    """Rows, and what is to be said of them; `shown` are the metrics of its held-out runs, if not the usual ones."""

    name: str
    title: str
    rows: tuple[Row, ...]
    quick: bool
    comparisons: tuple[Comparison, ...] = ()
    factors: tuple[Factor, ...] = ()
    note: str = ""
    shown: tuple[str, ...] = ()


# The four rows of the README of 2017, their commands word for word but for the name of the weights, and two between
# them: dilate, dilate_rate, addition; what was published.
ROWS_2017 = {
    "unet": ((0, 1, 1), (0.056, 0.106, 0.985, 0.979)),
    "dilated": ((1, 2, 1), (0.057, 0.111, 0.985, 0.978)),
    "unet-a": ((0, 1, 0), (0.073, 0.0864, 0.981, 0.980)),
    "dilated-a": ((1, 2, 0), (0.0579, 0.114, 0.985, 0.978)),
    "dilate-alone": ((1, 1, 1), ()),
    "dilate_rate-alone": ((0, 2, 1), ()),
}
STATED = {"loss": 0.03, "val_loss": 0.03, "dice": 0.01, "val_dice": 0.01}
STATED_QUICK = {"loss": 0.15, "val_loss": 0.15, "dice": 0.05, "val_dice": 0.05}  # "always interior" misses these
QUICK_2017 = {"epochs": 30, "window": 192, "step_size": 150}  # 300 updates: one whole cycle
HELD_OUT = ("held_out_v_rand", "held_out_dice")
MARGINS = {"held_out_v_rand": 0.005, "held_out_dice": 0.002, "val_loss": 0.01}
MERGED = {"held_out_merged_v_rand": 0.005, "held_out_merged_v_info": 0.002}
PAIRS_2017 = {
    "dilated against standard": ("dilated", "unet"),
    "dilated against standard, no addition": ("dilated-a", "unet-a"),
    "the centre's dilation alone": ("dilate-alone", "unet"),
    "the encoder's dilation alone": ("dilate_rate-alone", "unet"),
}
OLDER = (
    "The committed quick records are older than three changes of the published recipe (RMSprop's epsilon, fresh "
    "validation windows, the head's initialisation; see CHANGELOG.md)."
)


def table_rows(quick: bool) -> Table:
    """The table of 2017, and its two factors one at a time."""
    rows = tuple(row_2017(name, network, values, quick) for name, (network, values) in ROWS_2017.items())
    pairs = comparisons_of(PAIRS_2017, MARGINS)
    return Table("table", "The dilated U-net study of 2017", rows, quick, pairs, note=OLDER * quick)


def comparisons_of(pairs, metrics):
    """Each pair of rows by each metric."""
    margins = MARGINS | MERGED
    return tuple(Comparison(words, *pair, m, margins[m]) for words, pair in pairs.items() for m in metrics)


def row_2017(name, network, values, quick):
    dilate, dilate_rate, addition = network
    recipe = {"lr": "0.00001", "max_lr": "0.01", "epochs": 500, "dilate_rate": dilate_rate, "dilate": dilate}
    argv = in_words(recipe | {"addition": addition} | (QUICK_2017 if quick else {}))
    published = dict(zip(comparison.SHOWN, values, strict=False))
    stated = STATED_QUICK if quick else STATED
    return Row(name, argv, 6, published, stated, protocols=("published", "holdout"))


# `best` and the learning curve are the recipe for one's own sections. The receptive field is half as long, or in quick
# a third as wide. The networks of 2017 have the settings that the recipes had for them.
ADAM_2017 = {"arch": "unet2017", "optimizer": "adam", "max_lr": "1.5e-3", "bn_momentum": 0.99, "average_warmup": 0}
ADAM_2017 |= {"merge": 0, "tta": "none"}
QUICK_ADAM = ADAM_2017 | {"recipe": "quick", "epochs": 5}
STRONG_ADAM = ADAM_2017 | {"recipe": "strong", "augment": "all", "window": 512, "epochs": 80, "ema": 0.999}
LEARNING = STRONG_ADAM | {"epochs": 40, "ema": 0.99}
LEARNING_QUICK = QUICK_ADAM | {"filters": "16,32,64", "window": 192}


def best_rows(quick: bool) -> Table:
    """The strongest recipe, its last weights, rotations averaged, every fold reported."""
    recipe, standard = {"recipe": "quick" if quick else "strong"}, (QUICK_ADAM if quick else STRONG_ADAM) | {"tta": 8}
    other = "broad" if quick else "all"  # than the recipe's own augmentation
    networks = {"best": recipe, f"best-{other}": recipe | {"augment": other}}
    networks |= {"best-standard": standard, "best-dilated": standard | {"dilate": 1, "dilate_rate": 2}}
    minutes = dict.fromkeys(networks, 11 if quick else 6) | dict.fromkeys(("best", f"best-{other}"), 8 if quick else 3)
    wanted = {"v_rand": 0.975} if quick else {"v_rand": 0.985, "v_info": 0.99}
    targets = {"best": {f"held_out_merged_{score}": value for score, value in wanted.items()}}
    rows = tuple(
        Row(name, in_words(how), minutes[name], target=targets.get(name, {}), protocols=("kfold",))
        for name, how in networks.items()
    )
    pairs = {"dilated against standard": ("best-dilated", "best-standard")}
    pairs |= {"the recipe against the standard network": ("best", "best-standard")}
    pair = ("best-broad", "best") if quick else ("best", "best-all")
    compared = comparisons_of({"augmentation broad against all": pair}, (*HELD_OUT, *MERGED))
    compared += comparisons_of(pairs, HELD_OUT)
    return Table("best", "The strongest recipe on held-out sections", rows, quick, compared)


STUDY = {
    **{"filters": "64,128,256,512", "dilate": 0, "dilate_rate": 1, "addition": 0, "dropout": 0},
    **{"window": 512, "epochs": 40, "steps_per_epoch": 50, "augment": "all", "loss": "bce"},
    **{"optimizer": "adam", "clr_mode": "none", "lr": "1e-4"},
}
STUDY_QUICK = {"filters": "16,32,64,128", "window": 192, "steps_per_epoch": 10}
SECTIONS, SECTIONS_X = (1, 2, 5, 10, 24), "labelled training sections"
RECEPTIVE = {"off": "dilation-off", "encoder": "dilation-encoder", "centre": "dilation-centre"}
TUNED = {f"{how}, {n} section{'s' * (n > 1)}": f"{how}-{n}" for n in (1, 2, 5) for how in ("scratch", "finetune")}
# What took the place of the standard network and Adam, one step after the other, on the hardest and the last block.
LADDER = {
    "Adam": {},
    "averages": {"bn_momentum": 0.9, "average_warmup": 1},
    "Muon": {"optimizer": "muon", "max_lr": "4e-3"},
    "residual": {"arch": "resunet", "merge": 1},
}
LADDER_BLOCKS = ("18-23", "24-29")
STEPS = {f"{step}, {block}": f"ladder-{step}-{block}" for block in LADDER_BLOCKS for step in LADDER}
FACTORS = {
    factor.name: factor
    for factor in (
        Factor("depth", "Depth", {"3": "depth-3", "4": "base"}, "4"),
        Factor("augmentation", "Augmentation", {"raw": "raw", "augmented": "base"}, "augmented"),
        Factor("lr", "Learning rate (Adam)", {"1e-5": "lr-1e-5", "1e-4": "base", "1e-3": "lr-1e-3"}, "1e-4"),
        Factor("optimizer", "Optimizer", {"SGD": "sgd", "Adam": "base", "Adamax": "adamax"}, "Adamax"),
        Factor("sections", "Labelled sections", {str(n): f"sections-{n}" for n in SECTIONS}, x=SECTIONS_X, alike=False),
        Factor("receptive", "Receptive field", RECEPTIVE, x="receptive field, px"),
        Factor("ladder", "From the standard network to the recipe", STEPS, alike=False),
        Factor("finetune", "Fine-tuning, on the synthetic stack", TUNED, x=SECTIONS_X, alike=False),
    )
}
POSTER = ("depth", "augmentation", "lr", "optimizer")


def study_rows(quick: bool, factor: str | None = None) -> Table:
    """The levels of one factor, or of the poster's four; the level that is the base is one row for all."""
    factors = tuple(FACTORS[name] for name in ([factor] if factor else POSTER))
    changes = study_changes(quick)
    names = dict.fromkeys(row for f in factors for row in f.levels.values())
    minutes = {"finetune": 4, "ladder": 7, "sections": 6}.get(factor, 2) if quick else 4
    rows = tuple(Row(name, in_words(changes[name]), minutes) for name in names)
    pairs = {f"the {x}'s dilation": (f"dilation-{x}", "dilation-off") for x in ("encoder", "centre")}
    if factor == "finetune":
        pairs = {f"fine-tuning, {n} labelled": (f"finetune-{n}", f"scratch-{n}") for n in (1, 2, 5)}
    if factor == "ladder":
        below = dict(itertools.pairwise(LADDER))
        pairs = {
            f"{step} in place of {under}, {block}": (f"ladder-{step}-{block}", f"ladder-{under}-{block}")
            for block in LADDER_BLOCKS
            for under, step in below.items()
        }
    comparisons = comparisons_of(pairs, HELD_OUT) if factor in ("receptive", "finetune", "ladder") else ()
    title = f"The training study: {FACTORS[factor].title.lower()}" if factor else "The training study"
    shown = (*comparison.BY_FOLD, "held_out_dice") if factor in ("sections", "finetune", "ladder") else ()
    return Table("study", title, rows, quick, comparisons, factors, shown=shown)


def study_changes(quick):
    """Settings of every row of the study, each a base with one setting changed."""
    base = STUDY | (STUDY_QUICK if quick else {})
    strong = LEARNING_QUICK if quick else LEARNING
    curve = {"recipe": "quick" if quick else "strong", "protocol": "holdout"}
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
    rows |= {f"sections-{n}": curve | {"train_sections": spread_over(n, 24)} for n in SECTIONS}
    # As many updates from nothing as from the shipped network, which has never seen this stack.
    same = {"image_path": "synthetic", "protocol": "holdout"}
    same |= {"epochs": 2, "window": 192} if quick else {"epochs": 5}
    starts = {"scratch": {"recipe": "quick"}, "finetune": {"recipe": "finetune", "init_from": "weights/isbi2012"}}
    step = (QUICK_ADAM if quick else STRONG_ADAM) | {"epochs": 3 if quick else 40, "tta": 8}
    for name, change in LADDER.items():
        step = step | change
        rows |= {f"ladder-{name}-{block}": step | {"val_sections": block} for block in LADDER_BLOCKS}
    for how, n in itertools.product(starts, (1, 2, 5)):
        rows[f"{how}-{n}"] = starts[how] | same | {"train_sections": spread_over(n, 24)}
    return rows


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
ADAM = {"batch_norm": True, "optimizer": "adam", "clr_mode": "cosine", "lr": "1e-5", "max_lr": "2e-3", "ema": 0.98}


def unet2015_rows(quick: bool) -> Table:
    """Membranes and touching cells with the network of 2015: as published, with batch norm and Adam, without w0."""
    size, minutes = ({"filters": 16, "epochs": 5}, 4) if quick else ({"epochs": 100}, 12)
    base = {"arch": "unet2015", "tta": 7} | size | {"steps_per_epoch": 100}
    cells = {"recipe": "cells", "image_path": "dic-hela"}
    cells |= {} if quick else {"filters": 64, "epochs": 100, "window": 512}
    published = base | ({"window": 444} if quick else {})
    # batch norm wants several windows, and small ones, which unpadded convolutions would eat up
    membranes = base | ADAM | {"padding": "same", "batch_size": 4, "window": 256}
    rows = (
        Row("isbi-published", in_words(published), minutes),
        Row("isbi", in_words(membranes), minutes, MEMBRANES_2015),
        Row("cells", in_words(cells), minutes, CELLS_2015, target=CELLS_2015),
        Row("cells-flat", in_words(cells | {"w0": 0}), minutes),
    )
    note = (
        "The paper's values are on other data (the challenge's test stack; the Cell Tracking Challenge's test "
        "sequences, whose labels are not public), ours on held-out sections of the training stack and on held-out "
        "frames of sequence 01: beside each other, not against each other. isbi-published is the paper's recipe: "
        "unpadded, one large tile a batch, SGD, no batch norm; the others are padded and have batch norm and Adam. "
        "cells-flat is cells without the border weights (w0 = 0)."
    )
    recipes = {"as published": "isbi-published", "batch norm, Adam": "isbi"}
    borders = {"w0 = 10": "cells", "w0 = 0": "cells-flat"}
    (score,) = CELLS_2015
    factors = (Factor("recipe", "Recipe", recipes), Factor("weights", "Border weights", borders, metric=score))
    weights = Comparison("the border weights", "cells", "cells-flat", score, 0.01)
    shown = ("loss", "val_loss", "held_out_dice", "held_out_v_rand", *MEMBRANES_2015, *CELLS_2015, "held_out_seg")
    return Table("unet2015", "The U-Net of 2015", rows, quick, (weights,), factors, note, shown)


TABLES = {"table": table_rows, "best": best_rows, "study": study_rows, "unet2015": unet2015_rows}


def select(name: str, factor: str | None, quick: bool, only: Sequence[str] | None = None) -> Table:
    """The table that was asked for, with the rows that were asked for."""
    if factor and name != "study":
        raise DataError(f"{factor} is a factor of study: `reproduce study {factor}`. Received: {name}")
    table = study_rows(quick, factor) if name == "study" else TABLES[name](quick)
    by_name = {row.name: row for row in table.rows}
    unknown = [row for row in only or () if row not in by_name]
    if unknown:
        raise DataError(f"--only must name rows of {name}: {', '.join(by_name)}. Received: {', '.join(unknown)}")
    return replace(table, rows=tuple(row for row in table.rows if not only or row.name in only))


# -- the runs of a row --------------------------------------------------------------------------------------------


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
        """The words of a command line: the experiment, kept in `folder`, and resumed if it was begun."""
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
    settings = vars(parse(list(argv))).items()
    return json.loads(json.dumps({key: value for key, value in settings if key not in IGNORED}))


def jobs_of(table: Table, seeds: int, folds: int | None, protocol: str | None) -> list[Job]:
    """Seeds outermost: whenever the work stops, there is as much of the whole table as possible."""
    return [
        Job(row, asked, fold, folds or 5, seed, table.quick)
        for seed in range(seeds)
        for asked in ("published", "holdout", "kfold")
        for row in table.rows
        if asked in protocols_of(row, folds) and protocol in (None, asked)
        for fold in range((folds or 5) if asked == "kfold" else 1)
    ]


def protocols_of(row, folds):
    """--folds turns holdout into k-fold, but not where a row names its training or held-out sections."""
    turned = {"holdout": "kfold"} if folds and not {"--train_sections", "--val_sections"} & {*row.argv} else {}
    return [turned.get(protocol, protocol) for protocol in row.protocols]


# -- what a run costs ---------------------------------------------------------------------------------------------

# Seconds per 512 x 512 px window of a training of the standard network, measured on 2 cores.
SECONDS_PER_WINDOW = {"bfloat16 (AMD EPYC)": 0.70, "float32 (Intel Xeon)": 1.6}
VALIDATION_PART = 1 / 3  # of what a window costs in training
STANDARD_WORK = 3 * 44**2
# times the work that the filters say, measured: 0.37 and 0.55 s for an update of strong and quick
RESIDUAL_BLOCKS = {"bfloat16 (AMD EPYC)": 2.8, "float32 (Intel Xeon)": 1.8}


def cost_words(row: Row, settings: Mapping, quick: bool) -> str:
    """Expected time of one run of a row; on two cores it is measured for the quick rows and computed for the others."""
    if quick:
        return f"{row.minutes:g} minutes on 2 CPU cores"
    hours = equivalent_windows(settings) / 3600
    blocks = RESIDUAL_BLOCKS if settings["arch"] == "resunet" else dict.fromkeys(SECONDS_PER_WINDOW, 1)
    each = {kind: hours * blocks[kind] * seconds for kind, seconds in SECONDS_PER_WINDOW.items()}
    cores = " or ".join(f"{time:.1f} hours in {kind}" for kind, time in each.items())
    return f"{row.minutes:g} minutes on one H200-class GPU, or on 2 CPU cores {cores}"


def equivalent_windows(settings: Mapping) -> float:
    """A run's work, in training windows of 512 x 512 px of the standard network, from its resolved settings.

    The work of a network goes with its filters squared, at every level a quarter of the pixels. `RESIDUAL_BLOCKS` of a
    residual network come on top.
    """
    validation = settings["val_windows"]
    if settings["protocol"] != "published":  # as many windows as cover the inner sections
        inner = 3 if settings["inner_sections"] is None else settings["inner_sections"]
        validation = inner * math.ceil(512 / settings["window"]) ** 2
    an_epoch = settings["steps_per_epoch"] * settings["batch_size"] + VALIDATION_PART * validation
    filters = settings["filters"]
    if settings["arch"] == "unet2015":
        filters = [filters[0] * 2**level for level in range(settings["depth"] + 1)]
    work = sum(count**2 / 4**level for level, count in enumerate(filters))
    return settings["epochs"] * an_epoch * (settings["window"] / 512) ** 2 * work / STANDARD_WORK
