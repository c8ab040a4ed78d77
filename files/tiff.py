"""TIFF in: what program ever wrote it, the pixels that were meant, or a sentence that says what is wrong."""

import itertools
import logging
import math
import re
import struct

import numpy as np

from files.sections import (
    NANOMETRES,
    StackReader,
    channel_of,
    colour_rule,
    natural_key,
    refusal,
    size_words,
    some,
    voxel,
)

PRINTED_NM = 20_000  # 72 or 300 dots per inch say how to print a picture, not how large its pixel is in the specimen
KINDS = {"frame", "imagej", "multipage", "ome", "shaped", "uniform"}  # of TIFF whose pages are all that there is


def open_tiff(path, what, ids=False, channel=None, **_):
    """Open a file as a StackReader; as `stacks.open_stack`, which makes a DataError of what tifffile raises."""
    import tifffile

    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what it logs about broken files is raised here
    tif = tifffile.TiffFile(path)
    try:
        if _is_page_by_page(tif):
            tif.close()
            tif = tifffile.TiffFile(path, is_shaped=False)
        return _tiff_reader(tif, path, what, ids, channel)
    except BaseException:
        tif.close()
        raise


def _is_page_by_page(tif):
    """Whether tifffile wrote each section as an image of its own, all of them alike: together they are a stack."""
    if not tif.is_shaped or not 1 < len(tif.series) == len(tif.pages):
        return False
    first = tif.series[0]
    return first.ndim == 2 and all((one.shape, one.dtype) == (first.shape, first.dtype) for one in tif.series)


def _tiff_reader(tif, path, what, ids, channel):
    if not len(tif.pages) or not tif.series:
        raise refusal(what, path, "is damaged or cut off: it holds no image")
    planes = _planes(tif, path, what, channel)
    series, page = tif.series[0], tif.pages[0]
    size, count = series.shape[-2:], math.prod(series.shape[:-2])
    _check_pages(tif, series, count, path, what)
    pixels = _tiff_pixels(tif, series, (count, *size))
    palettes = (getattr(each, "colormap", None) for each in tif.pages) if page.photometric == 3 and not ids else ()
    if any(one is not None and (one != page.colormap).any() for one in palettes):
        raise refusal(what, path, "has a palette of its own for each section: save it as 8-bit gray values")
    read, note = _as_shown(page, lambda i, *part: pixels(planes[i], *part), path, what, ids)
    words = ", ".join([f"axes {series.axes}", *_encoding(tif), *note])
    made_of = dict(re.findall(r"made_of_(\w+)=([^\s<]+)", page.description))  # as `writing` says it
    about = {"source": path, "voxel_nm": _voxel_nm(tif), "description": words, "made_of": made_of}
    return StackReader(read, (len(planes), *size), series.dtype, close=tif.close, **about)


def _planes(tif, path, what, channel):
    """Return which plane of the file each section is; refuse what is not one gray stack."""
    series = tif.series[0]
    if len(tif.series) > 1:
        sizes = some(sorted({size_words(s.shape) for s in tif.series}, key=natural_key))
        raise refusal(what, path, f"holds {len(tif.series)} separate images ({sizes}); one stack is needed")
    axes = list(zip(series.axes, series.shape, strict=True))  # no dict: an axis without a name is Q, as is the next
    if "S" in series.axes and not _is_numbered(tif.pages[0]):
        count = dict(axes)["S"]
        rule = colour_rule(what, f"{count} channels")
        if series.axes[0] == "S":  # as napari and tifffile save 3 or 4 sections
            rule = f"holds {count} colours, or {count} sections that were saved as one picture"
            rule += "; save gray sections in Fiji as a stack, or each as a file of its own"
        raise refusal(what, path, rule)
    others = [axis for axis, n in axes[:-2] if n > 1]
    channels = dict(axes[:-2]).get("C", 1)
    picks = channels > 1 and (channel is not None or len(others) > 1 or channels < 5)  # more are sections, badly named
    kind = series.dtype.kind if series.dtype is not None else ""
    if len(others) - picks > 1 or series.axes[-2:] != "YX" or kind not in tuple("buif"):
        found = f"axes {series.axes}, shape {series.shape}, type {series.dtype}"
        raise refusal(what, path, f"has {found}; one gray stack with axes ZYX is needed")
    chosen = channel_of(channels if picks else 1, channel, what, f"{path} (axes {series.axes})")
    planes = np.arange(math.prod(series.shape[:-2])).reshape(series.shape[:-2])
    return (planes.take(chosen, series.axes.index("C")) if picks else planes).ravel().tolist()


def _is_numbered(page):
    """Tell numbers of cells from colours: tifffile, and so napari, writes 3 or 4 sections as planes of one picture."""
    return page.planarconfig == 2 and page.dtype.kind in "iu" and page.dtype.itemsize > 2


def _check_pages(tif, series, count, path, what):
    """Refuse a file whose header and pages do not agree: tifffile reads some of the sections without a word."""
    pages = list(tif.pages)
    described = (tif.is_imagej or tif.is_ome or tif.is_shaped) and not series.is_multifile
    with_levels = sum(math.prod(level.shape[:-2]) for level in series.levels)  # smaller copies, as pages of their own
    if described and len(pages) not in (1, count, with_levels):
        raise refusal(what, path, f"is cut off, or damaged: {len(pages)} pages, and a header of {count} sections")
    whole = all(page is not None for page in series.pages) and all(_has_its_bytes(page, series) for page in pages)
    if _is_cut_off(tif, series) or not whole or _is_tangled(tif, series, count):
        raise refusal(what, path, "is cut off, or damaged: its pixels are not those that its header speaks of")


def _is_cut_off(tif, series):
    """Tell whether the file ends early; tifffile itself reads what is left as a shorter stack."""
    size = tif.filehandle.size
    tif.filehandle.seek(tif.pages.next_page_offset)
    (following,) = struct.unpack(tif.tiff.offsetformat, tif.filehandle.read(tif.tiff.offsetsize))
    parts = ((o, n) for page in tif.pages for o, n in zip(page.dataoffsets, page.databytecounts, strict=False))
    end = max((offset + count for offset, count in parts), default=size + 1)
    if series.dataoffset is not None:
        end = max(end, series.dataoffset + series.nbytes)
    promised = (tif.imagej_metadata or {}).get("images", 1)
    return following >= size or end > size or promised > math.prod(series.shape[:-2])


def _is_tangled(tif, series, count):
    """Tell whether strips or tiles overlap, or the file has room for one that no page speaks of."""
    if series.is_multifile or tif.flags - KINDS:
        return False
    parts, heads, words, size = set(), set(), 0, series.nbytes // count
    for page in tif.pages:
        if getattr(page, "subifds", None):
            return False  # smaller copies, which are not looked at
        parts.update(zip(page.dataoffsets, page.databytecounts, strict=True))
        own = len(page.keyframe.tags) if page.keyframe is page else 0
        heads.add((page.offset, tif.tiff.tagnosize + own * tif.tiff.tagsize))
        words += 24 + sum(20 + tag.valuebytecount for tag in page.keyframe.tags)
    if series.dataoffset is not None:
        parts = {(series.dataoffset + i * size, size) for i in range(count)}
    parts = {part for part in parts if part[1]}  # nothing is stored of an empty tile
    known = sum(n for _, n in parts)
    overlap = any(start + n > following for (start, n), (following, _) in itertools.pairwise(sorted(parts | heads)))
    return overlap or tif.filehandle.size - words - known > known / count


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
    return least <= found <= padded


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
        return _pixels_of(page).reshape(height, width)[rows, columns]
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


def _pixels_of(page):
    """All pixels of a page; of another file than the one that is open, if the OME metadata joins several."""
    file = page.parent.filehandle
    if not file.closed:
        return page.asarray()
    file.open()  # without it tifffile does so itself, and warns
    try:
        return page.asarray()
    finally:
        file.close()


def _as_shown(page, read, path, what, ids):
    """Return the function that reads gray values as they are shown, and a list of remarks."""
    known = "PhotometricInterpretation" in page.tags  # without it tifffile says 0
    if known and page.photometric not in (0, 1, 3, 4) and not _is_numbered(page):
        name = getattr(page.photometric, "name", page.photometric)
        raise refusal(what, path, f"is of the colour kind {name}; sections must be gray")
    if ids or not known:
        return read, []
    if page.photometric == 3:
        colours = page.colormap
        if colours is None or (colours != colours[0]).any():
            raise refusal(what, path, colour_rule(what, "a palette of colours"))
        deep = page.dtype.itemsize > 1 or colours.max() < 256
        grays = (colours[0] if deep else colours[0] >> 8).astype(page.dtype)
        return (lambda *part: grays[read(*part)]), ["palette of grays"]
    # 0 is shown white (ImageJ's inverting LUT), but for the bool arrays of tifffile, which marks every one so
    own = page.dtype.kind == "b" and "tifffile" in page.tags.valueof("Software", "")
    if page.photometric == 0 and page.dtype.kind in "bu" and not own:
        white = page.dtype.type(2**page.bitspersample - 1)
        return (lambda *part: white ^ read(*part)), ["stored with 0 = white, turned"]
    return read, []


def _encoding(tif):
    page = tif.pages[0]
    kind = "OME" if tif.is_ome else "ImageJ" if tif.is_imagej else "plain"
    packing = "uncompressed" if page.compression == 1 else getattr(page.compression, "name", str(page.compression))
    words = [f"{kind} {'BigTIFF' if tif.is_bigtiff else 'TIFF'}", packing.lower()]
    return words + ["tiled"] * page.is_tiled + ["big-endian"] * (tif.byteorder == ">")


# --- Voxel size ---------------------------------------------------------------------------------------------


def _voxel_nm(tif):
    """Read the voxel size in nm from OME or ImageJ metadata, or else from the resolution tags."""
    try:
        if tif.is_ome:
            return _voxel_of_ome(tif.ome_metadata)
        per_pixel = (tif.pages[0].tags[tag].value for tag in ("YResolution", "XResolution"))
        rows, columns = (under / over for over, under in per_pixel)
        about = tif.imagej_metadata or {}
        unit, deep = (_nm_of(about.get(name, about.get("unit", ""))) for name in ("unit", "zunit"))
        if unit and (unit < NANOMETRES["cm"] or columns * unit < PRINTED_NM):
            return voxel(about.get("spacing", 0) * (deep or 0), rows * unit, columns * unit)
        unit = {2: NANOMETRES["inch"], 3: NANOMETRES["cm"]}.get(int(tif.pages[0].resolutionunit), math.nan)
        return voxel(None, rows * unit, columns * unit) if columns * unit < PRINTED_NM else None
    except (ArithmeticError, AttributeError, KeyError, StopIteration, TypeError, ValueError, SyntaxError):
        return None  # a voxel size that cannot be made out is unknown: no reason to refuse the pixels


def _nm_of(unit):
    """A unit of ImageJ's in nm, or None; ImageJ writes letters beyond ASCII as their numbers."""
    return NANOMETRES.get(re.sub(r"\\u([0-9A-Fa-f]{4})", lambda found: chr(int(found[1], 16)), str(unit)).lower())


def _voxel_of_ome(text):
    from xml.etree import ElementTree

    pixels = next(e for e in ElementTree.fromstring(text).iter() if e.tag.endswith("}Pixels"))

    def size(axis):
        value = pixels.get(f"PhysicalSize{axis}")
        return value and float(value) * NANOMETRES[pixels.get(f"PhysicalSize{axis}Unit", "um").lower()]

    return voxel(size("Z"), size("Y"), size("X"))
