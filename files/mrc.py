"""MRC in, the format of electron tomography: https://www.ccpem.ac.uk/mrc_format/mrc2014.php"""

import warnings

import numpy as np

from files.sections import NANOMETRES, array_reader, guess_axes, voxel


def open_mrc(path, what, channel=None, **_):
    """Open a file as a StackReader; as `stacks.open_stack`."""
    import mrcfile

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of bytes behind the last section, which do no harm
        file = mrcfile.mmap(path, "r")
    try:
        pixels, turned = _unsigned(file) if what in ("image", "test") else (file.data, "")
        words = f"MRC, mode {int(file.header.mode)}{turned}"
        about = {"voxel_nm": _voxel_nm(file), "description": words, "close": file.close}
        return array_reader(pixels, guess_axes(pixels.shape), what, path, channel, **about)
    except BaseException:
        file.close()
        raise


class _Raised:
    """Signed bytes, 128 higher, as an array that is read where it is indexed."""

    def __init__(self, pixels):
        self.pixels, self.shape, self.dtype = pixels, pixels.shape, np.dtype(np.uint8)

    def __getitem__(self, place):
        return self.pixels[place].view(np.uint8) ^ np.uint8(128)


def _unsigned(file):
    """Return gray values of bytes as IMOD shows them, and a remark: it stores 0..255 as -128..127, once as 0..255."""
    if file.data.dtype != np.int8:
        return file.data, ""
    if file.header.dmax > 127:
        return file.data.view(np.uint8), ", bytes without sign"
    return _Raised(file.data), ", signed bytes, 128 added"


def _voxel_nm(file):
    """Voxel size in nm; 1 Angstrom is what programs write where they know of none."""
    sizes = [float(file.voxel_size[axis]) for axis in "zyx"]
    return None if sizes == [1, 1, 1] else voxel(*(NANOMETRES["\u00e5"] * size for size in sizes))
