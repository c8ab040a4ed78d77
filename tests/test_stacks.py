"""Files of sections, in and out."""

import contextlib
import io
import json
import os
import subprocess
import sys
import tracemalloc
import weakref

import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data import iter_sections, read_stack
from files import sections, writing
from files.atomic import DataError
from files.sections import Stack, natural_key
from files.stacks import sha256_pixels
from files.writing import write_mask, write_prediction

VOXEL = (50.0, 4.0, 4.0)
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def gray(shape=(6, 40, 36), dtype="uint8", seed=0):
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        return rng.random(shape).astype(dtype)
    high = 2 if dtype == "bool" else min(np.iinfo(dtype).max, 60_000)
    return rng.integers(0, high, shape).astype(dtype)


def pages(path, sections, **options):
    """One IFD per section and no metadata: what any program but ImageJ writes."""
    with tifffile.TiffWriter(path, **options) as writer:
        for section in sections:
            writer.write(section, metadata=None, contiguous=False)


# --- What is written is what is read ------------------------------------------------------------------------

ENCODINGS = {
    "imagej": {"imagej": True, "metadata": {"axes": "ZYX"}},
    "imagej time": {"imagej": True, "metadata": {"axes": "TYX"}},
    "imagej without axes": {"imagej": True},
    "ome": {"ome": True, "metadata": {"axes": "ZYX"}},
    "ome lzw": {"ome": True, "metadata": {"axes": "ZYX"}, "compression": "lzw"},
    "shaped": {},
    "plain": {"metadata": None},
    "lzw": {"compression": "lzw"},
    "deflate": {"compression": "zlib", "metadata": None},
    "deflate, predictor": {"compression": "zlib", "predictor": True},
    "strips": {"rowsperstrip": 7, "metadata": None},
    "tiled": {"tile": (16, 16), "compression": "zlib"},
    "big-endian": {"byteorder": ">"},
    "big-endian imagej": {"byteorder": ">", "imagej": True, "metadata": {"axes": "ZYX"}},
    "big-endian lzw": {"byteorder": ">", "compression": "lzw", "metadata": None},
    "bigtiff": {"bigtiff": True},
    "bigtiff tiled ome": {"bigtiff": True, "ome": True, "tile": (16, 16), "metadata": {"axes": "ZYX"}},
}


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_encoding_gives_the_same_pixels(tmp_path, encoding, dtype):
    sections = gray(dtype=dtype)
    tifffile.imwrite(tmp_path / "stack.tif", sections, photometric="minisblack", **ENCODINGS[encoding])
    stack = read_stack(tmp_path / "stack.tif")
    np.testing.assert_array_equal(stack.sections, sections)
    assert stack.sections.dtype == np.dtype(dtype)
    assert stack.sections.dtype.isnative
    assert len(stack.names) == 6


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "uint32", "float16", "float64", "bool"])
def test_other_types_keep_type_and_values(tmp_path, dtype):
    sections = gray(dtype=dtype)
    pages(tmp_path / "stack.tif", sections)
    stack = read_stack(tmp_path / "stack.tif")
    np.testing.assert_array_equal(stack.sections, sections)
    assert stack.sections.dtype == np.dtype(dtype)


@pytest.mark.parametrize("options", [{}, {"imagej": True}, {"ome": True}, {"compression": "lzw"}])
def test_a_single_section_is_a_stack_of_one(tmp_path, options):
    section = gray((1, 33, 21))[0]
    tifffile.imwrite(tmp_path / "one.tif", section, **options)
    stack = read_stack(tmp_path / "one.tif")
    np.testing.assert_array_equal(stack.sections, section[None])
    assert stack.names == ["one"]


def test_separate_pages_are_sections(tmp_path):
    sections = gray()
    pages(tmp_path / "stack.tif", sections, byteorder=">", bigtiff=True)
    np.testing.assert_array_equal(read_stack(tmp_path / "stack.tif").sections, sections)


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_white_is_zero_reads_as_it_looks(tmp_path, dtype):
    sections = gray(dtype=dtype)
    tifffile.imwrite(tmp_path / "stack.tif", sections, photometric="miniswhite")
    stack = read_stack(tmp_path / "stack.tif")
    np.testing.assert_array_equal(stack.sections, ~sections)
    assert "0 = white" in stack.description


def test_description_names_axes_and_encoding(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", gray(), byteorder=">", bigtiff=True, tile=(16, 16), compression="lzw")
    words = read_stack(tmp_path / "a.tif").description
    assert all(word in words for word in ("axes QYX", "BigTIFF", "lzw", "tiled", "big-endian"))


# --- Folders ------------------------------------------------------------------------------------------------


def test_folder_is_read_in_natural_order(tmp_path):
    sections = gray((12, 8, 9))
    for i, section in enumerate(sections):
        if i % 2:
            Image.fromarray(section).save(tmp_path / f"s{i}.png")
        else:
            tifffile.imwrite(tmp_path / f"s{i}.TIF", section)
    (tmp_path / "notes.txt").write_text("not a section")
    (tmp_path / "._s3.png").write_bytes(b"left by a Mac")
    stack = read_stack(tmp_path)
    assert stack.names == [f"s{i}" for i in range(12)]
    np.testing.assert_array_equal(stack.sections, sections)


def test_folder_of_one_stack_is_that_stack(tmp_path):
    tifffile.imwrite(tmp_path / "only.tif", gray())
    assert read_stack(tmp_path).sections.shape == (6, 40, 36)


def test_png_of_16_bit_1_bit_and_gray_palette(tmp_path):
    deep = gray((1, 12, 10), "uint16")[0]
    Image.fromarray(deep).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(read_stack(tmp_path / "deep.png").sections[0], deep)
    bits = gray((1, 12, 10), "bool")[0]
    Image.fromarray(bits).save(tmp_path / "bits.png")
    np.testing.assert_array_equal(read_stack(tmp_path / "bits.png").sections[0], bits)
    turned = Image.fromarray(np.arange(0, 256, 2, dtype=np.uint8).reshape(8, 16))
    turned = turned.convert("P")
    turned.putpalette([255 - level for level in range(256) for _ in range(3)])
    turned.save(tmp_path / "palette.png")
    np.testing.assert_array_equal(read_stack(tmp_path / "palette.png").sections.ravel(), np.arange(255, 0, -2))


NO_STACKS = {
    "holds no .tif, .tiff, .png": {},
    "3.tif holds 3 sections": {"1.tif": gray((8, 8)), "3.tif": gray((3, 8, 8))},
    "b.tif is 9 x 8 uint8, the first": {"a.tif": gray((8, 8)), "b.tif": gray((9, 8))},
    "all must be alike": {"a.tif": gray((8, 8)), "b.tif": gray((8, 8), "uint16")},
    "two files of the same name: 7": {"7.png": gray((8, 8)), "7.tif": gray((8, 8))},
}


@pytest.mark.parametrize("words", NO_STACKS)
def test_folder_that_is_no_stack_is_refused(tmp_path, words):
    for name, pixels in NO_STACKS[words].items():
        if name.endswith("png"):
            Image.fromarray(pixels).save(tmp_path / name)
        else:
            tifffile.imwrite(tmp_path / name, pixels, metadata=None, photometric="minisblack")
    refused(tmp_path, words)


@given(st.lists(st.integers(0, 10**6), unique=True), st.text(max_size=3))
def test_natural_order_is_numerical_order(numbers, prefix):
    names = [f"{prefix}{number}" for number in numbers]
    if prefix[-1:].isdecimal():
        return
    assert sorted(names, key=natural_key) == [f"{prefix}{number}" for number in sorted(numbers)]


@given(st.lists(st.text("aB0٣19._", max_size=6)))
def test_natural_order_never_compares_words_with_numbers(names):
    ordered = sorted(names, key=natural_key)
    backwards = ordered[::-1]
    assert sorted(backwards, key=natural_key) == ordered


# --- Bad input ----------------------------------------------------------------------------------------------


def refused(path, words, what="image"):
    with pytest.raises(DataError, match=words) as caught:
        read_stack(path, what=what)
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


def test_missing_empty_and_foreign_files_are_named(tmp_path):
    assert str(tmp_path / "no.tif") in refused(tmp_path / "no.tif", "--image_path.*does not exist")
    (tmp_path / "empty.tif").touch()
    refused(tmp_path / "empty.tif", "--mask_path.*empty.tif is empty", "mask")
    (tmp_path / "text.tif").write_text("hello, this is no image at all")
    refused(tmp_path / "text.tif", "is not a TIFF file")
    (tmp_path / "text.png").write_text("hello, this is no image at all")
    refused(tmp_path / "text.png", "no readable PNG")


@pytest.mark.parametrize("kept", [0.1, 0.4, 0.7, 0.97, 0.999])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_cut_off_tiff_is_refused_or_whole_and_never_a_shorter_stack(tmp_path, encoding, kept):
    whole = io.BytesIO()
    tifffile.imwrite(whole, gray(), photometric="minisblack", **ENCODINGS[encoding])
    content = whole.getvalue()
    (tmp_path / "cut.tif").write_bytes(content[: int(len(content) * kept)])
    if kept < 0.97:
        refused(tmp_path / "cut.tif", "cut off|not a TIFF")
        return
    with contextlib.suppress(DataError):  # where only words at the very end are gone, all pixels are read
        np.testing.assert_array_equal(read_stack(tmp_path / "cut.tif").sections, gray())


def test_cut_off_imagej_stack_with_a_single_header_is_refused(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", gray(), imagej=True, metadata={"axes": "ZYX"}, truncate=True)
    np.testing.assert_array_equal(read_stack(tmp_path / "a.tif").sections, gray())
    content = (tmp_path / "a.tif").read_bytes()
    (tmp_path / "a.tif").write_bytes(content[: len(content) // 2])
    refused(tmp_path / "a.tif", "cut off")


def test_cut_off_pages_and_png_are_refused(tmp_path):
    pages(tmp_path / "pages.tif", gray())
    Image.fromarray(gray()[0]).save(tmp_path / "one.png")
    for name in ("pages.tif", "one.png"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
        refused(tmp_path / name, "cut off")


def test_file_that_ends_in_its_last_section_is_refused_before_the_first_is_read(tmp_path):
    pages(tmp_path / "pages.tif", gray())
    content = (tmp_path / "pages.tif").read_bytes()
    (tmp_path / "pages.tif").write_bytes(content[:-9])
    with pytest.raises(DataError, match="it ends before its last section does"):
        iter_sections(tmp_path / "pages.tif")


def test_damaged_section_is_named(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", gray(), compression="zlib", metadata=None)
    with tifffile.TiffFile(tmp_path / "a.tif") as tif:
        start, length = tif.pages[3].dataoffsets[0], tif.pages[3].databytecounts[0]
    content = bytearray((tmp_path / "a.tif").read_bytes())
    content[start : start + length] = bytes(length)
    (tmp_path / "a.tif").write_bytes(content)
    refused(tmp_path / "a.tif", r"section 3 \(a\[3\]\) is damaged")


@pytest.mark.parametrize("options", [{}, {"imagej": True}, {"compression": "lzw"}, {"planarconfig": "separate"}])
def test_rgb_tiff_is_refused(tmp_path, options):
    shape = (3, 20, 20) if "planarconfig" in options else (4, 20, 20, 3)
    tifffile.imwrite(tmp_path / "rgb.tif", gray(shape), photometric="rgb", **options)
    refused(tmp_path / "rgb.tif", r"colour image \(3 channels\)")


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P"])
def test_colour_png_is_refused(tmp_path, mode):
    Image.fromarray(gray((8, 8, 3))).convert(mode).save(tmp_path / "colour.png")
    refused(tmp_path / "colour.png", "colour image")


def test_what_is_not_one_stack_is_refused(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", gray((4, 3, 8, 8)), imagej=True, metadata={"axes": "TZYX"})
    refused(tmp_path / "a.tif", "axes TZYX")
    axes = {"imagej": True, "metadata": {"axes": "CYX"}, "photometric": "minisblack"}
    tifffile.imwrite(tmp_path / "b.tif", gray((3, 8, 8)), **axes)
    refused(tmp_path / "b.tif", "3 channels")
    pages(tmp_path / "c.tif", [gray((8, 8)), gray((9, 8))])
    refused(tmp_path / "c.tif", r"2 separate images \(8 x 8, 9 x 8\)")
    tifffile.imwrite(tmp_path / "d.tif", np.zeros((4, 8, 8), np.complex64), photometric="minisblack")
    refused(tmp_path / "d.tif", "complex64")


def test_nan_and_infinity_are_refused_with_the_section(tmp_path):
    sections = gray(dtype="float32")
    sections[4, 1, 2], sections[4, 0, 0] = np.nan, np.inf
    tifffile.imwrite(tmp_path / "a.tif", sections)
    refused(tmp_path / "a.tif", r"section 4 \(a\[4\]\) holds 2 NaN or infinite")


def test_stack_of_wrong_shape_is_refused():
    with pytest.raises(DataError, match=r"must have shape \(S, H, W\). Received: \(5, 5\)"):
        read_stack(Stack(np.zeros((5, 5)), source="mine"))


# --- One section at a time ----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"imagej": True, "metadata": {"axes": "ZYX"}}, {"compression": "lzw"}])
def test_reader_gives_sections_in_any_order(tmp_path, options):
    sections = gray()
    tifffile.imwrite(tmp_path / "a.tif", sections, **options)
    with iter_sections(tmp_path / "a.tif") as reader:
        assert (len(reader), reader.shape, reader.dtype) == (6, (6, 40, 36), np.uint8)
        for i in (5, 0, -1, 3):
            np.testing.assert_array_equal(reader[i], sections[i])
        np.testing.assert_array_equal(list(reader), sections)
        with pytest.raises(IndexError):
            reader[6]


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_reading_holds_one_section_in_memory(tmp_path, compression):
    sections = gray((40, 256, 256))
    tifffile.imwrite(tmp_path / "a.tif", sections, compression=compression, metadata=None)
    read_stack(tmp_path / "a.tif")  # imports
    tracemalloc.start()
    with iter_sections(tmp_path / "a.tif") as reader:
        total = sum(int(section.sum()) for section in reader)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == sections.sum()
    assert peak < 8 * sections[0].nbytes


# --- Voxel size ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {"imagej": True, "resolution": (250, 125), "metadata": {"axes": "ZYX", "spacing": 0.05, "unit": "um"}},
            (50, 8, 4),
        ),
        (
            {"imagej": True, "resolution": (0.25, 0.25), "metadata": {"axes": "ZYX", "spacing": 50, "unit": "nm"}},
            (50, 4, 4),
        ),
        ({"imagej": True, "resolution": (250, 250), "metadata": {"axes": "ZYX", "unit": "micron"}}, (None, 4, 4)),
        ({"imagej": True, "resolution": (250, 250), "metadata": {"axes": "ZYX", "unit": "\\u00B5m"}}, (None, 4, 4)),
        ({"imagej": True, "metadata": {"axes": "ZYX"}}, None),
        ({"imagej": True, "resolution": (2, 2), "metadata": {"axes": "ZYX", "unit": "pixel"}}, None),
        ({"resolution": (2.5e6, 2.5e6), "resolutionunit": "CENTIMETER"}, (None, 4, 4)),
        ({"resolution": (6.35e6, 6.35e6), "resolutionunit": "INCH"}, (None, 4, 4)),
        ({"resolution": (72, 72), "resolutionunit": "INCH"}, None),
        ({"resolution": (300, 300), "resolutionunit": "INCH"}, None),
        ({}, None),
        ({"ome": True, "metadata": {"axes": "ZYX"}}, None),
        (
            {
                "ome": True,
                "metadata": {
                    "axes": "ZYX",
                    "PhysicalSizeX": 0.004,
                    "PhysicalSizeY": 8,
                    "PhysicalSizeYUnit": "nm",
                    "PhysicalSizeZ": 0.05,
                },
            },
            (50, 8, 4),
        ),
    ],
)
def test_voxel_size_is_read_in_nm(tmp_path, options, expected):
    tifffile.imwrite(tmp_path / "a.tif", gray(), **options)
    found = read_stack(tmp_path / "a.tif").voxel_nm
    assert found == (expected and tuple(nm and pytest.approx(nm, rel=1e-4) for nm in expected))


def test_voxel_words():
    assert sections.voxel_words(None) == "voxel size unknown"
    assert sections.voxel_words((None, 189.999, 189.999)) == "pixel 190 x 190 nm, section thickness unknown"


# --- Writing ------------------------------------------------------------------------------------------------


def test_prediction_is_float32_imagej_zyx_with_voxel_size(tmp_path):
    sections = gray((3, 20, 30), "float64")
    write_prediction(tmp_path / "new" / "p.tif", iter(sections), count=3, shape=(20, 30), voxel_nm=VOXEL)
    with tifffile.TiffFile(tmp_path / "new" / "p.tif") as tif:
        assert (tif.series[0].axes, tif.series[0].dtype, tif.is_imagej) == ("ZYX", np.float32, True)
        about, page = tif.imagej_metadata, tif.pages[0]
        assert (about["slices"], about["spacing"], about["unit"]) == (3, 0.05, "um")
        assert page.tags["XResolution"].value == page.tags["YResolution"].value == (250, 1)
        np.testing.assert_array_equal(tif.asarray(), sections.astype(np.float32))
    assert read_stack(tmp_path / "new" / "p.tif").voxel_nm == VOXEL
    assert os.listdir(tmp_path / "new") == ["p.tif"]


@pytest.mark.parametrize("voxel_nm", [None, (None, 8.0, 4.0), (30.0, 8.0, 4.0)])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32"])
@pytest.mark.parametrize("count", [1, 4])
def test_masks_and_voxel_sizes_come_back(tmp_path, count, dtype, voxel_nm):
    labels = gray((count, 11, 13), "bool" if dtype == "uint8" else dtype)
    where = {"count": count, "shape": (11, 13), "voxel_nm": voxel_nm, "dtype": dtype}
    write_mask(tmp_path / "m.tif", iter(labels), **where)
    stack = read_stack(tmp_path / "m.tif")
    np.testing.assert_array_equal(stack.sections, labels * 255 if dtype == "uint8" else labels)
    assert (stack.sections.dtype, stack.voxel_nm) == (np.dtype(dtype), voxel_nm)


def test_mask_of_0_1_and_of_0_255_are_written_alike(tmp_path):
    mask = gray((2, 9, 9), "bool").astype(np.uint8)
    for name, values in (("a.tif", mask), ("b.tif", mask * np.uint8(255))):
        write_mask(tmp_path / name, values, count=2, shape=(9, 9))
    assert (tmp_path / "a.tif").read_bytes() == (tmp_path / "b.tif").read_bytes()
    with pytest.raises(DataError, match="section 1 must hold 0 and 1, or 0 and 255"):
        write_mask(tmp_path / "c.tif", [mask[0], mask[1] + 1], count=2, shape=(9, 9))
    with pytest.raises(DataError, match="labels of type uint16"):
        write_mask(tmp_path / "c.tif", [np.full((9, 9), 70_000)], count=1, shape=(9, 9), dtype="uint16")


def test_beyond_4_gb_a_bigtiff_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "CLASSIC_TIFF_BYTES", 1000)
    sections = gray((3, 20, 30), "float32")
    write_prediction(tmp_path / "p.tif", sections, count=3, shape=(20, 30), voxel_nm=VOXEL)
    stack = read_stack(tmp_path / "p.tif")
    assert "axes ZYX, OME BigTIFF" in stack.description
    assert stack.voxel_nm == VOXEL
    np.testing.assert_array_equal(stack.sections, sections)


def test_probabilities_are_clipped_and_nan_is_refused(tmp_path):
    write_prediction(tmp_path / "p.tif", [np.array([[-0.1, 1.0000001]])], count=1, shape=(1, 2))
    assert read_stack(tmp_path / "p.tif").sections.tolist() == [[[0.0, 1.0]]]
    with pytest.raises(DataError, match="section 1 is not finite"):
        write_prediction(tmp_path / "q.tif", [np.zeros((1, 2)), np.array([[0, np.nan]])], count=2, shape=(1, 2))
    assert os.listdir(tmp_path) == ["p.tif"]


def test_writing_lets_go_of_each_section(tmp_path):
    given_out, alive = [], []

    def predictions():
        for _ in range(60):
            section = np.full((64, 64), 0.5, np.float32)
            given_out.append(weakref.ref(section))
            alive.append(sum(ref() is not None for ref in given_out))
            yield section

    write_prediction(tmp_path / "p.tif", predictions(), count=60, shape=(64, 64))
    assert len(alive) == 60
    assert max(alive) <= 3


@pytest.mark.parametrize("write", [write_prediction, write_mask])
def test_memory_does_not_grow_with_the_number_of_sections(tmp_path, write):
    def peak(count):
        tracemalloc.start()
        sections = (np.full((128, 128), i % 2, np.float32) for i in range(count))
        write(tmp_path / f"{count}.tif", sections, count=count, shape=(128, 128))
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(2)  # imports
    assert peak(80) < peak(10) + 3 * 128 * 128 * 4


@pytest.mark.parametrize(
    ("given_sections", "words"),
    [
        ([np.zeros((4, 4))], "2 sections were announced, and 1 came"),
        ([np.zeros((4, 4))] * 3, "2 sections were announced, and more came"),
        ([np.zeros((4, 4)), np.zeros((4, 5))], "section 1 must be 4 x 4 px. Received: 4 x 5"),
    ],
)
def test_wrong_sections_leave_the_old_file(tmp_path, given_sections, words):
    (tmp_path / "p.tif").write_text("old")
    with pytest.raises(DataError, match=words):
        write_prediction(tmp_path / "p.tif", given_sections, count=2, shape=(4, 4), force=True)
    assert (tmp_path / "p.tif").read_text() == "old"
    assert os.listdir(tmp_path) == ["p.tif"]


def test_existing_file_needs_force_and_nothing_is_computed_first(tmp_path):
    (tmp_path / "p.tif").write_text("old")
    with pytest.raises(DataError, match=r"p.tif exists already \(--force replaces it\)"):
        write_prediction(tmp_path / "p.tif", (1 / 0 for _ in range(1)), count=1, shape=(4, 4))
    with pytest.raises(DataError, match="is a folder"):
        write_prediction(tmp_path, [np.zeros((4, 4))], count=1, shape=(4, 4), force=True)
    write_prediction(tmp_path / "p.tif", [np.zeros((4, 4))], count=1, shape=(4, 4), force=True)
    assert read_stack(tmp_path / "p.tif").sections.shape == (1, 4, 4)


def test_unwritable_folder_is_refused_in_words(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(DataError, match="could not be written"):
        write_prediction(tmp_path / "file" / "p.tif", [np.zeros((4, 4))], count=1, shape=(4, 4))


def test_interrupt_leaves_the_old_file_alone(tmp_path):
    def interrupted():
        yield np.zeros((4, 4))
        raise KeyboardInterrupt

    (tmp_path / "p.tif").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        write_prediction(tmp_path / "p.tif", interrupted(), count=2, shape=(4, 4), force=True)
    assert (tmp_path / "p.tif").read_text() == "old"
    assert os.listdir(tmp_path) == ["p.tif"]


FULL_DISK = """
import json, resource, sys
import numpy as np
from files.atomic import DataError
from files.writing import write_prediction
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    write_prediction(sys.argv[1], np.zeros((30, 64, 64)), count=30, shape=(64, 64), force=True)
except DataError as error:
    print(json.dumps(str(error)))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are POSIX")
def test_disk_that_fills_up_leaves_the_old_file_and_no_partial_one(tmp_path):
    (tmp_path / "p.tif").write_text("old")
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "p.tif")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "p.tif could not be written: " in json.loads(done.stdout)
    assert (tmp_path / "p.tif").read_text() == "old"
    assert os.listdir(tmp_path) == ["p.tif"]


def test_hash_is_of_the_pixels_in_c_order_little_endian():
    # printf '\x01\x00\x02\x00\x03\x00\x04\x00' | sha256sum
    expected = "ea99f710d9d0b8ba192295c969a63ed7ce8fc5743da20d2057fa2b6d2c404bfb"
    array = np.array([[1, 2], [3, 4]], "<u2")
    found = {sha256_pixels(a) for a in (array, array.astype(">u2"), np.asfortranarray(array))}
    assert len(found) == 1
    assert found == {expected}
