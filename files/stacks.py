"""Files of sections: TIFF and PNG in, ImageJ TIFF out, one section in memory at a time, or a part of one.

Whatever is wrong with somebody's file ends in a `DataError` of one sentence. `data.py` is the door to it.
"""

import contextlib
import hashlib
import logging
import math
import os
import re
import weakref
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from files.atomic import DataError

FLAGS = {"image": "--image_path", "mask": "--mask_path", "test": "--image_path", "test_mask": "--mask_path"}
SUFFIXES = (".tif", ".tiff", ".png")
MOST_SECTIONS = 2**20  # a header that speaks of more is damaged
RECORD = "dilated_unet"  # key of what a prediction says that it is made of


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
    made_of : what a prediction of this suite is made of, else empty
    """

    sections: np.ndarray
    voxel_nm: tuple[float | None, float, float] | None = None
    names: list[str] = field(default_factory=list)
    source: str = ""
    description: str = ""
    made_of: dict = field(default_factory=dict)

    shape = property(lambda self: self.sections.shape)
    dtype = property(lambda self: self.sections.dtype)


# --- Words and numbers --------------------------------------------------------------------------------------


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


def shape_words(stack):
    """Write the number and the size of sections."""
    count = stack.shape[0]
    return f"{count} section{'s' * (count != 1)} of {size_words(stack.shape)} px"


def some(items, most=8):
    """Write the first few of many."""
    shown = ", ".join(str(item) for item in items[:most])
    return f"{shown}, ..." if len(items) > most else shown


def natural_key(name):
    """Return a sorting key that puts section 2 before section 10, and s1 beside S1.

    >>> sorted(["s10", "s2", "S1"], key=natural_key)
    ['S1', 's2', 's10']
    """
    parts = re.split(r"([0-9]+)", str(name))
    return [int(part) if i % 2 else part.casefold() for i, part in enumerate(parts)], str(name)


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


STRIP_PX = 2**23  # of a large section, looked at in one piece: float64 takes eight times what 8 bit does


def strips(section):
    """Return a section in strips of rows; one of usual size is one strip."""
    section = np.atleast_2d(section)
    step = max(1, STRIP_PX // section.shape[1])
    return (section[i : i + step] for i in range(0, len(section), step))


def memory_words(nbytes):
    """Write an amount of memory.

    >>> memory_words(7_864_320)
    '7.9 MB'
    """
    return f"{nbytes / 1e9:.3g} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.2g} MB"


def memory_limit():
    """Return the bytes that a process can have here: the machine's, or those of its container or ulimit."""
    limits = [2**63]
    with contextlib.suppress(AttributeError, OSError, ValueError):
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with contextlib.suppress(OSError, ValueError):
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    with contextlib.suppress(ImportError):
        import resource

        limits.append(resource.getrlimit(resource.RLIMIT_AS)[0])
    return min(limit for limit in limits if limit > 0)  # no limit is written -1


def require_memory(nbytes, words):
    """Refuse what cannot fit into memory before it is taken."""
    if nbytes > memory_limit():
        limit = memory_words(memory_limit())
        raise DataError(f"{words} would take {memory_words(nbytes)} of memory, more than the {limit} there is.")


def sha256_pixels(array):
    """Return the SHA-256 of the pixels in C order, little-endian: the same whatever container held them."""
    array = np.asarray(array)
    return hashlib.sha256(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False))).hexdigest()


# --- Reading ------------------------------------------------------------------------------------------------


class StackReader:
    """Sections of a file or folder, one in memory at a time, or parts of them.

    `len(reader)`, `reader[i]` and iteration give arrays of shape (H, W); `shape` is (S, H, W). A section with
    NaN or infinite values is refused when it is read. Files close with the reader.

    Parameters
    ----------
    read : callable
        (index, rows, columns), of which the last two are slices, -> pixels.
    """

    def __init__(
        self, read, shape, dtype, *, source, names=(), voxel_nm=None, description="", close=None, made_of=None
    ):
        self._read = read
        self.shape = tuple(int(n) for n in shape)
        self.dtype = np.dtype(dtype).newbyteorder("=")
        self.source = str(source)
        if min(self.shape) < 1 or len(self) > MOST_SECTIONS:
            raise DataError(f"{source} holds no stack of sections: its header says {' x '.join(map(str, self.shape))}.")
        self.names = list(names) or _numbered(Path(source).stem, len(self))
        self.voxel_nm = voxel_nm
        self.description = description
        self.made_of = made_of or {}
        self.close = weakref.finalize(self, close or (lambda: None))

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, index):
        if not -len(self) <= index < len(self):
            raise IndexError(f"section {index} of {len(self)}")
        height, width = self.shape[1:]
        return self.part(index % len(self), slice(0, height), slice(0, width))

    def part(self, index, rows, columns):
        """Read a part of a section, rows and columns as slices; as little more as the file's strips or tiles allow."""
        return self._pixels(index, rows, columns, f"{self.source}: section {index} ({self.names[index]})")

    def slab(self, sections, rows, columns):
        """Read a part of some sections, all as slices: an array of shape (S, h, w)."""
        return np.stack([self.part(index, rows, columns) for index in range(sections.start, sections.stop)])

    def _pixels(self, index, rows, columns, place):
        count = index.stop - index.start if isinstance(index, slice) else 1
        size = count * (rows.stop - rows.start) * (columns.stop - columns.start)
        require_memory(size * self.dtype.itemsize, place)
        try:
            pixels = np.asarray(self._read(index, rows, columns)).astype(self.dtype, copy=False)
        except DataError:
            raise
        except MemoryError as error:
            raise DataError(f"{place} takes more memory than there is: {error}.") from error
        except Exception as error:  # decoders raise whatever they like on a damaged file
            raise DataError(f"{place} is damaged or cut off: {error}.") from error
        if self.dtype.kind == "f" and not np.isfinite(pixels).all():
            raise DataError(f"{place} holds {np.count_nonzero(~np.isfinite(pixels))} NaN or infinite values.")
        return pixels

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def _numbered(stem, count):
    return [stem] if count == 1 else [f"{stem}[{i}]" for i in range(count)]


def open_stack(found, what="image", *, ids=False):
    """Open a file, a folder of sections or a Stack as a StackReader.

    `what` is the role, for messages. With `ids` the values are numbers of cells, and stay what is stored: neither
    a palette nor "0 is white" is applied.
    """
    if isinstance(found, Stack):
        return _open_memory(found)
    return _open_folder(found, what, ids) if found.is_dir() else _open_file(found, what, ids)


def load(reader):
    """Read all sections of a StackReader into a Stack, and close it."""
    with reader:
        require_memory(math.prod(reader.shape) * reader.dtype.itemsize, f"{reader.source}: {shape_words(reader)}")
        sections = np.empty(reader.shape, reader.dtype)
        for i, section in enumerate(reader):
            sections[i] = section
        about = (reader.voxel_nm, reader.names, reader.source, reader.description, reader.made_of)
        return Stack(sections, *about)


def _open_memory(stack):
    sections = stack.sections
    if sections.ndim != 3 or sections.size == 0:
        raise DataError(f"{stack.source or 'stack'}: must have shape (S, H, W). Received: {sections.shape}")
    about = {"source": stack.source, "voxel_nm": stack.voxel_nm, "description": stack.description}
    names = stack.names or [str(i) for i in range(len(sections))]
    about |= {"names": names, "made_of": stack.made_of}
    return StackReader(lambda *part: sections[part], sections.shape, sections.dtype, **about)


def _open_file(path, what, ids):
    try:
        if path.stat().st_size == 0:
            raise refusal(what, path, "is empty (0 bytes)")
        opener = _open_png if path.suffix.lower() == ".png" else _open_tiff
        return opener(path, what, ids)
    except DataError:
        raise
    except OSError as error:
        raise refusal(what, path, f"cannot be read: {error.strerror or error}") from error
    except MemoryError as error:
        raise refusal(what, path, "takes more memory than there is") from error
    except Exception as error:  # struct, index, key and codec errors on a damaged file
        raise refusal(what, path, f"is damaged or cut off: {error}") from error


def _open_folder(folder, what, ids):
    """Open the sections of a folder in natural order; the first file says what the others must be."""
    files = _sections_in(folder, what)
    stems = [file.stem for file in files]
    if len(files) == 1:
        return _open_file(files[0], what, ids)
    if twice := sorted({stem for stem in stems if stems.count(stem) > 1}, key=natural_key):
        raise refusal(what, folder, f"holds two files of the same name: {some(twice)}")
    with _open_file(files[0], what, ids) as first:
        words = f"folder of {len(files)} files, {first.description}"
        about = {"voxel_nm": first.voxel_nm, "description": words, "names": stems, "source": folder}
    shape, dtype = first.shape[1:], first.dtype

    def read(index, rows, columns):
        with _open_file(files[index], what, ids) as reader:
            if len(reader) > 1:
                words = f"holds {len(reader)} sections; in a folder each file is one section"
                raise refusal(what, files[index], words)
            if reader.shape[1:] != shape or reader.dtype != dtype:
                found, wanted = f"{size_words(reader.shape)} {reader.dtype}", f"{size_words(shape)} {dtype}"
                words = f"is {found}, the first file of its folder {wanted}; all must be alike"
                raise refusal(what, files[index], words)
            return reader.part(0, rows, columns)

    return StackReader(read, (len(files), *shape), dtype, **about)


def _sections_in(folder, what):
    try:
        files = [path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.name[0] != "."]
    except OSError as error:
        raise refusal(what, folder, f"cannot be read: {error.strerror or error}") from error
    if gone := [path.name for path in files if not path.exists()]:
        raise refusal(what, folder, f"holds links to files that do not exist: {some(gone)}")
    files = [path for path in files if path.is_file()]
    if not files:
        raise refusal(what, folder, f"holds no {', '.join(SUFFIXES)} files")
    return sorted(files, key=lambda path: natural_key(path.stem))


def _colour_rule(channels):
    return (
        f"is a colour image ({channels} channels); sections must be gray: "
        "save it as 8-bit or 16-bit grayscale (RGB in ImageJ: Image > Type > 8-bit)"
    )


# --- PNG ----------------------------------------------------------------------------------------------------


def _open_png(path, what, ids):
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None  # large sections are no attack: what cannot fit is refused here
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            mode, frames = picture.mode, getattr(picture, "n_frames", 1)
            require_memory(8 * math.prod(picture.size), f"{path}: a picture of {size_words(picture.size[::-1])} px")
            pixels = np.asarray(picture if ids else _without_palette(picture))
    except (SyntaxError, OSError, ValueError) as error:
        raise refusal(what, path, f"is no readable PNG file, or is cut off: {error}") from error
    if frames > 1:
        raise refusal(what, path, f"is a film of {frames} pictures; each section must be a file")
    if pixels.ndim != 2:
        raise refusal(what, path, _colour_rule(pixels.shape[-1]))
    about = {"source": path, "description": f"PNG, mode {mode}"}
    return StackReader(lambda _, *part: pixels[part], (1, *pixels.shape), pixels.dtype, **about)


def _without_palette(picture):
    """Turn a palette of grays into the grays; a palette of colours stays RGB, and is refused as such."""
    if picture.mode != "P":
        return picture
    colours = picture.convert("RGB")
    return colours.getchannel(0) if len({band.tobytes() for band in colours.split()}) == 1 else colours


# --- TIFF ---------------------------------------------------------------------------------------------------


def _open_tiff(path, what, ids):
    import tifffile

    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what it logs about broken files is raised here
    try:
        tif = tifffile.TiffFile(path)
    except tifffile.TiffFileError as error:
        raise refusal(what, path, "is not a TIFF file") from error
    try:
        return _tiff_reader(tif, path, what, ids)
    except BaseException:
        tif.close()
        raise


def _tiff_reader(tif, path, what, ids):
    if not len(tif.pages) or not tif.series:
        raise refusal(what, path, "is damaged or cut off: it holds no image")
    shape, notes = _tiff_shape(tif, path, what)
    series, page = tif.series[0], tif.pages[0]
    _check_pages(tif, series, shape[0], path, what)
    read, note = _as_shown(page, _tiff_pixels(tif, series, shape), path, what, ids)
    words = ", ".join([f"axes {series.axes}", *_encoding(tif), *notes, *note])
    about = {"source": path, "voxel_nm": _voxel_nm(tif), "description": words, "made_of": _made_of(tif)}
    return StackReader(read, shape, series.dtype, close=tif.close, **about)


def _tiff_shape(tif, path, what):
    """Return (S, H, W) and a list of remarks; refuse what is not one gray stack."""
    series = tif.series[0]
    if len(tif.series) > 1:
        sizes = some(sorted({size_words(s.shape) for s in tif.series}, key=natural_key))
        raise refusal(what, path, f"holds {len(tif.series)} separate images ({sizes}); one stack is needed")
    axes = list(zip(series.axes, series.shape, strict=True))  # no dict: an axis without a name is Q, as is the next
    if "S" in series.axes:
        rule, count = _colour_rule(dict(axes)["S"]), dict(axes)["S"]
        hint = f"; {count} sections need photometric='minisblack' when tifffile writes them"
        raise refusal(what, path, rule + hint * (series.axes[0] == "S"))
    others = [(axis, n) for axis, n in axes[:-2] if n > 1]
    kind = series.dtype.kind if series.dtype is not None else ""
    if len(others) > 1 or series.axes[-2:] != "YX" or kind not in tuple("buif"):
        found = f"axes {series.axes}, shape {series.shape}, type {series.dtype}"
        raise refusal(what, path, f"has {found}; one gray stack with axes ZYX is needed")
    if ("C", True) in [(axis, n < 5) for axis, n in others]:
        rule = f"has {others[0][1]} channels (axes {series.axes}); save one channel, or sections as Z"
        raise refusal(what, path, rule)
    notes = ["channels read as sections"] if "C" in dict(others) else []
    return (math.prod(n for _, n in others), *series.shape[-2:]), notes


def _check_pages(tif, series, count, path, what):
    """Refuse a file whose header and pages do not agree: tifffile reads some of the sections without a word."""
    if _is_cut_off(tif, series):
        raise refusal(what, path, "is cut off: it ends before its last section does")
    pages = list(tif.pages)
    described = (tif.is_imagej or tif.is_ome or tif.is_shaped) and not series.is_multifile
    if described and len(pages) not in (1, count):
        raise refusal(what, path, f"holds {len(pages)} pages, and its header speaks of {count} sections")
    if any(page is None for page in series.pages):
        raise refusal(what, path, "lacks sections that its header speaks of")
    if not all(_has_its_bytes(page, series) for page in pages):
        raise refusal(what, path, "is damaged: its sections have another number of bytes than their size needs")


def _is_cut_off(tif, series):
    """Tell whether the file ends early; tifffile itself reads what is left as a shorter stack."""
    size = tif.filehandle.size
    tif.filehandle.seek(tif.pages.next_page_offset)
    order = "little" if tif.byteorder == "<" else "big"
    pointer = tif.filehandle.read(tif.tiff.offsetsize)
    following = int.from_bytes(pointer, order) if len(pointer) == tif.tiff.offsetsize else size
    parts = ((o, n) for page in tif.pages for o, n in zip(page.dataoffsets, page.databytecounts, strict=False))
    end = max((offset + count for offset, count in parts), default=size + 1)
    if series.dataoffset is not None:
        end = max(end, series.dataoffset + series.nbytes)
    promised = (tif.imagej_metadata or {}).get("images", 1)
    return following >= size or end > size or promised > math.prod(series.shape[:-2])


def _has_its_bytes(page, series):
    """Tell whether the strips or tiles of an uncompressed page are as long as its size needs, or padded."""
    key, found = page.keyframe, sum(page.databytecounts)
    if len(page.dataoffsets) != len(page.databytecounts) or len(page.dataoffsets) < math.prod(key.chunked):
        return series.dataoffset is not None and len(page.dataoffsets) > 0
    if key.compression != 1:
        return True
    line = -(-key.chunks[-1] * key.bitspersample // 8)
    padded = math.prod(key.chunked) * key.chunks[-2] * line
    least = padded if key.is_tiled else key.imagelength * line
    return least <= found <= padded or found == series.nbytes


def _tiff_pixels(tif, series, shape):
    """Return a function that reads rows and columns of section i, and no more than the file's parts make it read."""
    count, height, width = shape
    if series.dataoffset is None and len(series.pages) == count:
        return lambda i, *part: _page_part(series.pages[i], height, width, *part)
    if series.dataoffset is None:
        return lambda *part: series.asarray().reshape(shape)[part]
    dtype = series.dtype.newbyteorder(tif.byteorder)

    def read(i, rows, columns):
        start = series.dataoffset + (i * height + rows.start) * width * dtype.itemsize
        lines = rows.stop - rows.start
        return tif.filehandle.read_array(dtype, lines * width, start).reshape(lines, width)[:, columns]

    return read


def _page_part(page, height, width, rows, columns):
    """Decode the strips or tiles of a page that hold some rows and columns."""
    key = page.keyframe
    high, wide = key.chunks[-2:]
    if (rows.stop - rows.start, columns.stop - columns.start) == (height, width) or len(key.chunked) != 2:
        return page.asarray().reshape(height, width)[rows, columns]
    down, across = (range(s.start // n, -(-s.stop // n)) for s, n in ((rows, high), (columns, wide)))
    wanted = [row * key.chunked[1] + column for row in down for column in across]
    where = [page.dataoffsets[i] for i in wanted], [page.databytecounts[i] for i in wanted]
    pixels = np.zeros((len(down) * high, len(across) * wide), key.dtype)
    for packed, i in page.parent.filehandle.read_segments(*where, indices=wanted):
        found, (_, _, top, left, _), size = key.decode(packed, i, jpegtables=key.jpegtables, jpegheader=key.jpegheader)
        here = pixels[top - down[0] * high :, left - across[0] * wide :]
        here[: size[1], : size[2]] = key.nodata if found is None else found.reshape(size[1:3])
    first = rows.start - down[0] * high, columns.start - across[0] * wide
    return pixels[first[0] :, first[1] :][: rows.stop - rows.start, : columns.stop - columns.start]


def _as_shown(page, read, path, what, ids):
    """Return the function that reads gray values as they are shown, and a list of remarks."""
    known = "PhotometricInterpretation" in page.tags  # without it tifffile says 0
    if known and page.photometric not in (0, 1, 3, 4):
        name = getattr(page.photometric, "name", page.photometric)
        raise refusal(what, path, f"is of the colour kind {name}; sections must be gray")
    if ids or not known:
        return read, []
    if page.photometric == 3:
        colours = page.colormap
        if colours is None or (colours != colours[0]).any():
            raise refusal(what, path, "has a palette of colours; sections must be gray: Image > Type > 8-bit in ImageJ")
        deep = page.dtype.itemsize > 1 or colours.max() < 256
        grays = (colours[0] if deep else colours[0] >> 8).astype(page.dtype)
        return (lambda *part: grays[read(*part)]), ["palette of grays"]
    # 0 is shown white (ImageJ's inverting LUT); bool is left alone, for tifffile marks every bool array so
    if page.photometric == 0 and page.dtype.kind == "u":
        white = page.dtype.type(2**page.bitspersample - 1)
        return (lambda *part: white - read(*part)), ["stored with 0 = white, turned"]
    return read, []


def _encoding(tif):
    page = tif.pages[0]
    kind = "OME" if tif.is_ome else "ImageJ" if tif.is_imagej else "plain"
    packing = "uncompressed" if page.compression == 1 else getattr(page.compression, "name", str(page.compression))
    words = [f"{kind} {'BigTIFF' if tif.is_bigtiff else 'TIFF'}", packing.lower()]
    return words + ["tiled"] * page.is_tiled + ["big-endian"] * (tif.byteorder == ">")


def _made_of(tif):
    """Read what a prediction of this suite is made of, as `writing` says it; empty where the file is none."""
    return dict(re.findall(r"made_of_(\w+)=([^\s<]+)", tif.pages[0].description))


# --- Voxel size ---------------------------------------------------------------------------------------------

SPELLINGS = {1e-3: "pm picometer", 0.1: "\u00e5 angstrom", 1.0: "nm nanometer", 1e6: "mm millimeter"}
SPELLINGS |= {1e3: "um \u00b5m \u03bcm micron microns micrometer", 1e7: "cm centimeter", 2.54e7: "inch", 1e9: "m meter"}
NANOMETRES = {word: nm for nm, words in SPELLINGS.items() for word in words.split()}


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
            return voxel(about.get("spacing", 0) * unit, rows * unit, columns * unit)
        unit = {2: NANOMETRES["inch"], 3: NANOMETRES["cm"]}.get(int(tif.pages[0].resolutionunit), math.nan)
        # 72 or 300 dots per inch say how to print the picture, not how large a pixel is in the specimen
        return voxel(None, rows * unit, columns * unit) if columns * unit < 20_000 else None
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

    return voxel(size("Z"), size("Y"), size("X"))


def voxel(z, y, x):
    """Return a voxel size (z, y, x) without what is no length: z None, or None for all of it."""
    z, y, x = (float(f"{n:.6g}") if n and math.isfinite(n) and n > 0 else None for n in (z, y, x))
    return (z, y, x) if y and x else None
