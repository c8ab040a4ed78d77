"""Pictures of runs and stacks: arrays and histories -> PNG and GIF, never a model.

    python figures.py animate --image_path train-volume.tif --mask_path train-labels.tif --output train.gif
    python figures.py curves runs/start --output curves.png
    python figures.py learning_rate runs/start --output learning_rate.png

Every function takes the place to write to last of what it needs, writes beside it, moves the finished file
there, and returns the path. The `draw_...` functions make the matplotlib figure without saving it. Colours
are those of Okabe and Ito (2008), told apart by all common kinds of colour vision; lines differ in style or
marker as well, so that a grey print still reads. matplotlib is imported when the first figure is drawn, and
its global state (pyplot, rcParams) is left alone.
"""

import argparse
import csv
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
"""Colour, line style and marker of the first, second, ... line of a figure."""

WIDTH_IN, DPI = 9.0, 160
"""A figure is 1440 px wide, shown at 900 px or less: 10 pt letters are then 14 px high."""

GIF_BYTES = 2_500_000
"""Largest animation, in bytes: what a README loads without a wait."""


# Training


def curves(history: Mapping[str, Sequence[float]], path: str | Path) -> Path:
    """Loss and Dice of training and validation against the epoch, the learning rate below.

    Parameters
    ----------
    history : mapping of str to sequence of float
        Columns of the history, one value per epoch: any of 'loss', 'val_loss', 'dice', 'val_dice', and 'lr'
        or 'learning_rate'; 'epoch' (from 1, as in history.csv) if it does not simply count. Values that are
        missing may be None or NaN.
    path : path-like
        PNG to write.
    """
    return _save(draw_curves(history), path)


def draw_curves(history: Mapping[str, Sequence[float]]) -> "Figure":
    """Figure of `curves`."""
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
    return figure


_RATE_ROW = (("learning_rate", "learning rate"), ("lr", "learning rate"))
_CURVE_ROWS = (
    (("loss", "training"), ("val_loss", "validation")),
    (("dice", "training"), ("val_dice", "validation")),
    _RATE_ROW,
)
_CURVE_NAMES = {"epoch"} | {name for names in _CURVE_ROWS for name, _ in names}
_ROW_TITLES = {"loss": "loss", "dice": "Dice", "learning_rate": "learning rate"}


def learning_rate(
    rates: Sequence[float],
    path: str | Path,
    *,
    label: str = "",
    recorded: tuple[Sequence[float], Sequence[float]] | None = None,
) -> Path:
    """The learning rate of every update.

    Parameters
    ----------
    rates : sequence of float of length N
        Rate used by updates 1..N.
    path : path-like
        PNG to write.
    label : str, optional
        What the schedule is, in words; the figure's title.
    recorded : (updates, rates), optional
        What a history says was used, as dots on the line.
    """
    return _save(draw_learning_rate(rates, label=label, recorded=recorded), path)


def draw_learning_rate(
    rates: Sequence[float], *, label: str = "", recorded: tuple[Sequence[float], Sequence[float]] | None = None
) -> "Figure":
    """Figure of `learning_rate`."""
    rates = _floats(rates)
    if not rates.size:
        raise ValueError("rates must hold at least one update. Received: 0")
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
    return figure


def lr_find(rates: Sequence[float], losses: Sequence[float], suggestion: tuple[float, float], path: str | Path) -> Path:
    """Learning-rate range test: the loss against the rate, with the suggested range marked.

    Parameters
    ----------
    rates, losses : sequence of float of length N
        Rate (positive) and loss of each update; a loss that is not finite is left out.
    suggestion : tuple of float
        Base and maximal rate that the test suggests.
    path : path-like
        PNG to write.
    """
    return _save(draw_lr_find(rates, losses, suggestion), path)


def draw_lr_find(rates: Sequence[float], losses: Sequence[float], suggestion: tuple[float, float]) -> "Figure":
    """Figure of `lr_find`."""
    rates, losses = _floats(rates), _floats(losses)
    if rates.shape != losses.shape or not np.isfinite(losses).any():
        counts = f"{rates.size} rates, {losses.size} losses, {np.isfinite(losses).sum()} of them finite"
        raise ValueError(f"rates and losses must be equally many, one finite at least. Received: {counts}")
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
    return figure


def factor(
    panels: Mapping[str, Mapping[str, tuple]], path: str | Path, *, xlabel: str = "epoch", title: str = ""
) -> Path:
    """Levels of one factor of a study: mean and spread over runs, one panel per quantity, in pairs from four on.

    Parameters
    ----------
    panels : mapping of str to mapping of str to (x, mean, deviation)
        Per panel, by its title, and per level, by its name: three sequences of float of one length. A level has
        the same colour, line and marker in every panel; one without a name is left out of the legend.
    path : path-like
        PNG to write.
    xlabel : str
        What x is.
    title : str
        Of the figure: the factor, and whether its runs were reduced ones.
    """
    return _save(draw_factor(panels, xlabel=xlabel, title=title), path)


def draw_factor(panels: Mapping[str, Mapping[str, tuple]], *, xlabel: str = "epoch", title: str = "") -> "Figure":
    """Figure of `factor`."""
    levels = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    if not levels:
        raise ValueError(f"panels must hold at least one level. Received: {list(panels)}")
    styles = dict(zip(levels, _styles(len(levels)), strict=True))
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
    return figure


def score_curves(thresholds: Sequence[float], curves: Mapping[str, Sequence[float]], path: str | Path) -> Path:
    """Scores against the threshold, the best of each marked and named.

    Parameters
    ----------
    thresholds : sequence of float of length T
        Thresholds on the interior probability.
    curves : mapping of str to sequence of float of length T
        One line per score, by its name; a score without a finite value is left out.
    path : path-like
        PNG to write.
    """
    return _save(draw_score_curves(thresholds, curves), path)


def draw_score_curves(thresholds: Sequence[float], curves: Mapping[str, Sequence[float]]) -> "Figure":
    """Figure of `score_curves`."""
    thresholds = _floats(thresholds)
    figure = _figure(height_in=3.8)
    axes = _axes(figure, "threshold on the interior probability", "score", "")
    for (name, values), (colour, line, marker) in zip(curves.items(), _styles(len(curves)), strict=True):
        scores = _floats(values)
        if not np.isfinite(scores).any():
            continue
        best = int(np.nanargmax(scores))
        label = f"{name}: best {scores[best]:.4f} at {thresholds[best]:.2g}"
        style = {"color": colour, "marker": marker, "linewidth": 1.6}
        axes.plot(thresholds, scores, linestyle=line, markersize=4, label=label, **style)
        axes.plot(thresholds[best], scores[best], markersize=12, fillstyle="none", markeredgewidth=1.6, **style)
    _legend(axes)
    return figure


# Images


def preview(images: np.ndarray, masks: np.ndarray, path: str | Path) -> Path:
    """What the network will see: windows with the outline of their masks.

    Parameters
    ----------
    images, masks : ndarray of shape (N, h, w)
        Windows in any range, drawn on one common gray scale so that changes of brightness and contrast show,
        and their masks, 1 = interior.
    path : path-like
        PNG to write.
    """
    return _save_pictures(draw_preview(images, masks), path, dpi=100)


def draw_preview(images: np.ndarray, masks: np.ndarray) -> "Figure":
    """Figure of `preview`."""
    images, masks = np.asarray(images), np.asarray(masks)
    if images.ndim != 3 or images.shape != masks.shape or not len(images):
        shapes = f"{images.shape} and {masks.shape}"
        raise ValueError(f"images and masks must be of one shape (N, h, w). Received: {shapes}")
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
    return figure


def panel(
    raw: np.ndarray,
    truth: np.ndarray | None,
    prediction: np.ndarray,
    path: str | Path,
    *,
    titles: Sequence[str] | None = None,
) -> Path:
    """Section, labels and prediction side by side, one row per section: the picture of README's first screen.

    Parameters
    ----------
    raw : ndarray of shape (H, W) or (N, H, W)
        Sections, in any range.
    truth : ndarray of the same shape, or None
        Labels, 1 = interior; left out if None.
    prediction : ndarray of the same shape
        Interior probability 0..1, or a mask.
    path : path-like
        PNG to write.
    titles : sequence of str, optional
        Captions of the columns.
    """
    return _save_pictures(draw_panel(raw, truth, prediction, titles=titles), path, dpi=DPI)


def draw_panel(
    raw: np.ndarray, truth: np.ndarray | None, prediction: np.ndarray, *, titles: Sequence[str] | None = None
) -> "Figure":
    """Figure of `panel`."""
    names = ["section", "labels", "predicted interior probability"]
    stacks = [raw, truth, prediction]
    shown = [(name, _rows(stack)) for name, stack in zip(names, stacks, strict=True) if stack is not None]
    titles = [name for name, _ in shown] if titles is None else list(titles)
    shapes = [stack.shape for _, stack in shown]
    if len(set(shapes)) > 1 or len(titles) != len(shown):
        received = f"{shapes} and {titles}"
        raise ValueError(f"panel must get arrays of one shape and a title for each. Received: {received}")
    count, height, width = shapes[0]
    figure = _figure(height_in=WIDTH_IN / len(shown) * count * height / width + 0.3)
    grid = figure.subplots(count, len(shown), squeeze=False)
    for row, axes_row in enumerate(grid):
        for axes, (name, stack) in zip(axes_row, shown, strict=True):
            if name == "section":
                _gray(axes, stack[row])
            elif _numbers_instances(stack[row]):
                _instances(axes, stack[row])
            else:
                _gray(axes, stack[row], (0.0, _full_scale(stack[row])))
            _frame(axes)
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=11, pad=5)
    return figure


def weight_map(
    weights: np.ndarray,
    path: str | Path,
    *,
    image: np.ndarray | None = None,
    labels: np.ndarray | None = None,
) -> Path:
    """Weight of every pixel in the loss, beside the image and the instances it comes from.

    Parameters
    ----------
    weights : ndarray of shape (H, W)
        Non-negative.
    path : path-like
        PNG to write.
    image : ndarray of shape (H, W), optional
        The raw section.
    labels : ndarray of shape (H, W), optional
        Instances, 0 = background; drawn as outlines on the image, or alone in colours that repeat.
    """
    return _save_pictures(draw_weight_map(weights, image=image, labels=labels), path, dpi=DPI)


def draw_weight_map(
    weights: np.ndarray, *, image: np.ndarray | None = None, labels: np.ndarray | None = None
) -> "Figure":
    """Figure of `weight_map`."""
    weights = np.asarray(weights, dtype=float)
    given = [picture for picture in (image, labels) if picture is not None]
    if weights.ndim != 2 or any(np.shape(picture) != weights.shape for picture in given):
        shapes = [np.shape(picture) for picture in (weights, *given)]
        raise ValueError(f"weights, image and labels must be of one shape (H, W). Received: {shapes}")
    figure = _figure(height_in=WIDTH_IN / (len(given) + 1.15) * weights.shape[0] / weights.shape[1] + 0.4)
    grid = figure.subplots(1, len(given) + 1, squeeze=False)[0]
    for axes in grid:
        _frame(axes)
    if image is not None:
        _gray(grid[0], image)
        grid[0].set_title("image", fontsize=11)
    if labels is not None:
        _instances(grid[-2], np.asarray(labels))
        grid[-2].set_title("instances", fontsize=11)
    shown = grid[-1].imshow(weights, cmap="viridis", interpolation="nearest")
    grid[-1].set_title("weight in the loss", fontsize=11)
    figure.colorbar(shown, ax=grid[-1], fraction=0.046, pad=0.03)
    return figure


def animation(
    sections: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
    path: str | Path,
    *,
    height: int = 256,
    frame_ms: int = 200,
) -> Path:
    """GIF that runs through a stack, sections on the left, masks or predictions on the right.

    Parameters
    ----------
    sections, masks : sequence of ndarray of shape (H, W)
        Equally many; sections in any range, masks 0..1 or 0..255.
    path : path-like
        GIF to write.
    height : int, default=256
        Of a frame, in pixels.
    frame_ms : int, default=200
        How long a section is shown, in milliseconds.
    """
    if len(sections) != len(masks) or not len(sections):
        counts = f"{len(sections)} and {len(masks)}"
        raise ValueError(f"sections and masks must be equally many, one at least. Received: {counts}")
    low, high = _gray_range(sections)
    frames = [_frame_pixels(*pair, low, high, height) for pair in zip(sections, masks, strict=True)]
    return _replace(path, lambda file: file.write(_small_gif(frames, frame_ms)))


# Inside


def _replace(path: str | Path, write: Callable[[BinaryIO], Any]) -> Path:
    """Write beside the place, then move there: whoever looks sees the old file or the new one."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(beside, "wb") as file:
            write(file)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return path


def _save(figure: "Figure", path: str | Path) -> Path:
    """Render lines to PNG; without the Software entry, so that the same data give the same bytes."""
    return _replace(path, lambda file: figure.savefig(file, dpi=DPI, format="png", metadata={"Software": None}))


def _save_pictures(figure: "Figure", path: str | Path, dpi: int) -> Path:
    """Render pictures to PNG with a palette of 256 colours: noise in full colour costs twice the bytes."""
    from PIL import Image

    rendered = BytesIO()
    figure.savefig(rendered, dpi=dpi, format="png", bbox_inches="tight", pad_inches=0.04)
    with Image.open(rendered) as image:
        reduced = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    return _replace(path, lambda file: reduced.save(file, "PNG", optimize=True))


def _figure(height_in: float) -> "Figure":
    """A white figure of README width that lays itself out."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_IN, height_in), facecolor="white", layout="constrained")
    figure.get_layout_engine().set(w_pad=0.07, h_pad=0.07, wspace=0, hspace=0)
    return figure


def _axes(figure: "Figure", xlabel: str, ylabel: str, title: str) -> "Axes":
    """The only axes of a figure of lines."""
    axes = figure.subplots()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.set_title(title, loc="left", fontsize=11)
    _tidy(axes)
    return axes


def _tidy(axes: "Axes") -> None:
    """Light grid, no box."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#D9D9D9", linewidth=0.7)
    axes.set_axisbelow(True)


def _legend(axes: "Axes") -> None:
    """Legend where there is room, on white."""
    axes.legend(frameon=True, framealpha=0.9, edgecolor="none", handlelength=3.0)


def _styles(count: int) -> list[tuple]:
    """As many styles as lines; past the seventh they repeat."""
    return [STYLES[i % len(STYLES)] for i in range(count)]


def _floats(values: Sequence[float | None]) -> np.ndarray:
    """Values as float64, with NaN for None and for the empty fields of a CSV."""
    return np.array([np.nan if value is None or value == "" else float(value) for value in values], dtype=float)


def _draw_row(axes: "Axes", names: Sequence[tuple[str, str]], columns: Mapping[str, np.ndarray]) -> None:
    """One quantity of the history: training and validation, or the learning rate."""
    present = [(name, label) for name, label in names if name in columns]
    for (name, label), (colour, line, marker) in zip(present, _styles(len(present)), strict=True):
        values = columns[name]
        every = max(1, values.size // 12)
        axes.plot(
            _epochs(columns, values.size), values, color=colour, linestyle=line, linewidth=1.6,
            marker=marker, markersize=4.5, markevery=every, label=label,
        )  # fmt: skip
    axes.set_ylabel(_ROW_TITLES[names[0][0]])
    _tidy(axes)
    if names is _RATE_ROW:
        _plain_numbers(axes.yaxis)
    else:
        _legend(axes)
    if names[0][0] == "loss":
        _log_if_wide(axes, [columns[name] for name, _ in present])


def _mean_and_spread(axes: "Axes", label: str, x, mean, deviation, style: tuple) -> None:
    """A line with its shade, mean - deviation to mean + deviation; an empty label stays out of the legend."""
    colour, line, marker = style
    axes.fill_between(x, mean - deviation, mean + deviation, color=colour, alpha=0.18, linewidth=0)
    axes.plot(
        x, mean, color=colour, linestyle=line, linewidth=1.6, label=label or "_",
        marker=marker, markersize=4.5, markevery=max(1, x.size // 12),
    )  # fmt: skip


def _epochs(columns: Mapping[str, np.ndarray], count: int) -> np.ndarray:
    """Epochs counted from 1, as the progress bar counts them."""
    return columns["epoch"] if "epoch" in columns else np.arange(1, count + 1)


def _mark_best(axes: "Axes", columns: Mapping[str, np.ndarray]) -> None:
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


def _log_if_wide(axes: "Axes", lines: Sequence[np.ndarray]) -> None:
    """Losses that span more than a factor of ten are read on a logarithmic axis."""
    values = np.concatenate(lines)
    values = values[np.isfinite(values)]
    if values.size and values.min() > 0 and values.max() > 10 * values.min():
        from matplotlib.ticker import LogLocator, NullLocator

        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        _plain_numbers(axes.yaxis)


def _until_it_diverges(losses: np.ndarray) -> tuple[float, float]:
    """Limits that show the way down to the minimum, and no more of the divergence after it."""
    finite = np.where(np.isfinite(losses), losses, np.inf)
    lowest = int(np.argmin(finite))
    before = finite[: lowest + 1]
    low, high = finite[lowest], before[np.isfinite(before)].max()
    room = 0.15 * (high - low) or 0.05 * abs(low) or 1.0
    return low - room, high + room


def _plain_numbers(axis) -> None:
    """Write a tick as 0.01, not as a power or with an offset in the corner."""
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))


def _whole_numbers(axes: "Axes") -> None:
    """No half epochs, not even around a single one."""
    from matplotlib.ticker import MaxNLocator

    left, right = axes.get_xlim()
    if right - left < 1:
        axes.set_xlim(left - 0.5, right + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))


def _rows(stack: np.ndarray) -> np.ndarray:
    """One section as a stack of one."""
    stack = np.asarray(stack)
    return stack[None] if stack.ndim == 2 else stack


def _frame(axes: "Axes") -> None:
    """No ticks, a hairline around: a white mask still has a border on a white page."""
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(color=GREY, linewidth=0.6)


def _gray_range(sections) -> tuple[float, float]:
    """Black and white points: percentiles, so that a few hot pixels do not darken the rest."""
    low, high = np.percentile(np.concatenate([np.ravel(section)[::7] for section in sections]), (0.5, 99.5))
    return (float(low), float(high)) if high > low else (float(low) - 0.5, float(low) + 0.5)


def _gray(axes: "Axes", image: np.ndarray, scale: tuple[float, float] | None = None) -> None:
    """Show a picture in gray between the values for black and white, its own percentiles unless given."""
    low, high = _gray_range([image]) if scale is None else scale
    axes.imshow(image, cmap="gray", vmin=low, vmax=high, interpolation="antialiased")


def _full_scale(mask: np.ndarray) -> float:
    """The value shown white: 1 in probabilities (rounding allowed) and 0/1 masks, 255 in 8-bit masks."""
    return 255.0 if np.max(mask) > 1.5 else 1.0


def _outline(axes: "Axes", mask: np.ndarray) -> None:
    """Draw the border between interior and membrane, if there is one."""
    inside = np.asarray(mask) > 0
    if inside.any() and not inside.all():  # some versions of matplotlib warn of a contour that is nowhere
        axes.contour(inside, levels=[0.5], colors=[ORANGE], linewidths=0.9)


def _numbers_instances(stack: np.ndarray) -> bool:
    """Whether an array numbers instances: whole numbers, and more than the two values of a mask."""
    return stack.dtype.kind in "iu" and len(np.unique(stack)) > 2


def _instances(axes: "Axes", labels: np.ndarray) -> None:
    """Instances in five colours that repeat, on white."""
    from matplotlib.colors import ListedColormap

    colours = ListedColormap(["white", BLUE, ORANGE, GREEN, PURPLE, SKY])
    numbers, dense = np.unique(labels, return_inverse=True)
    labels = dense.reshape(labels.shape) + (numbers[0] > 0)
    axes.imshow(np.where(labels > 0, 1 + (labels - 1) % 5, 0), cmap=colours, vmin=0, vmax=5, interpolation="nearest")


def _frame_pixels(section: np.ndarray, mask: np.ndarray, low: float, high: float, height: int) -> np.ndarray:
    """One frame of the animation: section, white gap, mask; uint8."""
    gray = np.clip((np.asarray(section, dtype=np.float32) - low) / (high - low), 0, 1)
    white = np.asarray(mask, dtype=np.float32) / _full_scale(mask)
    left, right = (_resized(picture, height) for picture in (gray, white))
    return np.hstack([left, np.full((height, 4), 255, np.uint8), right])


def _resized(picture: np.ndarray, height: int) -> np.ndarray:
    """A picture 0..1 as uint8 of the given height."""
    from PIL import Image

    width = max(1, round(picture.shape[1] * height / picture.shape[0]))
    image = Image.fromarray(np.uint8(np.round(np.clip(picture, 0, 1) * 255)))
    method = Image.Resampling.BOX if height < picture.shape[0] else Image.Resampling.NEAREST
    return np.asarray(image.resize((width, height), method))


def _small_gif(frames: Sequence[np.ndarray], frame_ms: int) -> bytes:
    """Encode with as many grays as `GIF_BYTES` allow: noise is what costs, and fewer grays are less noise."""
    for grays in (64, 32, 16, 8):
        encoded = _gif(frames, frame_ms, grays)
        if len(encoded) <= GIF_BYTES:
            break
    return encoded


def _gif(frames: Sequence[np.ndarray], frame_ms: int, grays: int) -> bytes:
    """Encode frames, endlessly repeated, with one palette of equidistant grays."""
    from PIL import Image

    levels = np.linspace(0, 255, grays).round().astype(np.uint8)
    palette = np.repeat(levels, 3).tobytes()
    images = []
    for frame in frames:
        indices = np.round(frame * ((grays - 1) / 255)).astype(np.uint8)
        image = Image.frombytes("P", indices.shape[::-1], indices.tobytes())
        image.putpalette(palette)
        images.append(image)
    file = BytesIO()
    images[0].save(file, "GIF", save_all=True, append_images=images[1:], duration=frame_ms, loop=0, optimize=False)
    return file.getvalue()


# The command line


CHALLENGE_FILES = {
    ("--image_path", False): "train-volume.tif",
    ("--mask_path", False): "train-labels.tif",
    ("--image_path", True): "test-volume.tif",
    ("--mask_path", True): "test-labels.tif",
}
"""File that a flag means in a folder with the challenge's files, without and with --test."""

RUN_CURVES = {
    "loss": "training loss",
    "val_loss": "validation loss",
    "dice": "training Dice",
    "val_dice": "validation Dice",
}
"""Panels that compare several runs."""


class Parser(argparse.ArgumentParser):
    """Refuses in one sentence, without the usage."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Draw one picture; the exit code is 2 where the input is bad."""
    args = build_parser().parse_args(argv)
    try:
        path = args.draw(args)
    except (OSError, ValueError) as error:
        print(f"figures.py: {error}", file=sys.stderr)
        return 2
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The flags of the three verbs."""
    parser = Parser(prog="figures.py", description="Draw runs and stacks; an existing picture is replaced.")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    verb = verbs.add_parser("animate", help="sections beside their masks or predictions, as a GIF")
    stack = "TIFF stack, or a folder with the challenge's files"
    verb.add_argument("--image_path", required=True, metavar="PATH", help=stack)
    verb.add_argument("--mask_path", required=True, metavar="PATH", help=f"masks or probabilities: {stack}")
    verb.add_argument("--test", action="store_true", help="in a folder, take the test stack, not the training stack")
    verb.add_argument("--output", required=True, type=_output(".gif"), metavar="FILE.gif")
    verb.add_argument(
        "--side", type=_at_least(16), default=256, metavar="PX", help="height of the GIF, px (default: 256)"
    )
    verb.add_argument("--every", type=_at_least(1), default=1, metavar="N", help="show each N-th section (default: 1)")
    verb.set_defaults(draw=_animate)
    verb = verbs.add_parser("curves", help="loss and Dice against the epoch; several runs are compared")
    verb.add_argument("runs", nargs="+", metavar="RUN_OR_HISTORY", help="run folder, or its history.csv")
    verb.add_argument("--output", required=True, type=_output(".png"), metavar="FILE.png")
    verb.set_defaults(draw=_curves)
    verb = verbs.add_parser("learning_rate", help="the learning rate of every update of a run")
    verb.add_argument("run", metavar="RUN_OR_RECORD", help="run folder, or its run.json")
    verb.add_argument("--output", required=True, type=_output(".png"), metavar="FILE.png")
    verb.set_defaults(draw=_learning_rate)
    return parser


def _output(suffix: str) -> Callable[[str], Path]:
    """An argparse type: a file of that kind in a folder that is there."""

    def parse(text):
        path = Path(text)
        if path.suffix.lower() != suffix or path.is_dir() or not path.parent.is_dir():
            raise argparse.ArgumentTypeError(f"must be a {suffix} file in an existing folder. Received: {text}")
        return path

    return parse


def _at_least(low: int) -> Callable[[str], int]:
    """An argparse type: a whole number from `low` on."""

    def parse(text):
        if not text.isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"must be a whole number, at least {low}. Received: {text}")
        return int(text)

    return parse


def _animate(args: argparse.Namespace) -> Path:
    """The `animate` verb."""
    sections = _read_stack(args.image_path, "--image_path", args.test)
    masks = _read_stack(args.mask_path, "--mask_path", args.test)
    if masks.shape != sections.shape:
        raise ValueError(f"--mask_path must be of the shape of --image_path, {sections.shape}. Received: {masks.shape}")
    if masks.min() < 0 or masks.max() > 255:
        raise ValueError(f"--mask_path must hold 0..1 or 0..255. Received: {masks.min():g}..{masks.max():g}")
    return animation(sections[:: args.every], masks[:: args.every], args.output, height=args.side)


def _read_stack(text: str, flag: str, test: bool) -> np.ndarray:
    """Sections of shape (S, H, W) of a TIFF file, or of the challenge's file in a folder."""
    import tifffile

    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what it logs about broken files is raised here
    path = Path(text) / CHALLENGE_FILES[flag, test] if Path(text).is_dir() else Path(text)
    if not path.is_file():
        raise ValueError(
            f"{flag}: {path} does not exist; `python dilatedUnet.py fetch isbi2012` prints the folder of that data set."
        )
    try:
        stack = _rows(tifffile.imread(path))
    except Exception as error:  # tifffile raises struct, index, key and codec errors on a damaged file
        raise ValueError(f"{flag}: {path} is no TIFF file, or is damaged: {error}") from error
    if stack.ndim != 3 or not stack.size or stack.dtype.kind not in "buif" or not np.isfinite(stack).all():
        found = f"{stack.dtype} of shape {stack.shape}"
        raise ValueError(f"{flag}: {path} must hold gray sections of finite numbers. Received: {found}")
    return stack.view(np.uint8) if stack.dtype == bool else stack


def _curves(args: argparse.Namespace) -> Path:
    """The `curves` verb: one run as `curves` draws it, several as the levels of a factor."""
    histories = [_read_history(_file_of_run(run, "history.csv")) for run in args.runs]
    if len(histories) == 1:
        return curves(histories[0], args.output)
    return factor(_compared(dict(zip(_run_names(args.runs), histories, strict=True))), args.output)


def _file_of_run(text: str, name: str) -> Path:
    """The file of that name in a run folder, or the file that was typed."""
    path = Path(text) / name if Path(text).is_dir() else Path(text)
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give a run folder, or its {name}.")
    return path


def _read_history(path: Path) -> dict[str, np.ndarray]:
    """Columns of a history.csv, empty fields as NaN."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            names, *rows = [line for line in csv.reader(file) if line]
        return dict(zip(names, map(_floats, zip(*rows, strict=True)), strict=True))
    except (ValueError, csv.Error) as error:
        rule = "must be a history: a line of column names, then a line of numbers for each epoch."
        raise ValueError(f"{path} {rule}") from error


def _run_names(runs: Sequence[str]) -> list[str]:
    """As much of each run's path, from its end, as tells the runs apart: a legend has no room for more."""
    paths = [Path(run).resolve() for run in runs]
    paths = [path.parent if path.name == "history.csv" else path for path in paths]
    for count in range(1, max(len(path.parts) for path in paths) + 1):
        names = [str(Path(*path.parts[-count:])) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def _compared(histories: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, dict[str, tuple]]:
    """Panels for `factor`: each quantity that a run has, without a spread."""
    panels = {}
    for column, title in RUN_CURVES.items():
        lines = {
            name: (_epochs(history, history[column].size), history[column], np.zeros_like(history[column]))
            for name, history in histories.items()
            if np.isfinite(history.get(column, np.nan)).any()
        }
        if lines:
            panels[title] = lines
    if not panels:
        raise ValueError(f"the histories must hold a loss or Dice of an epoch. Received: {', '.join(histories)}")
    return panels


def _learning_rate(args: argparse.Namespace) -> Path:
    """The `learning_rate` verb: the schedule of the settings, and on it what the history recorded."""
    path = _file_of_run(args.run, "run.json")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        rates, label = scheduled_rates(record), _schedule_words(record["settings"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        rule = "must be a run record, with epochs and the settings of the learning rate"
        raise ValueError(f"{path} {rule}: {error!r}") from error
    history = path.with_name("history.csv")
    columns = _read_history(history) if path.name == "run.json" and history.is_file() else {}
    recorded = (columns["update"], columns["learning_rate"]) if {"update", "learning_rate"} <= set(columns) else None
    return learning_rate(rates, args.output, label=label, recorded=recorded)


def scheduled_rates(record: Mapping[str, Any]) -> np.ndarray:
    """Learning rate of each update of a run, from its record.

    The formulas of `clr_callback`, which needs Keras and is what trains; a test holds the two against each other.

    Parameters
    ----------
    record : mapping
        A run.json: "epochs", "settings", and in a finished run "final", whose "update" was the last.

    Returns
    -------
    ndarray of shape (updates,)
    """
    settings = record["settings"]
    planned = record["epochs"] * settings["steps_per_epoch"]
    update = np.arange(record.get("final", {}).get("update", planned))
    low, high, half_cycle = settings["lr"], settings["max_lr"], settings["step_size"]
    if settings["clr_mode"] == "cosine":
        warm_up = min(100, planned // 20)
        done = np.clip((update - warm_up) / max(1, planned - 1 - warm_up), 0, 1)
        falling = low + (high - low) * 0.5 * (1 + np.cos(np.pi * done))
        return np.where(update < warm_up, high * (update + 1) / (warm_up + 1), falling)
    height = {
        "none": 0.0,
        "triangular": 1.0,
        "triangular2": 0.5 ** (update // (2 * half_cycle)),
        "exp_range": settings["clr_gamma"] ** update,
    }[settings["clr_mode"]]
    return low + (high - low) * height * (1 - np.abs(update % (2 * half_cycle) / half_cycle - 1))


def _schedule_words(settings: Mapping[str, Any]) -> str:
    """The schedule in a few words."""
    low, high, mode = settings["lr"], settings["max_lr"], settings["clr_mode"]
    if mode == "none":
        return f"constant, {low:g}"
    if mode == "cosine":
        return f"cosine, from {high:g} down to {low:g}"
    return f"{mode}, {low:g} to {high:g}, half a cycle is {settings['step_size']} updates"


if __name__ == "__main__":
    sys.exit(main())
