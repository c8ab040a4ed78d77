"""Files of sections: TIFF and PNG in, ImageJ TIFF out, one section in memory at a time.

Whatever is wrong with somebody's file ends in a `DataError` of one sentence. `data.py` is the door to it.
"""

import hashlib
import logging
import math
import re
import weakref
from dataclasses import dataclass, field

import numpy as np

from files.atomic import DataError, replacing

FLAGS = {"image": "--image_path", "mask": "--mask_path", "test": "--image_path", "test_mask": "--mask_path"}
SUFFIXES = (".tif", ".tiff", ".png")


@dataclass(frozen=True, eq=False)
class Stack:
    """Serial sections in memory.

    Attributes
    ----------
    sections : ndarray of shape (S, H, W), in the file's own type
    voxel_nm : (z, y, x) in nanometres, z None where only the pixel size is known; None where nothing is
    names : one name per section
    source : the file, folder or data set they came from
    description : axes and encoding, in words
    """

    sections: np.ndarray
    voxel_nm: tuple[float | None, float, float] | None = None
    names: list[str] = field(default_factory=list)
    source: str = ""
    description: str = ""


# --- Words --------------------------------------------------------------------------------------------------


def flag(what):
    """Return the flag that names a role: `--mask_path` for "mask"."""
    return FLAGS.get(what, f"--{what}")


def refusal(what, path, rule):
    """Return the error that says which argument's file breaks which rule."""
    return DataError(f"{flag(what)}: {path} {rule}.")


def size_words(shape):
    """Write the size of a section.

    >>> size_words((30, 512, 500))
    '512 x 500'
    """
    return " x ".join(str(n) for n in shape[-2:])


def some(items, most=8):
    """Write the first few of many."""
    shown = ", ".join(str(item) for item in items[:most])
    return f"{shown}, ..." if len(items) > most else shown


def natural_key(name):
    """Return a sorting key that puts section 2 before section 10.

    >>> sorted(["s10", "s2", "S1"], key=natural_key)
    ['S1', 's2', 's10']
    """
    parts = re.split(r"([0-9]+)", str(name))
    return [int(part) if i % 2 else part.casefold() for i, part in enumerate(parts)], str(name)


# --- Reading ------------------------------------------------------------------------------------------------


class StackReader:
    """Sections of a file or folder, one in memory at a time.

    `len(reader)`, `reader[i]` and iteration give arrays of shape (H, W); `shape` is (S, H, W). A section with
    NaN or infinite values is refused when it is read. Files close with the reader.
    """

    def __init__(self, read, shape, dtype, *, names, source, voxel_nm=None, description="", close=None):
        self._read = read
        self.shape = tuple(int(n) for n in shape)
        self.dtype = np.dtype(dtype).newbyteorder("=")
        self.names = list(names)
        self.source = str(source)
        self.voxel_nm = voxel_nm
        self.description = description
        self.close = weakref.finalize(self, close or (lambda: None))

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, index):
        if not -len(self) <= index < len(self):
            raise IndexError(f"section {index} of {len(self)}")
        index %= len(self)
        section = self._section(index)
        if self.dtype.kind == "f" and not np.isfinite(section).all():
            bad = np.count_nonzero(~np.isfinite(section))
            raise DataError(f"{self._place(index)} holds {bad} NaN or infinite values.")
        return section

    def _section(self, index):
        try:
            return np.asarray(self._read(index)).astype(self.dtype, copy=False)
        except DataError:
            raise
        except Exception as error:  # decoders raise whatever they like on a damaged file
            raise DataError(f"{self._place(index)} is damaged or cut off: {error}.") from error

    def _place(self, index):
        return f"{self.source}: section {index} ({self.names[index]})"

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def open_stack(found, what="image"):
    """Open a file, a folder of sections or a Stack as a StackReader; `what` is the role, for messages."""
    if isinstance(found, Stack):
        return _open_memory(found)
    return _open_folder(found, what) if found.is_dir() else _open_file(found, what)


def load(reader):
    """Read all sections of a StackReader into a Stack, and close it."""
    with reader:
        sections = np.empty(reader.shape, reader.dtype)
        for i, section in enumerate(reader):
            sections[i] = section
        return Stack(sections, reader.voxel_nm, reader.names, reader.source, reader.description)


def _open_memory(stack):
    sections = stack.sections
    if sections.ndim != 3 or sections.size == 0:
        raise DataError(f"{stack.source or 'stack'}: must have shape (S, H, W). Received: {sections.shape}")
    about = {"source": stack.source, "voxel_nm": stack.voxel_nm, "description": stack.description}
    names = stack.names or [str(i) for i in range(len(sections))]
    return StackReader(sections.__getitem__, sections.shape, sections.dtype, names=names, **about)


def _open_file(path, what):
    try:
        if path.stat().st_size == 0:
            raise refusal(what, path, "is empty (0 bytes)")
        return _open_png(path, what) if path.suffix.lower() == ".png" else _open_tiff(path, what)
    except OSError as error:
        raise refusal(what, path, f"cannot be read: {error.strerror or error}") from error


def _open_folder(folder, what):
    """Open the sections of a folder in natural order; the first file says what the others must be."""
    files = sorted((path for path in folder.iterdir() if _is_section(path)), key=lambda p: natural_key(p.stem))
    stems = [file.stem for file in files]
    if not files:
        raise refusal(what, folder, f"holds no {', '.join(SUFFIXES)} files")
    if len(files) == 1:
        return _open_file(files[0], what)
    if twice := sorted({stem for stem in stems if stems.count(stem) > 1}, key=natural_key):
        raise refusal(what, folder, f"holds two files of the same name: {some(twice)}")
    with _open_file(files[0], what) as first:
        about = {
            "voxel_nm": first.voxel_nm,
            "description": f"folder of {len(files)} files, {first.description}",
        }
    shape, dtype = first.shape[1:], first.dtype

    def read(index):
        return _only_section(files[index], shape, dtype, what)

    return StackReader(read, (len(files), *shape), dtype, names=stems, source=folder, **about)


def _is_section(path):
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def _only_section(file, shape, dtype, what):
    with _open_file(file, what) as reader:
        if len(reader) > 1:
            raise refusal(what, file, f"holds {len(reader)} sections; in a folder each file is one section")
        if reader.shape[1:] != shape or reader.dtype != dtype:
            found = f"is {size_words(reader.shape)} {reader.dtype}"
            wanted = f"{size_words(shape)} {dtype}"
            raise refusal(what, file, f"{found}, the first file of its folder {wanted}; all must be alike")
        return reader[0]


def _colour_rule(channels):
    return (
        f"is a colour image ({channels} channels); sections must be gray: "
        "save it as 8-bit or 16-bit grayscale (RGB in ImageJ: Image > Type > 8-bit)"
    )


# --- PNG ----------------------------------------------------------------------------------------------------


def _open_png(path, what):
    from PIL import Image

    try:
        with Image.open(path) as picture:
            mode, pixels = picture.mode, np.asarray(_without_palette(picture))
    except (Image.DecompressionBombError, SyntaxError, OSError, ValueError) as error:
        raise refusal(what, path, f"is no readable PNG file, or is cut off: {error}") from error
    if pixels.ndim != 2:
        raise refusal(what, path, _colour_rule(pixels.shape[-1]))
    about = {"names": [path.stem], "source": path, "description": f"PNG, mode {mode}"}
    return StackReader([pixels].__getitem__, (1, *pixels.shape), pixels.dtype, **about)


def _without_palette(picture):
    """Turn a palette of grays into the grays; a palette of colours stays RGB, and is refused as such."""
    if picture.mode != "P":
        return picture
    colours = picture.convert("RGB")
    return colours.getchannel(0) if len({band.tobytes() for band in colours.split()}) == 1 else colours


# --- TIFF ---------------------------------------------------------------------------------------------------


def _open_tiff(path, what):
    import tifffile

    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what it logs about broken files is raised here
    try:
        tif = tifffile.TiffFile(path)
    except tifffile.TiffFileError as error:
        raise refusal(what, path, "is not a TIFF file") from error
    try:
        return _tiff_reader(tif, path, what)
    except DataError:
        tif.close()
        raise
    except Exception as error:  # tifffile raises struct, index, key and codec errors on a damaged file
        tif.close()
        raise refusal(what, path, f"is damaged or cut off: {error}") from error


def _tiff_reader(tif, path, what):
    series = tif.series[0]
    shape, note = _tiff_shape(tif, path, what)
    if _is_cut_off(tif, series):
        raise refusal(what, path, "is cut off: it ends before its last section does")
    read = _tiff_sections(tif, series, shape)
    # 0 is shown white (ImageJ's inverting LUT); bool is left alone, for tifffile marks every bool array so
    if tif.pages[0].photometric == 0 and series.dtype.kind == "u":
        note, read = [*note, "stored with 0 = white, turned"], lambda i, stored=read: ~stored(i)
    names = [path.stem] if shape[0] == 1 else [f"{path.stem}[{i}]" for i in range(shape[0])]
    words = ", ".join([f"axes {series.axes}", *_encoding(tif), *note])
    about = {"source": path, "voxel_nm": _voxel_nm(tif), "description": words}
    return StackReader(read, shape, series.dtype, names=names, close=tif.close, **about)


def _tiff_shape(tif, path, what):
    """Return (S, H, W) and a list of remarks; refuse what is not one gray stack."""
    series = tif.series[0]
    if len(tif.series) > 1:
        sizes = some(sorted({size_words(s.shape) for s in tif.series}, key=natural_key))
        raise refusal(what, path, f"holds {len(tif.series)} separate images ({sizes}); one stack is needed")
    sizes = dict(zip(series.axes, series.shape, strict=True))
    if "S" in sizes:
        raise refusal(what, path, _colour_rule(sizes["S"]))
    others = {axis: n for axis, n in sizes.items() if axis not in "YX" and n > 1}
    if len(others) > 1 or not series.axes.endswith("YX") or series.dtype.kind not in "buif":
        found = f"axes {series.axes}, shape {series.shape}, type {series.dtype}"
        raise refusal(what, path, f"has {found}; one gray stack with axes ZYX is needed")
    if 1 < others.get("C", 1) < 5:
        rule = f"has {others['C']} channels (axes {series.axes}); save one channel, or sections as Z"
        raise refusal(what, path, rule)
    note = ["channels read as sections"] if "C" in others else []
    return (math.prod(others.values()), sizes["Y"], sizes["X"]), note


def _is_cut_off(tif, series):
    """Tell whether the file ends early; tifffile itself reads what is left as a shorter stack."""
    size = tif.filehandle.size
    tif.filehandle.seek(tif.pages.next_page_offset)
    order = "little" if tif.byteorder == "<" else "big"
    pointer = tif.filehandle.read(tif.tiff.offsetsize)
    following = int.from_bytes(pointer, order) if len(pointer) == tif.tiff.offsetsize else size
    parts = ((o, n) for page in tif.pages for o, n in zip(page.dataoffsets, page.databytecounts, strict=False))
    end = max(offset + count for offset, count in parts)
    if series.dataoffset is not None:
        end = max(end, series.dataoffset + series.nbytes)
    promised = (tif.imagej_metadata or {}).get("images", 1)
    return following >= size or end > size or promised > math.prod(series.shape[:-2])


def _tiff_sections(tif, series, shape):
    """Return a function that reads section i alone."""
    count, *size = shape
    if series.dataoffset is not None:
        dtype, pixels = series.dtype.newbyteorder(tif.byteorder), math.prod(size)
        start, step = series.dataoffset, pixels * series.dtype.itemsize
        return lambda i: tif.filehandle.read_array(dtype, pixels, start + i * step).reshape(size)
    if len(series.pages) == count:
        return lambda i: series.pages[i].asarray().reshape(size)
    return lambda i: series.asarray().reshape(shape)[i]


def _encoding(tif):
    page = tif.pages[0]
    kind = "OME" if tif.is_ome else "ImageJ" if tif.is_imagej else "plain"
    words = [f"{kind} {'BigTIFF' if tif.is_bigtiff else 'TIFF'}"]
    words += ["uncompressed" if page.compression == 1 else page.compression.name.lower()]
    return words + ["tiled"] * page.is_tiled + ["big-endian"] * (tif.byteorder == ">")


# --- Voxel size ---------------------------------------------------------------------------------------------

NANOMETRES = {"pm": 1e-3, "å": 0.1, "nm": 1.0, "nanometer": 1.0, "um": 1e3, "\u00b5m": 1e3, "\u03bcm": 1e3}
NANOMETRES |= {
    "micron": 1e3,
    "microns": 1e3,
    "micrometer": 1e3,
    "mm": 1e6,
    "cm": 1e7,
    "inch": 2.54e7,
    "m": 1e9,
}


def voxel_words(voxel_nm):
    """Say a voxel size.

    >>> voxel_words((50.0, 4.0, 4.0))
    'pixel 4 x 4 nm, section 50 nm'
    """
    if voxel_nm is None:
        return "voxel size unknown"
    z, y, x = voxel_nm
    return f"pixel {y:.4g} x {x:.4g} nm, section {f'{z:.4g} nm' if z else 'thickness unknown'}"


def _voxel_nm(tif):
    """Read the voxel size in nm from OME or ImageJ metadata, or else from the resolution tags."""
    try:
        if tif.is_ome:
            return _voxel_of_ome(tif.ome_metadata)
        rows, columns = (_pixel_pitch(tif.pages[0], tag) for tag in ("YResolution", "XResolution"))
        about = tif.imagej_metadata or {}
        unit = NANOMETRES.get(str(about.get("unit", "")).replace("\\u00B5", "\u00b5").lower())
        if unit:
            return _voxel(about.get("spacing", 0) * unit, rows * unit, columns * unit)
        unit = {2: NANOMETRES["inch"], 3: NANOMETRES["cm"]}.get(int(tif.pages[0].resolutionunit), math.nan)
        # 72 or 300 dots per inch say how to print the picture, not how large a pixel is in the specimen
        return _voxel(None, rows * unit, columns * unit) if columns * unit < 20_000 else None
    except (ArithmeticError, AttributeError, KeyError, StopIteration, TypeError, ValueError, SyntaxError):
        return None  # a voxel size that cannot be made out is unknown: no reason to refuse the pixels


def _pixel_pitch(page, tag):
    over, under = page.tags[tag].value
    return under / over


def _voxel_of_ome(text):
    from xml.etree import ElementTree

    pixels = next(e for e in ElementTree.fromstring(text).iter() if e.tag.endswith("}Pixels"))

    def size(axis):
        value = pixels.get(f"PhysicalSize{axis}")
        return value and float(value) * NANOMETRES[pixels.get(f"PhysicalSize{axis}Unit", "um").lower()]

    return _voxel(size("Z"), size("Y"), size("X"))


def _voxel(z, y, x):
    z, y, x = (float(f"{n:.6g}") if n and math.isfinite(n) and n > 0 else None for n in (z, y, x))
    return (z, y, x) if y and x else None


# --- Writing ------------------------------------------------------------------------------------------------

CLASSIC_TIFF_BYTES = 2**32 - 2**25  # beyond this, offsets need BigTIFF


def write_prediction(path, sections, *, count, shape, voxel_nm=None, force=False):
    """Write interior probabilities in the challenge's format: float32, ZYX, 0..1 with 1 = interior.

    Parameters
    ----------
    path : str or Path
    sections : iterable of ndarray of shape (H, W)
        Written one by one: memory does not grow with their number. Values are clipped to 0..1.
    count, shape : int, (H, W)
    voxel_nm : (z, y, x), optional

    Raises
    ------
    DataError
        Where a section is missing, of another shape or not finite, `path` exists, or the disk is full.
    """

    def probability(section, index):
        section = np.asarray(section, np.float32)
        if not np.isfinite(section).all():
            raise DataError(f"{path}: the prediction of section {index} is not finite.")
        return np.clip(section, 0.0, 1.0)

    _write(path, sections, probability, np.dtype("float32"), count, shape, voxel_nm, force)


def write_mask(path, sections, *, count, shape, voxel_nm=None, force=False, dtype="uint8"):
    """Write a mask section by section: 0/255 from 0/1, bool or 0/255; uint16 and uint32 labels as they are.

    Parameters as in `write_prediction`.
    """
    dtype = np.dtype(dtype)

    def mask(section, index):
        values = np.unique(np.asarray(section))
        allowed = (0, 1, 255) if dtype == np.uint8 else np.clip(values, 0, np.iinfo(dtype).max)
        if not np.isin(values, allowed).all():
            rule = "0 and 1, or 0 and 255" if dtype == np.uint8 else f"labels of type {dtype}"
            raise DataError(f"{path}: section {index} must hold {rule}. Received: {some(values)}")
        return np.where(section, 255, 0).astype(dtype) if dtype == np.uint8 else np.asarray(section, dtype)

    _write(path, sections, mask, dtype, count, shape, voxel_nm, force)


def _write(path, sections, convert, dtype, count, shape, voxel_nm, force):
    import tifffile

    remaining = iter(sections)
    layout = _layout(voxel_nm, count * math.prod(shape) * dtype.itemsize, dtype)
    layout |= {"shape": (count, *shape), "dtype": dtype, "photometric": "minisblack"}
    with replacing(path, force=force) as partial:
        tifffile.imwrite(partial, _exactly(remaining, convert, path, count, tuple(shape)), **layout)
        if next(remaining, None) is not None:
            raise DataError(f"{path}: {count} sections were announced, and more came.")


def _exactly(sections, convert, path, count, shape):
    for index in range(count):
        section = next(sections, None)
        if section is None:
            raise DataError(f"{path}: {count} sections were announced, and {index} came.")
        if np.shape(section) != shape:
            sizes = f"{size_words(shape)} px. Received: {size_words(np.shape(section))}"
            raise DataError(f"{path}: section {index} must be {sizes}")
        yield convert(section, index)


def _layout(voxel_nm, nbytes, dtype):
    """Return tifffile's settings: ImageJ's own format, or OME where that has no room or no such type."""
    sizes = {axis: nm / 1e3 for axis, nm in zip("ZYX", voxel_nm or (), strict=False) if nm}
    if nbytes > CLASSIC_TIFF_BYTES or dtype == np.uint32:
        about = {f"PhysicalSize{axis}": um for axis, um in sizes.items()}
        about |= {f"PhysicalSize{axis}Unit": "\u00b5m" for axis in sizes}
        return {"ome": True, "bigtiff": nbytes > CLASSIC_TIFF_BYTES, "metadata": {"axes": "ZYX", **about}}
    about = {"spacing": sizes["Z"]} if "Z" in sizes else {}
    if "X" not in sizes:
        return {"imagej": True, "metadata": {"axes": "ZYX"}}
    resolution = (1 / sizes["X"], 1 / sizes["Y"])
    return {"imagej": True, "metadata": {"axes": "ZYX", "unit": "um", **about}, "resolution": resolution}


def sha256_pixels(array):
    """Return the SHA-256 of the pixels in C order, little-endian: the same whatever container held them."""
    array = np.asarray(array)
    return hashlib.sha256(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False))).hexdigest()
