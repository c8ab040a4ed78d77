"""Stacks in and out: find or fetch, read, check, normalise, split by section, write.

    >>> split = split_sections(30, "holdout", gap=1)
    >>> split.held_out, split.gap
    ((24, 25, 26, 27, 28, 29), (23,))

A stack is an array of shape (S, H, W): serial sections, rows, columns. In a mask 1 is the interior of a cell
and 0 is membrane. This file is the door; behind it lie `stacks`, `tiff` and `omezarr`, `labels` (what masks mean),
`fetching` (the data sets) and `synthetic` (the painted stack). Bad input ends in a `DataError` of one sentence.
"""

import contextlib
import functools
import itertools
import math
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from files import labels, omezarr
from files.atomic import DataError, is_zarr, replacing, within
from files.fetching import DATA_SETS, ISBI_ROLES, dataset_path, fetch
from files.sections import (
    Stack,
    StackReader,
    can_resample,
    flag,
    format_sections,
    memory_words,
    pixel_factors,
    pixel_words,
    require_memory,
    shape_words,
    strips,
    voxel_words,
)
from files.stacks import load, open_stack, sha256_pixels
from files.writing import write_mask, write_prediction

# --- Finding and reading ------------------------------------------------------------------------------------

SYNTHETIC_TEST_SEED = 1_000_003


def resolve(name_or_path, role, *, log=print):
    """Turn what was typed into a Path or a Stack.

    Parameters
    ----------
    name_or_path : str, Path or Stack
        A data set's name (fetched where it is not cached), with "-test" after it its test part; a file, a folder of
        sections, a folder that holds the challenge's files, `file.h5:/array` or `folder.zarr:/array`, or a Stack, which
        is returned as it is.
    role : {"image", "mask", "test", "test_mask"}
        Which part of a data set is meant; any other word only serves in messages.
    """
    if isinstance(name_or_path, Stack):
        return name_or_path
    name = str(name_or_path).removesuffix("-test")
    if name in DATA_SETS and isinstance(name_or_path, str):
        part = {"image": "test", "mask": "test_mask"}.get(role, role) if name != name_or_path else role
        if part not in ISBI_ROLES:
            raise DataError(f"{flag(role)} must be a file or a folder. Received: {name_or_path}")
        if name == "synthetic":
            return synthetic(seed=SYNTHETIC_TEST_SEED * part.startswith("test"))[part.endswith("mask")]
        return dataset_path(name, part, log=log)
    typed = os.path.expanduser(name_or_path)
    if not os.path.exists(within(typed)[0]):
        raise DataError(_missing(typed, role))
    return _inside(Path(typed), role)


def _missing(path, role):
    if os.path.islink(path):
        return f"{flag(role)}: {path} is a link to {os.readlink(path)}, which does not exist."
    array = re.fullmatch(r"(.+\.\w+)[:/]+(.+)", str(path))
    if array and (os.path.isfile(array[1]) or is_zarr(array[1])):
        return f"{flag(role)}: {path} does not exist; an array of {array[1]} is named {array[1]}:/{array[2]}."
    known = f"; the data sets are {', '.join(DATA_SETS)}" if role in ISBI_ROLES else ""
    return f"{flag(role)}: {path or 'the empty name'} does not exist{known}."


def _inside(path, role):
    """Return the file of a folder with the challenge's files that plays a role; other paths as they are."""
    wanted = ISBI_ROLES.get(role)
    held = [name for name in ISBI_ROLES.values() if os.path.isfile(path / name)]
    if wanted in held:
        return path / wanted
    if wanted and held and (role.endswith("mask") or len(held) > 1):
        raise DataError(f"{flag(role)}: {path} holds {', '.join(held)}, and no {wanted}: name another file.")
    return path


def iter_sections(path, *, what="image", ids=False, channel=None):
    """Open a stack as a StackReader, section by section; `path` and `what` are the name and the role of `resolve`.

    With `ids` the values are numbers of cells: what is stored, without the palette. `channel` is which to read, from
    0, where there are several.
    """
    found = resolve(path, what)
    if isinstance(found, Path) and is_zarr(within(found)[0]):
        return omezarr.open_zarr(found, what, channel)
    return open_stack(found, what, ids=ids, channel=channel)


def read_stack(path, *, what="image", channel=None):
    """Read a whole stack into memory, as `iter_sections` opens it; a DataError where it is cut off, or holds NaN."""
    return load(iter_sections(path, what=what, channel=channel))


def synthetic(sections=30, size=(512, 512), seed=0):
    """Paint a stack that looks like electron microscopy of neuropil, and its mask; no network, no files.

    Both are a Stack, read-only: uint8 gray values, and uint8 0 (membrane) / 1 (interior, about 78 %). The same
    (sections, size, seed) gives the same bytes.
    """
    if min(sections, *size) < 1 or seed < 0:
        raise DataError(f"sections and size must be >= 1, the seed >= 0. Received: {sections}, {size}, {seed}")
    gray, interior = _painted(int(sections), tuple(int(n) for n in size), int(seed))
    names = [f"synthetic[{i}]" for i in range(len(gray))]
    about = {"voxel_nm": (50.0, 4.0, 4.0), "names": names, "description": f"painted in memory, seed {seed}"}
    return tuple(Stack(array, source="synthetic", **about) for array in (gray, interior))


@functools.lru_cache(maxsize=2)
def _painted(sections, size, seed):
    from files.synthetic import paint

    arrays = paint(sections, size, seed)
    for array in arrays:
        array.flags.writeable = False  # shared by everybody who asks for the same stack
    return arrays


# --- Labels and pairs ---------------------------------------------------------------------------------------


def read_labels(path, *, invert=False, ignore=None):
    """Read a mask as a Stack of 0 (membrane), 1 (interior) and -1 (not labelled, the value `ignore`), and messages.

    Its values are 0/1, 0/255, bool or any other two: the non-zero one is the interior, or else the larger; with
    `invert` that one is the membrane. Messages that begin with "warning:" want attention.
    """
    stack = read_stack(path, what="mask")
    said = labels.labelled(open_stack(stack), ignore)[1]
    interior, messages = labels.meaning(open_stack(stack), invert, ignore)
    mask = stack.sections == interior
    mask ^= invert
    return replace(stack, sections=mask_of(mask, None if ignore is None else stack.sections == ignore)), messages + said


def mask_of(interior, unlabelled=None):
    """Return 0 (membrane) and 1 (interior) of bool as uint8; where some may be unlabelled, as int8, and these as -1."""
    if unlabelled is None:
        return interior.view(np.uint8)
    mask = interior.view(np.int8)
    mask[unlabelled] = labels.UNLABELLED
    return mask


def read_instances(path, *, ignore=None):
    """Read numbers of cells, 0 = background and -1 = not labelled (`ignore`), as a Stack of int32, and messages."""
    stack = load(iter_sections(path, what="mask", ids=True))
    messages = labels.instance_messages(open_stack(stack), ignore) + labels.labelled(open_stack(stack), ignore)[1]
    cells = stack.sections.astype(np.int32)
    if ignore is not None:
        cells[stack.sections == ignore] = labels.UNLABELLED
    return replace(stack, sections=cells), messages


def load_pair(image_path, mask_path, *, invert_mask=False, instances=False, ignore=None, channel=None):
    """Read images and their masks, paired section by section.

    Two folders are paired by the stems of their files, where `man_seg007` goes with `t007` and `7_label` with
    `7`; anything else by order. Frames without a mask are left out where the masks are `instances`, as the Cell
    Tracking Challenge labels some frames of a sequence only.

    Returns two Stacks of one shape, of native values, and of what `read_labels` or `read_instances` gives, and messages
    that say what was done.
    """
    images = read_stack(image_path, what="image", channel=channel)
    read = read_instances if instances else functools.partial(read_labels, invert=invert_mask)
    masks, messages = read(mask_path, ignore=ignore)
    kept, order, said = labels.match(images, masks, instances)
    return chosen(images, kept), chosen(masks, order), [*messages, *said]


def chosen(stack, order):
    """Return these sections of a Stack, in this order."""
    if list(order) == list(range(len(stack.names))):
        return stack
    return replace(stack, sections=stack.sections[order], names=[stack.names[i] for i in order])


def check_window(stack, window, multiple=8):
    """Refuse a window that does not fit the network, or the sections of a Stack or StackReader."""
    height, width = stack.shape[1:]
    if window < 1 or window % multiple:
        raise DataError(f"--window must be a positive multiple of {multiple}. Received: {window}")
    if min(height, width) < window:
        most = min(height, width) // multiple * multiple
        room = f"which are {height} x {width} px, so {f'at most {most}' if most else 'they are too small'}"
        raise DataError(f"--window must fit into the sections of {stack.source}, {room}. Received: {window}")


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
        for strip in itertools.chain.from_iterable(map(strips, sections)):
            values = np.asarray(strip, np.float64)
            here = values.flat[0] + (values - values.flat[0]).mean()  # exact where a section is flat
            share = values.size / (count + values.size)
            squares += ((values - here) ** 2).sum() + (here - mean) ** 2 * count * share
            mean += (here - mean) * share
            count += values.size
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
        with contextlib.suppress(KeyError, OverflowError, TypeError, ValueError):
            found = cls(*(float(values[key]) for key in ("mean", "std", "epsilon")))
            scale = found.std + found.epsilon
            if math.isfinite(found.mean) and math.isfinite(scale) and found.std >= 0 and scale > 0:
                return found
        raise DataError(f"normalisation must hold mean, std and epsilon, finite and not below 0. Received: {values}")


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


def split_sections(
    count, protocol, *, val_sections=None, fold=0, folds=5, gap=0, inner=0, train_sections=None, labelled=None
):
    """Split sections 0..count-1 into training and validation.

    Neighbouring sections look alike, so what is held out is a contiguous block.

    Parameters
    ----------
    protocol : {"published", "holdout", "kfold", "all"}
        published: every section trains and validates, as in 2017. holdout: `val_sections`, or else the last
        fifth. kfold: block `fold` of `folds` contiguous ones. all: every section trains, nothing is held out.
    val_sections, train_sections : sequence of int, optional
        The sections to hold out, and the only ones to train on and choose weights on.
    gap : int
        Sections left out on either side of what is held out.
    inner : int
        Sections of the rest for early stopping, nearest to the held-out ones: neighbours of each other, or in the
        list of `train_sections`. None: an eighth of all, 1 to 3, but 0 of fewer than four.
    labelled : sequence of int, optional
        The sections that have labels, where not all have: the others keep their numbers, and are in no part.

    >>> split_sections(10, "kfold", fold=1, folds=5, gap=1).train
    (0, 5, 6, 7, 8, 9)
    """
    usable = list(range(count) if labelled is None else labelled)
    allowed = sections_within(usable if train_sections is None else train_sections, count, "--train_sections", usable)
    if protocol in ("published", "all"):
        return Split(protocol, allowed, allowed if protocol == "published" else (), ())
    if inner is None:
        inner = min(3, max(1, len(usable) // 8)) if len(usable) >= 4 else 0
    if protocol == "holdout":
        last = usable[-max(1, round(len(usable) / 5)) :]
        held_out = sections_within(last if val_sections is None else val_sections, count, "--val_sections", usable)
    else:
        if not 2 <= folds <= len(usable):
            raise DataError(f"--folds must be from 2 to the number of sections, {len(usable)}. Received: {folds}")
        if not 0 <= fold < folds:
            raise DataError(f"--fold must be from 0 to {folds - 1}. Received: {fold}")
        held_out = tuple(np.array_split(usable, folds)[fold].tolist())
    if train_sections is not None and (both := set(allowed) & set(held_out)):
        raise DataError(f"--train_sections must not be held out as well. Received: {format_sections(both)}")
    rest = [i for i in usable if min(abs(i - j) for j in held_out) > gap]
    beside = tuple(sorted(set(usable).difference(rest, held_out)))
    runs = [allowed[i : i + inner] for i in range(len(allowed) - inner + 1) if inner]
    inside = [run for run in runs if set(rest).issuperset(run)]
    chosen = min(inside, key=lambda run: min(abs(i - j) for i in run for j in held_out), default=())
    train = tuple(i for i in rest if i in allowed and i not in chosen)
    if not train or len(chosen) < inner:
        wanted = f"hold out {len(held_out)}, leave out {len(beside)}, choose weights on {inner} and still train"
        found = f"{len(usable)}" + " with labels" * (len(usable) < count)
        found = found if train_sections is None else f"--train_sections {format_sections(allowed)} of {found}"
        hint = "; --protocol all or published train on a single one" if len(usable) == 1 else ""
        raise DataError(f"--protocol {protocol}: too few sections to {wanted}. Received: {found}{hint}")
    return Split(protocol, train, chosen, held_out, beside)


def sections_within(sections, count, argument, usable=None):
    """Section numbers, sorted, of those that are `usable`, or a DataError that names the argument."""
    chosen = tuple(sorted({int(i) for i in sections}))
    if not chosen or chosen[0] < 0 or chosen[-1] >= count:
        raise DataError(f"{argument} must lie in 0-{count - 1}. Received: {format_sections(chosen) or 'none'}")
    kept = tuple(i for i in chosen if usable is None or i in usable)
    if not kept:
        raise DataError(f"{argument} must name sections with labels. Received: {format_sections(chosen)}, without any")
    return kept


def parse_sections(text):
    """Parse section numbers, counted from 0.

    >>> parse_sections("0,3,5-7")
    (0, 3, 5, 6, 7)
    """
    found = []
    for part in str(text).split(","):
        match = re.fullmatch(r"\s*([0-9]{1,6})\s*(?:-\s*([0-9]{1,6})\s*)?", part)
        named = range(int(match[1]), int(match[2] or match[1]) + 1) if match else ()
        if not named or not set(named).isdisjoint(found):
            rule = "numbers and ranges that go up, each section once, such as 24-29 or 0,3,5-7"
            raise DataError(f"sections must be {rule}. Received: {text}")
        found += named
    return tuple(sorted(found))


def montage(sections, rows, columns, order):
    """Lay (rows * columns, H, W) out as one picture: the protocol of 2017, 6 x 5 to train and 5 x 6 to validate.

    `order` is a permutation, drawn by the caller; `order[0]` comes at the top left, `order[1]` to the right of it.
    """
    height, width = sections.shape[1:]
    grid = sections[np.asarray(order)].reshape(rows, columns, height, width)
    return grid.swapaxes(1, 2).reshape(rows * height, columns * width)


# --- What the files are -------------------------------------------------------------------------------------


def describe(
    image_path,
    mask_path=None,
    *,
    channel=None,
    shipped_nm=None,
    window=512,
    multiple=8,
    windows=None,
    split=None,
    **how,
):
    """Lines that say in plain words what the files are, and what training would do with them, section by section.

    Those that begin with "warning:" want attention, those that begin with "problem:" would stop training; an image
    that cannot be read at all raises DataError.

    Parameters
    ----------
    shipped_nm : (z, y, x), optional
        Voxel of the shipped network's training sections.
    window : int or None
        Side of a training window, px, a multiple of `multiple`. None: the largest of the recipes' that fits.
    windows : dict of int, optional
        The recipes' windows by their names.
    split : dict, optional
        `protocol`, `gap` and `inner`, as in `split_sections`. Default: the last fifth is held out.
    how
        `invert_mask`, `instances` and `ignore`, as in `load_pair`.
    """
    split = split or {"protocol": "holdout"}
    with iter_sections(image_path, what="image", channel=channel) as images:
        lines, labelled, count = _image_lines(images), None, len(images)
        if factors := pixel_factors(images.voxel_nm, shipped_nm):
            way = "predict --rescale resamples the stack" if can_resample(factors) else "no network for this stack"
            lines += [f"  the shipped network was trained on {pixel_words(shipped_nm)}: {way}"]
        if mask_path is not None:
            found, labelled, count = _mask_lines(images, mask_path, **how)
            lines += found
        return lines + _training_lines(images, count, window, multiple, windows or {}, split, labelled)


def _file_lines(kind, reader):
    about = ", ".join(filter(None, [shape_words(reader), str(reader.dtype), reader.description]))
    return [f"{kind}: {reader.source}", f"  {about}"]


def _image_lines(images):
    spans = []

    def measured():
        for section in images:
            spans.append((section.min(), section.max()))
            yield section

    norm = Normalisation.fit(measured())
    flat = [i for i, (low, high) in enumerate(spans) if low == high]
    lows, highs = zip(*spans, strict=True)
    return [
        *_file_lines("image", images),
        f"  values {min(lows):g} to {max(highs):g}, mean {norm.mean:.4g}, standard deviation {norm.std:.4g}",
        f"  {voxel_words(images.voxel_nm)}",
        *([f"warning: sections of a single gray value: {format_sections(flat)}"] if flat else []),
    ]


def _mask_lines(images, mask_path, *, invert_mask=False, instances=False, ignore=None):
    """Return lines, the sections with labels, or None where that is not known, and how many sections are kept."""
    lines = [f"mask: {mask_path}"]
    try:
        with iter_sections(mask_path, what="mask", ids=instances) as masks:
            lines = _file_lines("mask", masks)
            kept, order, said = labels.match(images, masks, instances)
            sections, messages = labels.labelled(masks, ignore)
            if instances:
                messages += labels.instance_messages(masks, ignore)
            else:
                messages += labels.meaning(masks, invert_mask, ignore)[1]
    except DataError as error:
        return [*lines, f"problem: {error}"], None, len(images)
    labelled = None if ignore is None else [i for i, place in enumerate(order) if place in sections]
    lines += [line if line.startswith("warning:") else f"  {line}" for line in messages + said]
    return lines, labelled, len(kept)


def _training_lines(images, count, window, multiple, windows, split, labelled):
    height, width = images.shape[1:]
    fitting = {name: side for name, side in windows.items() if side <= min(height, width)}
    window = window or max(fitting.values(), default=min(windows.values(), default=512))
    crops = "whole sections" if height == width == window else f"crops of {window} x {window} px"
    nbytes = math.prod(images.shape) * (images.dtype.itemsize + 1)  # all are read, before some are left out
    lines = ["training:"]
    for attempt in (
        lambda: split_sections(count, **split, labelled=labelled).describe(),
        lambda: (
            check_window(images, window, multiple)
            or f"{crops}, normalised by the mean and deviation of those that train"
        ),
        lambda: require_memory(nbytes, "the stack and its masks") or f"{memory_words(nbytes)} of memory for the stack",
    ):
        try:
            lines.append(f"  {attempt()}")
        except DataError as error:
            lines.append(f"problem: {error}")
    if windows:
        said = ", ".join(f"{name} ({side} px)" for name, side in fitting.items()) or "none"
        others = " to the others" * bool(fitting)
        hint = f"; add a smaller --window{others}" * (len(fitting) < len(windows))
        lines.append(f"  recipes whose window fits: {said}{hint}")
    if height % 8 or width % 8:
        lines.append(f"  {height} x {width} px is no multiple of 8: prediction mirrors the borders")
    return lines
