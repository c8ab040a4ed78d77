"""A stack of sections: in memory, or read one by one or in parts; and the words that speak of one."""

import contextlib
import math
import os
import re
import weakref
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from files.atomic import DataError, within

FLAGS = {"image": "--image_path", "mask": "--mask_path", "test": "--image_path", "test_mask": "--mask_path"}
MOST_SECTIONS = 2**20  # a header that speaks of more is damaged


@dataclass(frozen=True, eq=False)
class Stack:
    """Serial sections in memory."""

    sections: np.ndarray  # (S, H, W), in the file's own type
    voxel_nm: tuple[float | None, float, float] | None = None  # (z, y, x); z None where only the pixel size is known
    names: list[str] = field(default_factory=list)  # one per section
    source: str = ""  # the file, folder or data set they came from
    description: str = ""  # axes and encoding, in words
    made_of: dict = field(default_factory=dict)  # of what a prediction of this suite is made

    shape = property(lambda self: self.sections.shape)
    dtype = property(lambda self: self.sections.dtype)


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
        if len(self.shape) != 3 or min(self.shape) < 1 or self.shape[0] > MOST_SECTIONS:
            raise DataError(f"{source} holds no stack of sections: its shape is {' x '.join(map(str, self.shape))}.")
        stem = Path(source).stem
        self.names = list(names) or ([stem] if len(self) == 1 else [f"{stem}[{i}]" for i in range(len(self))])
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
        except Exception as error:  # decoders raise whatever they like on a damaged file
            raise DataError(f"{place} is damaged or cut off, or memory is short: {error}.") from error
        if self.dtype.kind == "f" and not np.isfinite(pixels).all():
            raise DataError(f"{place} holds {np.count_nonzero(~np.isfinite(pixels))} NaN or infinite values.")
        return pixels

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


# --- Arrays with named axes ---------------------------------------------------------------------------------


def guess_axes(shape):
    """Return the axes that a shape without names most probably has: of four, the shorter end, or a narrow last one.

    >>> guess_axes((30, 512, 512)), guess_axes((30, 512, 512, 2)), guess_axes((1, 3, 30, 512, 512))
    ('zyx', 'zyxc', 'tczyx')
    >>> guess_axes((1, 96, 130, 1)), guess_axes((2, 96, 130, 3))
    ('zyxc', 'zyxc')
    """
    if len(shape) > 4:
        return "t" * (len(shape) - 4) + guess_axes(shape[-4:])
    last = len(shape) == 4 and (shape[-1] < shape[0] or shape[-1] < 5 < shape[-2])  # no section is so narrow
    return ("zyxc" if last else "czyx")[4 - len(shape) :]


def array_reader(array, axes, what, path, channel, **about):
    """Open an array, read where it is indexed, whose axes have names such as tzyxc; sections run along z or t."""
    sizes = dict(zip(axes, array.shape, strict=True))
    along = [axis for axis, length in sizes.items() if axis not in "cyx" and length > 1]
    if len(sizes) < len(axes) or not {*"yx"} <= {*sizes} or len(along) > 1 or array.dtype.kind not in "buif":
        found = f"axes {''.join(axes)}, shape {tuple(array.shape)}, type {array.dtype}"
        raise refusal(what, path, f"has {found}; one gray stack with axes zyx is needed")
    chosen = channel_of(sizes.get("c", 1), channel, what, path)

    def read(index, rows, columns):
        place = {"c": chosen, "y": rows, "x": columns} | dict.fromkeys(along, index)
        pixels = np.array(array[tuple(place.get(axis, 0) for axis in axes)])
        return pixels if axes.index("y") < axes.index("x") else pixels.T

    shape = (sizes[along[0]] if along else 1, sizes["y"], sizes["x"])
    return StackReader(read, shape, array.dtype, source=path, **about)


def channel_of(count, channel, what, path):
    """Return the channel to read of so many; refuse one that is not there, and none where there are several."""
    if channel is None and count > 1:
        how = "--channel 0 takes the first" if flag(what) == "--image_path" else "save the one that is meant"
        raise refusal(what, path, f"has {count} channels; {how}")
    if channel is not None and channel >= count:
        raise DataError(f"--channel must be below {count}, the number of channels of {path}. Received: {channel}")
    return channel or 0


def inside(path, name):
    """Return the source that an array of a file, or of a group in it, is."""
    return f"{path}{'/' if within(path)[1] else ':/'}{name}"


def only_stack(arrays, what, path):
    """Return the name of the only 3-D array of several, or of the only array; refuse with a list of them."""
    stacks = [name for name in arrays if len(arrays[name].shape) == 3] or list(arrays)
    if len(stacks) != 1:
        stacks.sort(key=natural_key)
        held = some([f"{name} ({' x '.join(map(str, arrays[name].shape))})" for name in stacks])
        raise refusal(
            what, path, f"holds {held}: name one as {inside(path, 'NAME')}" if held else "holds no stack of sections"
        )
    return stacks[0]


# --- Words and numbers --------------------------------------------------------------------------------------


def flag(what):
    """Return the flag that names a role: `--mask_path` for "mask"."""
    return FLAGS.get(what, f"--{what}")


def refusal(what, path, rule):
    """Return the error that says which argument's file breaks which rule."""
    return DataError(f"{flag(what)}: {path} {rule}.")


def colour_rule(what, channels):
    """Say what is wrong with colours, and what to do."""
    if what == "mask":  # ImageJ makes the same gray of pure red, green and blue
        return f"holds colours ({channels}); labels must be numbers: save each kind as a gray value of its own"
    gray = "8-bit or 16-bit grayscale (RGB in ImageJ: Image > Type > 8-bit)"
    return f"is a colour image ({channels}); sections must be gray: save it as {gray}"


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


def shared_end(names):
    """Return the longest end of all names, but for digits at its start: those are a section's number.

    >>> shared_end(["a1_mask", "b1_mask"])
    '_mask'
    """
    return shared_start([name[::-1] for name in names])[::-1]


def shared_start(names):
    """Return the longest start of all names, that of the first and the last of the alphabet, but for digits at its end.

    >>> shared_start(["s10", "s12"])
    's'
    """
    first, last = min(names), max(names)
    same = (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    return re.sub(r"[0-9]+$", "", first[: next(same, min(len(first), len(last)))])


def format_sections(sections):
    """Write section numbers as `parse_sections` reads them.

    >>> format_sections([0, 3, 5, 6, 7])
    '0,3,5-7'
    """
    ends = ((run[0], run[-1]) for run in stretches(sorted(int(i) for i in sections)))
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ends)


def stretches(sections):
    """Ascending numbers of sections in lists of those that follow each other.

    >>> stretches([0, 1, 2, 5, 6])
    [[0, 1, 2], [5, 6]]
    """
    found = []
    for i in sections:
        if not found or i != found[-1][-1] + 1:
            found.append([])
        found[-1].append(i)
    return found


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
    if nbytes > (limit := memory_limit()):
        there = memory_words(limit)
        raise DataError(f"{words} would take {memory_words(nbytes)} of memory, more than the {there} there is.")


def reflect(start, stop, length):
    """Indices start..stop of an axis of `length` pixels, mirrored about its border pixels as often as needed.

    >>> reflect(-3, 6, 4)
    array([3, 2, 1, 0, 1, 2, 3, 2, 1])
    >>> reflect(-2, 3, 1)
    array([0, 0, 0, 0, 0])
    """
    period = max(1, 2 * (length - 1))
    phase = np.arange(start, stop) % period
    return np.minimum(phase, period - phase)


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
    thickness = f"{voxel_nm[0]:.4g} nm" if voxel_nm[0] else "thickness unknown"
    return f"pixel {pixel_words(voxel_nm)}, section {thickness}"


def pixel_words(voxel_nm):
    """Say a pixel size.

    >>> pixel_words((50.0, 4.0, 4.0))
    '4 x 4 nm'
    """
    return f"{voxel_nm[1]:.4g} x {voxel_nm[2]:.4g} nm"


def pixel_factors(voxel_nm, trained_nm):
    """Return how many pixels of the training a pixel's height and width are; None where about one, or not known.

    >>> pixel_factors((50.0, 8.0, 4.0), (50.0, 4.0, 4.0)), pixel_factors((30.0, 4.3, 4.0), (None, 4.0, 4.0))
    ((2.0, 1.0), None)
    """
    if voxel_nm is None or trained_nm is None:
        return None
    factors = tuple(own / trained for own, trained in zip(voxel_nm[1:], trained_nm[1:], strict=True))
    return factors if any(abs(factor - 1) > 0.1 for factor in factors) else None


RESCALED = 16  # times larger or smaller: beyond it a voxel size is wrong, or nothing is left to be seen


def can_resample(factors):
    """Whether pixels of such factors can be resampled to those of the training."""
    return 1 / RESCALED <= min(factors) <= max(factors) <= RESCALED


def is_voxel(found):
    """Whether what a record holds is a voxel size, or that none is known."""
    try:
        return found is None or list(found) == list(voxel(*found))
    except (TypeError, ValueError):
        return False


def voxel(z, y, x):
    """Return a voxel size (z, y, x) without what is no length: z None, or None for all of it."""
    z, y, x = (float(f"{n:.6g}") if n and math.isfinite(n) and n > 0 else None for n in (z, y, x))
    return (z, y, x) if y and x else None
