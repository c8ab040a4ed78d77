"""Predictions and masks out: ImageJ TIFF, section by section."""

import math

import numpy as np

from files.atomic import DataError, replacing
from files.sections import some

ROWS = 256  # are written at a time
CLASSIC_TIFF_BYTES = 2**32 - 2**25  # beyond this, offsets need BigTIFF


def write_prediction(path, sections, *, count, shape, voxel_nm=None, force=False, made_of=None):
    """Write interior probabilities in the challenge's format: float32, ZYX, 0..1 with 1 = interior.

    Parameters
    ----------
    sections : iterable of `count` ndarrays of shape (H, W), or of iterables of their rows, (h, W)
        Written one by one: memory does not grow with their number. Values are clipped to 0..1; a DataError where a
        section is not finite, `path` exists, or the disk is full; a ValueError where one is missing or of another
        shape.
    voxel_nm : (z, y, x), optional
    made_of : dict of str, optional
        Of what, in words without spaces; a reader's `made_of` gives it back.
    """

    def probability(section, index):
        section = np.asarray(section, np.float32)
        low, high = section.min(), section.max()  # a large section is not copied
        if not (np.isfinite(low) and np.isfinite(high)):
            raise DataError(f"{path}: the prediction of section {index} is not finite.")
        return section if low >= 0 and high <= 1 else np.clip(section, 0.0, 1.0)

    about = {"voxel_nm": voxel_nm, "made_of": made_of}
    _write(path, sections, probability, np.dtype("float32"), (count, *shape), about, force)


def write_mask(path, sections, *, count, shape, voxel_nm=None, force=False, made_of=None, dtype="uint8"):
    """Write a mask section by section: 0/255 from 0/1, bool or 0/255; uint16 and uint32 labels as they are.

    Parameters as in `write_prediction`.
    """
    dtype = np.dtype(dtype)

    def mask(section, index):
        if np.asarray(section).dtype == bool and dtype == np.uint8:
            return np.asarray(section).view(np.uint8) * np.uint8(255)
        values = np.unique(np.asarray(section))
        allowed = (0, 1, 255) if dtype == np.uint8 else np.clip(values, 0, np.iinfo(dtype).max)
        if not np.isin(values, allowed).all():
            rule = "0 and 1, or 0 and 255" if dtype == np.uint8 else f"labels of type {dtype}"
            raise DataError(f"{path}: section {index} must hold {rule}. Received: {some(values)}")
        return np.where(section, 255, 0).astype(dtype) if dtype == np.uint8 else np.asarray(section, dtype)

    about = {"voxel_nm": voxel_nm, "made_of": made_of}
    _write(path, sections, mask, dtype, (count, *shape), about, force)


def _write(path, sections, convert, dtype, shape, about, force):
    import tifffile

    layout = _layout(**about, shape=shape, dtype=dtype)
    with replacing(path, force=force) as partial:
        tifffile.imwrite(partial, shape=shape, dtype=dtype, photometric="minisblack", **layout)
        with tifffile.TiffFile(partial) as made:
            first, dtype = made.series[0].dataoffset, dtype.newbyteorder(made.byteorder)
        with open(partial, "r+b") as file:
            file.seek(first)
            done = [sum(_append(file, rows, shape, dtype) for rows in each) for each in _by_rows(sections, convert)]
        if done != [shape[1]] * shape[0]:
            raise ValueError(f"sections must be {shape[0]} of {shape[1]} rows. Received: {done}")


def _by_rows(sections, convert):
    for index, section in enumerate(sections):
        yield (convert(rows, index) for rows in rows_of(section))


def rows_of(section):
    """The rows of a section that comes as some of them after the other, or is an array."""
    return [section] if hasattr(section, "shape") else section


def _append(file, rows, shape, dtype):
    """Write rows, some at a time, for the file's byte order takes a copy; returns their number."""
    if rows.shape[1:] != shape[2:]:
        raise ValueError(f"rows must be of {shape[2]} px. Received: {rows.shape}")
    for start in range(0, len(rows), ROWS):
        file.write(np.ascontiguousarray(rows[start : start + ROWS], dtype).data)
    return len(rows)


def _layout(voxel_nm, made_of, shape, dtype):
    """Return tifffile's settings: ImageJ's own format, or OME where that has no room."""
    import tifffile

    nbytes = math.prod(shape) * dtype.itemsize
    said = {f"made_of_{key}": value for key, value in (made_of or {}).items()}
    sizes = {axis: nm / 1e3 for axis, nm in zip("ZYX", voxel_nm or (), strict=False) if nm}
    if nbytes > CLASSIC_TIFF_BYTES:
        about = {f"PhysicalSize{axis}": um for axis, um in sizes.items()}
        about |= {f"PhysicalSize{axis}Unit": "\u00b5m" for axis in sizes}
        about["Description"] = "\n".join(f"{key}={value}" for key, value in said.items())
        layout = {"ome": True, "bigtiff": True, "metadata": {"axes": "ZYX", **about}}
        if "X" in sizes:  # for ImageJ, which does not read OME's
            layout |= {"resolution": (1e4 / sizes["X"], 1e4 / sizes["Y"]), "resolutionunit": "CENTIMETER"}
        return layout
    about = {"axes": "ZYX"} | said | ({"spacing": sizes["Z"]} if "Z" in sizes else {})
    layout = {}
    if "X" in sizes:
        about["unit"], layout["resolution"] = "um", (1 / sizes["X"], 1 / sizes["Y"])
    if dtype == np.uint32:  # which ImageJ reads, and tifffile does not write for it
        return layout | {"metadata": None, "description": tifffile.imagej_description(shape, **about)}
    return layout | {"imagej": True, "metadata": about}
