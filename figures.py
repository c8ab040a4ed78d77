"""Pictures of runs and stacks: arrays and histories -> PNG and GIF, never a model; the one place that draws.

    python figures.py animate --image_path train-volume.tif --mask_path train-labels.tif --output train.gif

Every function takes the place to write to after what it draws, replaces the file there as a whole, and returns the
path. matplotlib is imported when the first figure is drawn; its global state (pyplot, rcParams) is left alone.
"""

import argparse
import sys
from functools import partial
from io import BytesIO
from itertools import cycle
from pathlib import Path
from textwrap import fill

import numpy as np

from files import atomic, stacks
from files.flags import file, up_to
from files.sections import MOST_SECTIONS

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

PLAIN = "{x:.3g}"
"""A tick is written as 0.01, not as a power or with an offset in the corner."""

GIF_PX, GIF_GRAYS, GIF_FRAME_MS = 256, 32, 200
"""Of an animation: height, grays (noise is what costs, and fewer grays are less noise), time of a section."""


# --- training


def curves(history, path):
    """Loss and Dice of training and validation against the epoch, the learning rate below.

    `history` holds one value per epoch, None or NaN where there is none, of any of 'loss', 'val_loss', 'dice',
    'val_dice', and 'lr' or 'learning_rate'; 'epoch' (from 1, as in history.csv) if it does not simply count.
    """
    columns = {name: np.array(values, float) for name, values in history.items()}  # None becomes NaN
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


def learning_rate(rates, path, *, label=""):
    """The learning rate of updates 1..N, titled with the schedule in words."""
    figure, axes = _chart(3.0, "update", "learning rate", label)
    axes.plot(np.arange(1, len(rates) + 1), rates, color=BLUE, linewidth=1.8, label="schedule")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(PLAIN)
    return _save(figure, path)


def lr_find(rates, losses, suggestion, path):
    """Learning-rate range test: the loss of each update against its rate, the suggested range of rates marked."""
    low, high = suggestion
    figure, axes = _chart(3.6, "learning rate", "training loss")
    axes.set_xscale("log")
    axes.axvspan(low, high, color=SKY, alpha=0.25, linewidth=0, label=f"suggested: {low:.2g} to {high:.2g}")
    for edge in (low, high):
        axes.axvline(edge, color=BLUE, linestyle="--", linewidth=1.2)
    axes.plot(rates, losses, color=BLACK, linewidth=1.6, label="loss")
    # the way down to the minimum, and no more of the divergence after it
    finite = np.where(np.isfinite(losses), losses, np.inf)
    before = finite[: int(np.argmin(finite)) + 1]
    lowest, highest = before[-1], before[np.isfinite(before)].max()
    room = 0.15 * (highest - lowest) or 0.05 * abs(lowest) or 1.0
    axes.set_ylim(lowest - room, highest + room)
    _legend(axes)
    return _save(figure, path)


def factor(panels, path, *, xlabel="epoch", title=""):
    """Levels of one factor of a study: mean and spread over runs, one panel per quantity.

    `panels` holds per panel, by its title, and per level, by its name, (x, mean, deviation): sequences of one length.
    A level has the same colour, line and marker in every panel; one without a name is left out of the legend.
    """
    levels = dict.fromkeys(name for lines in panels.values() for name in lines)
    styles = dict(zip(levels, cycle(STYLES), strict=False))
    figure = _figure(height_in=3.8)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (name, lines) in zip(all_axes, panels.items(), strict=True):
        for level, (x, mean, deviation) in lines.items():
            x, mean, deviation = (np.array(values, float) for values in (x, mean, deviation))
            axes.fill_between(x, mean - deviation, mean + deviation, color=styles[level][0], alpha=0.18, linewidth=0)
            _line(axes, x, mean, level or "_", styles[level])  # a line named _ is not in the legend
        axes.set(xlabel=xlabel)
        axes.set_title(fill(name, 26), loc="left", fontsize=11)
        _tidy(axes)
        _log_if_wide(axes, [np.array(mean, float) for _, mean, _ in lines.values()])
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
    """What the network will see: windows of shape (N, h, w) with the outline of their masks, 1 = interior, -1 grayed.

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
        if 0 < np.count_nonzero(mask > 0) < mask.size:  # some versions of matplotlib warn of a contour that is nowhere
            axes.contour(mask > 0, levels=[0.5], colors=[ORANGE], linewidths=0.9)
        if (mask < 0).any():
            axes.imshow(np.ma.masked_greater_equal(mask, 0), cmap="gray", vmin=-2, vmax=0, alpha=0.6)
    return _save_pictures(figure, path, dpi=100)


def panel(raw, truth, prediction, path, *, titles):
    """Section, labels and prediction, (H, W) each, side by side: the picture of README's first screen.

    `raw` in any range; `truth` and `prediction` as masks, interior probability 0..1, or numbers of cells, gray where
    they are below 0: not labelled.
    """
    figure, (row,) = _pictures(1, 3, raw.shape, titles)
    _gray(row[0], raw)
    numbered = any(
        each.dtype.kind in "iu" and not set(np.unique(each)) <= {-1, 0, 1, 255} for each in (truth, prediction)
    )
    for axes, shown in zip(row[1:], (truth, prediction), strict=True):
        if numbered and shown.dtype.kind in "iu":
            _instances(axes, shown)
        else:
            full, unlabelled = _full_scale(shown), shown < 0
            _gray(axes, np.where(unlabelled, full / 2, shown) if unlabelled.any() else shown, (0.0, full))
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
    """Render pictures to PNG with a palette of 256 colours: noise in full colour costs three times the bytes."""
    from PIL import Image

    rendered = BytesIO()
    figure.savefig(rendered, dpi=dpi, format="png", bbox_inches="tight", pad_inches=0.04)
    with Image.open(rendered) as image, atomic.replacing(path, force=True) as partial:
        # the colours of few pixels, such as marks, count as much as the grays
        few = image.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=1, dither=Image.Dither.NONE)
        few.save(partial, "PNG", optimize=True)
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


def _draw_row(axes, title, columns, epochs):
    """One quantity of the history: training and validation, or the learning rate."""
    for (name, values), style in zip(columns.items(), STYLES, strict=False):
        x = np.arange(1, values.size + 1) if epochs is None else epochs
        _line(axes, x, values, "validation" if name.startswith("val_") else "training", style)
        if name == "val_loss":  # ring the lowest: those are the weights that are kept
            best = int(np.nanargmin(values))
            axes.plot(
                x[best], values[best], linestyle="none", marker="o", markersize=11, fillstyle="none", color=BLACK,
                markeredgewidth=1.4, label=f"best: {values[best]:.4g} in epoch {x[best]:.0f}",
            )  # fmt: skip
    axes.set_ylabel(title)
    _tidy(axes)
    if title == "loss":
        _log_if_wide(axes, [*columns.values()])
    if title == "learning rate":
        axes.yaxis.set_major_formatter(PLAIN)
    else:
        _legend(axes)


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
        axes.yaxis.set_major_formatter(PLAIN)


def _whole_numbers(axes):
    """No half epochs, not even around a single one."""
    from matplotlib.ticker import MaxNLocator

    left, right = axes.get_xlim()
    if right - left < 1:
        axes.set_xlim(left - 0.5, right + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))


def _gray_range(sections):
    """Black and white points: percentiles, so that a few hot pixels do not darken the rest."""
    few = np.concatenate([np.ravel(section)[::7] for section in sections], dtype=np.float64)
    low, high = np.percentile(few, (0.5, 99.5))
    return (float(low), float(high)) if high > low else (float(low) - 0.5, float(low) + 0.5)


def _gray(axes, image, scale=None):
    """Show a picture in gray between the values for black and white, its own percentiles unless given."""
    low, high = _gray_range([image]) if scale is None else scale
    axes.imshow(image, cmap="gray", vmin=low, vmax=high, interpolation="antialiased")


def _full_scale(mask):
    """The value shown white: 1 in probabilities (rounding allowed) and 0/1 masks, 255 in 8-bit masks."""
    return 255.0 if np.max(mask) > 1.5 else 1.0


def _instances(axes, labels):
    """Instances in five colours that repeat, on white; gray where the labels are below 0."""
    from matplotlib.colors import to_rgb
    from skimage.color import label2rgb

    colours = [to_rgb(colour) for colour in (BLUE, ORANGE, GREEN, PURPLE, SKY)]
    shown = label2rgb(np.maximum(labels, 0), colors=colours, bg_label=0, bg_color=(1, 1, 1))
    shown[labels < 0] = 0.5
    axes.imshow(shown, interpolation="nearest")


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


def build_parser():
    words = "Sections beside their masks or predictions, as a GIF. An existing picture is replaced."
    parser = argparse.ArgumentParser(prog="figures.py", usage=argparse.SUPPRESS, description=words)
    parser.add_argument("verb", choices=("animate",))
    parser.add_argument("--image_path", required=True, metavar="PATH", help="TIFF stack, or folder of sections")
    parser.add_argument("--mask_path", required=True, metavar="PATH", help="masks or probabilities, likewise")
    parser.add_argument(
        "--instances", action="store_true", help="the masks number the cells: in four grays that repeat"
    )
    gif = partial(file, endings=(".gif",))
    parser.add_argument("--output", required=True, type=gif, metavar="FILE.gif", help="the picture")
    parser.add_argument("--every", type=up_to(MOST_SECTIONS), default=1, metavar="N", help="show each N-th section (1)")
    return parser


def main(argv=None):
    """Draw one picture; the exit code is 2 where the input is bad."""
    args = build_parser().parse_args(argv)
    try:
        path = _animate(Path(args.image_path), Path(args.mask_path), args.output, args.every, args.instances)
    except (OSError, ValueError) as error:
        print(f"figures.py: {error}", file=sys.stderr)
        return 2
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")
    return 0


def _animate(images, labels, output, every, instances):
    for flag, path in (("--image_path", images), ("--mask_path", labels)):
        if not path.exists():
            raise ValueError(f"{flag}: {path} does not exist; `dilatedUnet.py fetch isbi2012` prints a folder.")
    atomic.refuse_inputs("--output", output, images, labels)
    sections, masks = (
        stacks.load(stacks.open_stack(path, what)).sections for path, what in ((images, "image"), (labels, "mask"))
    )
    if masks.shape != sections.shape:
        raise ValueError(f"--mask_path must be of the shape of --image_path, {sections.shape}. Received: {masks.shape}")
    if instances:
        masks = np.where(masks > 0, 75 + 60 * (masks % 4), 0)
    if masks.min() < 0 or masks.max() > 255:
        words = f"--mask_path must hold 0..1 or 0..255. Received: {masks.min():g}..{masks.max():g}"
        raise ValueError(f"{words}; numbers of cells need --instances")
    return animation(sections[::every], masks[::every], output)


if __name__ == "__main__":
    from files import shell

    sys.exit(shell.ends(main))
