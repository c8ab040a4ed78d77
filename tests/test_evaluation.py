"""The `evaluate` verb: what it reads and refuses, what it says, and what it writes."""

import argparse
import json
import os
import re

import numpy as np
import pytest
import tifffile
from conftest import cases, refused

import data
from files.atomic import DataError
from score import evaluation, report, scores, segments


@pytest.fixture
def files(tmp_path, monkeypatch, labelled):
    """A folder, which is the current one, with p.tif and l.tif; `files(prediction, labels)` writes others."""
    monkeypatch.chdir(tmp_path)

    def write(prediction=labelled[0], labels=labelled[1]):
        tifffile.imwrite("p.tif", prediction, photometric="minisblack")
        tifffile.imwrite("l.tif", labels, photometric="minisblack")
        return ["--prediction", "p.tif", "--mask_path", "l.tif"]

    return write


def evaluate(flags):
    parser = argparse.ArgumentParser()
    evaluation.add_arguments(parser)
    return evaluation.run(parser.parse_args([str(flag) for flag in flags]))


def numbers(flags):
    evaluate([*flags, "--json", "s.json", "--force"])
    with open("s.json", encoding="utf-8") as file:
        return json.load(file)


def sections(stack):
    """A stack in memory as the verb reads one from a file."""
    reader = data.iter_sections(data.Stack(stack, source="memory"))
    return evaluation.Sections(reader, range(len(stack)))


def test_json_holds_the_scores_asked_for_with_their_curves(files, labelled):
    found = numbers(files())
    assert set(found) & set(evaluation.SCORES) == set(evaluation.DEFAULT_SCORES)
    assert (found["sections"], found["thresholds"]) == ([0, 1, 2, 3, 4, 5], list(scores.THRESHOLDS))
    curve = scores.v_scores(*labelled)["v_rand"]
    assert (found["v_rand"], found["best_thresholds"]["v_rand"]) == (curve.value, curve.threshold)
    assert found["curves"]["v_rand"] == curve.curve.tolist()
    assert found["per_section"]["v_rand"] == curve.per_section.tolist()
    found = numbers([*files(), "--scores", "warping_error, iou"])
    assert set(found) & set(evaluation.SCORES) == {"warping_error", "iou"}
    expected = scores.warping_error(*labelled)
    assert found["warping_error"] == expected.value
    assert found["details"]["warping_error"]["splits"] == expected.details["splits"].tolist()
    assert evaluation.parse_scores("all") == tuple(evaluation.SCORES)


def test_every_score_is_declared_beside_its_function():
    for name, score in scores.SCORES.items():
        assert score.function is getattr(scores, name)
        assert bool(score.chart) == (score.of == "thresholds")
        assert score.words.endswith(".")


def test_pooled_scores_divide_once_and_a_section_without_interior_has_no_value_while_the_others_count(labelled):
    found = evaluation.score_arrays(*labelled, which=("dice", "iou", "precision", "recall", "bce", "ece"))
    proposal, truth = labelled[0] > 0.5, labelled[1] > 0
    both = (proposal & truth).sum()
    assert found["dice"] == pytest.approx(2 * both / (proposal.sum() + truth.sum()))
    assert found["iou"] == pytest.approx(both / (proposal | truth).sum())
    assert found["precision"] == pytest.approx(both / proposal.sum())
    assert found["recall"] == pytest.approx(both / truth.sum())
    assert found["bce"] == pytest.approx(np.mean(found["per_section"]["bce"]), rel=1e-9)
    assert found["ece"] == pytest.approx(scores.ece(*labelled))
    assert sum(found["calibration"]["pixels"]) == truth.size
    truth = labelled[1].copy()
    truth[2] = 0
    found = evaluation.score_arrays(labelled[0], truth)
    assert found["per_section"]["v_rand"][2] is None
    assert found["v_rand"] == evaluation.score_arrays(np.delete(labelled[0], 2, 0), np.delete(truth, 2, 0))["v_rand"]
    json.dumps(found, allow_nan=False)


@pytest.fixture
def partly(labelled):
    """The prediction, labels of which the right part is unlabelled (-1), and that of section 1 as a whole."""
    truth = (labelled[1] > 0).astype(np.int8)
    truth[..., 50:], truth[1] = -1, -1
    return labelled[0], truth


def test_no_score_looks_at_what_is_not_labelled(partly):
    """Each is exactly that of any other prediction there; but for the thinning of borders, that of the rest alone."""
    kept, found = [0, 4], []
    for fill in (None, np.random.default_rng(0).random((6, 64, 30))):
        prediction = partly[0].copy()
        if fill is not None:
            prediction[..., 50:] = fill
        found.append(evaluation.score_arrays(prediction[kept], partly[1][kept], evaluation.SCORES))
    assert found[0] == found[1]
    alone = evaluation.score_arrays(partly[0][kept][..., :50], partly[1][kept][..., :50], evaluation.SCORES)
    for name in evaluation.SCORES:
        assert found[0][name] == pytest.approx(alone[name], rel=0.01 if name.startswith("v_") else 1e-9), name
    truth = np.array(partly[1][kept] > 0, np.float32)
    assert evaluation.score_arrays(truth, partly[1][kept], ("v_rand", "warping_error"))["v_rand"] == 1
    cells = np.stack([segments.components(section > 0.5) for section in partly[0]])
    truth = np.where(partly[1] < 0, -1, np.stack([segments.components(section > 0) for section in partly[1]]))
    alone = evaluation.score_instances(cells[kept][..., :50], truth[kept][..., :50])
    assert evaluation.score_instances(cells[kept], truth[kept]) == alone


def test_sections_without_labels_are_not_scored_and_unlabelled_parts_are_shown_gray(files, partly, capsys):
    labels = np.choose(partly[1] + 1, (7, 0, 200)).astype(np.uint8)
    found = numbers([*files(labels=labels), "--ignore_label", 7, "--sections", "0-2"])
    said = capsys.readouterr().out
    assert found["sections"] == [0, 2]
    assert found["dice"] == evaluation.score_arrays(partly[0][[0, 2]], partly[1][[0, 2]], ("dice",))["dice"]
    assert "7 = not labelled; 52.1% of the pixels" in said
    assert "which neither train nor are scored: 1" in said
    shown, _ = report.section_pictures(found, partly[0][0], partly[1][0])["Truth"]
    assert np.unique(shown[:, 50:]).tolist() == [128]
    with pytest.raises(DataError, match="no pixel is interior in the sections to score, 1: nothing is labelled there"):
        evaluate([*files(labels=labels), "--ignore_label", 7, "--sections", "1"])


@pytest.mark.parametrize(("chosen", "alone"), [("1,3-4", False), ("3-4", True)])
def test_sections_are_taken_of_both_or_are_what_the_prediction_holds(chosen, alone, files, labelled, capsys):
    which = list(data.parse_sections(chosen))
    flags = files(labelled[0][which]) if alone else files()
    found = numbers([*flags, "--sections", chosen, "--scores", "v_rand"])
    assert found["sections"] == which
    assert found["v_rand"] == scores.v_rand(labelled[0][which], labelled[1][which]).value
    assert ("its 2 sections are taken to be sections 3-4 of the labels" in capsys.readouterr().out) == alone


@pytest.mark.parametrize(("dtype", "full"), [(np.uint8, 255), (np.uint16, 65535)])
def test_scaled_integers_score_like_their_probabilities(files, labelled, capsys, dtype, full):
    scaled = np.round(labelled[0] * full).astype(dtype)
    found = numbers([*files(scaled), "--scores", "v_rand,bce"])
    expected = evaluation.score_arrays(scaled.astype(np.float32) / np.float32(full), labelled[1], ("v_rand", "bce"))
    assert (found["v_rand"], found["bce"]) == (expected["v_rand"], expected["bce"])
    assert f"divided by {full}" in capsys.readouterr().out


@cases("dtype, one", (np.uint8, 1), (np.uint8, 255), (np.uint16, 65535), (np.uint16, 1), (bool, 1))
def test_masks_are_masks_whatever_their_one_is_and_flat_curves_are_warned_of(labelled, dtype, one):
    mask = ((labelled[0] > 0.5) * np.array(one)).astype(dtype)
    mask[2] = 0
    found, words = evaluation.to_probabilities(sections(mask))
    assert found[0].dtype == np.float32
    np.testing.assert_array_equal(list(found), mask > 0)
    assert "a mask" in words
    (warning,) = evaluation.warnings_about(found, labelled[1])
    assert "every threshold" in warning


def test_numbers_of_cells_are_warned_of_and_probabilities_in_8_bits_are_not(labelled):
    cells = np.stack([segments.components(section > 0) for section in labelled[1]])
    numbered = np.where(cells > 0, 40 + cells * 180 // cells.max(), 0).astype(np.uint8)
    votes = np.round(labelled[0] * 4).astype(np.uint8) * 63
    for prediction, doubted in (
        (numbered, True),
        (np.round(labelled[0] * 255).astype(np.uint8), False),
        (votes, False),
    ):
        found, _ = evaluation.to_probabilities(sections(prediction))
        assert any("numbers of cells" in words for words in evaluation.warnings_about(found, labelled[1])) == doubted


@cases(
    "values, dtype", ([0, 1.5], "f4"), ([-0.1, 1], "f8"), ([0, 1, 2, 7], "u2"), ([0, 1, 2], "i4"), ([-1, 0, 1], "i2")
)
def test_values_out_of_range_are_refused_in_one_sentence(values, dtype):
    with pytest.raises(DataError, match=r"^--prediction .*Received: .*\.\..* in memory$"):
        evaluation.to_probabilities(sections(np.array([[values]], dtype)))


def test_what_looks_inverted_is_warned_of_and_invert_mask_turns_the_labels(files, labelled, capsys):
    for fine in (labelled[0], np.full((6, 64, 80), 0.3, np.float32)):
        assert evaluation.warnings_about(sections(fine), labelled[1]) == []
    for prediction, labels, flags, inverted in (
        (1 - labelled[0], labelled[1], [], True),
        (labelled[0], 255 - labelled[1], ["--invert_mask"], False),
    ):
        found = numbers([*files(prediction, labels), "--scores", "dice", *flags])
        assert ("looks inverted" in capsys.readouterr().err) == inverted
    assert found["dice"] == evaluation.score_arrays(*labelled, ("dice",))["dice"]


def write_folder(name, sections, stems):
    os.mkdir(name)
    for section, stem in zip(sections, stems, strict=True):
        tifffile.imwrite(f"{name}/{stem}.tif", section, photometric="minisblack")


def test_folders_are_paired_by_name_as_in_training(files, labelled, capsys):
    """Sorted each for itself, `scan_mask` stands last and `scan` first."""
    files()
    stems, truth = ("scan", "scan1", "scan2", "scan3"), labelled[1][:4]
    for name, content, end in (("images", truth // 2, ""), ("labels", truth, "_mask"), ("p", truth / 255, "_p")):
        write_folder(name, content.astype("f4" if name == "p" else "u1"), [stem + end for stem in stems])
    tifffile.imwrite("stack.tif", (truth / 255).astype("f4"), photometric="minisblack")
    labels = ("--mask_path", "labels", "--scores", "dice", "--sections", "1-3")
    for flags in (("--prediction", "p"), ("--prediction", "p", "--image_path", "images"),
                  ("--prediction", "stack.tif", "--image_path", "images")):  # fmt: skip
        assert numbers([*flags, *labels])["dice"] == 1
        said = capsys.readouterr()
        assert "pairs: by name" in said.out
        assert "inverted" not in said.err
    assert numbers(["--prediction", "stack.tif", *labels])["dice"] == 1  # without the ending they have one order
    assert "pairs: sections and labels go together by their order" in capsys.readouterr().out
    write_folder("others", truth, ("a1", "a2", "a3", "a4"))
    refused("the names in labels .* must be those in others", evaluate, ["--prediction", "others", *labels])


def test_a_folder_of_the_sections_that_are_asked_for_is_paired_by_name_too(files, labelled, capsys):
    """Files are numbered from 1, sections from 0: who mixes them up is told."""
    files()
    truth = labelled[1][:4]
    write_folder("labels", truth, [f"img_{i}_mask" for i in (1, 2, 3, 4)])
    write_folder("p", (truth[[2, 3]] / 255).astype("f4"), ["img_3", "img_4"])
    words = ["--prediction", "p", "--mask_path", "labels", "--scores", "dice", "--sections"]
    assert numbers([*words, "2-3"])["dice"] == 1
    assert "by their order" not in capsys.readouterr().out
    refused(r"the names in labels \(img_2_mask, img_3_mask\) must be those in p.*for img_4", evaluate, [*words, "1-2"])


def test_percent_in_8_bits_are_warned_of_and_a_rounding_above_1_is_not_refused(labelled):
    percent, _ = evaluation.to_probabilities(sections(np.round(labelled[0] * 100).astype(np.uint8)))
    assert any("above 0.5" in words for words in evaluation.warnings_about(percent, labelled[1]))
    found, _ = evaluation.to_probabilities(sections(labelled[0] * np.float32(1.0000001) - np.float32(1e-7)))
    assert (min(p.min() for p in found), max(p.max() for p in found)) == (0, 1)


def test_a_report_leaves_no_picture_of_the_one_that_it_replaces(files):
    for flags in (["all"], ["dice", "--sections", "1", "--force"]):
        evaluate([*files(), "--report", "r", "--scores", *flags])
        for name in ("curves-mine.png", "section-mine.png"):
            with open(f"r/{name}", "w"):
                pass
    assert sorted(os.listdir("r")) == ["curves-mine.png", "report.html", "section-001.png", "section-mine.png"]


def test_one_number_for_all_cells_is_warned_of(files, labelled, capsys):
    evaluate([*files(labelled[1]), "--instances"])
    said = capsys.readouterr()
    assert (said.out + said.err).count("all cells have one and the same number") == 2


REFUSED = {
    "scores": (["--scores", "dise"], "--scores must be 'all' or names of"),
    "scores, empty": (["--scores", "v_rand,"], "--scores must be"),
    "beyond": (["--sections", "5-6"], "--sections must lie in 0-5"),
    "count": (["--prediction", "two.tif"], "as many sections.*2, 6 and 6"),
    "size": (["--prediction", "narrow.tif"], "same section size.*64 x 79 and 64 x 80"),
    "all background": (["--mask_path", "zero.tif"], "no pixel is interior in the sections to score, 0-5"),
    "one without": (["--mask_path", "hole.tif", "--sections", "1"], "no pixel is interior in the sections to score, 1"),
    "no cell": (["--mask_path", "hole.tif", "--sections", "1", "--instances"], "no cell is labelled"),
    "no numbers": (["--instances"], "must hold whole numbers"),
    "gone": (["--prediction", "gone.tif"], "^--prediction: gone.tif does not exist.$"),
    "no image": (["--image_path", "gone.tif"], "--image_path: gone.tif does not exist"),
    "exists": (["--json", "old.json"], "--json: old.json exists already"),
    "a picture": (["--report", "mine"], "--report: mine/section-000.png exists already"),
    "a report": (["--report", "ours"], "--report: ours/report.html exists already"),
    "a file": (["--report", "old.json"], "--report must be a folder"),
    "a folder": (["--json", "ours", "--force"], "--json must be a file. Received: ours"),
    "twice": (["--json", "new/report.html", "--report", "new"], "--json must not be a file of --report"),
    "twice, a picture": (
        ["--json", "new/curves-scores.png", "--report", "new"],
        "--json must not be a file of --report",
    ),
    "no section": (["--sections", ""], "sections must be numbers"),
    "negative numbers": (["--prediction", "negative.tif", "--instances"], "--prediction must hold whole numbers"),
    "the prediction": (["--json", "p.tif", "--force"], "--json must not be an input"),
    "the labels": (["--json", "link.tif", "--force"], "--json must not be an input"),
    "a section": (["--mask_path", "theirs", "--report", "theirs", "--force"], "--report must not be an input"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_and_nothing_is_written(name, files, labelled, tmp_path):
    flags, words = REFUSED[name]
    holed = labelled[1].copy()
    holed[1] = 0
    stacks = {"two": labelled[0][:2], "narrow": labelled[0][:, :, :79], "zero": labelled[1] * 0, "hole": holed}
    stacks["negative"] = labelled[1].astype(np.int16) - 9
    given = files()
    for stem, sections in stacks.items():
        tifffile.imwrite(f"{stem}.tif", sections, photometric="minisblack")
    os.link("l.tif", "link.tif")
    for folder, file in (("mine", "section-000.png"), ("ours", "report.html"), ("theirs", "s0.tif")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text("somebody's")
    for i, section in enumerate(labelled[1]):
        tifffile.imwrite(tmp_path / "theirs" / f"s{i}.tif", section)
    (tmp_path / "theirs" / "report.html").symlink_to(tmp_path / "theirs" / "s0.tif")
    (tmp_path / "old.json").write_text("old")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    refused(words, evaluate, [*given, *flags])
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_numbers_of_cells_are_what_is_stored_whatever_is_shown(files, labelled):
    given = files(labels=labelled[1])
    tifffile.imwrite("p.tif", labelled[1], photometric="miniswhite")
    assert numbers([*given, "--instances"])["mean_iou"] == 1


def origin_of(images, labels, given=None):
    """What is said of a prediction of these images: warnings, or a refusal."""
    made_of = {"pixels_sha256": data.sha256_pixels(images)}
    prediction = data.Stack(np.full(images.shape, 0.5, np.float32), source="p.tif", made_of=made_of)
    return said_of(data.iter_sections(prediction), labels, given)


def said_of(prediction, labels, given=None):
    which = range(len(prediction))
    given = given and evaluation.Sections(given, which)
    return evaluation.check_origin(evaluation.Sections(prediction, which), labels, given, which)


@pytest.fixture
def challenge(tmp_path, monkeypatch):
    """A folder, which is the current one, with files as the challenge has them: images, test images, labels."""
    monkeypatch.chdir(tmp_path)
    train, test = np.clip(np.random.default_rng(0).normal(120, 40, (2, 6, 16, 16)), 0, 255).astype(np.uint8)
    for name, stack in (("train-volume", train), ("test-volume", test), ("train-labels", train > 99)):
        tifffile.imwrite(f"{name}.tif", stack, photometric="minisblack")
    return train, test, data.read_stack("train-labels.tif", what="mask")


@pytest.mark.parametrize(("words", "warned"), [("0-3", "0-1,3"), ("4", ""), ("0-9999999", ""), (None, "")])
def test_who_scores_sections_that_trained_the_network_is_warned_by_the_prediction(challenge, words, warned):
    made_of = {"pixels_sha256": data.sha256_pixels(challenge[0])} | ({"trained_on": words} if words else {})
    stack = data.Stack(np.full((6, 16, 16), 0.5, np.float32), source="p.tif", made_of=made_of)
    with data.iter_sections(stack) as reader:
        said = evaluation.check_origin(evaluation.Sections(reader, (0, 1, 3, 5)), challenge[2], None, (0, 1, 3, 5))
    assert [one.split(" trained the network")[0] for one in said] == [f"warning: sections {warned}"] * bool(warned)


def test_a_prediction_of_other_images_is_refused_where_they_are_known_and_warned_of_else(challenge, monkeypatch):
    train, test, labels = challenge
    warned = "warning: the prediction was made from other images than t"
    assert origin_of(train, labels) == []
    assert origin_of(train[::-1], labels)[0].startswith(warned)
    with data.iter_sections("test-volume.tif") as other:
        assert origin_of(train, labels, other)[0].startswith(warned)
    refused(r"was made from test-volume.*labels train-volume.*isbi2012-test", origin_of, test, labels)
    assert origin_of(test, data.Stack(test, source="test-labels.tif")) == []
    assert said_of(data.iter_sections(data.Stack(test[::-1])), labels) == [], "nothing is recorded"
    paint = data.synthetic
    monkeypatch.setattr(data, "synthetic", lambda seed: paint(2, (32, 32), seed))
    images = {name: data.resolve(name, "image").sections for name in ("synthetic", "synthetic-test")}
    for name, other in (tuple(images), tuple(images)[::-1]):
        labels, _ = data.read_labels(name)
        assert origin_of(images[name], labels) == []
        refused("was made from synthetic", origin_of, images[other], labels)


@cases(
    "prediction, flags, words",
    ("train-volume.tif", "", "holds the pixels of train-volume.tif"),
    ("test-volume.tif", "--sections 1-3", "holds the pixels of test-volume.tif"),
    ("some.tif", "--sections 1-3 --image_path train-volume.tif", "holds the pixels of train-volume.tif"),
    ("some.tif", "--sections 1-3", "holds the pixels of train-volume.tif"),
    ("turned.tif", "--image_path turned.tif", "holds the pixels of turned.tif"),
    ("turned.tif", "", "look like gray values of an image"),
)
def test_a_raw_image_given_as_a_prediction_is_warned_of(challenge, capsys, prediction, flags, words):
    for name, stack in (("some", challenge[0][1:4]), ("turned", challenge[0][::-1])):
        tifffile.imwrite(f"{name}.tif", stack, photometric="minisblack")
    evaluate(["--prediction", prediction, "--mask_path", "train-labels.tif", "--scores", "dice", *flags.split()])
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert sum(words in warning for warning in warnings) == 1


def test_the_table_shows_value_threshold_and_published_results(files, capsys, labelled):
    evaluate([*files(), "--sections", "2-5", "--scores", "v_rand,warping_error"])
    lines = capsys.readouterr().out.splitlines()
    row = next(line for line in lines if line.startswith("V_rand"))
    curve = scores.v_rand(labelled[0][2:], labelled[1][2:])
    span = rf"{min(curve.per_section):.5f} \.\. {max(curve.per_section):.5f}"
    assert re.search(
        rf"V_rand +{curve.value:.5f} +higher +{curve.threshold:.1f} +{span} +0.97276 +0.98680 \(SFCNNs\)", row
    )
    assert any(line.startswith("Warping error") and "0.000353" in line for line in lines)
    assert "4 sections: 2-5" in lines
    for name, board in report.PUBLISHED.items():
        assert list(board.values()) == sorted(board.values(), reverse=evaluation.SCORES[name].higher_is_better)


def test_the_raw_images_are_not_written_over_even_with_force(files, labelled):
    tifffile.imwrite("raw.tif", labelled[1], photometric="minisblack")
    flags = [*files(), "--image_path", "raw.tif", "--json", "raw.tif", "--force"]
    refused("--json must not be an input", evaluate, flags)


def test_the_raw_images_may_have_channels(files, labelled):
    two, flags = np.stack([labelled[1], 255 - labelled[1]], axis=1), files()
    tifffile.imwrite("raw.tif", two, imagej=True, metadata={"axes": "ZCYX"})
    evaluate([*flags, "--scores", "dice", "--image_path", "raw.tif", "--channel", 1, "--report", "r"])


def test_scores_of_cells_have_the_numbers_of_their_sections(files, labelled):
    cells = np.stack([segments.components(section > 0) for section in labelled[1]]).astype(np.uint16)
    found = numbers([*files(cells, cells), "--instances", "--sections", "2,4"])
    assert (found["sections"], [one["section"] for one in found["per_section"]]) == ([2, 4], [2, 4])
    cells[2] = 0
    found = numbers([*files(cells, cells), "--instances", "--sections", "2,4"])
    assert (found["sections"], [one["section"] for one in found["per_section"]]) == ([2, 4], [4])


def test_the_raw_section_of_each_section_with_labels_is_shown(files, labelled, monkeypatch):
    shown, real = [], report.section_pictures
    monkeypatch.setattr(report, "section_pictures", lambda *given: shown.append(given[-1]) or real(*given))
    labels, flags = labelled[1] // 255 + 1, files()
    labels[1] = 0
    tifffile.imwrite("l.tif", labels, photometric="minisblack")
    tifffile.imwrite("raw.tif", np.arange(6 * 64 * 80, dtype=np.uint16).reshape(6, 64, 80))
    evaluate([*flags, "--ignore_label", 0, "--image_path", "raw.tif", "--report", "r", "--scores", "dice"])
    assert sorted(raw[0, 0] // (64 * 80) for raw in shown) == [0, 2, 3, 4, 5]
