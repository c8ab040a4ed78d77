"""Files and folders of sections: opened as readers, loaded as stacks.

Whatever is wrong with somebody's file ends in a `DataError` of one sentence. `data.py` is the door to it.
"""

import hashlib
import math
from pathlib import Path

import numpy as np

from files.atomic import DataError, within
from files.hdf5 import open_hdf5
from files.mrc import open_mrc
from files.sections import (
    Stack,
    StackReader,
    channel_of,
    colour_rule,
    natural_key,
    refusal,
    require_memory,
    shape_words,
    shared_end,
    some,
)
from files.tiff import open_tiff

SUFFIXES = (".tif", ".tiff", ".png")
UNREAD = (".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".dm3", ".dm4", ".czi", ".nd2", ".lif")  # pictures all the same


def open_stack(found, what="image", *, ids=False, channel=None):
    """Open a file, a folder of sections or a Stack as a StackReader.

    `what` is the role, for messages. With `ids` the values are numbers of cells, and stay what is stored: neither
    a palette nor "0 is white" is applied. `channel` is needed where there are several.
    """
    if isinstance(found, Stack):
        channel_of(1, channel, what, found.source)
        return _open_memory(found)
    path, inside = Path(within(found)[0]), within(found)[1]
    if inside and path.suffix.lower() not in HDF5:
        raise refusal(what, found, "names an array inside of what holds none: that goes with HDF5 and Zarr")
    how = {"ids": ids, "channel": channel}
    return _open_folder(path, what, how) if path.is_dir() else _open_file(path, what, inside=inside, **how)


def load(reader):
    """Read all sections of a StackReader into a Stack, and close it."""
    with reader:
        require_memory(math.prod(reader.shape) * reader.dtype.itemsize, f"{reader.source}: {shape_words(reader)}")
        sections = np.empty(reader.shape, reader.dtype)
        for i, section in enumerate(reader):
            sections[i] = section
        return Stack(sections, reader.voxel_nm, reader.names, reader.source, reader.description, reader.made_of)


def _open_memory(stack):
    about = {"source": stack.source, "voxel_nm": stack.voxel_nm, "description": stack.description}
    about |= {"names": stack.names, "made_of": stack.made_of}
    return StackReader(lambda *part: stack.sections[part], stack.shape, stack.dtype, **about)


def _open_file(path, what, **how):
    try:
        return READERS.get(path.suffix.lower(), open_tiff)(path, what, **how)
    except DataError:
        raise
    except ModuleNotFoundError as error:
        raise refusal(what, path, f"needs {error.name}: pip install -r requirements-formats.txt") from error
    except Exception as error:  # struct, index, key and codec errors on a damaged file
        why = f"it is damaged, cut off or no {path.suffix} file: {error}"
        if path.suffix.lower() not in ("", *SUFFIXES, *READERS):
            why = f"files of that kind are not read ({', '.join(dict.fromkeys([*SUFFIXES, *READERS]))} are)"
        words = getattr(error, "strerror", None) or why
        raise refusal(what, path, f"cannot be read: {words}") from error


def _open_folder(folder, what, how):
    """Open the sections of a folder in natural order; the first file says what the others must be."""
    files = _sections_in(folder, what)
    stems = [file.stem for file in files]
    if len(files) == 1:
        return _open_file(files[0], what, **how)
    if twice := sorted({stem for stem in stems if stems.count(stem) > 1}, key=natural_key):
        raise refusal(what, folder, f"holds two files of the same name: {some(twice)}")
    with _open_file(files[0], what, **how) as first:
        words = f"folder of {len(files)} files, {first.description}"
        about = {"voxel_nm": first.voxel_nm, "description": words, "names": stems, "source": folder}
    size, dtype = first.shape[1:], first.dtype

    def read(index, rows, columns):
        with _open_file(files[index], what, **how) as reader:
            if (reader.shape, reader.dtype) != ((1, *size), dtype):
                rule = f"; each file of its folder must hold one of {size[0]} x {size[1]} px, {dtype}"
                rule += " (files that OME metadata joins are read by the name of one of them)" * (len(reader) > 1)
                raise refusal(what, files[index], f"holds {shape_words(reader)}, {reader.dtype}{rule}")
            return reader.part(0, rows, columns)

    return StackReader(read, (len(files), *size), dtype, **about)


def _sections_in(folder, what):
    try:
        found = [path for path in folder.iterdir() if path.name[0] != "."]
    except OSError as error:
        raise refusal(what, folder, f"cannot be read: {error.strerror or error}") from error
    files, unread = ([path for path in found if path.suffix.lower() in kinds] for kinds in (SUFFIXES, UNREAD))
    if gone := [path.name for path in files if not path.exists()]:
        raise refusal(what, folder, f"holds links to files that do not exist: {some(gone)}")
    files = [path for path in files if path.is_file()]
    if len(unread) > len(files):
        kinds = some(sorted({path.suffix for path in unread}))
        rule = f"holds {len(unread)} files of a kind that is not read: {kinds}; save them as TIFF or PNG"
        raise refusal(what, folder, rule)
    if not files:
        raise refusal(what, folder, f"holds no {', '.join(SUFFIXES)} files")
    rest = len(shared_end([path.stem for path in files]))  # without it images and their masks have one order
    return sorted(files, key=lambda path: natural_key(path.stem[: len(path.stem) - rest]))


# --- PNG ----------------------------------------------------------------------------------------------------


def _open_png(path, what, ids=False, channel=None, **_):
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None  # large sections are no attack: what cannot fit is refused here
    with Image.open(path, formats=["PNG"]) as picture:
        picture.verify()  # the checksums, which reading the pixels does not look at
    with Image.open(path, formats=["PNG"]) as picture:
        mode, frames = picture.mode, getattr(picture, "n_frames", 1)
        require_memory(8 * math.prod(picture.size), f"{path}: the picture")
        step = {"L;2": 85, "L;4": 17}.get(picture.tile[0][3])  # by which Pillow multiplies 2 or 4 bits
        pixels = np.asarray(picture if ids else _without_palette(picture))
    if step and (ids or what == "mask"):
        pixels = pixels // step
    if frames > 1:
        raise refusal(what, path, f"is a film of {frames} pictures; each section must be a file")
    if pixels.ndim != 2:
        raise refusal(what, path, colour_rule(what, f"{pixels.shape[-1]} channels"))
    channel_of(1, channel, what, path)
    about = {"source": path, "description": f"PNG, mode {mode}"}
    return StackReader(lambda _, *part: pixels[part], (1, *pixels.shape), pixels.dtype, **about)


def _without_palette(picture):
    """Turn a palette of grays into the grays; a palette of colours stays RGB, and is refused as such."""
    if picture.mode != "P":
        return picture
    colours = picture.convert("RGB")
    return colours.getchannel(0) if len({band.tobytes() for band in colours.split()}) == 1 else colours


HDF5 = (".h5", ".hdf5", ".hdf")
READERS = {
    ".png": _open_png,
    **dict.fromkeys(HDF5, open_hdf5),
    **dict.fromkeys((".mrc", ".mrcs", ".map", ".rec", ".st"), open_mrc),
}  # of everything else: TIFF


def sha256_pixels(sections):
    """Return the SHA-256 of an array's or a reader's pixels in C order, little-endian, whatever container held them."""
    digest = hashlib.sha256()
    for part in sections:
        digest.update(np.ascontiguousarray(part.astype(part.dtype.newbyteorder("<"), copy=False)))
    return digest.hexdigest()
