"""Stacks in and out: find or fetch, read, check, normalise, split by section, write.

    >>> split = split_sections(30, "holdout", gap=1)
    >>> split.held_out, split.gap
    ((24, 25, 26, 27, 28, 29), (23,))

A stack is an array of shape (S, H, W): serial sections, rows, columns. In a mask 1 is the interior of a cell
and 0 is membrane. This file is the door; behind it lie `stacks` (files), `fetching` (the data sets and their
cache) and `synthetic` (the painted stack). Bad input ends in a `DataError` of one sentence.
"""

import functools
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from files import omezarr
from files.fetching import CELL_ARCHIVES, DATA_SETS, ISBI_ROLES, data_dir, dataset_path, fetch, is_cached
from files.stacks import (
    DataError,
    Stack,
    StackReader,
    flag,
    load,
    natural_key,
    open_stack,
    replacing,
    sha256_pixels,
    size_words,
    some,
    voxel_words,
    write_mask,
    write_prediction,
)

__all__ = [
    "DATA_SETS",
    "DataError",
    "Normalisation",
    "Split",
    "Stack",
    "StackReader",
    "check_window",
    "data_dir",
    "describe",
    "fetch",
    "format_sections",
    "is_cached",
    "iter_sections",
    "load_pair",
    "montage",
    "natural_key",
    "parse_sections",
    "read_instances",
    "read_labels",
    "read_stack",
    "replacing",
    "resolve",
    "sha256_pixels",
    "split_sections",
    "synthetic",
    "write_mask",
    "write_prediction",
]


# --- Finding and reading ------------------------------------------------------------------------------------

SYNTHETIC_TEST_SEED = 1_000_003


def resolve(name_or_path, role, *, log=print):
    """Turn what was typed into a path or a stack.

    Parameters
    ----------
    name_or_path : str, Path or Stack
        A data set's name (fetched where it is not cached), a file, a folder of sections, a folder that holds
        the challenge's files, or a Stack, which is returned as it is.
    role : {"image", "mask", "test", "test_mask"}
        Which part of a data set is meant; any other word only serves in messages.

    Returns
    -------
    Path or Stack
    """
    if isinstance(name_or_path, Stack):
        return name_or_path
    if name_or_path == "synthetic":
        return synthetic(seed=SYNTHETIC_TEST_SEED * role.startswith("test"))[role.endswith("mask")]
    if name_or_path == "isbi2012" or name_or_path in CELL_ARCHIVES:
        return dataset_path(name_or_path, role, log=log)
    path = Path(name_or_path).expanduser()
    if not path.exists():
        raise DataError(f"{flag(role)}: {path} does not exist; the data sets are {', '.join(DATA_SETS)}.")
    inside = path / ISBI_ROLES.get(role, "")
    return inside if inside.is_file() else path


def iter_sections(path, *, what="image"):
    """Open a stack for reading section by section.

    Parameters
    ----------
    path : str, Path or Stack
        As in `resolve`.
    what : str
        The role, for `resolve` and for messages.

    Returns
    -------
    StackReader
    """
    found = resolve(path, what)
    if isinstance(found, Path) and omezarr.is_zarr(found):
        return omezarr.open_zarr(found, what)
    return open_stack(found, what)


def read_stack(path, *, what="image"):
    """Read a whole stack into memory; `path` and `what` as in `iter_sections`.

    Raises
    ------
    DataError
        Where the file is missing, empty, cut off, not a TIFF or PNG, RGB, or holds NaN.
    """
    return load(iter_sections(path, what=what))


def synthetic(sections=30, size=(512, 512), seed=0):
    """Paint a stack that looks like electron microscopy of neuropil, and its mask; no network, no files.

    Returns
    -------
    images, masks : Stack
        uint8 gray values, and uint8 0 (membrane) / 1 (interior, about 78 %), both read-only. The same
        (sections, size, seed) gives the same bytes.
    """
    gray, interior = _painted(int(sections), tuple(int(n) for n in size), int(seed))
    names = [f"synthetic[{i}]" for i in range(len(gray))]
    about = {"voxel_nm": (50.0, 4.0, 4.0), "names": names, "description": f"painted in memory, seed {seed}"}
    return tuple(Stack(array, source="synthetic", **about) for array in (gray, interior))


@functools.lru_cache(maxsize=2)
def _painted(sections, size, seed):
    from files.synthetic import paint

    if sections < 1 or len(size) != 2 or min(size) < 1 or seed < 0:
        raise DataError(f"sections and size must be >= 1, the seed >= 0. Received: {sections}, {size}, {seed}")
    arrays = paint(sections, size, seed)
    for array in arrays:
        array.flags.writeable = False  # shared by everybody who asks for the same stack
    return arrays


# --- Labels and pairs ---------------------------------------------------------------------------------------


def read_labels(path, *, invert=False):
    """Read a mask as 0 (membrane) and 1 (interior).

    Parameters
    ----------
    path : str, Path or Stack
        Values 0/1, 0/255, bool or any other two: the non-zero one is the interior, or else the larger.
    invert : bool
        Turn it: what would be the interior is membrane.

    Returns
    -------
    Stack with uint8 sections, and a list of messages; those that begin with "warning:" want attention
    """
    stack = read_stack(path, what="mask")
    values = np.unique(np.concatenate([np.unique(section) for section in stack.sections])).tolist()
    if len(values) > 2:
        raise DataError(_too_many_values(stack, values))
    interior = max(values, key=lambda value: (value != 0, value)) or 1
    labels = ((stack.sections == interior) != invert).view(np.uint8)
    messages = [_mapping(values, interior, invert, labels), *_label_warnings(labels, invert)]
    return Stack(labels, stack.voxel_nm, stack.names, stack.source, stack.description), messages


def _mapping(values, interior, invert, labels):
    meaning = {value: "interior" if (value == interior) != invert else "membrane" for value in values}
    said = ", ".join(f"{value} = {meaning[value]}" for value in values)
    return f"labels: {said}{' (inverted)' if invert else ''}; interior {labels.mean():.1%} of the pixels"


def _label_warnings(labels, invert):
    fractions = labels.mean(axis=(1, 2))
    if fractions.max() == 0:
        return ["warning: the mask is all background: no pixel is interior"]
    if fractions.min() == 1:
        return ["warning: the mask is all interior: no pixel is membrane"]
    turn = f"warning: the interior is the minority: inverted labels? Try {'without' if invert else 'with'}"
    found = [f"{turn} --invert_mask"] if labels.mean() < 0.5 else []
    for value, name in ((0, "interior"), (1, "membrane")):
        if (fractions == value).any():
            found.append(f"warning: sections without {name}: {format_sections(np.flatnonzero(fractions == value))}")
    return found


def _too_many_values(stack, values):
    sections = stack.sections
    between = ((sections != values[0]) & (sections != values[-1]))[..., 1:]
    flat = np.mean((sections[..., 1:] == sections[..., :-1])[between]) if between.any() else 0.0
    if flat <= 0.8 and between.mean() < 0.2:
        like = "it looks like a mask blurred by resampling or JPEG: threshold it"
    elif flat > 0.8:
        like = "it looks like an instance mask (a number per cell), which --instances takes"
    else:
        like = "it looks like an image or a probability map, not a mask"
    shown = some([f"{value:g}" for value in values])
    return f"--mask_path: {stack.source} must hold two label values, and holds {len(values)} ({shown}); {like}."


def read_instances(path):
    """Read instance labels, one number a cell, 0 = background, as a Stack of int32 and a list of messages."""
    stack = read_stack(path, what="mask")
    labels = stack.sections
    if labels.dtype.kind not in "biu" or labels.min() < 0 or labels.max() >= 2**31:
        raise DataError(
            f"--mask_path: {stack.source} must hold whole numbers, 0 = background, with --instances. Received: "
            f"{labels.dtype} {labels.min()}..{labels.max()}"
        )
    counts = [len(np.unique(section[section > 0])) for section in labels]
    said = f"labels: instances, {min(counts)} to {max(counts)} a section; {(labels > 0).mean():.1%} of the pixels"
    empty = ["warning: the mask is all background: no pixel is interior"] if max(counts) == 0 else []
    return replace(stack, sections=labels.astype(np.int32)), [said, *empty]


def load_pair(image_path, mask_path, *, invert_mask=False, instances=False):
    """Read images and their masks, paired section by section.

    Two folders are paired by the stems of their files, where `man_seg007` goes with `t007` and `7_label` with
    `7`; anything else by order. Frames without a mask are left out where the masks are `instances`, as the Cell
    Tracking Challenge labels some frames of a sequence only. What was done is said in the messages.

    Returns
    -------
    images, masks : Stack
        Native values, and uint8 0 (membrane) / 1 (interior), or int32 numbers of cells, of the same shape.
    messages : list of str
    """
    images = read_stack(image_path, what="image")
    if instances:
        masks, messages = read_instances(mask_path)
        images, messages = _labelled_only(images, masks, messages)
    else:
        masks, messages = read_labels(mask_path, invert=invert_mask)
    if images.sections.shape != masks.sections.shape:
        wanted, found = _shape_words(images), _shape_words(masks)
        raise DataError(f"--mask_path: the masks must be like the images, {wanted}. Received: {found}")
    order, said = _pairs(images, masks)
    names = [masks.names[i] for i in order]
    masks = Stack(masks.sections[order], masks.voxel_nm, names, masks.source, masks.description)
    return images, masks, [*messages, said]


def _labelled_only(images, masks, messages):
    """Leave out the frames of a folder whose number is on no mask of another folder."""
    if len(masks.names) >= len(images.names) or not (Path(images.source).is_dir() and Path(masks.source).is_dir()):
        return images, messages
    numbers = {_last_number(name) for name in masks.names}
    kept = [i for i, name in enumerate(images.names) if _last_number(name) in numbers]
    if len(kept) != len(masks.names):
        return images, messages
    said = f"pairs: {len(kept)} of {len(images.names)} frames are labelled, the others are left out"
    return replace(images, sections=images.sections[kept], names=[images.names[i] for i in kept]), [*messages, said]


def _last_number(name):
    digits = re.findall("[0-9]+", name)
    return int(digits[-1]) if digits else None


def _pairs(images, masks):
    """Return the mask's index for each image, and what was done in words."""
    order = list(range(len(masks.names)))
    if len(order) < 2 or not (Path(images.source).is_dir() and Path(masks.source).is_dir()):
        return order, "pairs: sections and masks go together by their order"
    for key in (list, _bare_names):
        ours, theirs = key(images.names), key(masks.names)
        if set(ours) == set(theirs) and len(set(ours)) == len(ours):
            order = [theirs.index(name) for name in ours]
            return order, f"pairs: by name, {images.names[0]} with {masks.names[order[0]]}, and so on"
    raise DataError(
        f"--mask_path: the names in {masks.source} ({some(masks.names, 2)}) must be those "
        f"in {images.source} ({some(images.names, 2)}), but for what all share at their start or end."
    )


def _bare_names(names):
    """Strip what all names share at either end; what is left as a number counts as one, so that 007 is 7."""
    start = re.sub(r"[0-9]+$", "", _shared_start(names))
    end = re.sub(r"[0-9]+$", "", _shared_start([name[::-1] for name in names]))
    bare = [name[len(start) : len(name) - len(end)] for name in names]
    return [str(int(name)) if name.isdecimal() else name for name in bare]


def _shared_start(names):
    """Return the longest start of all names: that of the first and the last in alphabetical order."""
    first, last = min(names), max(names)
    same = (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    return first[: next(same, min(len(first), len(last)))]


def check_window(stack, window, multiple=8):
    """Refuse a window that does not fit the network, or the sections of a Stack or StackReader."""
    height, width = (stack.sections if isinstance(stack, Stack) else stack).shape[1:]
    if window < 1 or window % multiple:
        raise DataError(f"--window must be a positive multiple of {multiple}. Received: {window}")
    if min(height, width) < window:
        most = min(height, width) // multiple * multiple
        room = f"which are {height} x {width} px, so {f'at most {most}' if most else 'they are too small'}"
        raise DataError(f"--window must fit into the sections of {stack.source}, {room}. Received: {window}")


def _shape_words(stack):
    count = len(stack.sections)
    return f"{count} section{'s' * (count != 1)} of {size_words(stack.sections.shape)} px"


# --- Normalisation ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Normalisation:
    """(x - mean) / (std + epsilon), with the constants of the TRAINING sections, kept with the weights.

    >>> Normalisation.fit(np.array([[[1, 3]]], np.uint8))(np.array([[1, 2, 3]], np.uint8)).tolist()
    [[-1.0, 0.0, 1.0]]
    """

    mean: float
    std: float
    epsilon: float = 1e-10

    @classmethod
    def fit(cls, sections):
        """Fit to sections of shape (S, H, W) or to a StackReader, one section in memory at a time.

        Means and squares of sections are merged (Chan, Golub, LeVeque 1983, 10.1080/00031305.1983.10483115).
        """
        count, mean, squares = 0, 0.0, 0.0
        for section in sections:
            values = np.asarray(section, np.float64)
            here = values.flat[0] + (values - values.flat[0]).mean()  # exact where a section is flat
            share = values.size / (count + values.size)
            squares += ((values - here) ** 2).sum() + (here - mean) ** 2 * count * share
            mean += (here - mean) * share
            count += values.size
        if not count:
            raise DataError("Normalisation needs at least one section. Received: 0")
        return cls(float(mean), math.sqrt(squares / count))

    def __call__(self, array):
        """Normalise any array to float32; the sums are float64 where float32 would round the input."""
        array = np.asarray(array)
        kind = np.float64 if array.dtype.itemsize > 2 else np.float32
        return ((array - kind(self.mean)) / kind(self.std + self.epsilon)).astype(np.float32)

    def to_dict(self):
        """Return the three numbers, for JSON."""
        return {"mean": self.mean, "std": self.std, "epsilon": self.epsilon}

    @classmethod
    def from_dict(cls, values):
        """Rebuild from `to_dict`, or refuse what is not three finite numbers."""
        try:
            found = cls(*(float(values[key]) for key in ("mean", "std", "epsilon")))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"normalisation must hold mean, std and epsilon. Received: {values}") from error
        scale = found.std + found.epsilon
        if not (math.isfinite(found.mean) and math.isfinite(scale) and found.std >= 0 and scale > 0):
            raise DataError(f"normalisation must be finite, with std >= 0 and epsilon > 0. Received: {values}")
        return found


# --- Splits by section --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """Sections that train, that choose the weights (`inner`), that are held out, and left out between."""

    protocol: str
    train: tuple[int, ...]
    inner: tuple[int, ...]
    held_out: tuple[int, ...]
    gap: tuple[int, ...] = ()

    def describe(self):
        """Say which sections do what."""
        if self.protocol == "published":
            return f"published: sections {format_sections(self.train)} train AND validate, none is held out"
        words = [f"train on {format_sections(self.train)} ({len(self.train)})"]
        words += [f"choose weights on {format_sections(self.inner)}"] if self.inner else []
        words += [f"leave out {format_sections(self.gap)}"] if self.gap else []
        words += [f"hold out {format_sections(self.held_out)}" if self.held_out else "hold nothing out"]
        return f"{self.protocol}: " + ", ".join(words)


def split_sections(count, protocol, *, val_sections=None, fold=0, folds=5, gap=0, inner=0, train_sections=None):
    """Split sections 0..count-1 into training and validation.

    Neighbouring sections look alike, so what is held out is a contiguous block.

    Parameters
    ----------
    count : int
    protocol : {"published", "holdout", "kfold", "all"}
        published: every section trains and validates, as in 2017. holdout: `val_sections`, or else the last
        fifth. kfold: block `fold` of `folds` contiguous ones. all: every section trains, nothing is held out.
    val_sections, train_sections : sequence of int, optional
        The sections to hold out, and the only ones to train on.
    gap : int
        Sections left out on either side of what is held out.
    inner : int
        Contiguous sections of the rest, nearest to the held-out ones, for early stopping.

    Returns
    -------
    Split

    Examples
    --------
    >>> split_sections(10, "kfold", fold=1, folds=5, gap=1).train
    (0, 5, 6, 7, 8, 9)
    """
    if count < 1 or gap < 0 or inner < 0:
        raise DataError(f"sections must be >= 1, --gap and inner >= 0. Received: {count}, {gap}, {inner}")
    allowed = _within(range(count) if train_sections is None else train_sections, count, "--train_sections")
    if protocol in ("published", "all"):
        return _nothing_held_out(protocol, allowed, val_sections, gap, inner)
    held_out = _held_out(count, protocol, val_sections, fold, folds)
    if train_sections is not None and (both := set(allowed) & set(held_out)):
        raise DataError(f"--train_sections must not be held out as well. Received: {format_sections(both)}")
    rest = [i for i in range(count) if min(abs(i - j) for j in held_out) > gap]
    beside = tuple(sorted(set(range(count)).difference(rest, held_out)))
    chosen = _nearest_run(rest, held_out, inner)
    train = tuple(i for i in rest if i in allowed and i not in chosen)
    if not train or len(chosen) < inner:
        wanted = f"hold out {len(held_out)}, leave out {len(beside)}, choose weights on {inner} and still train"
        raise DataError(f"--protocol {protocol}: too few sections to {wanted}. Received: {count}")
    return Split(protocol, train, chosen, held_out, beside)


def _nothing_held_out(protocol, sections, val_sections, gap, inner):
    if val_sections is not None or gap or inner:
        flags = "--val_sections, --gap and --inner_sections"
        raise DataError(f"--protocol {protocol} holds nothing out: it goes without {flags}.")
    return Split(protocol, sections, sections if protocol == "published" else (), ())


def _held_out(count, protocol, val_sections, fold, folds):
    if protocol == "holdout":
        last = range(count - max(1, round(count / 5)), count)
        return _within(last if val_sections is None else val_sections, count, "--val_sections")
    if protocol != "kfold":
        raise DataError(f"--protocol must be published, holdout, kfold or all. Received: {protocol}")
    if val_sections is not None:
        raise DataError("--val_sections goes with --protocol holdout. Received: --protocol kfold")
    if not 2 <= folds <= count:
        raise DataError(f"--folds must be from 2 to the number of sections, {count}. Received: {folds}")
    if not 0 <= fold < folds:
        raise DataError(f"--fold must be from 0 to {folds - 1}. Received: {fold}")
    return tuple(np.array_split(range(count), folds)[fold].tolist())


def _within(sections, count, argument):
    chosen = tuple(sorted({int(i) for i in sections}))
    if not chosen or chosen[0] < 0 or chosen[-1] >= count:
        raise DataError(f"{argument} must lie in 0-{count - 1}. Received: {format_sections(chosen) or 'none'}")
    return chosen


def _nearest_run(rest, held_out, length):
    """Return `length` consecutive sections of `rest`, nearest to `held_out`; before it rather than after."""

    def away(run):
        return min(abs(i - j) for i in run for j in held_out)

    runs = [tuple(range(i, i + length)) for i in rest if length]
    return min((run for run in runs if set(rest).issuperset(run)), key=away, default=())


def parse_sections(text):
    """Parse section numbers, counted from 0.

    >>> parse_sections("0,3,5-7")
    (0, 3, 5, 6, 7)
    """
    found = []
    for part in str(text).split(","):
        match = re.fullmatch(r"\s*([0-9]{1,6})\s*(?:-\s*([0-9]{1,6})\s*)?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            raise DataError(f"sections must be numbers and ranges such as 24-29 or 0,3,5-7. Received: {text}")
        found += range(first, last + 1)
    if len(set(found)) < len(found):
        raise DataError(f"sections must be named once each. Received: {text}")
    return tuple(sorted(found))


def format_sections(sections):
    """Write section numbers as `parse_sections` reads them.

    >>> format_sections([0, 3, 5, 6, 7])
    '0,3,5-7'
    """
    runs = []
    for i in sorted(int(i) for i in sections):
        if runs and i == runs[-1][1] + 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def montage(sections, rows, columns, order):
    """Lay sections out as one large picture: the protocol of 2017, 6 x 5 to train and 5 x 6 to validate.

    Parameters
    ----------
    sections : ndarray of shape (rows * columns, H, W)
    order : sequence of int
        A permutation, drawn by the caller; `order[0]` comes at the top left, `order[1]` to the right of it.

    Returns
    -------
    ndarray of shape (rows * H, columns * W)
    """
    count, height, width = sections.shape
    if rows * columns != count or sorted(order) != list(range(count)):
        raise DataError(f"a montage of {rows} x {columns} must show every section once. Received: {count}")
    grid = sections[np.asarray(order)].reshape(rows, columns, height, width)
    return grid.swapaxes(1, 2).reshape(rows * height, columns * width)


# --- What the files are -------------------------------------------------------------------------------------


def describe(image_path, mask_path=None, *, invert_mask=False, window=512, multiple=8):
    """Say in plain words what the files are, and what training would do with them.

    Returns
    -------
    list of str
        Lines that begin with "warning:" want attention, those that begin with "problem:" would stop training.
        An image that cannot be read at all raises DataError.
    """
    images = read_stack(image_path, what="image")
    lines = _image_lines(images)
    if mask_path is not None:
        lines += _mask_lines(images, mask_path, invert_mask)
    return lines + _training_lines(images, window, multiple)


def _file_lines(kind, stack):
    about = ", ".join(filter(None, [_shape_words(stack), str(stack.sections.dtype), stack.description]))
    return [f"{kind}: {stack.source}", f"  {about}"]


def _image_lines(images):
    sections, norm = images.sections, Normalisation.fit(images.sections)
    flat = [i for i, section in enumerate(sections) if section.min() == section.max()]
    span = f"{sections.min():g} to {sections.max():g}"
    return [
        *_file_lines("image", images),
        f"  values {span}, mean {norm.mean:.4g}, standard deviation {norm.std:.4g}",
        f"  {voxel_words(images.voxel_nm)}",
        *([f"warning: sections of a single gray value: {format_sections(flat)}"] if flat else []),
    ]


def _mask_lines(images, mask_path, invert_mask):
    try:
        masks = read_stack(mask_path, what="mask")
    except DataError as error:
        return [f"mask: {mask_path}", f"problem: {error}"]
    try:
        messages = load_pair(images, masks, invert_mask=invert_mask)[-1]
    except DataError as error:
        return [*_file_lines("mask", masks), f"problem: {error}"]
    lines = [line if line.startswith("warning:") else f"  {line}" for line in messages]
    return [*_file_lines("mask", masks), *lines]


def _training_lines(images, window, multiple):
    count, height, width = images.sections.shape
    lines = ["training:"]
    for attempt in (
        lambda: split_sections(count, "holdout").describe(),
        lambda: check_window(images, window, multiple) or _crop_words(height, width, window),
    ):
        try:
            lines.append(f"  {attempt()}")
        except DataError as error:
            lines.append(f"problem: {error}")
    if height % multiple or width % multiple:
        lines.append(f"  {height} x {width} px is no multiple of {multiple}: prediction mirrors the borders")
    return lines


def _crop_words(height, width, window):
    crops = "whole sections" if height == width == window else f"crops of {window} x {window} px"
    return f"{crops}, normalised by the mean and standard deviation of the training sections"
