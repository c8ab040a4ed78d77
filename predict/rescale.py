"""Pixel sizes: what is said where a stack has others than the training sections, and `--rescale`.

A network knows structures of so many pixels. With --rescale each section is resampled in its plane to the pixel size of
the training, smoothed first where it shrinks, and its probability is resampled back to the size of the section.
"""

import math

import numpy as np

from data import DataError
from files.sections import RESCALED, can_resample, pixel_factors, pixel_words, require_memory, size_words

FAR = "too far apart to resample, so train a network of your own, or correct the pixel size"


def seen_sizes(sections, records, asked, log):
    """Say which pixel sizes differ; return the size (H, W) at which each network looks at a section of a StackReader.

    `records` are those of the weights; `asked` says whether --rescale was given, else the sizes are the section's own.
    """
    size, sizes = sections.shape[1:], []
    for trained in [record.get("data", {}).get("voxel_nm") for record in records]:
        if asked and (trained is None or sections.voxel_nm is None):
            of = "the stack" if sections.voxel_nm is None else "the training sections"
            raise DataError(f"--rescale needs to know the pixel size of {of}, and no file says it.")
        factors = pixel_factors(sections.voxel_nm, trained)
        sizes.append(_size(size, factors) if asked and factors else size)
        if factors:
            found = f"pixels are {pixel_words(sections.voxel_nm)}, those of the training {pixel_words(trained)}"
            back = f"{found}: resampled to {size_words(sizes[-1])} px and back"
            way = "--rescale with a TIFF --output resamples" if can_resample(factors) else FAR
            log(back if asked else f"warning: {found}: {way}")
        elif asked:
            log("--rescale: the pixels are those of the training sections to within a tenth, so nothing is resampled")
    return sizes


def _size(size, factors):
    if not can_resample(factors):
        found = " x ".join(f"{factor:.3g}" for factor in factors)
        raise DataError(f"--rescale must change a section by at most {RESCALED} times. Received: {found}")
    found = tuple(max(1, round(length * factor)) for length, factor in zip(size, factors, strict=True))
    require_memory(12 * math.prod(found), f"--rescale: a section of {size_words(found)} px")
    return found


def seen_at(size, predict):
    """A predictor of sections that are seen at another size; `predict` as it is where the size is theirs."""

    def rescaled(section):
        height, width = section.shape
        if (height, width) == tuple(size):
            return predict(section)
        from skimage.transform import resize

        pixels = np.asarray(section[0:height, 0:width], np.float32)
        seen = resize(pixels, size, order=1, mode="reflect", anti_aliasing=True)
        return resize(predict(seen), (height, width), order=1, mode="reflect", anti_aliasing=True)

    return rescaled
