"""The formats of the field, MRC, HDF5, Zarr, channels: the pixels of the TIFF, or a sentence of what is wrong."""

import json
import shutil
import sys

import numpy as np
import pytest
import tifffile
from conftest import ome_zarr, refused
from test_stacks import peak

import data
from data import DataError, iter_sections, read_stack
from files import atomic

h5py = pytest.importorskip("h5py", reason="pip install -r requirements-formats.txt")
mrcfile = pytest.importorskip("mrcfile", reason="pip install -r requirements-formats.txt")
zarr = pytest.importorskip("zarr", reason="pip install -r requirements-zarr.txt")

GRAY = np.random.default_rng(0).integers(0, 256, (5, 24, 40)).astype(np.uint8)
TWO = np.stack([255 - GRAY, GRAY])  # channels: what is meant is the second
VOXEL = (50.0, 4.0, 8.0)


def hdf5(folder, array=GRAY, name="raw", others=(), axes=None, um=(0.05, 0.004, 0.008), ending=".h5", **options):
    with h5py.File(folder / f"a{ending}", "w") as file:
        found = file.create_dataset(name, data=array, **options)
        found.attrs.update({"element_size_um": um} if um else {})
        found.attrs.update({"axistags": json.dumps({"axes": [{"key": key} for key in axes]})} if axes else {})
        file["words"] = "not an image"
        for other in others:
            file[other] = GRAY[:2]
    return folder / f"a{ending}"


def mrc(folder, array=GRAY, voxel_size=(80, 40, 500), ending=".mrc", dmax=None):
    with mrcfile.new(folder / f"a{ending}", array, overwrite=True) as file:
        file.voxel_size = voxel_size
        file.header.dmax = file.header.dmax if dmax is None else dmax
    return folder / f"a{ending}"


def plain_zarr(folder, array=GRAY, inside="", version=3, **options):
    if inside:
        zarr.open_group(str(folder / "a.zarr"), mode="a", zarr_format=version)
    root = zarr.storage.LocalStore(folder / "a.zarr")
    zarr.create_array(
        root, name=inside or None, data=array, zarr_format=version, **{"chunks": (2, 24, 40)[-array.ndim :]} | options
    )
    return folder / "a.zarr"


def both_zarr(folder):
    plain_zarr(folder, GRAY[:2], "other")
    return plain_zarr(folder, inside="deep/raw")


def tiff(folder, array, axes, ome=False):
    tifffile.imwrite(folder / "a.tif", array, imagej=not ome, ome=ome, metadata={"axes": axes})
    return folder / "a.tif"


def folder_of_channels(folder):
    (folder / "sections").mkdir()
    for i in range(len(GRAY)):
        axes = {"imagej": True, "metadata": {"axes": "CYX"}}
        tifffile.imwrite(folder / "sections" / f"{i}.tif", TWO[:, i], **axes)
    return folder / "sections"


LAST, SECOND = np.moveaxis(TWO, 0, -1), {"channel": 1}
SAME = {  # writes a file into a folder; what is inside of it; options of the reader; voxel size
    "HDF5": (hdf5, "", {}, VOXEL),
    "HDF5, chunks, deep": (
        lambda f: hdf5(f, name="volumes/raw", ending=".hdf5", compression="gzip", chunks=(3, 16, 16)),
        *(":/volumes/raw", {}, VOXEL),
    ),
    "HDF5, the only one of a group": (lambda f: hdf5(f, name="a/raw", others=["b"]), ":/a", {}, VOXEL),
    "HDF5, one of several": (lambda f: hdf5(f, others=["x", "y/z"], um=None), ":/raw", {}, None),
    "HDF5 of ilastik": (lambda f: hdf5(f, LAST, axes="zyxc", um=[1, 2]), "", SECOND, None),
    "HDF5, x before y": (lambda f: hdf5(f, GRAY.transpose(2, 1, 0), axes="xyz", um=None), "", {}, None),
    "HDF5, axes of length 1": (lambda f: hdf5(f, GRAY[None, ..., None], um=None), "", {}, None),
    "HDF5, channels without names": (lambda f: hdf5(f, TWO, um=None), "", SECOND, None),
    "MRC": (lambda f: mrc(f, GRAY.astype(np.uint16)), "", {}, VOXEL),
    "MRC of no voxel size": (lambda f: mrc(f, GRAY.astype(np.float32), (1, 1, 1), ".rec"), "", {}, None),
    "MRC of IMOD": (lambda f: mrc(f, (GRAY ^ 128).view(np.int8), ending=".st"), "", {}, VOXEL),
    "MRC of old": (lambda f: mrc(f, GRAY.view(np.int8), dmax=255), "", {}, VOXEL),
    "Zarr v3": (plain_zarr, "", {}, None),
    "Zarr v2": (lambda f: plain_zarr(f, version=2), "", {}, None),
    "Zarr, one of several": (both_zarr, ":/deep/raw", {}, None),
    "Zarr v2, the only one": (lambda f: plain_zarr(f, inside="deep/raw", version=2), "", {}, None),
    "Zarr, channels": (lambda f: plain_zarr(f, TWO, dimension_names="czyx", chunks=(1, 2, 24, 40)), "", SECOND, None),
    "OME-Zarr, channels": (lambda f: ome_zarr(f / "a.zarr", TWO[None], "0.4", "tczyx", VOXEL), "", SECOND, VOXEL),
    "TIFF, channels": (lambda f: tiff(f, np.moveaxis(TWO, 0, 1), "ZCYX"), "", SECOND, None),
    "OME-TIFF, channels": (lambda f: tiff(f, TWO, "CZYX", ome=True), "", SECOND, None),
    "TIFF of one channel": (lambda f: tiff(f, GRAY, "ZYX"), "", {"channel": 0}, None),
    "folder, channels": (folder_of_channels, "", SECOND, None),
}


@pytest.mark.parametrize("case", SAME)
def test_every_format_gives_the_pixels_of_the_tiff_whole_and_in_parts(tmp_path, case):
    write, inside, how, voxel_nm = SAME[case]
    with iter_sections(f"{write(tmp_path)}{inside}", **how) as reader:
        assert (reader.shape, reader.voxel_nm) == (GRAY.shape, voxel_nm)
        np.testing.assert_array_equal(np.stack(list(reader)), GRAY)
        np.testing.assert_array_equal(reader.part(3, slice(2, 9), slice(5, 40)), GRAY[3, 2:9, 5:40])
        np.testing.assert_array_equal(reader.slab(slice(1, 3), slice(0, 24), slice(4, 9)), GRAY[1:3, :, 4:9])
        again = read_stack(reader.source, **how)  # as a worker and a record name it
    np.testing.assert_array_equal(again.sections, GRAY)
    refused("must not be an input", atomic.refuse_inputs, "--output", next(tmp_path.iterdir()), again.source)


def test_an_hdf5_of_parts_in_other_files_is_read_while_they_are_there(tmp_path):
    """HDF5 itself reads zeros in the place of a file that is gone."""
    import h5py

    layout, parts = h5py.VirtualLayout(GRAY.shape, "u1"), ("a.h5", "b.h5")
    for number, name in enumerate(parts):
        with h5py.File(tmp_path / name, "w") as file:
            file["raw"] = GRAY
        layout[number::2] = h5py.VirtualSource(name, "raw", GRAY.shape)[number::2]
    with h5py.File(tmp_path / "all.h5", "w") as file:
        file.create_virtual_dataset("raw", layout)
    np.testing.assert_array_equal(read_stack(tmp_path / "all.h5").sections, GRAY)
    (tmp_path / "b.h5").unlink()
    refused(r"all\.h5 takes sections from b\.h5, which is not there", read_stack, tmp_path / "all.h5")


def test_a_section_is_a_stack_of_one_in_every_format(tmp_path):
    for path in (hdf5(tmp_path, GRAY[0]), mrc(tmp_path, GRAY[0].astype(np.float32)), plain_zarr(tmp_path, GRAY[0])):
        np.testing.assert_array_equal(read_stack(path).sections, GRAY[:1])
    np.testing.assert_array_equal(data.read_labels(mrc(tmp_path, (GRAY > 99).view(np.int8)))[0].sections, GRAY > 99)


def test_what_is_inside_of_a_file_is_told_from_a_drive_of_windows(monkeypatch):
    with monkeypatch.context() as windows:
        windows.setattr(atomic.os.path, "exists", {"C", "C:/x.h5", "C:\\x.h5", "a.h5:/b", "a.h5"}.__contains__)
        typed = ("C:/x.h5", "C:/y.h5", "C:/x.h5:/a/b/", "C:\\x.h5:\\a", "a.h5:/b", "a.h5:/", "b.h5:/c")
        found = [atomic.within(path) for path in typed]
    inside = [("C:/x.h5", "a/b"), ("C:\\x.h5", "a"), ("a.h5:/b", ""), ("a.h5", ""), ("b.h5:/c", "")]
    assert found == [("C:/x.h5", ""), ("C:/y.h5", ""), *inside]


def broken(path, kept=0.5):
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    return path


def no_chunk(path):
    (path / "c" / "1" / "0" / "0").write_bytes(b"no chunk")
    return path


WRONG = {  # writes a file and gives its name; options; words of the refusal
    "HDF5 cut off": (lambda f: broken(hdf5(f)), {}, "damaged, cut off or no .h5 file"),
    "HDF5 of text": (lambda f: broken(hdf5(f), 0), {}, "damaged, cut off or no .h5 file"),
    "HDF5 of two": (lambda f: hdf5(f, others=["b"]), {}, r"holds b \(2 x 24 x 40\), raw .*a.h5:/NAME"),
    "HDF5 of none": (lambda f: hdf5(f, GRAY[0, 0]), {}, "holds no stack"),
    "HDF5, no such name": (lambda f: f"{hdf5(f)}:/deep/x", {}, "holds no deep/x; it holds raw"),
    "HDF5, words": (lambda f: f"{hdf5(f)}:/words", {}, "one gray stack with axes zyx"),
    "HDF5, four axes": (lambda f: hdf5(f, TWO, axes="tzyx"), {}, "one gray stack with axes zyx"),
    "HDF5, a channel is needed": (lambda f: hdf5(f, TWO), {}, "has 2 channels; --channel 0 takes the first"),
    "MRC cut off": (lambda f: broken(mrc(f, GRAY.astype(np.float32))), {}, "damaged, cut off or no .mrc file"),
    "MRC of text": (lambda f: broken(mrc(f, GRAY.astype(np.float32)), 0.01), {}, "damaged, cut off or no .mrc"),
    "MRC with a name": (lambda f: f"{mrc(f, GRAY.astype(np.float32))}:/raw", {}, "goes with HDF5 and Zarr"),
    "Zarr of two": (both_zarr, {}, r"holds .*deep/raw \(5 x 24 x 40\), other .*name one"),
    "Zarr, no such name": (lambda f: f"{both_zarr(f)}:/x", {}, "is no array or OME-NGFF image"),
    "Zarr, channels last": (lambda f: plain_zarr(f, LAST, chunks=LAST.shape), SECOND, "one gray stack with axes zyx"),
    "Zarr, a channel is needed": (lambda f: plain_zarr(f, TWO, chunks=TWO.shape), {}, "has 2 channels"),
    "Zarr damaged": (lambda f: no_chunk(plain_zarr(f)), {}, "damaged"),
    "no such channel": (lambda f: tiff(f, TWO, "CZYX", ome=True), {"channel": 2}, "must be below 2, .*Received: 2"),
    "no channels": (lambda f: tiff(f, GRAY, "ZYX"), SECOND, "must be below 1"),
    "a painted stack": (lambda _: data.Stack(GRAY), SECOND, "must be below 1"),
    "no such file": (lambda f: f"{f}/b.h5:/raw", {}, "b.h5:/raw does not exist"),
    "no colon": (lambda f: f"{hdf5(f)}/deep/x", {}, "does not exist; an array of .*a.h5 is named .*a.h5:/deep/x"),
    "no slash": (lambda f: f"{hdf5(f)}:raw", {}, "does not exist; an array of .*a.h5 is named .*a.h5:/raw"),
    "no slash, Zarr": (lambda f: f"{both_zarr(f)}:raw", {}, "an array of .*zarr is named .*zarr:/raw"),
    "a drive": (lambda _: "C:/b.h5", {}, "C:/b.h5 does not exist"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_damaged_or_cannot_be_meant_is_refused_in_one_sentence(tmp_path, case):
    write, how, words = WRONG[case]
    with pytest.raises(DataError, match=words) as caught:
        read_stack(write(tmp_path), **how)
    assert "\n" not in str(caught.value)


def test_a_missing_library_is_named_with_the_command_that_installs_it(tmp_path, monkeypatch):
    for path, library in ((hdf5(tmp_path), "h5py"), (mrc(tmp_path, GRAY.astype(np.float32)), "mrcfile")):
        monkeypatch.setitem(sys.modules, library, None)
        refused(f"{path} needs {library}: pip install -r requirements-formats.txt", read_stack, path)


@pytest.mark.parametrize("write", [hdf5, mrc, plain_zarr])
def test_memory_does_not_grow_with_the_number_of_sections(tmp_path, write):
    def read(count):
        folder = tmp_path / str(count)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        array = np.ones((count, 128, 128), np.float32)
        options = {} if write is mrc else {"chunks": (1, 128, 128)}
        path = write(folder, array, **options)
        return peak(lambda: [section.sum() for section in iter_sections(path)])

    few, many = (min(read(count), read(count)) for count in (2, 24))  # a first one imports
    assert many < 2 * few + 2**18
