"""Pictures of runs and stacks: arrays and histories -> PNG and GIF, never a model; the one place that draws.

    python figures.py animate --image_path train-volume.tif --mask_path train-labels.tif --output train.gif
    python figures.py curves runs/start --output curves.png
    python figures.py learning_rate runs/start --output learning_rate.png

Every function takes the place to write to after what it draws, replaces the file there as a whole, and returns the
path. Colours are those of Okabe and Ito (doi:10.1038/nmeth.1618), told apart by all common kinds of colour vision;
lines differ in style or marker as well, so that a grey print still reads. matplotlib is imported when the first
figure is drawn, and its global state (pyplot, rcParams) is left alone.
"""

import argparse
import csv
import json
import sys
from functools import partial
from io import BytesIO
from itertools import cycle
from pathlib import Path

import numpy as np

import clr_callback
from files import atomic

BLUE, VERMILLION, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
PURPLE, SKY, BLACK, GREY = "#CC79A7", "#56B4E9", "#000000", "#6E6E6E"

STYLES = (
    (BLUE, "-", "o"),
    (VERMILLION, "--", "s"),
    (GREEN, "-.", "^"),
    (PURPLE, ":", "D"),
    (ORANGE, (0, (7, 2)), "v"),
    (BLACK, (0, (3, 1, 1, 1, 1, 1)), "P"),
    (SKY, (0, (1, 1)), "X"),
)
"""Colour, line style and marker of the first, second, ... line of a figure; past the seventh they repeat."""

WIDTH_IN, DPI = 9.0, 160
"""A figure is 1440 px wide, shown at 900 px or less: 10 pt letters are then 14 px high."""

GIF_PX, GIF_GRAYS, GIF_FRAME_MS = 256, 32, 200
"""Of an animation: height, grays (noise is what costs, and fewer grays are less noise), time of a section."""


# --- training


def curves(history, path):
    """Loss and Dice of training and validation against the epoch, the learning rate below.

    `history` holds one value per epoch, None or NaN where there is none, of any of 'loss', 'val_loss', 'dice',
    'val_dice', and 'lr' or 'learning_rate'; 'epoch' (from 1, as in history.csv) if it does not simply count.
    """
    columns = {name: _floats(values) for name, values in history.items() if name in _CURVE_NAMES}
    columns = {name: values for name, values in columns.items() if np.isfinite(values).any()}
    rows = [names for names in _CURVE_ROWS if any(name in columns for name, _ in names)]
    if not rows:
        raise ValueError(f"history must hold a loss, Dice or rate of an epoch. Received: {sorted(history)}")
    heights = [0.55 if names is _RATE_ROW else 1.0 for names in rows]
    figure = _figure(height_in=2.1 * sum(heights) + 0.7)
    all_axes = figure.subplots(len(rows), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, names in zip(all_axes, rows, strict=True):
        _draw_row(axes, names, columns)
    _mark_best(all_axes[0], columns)
    all_axes[-1].set_xlabel("epoch")
    _whole_numbers(all_axes[-1])
    return _save(figure, path)


_RATE_ROW = (("learning_rate", "learning rate"), ("lr", "learning rate"))
_CURVE_ROWS = (
    (("loss", "training"), ("val_loss", "validation")),
    (("dice", "training"), ("val_dice", "validation")),
    _RATE_ROW,
)
_CURVE_NAMES = {"epoch"} | {name for names in _CURVE_ROWS for name, _ in names}
_ROW_TITLES = {"loss": "loss", "dice": "Dice", "learning_rate": "learning rate"}


def learning_rate(rates, path, *, label="", recorded=None):
    """The learning rate of updates 1..N, titled with the schedule in words.

    `recorded`, (updates, rates), is what a history says was used: dots on the line.
    """
    rates = _floats(rates)
    figure = _figure(height_in=3.0)
    axes = _axes(figure, "update", "learning rate", label)
    axes.plot(np.arange(1, rates.size + 1), rates, color=BLUE, linewidth=1.8, label="schedule")
    if recorded is not None:
        every = max(1, len(recorded[0]) // 25)
        axes.plot(
            *recorded, color=VERMILLION, linestyle="none", marker="o", markersize=6, markevery=every,
            clip_on=False, label="recorded at the end of an epoch",
        )  # fmt: skip
        _legend(axes)
    axes.set_ylim(bottom=0)
    _plain_numbers(axes.yaxis)
    return _save(figure, path)


def lr_find(rates, losses, suggestion, path):
    """Learning-rate range test: the loss of each update against its rate, the suggested range of rates marked."""
    rates, losses = _floats(rates), _floats(losses)
    low, high = suggestion
    figure = _figure(height_in=3.6)
    axes = _axes(figure, "learning rate", "training loss", "")
    axes.set_xscale("log")
    axes.axvspan(low, high, color=SKY, alpha=0.25, linewidth=0, label=f"suggested: {low:.2g} to {high:.2g}")
    for edge in (low, high):
        axes.axvline(edge, color=BLUE, linestyle="--", linewidth=1.2)
    axes.plot(rates, losses, color=BLACK, linewidth=1.6, label="loss")
    axes.set_ylim(*_until_it_diverges(losses))
    _legend(axes)
    return _save(figure, path)


def factor(panels, path, *, xlabel="epoch", title=""):
    """Levels of one factor of a study: mean and spread over runs, one panel per quantity, in pairs from four on.

    `panels` holds per panel, by its title, and per level, by its name, (x, mean, deviation): sequences of one length.
    A level has the same colour, line and marker in every panel; one without a name is left out of the legend.
    """
    levels = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    if not levels:
        raise ValueError(f"panels must hold at least one level. Received: {list(panels)}")
    styles = dict(zip(levels, cycle(STYLES), strict=False))
    columns = len(panels) if len(panels) < 4 else 2
    rows = -(-len(panels) // columns)
    figure = _figure(height_in=3.8 if rows == 1 else 3.0 * rows)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    for axes, (name, lines) in zip(figure.subplots(rows, columns, squeeze=False).flat, panels.items(), strict=False):
        for level, (x, mean, deviation) in lines.items():
            _mean_and_spread(axes, level, _floats(x), _floats(mean), _floats(deviation), styles[level])
        axes.set(xlabel=xlabel)
        axes.set_title(name, loc="left", fontsize=11)
        _tidy(axes)
        _log_if_wide(axes, [_floats(mean) for _, mean, _ in lines.values()])
        _whole_numbers(axes)
        if any(lines):
            _legend(axes)
    return _save(figure, path)


# --- scores


def score_curves(thresholds, curves, path, *, higher_is_better=True):
    """Scores, or errors, by their names against the threshold on the interior probability, the best of each marked."""
    figure = _figure(height_in=4.5)
    label = f"{'score, higher' if higher_is_better else 'error, lower'} is better"
    axes = _axes(figure, "threshold on the interior probability", label, "")
    for (name, values), (colour, line, marker) in zip(curves.items(), cycle(STYLES), strict=False):
        best = int(np.argmax(values) if higher_is_better else np.argmin(values))
        words = f"{name}: best {values[best]:.4g} at {thresholds[best]:.2g}"
        style = {"color": colour, "marker": marker, "linewidth": 1.6}
        axes.plot(thresholds, values, linestyle=line, markersize=4, label=words, **style)
        axes.plot(thresholds[best], values[best], markersize=12, fillstyle="none", markeredgewidth=1.6, **style)
    _legend(axes)
    return _save(figure, path)


def sheet(pictures, path, *, legend=None):
    """Pictures of one section beside each other, by their titles: uint8 of shape (h, w) or (h, w, 3).

    `legend` says what the marks in them mean: (colour, hatch) by words.
    """
    from matplotlib.patches import Patch

    height, width = next(iter(pictures.values())).shape[:2]
    figure = _figure(height_in=WIDTH_IN / len(pictures) * height / width + 0.8)
    grid = figure.subplots(1, len(pictures), squeeze=False)[0]
    for axes, (title, picture) in zip(grid, pictures.items(), strict=True):
        _gray(axes, picture, (0, 255))
        _frame(axes)
        axes.set_title(title, fontsize=10)
    marks = [
        Patch(facecolor="white", edgecolor=colour, hatch=hatch, label=words)
        for words, (colour, hatch) in (legend or {}).items()
    ]
    if marks:
        figure.legend(handles=marks, loc="outside lower center", ncols=len(marks), frameon=False)
    return _save_pictures(figure, path, dpi=DPI)


# --- images


def preview(images, masks, path):
    """What the network will see: windows of shape (N, h, w) with the outline of their masks, 1 = interior.

    One common gray scale, so that changes of brightness and contrast show.
    """
    images, masks = np.asarray(images), np.asarray(masks)
    columns = min(len(images), 4)
    rows = -(-len(images) // columns)
    figure = _figure(height_in=WIDTH_IN / columns * rows * images.shape[1] / images.shape[2])
    grid = figure.subplots(rows, columns, squeeze=False)
    scale = _gray_range(images)
    for axes in grid.flat:
        axes.axis("off")
    for axes, image, mask in zip(grid.flat, images, masks, strict=False):
        _gray(axes, image, scale)
        _outline(axes, mask)
    return _save_pictures(figure, path, dpi=100)


def panel(raw, truth, prediction, path, *, titles=None):
    """Section, labels and prediction side by side, one row per section: the picture of README's first screen.

    Arrays of one shape, (H, W) or (N, H, W): `raw` in any range; `truth`, which may be None, and `prediction` as
    masks, interior probability 0..1, or numbers of cells.
    """
    given = {"section": raw, "labels": truth, "predicted interior probability": prediction}
    shown = {name: _rows(stack) for name, stack in given.items() if stack is not None}
    titles = list(shown if titles is None else titles)
    count, height, width = shown["section"].shape
    figure = _figure(height_in=WIDTH_IN / len(shown) * count * height / width + 0.3)
    grid = figure.subplots(count, len(shown), squeeze=False)
    for row, axes_row in enumerate(grid):
        for axes, (name, stack) in zip(axes_row, shown.items(), strict=True):
            if name == "section":
                _gray(axes, stack[row])
            elif stack.dtype.kind in "iu" and len(np.unique(stack[row])) > 2:
                _instances(axes, stack[row])
            else:
                _gray(axes, stack[row], (0.0, _full_scale(stack[row])))
            _frame(axes)
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=11, pad=5)
    return _save_pictures(figure, path, dpi=DPI)


def weight_map(weights, path, *, image, labels):
    """Weight of every pixel in the loss, beside the image and the instances it comes from, all of shape (H, W)."""
    figure = _figure(height_in=WIDTH_IN / 3.15 * weights.shape[0] / weights.shape[1] + 0.4)
    grid = figure.subplots(1, 3)
    for axes, title in zip(grid, ("image", "instances", "weight in the loss"), strict=True):
        _frame(axes)
        axes.set_title(title, fontsize=11)
    _gray(grid[0], image)
    _instances(grid[1], labels)
    shown = grid[2].imshow(weights, cmap="viridis", interpolation="nearest")
    figure.colorbar(shown, ax=grid[2], fraction=0.046, pad=0.03)
    return _save_pictures(figure, path, dpi=DPI)


def animation(sections, masks, path):
    """GIF that runs through a stack: sections in any range on the left, masks or predictions on the right."""
    from PIL import Image

    scale = _gray_range(sections)
    frames = [Image.fromarray(_frame_pixels(*pair, *scale)) for pair in zip(sections, masks, strict=True)]
    with atomic.replacing(path, force=True) as partial:
        options = {"duration": GIF_FRAME_MS, "loop": 0, "optimize": True}
        frames[0].save(partial, "GIF", save_all=True, append_images=frames[1:], **options)
    return Path(path)


# --- inside


def _save(figure, path):
    """Render lines to PNG; without the Software entry, so that the same data give the same bytes."""
    with atomic.replacing(path, force=True) as partial:
        figure.savefig(partial, dpi=DPI, format="png", metadata={"Software": None})
    return Path(path)


def _save_pictures(figure, path, dpi):
    """Render pictures to PNG with a palette of 256 colours: noise in full colour costs twice the bytes."""
    from PIL import Image

    rendered = BytesIO()
    figure.savefig(rendered, dpi=dpi, format="png", bbox_inches="tight", pad_inches=0.04)
    with Image.open(rendered) as image, atomic.replacing(path, force=True) as partial:
        image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(partial, "PNG", optimize=True)
    return Path(path)


def _figure(height_in):
    """A white figure of README width that lays itself out."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_IN, height_in), facecolor="white", layout="constrained")
    figure.get_layout_engine().set(w_pad=0.07, h_pad=0.07, wspace=0, hspace=0)
    return figure


def _axes(figure, xlabel, ylabel, title):
    """The only axes of a figure of lines."""
    axes = figure.subplots()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.set_title(title, loc="left", fontsize=11)
    _tidy(axes)
    return axes


def _tidy(axes):
    """Light grid, no box."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#D9D9D9", linewidth=0.7)
    axes.set_axisbelow(True)


def _legend(axes):
    """Legend where there is room, on white."""
    axes.legend(frameon=True, framealpha=0.9, edgecolor="none", handlelength=3.0)


def _floats(values):
    """Values as float64, with NaN for None and for the empty fields of a CSV."""
    return np.array([np.nan if value is None or value == "" else float(value) for value in values], dtype=float)


def _draw_row(axes, names, columns):
    """One quantity of the history: training and validation, or the learning rate."""
    present = [(name, label) for name, label in names if name in columns]
    for (name, label), style in zip(present, STYLES, strict=False):
        _line(axes, _epochs(columns, columns[name].size), columns[name], label, style)
    axes.set_ylabel(_ROW_TITLES[names[0][0]])
    _tidy(axes)
    if names is _RATE_ROW:
        _plain_numbers(axes.yaxis)
    else:
        _legend(axes)
    if names[0][0] == "loss":
        _log_if_wide(axes, [columns[name] for name, _ in present])


def _line(axes, x, y, label, style):
    """A line with at most a dozen markers."""
    colour, line, marker = style
    axes.plot(
        x, y, color=colour, linestyle=line, linewidth=1.6, label=label,
        marker=marker, markersize=4.5, markevery=max(1, len(x) // 12),
    )  # fmt: skip


def _mean_and_spread(axes, label, x, mean, deviation, style):
    """A line with its shade, mean - deviation to mean + deviation; an empty label stays out of the legend."""
    axes.fill_between(x, mean - deviation, mean + deviation, color=style[0], alpha=0.18, linewidth=0)
    _line(axes, x, mean, label or "_", style)


def _epochs(columns, count):
    """Epochs counted from 1, as the progress bar counts them."""
    return columns["epoch"] if "epoch" in columns else np.arange(1, count + 1)


def _mark_best(axes, columns):
    """Ring the lowest validation loss: those are the weights that are kept."""
    losses = columns.get("val_loss", np.array([]))
    if not np.isfinite(losses).any():
        return
    best = int(np.nanargmin(losses))
    epoch = _epochs(columns, losses.size)[best]
    axes.plot(
        epoch, losses[best], linestyle="none", marker="o", markersize=11, fillstyle="none", color=BLACK,
        markeredgewidth=1.4, label=f"best: {losses[best]:.4g} in epoch {epoch:.0f}",
    )  # fmt: skip
    _legend(axes)


def _log_if_wide(axes, lines):
    """Losses that span more than a factor of ten are read on a logarithmic axis."""
    values = np.concatenate(lines)
    values = values[np.isfinite(values)]
    if values.size and values.min() > 0 and values.max() > 10 * values.min():
        from matplotlib.ticker import LogLocator, NullLocator

        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        _plain_numbers(axes.yaxis)


def _until_it_diverges(losses):
    """Limits that show the way down to the minimum, and no more of the divergence after it."""
    finite = np.where(np.isfinite(losses), losses, np.inf)
    lowest = int(np.argmin(finite))
    before = finite[: lowest + 1]
    low, high = finite[lowest], before[np.isfinite(before)].max()
    room = 0.15 * (high - low) or 0.05 * abs(low) or 1.0
    return low - room, high + room


def _plain_numbers(axis):
    """Write a tick as 0.01, not as a power or with an offset in the corner."""
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))


def _whole_numbers(axes):
    """No half epochs, not even around a single one."""
    from matplotlib.ticker import MaxNLocator

    left, right = axes.get_xlim()
    if right - left < 1:
        axes.set_xlim(left - 0.5, right + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))


def _rows(stack):
    """One section as a stack of one."""
    stack = np.asarray(stack)
    return stack[None] if stack.ndim == 2 else stack


def _frame(axes):
    """No ticks, a hairline around: a white mask still has a border on a white page."""
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(color=GREY, linewidth=0.6)


def _gray_range(sections):
    """Black and white points: percentiles, so that a few hot pixels do not darken the rest."""
    low, high = np.percentile(np.concatenate([np.ravel(section)[::7] for section in sections]), (0.5, 99.5))
    return (float(low), float(high)) if high > low else (float(low) - 0.5, float(low) + 0.5)


def _gray(axes, image, scale=None):
    """Show a picture in gray between the values for black and white, its own percentiles unless given."""
    low, high = _gray_range([image]) if scale is None else scale
    axes.imshow(image, cmap="gray", vmin=low, vmax=high, interpolation="antialiased")


def _full_scale(mask):
    """The value shown white: 1 in probabilities (rounding allowed) and 0/1 masks, 255 in 8-bit masks."""
    return 255.0 if np.max(mask) > 1.5 else 1.0


def _outline(axes, mask):
    """Draw the border between interior and membrane, if there is one."""
    inside = np.asarray(mask) > 0
    if inside.any() and not inside.all():  # some versions of matplotlib warn of a contour that is nowhere
        axes.contour(inside, levels=[0.5], colors=[ORANGE], linewidths=0.9)


def _instances(axes, labels):
    """Instances in five colours that repeat, on white."""
    from matplotlib.colors import to_rgb
    from skimage.color import label2rgb

    colours = [to_rgb(colour) for colour in (BLUE, ORANGE, GREEN, PURPLE, SKY)]
    axes.imshow(label2rgb(labels, colors=colours, bg_label=0, bg_color=(1, 1, 1)), interpolation="nearest")


def _frame_pixels(section, mask, low, high):
    """One frame of the animation: section, white gap, mask; uint8 of `GIF_GRAYS` values."""
    from PIL import Image

    height, width = np.shape(section)
    size = (max(1, round(width * GIF_PX / height)), GIF_PX)
    method = Image.Resampling.BOX if height > GIF_PX else Image.Resampling.NEAREST
    gray = (np.asarray(section, np.float32) - low) / (high - low), np.asarray(mask, np.float32) / _full_scale(mask)
    shown = (Image.fromarray(np.uint8(np.round(np.clip(picture, 0, 1) * 255))) for picture in gray)
    left, right = (np.asarray(picture.resize(size, method)) for picture in shown)
    levels = np.round(np.hstack([left, np.full((GIF_PX, 4), 255), right]) * ((GIF_GRAYS - 1) / 255))
    return np.uint8(np.round(levels * (255 / (GIF_GRAYS - 1))))


# --- the command line


def main(argv=None):
    """Draw one picture; the exit code is 2 where the input is bad."""
    args = build_parser().parse_args(argv)
    try:
        if Path(args.output).suffix.lower() != args.suffix:
            raise ValueError(f"--output must be a {args.suffix} file. Received: {args.output}")
        path = args.draw(args)
    except (OSError, ValueError) as error:
        print(f"figures.py: {error}", file=sys.stderr)
        return 2
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")
    return 0


def build_parser():
    """The flags of the three verbs; none of them shows a usage where it refuses."""
    silent = partial(argparse.ArgumentParser, usage=argparse.SUPPRESS)
    parser = silent(prog="figures.py", description="Draw runs and stacks; an existing picture is replaced.")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=silent)
    stack = "TIFF stack, or a folder with the challenge's files"
    verb = _verb(verbs, "animate", _animate, ".gif", "sections beside their masks or predictions, as a GIF")
    verb.add_argument("--image_path", required=True, metavar="PATH", help=stack)
    verb.add_argument("--mask_path", required=True, metavar="PATH", help=f"masks or probabilities: {stack}")
    verb.add_argument("--test", action="store_true", help="in a folder, take the test stack, not the training stack")
    verb.add_argument("--every", type=int, default=1, metavar="N", help="show each N-th section (default: 1)")
    verb = _verb(verbs, "curves", _curves, ".png", "loss and Dice against the epoch")
    verb.add_argument("run", metavar="RUN_OR_HISTORY", help="run folder, or its history.csv")
    verb = _verb(verbs, "learning_rate", _learning_rate, ".png", "the learning rate of every update of a run")
    verb.add_argument("run", metavar="RUN_OR_RECORD", help="run folder, or its run.json")
    return parser


def _verb(verbs, name, draw, suffix, words):
    verb = verbs.add_parser(name, help=words)
    verb.add_argument("--output", required=True, metavar=f"FILE{suffix}", help="an existing file is replaced")
    verb.set_defaults(draw=draw, suffix=suffix)
    return verb


def _animate(args):
    """The `animate` verb."""
    if args.every < 1:
        raise ValueError(f"--every must be at least 1. Received: {args.every}")
    sections = _read_stack(args.image_path, "image", args.test)
    masks = _read_stack(args.mask_path, "mask", args.test)
    if masks.shape != sections.shape:
        raise ValueError(f"--mask_path must be of the shape of --image_path, {sections.shape}. Received: {masks.shape}")
    if masks.min() < 0 or masks.max() > 255:
        raise ValueError(f"--mask_path must hold 0..1 or 0..255. Received: {masks.min():g}..{masks.max():g}")
    return animation(sections[:: args.every], masks[:: args.every], args.output)


def _read_stack(text, what, test):
    """Sections of shape (S, H, W) of a stack, or of the challenge's file in a folder."""
    from files import fetching, stacks

    role = {"image": "test", "mask": "test_mask"}[what] if test else what
    inside = Path(text) / fetching.ISBI_ROLES[role]
    path = inside if inside.is_file() else Path(text)
    if not path.exists():
        raise ValueError(f"--{what}_path: {path} does not exist; `dilatedUnet.py fetch isbi2012` prints its folder.")
    sections = stacks.load(stacks.open_stack(path, what)).sections
    return sections.view(np.uint8) if sections.dtype == bool else sections


def _curves(args):
    """The `curves` verb."""
    return curves(read_history(_file_of_run(args.run, "history.csv")), args.output)


def _file_of_run(text, name):
    """The file of that name in a run folder, or the file that was typed."""
    path = Path(text) / name if Path(text).is_dir() else Path(text)
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give a run folder, or its {name}.")
    return path


def read_history(path):
    """Columns of a history.csv, empty fields as NaN."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            names, *rows = [line for line in csv.reader(file) if line]
        return dict(zip(names, map(_floats, zip(*rows, strict=True)), strict=True))
    except (ValueError, csv.Error) as error:
        rule = "must be a history: a line of column names, then a line of numbers for each epoch."
        raise ValueError(f"{path} {rule}") from error


def _learning_rate(args):
    """The `learning_rate` verb: the schedule of the settings, and on it what the history recorded."""
    path = _file_of_run(args.run, "run.json")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        rates, settings = scheduled_rates(record), record["settings"]
        label = f"{settings['clr_mode']}, {settings['lr']:g} to {settings['max_lr']:g}"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        rule = "must be a run record, with epochs and the settings of the learning rate"
        raise ValueError(f"{path} {rule}: {error!r}") from error
    history = path.with_name("history.csv")
    columns = read_history(history) if path.name == "run.json" and history.is_file() else {}
    recorded = (columns["update"], columns["learning_rate"]) if {"update", "learning_rate"} <= set(columns) else None
    return learning_rate(rates, args.output, label=label, recorded=recorded)


def scheduled_rates(record):
    """Learning rate of each update of a run, from its run.json: those done if it has ended, else those planned."""
    settings = record["settings"]
    planned = record["epochs"] * settings["steps_per_epoch"]
    updates = record.get("final", {}).get("update", planned)
    if not 0 < updates <= 10**7:
        raise ValueError(f"the updates must be 1 to 10 million. Received: {updates}")
    low, high, half_cycle = settings["lr"], settings["max_lr"], settings["step_size"]
    warm_up = min(100, planned // 20)
    rate = {
        "none": lambda update: low,
        "cosine": lambda update: clr_callback.cosine(update, low, high, planned, warm_up),
        "triangular": lambda update: clr_callback.triangular(update, low, high, half_cycle),
        "triangular2": lambda update: clr_callback.triangular2(update, low, high, half_cycle),
        "exp_range": lambda update: clr_callback.exp_range(update, low, high, half_cycle, settings["clr_gamma"]),
    }[settings["clr_mode"]]
    return np.array([rate(update) for update in range(updates)])


if __name__ == "__main__":
    sys.exit(main())
