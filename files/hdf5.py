"""HDF5 in: one data set of a file, as ilastik, Fiji and CREMI write them."""

import json
import os
from pathlib import Path

from files.sections import array_reader, guess_axes, only_stack, refusal, some, voxel

CACHE_BYTES = 2**26  # of decoded chunks: a section of a chunk that is several sections deep is decoded once


def open_hdf5(path, what, inside="", channel=None, **_):
    """Open the data set `inside` of a file, or the only stack there is, as a StackReader; as `stacks.open_stack`."""
    import h5py

    file = h5py.File(path, "r", rdcc_nbytes=CACHE_BYTES)
    try:
        found = _data_set(h5py, file, path, what, inside)
        _require_sources(found, path, what)
        axes, source = _axes(found), f"{path}:{found.name}"
        words = f"HDF5, axes {''.join(axes)}, chunks {found.chunks}, {found.compression or 'uncompressed'}"
        about = {"voxel_nm": _voxel_nm(found), "description": words, "close": file.close}
        return array_reader(found, axes, what, source, channel, **about)
    except BaseException:
        file.close()
        raise


def _data_set(h5py, file, path, what, inside):
    """Return the data set that is named, or the only stack of the file or of the group that is named."""
    arrays, place = {}, file.get(f"/{inside}")

    def look(name, item):
        if isinstance(item, h5py.Dataset) and item.dtype.kind in "buif" and len(item.shape or ()) > 1:
            arrays[name] = item

    if isinstance(place, h5py.Dataset):
        return place
    (file if place is None else place).visititems(look)
    if place is None:
        raise refusal(what, path, f"holds no {inside}; it holds {some(list(arrays)) or 'no array'}")
    return arrays[only_stack(arrays, what, f"{path}:/{inside}" if inside else path)]


def _require_sources(found, path, what):
    """Refuse a virtual data set that lacks a file of its parts: HDF5 would read zeros there."""
    for name in {source.file_name for source in found.virtual_sources()} - {"."} if found.is_virtual else ():
        if "%" not in name and not any(os.path.exists(place) for place in (name, Path(path).parent / name)):
            raise refusal(what, path, f"takes sections from {name}, which is not there")


def _axes(found):
    """Read ilastik's names of the axes, or guess them."""
    try:
        axes = [axis["key"] for axis in json.loads(found.attrs["axistags"])["axes"]]
    except (KeyError, TypeError, ValueError):
        axes = []
    return axes if len(axes) == len(found.shape) else [*guess_axes(found.shape)]


def _voxel_nm(found):
    """Read the voxel size in nm from the attribute of Fiji's and ilastik's HDF5."""
    try:
        return voxel(*(1e3 * float(um) for um in found.attrs["element_size_um"]))
    except (KeyError, TypeError, ValueError):
        return None  # a voxel size that cannot be made out is unknown: no reason to refuse the pixels
