"""OME-Zarr images: read section by section or in parts, and whatever is wrong with one is a sentence."""

import json

import numpy as np
import pytest
from conftest import ome_zarr

from data import iter_sections, read_stack
from files import omezarr
from files.atomic import DataError
from files.writing import write_mask

zarr = pytest.importorskip("zarr", reason="the optional extra is not installed: pip install -r requirements-zarr.txt")

NM = (40.0, 4.0, 8.0)


def pixels(*shape, dtype=np.uint8):
    return np.random.default_rng(0).integers(0, 256, shape).astype(dtype)


@pytest.fixture
def image(tmp_path):
    """A function that writes an image; see `conftest.ome_zarr`."""
    return lambda *how, **more: ome_zarr(tmp_path / "image.ome.zarr", *how, **more)


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize("names", ["zyx", "tczyx", "cyx", "yx"])
@pytest.mark.parametrize("dtype", ["uint16", ">u2", "float32"])
def test_an_image_is_read_section_by_section_or_in_parts(image, version, names, dtype):
    sections = pixels(3 if "z" in names else 1, 30, 50, dtype=dtype)
    shape = (1,) * (len(names) - 3) + sections.shape if len(names) > 2 else sections.shape[1:]
    path = image(sections.reshape(shape), version, names, NM if "z" in names else NM[1:])
    with iter_sections(path) as reader:
        assert (len(reader), reader.shape) == (len(sections), sections.shape)
        assert reader[0].dtype == np.dtype(dtype).newbyteorder("=")
        assert reader.voxel_nm == (NM[0] if "z" in names else None, *NM[1:])
        np.testing.assert_array_equal(np.stack(list(reader)), sections)
        np.testing.assert_array_equal(reader.part(-1 % len(reader), slice(3, 29), slice(7, 50)), sections[-1, 3:29, 7:])
        np.testing.assert_array_equal(reader.slab(slice(0, 2), slice(0, 30), slice(4, 9)), sections[:2, :, 4:9])


@pytest.mark.parametrize("names", [("time", "c", "y", "x"), ("time", "c", "z", "y", "x"), ("channel", "z", "y", "x")])
def test_axes_may_be_called_by_longer_names(image, names):
    """Only their types are fixed by the specification."""
    sizes = {"time": 1, "channel": 1, "c": 2, "z": 3, "y": 30, "x": 50}
    stack, channel = pixels(*(sizes[name] for name in names)), 1 if "c" in names else None
    with iter_sections(image(stack, names=names), channel=channel) as reader:
        wanted = stack[0] if channel is None else stack[0, 1]
        np.testing.assert_array_equal(np.stack(list(reader)), wanted.reshape(-1, 30, 50))


def test_the_voxel_size_is_in_nanometres_and_that_of_level_0(image):
    more = {"coordinateTransformations": [{"type": "scale", "scale": [2.0, 1.0, 1.0]}]}  # of all levels
    path = image(pixels(2, 8, 8), scale=(0.03, 0.004, 0.005), unit="micrometer", **more)
    assert omezarr.open_zarr(path).voxel_nm == (60.0, 4.0, 5.0)


@pytest.mark.parametrize("unit", ["furlong", None, 7, ["nanometer"], {}])
@pytest.mark.parametrize("scale", [[1, 1, 1], "one", [None] * 3, [1e999, 1, 1], [[1], [1], [1]]])
def test_a_voxel_size_that_cannot_be_made_out_is_unknown(image, unit, scale):
    more = {"coordinateTransformations": [{"type": "scale", "scale": scale}]} if scale != "one" else {}
    path = image(pixels(2, 8, 8), unit=unit, coordinateTransformations=more)
    assert omezarr.open_zarr(path).voxel_nm is None


def axes(*names):
    return [{"name": name, "type": "space"} for name in names]


NO_IMAGES = {  # array, axes, other metadata
    "channels": (pixels(2, 3, 8, 8), "czyx", {}),
    "times": (pixels(3, 8, 8), "tyx", {}),
    "order": (pixels(3, 8, 8), "xyz", {}),
    "complex": (pixels(3, 8, 8, dtype="complex64"), "zyx", {}),
    "axes of version 0.3": (pixels(3, 8, 8), "zyx", {"axes": ["z", "y", "x"]}),
    "two axes of one name": (pixels(3, 8, 8), "zyx", {"axes": axes("y", "y", "x")}),
    "an axis too few": (pixels(3, 8, 8), "zyx", {"axes": axes("y", "x")}),
    "a name that is no word": (pixels(3, 8, 8), "zyx", {"axes": axes(1, "y", None)}),
    "names that are no words": (pixels(3, 8, 8), "zyx", {"axes": axes(1, ["y"], None)}),
    "axes of another type": (pixels(3, 8, 8), "zyx", {"axes": 7}),
    "no levels": (pixels(3, 8, 8), "zyx", {"datasets": []}),
    "levels of another type": (pixels(3, 8, 8), "zyx", {"datasets": {"path": "s0"}}),
    "a level that is not there": (pixels(3, 8, 8), "zyx", {"datasets": [{"path": "s7"}]}),
    "a level that is the image": (pixels(3, 8, 8), "zyx", {"datasets": [{"path": ""}]}),
    "a path that is no word": (pixels(3, 8, 8), "zyx", {"datasets": [{"path": 7}]}),
}


def refused(path, words=None):
    with pytest.raises(DataError, match=words) as caught:
        read_stack(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize("case", NO_IMAGES)
def test_what_is_no_image_of_one_gray_stack_is_refused(image, version, case):
    array, names, more = NO_IMAGES[case]
    refused(image(array, version, names, NM[: len(names)][-2:], **more), "--image_path: ")


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_a_folder_of_zarr_without_an_image_is_refused(tmp_path, zarr_format):
    zarr.create_group(str(tmp_path / "plain.zarr"), zarr_format=zarr_format)
    refused(tmp_path / "plain.zarr", "holds no stack of sections")


def changed(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


SHAPES = ["many", [10**5, 10**6, 10**6], [0, 30, 30], [2**40, 1, 1], [2**70, 1, 1], [-2, 30, 30]]
DAMAGED = [
    *({"shape": shape} for shape in SHAPES),
    *({"data_type": kind} for kind in ("uint9", ["uint8"])),
    *({"codecs": codecs} for codecs in ("none", [{"name": "nothing"}])),
    {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [10**6] * 3}}},
    *({"chunk_grid": 7}, {"zarr_format": 9}, {"node_type": "tree"}, {"fill_value": "x"}),
]


@pytest.mark.parametrize("values", DAMAGED, ids=str)
def test_an_array_whose_metadata_is_damaged_is_refused(image, values):
    path = image(pixels(2, 30, 30))
    changed(path / "s0" / "zarr.json", **values)
    refused(path)


@pytest.mark.parametrize("ome", [None, 7, [], "x", {"multiscales": 7}, {"multiscales": {}}, {"multiscales": [7]}])
def test_an_image_whose_metadata_is_damaged_is_refused(image, ome):
    path = image(pixels(2, 30, 30))
    changed(path / "zarr.json", attributes={"ome": ome})
    refused(path, "is no")
    (path / "zarr.json").write_text("[" * 10_000)
    refused(path, "is no array or OME-NGFF image")


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize("damage", [b"no chunk" * 9, b"", None])
def test_a_damaged_chunk_is_refused(image, version, damage):
    path = image(pixels(2, 30, 30), version, chunks=(1, 30, 30))
    chunk = path / "s0" / ("1.0.0" if version == "0.4" else "c/1/0/0")
    chunk.write_bytes(chunk.read_bytes()[:50] if damage is None else damage)
    reader = omezarr.open_zarr(path)
    np.testing.assert_array_equal(reader[0], pixels(2, 30, 30)[0])
    with pytest.raises(DataError, match=r"section 1 \(image.ome\[1\]\) is damaged or cut off"):
        reader[1]
    with pytest.raises(DataError, match="a section from 0 on is damaged"):
        reader.slab(slice(0, 2), slice(0, 8), slice(0, 8))


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize("key", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_a_chunk_that_is_cut_off_is_found_wherever_a_part_reaches_into_it_and_only_there(image, version, key):
    path = image(pixels(1, 30, 30), version)
    chunk = path / "s0" / ("0.{}.{}" if version == "0.4" else "c/0/{}/{}").format(*key)
    chunk.write_bytes(chunk.read_bytes()[:-1])
    reader = omezarr.open_zarr(path)
    with pytest.raises(DataError, match=r"section 0 .* is damaged or cut off"):
        reader[0]
    with pytest.raises(DataError, match="is damaged or cut off"):
        reader.part(0, *(slice(23 * k, 23 + 2 * k) for k in key))
    others = [slice(24 * (1 - k), 30 - 6 * k) for k in key]
    np.testing.assert_array_equal(reader.part(0, *others), pixels(1, 30, 30)[0][tuple(others)])


def test_values_that_are_not_finite_are_refused(image):
    sections = pixels(2, 30, 30).astype(np.float32)
    sections[1, 20, 20] = np.inf
    reader = omezarr.open_zarr(image(sections))
    with pytest.raises(DataError, match=r"section 1 .*holds 1 NaN or infinite"):
        reader[1]
    with pytest.raises(DataError, match="holds 1 NaN or infinite"):
        reader.slab(slice(0, 2), slice(0, 30), slice(0, 30))
    np.testing.assert_array_equal(reader.slab(slice(0, 2), slice(0, 8), slice(0, 8)), sections[:, :8, :8])


@pytest.mark.parametrize("voxel_nm", [None, (None, 8.0, 4.0), (30.0, 8.0, 4.0)])
def test_an_output_is_what_the_models_of_the_format_want(tmp_path, voxel_nm):
    check = pytest.importorskip("ome_zarr_models", reason="ome-zarr-models is not installed").open_ome_zarr
    write_mask(tmp_path / "m.tif", iter(np.zeros((2, 9, 9))), count=2, shape=(9, 9), voxel_nm=voxel_nm)
    image = [ome_zarr(tmp_path / "i.zarr", pixels(1, 1, 2, 9, 9), "0.4", "tczyx"), tmp_path / "m.tif"]
    for path, version in zip(image, ("0.4", "0.5"), strict=True):
        with iter_sections(path) as reader:
            shape = omezarr.array_shape(reader)
            omezarr.create(tmp_path / version, reader, shape, shape, {"made_of": {"a": 1}})
        assert check(zarr.open_group(tmp_path / version, mode="r")).ome_zarr_version == version


def test_two_colons_in_a_name_are_no_chain_of_addresses(tmp_path):
    write_mask(tmp_path / "m.tif", iter(np.zeros((2, 9, 9))), count=2, shape=(9, 9))
    with iter_sections(tmp_path / "m.tif") as reader:
        shape = omezarr.array_shape(reader)
        omezarr.create(tmp_path / "a::b.zarr", reader, shape, shape, {"made_of": {"a": 1}})
        omezarr.check_array(tmp_path / "a::b.zarr", shape, shape)
    zarr.open_array(tmp_path / "a::b.zarr" / "0", mode="r+")[:] = 0.5
    with iter_sections(tmp_path / "a::b.zarr") as reader:
        np.testing.assert_array_equal(reader[1], np.full((9, 9), 0.5, np.float32))
