"""What the values of a mask mean, and which mask goes with which image; readers in, words out."""

import math
import os
import re
from collections import Counter

import numpy as np

from files.atomic import DataError, is_zarr
from files.sections import format_sections, shape_words, shared_end, shared_start, some, strips

UNLABELLED = -1  # what `--ignore_label` names becomes this in masks and in numbers of cells


def labelled(reader, ignore):
    """Return the sections that hold a label other than `ignore`, and how much is labelled, in words."""
    if ignore is None:
        return range(len(reader)), []
    shares = np.array([np.mean(section != ignore) for section in reader])
    if shares.min() == 1 or not shares.any():
        found = f"{ignore}, which is {'all' if not shares.any() else 'nowhere'} in {reader.source}"
        raise DataError(f"--ignore_label must be one of the values of --mask_path. Received: {found}")
    without = format_sections(np.flatnonzero(shares == 0))
    said = [f"labels: {ignore} = not labelled; {shares.mean():.1%} of the pixels are labelled"]
    words = f"sections without labels, which neither train nor are scored: {without}"
    return np.flatnonzero(shares).tolist(), [*said, *[words] * bool(without)]


def meaning(reader, invert, ignore=None):
    """Return the value that is the interior of a mask with two values beside `ignore`, and messages."""
    tallies = list(_tallies(reader, ignore))
    values = sorted(set().union(*tallies))
    if ignore is not None and len(values) < 2:
        left = ", ".join(map(str, values)) or "none"
        rule = f"must leave two label values in {reader.source}"
        raise DataError(f"--ignore_label {rule}. Received: {ignore}, which leaves {left}")
    interior = max(values, key=lambda value: (value != 0, value)) or 1
    fractions = np.array([tally[interior] / tally.total() if tally else np.nan for tally in tallies])
    fractions = 1 - fractions if invert else fractions
    share = np.average(np.nan_to_num(fractions), weights=[tally.total() for tally in tallies])
    names = {value: "interior" if (value == interior) != invert else "membrane" for value in values}
    said = ", ".join(f"{value} = {names[value]}" for value in values)
    of = "pixels" if ignore is None else "labelled pixels"
    said += f"{' (inverted)' if invert else ''}; interior {share:.1%} of the {of}"
    return interior, [f"labels: {said}", *_label_warnings(fractions, share, invert)]


def _tallies(reader, ignore):
    """Count the pixels of each value but `ignore`, section by section; refuse a third value where it turns up."""
    known = set()
    for index, section in enumerate(reader):
        tally = Counter()
        for strip in strips(section):
            strip = strip if ignore is None else strip[None, strip != ignore]
            values, counts = np.unique(strip, return_counts=True)
            known.update(values[:9].tolist())
            if len(known) > 2:
                raise DataError(_too_many_values(reader, index, strip, sorted(known), ignore))
            tally.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
        yield tally


def _label_warnings(fractions, share, invert):
    if share == 0:
        return ["warning: the mask is all background: no pixel is interior"]
    if share == 1:
        return ["warning: the mask is all interior: no pixel is membrane"]
    turn = f"warning: the interior is the minority: inverted labels? Try {'without' if invert else 'with'}"
    found = [f"{turn} --invert_mask"] if share < 0.5 else []
    for value, name in ((0, "interior"), (1, "membrane")):
        if (fractions == value).any():
            found.append(f"warning: sections without {name}: {format_sections(np.flatnonzero(fractions == value))}")
    return found


def _too_many_values(reader, index, pixels, values, ignore):
    between = ((pixels != values[0]) & (pixels != pixels.max()))[:, 1:]
    flat = np.mean((pixels[:, 1:] == pixels[:, :-1])[between]) if between.any() else None
    if flat is None:
        like = "a third value appears there"
    elif flat <= 0.8 and between.mean() < 0.2:
        like = "it looks like a mask blurred by resampling or JPEG: threshold it"
    elif flat > 0.8:
        like = "it looks like an instance mask (a number per cell), which --instances takes"
    else:
        like = "it looks like an image or a probability map, not a mask"
    shown = some([f"{value:g}" for value in values])
    three = ignore is None and len(values) == 3 and all(np.isin(section, values).all() for section in reader)
    like += "; if one of the three means 'not labelled', name it with --ignore_label" * three
    rule = "two label values" + (f" beside {ignore}" if ignore is not None else "")
    return f"--mask_path: {reader.source} must hold {rule}. Received up to section {index}: {shown}; {like}."


def require_ids(section, what):
    """The numbers of cells of a section, of a type for whole numbers; refuse what are none."""
    low, high = section.min(), section.max()
    whole = section.dtype.kind in "biu" or (high < 2**24 and (section == np.rint(section)).all())
    if not whole or low < 0 or high >= 2**31:
        rule = "must hold whole numbers below 2**31 (2**24 in a file of floats), 0 = background, with --instances"
        raise DataError(f"{what} {rule}. Received: {section.dtype} {low}..{high}")
    return section if section.dtype.kind in "biu" else section.astype(np.int32)  # as Fiji saves what was uint32


ONE_FOR_ALL = "all cells have one and the same number: is this a mask of cells and background, without --instances?"


def one_for_all(sections):
    """Whether separate cells share the only number there is: a mask that was taken for numbers of cells."""
    from scipy import ndimage

    known, parts = set(), 0
    for section in sections:
        known.update(np.unique(section[section > 0])[:2].tolist())
        if len(known) > 1:
            return False
        parts = max(parts, ndimage.label(section > 0)[1])
    return parts > 1


def cells_of(section, ignore):
    """The numbers of cells, 0 where there is no label."""
    return section if ignore is None else section * (section != ignore)


def instance_messages(reader, ignore=None):
    """Return messages about numbered cells; refuse what are no numbers of cells."""
    if ignore == 0:
        raise DataError("--ignore_label must not be 0 with --instances, where 0 is the background. Received: 0")
    counts, filled, bare, pairs, alike = [], 0, [], 0, 0
    for index, section in enumerate(reader):
        bare += [index] * (not section.any())
        section = cells_of(section, ignore)
        section = require_ids(section, f"--mask_path: {reader.source}")
        counts.append(np.count_nonzero(np.unique(section)))
        filled += np.count_nonzero(section)
        pairs += np.count_nonzero(section[:, 1:])  # of a pixel of a cell and its left neighbour
        alike += np.count_nonzero((section[:, 1:] > 0) & (section[:, 1:] == section[:, :-1]))
    share = f"{filled / math.prod(reader.shape):.1%} of the pixels"
    empty = ["warning: the mask is all background: no pixel is interior"] if not filled else []
    if bare and filled:
        words = f"warning: sections that are all background: {format_sections(bare)}; if they are not labelled"
        empty = [f"{words}, give them a value of their own and name it with --ignore_label"]
    one = [f"warning: {ONE_FOR_ALL}"] * one_for_all(cells_of(section, ignore) for section in reader)
    gray = ["warning: these look like the gray values of an image, not like numbers of cells"]
    doubts = [*empty, *one, *(gray if alike < pairs / 2 else [])]
    return [f"labels: instances, {min(counts)} to {max(counts)} a section; {share}", *doubts]


# --- Pairs ---------------------------------------------------------------------------------------------------


def match(images, masks, instances):
    """Return the images that have masks, the mask of each, and what was done in words."""
    kept = range(len(images.names))
    one_frame = len(masks.names) == 1 and masks.names[0][-1:].isdigit()
    if instances and is_folder(images) and (is_folder(masks) or one_frame):
        # the frames whose number is on a mask
        numbers = {_last_number(name) for name in masks.names}
        labelled = [i for i, name in enumerate(images.names) if _last_number(name) in numbers]
        kept = labelled if len(labelled) == len(masks.names) < len(kept) else kept
    left_out = len(kept) < len(images.names)
    if (len(kept), *images.shape[1:]) != tuple(masks.shape):
        wanted, found = shape_words(images), shape_words(masks)
        raise DataError(f"--mask_path: the masks must be like the images, {wanted}. Received: {found}")
    order, said = _pairs(images, [images.names[i] for i in kept], masks)
    words = f"pairs: {len(kept)} of {len(images.names)} frames are labelled, the others are left out"
    said = f"pairs: by number, {images.names[kept[0]]} with {masks.names[0]}" if left_out and len(kept) == 1 else said
    return kept, order, [*[words] * left_out, said]


def order_of(images, masks):
    """Return the mask's index for each image, and the words, where both are folders of as many files; else None."""
    if 1 < len(images.names) == len(masks.names) and is_folder(images) and is_folder(masks):
        return _pairs(images, images.names, masks)
    return None


def is_folder(stack):
    """Whether each section is a file with a name of its own."""
    return holds_files(stack.source)


def holds_files(path):
    """Whether a path is a folder of sections."""
    return os.path.isdir(path) and not is_zarr(path)


def _last_number(name):
    digits = re.findall("[0-9]+", name)
    return int(digits[-1]) if digits else None


def _pairs(images, names, masks):
    """Return the mask's index for each name of an image, and what was done in words."""
    if len(names) < 2 or not (is_folder(images) and is_folder(masks)):
        return range(len(names)), "pairs: sections and masks go together by their order"
    for key in (list, _bare_names):
        ours, theirs = key(names), key(masks.names)
        if set(ours) == set(theirs) and len(set(ours)) == len(ours):
            order = [theirs.index(name) for name in ours]
            return order, f"pairs: by name, {names[0]} with {masks.names[order[0]]}, and so on"
    alone = (name for name, bare in zip(names, ours, strict=True) if bare not in theirs or ours.count(bare) > 1)
    raise DataError(
        f"--mask_path: the names in {masks.source} ({some(masks.names, 2)}) must be those in {images.source}, but for "
        f"what all share at their start or end. Received no mask, or more than one, for {next(alone, names[0])}"
    )


def _bare_names(names):
    """Strip what all names share at either end; what is left as a number counts as one, so that 007 is 7."""
    start, end = shared_start(names), shared_end(names)
    bare = [name[len(start) : len(name) - len(end)] for name in names]
    return [str(int(name)) if name.isdecimal() else name for name in bare]
