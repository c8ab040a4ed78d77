"""Files of sections, in and out."""

import contextlib
import io
import os
import resource
import struct
import tracemalloc
import zlib
from itertools import product

import numpy as np
import pytest
import tifffile
from conftest import cases
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data import iter_sections, read_stack
from files import sections as sections_module
from files import writing
from files.atomic import DataError
from files.sections import Stack, natural_key
from files.stacks import sha256_pixels
from files.writing import write_mask, write_prediction

VOXEL = (50.0, 4.0, 4.0)
COLOURS = np.array([np.arange(256), np.zeros(256), np.arange(256)]).astype(np.uint16) * 257


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


PARTS = [np.s_[0:40, 0:36], np.s_[3:4, 0:36], np.s_[15:33, 17:36], np.s_[0:1, 35:36]]
TYPES, OTHER_TYPES = ["uint8", "uint16", "float32", "bool"], ["int8", "int16", "int32", "uint32", "float16", "float64"]
TYPES = [*product(ENCODINGS, TYPES), *product(("plain", "big-endian lzw"), OTHER_TYPES)]


@pytest.mark.parametrize(("encoding", "dtype"), TYPES)
def test_every_encoding_gives_the_same_pixels_in_any_order_and_in_parts(tmp_path, encoding, dtype):
    sections, options = gray(dtype=dtype), ENCODINGS[encoding]
    if dtype == "bool" and {"imagej", "predictor"} & {*options}:
        pages(tmp_path / "a.tif", sections)  # neither knows such a type
    else:
        tifffile.imwrite(tmp_path / "a.tif", sections, photometric="minisblack", **options)
    stack = read_stack(tmp_path / "a.tif")
    np.testing.assert_array_equal(stack.sections, sections)
    assert (stack.dtype, stack.dtype.isnative, len(stack.names)) == (np.dtype(dtype), True, 6)
    with iter_sections(tmp_path / "a.tif") as reader:
        assert (len(reader), reader.shape, reader.dtype) == (6, (6, 40, 36), np.dtype(dtype))
        for i in (5, 0, -1):
            np.testing.assert_array_equal(reader[i], sections[i])
        for rows, columns in PARTS:
            np.testing.assert_array_equal(reader.part(4, rows, columns), sections[4, rows, columns])
            np.testing.assert_array_equal(reader.slab(slice(2, 4), rows, columns), sections[2:4, rows, columns])


@pytest.mark.parametrize("nodata", [0, 7])
def test_a_tile_of_which_nothing_is_stored_has_the_value_for_no_data_whole_and_in_parts(tmp_path, nodata):
    sections, tag = gray(), (42113, "s", 0, str(nodata), True)  # GDAL_NODATA
    options = {"tile": (16, 16), "compression": "zlib", "extratags": [tag], "metadata": None}
    tifffile.imwrite(tmp_path / "a.tif", sections, photometric="minisblack", **options)
    content = bytearray((tmp_path / "a.tif").read_bytes())
    with tifffile.TiffFile(tmp_path / "a.tif") as tif:
        for name in ("TileOffsets", "TileByteCounts"):
            tag = tif.pages[0].tags[name]
            step = tag.valuebytecount // tag.count
            content[tag.valueoffset + step : tag.valueoffset + 2 * step] = bytes(step)
    (tmp_path / "a.tif").write_bytes(content)
    sections[0, :16, 16:32] = nodata
    np.testing.assert_array_equal(read_stack(tmp_path / "a.tif").sections, sections)
    with iter_sections(tmp_path / "a.tif") as reader:
        for rows, columns in PARTS:
            np.testing.assert_array_equal(reader.part(0, rows, columns), sections[0, rows, columns])


@pytest.mark.parametrize("options", [{}, {"imagej": True}, {"ome": True}, {"compression": "lzw"}])
def test_a_single_section_is_a_stack_of_one(tmp_path, options):
    section = gray((1, 33, 21))[0]
    tifffile.imwrite(tmp_path / "one.tif", section, **options)
    for path in (tmp_path / "one.tif", tmp_path):
        stack = read_stack(path)
        np.testing.assert_array_equal(stack.sections, section[None])
        assert stack.names == ["one"]


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_white_is_zero_and_palettes_of_grays_read_as_they_look_but_not_numbers_of_cells(tmp_path, dtype):
    sections = gray(dtype=dtype)
    tifffile.imwrite(tmp_path / "white.tif", sections, photometric="miniswhite")
    np.testing.assert_array_equal(read_stack(tmp_path / "white.tif").sections, ~sections)
    for software, turned in ((None, False), ("other", True)):  # tifffile says so of every bool array
        tifffile.imwrite(tmp_path / "bits.tif", sections > 99, photometric="miniswhite", software=software)
        np.testing.assert_array_equal(read_stack(tmp_path / "bits.tif").sections, (sections > 99) ^ turned)
    palette = np.repeat(np.arange(255, -1, -1)[None], 3, 0).astype(np.uint16) * 257
    for kind in ({}, {"ome": True, "metadata": {"axes": "ZYX"}}, {"imagej": True, "metadata": {"axes": "ZYX"}}):
        tifffile.imwrite(tmp_path / "grays.tif", gray(), photometric="palette", colormap=palette, **kind)
        np.testing.assert_array_equal(read_stack(tmp_path / "grays.tif").sections, ~gray())
    tifffile.imwrite(tmp_path / "grays.tif", gray(), photometric="palette", colormap=palette >> 8)  # of 8 bits
    np.testing.assert_array_equal(read_stack(tmp_path / "grays.tif").sections, ~gray())
    for options in ({"photometric": "palette", "colormap": COLOURS}, {"photometric": "miniswhite"}):
        tifffile.imwrite(tmp_path / "cells.tif", gray(), **options)
        with iter_sections(tmp_path / "cells.tif", what="mask", ids=True) as reader:
            np.testing.assert_array_equal(list(reader), gray())


def test_description_names_axes_and_encoding_and_the_hash_is_of_the_pixels_in_c_order_little_endian(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", gray(), byteorder=">", bigtiff=True, tile=(16, 16), compression="lzw")
    words = read_stack(tmp_path / "a.tif").description
    assert all(word in words for word in ("axes QYX", "BigTIFF", "lzw", "tiled", "big-endian"))
    expected = "ea99f710d9d0b8ba192295c969a63ed7ce8fc5743da20d2057fa2b6d2c404bfb"
    array = np.array([[1, 2], [3, 4]], "<u2")
    found = {sha256_pixels(a) for a in (array, array.astype(">u2"), np.asfortranarray(array))}
    assert (len(found), found) == (1, {expected})


@pytest.mark.parametrize("dtype", ["int32", "uint64"])
def test_numbers_of_three_sections_saved_as_planes_of_one_picture_are_sections(tmp_path, dtype):
    """As napari saves labels, those that it made of floats with 64 bits."""
    labels = gray((3, 12, 10)).astype(dtype)
    tifffile.imwrite(tmp_path / "a.tif", labels, photometric="rgb", planarconfig="separate")
    np.testing.assert_array_equal(read_stack(tmp_path / "a.tif", what="mask").sections, labels)


def test_files_that_ome_metadata_joins_are_read_by_the_name_of_one_and_as_a_folder_refused(tmp_path, recwarn):
    sections, size = gray((3, 12, 10)), 'SizeX="10" SizeY="12" SizeZ="3" SizeC="1" SizeT="1"'
    parts = (f'<TiffData FirstZ="{i}"><UUID FileName="s{i}.ome.tif">urn:uuid:{i}</UUID></TiffData>' for i in range(3))
    pixels = f'<Pixels ID="P:0" DimensionOrder="XYZCT" Type="uint8" {size}>{"".join(parts)}</Pixels>'
    for i, section in enumerate(sections):
        head = f'<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="urn:uuid:{i}">'
        about = f'<?xml version="1.0"?>{head}<Image ID="Image:0">{pixels}</Image></OME>'
        tifffile.imwrite(tmp_path / f"s{i}.ome.tif", section, description=about, metadata=None)
    np.testing.assert_array_equal(read_stack(tmp_path / "s1.ome.tif").sections, sections)
    refused(tmp_path, "files that OME metadata joins are read by the name of one of them")
    assert not [one for one in recwarn if "closed file" in str(one.message)]


@pytest.mark.parametrize(("bits", "most"), [(2, 3), (4, 15)])
def test_labels_in_a_png_of_few_bits_are_what_is_stored(tmp_path, bits, most):
    rows = np.random.default_rng(0).integers(0, most + 1, (6, 8))
    packed = [sum(int(v) << bits * (len(rows[0]) - 1 - i) for i, v in enumerate(row)) for row in rows]
    lines = b"".join(b"\0" + line.to_bytes(bits, "big") for line in packed)
    header = struct.pack(">IIBBBBB", 8, 6, bits, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
    parts = (struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in chunks)
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    with iter_sections(tmp_path / "a.png", what="mask", ids=True) as reader:
        np.testing.assert_array_equal(reader[0], rows)
    np.testing.assert_array_equal(read_stack(tmp_path / "a.png").sections[0], rows * (255 // most))


def test_a_mask_in_a_png_of_one_bit_is_bool(tmp_path):
    mask = gray((1, 12, 10), "bool")[0]
    Image.fromarray(mask).save(tmp_path / "a.png")
    found = read_stack(tmp_path / "a.png", what="mask")
    assert found.sections.dtype == bool
    np.testing.assert_array_equal(found.sections[0], mask)


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


@pytest.mark.parametrize("end", ["", "_mask", " (labels)", "-2"])
def test_images_and_masks_of_a_folder_have_one_order_whatever_their_names_end_with(tmp_path, end):
    names = ["scan", "scan2", "scan2b", "scan10", "scan-3"]
    for name in names:
        Image.fromarray(gray((5, 7))).save(tmp_path / f"{name}{end}.png")
    assert read_stack(tmp_path).names == [name + end for name in names]


def test_a_palette_for_each_section_is_refused_and_a_kind_that_is_not_read_is_not_called_damaged(tmp_path):
    from PIL import Image

    pages = [Image.fromarray(gray()[0]).convert("P") for _ in range(2)]
    for page, levels in zip(pages, (range(256), range(255, -1, -1)), strict=True):
        page.putpalette([level for level in levels for _ in range(3)])
    pages[0].save(tmp_path / "two.tif", save_all=True, append_images=pages[1:])
    refused(tmp_path / "two.tif", "a palette of its own for each section")
    Image.fromarray(gray()[0]).save(tmp_path / "a.jpg")
    refused(tmp_path / "a.jpg", "files of that kind are not read")


def test_png_of_16_bit_1_bit_and_gray_palette(tmp_path):
    turned = Image.fromarray(np.arange(128, dtype=np.uint8).reshape(8, 16)).convert("P")
    turned.putpalette([255 - level for level in range(256) for _ in range(3)])
    turned.save(tmp_path / "palette.png")
    np.testing.assert_array_equal(read_stack(tmp_path / "palette.png").sections.ravel(), np.arange(255, 127, -1))
    for dtype in ("uint16", "bool"):
        section = gray((1, 12, 10), dtype)[0]
        Image.fromarray(section).save(tmp_path / "a.png")
        np.testing.assert_array_equal(read_stack(tmp_path / "a.png").sections[0], section)


NO_STACKS = {
    "holds no .tif, .tiff, .png": {},
    "3.tif holds 3 sections of 8 x 8 px": {"1.tif": gray((8, 8)), "3.tif": gray((3, 8, 8))},
    "b.tif holds 1 section of 9 x 8 px, uint8; each": {"a.tif": gray((8, 8)), "b.tif": gray((9, 8))},
    "uint16; each file of its folder must hold one": {"a.tif": gray((8, 8)), "b.tif": gray((8, 8), "uint16")},
    "two files of the same name: 7": {"7.png": gray((8, 8)), "7.tif": gray((8, 8))},
    "holds 2 files of a kind that is not read: .bmp, .jpg; save them as TIFF or PNG": dict.fromkeys(
        ("1.jpg", "2.bmp", "overview.png"), gray((8, 8))
    ),
}


@pytest.mark.parametrize("words", NO_STACKS)
def test_folder_that_is_no_stack_is_refused(tmp_path, words):
    for name, pixels in NO_STACKS[words].items():
        if name.endswith("tif"):
            tifffile.imwrite(tmp_path / name, pixels, metadata=None, photometric="minisblack")
        else:
            Image.fromarray(pixels).save(tmp_path / name)
    refused(tmp_path, words)


@given(st.lists(st.integers(0, 10**6), unique=True), st.lists(st.text("aB0٣19._", max_size=6)))
def test_natural_order_is_numerical_order_and_never_compares_words_with_numbers(numbers, names):
    numbered = [f"a{number}" for number in numbers]
    assert sorted(numbered, key=natural_key) == [f"a{number}" for number in sorted(numbers)]
    ordered = sorted(names, key=natural_key)
    backwards = ordered[::-1]
    assert sorted(backwards, key=natural_key) == ordered


def refused(path, words, what="image"):
    with pytest.raises(DataError, match=words or None) as caught:
        read_stack(path, what=what)
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


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


def whole(content, _):
    return content


def cut(fraction):
    return lambda content, _: content[: int(len(content) * fraction)]


def with_tag(name, value, page=0):
    """Change the value of a tag of a page, where it stands in its entry."""

    def change(content, tif):
        tag = tif.pages[page].tags[name]
        content[tag.offset + 8 : tag.offset + 12] = value.to_bytes(4, "little")
        return content

    return change


def without_tag(name, page=0):
    def change(content, tif):
        offset = tif.pages[page].tags[name].offset
        content[offset : offset + 2] = (65_000).to_bytes(2, "little")
        return content

    return change


def words(old, new):
    return lambda content, _: content.replace(old, new)


def zeros_in_section_3(content, tif):
    start, length = tif.pages[3].dataoffsets[0], tif.pages[3].databytecounts[0]
    content[start : start + length] = bytes(length)
    return content


def no_page_after_section_3(content, tif):
    end = tif.pages[3].offset + tif.tiff.tagnosize + len(tif.pages[3].tags) * tif.tiff.tagsize
    content[end : end + 4] = bytes(4)
    return content


GRAY = {"photometric": "minisblack"}
PLAIN = {**GRAY, "metadata": None}
IMAGEJ = {**GRAY, "imagej": True, "metadata": {"axes": "ZYX"}}
WRONG_TAGS = [("ImageWidth", 0), ("ImageLength", 0), ("ImageWidth", 18), ("ImageWidth", 2**31), ("Compression", 65_432)]
WRONG_TAGS += [("BitsPerSample", bits) for bits in (16, 4, 77)]
NAN = gray(dtype="float32")
NAN[4, 1, 2], NAN[4, 0, 0] = np.nan, np.inf

BAD_TIFF = {  # pixels, how tifffile writes them, what happens to the file, words of the refusal
    "4 bytes": (gray(), GRAY, lambda *_: b"II*\0", "damaged|not a TIFF"),
    "8 bytes": (gray(), GRAY, lambda *_: b"II*\0\0\0\0\0", "damaged|not a TIFF"),
    "empty": (gray(), GRAY, lambda *_: b"", "not a TIFF"),
    "text": (gray(), GRAY, lambda *_: b"hello, this is no image at all", "not a TIFF"),
    "a PNG": (gray(), GRAY, lambda *_: b"\x89PNG\r\n\x1a\n" + bytes(99), "not a TIFF"),
    "ImageJ's single header, half": (gray(), IMAGEJ | {"truncate": True}, cut(0.5), "cut off"),
    "half of the pages": (gray(), PLAIN | {"rowsperstrip": 40}, cut(0.5), "cut off"),
    "the last bytes": (gray(), PLAIN, cut(0.995), "cut off"),
    "two pages that no other leads to": (gray(), PLAIN, no_page_after_section_3, "damaged"),
    "a damaged section": (gray(), PLAIN | {"compression": "zlib"}, zeros_in_section_3, r"section 3 \(a\[3\]\) is dam"),
    **{f"{tag} {value}": (gray(), PLAIN, with_tag(tag, value), "") for tag, value in WRONG_TAGS},
    **{f"no {tag}": (gray(), PLAIN, without_tag(tag), "") for tag in ("ImageWidth", "ImageLength", "StripOffsets")},
    "no lengths": (gray(), PLAIN | {"compression": "zlib"}, without_tag("StripByteCounts"), ""),
    "2^31 high": (gray(), PLAIN | {"compression": "zlib"}, with_tag("ImageLength", 2**31), ""),
    "a foreign photometric": (gray()[:1], PLAIN, with_tag("PhotometricInterpretation", 32_803), "CFA"),
    "ImageJ: 2 of 6": (gray(), IMAGEJ, words(b"images=6\nslices=6", b"images=2\nslices=2"), "6 pages"),
    "ImageJ: 9 of 6": (gray(), IMAGEJ, words(b"images=6\nslices=6", b"images=9\nslices=9"), ""),
    "ImageJ: no header any more": (gray(), IMAGEJ | {"truncate": True}, words(b"ImageJ=", b"imagej="), "damaged"),
    "OME: 2 of 6": (gray(), GRAY | {"ome": True}, words(b'SizeC="6"', b'SizeC="2"'), ""),
    "RGB": (gray((4, 20, 20, 3)), {"photometric": "rgb"}, whole, r"colour image \(3 channels\)"),
    "RGB, compressed": (gray((4, 20, 20, 3)), {"photometric": "rgb", "compression": "lzw"}, whole, "colour image"),
    "RGB, planes": (
        gray((3, 20, 20)),
        {"photometric": "rgb", "planarconfig": "separate"},
        whole,
        "3 sections that were saved as one",
    ),
    "a palette of colours": (gray(), {"photometric": "palette", "colormap": COLOURS}, whole, "palette of colours"),
    "four axes without names": (gray((3, 5, 16, 16)), GRAY, whole, "QQYX"),
    "four axes": (gray((4, 3, 8, 8)), GRAY | {"imagej": True, "metadata": {"axes": "TZYX"}}, whole, "axes TZYX"),
    "channels": (gray((3, 8, 8)), GRAY | {"imagej": True, "metadata": {"axes": "CYX"}}, whole, "3 channels"),
    "complex": (np.zeros((4, 8, 8), np.complex64), GRAY, whole, "complex64"),
    "NaN": (NAN, GRAY, whole, r"section 4 \(a\[4\]\) holds 2 NaN or infinite"),
}


@pytest.mark.parametrize("case", BAD_TIFF)
def test_a_tiff_that_is_no_gray_stack_or_is_damaged_is_refused(tmp_path, case):
    pixels, options, damage, said = BAD_TIFF[case]
    tifffile.imwrite(tmp_path / "a.tif", pixels, **options)
    with tifffile.TiffFile(tmp_path / "a.tif") as tif:
        tif.pages.useframes = False
        content = bytes(damage(bytearray((tmp_path / "a.tif").read_bytes()), tif))
    (tmp_path / "a.tif").write_bytes(content)
    refused(tmp_path / "a.tif", said)


def test_what_is_no_stack_in_memory_or_in_pages_is_refused(tmp_path):
    pages(tmp_path / "c.tif", [gray((8, 8)), gray((9, 8))])
    refused(tmp_path / "c.tif", r"2 separate images \(8 x 8, 9 x 8\)")
    with tifffile.TiffWriter(tmp_path / "c.tif") as writer:  # which describes each page as an image of its own
        for section in (gray((8, 8)), gray((9, 8))):
            writer.write(section)
    refused(tmp_path / "c.tif", r"2 separate images \(8 x 8, 9 x 8\)")
    refused(Stack(np.zeros((5, 5)), source="mine"), "mine holds no stack of sections: its shape is 5 x 5")


@pytest.mark.parametrize("kind", ["rgb", "palette"])
def test_labels_in_colours_are_not_sent_to_be_made_gray(tmp_path, kind):
    """Pure red, green and blue have the same gray in ImageJ."""
    how = {"photometric": kind} | ({"colormap": COLOURS} if kind == "palette" else {})
    tifffile.imwrite(tmp_path / "a.tif", gray((4, 20, 20, 3) if kind == "rgb" else (4, 20, 20)), **how)
    with pytest.raises(DataError, match="labels must be numbers: save each kind as a gray value of its own"):
        read_stack(tmp_path / "a.tif", what="mask")


@pytest.mark.parametrize("subifds", [False, True])
def test_smaller_copies_of_a_section_in_its_file_are_passed_over(tmp_path, subifds):
    section = gray((1, 64, 64))[0]
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        writer.write(section, tile=(16, 16), **GRAY, subifds=2 if subifds else 0)
        for step in (2, 4):
            writer.write(section[::step, ::step], tile=(16, 16), subfiletype=1, **GRAY)
    assert np.array_equal(read_stack(tmp_path / "a.tif").sections, section[None])


def wrong_bit(path):
    Image.fromarray(gray(dtype="uint16")[0]).save(path)
    content = bytearray(path.read_bytes())
    content[-200] ^= 1  # of the pixels
    path.write_bytes(content)


def film(path):
    frames = [Image.fromarray(section) for section in gray((3, 8, 8))]
    frames[0].save(path, save_all=True, append_images=frames[1:])


BAD_PNG = {
    "cannot be read": lambda path: path.write_text("hello, this is no image at all"),
    "cut off": lambda path: (Image.fromarray(gray()[0]).save(path), path.write_bytes(path.read_bytes()[:600])),
    "damaged": wrong_bit,
    "is a film of 3": film,
    "no .png file": lambda path: tifffile.imwrite(path, gray(), photometric="minisblack"),
    "colour image": lambda path: Image.fromarray(gray((8, 8, 3))).save(path),
    "colour image ": lambda path: Image.fromarray(gray((8, 8, 3))).convert("RGBA").save(path),
    r"colour image \(2": lambda path: Image.fromarray(gray((8, 8, 3))).convert("LA").save(path),
    r"colour image \(3": lambda path: Image.fromarray(gray((8, 8, 3))).convert("P").save(path),
}


@pytest.mark.parametrize("said", BAD_PNG)
def test_a_png_that_is_no_gray_section_is_refused(tmp_path, said):
    BAD_PNG[said](tmp_path / "a.png")
    refused(tmp_path / "a.png", said.strip())


@pytest.mark.parametrize("encoding", ["imagej", "plain", "lzw", "strips", "tiled", "big-endian", "bigtiff"])
def test_a_header_with_a_wrong_byte_gives_the_same_stack_or_a_refusal(tmp_path, encoding):
    """But for what only the header can say: how bits are read and shown, and where in the file they begin."""
    tifffile.imwrite(tmp_path / "a.tif", gray(), photometric="minisblack", **ENCODINGS[encoding])
    whole, rng = (tmp_path / "a.tif").read_bytes(), np.random.default_rng(0)
    with tifffile.TiffFile(tmp_path / "a.tif") as tif:
        parts = [range(o, o + n) for p in tif.pages for o, n in zip(p.dataoffsets, p.databytecounts, strict=True)]
    header = [i for i in range(len(whole)) if not any(i in part for part in parts)]
    for i in rng.choice(header, 60):
        content = bytearray(whole)
        content[i] ^= rng.integers(1, 256)
        (tmp_path / "a.tif").write_bytes(content)
        with contextlib.suppress(DataError):
            assert read_stack(tmp_path / "a.tif").shape == gray().shape


def test_paths_that_lead_nowhere_are_named(tmp_path, monkeypatch):
    (tmp_path / "link.tif").symlink_to("gone.tif")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "2.tif").symlink_to("gone.tif")
    tifffile.imwrite(tmp_path / "folder" / "1.tif", gray()[0])
    refused(tmp_path / "link.tif", "is a link to gone.tif, which does not exist")
    refused(tmp_path / "folder", "holds links to files that do not exist: 2.tif")
    monkeypatch.setattr(os, "scandir", lambda *_: raised(PermissionError(13, "Permission denied")))
    monkeypatch.setattr(os, "listdir", lambda *_: raised(PermissionError(13, "Permission denied")))
    refused(tmp_path / "folder", "cannot be read: Permission denied")
    for path in (tmp_path / "no.tif", "~nobody/x.tif", "", "a" * 300, "a\0b"):
        assert "--image_path" in refused(path, "does not exist")
    assert "data sets" not in refused("gone.tif", "does not exist", "prediction")


def raised(error):
    raise error


@pytest.mark.parametrize("options", [{}, {"compression": "zlib"}, {"tile": (64, 64), "compression": "lzw"}])
def test_no_more_is_held_in_memory_than_is_asked_for(tmp_path, options):
    sections = gray((4, 512, 2048))
    tifffile.imwrite(tmp_path / "a.tif", sections, photometric="minisblack", rowsperstrip=16, **options)
    read_stack(tmp_path / "a.tif")  # imports
    with iter_sections(tmp_path / "a.tif") as reader:
        section = peak(lambda: sum(int(section.sum()) for section in reader))
        part = peak(lambda: reader.part(2, slice(100, 132), slice(0, 2048)))
    assert section < 6 * sections[0].nbytes
    assert part < section / 3


def peak(work):
    tracemalloc.start()
    work()
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most


@pytest.mark.parametrize("suffix", ["tif", "png", "folder"])
def test_what_cannot_fit_into_memory_is_refused_before_it_is_taken(tmp_path, monkeypatch, suffix):
    sections = gray((3, 64, 50))
    path = tmp_path / f"a.{suffix}"
    if suffix == "tif":
        tifffile.imwrite(path, sections, photometric="minisblack")
    else:
        path.parent.joinpath("a.folder").mkdir()
        for i in range(3):
            Image.fromarray(sections[i]).save(path if suffix == "png" else path / f"{i}.png")
    monkeypatch.setattr(sections_module, "memory_limit", lambda: 3000)
    refused(path, "would take 0.0.* MB of memory, more than the 0.003 MB there is")
    monkeypatch.setattr(sections_module, "memory_limit", lambda: 9000)
    if suffix == "tif":
        with iter_sections(path) as reader:
            np.testing.assert_array_equal(reader[2], sections[2])  # one section fits


def imagej(resolution=None, **metadata):
    return {"imagej": True, "resolution": resolution, "metadata": {"axes": "ZYX", **metadata}}


OME_SIZES = {"PhysicalSizeX": 0.004, "PhysicalSizeY": 8, "PhysicalSizeYUnit": "nm", "PhysicalSizeZ": 0.05}


@cases(
    "options, expected",
    (imagej((250, 125), spacing=0.05, unit="um"), (50, 8, 4)),
    (imagej((0.25, 0.25), spacing=50, unit="nm"), (50, 4, 4)),
    (imagej((250, 250), unit="micron"), (None, 4, 4)),
    (imagej((250, 250), unit="\\u00B5m"), (None, 4, 4)),
    (imagej((250, 250), unit="\\u03BCm"), (None, 4, 4)),
    (imagej((0.025, 0.025), unit="\\u00C5", spacing=500), (50, 4, 4)),
    (imagej((0.25, 0.25), unit="nm", zunit="micron", spacing=0.05), (50, 4, 4)),
    (imagej(), None),
    (imagej((2, 2), unit="pixel"), None),
    ({"resolution": (2.5e6, 2.5e6), "resolutionunit": "CENTIMETER"}, (None, 4, 4)),
    ({"resolution": (6.35e6, 6.35e6), "resolutionunit": "INCH"}, (None, 4, 4)),
    ({"resolution": (72, 72), "resolutionunit": "INCH"}, None),
    ({"resolution": (300, 300), "resolutionunit": "INCH"}, None),
    (imagej((300, 300), unit="inch"), None),
    (imagej((6.35e6, 6.35e6), unit="inch"), (None, 4, 4)),
    (imagej((5, 5), unit="mm"), (None, 200_000, 200_000)),
    ({}, None),
    ({"ome": True, "metadata": {"axes": "ZYX"}}, None),
    ({"ome": True, "metadata": {"axes": "ZYX", **OME_SIZES}}, (50, 8, 4)),
)
def test_voxel_size_is_read_in_nm(tmp_path, options, expected):
    tifffile.imwrite(tmp_path / "a.tif", gray(), **options)
    found = read_stack(tmp_path / "a.tif").voxel_nm
    assert found == (expected and tuple(nm and pytest.approx(nm, rel=1e-4) for nm in expected))


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
    by_rows = (iter([section[:7], section[7:]]) for section in sections)
    write_prediction(tmp_path / "rows.tif", by_rows, count=3, shape=(20, 30), voxel_nm=VOXEL)
    assert (tmp_path / "rows.tif").read_bytes() == (tmp_path / "new" / "p.tif").read_bytes()


def test_napari_s_plugin_for_tiff_finds_the_voxel_size(tmp_path):
    reader = pytest.importorskip("napari_tiff.napari_tiff_reader", reason="napari-tiff is not installed")
    about = {"count": 2, "shape": (20, 30), "voxel_nm": (50, 8, 4)}
    write_prediction(tmp_path / "p.tif", iter(gray((2, 20, 30), "float32")), **about)
    write_mask(tmp_path / "labels.tif", iter(gray((2, 20, 30), "uint16")), dtype="uint16", **about)
    for name in ("p", "labels"):
        ((pixels, layer, kind),) = reader.reader_function(str(tmp_path / f"{name}.tif"))
        assert (pixels.shape, kind, layer["units"]) == ((2, 20, 30), "image", ("um",) * 3)
        assert layer["scale"] == pytest.approx((0.05, 0.008, 0.004))


@pytest.mark.parametrize("voxel_nm", [None, (None, 8.0, 4.0), (30.0, 8.0, 4.0)])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32"])
@pytest.mark.parametrize("count", [1, 4])
def test_masks_voxel_sizes_and_what_they_are_made_of_come_back(tmp_path, count, dtype, voxel_nm):
    labels = gray((count, 11, 13), "bool" if dtype == "uint8" else dtype)
    made_of = {"image_sha256": "0" * 64, "weights": "a.weights.h5"}
    about = {"count": count, "shape": (11, 13), "voxel_nm": voxel_nm, "made_of": made_of}
    write_mask(tmp_path / "m.tif", iter(labels), dtype=dtype, **about)
    stack = read_stack(tmp_path / "m.tif")
    np.testing.assert_array_equal(stack.sections, labels * 255 if dtype == "uint8" else labels)
    assert (stack.dtype, stack.voxel_nm, stack.made_of) == (np.dtype(dtype), voxel_nm, made_of)
    assert read_stack(stack).made_of == made_of
    with tifffile.TiffFile(tmp_path / "m.tif") as tif:  # what ImageJ reads of it
        assert tif.imagej_metadata.get("spacing") == (voxel_nm[0] and voxel_nm[0] / 1e3 if voxel_nm else None)
        assert (tif.imagej_metadata["images"], len(tif.series)) == (count, 1)
        per_um = {1: 1, 2: 1, 3: 1e-4}[int(tif.pages[0].tags["ResolutionUnit"].value)]
        across, down = (tif.pages[0].tags[f"{axis}Resolution"].value for axis in "XY")
    if voxel_nm:
        assert (1e3 * across[1] / across[0] / per_um, 1e3 * down[1] / down[0] / per_um) == pytest.approx((4, 8))


@pytest.mark.parametrize("count", [2, 5])
def test_pages_that_tifffile_wrote_one_by_one_are_sections(tmp_path, count):
    sections = gray((count, 12, 10))
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        for section in sections:
            writer.write(section)
    np.testing.assert_array_equal(read_stack(tmp_path / "a.tif").sections, sections)


def test_mask_of_0_1_and_of_0_255_are_written_alike(tmp_path):
    mask = gray((2, 9, 9), "bool").astype(np.uint8)
    for name, values in (("a.tif", mask), ("b.tif", mask * np.uint8(255))):
        write_mask(tmp_path / name, values, count=2, shape=(9, 9))
    assert (tmp_path / "a.tif").read_bytes() == (tmp_path / "b.tif").read_bytes()
    with pytest.raises(DataError, match="section 1 must hold 0 and 1, or 0 and 255"):
        write_mask(tmp_path / "c.tif", [mask[0], mask[1] + 1], count=2, shape=(9, 9))
    with pytest.raises(DataError, match="labels of type uint16"):
        write_mask(tmp_path / "c.tif", [np.full((9, 9), 70_000)], count=1, shape=(9, 9), dtype="uint16")


@pytest.mark.parametrize("write", [write_prediction, write_mask])
def test_memory_does_not_grow_with_the_number_of_sections(tmp_path, write):
    def written(count):
        sections = (np.full((128, 128), i % 2, np.float32) for i in range(count))
        return peak(lambda: write(tmp_path / f"{count}.tif", sections, count=count, shape=(128, 128)))

    written(2)  # imports
    assert written(80) < written(10) + 3 * 128 * 128 * 4


@cases(
    "make, error",
    (lambda: [np.zeros((4, 4))], ValueError),
    (lambda: [np.zeros((4, 4))] * 3, ValueError),
    (lambda: [np.zeros((4, 4)), np.zeros((4, 5))], ValueError),
    (lambda: [np.zeros((4, 4)), np.full((4, 4), np.nan)], DataError),
    (lambda: [np.zeros((4, 4)), iter([np.zeros((2, 4)), np.zeros((1, 4))])], ValueError),
    (lambda: [np.zeros((4, 4)), iter([np.zeros((2, 4)), np.full((2, 4), np.nan)])], DataError),
)
def test_wrong_sections_leave_the_old_file(tmp_path, make, error):
    (tmp_path / "p.tif").write_text("old")
    with pytest.raises(error):
        write_prediction(tmp_path / "p.tif", make(), count=2, shape=(4, 4), force=True)
    assert ((tmp_path / "p.tif").read_text(), os.listdir(tmp_path)) == ("old", ["p.tif"])


def test_an_existing_file_needs_force_before_anything_is_computed_and_4_gb_a_bigtiff(tmp_path, monkeypatch):
    (tmp_path / "p.tif").write_text("old")
    with pytest.raises(DataError, match=r"p.tif exists already \(--force replaces it\)"):
        write_prediction(tmp_path / "p.tif", (1 / 0 for _ in range(1)), count=1, shape=(4, 4))
    write_prediction(tmp_path / "p.tif", [np.array([[-0.1, 1.0000001]])], count=1, shape=(1, 2), force=True)
    assert read_stack(tmp_path / "p.tif").sections.tolist() == [[[0.0, 1.0]]]  # clipped
    monkeypatch.setattr(writing, "CLASSIC_TIFF_BYTES", 1000)
    sections = gray((3, 20, 30), "float32")
    write_prediction(tmp_path / "p.tif", sections, count=3, shape=(20, 30), voxel_nm=VOXEL, force=True)
    stack = read_stack(tmp_path / "p.tif")
    assert "axes ZYX, OME BigTIFF" in stack.description
    assert stack.voxel_nm == VOXEL
    np.testing.assert_array_equal(stack.sections, sections)


def test_a_folder_has_the_voxel_size_of_its_files(tmp_path):
    about = {"imagej": True, "resolution": (250, 125), "metadata": {"axes": "YX", "unit": "um"}}
    for i in range(2):
        tifffile.imwrite(tmp_path / f"{i}.tif", np.zeros((8, 9), np.uint8), **about)
    assert read_stack(tmp_path).voxel_nm == pytest.approx((None, 8, 4))


def test_the_memory_is_no_more_than_ulimit_says(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (10**6, -1))
    assert sections_module.memory_limit() == 10**6
