"""ImageJ ROIs: a cell's own pixels, its section, and what the real ImageJ makes of all that is written for it."""

import importlib.util
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, cases, files

import data
import dilatedUnet
from files import rois

roifile = pytest.importorskip("roifile", reason="requirements-export.txt is not installed")
IMAGEJ = Path("/usr/share/java/ij.jar")
MISSING = [name for name in ("java", "xvfb-run") if not shutil.which(name)] + ["imagej"] * (not IMAGEJ.exists())
PRINT = """
getVoxelSize(x, y, z, unit);
print(getTitle, getWidth, getHeight, nSlices, bitDepth, x, y, z, unit);
"""
PRINT_ROIS = """
print(getTitle, Overlay.size);
for (i = 0; i < roiManager("count"); i++) {
    roiManager("select", i);
    getRawStatistics(pixels);
    print("" + Roi.getName, getSliceNumber, pixels);
}
"""


@pytest.fixture
def labels():
    """Cells with a hole, one pixel large, all around another, in a corner, touching in a corner."""
    labels = np.zeros((3, 30, 40), np.uint16)
    labels[0, 5:20, 5:30], labels[0, 10:12, 10:14], labels[0, 9, 9], labels[0, 10, 11] = 1, 0, 0, 3
    labels[1, 20:, 30:], labels[1, 25:28, 35:40], labels[1, 19, 29] = 4, 300, 4
    labels[2], labels[2, 0, 0], labels[2, 3, 3] = 7, 0, 3
    return labels


def test_the_outlines_of_a_cell_hold_as_many_pixels_as_it_has(labels):
    for section in labels:
        for label in set(section.ravel()) - {0}:
            area = 0
            for outline in rois.outlines(section == label):
                assert outline.dtype.kind == "i"
                (rows, columns), (next_rows, next_columns) = outline.T, np.roll(outline, -1, axis=0).T
                area += np.sum(rows * next_columns - columns * next_rows) / 2
            assert abs(area) == np.sum(section == label)


def segment(labels, *words):
    """What `predict --segment` writes where the network found these cells."""
    from predict import prediction

    record = {"threshold": 0, "smallest_cell_px": 0}
    args = dilatedUnet.parse(["predict", "--weight_path", "w", "--output", "labels.tif", "--segment", *words])
    prediction.write(args, (np.float32(section) for section in labels), record, count=3, shape=(30, 40))


def test_predict_writes_a_roi_for_each_cell_of_each_section(labels, tmp_path, monkeypatch):
    import tifffile

    monkeypatch.chdir(tmp_path)
    segment(labels, "--rois", "cells.zip")
    segment(labels[::-1], "--rois", "cells.zip", "--force")
    found, expected = {}, {}
    for roi in roifile.roiread("cells.zip"):
        found[roi.name] = roi.position, roi.top, roi.left
    for i, section in enumerate(tifffile.imread("labels.tif"), 1):
        for label in np.unique(section[section > 0]):
            rows, columns = np.nonzero(section == label)
            expected[f"{i:04d}-{label:05d}"] = i, rows.min(), columns.min()
    assert found == expected
    assert len(found) > 3


def test_a_zip_that_exists_is_kept_and_nothing_else_is_written(labels, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.zip").write_text("mine")
    with pytest.raises(data.DataError, match=r"there.zip exists already \(--force replaces it\)"):
        segment(labels, "--rois", "there.zip")
    assert files(tmp_path) == {tmp_path / "there.zip": b"mine"}


@cases(
    "words, message",
    ("--rois x.zip", "--rois goes with --segment. Received: x.zip"),
    ("--segment --rois x.zip --output x.zarr", "--threshold and --segment go with a TIFF --output"),
    ("--segment --rois x.roi", "--rois: must be a file that ends in .zip. Received: x.roi"),
    ("--segment --rois x.zip", "--rois needs roifile: pip install -r requirements-export.txt"),
)
def test_rois_that_cannot_be_written_are_refused_in_one_sentence(refuses, monkeypatch, words, message):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "roifile" else real(name))
    refuses(message, "predict", *words.split())


@pytest.mark.skipif(bool(MISSING), reason=f"the real ImageJ needs Debian's {', '.join(MISSING)}")
def test_imagej_opens_prediction_labels_and_rois_and_the_macro_lays_them_over_the_stack(labels, tmp_path):
    about = {"count": 3, "shape": (30, 40), "voxel_nm": (50, 4, 8)}
    data.write_prediction(tmp_path / "raw.tif", iter(labels > 0), **about)
    data.write_prediction(tmp_path / "p.tif", iter(labels > 100), **about)
    with rois.writing(tmp_path / "labels.zip") as add:
        sections = (add(section, i) for i, section in enumerate(labels))
        data.write_mask(tmp_path / "labels.tif", sections, dtype="uint16", **about)
    macro = [f'open("{tmp_path}/{name}.tif");{PRINT}' for name in ("p", "labels")]
    overlay = (ROOT / "docs" / "overlay.ijm").read_text()
    for name in ("p", "labels"):
        macro += ['close("*");', overlay.replace("getArgument()", f'"{tmp_path}/raw.tif|{tmp_path}/{name}.tif"')]
        macro += [PRINT_ROIS]
    (tmp_path / "all.ijm").write_text("\n".join(macro))
    command = ["xvfb-run", "-a", "java", "-jar", IMAGEJ, "-batch", tmp_path / "all.ijm"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    voxel = "0.008 0.004 0.05 µm"
    expected = [f"p.tif 40 30 3 32 {voxel}", f"labels.tif 40 30 3 16 {voxel}"]
    expected += ["raw.tif 3", "0002-0001-0026 2 15", "raw.tif 3"]
    for i, section in enumerate(labels, 1):
        for label in np.unique(section[section > 0]):
            expected.append(f"{i:04d}-{label:05d} {i} {np.sum(section == label)}")
    assert done.stdout.splitlines() == expected, done.stderr
