"""Pictures of runs and stacks: arrays and histories -> PNG and GIF, never a model; the one place that draws.

    python figures.py animate --image_path train-volume.tif --mask_path train-labels.tif --output train.gif
    python figures.py curves runs/start --output curves.png
    python figures.py learning_rate runs/start --output learning_rate.png

Every function takes the place to write to after what it draws, replaces the file there as a whole, and returns the
path. matplotlib is imported when the first figure is drawn; its global state (pyplot, rcParams) is left alone.
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

# Okabe and Ito (doi:10.1038/nmeth.1618): told apart by all common kinds of colour vision
BLUE, VERMILLION, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
PURPLE, SKY, BLACK, GREY = "#CC79A7", "#56B4E9", "#000000", "#6E6E6E"

STYLES = tuple(
    zip(
        (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, BLACK, SKY),
        ("-", "--", "-.", ":", (0, (7, 2)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 1))),
        "os^DvPX",
        strict=True,
    )
)
"""Colour, line style and marker of a figure's lines, so that a gray print still reads; past the seventh they repeat."""

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
    columns = {name: _floats(values) for name, values in history.items()}
    columns = {name: values for name, values in columns.items() if np.isfinite(values).any()}
    rows = {title: [name for name in names if name in columns] for title, names in _CURVES.items()}
    rows = {title: names for title, names in rows.items() if names}
    if not rows:
        raise ValueError(f"history must hold a loss, Dice or rate of an epoch. Received: {sorted(history)}")
    heights = [0.55 if title == "learning rate" else 1.0 for title in rows]
    figure = _figure(height_in=2.1 * sum(heights) + 0.7)
    all_axes = figure.subplots(len(rows), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (title, names) in zip(all_axes, rows.items(), strict=True):
        _draw_row(axes, title, {name: columns[name] for name in names}, columns.get("epoch"))
    all_axes[-1].set_xlabel("epoch")
    _whole_numbers(all_axes[-1])
    return _save(figure, path)


_CURVES = {"loss": ("loss", "val_loss"), "Dice": ("dice", "val_dice"), "learning rate": ("learning_rate", "lr")}


def learning_rate(rates, path, *, label="", recorded=None):
    """The learning rate of updates 1..N, titled with the schedule in words.

    `recorded`, (updates, rates), is what a history says was used: dots on the line.
    """
    rates = _floats(rates)
    figure, axes = _chart(3.0, "update", "learning rate", label)
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
    figure, axes = _chart(3.6, "learning rate", "training loss")
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
            x, mean, deviation = map(_floats, (x, mean, deviation))
            axes.fill_between(x, mean - deviation, mean + deviation, color=styles[level][0], alpha=0.18, linewidth=0)
            _line(axes, x, mean, level or "_", styles[level])  # a line named _ is not in the legend
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
    label = f"{'score, higher' if higher_is_better else 'error, lower'} is better"
    figure, axes = _chart(4.5, "threshold on the interior probability", label)
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

    figure, (row,) = _pictures(1, len(pictures), next(iter(pictures.values())).shape, pictures, room_in=0.8)
    for axes, picture in zip(row, pictures.values(), strict=True):
        _gray(axes, picture, (0, 255))
    marks = [
        Patch(facecolor="white", edgecolor=colour, hatch=hatch, label=words)
        for words, (colour, hatch) in (legend or {}).items()
    ]
    if marks:
        figure.legend(handles=marks, loc="outside lower center", ncols=len(marks), frameon=False)
    return _save_pictures(figure, path)


# --- images


def preview(images, masks, path):
    """What the network will see: windows of shape (N, h, w) with the outline of their masks, 1 = interior.

    One common gray scale, so that changes of brightness and contrast show.
    """
    images, masks = np.asarray(images), np.asarray(masks)
    columns = min(len(images), 4)
    rows = -(-len(images) // columns)
    figure, grid = _pictures(rows, columns, images.shape[1:])
    scale = _gray_range(images)
    for axes in grid.flat[len(images) :]:
        axes.axis("off")
    for axes, image, mask in zip(grid.flat, images, masks, strict=False):
        _gray(axes, image, scale)
        if 0 < np.count_nonzero(mask) < mask.size:  # some versions of matplotlib warn of a contour that is nowhere
            axes.contour(mask > 0, levels=[0.5], colors=[ORANGE], linewidths=0.9)
    return _save_pictures(figure, path, dpi=100)


def panel(raw, truth, prediction, path, *, titles=None):
    """Section, labels and prediction side by side, one row per section: the picture of README's first screen.

    Arrays of one shape, (H, W) or (N, H, W): `raw` in any range; `truth`, which may be None, and `prediction` as
    masks, interior probability 0..1, or numbers of cells.
    """
    given = {"section": raw, "labels": truth, "predicted interior probability": prediction}
    shown = {name: np.reshape(stack, (-1, *np.shape(stack)[-2:])) for name, stack in given.items() if stack is not None}
    count, *shape = shown["section"].shape
    figure, grid = _pictures(count, len(shown), shape, shown if titles is None else titles)
    for row, axes_row in enumerate(grid):
        for axes, (name, stack) in zip(axes_row, shown.items(), strict=True):
            if name == "section":
                _gray(axes, stack[row])
            elif stack.dtype.kind in "iu" and len(np.unique(stack[row])) > 2:
                _instances(axes, stack[row])
            else:
                _gray(axes, stack[row], (0.0, _full_scale(stack[row])))
    return _save_pictures(figure, path)


def weight_map(weights, path, *, image, labels):
    """Weight of every pixel in the loss, beside the image and the instances it comes from, all of shape (H, W)."""
    titles = ("image", "instances", "weight in the loss")
    figure, (grid,) = _pictures(1, 3, weights.shape, titles)
    _gray(grid[0], image)
    _instances(grid[1], labels)
    shown = grid[2].imshow(weights, cmap="viridis", interpolation="nearest")
    figure.colorbar(shown, ax=grid[2], fraction=0.046, pad=0.03)
    return _save_pictures(figure, path)


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


def _save_pictures(figure, path, dpi=DPI):
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


def _chart(height_in, xlabel, ylabel, title=""):
    """A figure of lines, and its only axes."""
    figure = _figure(height_in)
    axes = figure.subplots()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.set_title(title, loc="left", fontsize=11)
    _tidy(axes)
    return figure, axes


def _pictures(rows, columns, shape, titles=(), room_in=0.4):
    """A figure of framed pictures of shape (h, w), titles above the first row; its axes, a row of them for each row."""
    figure = _figure(WIDTH_IN / columns * rows * shape[0] / shape[1] + room_in)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():  # a hairline: a white mask still has a border on a white page
            spine.set(color=GREY, linewidth=0.6)
    for axes, title in zip(grid[0], titles, strict=False):
        axes.set_title(title, fontsize=11)
    return figure, grid


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


def _draw_row(axes, title, columns, epochs):
    """One quantity of the history: training and validation, or the learning rate."""
    for (name, values), style in zip(columns.items(), STYLES, strict=False):
        x = np.arange(1, values.size + 1) if epochs is None else epochs
        _line(axes, x, values, "validation" if name.startswith("val_") else "training", style)
        if name == "val_loss":
            _mark_best(axes, x, values)
    axes.set_ylabel(title)
    _tidy(axes)
    if title == "loss":
        _log_if_wide(axes, [*columns.values()])
    if title == "learning rate":
        _plain_numbers(axes.yaxis)
    else:
        _legend(axes)


def _mark_best(axes, epochs, losses):
    """Ring the lowest validation loss: those are the weights that are kept."""
    best = int(np.nanargmin(losses))
    axes.plot(
        epochs[best], losses[best], linestyle="none", marker="o", markersize=11, fillstyle="none", color=BLACK,
        markeredgewidth=1.4, label=f"best: {losses[best]:.4g} in epoch {epochs[best]:.0f}",
    )  # fmt: skip


def _line(axes, x, y, label, style):
    """A line with at most a dozen markers."""
    colour, line, marker = style
    axes.plot(
        x, y, color=colour, linestyle=line, linewidth=1.6, label=label,
        marker=marker, markersize=4.5, markevery=max(1, len(x) // 12),
    )  # fmt: skip


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
    for name, draw, suffix, words in (
        ("animate", _animate, ".gif", "sections beside their masks or predictions, as a GIF"),
        ("curves", _curves, ".png", "loss and Dice against the epoch"),
        ("learning_rate", _learning_rate, ".png", "the learning rate of every update of a run"),
    ):
        verb = verbs.add_parser(name, help=words)
        verb.add_argument("--output", required=True, metavar=f"FILE{suffix}", help="an existing file is replaced")
        verb.set_defaults(draw=draw, suffix=suffix)
        if draw is not _animate:
            verb.add_argument("run", help="run folder, or its history.csv (curves) or run.json (learning_rate)")
            continue
        verb.add_argument("--image_path", required=True, metavar="PATH", help=stack)
        verb.add_argument("--mask_path", required=True, metavar="PATH", help=f"masks or probabilities: {stack}")
        verb.add_argument(
            "--test", action="store_true", help="in a folder, take the test stack, not the training stack"
        )
        verb.add_argument("--every", type=int, default=1, metavar="N", help="show each N-th section (default: 1)")
    return parser


def _animate(args):
    if args.every < 1:
        raise ValueError(f"--every must be at least 1. Received: {args.every}")
    sections = _read_stack(args.image_path, "image", args)
    masks = _read_stack(args.mask_path, "mask", args)
    if masks.shape != sections.shape:
        raise ValueError(f"--mask_path must be of the shape of --image_path, {sections.shape}. Received: {masks.shape}")
    if masks.min() < 0 or masks.max() > 255:
        raise ValueError(f"--mask_path must hold 0..1 or 0..255. Received: {masks.min():g}..{masks.max():g}")
    return animation(sections[:: args.every], masks[:: args.every], args.output)


def _read_stack(text, what, args):
    """Sections of shape (S, H, W) of a stack, or of the challenge's file in a folder."""
    from files import fetching, stacks

    role = {"image": "test", "mask": "test_mask"}[what] if args.test else what
    inside = Path(text) / fetching.ISBI_ROLES[role]
    path = inside if inside.is_file() else Path(text)
    if not path.exists():
        raise ValueError(f"--{what}_path: {path} does not exist; `dilatedUnet.py fetch isbi2012` prints its folder.")
    _refuse_input(args, path)
    sections = stacks.load(stacks.open_stack(path, what)).sections
    return sections.view(np.uint8) if sections.dtype == bool else sections


def _curves(args):
    return curves(read_history(_file_of_run(args, "history.csv")), args.output)


def _refuse_input(args, path):
    """The picture must not replace the file it is made from; it may lie beside it."""
    if path.is_file():
        atomic.refuse_inputs("--output", args.output, path)


def _file_of_run(args, name):
    """The file of that name in a run folder, or the file that was typed."""
    path = Path(args.run) / name if Path(args.run).is_dir() else Path(args.run)
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give a run folder, or its {name}.")
    _refuse_input(args, path)
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
    """The schedule of the settings, and on it what the history recorded."""
    path = _file_of_run(args, "run.json")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        rates, settings = scheduled_rates(record), record["settings"]
        label = f"{settings['clr_mode']}, {settings['lr']:g} to {settings['max_lr']:g}"
    except (ArithmeticError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
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
    keys = ("clr_mode", "lr", "max_lr", "step_size", "clr_gamma")
    rate = clr_callback.rate_of(*map(settings.get, keys), planned)
    return np.array([rate(update) for update in range(updates)])


if __name__ == "__main__":
    from files import shell

    sys.exit(shell.ends(main))
