"""Pictures of runs and stacks: arrays and histories -> PNG and GIF, never a model.

Every function takes the place to write to last of what it needs, writes beside it, moves the finished file
there, and returns the path. The `draw_...` functions make the matplotlib figure without saving it. Colours
are those of Okabe and Ito (2008), told apart by all common kinds of colour vision; lines differ in style or
marker as well, so that a grey print still reads. matplotlib is imported when the first figure is drawn, and
its global state (pyplot, rcParams) is left alone.
"""

import os
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

GIF_BYTES = 3_000_000
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


def learning_rate(rates: Sequence[float], path: str | Path, *, label: str = "") -> Path:
    """The learning rate of every update.

    Parameters
    ----------
    rates : sequence of float of length N
        Rate used by updates 1..N.
    path : path-like
        PNG to write.
    label : str, optional
        What the schedule is, in words; the figure's title.
    """
    return _save(draw_learning_rate(rates, label=label), path)


def draw_learning_rate(rates: Sequence[float], *, label: str = "") -> "Figure":
    """Figure of `learning_rate`."""
    rates = _floats(rates)
    if not rates.size:
        raise ValueError("rates must hold at least one update. Received: 0")
    figure = _figure(height_in=3.0)
    axes = _axes(figure, "update", "learning rate", label)
    axes.plot(np.arange(1, rates.size + 1), rates, color=BLUE, linewidth=1.8)
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
    """Levels of one factor of a study: mean and spread over runs, one panel per quantity.

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
    figure = _figure(height_in=3.8)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    for axes, (name, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for level, (x, mean, deviation) in lines.items():
            _mean_and_spread(axes, level, _floats(x), _floats(mean), _floats(deviation), styles[level])
        axes.set(xlabel=xlabel)
        axes.set_title(name, loc="left", fontsize=11)
        _tidy(axes)
        _log_if_wide(axes, [_floats(mean) for _, mean, _ in lines.values()])
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
            _gray(axes, stack[row], None if name == "section" else (0.0, _full_scale(stack[row])))
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


def _instances(axes: "Axes", labels: np.ndarray) -> None:
    """Instances in five colours that repeat, on white."""
    from matplotlib.colors import ListedColormap

    colours = ListedColormap(["white", BLUE, ORANGE, GREEN, PURPLE, SKY])
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
