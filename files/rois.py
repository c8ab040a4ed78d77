"""ImageJ ROIs out: the outline of every numbered cell of every section, in a zip for ImageJ's ROI Manager."""

import contextlib
import importlib.util
import zipfile

import numpy as np

from files.atomic import DataError, replacing


def require():
    """Refuse to begin without the library."""
    if importlib.util.find_spec("roifile") is None:
        raise DataError("--rois needs roifile: pip install -r requirements-export.txt")


@contextlib.contextmanager
def writing(path, *, force=False):
    """Give a function that adds the ROIs of a section's labels, (H, W) and its index from 0, and returns the labels."""
    with replacing(path, force=force) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive:

        def add(labels, index):
            for roi in rois_of(labels, index):
                archive.writestr(f"{roi.name}.roi", roi.tobytes())
            return labels

        yield add


def rois_of(labels, index):
    """Yield a ROI for each cell of a section, named section-label, at the section's slice.

    The ROI covers the cell's pixels and no others; it is composite where a cell has holes. ImageJ's format has no
    place for a voxel size: the image that a ROI lies on has it.
    """
    from roifile import ROI_TYPE, ImagejRoi
    from scipy import ndimage

    for label, box in enumerate(ndimage.find_objects(labels), 1):
        if box is None:
            continue
        start = np.array([box[0].start, box[1].start])
        parts = [(outline + start)[:, ::-1] for outline in outlines(labels[box] == label)]
        roi = ImagejRoi.frompoints(np.concatenate(parts), name=f"{index + 1:04d}-{label:05d}", position=index)
        if len(parts) == 1:
            roi.roitype = ROI_TYPE.TRACED
        else:
            path = [_path(part) for part in parts]
            roi.roitype, roi.integer_coordinates, roi.n_coordinates = ROI_TYPE.RECT, None, 0
            roi.multi_coordinates = np.concatenate(path, dtype=np.float32)
            roi.shape_roi_size = roi.multi_coordinates.size
        yield roi


def _path(points):
    """Return a closed path in ImageJ's words: 0 x y moves there, 1 x y draws a line, 4 goes back to the start."""
    return np.append(np.column_stack([np.arange(len(points)) > 0, points]).ravel(), 4)


def outlines(mask):
    """Return the closed polygons along the edges of a mask's pixels, the holes' as well.

    Arrays of shape (N, 2) with (row, column) of the corners of pixels: pixel (r, c) reaches from there to
    (r + 1, c + 1). Pixels that meet in a corner only are apart.

    >>> outlines(np.array([[False, True, True]]))[0].tolist()
    [[1, 1], [0, 1], [0, 3], [1, 3]]
    """
    from skimage.measure import find_contours

    found = []
    for middles in find_contours(np.pad(mask, 1), 0.5):  # of the edges; two in a row share a corner
        corners = np.floor((middles[:-1] + middles[1:]) / 2).astype(int)
        steps = corners - np.roll(corners, 1, axis=0)
        found.append(corners[(steps != np.roll(steps, -1, axis=0)).any(axis=1)])
    return found
