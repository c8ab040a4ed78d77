"""OME-Zarr images in and out, and plain arrays in; metadata OME-NGFF 0.4 (zarr v2) and 0.5 (zarr v3).

https://ngff.openmicroscopy.org/specifications/
"""

import contextlib
import itertools
import math
from pathlib import Path

import numpy as np

from files import sections
from files.atomic import DataError, within

RECORD = "dilated_unet"  # the attribute of a prediction that says what it is made of


@contextlib.contextmanager
def extra():
    """Around an import: say how to install what is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise DataError(f"OME-Zarr needs {error.name}: pip install -r requirements-zarr.txt") from error


# -- OME-Zarr in -------------------------------------------------------------------------------------------------


class ZarrReader(sections.StackReader):
    """Sections of an OME-Zarr image, one in memory at a time, or parts of them.

    `array` is level 0: axes of which z and c may be longer than 1, then rows and columns. `multiscale` is metadata,
    `channel` where c begins to be read.
    """

    def __init__(self, path, array, multiscale, made_of, channel):
        self.array, self.multiscale, self.folder = array, multiscale, within(path)[0]
        axes = [axis["name"] for axis in multiscale["axes"]]
        self.first = {axes.index("c"): channel} if "c" in axes else {}
        super().__init__(
            self._chunks,
            (array.shape[axes.index("z")] if "z" in axes else 1, *array.shape[-2:]),
            array.dtype,
            source=path,
            voxel_nm=_voxel_nm(multiscale),
            description=f"Zarr v{array.metadata.zarr_format}, axes {''.join(axes)}, chunks {array.chunks}",
            made_of=made_of,
        )

    def _chunks(self, index, rows, columns):
        """Read a part out of its chunks; one that is cut off is refused, for Blosc reads on behind its end."""
        lead = self.first | ({self.array.ndim - 3: index} if len(self) > 1 else {})
        wanted = (*(lead.get(axis, 0) for axis in range(self.array.ndim - 2)), rows, columns)
        kinds = [type(codec).__name__ for codec in self.array.compressors]
        if kinds in (["Blosc"], ["BloscCodec"]) and self.array.shards is None:
            spans = (part if isinstance(part, slice) else slice(part, part + 1) for part in wanted)
            keys = (
                range(span.start // side, -(-span.stop // side))
                for span, side in zip(spans, self.array.chunks, strict=True)
            )
            for key in itertools.product(*keys):
                file = Path(self.folder, self.array.path, self.array.metadata.encode_chunk_key(key))
                if file.exists() and not is_whole(file):
                    raise EOFError(f"{file.relative_to(self.folder)} is not as long as it says")
        return self.array[wanted]

    def slab(self, sections, rows, columns):
        """Read a part of some sections, all as slices, those of one chunk at once: an array of shape (S, h, w)."""
        pixels = self._pixels(sections, rows, columns, f"{self.source}: a section from {sections.start} on")
        return pixels.reshape(-1, *pixels.shape[-2:])


def place(axes, index):
    """Index of a section, or of a slice of sections, in an array of so many axes.

    >>> place(3, 7), place(5, 7), place(2, 0)
    ((7,), (0, 0, 7), ())
    """
    return (0,) * (axes - 3) + (index,) * (axes > 2)


def open_zarr(path, what="image", channel=None):
    """Open level 0 of an OME-Zarr image, or a plain array, as a ZarrReader; `what` is the role, for messages.

    A DataError says where the folder holds neither, or more than one gray stack.
    """
    with extra():
        import zarr
    folder, inside = within(path)
    try:
        node = zarr.open(Path(folder), mode="r", path=inside)
        attributes = node.attrs.asdict()
        if {"ome", "multiscales", "bioformats2raw.layout"}.isdisjoint(attributes):
            path, array = _plain_array(path, what, node)
            multiscale = _unknown_scale(array)
        else:
            multiscale = attributes.get("ome", attributes)["multiscales"][0]
            array = node[multiscale["datasets"][0]["path"]]
        names = [str(axis["name"]) for axis in multiscale["axes"]]
        sizes = dict(zip(names, map(int, array.shape), strict=True))
        dtype, chunk_px = np.dtype(array.dtype), math.prod(array.chunks)
    except DataError:
        raise
    except Exception as error:  # zarr raises whatever it likes on metadata of the wrong types
        hint = "of a bioformats2raw folder give the image inside, such as its folder 0"
        raise sections.refusal(what, path, f"is no array or OME-NGFF image 0.4 or 0.5 ({hint}): {error!r}") from error
    _check_axes(path, what, names, sizes, dtype)
    channel = sections.channel_of(sizes.get("c", 1), channel, what, path)
    sections.require_memory(chunk_px * dtype.itemsize, f"{path}: a chunk of {array.chunks} px")
    return ZarrReader(path, array, multiscale, _made_of(attributes), channel)


def _plain_array(path, what, node):
    """Return an array of no OME-Zarr image, or the only stack of a group, and where it lies."""
    if not hasattr(node, "members"):
        return path, node
    arrays = {name: array for name, array in node.members(max_depth=None) if hasattr(array, "shape")}
    name = sections.only_stack(arrays, what, path)
    return sections.inside(path, name), arrays[name]


def _unknown_scale(array):
    """Metadata of a plain array, whose axes may have names; their scale is not known."""
    known = array.metadata.dimension_names if array.metadata.zarr_format == 3 else array.attrs.get("_ARRAY_DIMENSIONS")
    names = [*known] if known and {*known} <= {*"tczyx"} else [*sections.guess_axes(array.shape)]
    types = {"t": "time", "c": "channel"}
    scale = [{"type": "scale", "scale": [1.0] * len(names)}]
    axes = [{"name": name, "type": types.get(name, "space")} for name in names]
    return {"axes": axes, "datasets": [{"path": array.path, "coordinateTransformations": scale}]}


def _check_axes(path, what, names, sizes, dtype):
    """Refuse what is not one gray stack of sections along z."""
    ordered = names[-2:] == ["y", "x"] and ("z" not in names or names[-3] == "z") and len(sizes) == len(names)
    longer = [name for name, length in sizes.items() if length > 1 and name not in tuple("czyx")]
    if not ordered or longer or min(sizes.values()) < 1 or dtype.kind not in "buif":
        found = f"axes {''.join(names)}, shape {tuple(sizes.values())}, type {dtype}"
        rule = "one gray stack with axes zyx is needed, before them c, and t at most of length 1"
        raise sections.refusal(what, path, f"has {found}; {rule}")


def _voxel_nm(multiscale):
    """Voxel size (z, y, x) in nm, z None where only the pixel's is known; None where nothing is."""
    try:
        sizes = {axis["name"]: sections.NANOMETRES.get(axis.get("unit"), math.nan) for axis in multiscale["axes"]}
        steps = multiscale["datasets"][0].get("coordinateTransformations", [])
        for step in (*steps, *multiscale.get("coordinateTransformations", [])):
            if step["type"] == "scale":
                sizes = {name: nm * factor for (name, nm), factor in zip(sizes.items(), step["scale"], strict=True)}
        return sections.voxel(*(sizes.get(name) for name in "zyx"))
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
        return None  # a voxel size that cannot be made out is unknown: no reason to refuse the pixels


def _made_of(attributes):
    record = attributes.get(RECORD)
    made_of = record.get("made_of") if isinstance(record, dict) else None
    return made_of if isinstance(made_of, dict) else {}


# -- OME-Zarr out ------------------------------------------------------------------------------------------------


def create(path, reader, shape, chunks, record):
    """Write an OME-Zarr image without chunks: NaN, float32, with the axes and the voxel size of what is predicted.

    `path` must not exist; `shape` and `chunks` are those of level 0, the only one; `record` is for the attribute
    `RECORD`. The prediction of OME-NGFF 0.4 is 0.4; that of everything else is 0.5.
    """
    with extra():
        import numcodecs
        import zarr
    multiscale = _multiscale(reader)
    if zarr_format(reader) == 2:
        attributes = {"multiscales": [{"version": "0.4"} | multiscale]}
        layout = {
            "chunk_key_encoding": {"name": "v2", "separator": "/"},
            "compressors": numcodecs.Blosc("zstd", clevel=5, shuffle=numcodecs.Blosc.SHUFFLE),
        }
    else:
        attributes = {"ome": {"version": "0.5", "multiscales": [multiscale]}}
        layout = {
            "dimension_names": [axis["name"] for axis in multiscale["axes"]],
            "compressors": zarr.codecs.BloscCodec(cname="zstd", clevel=5, shuffle="shuffle", typesize=4),
        }
    group = zarr.create_group(Path(path), zarr_format=zarr_format(reader), attributes=attributes | {RECORD: record})
    group.create_array("0", shape=shape, chunks=chunks, dtype="float32", fill_value=math.nan, **layout)


def check_array(path, shape, chunks):
    """Refuse an output whose array is not the one that `create` makes."""
    with extra():
        import zarr
    try:
        array = zarr.open_array(Path(path, "0"), mode="r")
        found = tuple(array.shape), tuple(array.chunks), str(array.dtype)
    except Exception as error:
        raise DataError(f"{path}: the array of the prediction cannot be read: {error}.") from error
    if found != (wanted := (tuple(shape), tuple(chunks), "float32")):
        raise DataError(f"{path}: the prediction's array must have shape, chunks and type {wanted}. Received: {found}")


def is_whole(file):
    """Tell whether a chunk's file is as long as Blosc wrote it; its header says so in bytes 12 to 15."""
    try:
        with open(file, "rb") as chunk:
            header = chunk.read(16)
        return len(header) == 16 and int.from_bytes(header[12:], "little") == file.stat().st_size
    except FileNotFoundError:
        return False


def remove_partials(path):
    """Remove chunks that a dead process has left half written; of an output that is `atomic.locked`."""
    for partial in Path(path).rglob("*.partial"):
        partial.unlink(missing_ok=True)


def array_shape(reader):
    """Shape of level 0: with all axes of an OME-Zarr image, of one channel, or else (S, H, W)."""
    if not isinstance(reader, ZarrReader):
        return reader.shape
    return (1,) * (reader.array.ndim - 3) + reader.shape[3 - min(3, reader.array.ndim) :]


def zarr_format(reader):
    """2 or 3: that of the sections, or 3 where they are no OME-Zarr image."""
    return reader.array.metadata.zarr_format if isinstance(reader, ZarrReader) else 3


def _multiscale(reader):
    """Metadata of an image with one level; a size that is not known is 1, without a unit."""
    if isinstance(reader, ZarrReader):
        levels = [reader.multiscale["datasets"][0] | {"path": "0"}]
        kept = ("axes", "coordinateTransformations")
        return {key: reader.multiscale[key] for key in kept if key in reader.multiscale} | {"datasets": levels}
    sizes = dict(zip("zyx", reader.voxel_nm or (None, None, None), strict=True))
    scale = [{"type": "scale", "scale": [nm or 1.0 for nm in sizes.values()]}]
    axes = [{"name": name, "type": "space"} | ({"unit": "nanometer"} if nm else {}) for name, nm in sizes.items()]
    return {"axes": axes, "datasets": [{"path": "0", "coordinateTransformations": scale}]}
