"""Labels, pairs, normalisation, splits, and what `check` says."""

import dataclasses
import json

import numpy as np
import pytest
import tifffile
from conftest import cases, refused
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import data
from data import DataError, Normalisation, Stack, describe, load_pair, read_labels, read_stack, resolve, split_sections

INTERIOR = np.array([[[1, 1, 0], [1, 1, 1]], [[0, 1, 1], [1, 1, 1]]], bool)


def mask_stack(values):
    return Stack(np.asarray(values), names=[str(i) for i in range(len(values))], source="mask.tif")


def image_stack(shape=(30, 64, 64), dtype="uint8"):
    return Stack(np.random.default_rng(0).integers(0, 200, shape).astype(dtype), source="image.tif")


def two_valued(membrane, interior, dtype="uint8"):
    return mask_stack(np.where(INTERIOR, interior, membrane).astype(dtype))


def test_folder_of_the_challenge_gives_each_role_its_file(tmp_path):
    files = {"image": "train-volume.tif", "mask": "train-labels.tif", "test": "test-volume.tif"}
    for role, name in files.items():
        (tmp_path / name).touch()
        assert resolve(tmp_path, role) == tmp_path / name
    assert resolve(str(tmp_path), "prediction") == tmp_path
    (tmp_path / "train-labels.tif").unlink()
    for role, missing in (("test_mask", "test-labels"), ("mask", "train-labels")):
        refused(rf"--mask_path: .* holds train-volume\.tif, .*, and no {missing}\.tif", resolve, tmp_path, role)


@pytest.mark.parametrize(("role", "test_role"), [("image", "test"), ("mask", "test_mask")])
def test_the_test_part_of_a_data_set_has_a_name(role, test_role, monkeypatch):
    monkeypatch.setattr("data.synthetic.__defaults__", (2, (64, 64), 0))
    named = resolve("synthetic-test", role).sections
    np.testing.assert_array_equal(named, resolve("synthetic", test_role).sections)
    assert (named != resolve("synthetic", role).sections).any()
    refused("--prediction must be a file or a folder", resolve, "synthetic", "prediction")


TWO_VALUES = [(0, 1, "uint8"), (0, 255, "uint8"), (False, True, "bool"), (0, -1, "int8"), (1, 2, "uint16")]


@pytest.mark.parametrize(("membrane", "interior", "dtype"), [*TWO_VALUES, (0.0, 1.0, "float32")])
@pytest.mark.parametrize("invert", [False, True])
def test_two_values_become_0_and_1(membrane, interior, dtype, invert):
    labels, messages = read_labels(two_valued(membrane, interior, dtype), invert=invert)
    assert labels.sections.dtype == np.uint8
    np.testing.assert_array_equal(labels.sections, INTERIOR ^ invert)
    assert f"{interior} = {'membrane' if invert else 'interior'}" in messages[0]
    assert ("inverted" in messages[0]) == invert


SPARSE = np.ones((5, 4, 4), np.uint8)
SPARSE[2] = 0
SPARSE[[0, 3, 4], 0] = 0


@cases(
    "values, invert, interior, warnings",
    (np.where(INTERIOR, 255, 0), False, "83.3%", []),
    (np.where(INTERIOR, 0, 255), False, "16.7%", ["minority: inverted labels? Try with --invert_mask"]),
    (np.where(INTERIOR, 0, 255), True, "83.3%", []),
    (np.where(INTERIOR, 255, 0), True, "16.7%", ["minority: inverted labels? Try without --invert_mask"]),
    (np.full((2, 3, 3), 0), False, "0.0%", ["all background"]),
    (np.full((2, 3, 3), 255), False, "100.0%", ["all interior"]),
    (np.full((2, 3, 3), 0), True, "100.0%", ["all interior"]),
    (np.full((2, 3, 3), 1), True, "0.0%", ["all background"]),
    (SPARSE, False, "65.0%", ["sections without interior: 2", "sections without membrane: 1"]),
)
def test_the_share_of_interior_is_said_and_what_looks_wrong_is_warned_about(values, invert, interior, warnings):
    labels, messages = read_labels(mask_stack(values), invert=invert)
    assert f"{labels.sections.mean():.1%}" == interior
    assert messages[0].endswith(f"interior {interior} of the pixels")
    assert all(line.startswith("warning: ") for line in messages[1:])
    assert all(words in line for words, line in zip(warnings, messages[1:], strict=True))


@cases(
    "values, words",
    (np.kron([[0, 128], [255, 128]], np.ones((20, 20), int)), "up to section 0: 0, 128, 255; .*if one of the three"),
    (np.kron(np.arange(36).reshape(6, 6), np.ones((9, 9), int)), "looks like an instance mask"),
    (np.random.default_rng(0).integers(0, 256, (40, 40)), r"0, 1, 2, 3, 4, 5, 6, 7, ...; it looks like an image"),
    (np.random.default_rng(0).random((40, 40)), "or a probability map"),
    (np.r_[np.zeros(40), np.arange(1, 9), np.full(52, 255)].reshape(10, 10), "blurred by resampling or JPEG"),
)
def test_more_than_two_values_are_refused_with_the_values_and_a_guess(values, words):
    refused(words, read_labels, mask_stack(values[None]))


@pytest.mark.parametrize(("membrane", "interior", "dtype"), [(0, 1, "int16"), (0, 255, "uint16"), (1, 3, "float32")])
@pytest.mark.parametrize("ignore", [-1, 0, 2, 128, 300])
@pytest.mark.parametrize("invert", [False, True])
def test_a_third_value_may_mean_not_labelled(membrane, interior, dtype, ignore, invert):
    """Whichever it is, it becomes -1, and neither the other two nor their share change."""
    if ignore == membrane or (dtype == "uint16" and ignore < 0):
        return
    stack = two_valued(membrane, interior, dtype)
    stack.sections[0, 1, :2] = ignore
    labels, messages = read_labels(stack, invert=invert, ignore=ignore)
    assert labels.sections.dtype == np.int8
    assert labels.sections.tolist() == np.where(stack.sections == ignore, -1, INTERIOR ^ invert).tolist()
    assert messages[0].endswith(f"interior {'20' if invert else '80'}.0% of the labelled pixels")
    assert messages[-1] == f"labels: {ignore} = not labelled; 83.3% of the pixels are labelled"


PARTLY = np.kron([[[0, 1], [1, 2]], [[2, 2], [2, 2]], [[0, 2], [2, 1]]], np.ones((1, 9, 9), int))


@cases(
    "values, ignore, words",
    (PARTLY, None, "0, 1, 2; .*; if one of the three means 'not labelled', name it with --ignore_label"),
    (PARTLY, 7, "--ignore_label must be one of the values of --mask_path. Received: 7, which is nowhere in"),
    (PARTLY[1:2], 2, "Received: 2, which is all in"),
    (PARTLY[:1] % 2, 0, "--ignore_label must leave two label values in mask.tif. Received: 0, which leaves 1"),
    (PARTLY + np.arange(3)[:, None, None], 2, "must hold two label values beside 2. Received"),
)
def test_values_that_cannot_mean_not_labelled_are_refused(values, ignore, words):
    refused(words, read_labels, mask_stack(values), ignore=ignore)


def test_what_is_not_labelled_is_no_cell_and_no_background():
    cells, messages = data.read_instances(mask_stack(PARTLY.astype(np.uint32) * (2**31 - 1)), ignore=2**32 - 2)
    assert (cells.sections == np.where(PARTLY == 2, -1, PARTLY * (2**31 - 1))).all()
    assert "sections without labels, which neither train nor are scored: 1" in messages
    assert not any(line.startswith("warning") for line in read_labels(mask_stack(PARTLY), ignore=2)[1])
    bare = "warning: sections that are all background: 1; if they are not labelled"
    assert any(line.startswith(bare) for line in data.read_instances(mask_stack(PARTLY * (PARTLY < 2)))[1])
    refused("must not be 0 with --instances", data.read_instances, mask_stack(PARTLY), ignore=0)
    cells = np.zeros((1, 9, 9), np.uint8)
    cells[0, 1:3], cells[0, 5:7], cells[0, 8] = 1, 1, 255
    assert any("one and the same number" in line for line in data.read_instances(mask_stack(cells), ignore=255)[1])


def folder_of(folder, names):
    """Section i is black at pixel i."""
    folder.mkdir()
    for i, name in enumerate(names):
        section = np.full((6, 5), 255, np.uint8)
        section.flat[i] = 0
        Image.fromarray(section).save(folder / f"{name}.png")
    return folder


@cases(
    "images, masks, words",
    (["a", "b", "c"], ["a", "b", "c"], "a with a"),
    (["t007", "t008", "t010"], ["man_seg007", "man_seg008", "man_seg010"], "t007 with man_seg007"),
    (["7", "8", "10"], ["7_label", "8_label", "10_label"], "7 with 7_label"),
    (["s7", "s8", "s10"], ["m0007", "m0008", "m0010"], "s7 with m0007"),
    (["10_x", "11_x"], ["10", "11"], "10_x with 10"),
    (["cell", "cell-2"], ["cell_mask", "cell-2_mask"], "cell with cell_mask"),  # in another natural order
    (["2-first", "10-first"], ["02-first", "010-first"], "2-first with 02-first"),
)
def test_folders_are_paired_by_name_and_it_is_said(tmp_path, images, masks, words):
    image, mask, messages = load_pair(folder_of(tmp_path / "i", images), folder_of(tmp_path / "m", masks))
    np.testing.assert_array_equal(mask.sections, image.sections // 255)
    assert mask.names == masks
    assert f"pairs: by name, {words}, and so on" in messages


@cases(
    "images, masks, first",
    (["t1", "t2", "t3"], ["t1", "t2", "t4"], "t3"),
    (["t1", "t2"], ["one", "two"], "t1"),
    (["t1", "t2"], ["1", "01"], "t2"),
    (["1", "01"], ["t1", "t2"], "01"),
    (["s7", "s07"], ["m7", "m07"], "s07"),
)
def test_names_that_do_not_pair_are_refused_with_the_first_that_differs(tmp_path, images, masks, first):
    with pytest.raises(DataError, match=rf"--mask_path: the names in .*m \(.*\) must be those in .* for {first}$"):
        load_pair(folder_of(tmp_path / "i", images), folder_of(tmp_path / "m", masks))


def test_file_and_folder_are_paired_by_order_and_invert_mask_reaches_the_pair(tmp_path):
    folder = folder_of(tmp_path / "m", ["3", "20", "100"])
    _, mask, messages = load_pair(image_stack((3, 6, 5)), folder)
    assert mask.names == ["3", "20", "100"]
    assert "pairs: sections and masks go together by their order" in messages
    for count, width in ((29, 64), (30, 65)):
        masks = mask_stack(np.arange(count * 64 * width).reshape(count, 64, width) % 2)
        received = f"Received: {count} sections of 64 x {width} px"
        refused(f"30 sections of 64 x 64 px. {received}", load_pair, image_stack(), masks)
    images = image_stack(INTERIOR.shape)
    np.testing.assert_array_equal(load_pair(images, two_valued(255, 0), invert_mask=True)[1].sections, INTERIOR)


@cases(
    "window, shape, words",
    (500, (1, 64, 64), "multiple of 8. Received: 500"),
    (0, (1, 64, 64), "positive"),
    (-8, (1, 64, 64), "positive"),
    (72, (1, 64, 64), "at most 64"),
    (48, (1, 64, 41), "64 x 41 px, so at most 40"),
    (8, (1, 7, 41), "too small"),
)
def test_window_must_fit_network_and_sections(window, shape, words):
    data.check_window(image_stack(), 64, 16)
    refused(words, data.check_window, image_stack(shape), window)


@given(st.floats(allow_nan=False, allow_infinity=False), st.floats(0, 1e300), st.floats(1e-12, 1))
def test_constants_survive_json(mean, std, epsilon):
    norm = Normalisation(mean, std, epsilon)
    assert Normalisation.from_dict(json.loads(json.dumps(norm.to_dict()))) == norm


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32", "float64"])
def test_training_sections_become_zero_mean_and_unit_deviation(dtype):
    sections = image_stack((4, 32, 32), dtype).sections + np.array(50).astype(dtype)
    norm = Normalisation.fit(sections)
    done = norm(sections)
    assert (done.dtype, done.mean(dtype=np.float64)) == (np.float32, pytest.approx(0, abs=1e-5))
    assert done.std(dtype=np.float64) == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(done * norm.std + norm.mean, sections, atol=1e-3)


def test_a_flat_stack_becomes_zeros_and_large_offsets_are_not_rounded_away():
    flat, high = np.full((3, 7, 7), 0.1), np.array([[[1e9, 1e9 + 1]]])
    assert Normalisation.fit(flat).std == 0
    assert (Normalisation.fit(flat)(flat) == 0).all()
    np.testing.assert_allclose(Normalisation.fit(high)(high), [[[-1, 1]]], atol=1e-6)


def test_wrong_constants_are_refused():
    constants = [("x", 1, 1), (float("nan"), 1, 1), (0, 0, 0), (0, -1, 1e-10), (0, 1, float("inf"))]
    wrong = [dict(zip(("mean", "std", "epsilon"), values, strict=True)) for values in constants]
    for record in ({}, None, {"mean": 1, "std": 2}, *wrong):
        refused("normalisation must", Normalisation.from_dict, record)


def contiguous(sections):
    return list(sections) == list(range(sections[0], sections[0] + len(sections)))


@given(st.integers(1, 60), st.integers(0, 5), st.integers(0, 6), st.data())
def test_splits_are_disjoint_complete_and_keep_the_gap(count, gap, inner, draw):
    folds = draw.draw(st.integers(2, max(2, count)))
    fold = draw.draw(st.integers(0, folds - 1))
    protocol = draw.draw(st.sampled_from(["holdout", "kfold"]))
    try:
        split = split_sections(count, protocol, fold=fold, folds=folds, gap=gap, inner=inner)
    except DataError:
        held = -(-count // folds) if protocol == "kfold" else max(1, round(count / 5))
        assert count - held - 2 * gap < 2 * inner + 1 or folds > count  # no room, or a hole that is no run
        return
    assert sorted(split.train + split.inner + split.held_out + split.gap) == list(range(count))
    assert contiguous(split.held_out)
    assert len(split.inner) == inner
    assert not inner or contiguous(split.inner)
    assert split.train
    rest = split.train + split.inner
    assert min(abs(i - j) for i in rest for j in split.held_out) > gap
    assert all(min(abs(i - j) for j in split.held_out) <= gap for i in split.gap)


@given(st.integers(2, 60), st.data())
def test_folds_hold_every_section_out_once(count, draw):
    folds = draw.draw(st.integers(2, count))
    blocks = [split_sections(count, "kfold", fold=fold, folds=folds).held_out for fold in range(folds)]
    assert sum(blocks, ()) == tuple(range(count))
    assert max(map(len, blocks)) - min(map(len, blocks)) <= 1


def test_holdout_of_thirty_is_the_last_six_and_published_trains_and_validates_on_everything():
    split = split_sections(30, "holdout", gap=2, inner=3)
    assert (split.held_out, split.gap, split.inner) == (tuple(range(24, 30)), (22, 23), (19, 20, 21))
    for held_out, gap, inner in (((4, 5), 0, (2, 3)), ((0, 1), 1, (3, 4)), ((1, 2), 0, (3, 4))):  # where there is room
        assert split_sections(10, "holdout", val_sections=held_out, inner=2, gap=gap).inner == inner
    assert split.train == tuple(range(19))
    assert split.describe() == "holdout: train on 0-18 (19), choose weights on 19-21, leave out 22-23, hold out 24-29"
    for count, inner in ((3, 0), (4, 1), (16, 2), (30, 3), (99, 3)):
        assert len(split_sections(count, "holdout", inner=None).inner) == inner
    split = split_sections(30, "published")
    assert split.train == split.inner == tuple(range(30))
    assert split.held_out == split.gap == ()
    assert "none is held out" in split.describe()


@cases(
    "labelled, inner, train, chosen",
    (range(5), 2, (0, 1, 2), (3, 4)),
    ((2, 7, 12, 17, 22), 1, (2, 7, 12, 17), (22,)),
    ((2, 7, 12, 17, 23), 2, (2, 7), (12, 17)),  # 23 lies in the gap
    (range(24), 0, tuple(range(23)), ()),
)
def test_train_sections_bound_what_trains_and_what_chooses_the_weights(labelled, inner, train, chosen):
    split = split_sections(30, "holdout", gap=1, inner=inner, train_sections=labelled)
    assert (split.train, split.inner) == (train, chosen)
    assert (split.held_out, split.gap) == (tuple(range(24, 30)), (23,))
    assert split_sections(30, "published", train_sections=(3, 1)).train == (1, 3)


def test_sections_without_labels_are_in_no_part_and_the_others_keep_their_numbers():
    labelled = (2, 3, 4, 5, 9, 10, 20)
    split = split_sections(30, "holdout", gap=1, inner=1, labelled=labelled)
    assert (split.train, split.inner, split.held_out, split.gap) == ((2, 3, 4, 5, 9), (10,), (20,), ())
    assert split_sections(30, "holdout", val_sections=(5, 6, 7), gap=1, labelled=labelled).gap == (4,)
    assert split_sections(30, "kfold", fold=2, folds=3, labelled=labelled).held_out == (10, 20)
    assert split_sections(30, "published", labelled=labelled).train == labelled


@cases(
    "count, protocol, options, words",
    (9, "holdout", {"val_sections": (7, 8), "labelled": (0, 1)}, "must name sections with labels. Received: 7-8"),
    (9, "holdout", {"inner": 1, "labelled": (0, 4)}, "and still train. Received: 2 with labels"),
    (1, "holdout", {}, "--protocol all"),
    (5, "holdout", {"gap": 4}, "too few sections to hold out 1, leave out 4"),
    (6, "holdout", {"inner": 5}, "too few"),
    (30, "holdout", {"train_sections": (23,), "gap": 1}, "too few"),
    (30, "holdout", {"train_sections": (0, 1, 2), "inner": 3}, "Received: --train_sections 0-2 of 30"),
    (30, "holdout", {"val_sections": (29, 30)}, r"--val_sections must lie in 0-29. Received: 29-30"),
    (30, "holdout", {"train_sections": (20, 24, 25)}, "must not be held out as well. Received: 24-25"),
    (30, "holdout", {"train_sections": (30,)}, "--train_sections must lie in 0-29"),
    (30, "kfold", {"fold": 5}, "--fold must be from 0 to 4. Received: 5"),
    (4, "kfold", {}, "--folds must be from 2 to the number of sections, 4. Received: 5"),
)
def test_splits_that_cannot_be_are_refused(count, protocol, options, words):
    refused(words, split_sections, count, protocol, **options)


@given(st.sets(st.integers(0, 500), min_size=1))
def test_section_numbers_are_read_as_written(sections):
    assert data.parse_sections(data.format_sections(sections)) == tuple(sorted(sections))
    assert data.parse_sections(" 0, 3 ,5 - 7") == (0, 3, 5, 6, 7)


WRONG_NUMBERS = ["", "a", "3-", "-3", "1,,2", "1.5", "1;2", "1-2-3", "0-99999999", "٣", "3,3", "1-4,4", "29-24"]


@pytest.mark.parametrize("text", WRONG_NUMBERS)
def test_what_is_no_section_number_twice_or_downwards_is_refused(text):
    refused(rf"sections must be numbers and ranges .* Received: {text}$", data.parse_sections, text)


def test_montage_lays_sections_row_by_row_in_the_order_drawn():
    sections = np.arange(6)[:, None, None] * np.ones((6, 2, 3), int)
    picture = data.montage(sections, 3, 2, [5, 0, 1, 2, 4, 3])
    assert picture.shape == (6, 6)
    assert picture[::2, ::3].tolist() == [[5, 0], [1, 2], [4, 3]]
    np.testing.assert_array_equal(picture[2:4, :3], sections[1])


def saying(lines, *words, problems=0):
    text = "\n".join(lines)
    assert sum(line.startswith("problem: ") for line in lines) == problems, text
    for word in words:
        assert word in text, f"{word!r} is not in\n{text}"


def test_check_says_what_the_files_are_and_every_problem(tmp_path):
    voxel = {"imagej": True, "resolution": (250, 250), "metadata": {"axes": "ZYX", "spacing": 0.05, "unit": "um"}}
    sections = image_stack((10, 64, 72), "uint16").sections
    sections[3] = 7
    tifffile.imwrite(tmp_path / "i.tif", sections, **voxel)
    mask = np.where(np.arange(72) % 4, 255, 0) * np.ones((10, 64, 1), np.uint8)
    tifffile.imwrite(tmp_path / "m.tif", mask.astype(np.uint8), photometric="minisblack")
    lines = describe(tmp_path / "i.tif", tmp_path / "m.tif", window=64)
    saying(lines, f"image: {tmp_path / 'i.tif'}", "10 sections of 64 x 72 px, uint16, axes ZYX, ImageJ TIFF")
    saying(lines, "values 0 to 199", "pixel 4 x 4 nm, section 50 nm", "warning: sections of a single gray value: 3")
    saying(lines, "0 = membrane, 255 = interior; interior 75.0%", "by their order")
    saying(lines, "holdout: train on 0-7 (8), hold out 8-9", "crops of 64 x 64 px")
    lines = describe(image_stack((1, 60, 90)), mask_stack(np.zeros((1, 60, 91), np.uint8)), window=64)
    saying(lines, "must be like the images", "too few sections", "at most 56", problems=3)
    saying(lines, "voxel size unknown", "60 x 90 px is no multiple of 8: prediction mirrors the borders", problems=3)


def test_check_turns_label_trouble_into_lines(tmp_path):
    images, cells = image_stack((5, 64, 64)), np.arange(5 * 64 * 64).reshape(5, 64, 64) // 64

    def check(mask, *words, problems=0, **how):
        saying(describe(images, mask, window=64, **how), *words, problems=problems)

    check(mask_stack(cells % 3), "problem: --mask_path", "0, 1, 2; it looks", problems=1)
    check(tmp_path / "no.tif", "mask: ", "problem: --mask_path", "does not exist", problems=1)
    check(mask_stack(cells / 2), "problem: --mask_path", "whole numbers", problems=1, instances=True)
    sparse = mask_stack(np.where(cells < 70, 2, cells % 2))
    check(sparse, "2 = not labelled; 78.1% of the", "train on 1-3 (3), hold out 4", "without labels", ignore=2)
    check(mask_stack(cells * 0), "warning: the mask is all background", "whole sections")
    check(mask_stack(cells), "labels: instances, 63 to 64 a section", "by their order", instances=True)
    gray = mask_stack((np.random.default_rng(0).random(cells.shape) * 400).astype(np.uint16))
    check(gray, "labels: instances", "warning: these look like the gray values of an image", instances=True)
    fitting = "recipes whose window fits: a (64 px), b (32 px); add a smaller"
    saying(describe(images, window=None, windows={"a": 64, "b": 32, "c": 128}), "whole sections", fitting)
    assert "  recipes whose window fits: none; add a smaller --window" in describe(images, windows={"c": 128})
    refused("does not exist", describe, tmp_path / "no.tif")


@pytest.mark.parametrize("third", [1, 2, 3])
def test_sections_that_are_all_of_a_third_value_are_told_from_a_blurred_mask(third):
    first, second = sorted({1, 2, 3} - {third})
    values = np.where(np.arange(40) % 4, second, first) * np.ones((4, 40, 1), int)
    values[2:] = third
    words = "section 2: 1, 2, 3; a third value appears there; if one of the three means 'not labelled', name it with"
    refused(words, read_labels, mask_stack(values))


@cases(
    "voxel_nm, words",
    ((50.0, 8.0, 8.0), "trained on 4 x 4 nm: predict --rescale resamples the stack"),
    ((50.0, 190.0, 190.0), "trained on 4 x 4 nm: no network for this stack"),
)
def test_check_advises_to_rescale_only_where_that_is_taken(voxel_nm, words):
    images = dataclasses.replace(image_stack((2, 64, 64)), voxel_nm=voxel_nm)
    saying(describe(images, window=64, shipped_nm=(50.0, 4.0, 4.0)), words)


def test_frames_without_a_mask_are_left_out_of_what_check_says_and_one_mask_may_stand_alone(tmp_path):
    cells = np.arange(64 * 64).reshape(64, 64) // 512
    for count, said in ((5, "train on 0-3 (4), hold out 4"), (1, "too few sections")):
        for folder, stems in (("frames", range(9)), (f"masks{count}", range(3, 3 + count))):
            (tmp_path / folder).mkdir(exist_ok=True)
            for i in stems:
                tifffile.imwrite(tmp_path / folder / f"t{i:03d}.tif", (cells + i).astype(np.uint16))
        pair = (tmp_path / "frames", tmp_path / f"masks{count}")
        lines = describe(*pair, window=64, instances=True)
        saying(lines, f"pairs: {count} of 9 frames are labelled", said, problems=count == 1)
        images, masks, _ = load_pair(*pair, instances=True)
        assert (images.names[0], len(masks.sections)) == ("t003", count)
    (tmp_path / "masks1/t003.tif").rename(tmp_path / "v2_labels.tif")  # the number of a version, not of a frame
    refused("must be like the images", load_pair, tmp_path / "frames", tmp_path / "v2_labels.tif", instances=True)


def test_check_and_the_constants_look_at_a_large_section_in_strips(monkeypatch):
    sections, masks = image_stack((2, 96, 64), "uint16"), mask_stack(image_stack((2, 96, 64)).sections > 90)
    whole = describe(sections, masks, window=64)
    monkeypatch.setattr("files.sections.STRIP_PX", 700)
    assert describe(sections, masks, window=64) == whole
    monkeypatch.setattr("files.sections.memory_limit", lambda: 30_000)  # a section fits, the stack does not
    lines = describe(sections, masks, window=64)
    saying(lines, "problem: the stack and its masks would take 0.037 MB of memory", problems=1)


def test_the_real_stack_is_78_percent_interior_and_check_has_nothing_to_complain_about(isbi):
    images, masks, messages = load_pair(isbi, isbi)
    assert images.voxel_nm == masks.voxel_nm == (50.0, 4.0, 4.0)
    assert images.sections.shape == (30, 512, 512)
    assert messages[0] == "labels: 0 = membrane, 255 = interior; interior 78.0% of the pixels"
    assert not any(line.startswith("warning") for line in messages)
    inside, membrane = (images.sections[masks.sections == value].mean() for value in (1, 0))
    assert inside > membrane + 30
    lines = describe(isbi / "train-volume.tif", isbi / "train-labels.tif")
    saying(lines, "30 sections of 512 x 512 px, uint8", "train on 0-23 (24), hold out 24-29", "whole sections")
    assert not any(line.startswith("warning") for line in lines)


def test_real_instance_masks_are_recognised_and_paired(hela):
    instances = read_stack("dic-hela", what="mask")
    assert (instances.source, instances.sections.dtype) == (str(hela / "01_ST" / "SEG"), np.uint16)
    refused("looks like an instance mask", read_labels, "dic-hela")
    borders = Stack(instances.sections > 0, names=instances.names, source=instances.source)
    assert "pairs: by name, t000 with man_seg000, and so on" in load_pair("dic-hela", borders)[2]


def test_check_and_training_read_the_channel_that_is_named(tmp_path):
    two = np.random.default_rng(0).integers(0, 255, (5, 2, 64, 64), dtype=np.uint8)
    two[:, 1] = 7
    tifffile.imwrite(tmp_path / "i.tif", two, imagej=True, metadata={"axes": "ZCYX"})
    assert "  values 7 to 7, mean 7, standard deviation 0" in describe(tmp_path / "i.tif", channel=1)
    for channel in (0, 1):
        images, *_ = load_pair(tmp_path / "i.tif", mask_stack(two[:, 0] > 99), channel=channel)
        np.testing.assert_array_equal(images.sections, two[:, channel])
