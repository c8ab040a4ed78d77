"""From which images a prediction was made, and whether the labels that it is scored against are theirs.

`predict` writes the SHA-256 of the images' pixels into its output. Two stacks of one size are easily taken for each
other: `predict --image_path isbi2012` means the test stack, `evaluate --mask_path isbi2012` the training labels.
"""

import contextlib
import hashlib
from pathlib import Path

import numpy as np

import data
from files.fetching import ISBI_ROLES


def check(prediction, labels, given, sections):
    """Return warnings where a prediction was made from other images than are labelled, or is the images; or refuse it.

    `prediction` and `given` (what ``--image_path`` names, or None) are `Sections` of `score.evaluation`, `labels` is a
    Stack, and `sections` are the numbers of those that are scored.
    """
    made_from = prediction.reader.made_of.get("pixels_sha256")
    own, other = images_of(labels)
    if not made_from:
        same = [given.source] if given is not None and all(map(np.array_equal, prediction, given)) else []
        same += [_name(images) for images in (own, other) if images and _is(prediction, images, sections)]
        return [f"warning: --prediction holds the pixels of {name}: images, not a prediction" for name in same[:1]]
    if other is not None and made_from == sha256(other):
        raise data.DataError(
            f"--prediction was made from {_name(other)}, and --mask_path labels {_name(own)}: name the labels of the "
            "images that were predicted (those of isbi2012's test images are isbi2012-test)."
        )
    images = own if given is None else given.reader
    if images is None or made_from == sha256(images):
        return []
    return [f"warning: the prediction was made from other images than {_name(images)}, or from a part of them"]


def images_of(labels):
    """Return the images of known labels, and those that they are taken for, by place or as a Stack; else None."""
    if labels.source == "synthetic":
        both = (data.resolve("synthetic", role) for role in ("image", "test"))
        return tuple(sorted(both, key=lambda images: images.description != labels.description))
    path = Path(labels.source)
    pairs = {ISBI_ROLES["mask"]: ("image", "test"), ISBI_ROLES["test_mask"]: ("test", "image")}
    if path.name in pairs:
        found = [path.with_name(ISBI_ROLES[role]) for role in pairs[path.name]]
    elif path.name == "SEG" and path.parent.name[:2] in ("01", "02"):  # of the Cell Tracking Challenge
        found = [path.parents[1] / sequence for sequence in sorted(("01", "02"), key=path.parent.name[:2].__ne__)]
    else:
        found = []
    return tuple(place if place.exists() else None for place in found) or (None, None)


def _is(prediction, images, sections):
    """Whether a prediction is these sections of a stack of images, which may be damaged or of another size."""
    with contextlib.suppress(data.DataError), data.iter_sections(images) as reader:
        pairs = zip(prediction, sections, strict=True)
        return len(reader) > max(sections) and all(np.array_equal(section, reader[i]) for section, i in pairs)
    return False


def sha256(images):
    """Return what `data.sha256_pixels` gives for a path, Stack or open StackReader, one section in memory at a time."""
    digest = hashlib.sha256()
    for section in images if isinstance(images, data.StackReader) else data.iter_sections(images):
        digest.update(np.ascontiguousarray(section.astype(section.dtype.newbyteorder("<"), copy=False)))
    return digest.hexdigest()


def _name(images):
    return images if isinstance(images, Path) else f"{images.source} ({images.description})"
