"""Rows are command lines; runs are found, resumed and never repeated; tables say what was and was not reproduced."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from conftest import ROOT, call_here, cases, with_ctrl_c

import dilatedUnet
from files.atomic import locked
from studies import records, reproduce, rows, verdicts

GOOD = {"loss": 0.06, "val_loss": 0.1, "dice": 0.985, "val_dice": 0.979}
SCORES = {"v_rand": 0.96, "v_info": 0.98, "dice": 0.95, "bce": 0.12, "pixel_error": 0.05}
TABLES = [(name, None) for name in rows.TABLES] + [("study", factor) for factor in rows.FACTORS]
ONE = ("table", "--only", "unet", "--seeds", 1)
COMMITTED = Path("results/table.json")


def tables(quick):
    return [rows.select(name, factor, quick) for name, factor in TABLES]


def settings(row):
    return rows.settings_of(dilatedUnet.parse, (*row.argv, "--protocol", row.protocols[0]))


class Suite:
    """Stands in for training: leaves the record that a run of the command line would leave, and counts.

    By the name of a row: columns of its history, and scores, or functions of the flags that give them; where it stops.
    """

    def __init__(self, values=None, scores=None, stop=None):
        self.calls, self.values, self.scores, self.stop = [], values or {}, scores or {}, stop or {}

    def __call__(self, argv, watch=None):
        args = dilatedUnet.parse(argv)
        folder = Path(args.run_dir)
        self.calls.append(folder.name)
        row = re.split("-(?:published|holdout|kfold)", folder.name)[0]
        stop, found = self.stop.get(row, 0), [table.get(row, {}) for table in (self.values, self.scores)]
        if isinstance(stop, Exception):
            raise stop
        if stop in (0, 130):
            write(args, folder, *(one(args) if callable(one) else one for one in found), finished=not stop)
        return stop


def write(args, folder, values, scores, *, finished=True):
    """run.json and history.csv as a training writes them; half-way there is a history, and no scores."""
    settings = {key: value for key, value in vars(args).items() if key not in ("run", "argv", "verb", "epochs")}
    record = {
        **{"argv": args.argv, "command": "python dilatedUnet.py ...", "settings": settings, "epochs": args.epochs},
        **{"finished": finished, "commit": "0123456789abcdef", "precision": "bfloat16", "data": {"image_sha256": "aa"}},
        "versions": {"python": "3.12.1", "backend": "tensorflow", "keras": "3.15.1", "numpy": "2"},
        "hardware": {"device": "Testing Machine, 2 cores", "cores": 2},
        "receptive_field_px": 100 + 50 * args.dilate + 20 * args.dilate_rate,
    }
    if finished:
        part = "training_sections" if args.protocol == "published" else "held_out"
        record |= {"training_seconds": 120.0, "final": {"loss": 9.0}}
        record[part] = {"sections": [24], "degenerate": None, "curves": {"v_rand": [1, 2]}} | SCORES | scores
        if args.merge:
            record[f"{part}_merged"] = record[part]
    # four epochs that fall, the best validation loss in the third; `values` may hold whole columns
    columns = {"epoch": [1, 2, 3, 4], "update": [0] * 4, "learning_rate": [0.1] * 4}
    for key, v in (GOOD | values).items():
        columns[key] = v if isinstance(v, list) else [v + 1, v + 0.5, v, v + 0.5]
    lines = [columns, *zip(*columns.values(), strict=True)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "history.csv").write_text("".join(",".join(map(str, line)) + "\n" for line in lines))
    (folder / "run.json").write_text(json.dumps(record))


@pytest.fixture
def reproduced(tmp_path, monkeypatch, capsys):
    """`reproduce ...` in a folder of its own; returns exit code, stdout, stderr and the runs that were started."""
    monkeypatch.chdir(tmp_path)

    def call(*words, suite=None):
        suite = suite or Suite()
        suite.calls.clear()
        monkeypatch.setattr(reproduce, "in_own_process", suite)
        return (*call_here(capsys, "reproduce", *words), list(suite.calls))

    return call


def change_record(name, change):
    """Edit the run.json of a run of the table."""
    path = Path("runs/reproduce/table") / name / "run.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def kept(row):
    """{protocol, fold and seed: result} of a row, in the file of records."""
    return json.loads(COMMITTED.read_text())["rows"][row]


def cells(out, row, metric):
    """The line of a row's metric in the first table."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("| ")]
    return next(line for line in lines if line[0] == row and line[2].startswith(metric))


@pytest.mark.parametrize("quick", [False, True])
def test_every_row_is_a_command_line_of_the_suite_and_says_what_it_costs(quick):
    for table in tables(quick):
        jobs = rows.jobs_of(table, 2, None, None)
        assert {job.row.name for job in jobs} == {row.name for row in table.rows}
        for job in jobs:
            parsed = dilatedUnet.parse(job.command(Path("runs/x")))
            assert (parsed.protocol, parsed.seed, parsed.resume) == (job.protocol, job.seed, True)
            assert "2 CPU cores" in rows.cost_words(job.row, settings(job.row), quick)


def test_the_committed_records_are_those_of_their_rows():
    """What a row's command line resolves to today is what its committed runs were made with."""
    kept, matched = {}, set()
    for table in tables(True) + tables(False):
        plan = rows.Plan(table, rows.jobs_of(table, 5, None, None), dilatedUnet.parse, None, {})
        kept |= records.committed(ROOT / "results", table)
        for job in plan.jobs:
            if job.name in kept:
                assert not records.difference(plan, job, kept[job.name]["settings"]), job.name
                matched.add(job.name)
    assert matched == set(kept) != set()


def test_the_published_rows_are_the_published_commands_values_and_costs():
    by_name = {row.name: row for row in rows.table_rows(quick=False).rows}
    common = "--lr 0.00001 --max_lr 0.01 --epochs 500"
    published = {
        "unet": ("--dilate_rate 1 --dilate 0 --addition 1", [0.056, 0.106, 0.985, 0.979]),
        "dilated": ("--dilate_rate 2 --dilate 1 --addition 1", [0.057, 0.111, 0.985, 0.978]),
        "unet-a": ("--dilate_rate 1 --dilate 0 --addition 0", [0.073, 0.0864, 0.981, 0.980]),
        "dilated-a": ("--dilate_rate 2 --dilate 1 --addition 0", [0.0579, 0.114, 0.985, 0.978]),
    }
    for name, (words, values) in published.items():
        assert " ".join(by_name[name].argv) == f"{common} {words}"
        assert list(by_name[name].published.values()) == values
    meant = {"optimizer": "rmsprop", "step_size": 2000, "steps_per_epoch": 10, "batch_size": 3, "window": 512}
    meant |= {"clr_mode": "triangular", "loss": "bce_dice", "patience": 300}
    assert meant.items() <= settings(by_name["unet"]).items()
    # 5 000 updates of 3 windows, and after each of 500 epochs 30 windows at a third: 20 000 windows of 0.70 s
    row = rows.select("table", None, False).rows[0]
    found = settings(row)
    assert rows.equivalent_windows(found) == pytest.approx(20000)
    assert rows.equivalent_windows(found | {"window": 256}) == pytest.approx(5000)
    assert rows.equivalent_windows(found | {"filters": [88, 176, 352]}) == pytest.approx(80000)
    assert f"{20000 * 0.70 / 3600:.1f} hours" in rows.cost_words(row, found, quick=False)
    # strong: 4 000 updates of as many pixels as one such window has, 0.37 s each, or 0.55 s
    row = rows.select("best", None, False).rows[0]
    strong = rows.equivalent_windows(settings(row))
    for (kind, blocks), seconds in zip(rows.RESIDUAL_BLOCKS.items(), (0.37, 0.55), strict=True):
        assert strong * rows.SECONDS_PER_WINDOW[kind] * blocks == pytest.approx(4000 * seconds, rel=0.05)
    words = f"{4000 * 0.37 / 3600:.1f} hours in bfloat16 (AMD EPYC) or {4000 * 0.55 / 3600:.1f} hours in float32"
    assert words in rows.cost_words(row, settings(row), quick=False)


BOTH = "dilate dilate_rate"
CHANGED = {
    "unet": {"dilate-alone": "dilate", "dilate_rate-alone": "dilate_rate", "dilated": BOTH, "unet-a": "addition"},
    "base": {"depth-3": "filters", "raw": "augment", "lr-1e-5": "lr", "lr-1e-3": "lr", "sgd": "optimizer"},
    "sgd": {"adamax": "optimizer"},
    "dilation-off": {"dilation-centre": "dilate", "dilation-encoder": "dilate_rate"},
    "sections-24": {"sections-2": "train_sections"},
    "best-standard": {"best-dilated": BOTH},
    "cells": {"cells-flat": "w0"},
}


AUGMENTED = {True: ("best", "best-broad", "all", "broad"), False: ("best", "best-all", "broad", "all")}


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("base", CHANGED)
def test_rows_differ_in_what_they_compare_and_in_nothing_else(base, quick):
    by_name = {row.name: settings(row) for table in tables(quick) for row in table.rows}
    for name, changed in CHANGED[base].items():
        found = {key for key, value in by_name[name].items() if value != by_name[base][key]}
        assert found == {*changed.split()}, name
    *names, ours, other = AUGMENTED[quick]
    ours, other = (by_name["best"] | {"augment": augment} for augment in (ours, other))
    assert [by_name[name] for name in names] == [ours, other]


def test_the_factors_of_the_poster_share_one_base_run_and_the_quick_best_is_the_recipe_of_start_py():
    table = rows.study_rows(quick=False)
    assert [factor.name for factor in table.factors] == ["depth", "augmentation", "lr", "optimizer"]
    assert len({row.name for row in table.rows}) == len(table.rows) == 7
    ours = settings(rows.best_rows(quick=True).rows[0])
    theirs = rows.settings_of(dilatedUnet.parse, ("--recipe", "quick"))
    assert {key for key in ours if ours[key] != theirs[key]} == {"protocol"}


def test_the_learning_curve_labels_1_2_5_10_and_24_sections_none_of_them_held_out():
    import data

    for row in rows.study_rows(quick=False, factor="sections").rows:
        chosen = data.parse_sections(settings(row)["train_sections"])
        split = data.split_sections(30, "holdout", inner=0, train_sections=chosen)
        assert len(split.train) == int(row.name.rpartition("-")[2])
        assert split.held_out == (24, 25, 26, 27, 28, 29)


def test_quick_runs_are_reduced_hold_whole_cycles_and_keep_their_promise():
    """At most 20 minutes a row of the table (1.0 s per 512 x 512 window on 2 cores), 40 for the four factors."""
    for quick, full in zip(tables(True), tables(False), strict=True):
        for row, whole in zip(quick.rows, full.rows, strict=True):
            s, f = settings(row), settings(whole)
            assert rows.equivalent_windows(s) < rows.equivalent_windows(f)
            if s["clr_mode"] == "triangular":
                assert s["epochs"] * s["steps_per_epoch"] % (2 * s["step_size"]) == 0
            if s["filters"] == [44, 88, 176]:
                assert rows.equivalent_windows(s) + 100 < 60 * row.minutes
                assert row.minutes * len(row.protocols) <= 20
    assert sum(row.minutes for row in rows.study_rows(quick=True).rows) <= 40
    assert sum(row.minutes for row in rows.unet2015_rows(quick=True).rows) <= 30


def test_the_rows_of_2015_have_the_papers_values_beside_them():
    by_name = {row.name: row for row in rows.unet2015_rows(quick=False).rows}
    paper = {"held_out_warping_error": 0.000353, "held_out_rand_error": 0.0382, "held_out_pixel_error": 0.0611}
    assert by_name["isbi"].published == paper
    assert by_name["cells"].published == by_name["cells"].target == {"held_out_mean_iou": 0.7756}
    found = settings(by_name["cells"]), settings(by_name["isbi-published"])
    assert (found[0]["instances"], found[0]["image_path"]) == (True, "dic-hela")
    published = ("optimizer", "momentum", "batch_size", "batch_norm", "padding", "tta")
    assert [found[1][key] for key in published] == ["sgd", 0.99, 1, False, "valid", "7"]


def test_rows_that_name_their_held_out_sections_are_not_folded_and_levels_that_are_not_alike_are_not_ranked(capsys):
    assert call_here(capsys, "reproduce", "study", "ladder", "--quick", "--folds", 5, "--list").code == 0
    records = ROOT / "results"
    for factor, ranked in (("ladder", False), ("finetune", False), ("receptive", True)):
        out = call_here(capsys, "reproduce", "study", factor, "--quick", "--render", "--records", records).out
        assert ("Choose" in out) == ranked


@cases(
    "words, sentence",
    (["table", "lr"], "lr is a factor of study"),
    (["table", "--only", "unet", "nothing"], r"--only must name rows of table: unet, .*Received: nothing"),
    *((["table", "--seeds", value], f"--seeds: .*at most 100. Received: {value}") for value in (0, 20000000)),
    *((["table", "--folds", value], f"--folds: .*at least 2 .*Received: {value}") for value in (1, 1000000000)),
    *((["table", "--budget", value], f"--budget: .*above 0 .*Received: {value}") for value in ("0", "nan", "inf")),
    (["best", "--protocol", "published"], "--protocol must be one that best has. Received: published"),
    (["table", "--list", "--render"], "--render trains nothing"),
    (["table", "--missing", "--render"], "--render trains nothing"),
    *((["all", *words], "all is for --render") for words in ([], ["--render", "--collect"])),
    *((["all", "--render", *words], "go with one table") for words in (["--only", "x"], ["--quick"])),
    (["all", "lr", "--render"], "go with one table"),
    (["table", "--output", "README.md"], "README.md exists and is not a table written by reproduce"),
    (["table", "--records", "README.md"], "--records must be a folder. Received: README.md"),
    (["table", "--records", ".", "--force", "--output", "x/../table.json"], "--output must not be an input"),
    (["table", "--output", "README.md/x.md", "--force"], "README.md could not be written"),
    (["table", "--runs", "README.md/runs"], "README.md/runs/table could not be written"),
    (["table", "--output", "."], "exists and is not a table written by reproduce"),
    (["study", "lr", "--figures", "images"], "images/study-lr.png exists already"),
    (["best", "--figures", "images"], "--figures draws study and unet2015. Received: best"),
)
def test_bad_usage_is_one_sentence_and_exit_code_2_and_starts_nothing(reproduced, words, sentence):
    theirs = [Path("README.md"), Path("images/study-lr.png"), Path("table.json")]
    theirs[1].parent.mkdir()
    for path in theirs:
        path.write_text("# mine\n")
    refused(reproduced, sentence, *words)
    assert [path.read_text() for path in theirs] == ["# mine\n"] * 3


def refused(reproduced, sentence, *words):
    code, out, err, calls = reproduced(*words)
    assert (code, out, calls, len(err.splitlines())) == (2, "", [], 1)
    assert re.search(sentence, err)


RESULT = json.loads((ROOT / "results/table-quick.json").read_text())["rows"]["unet"]["published-f0-s0"]
DAMAGED = [{key: value} for key in ("settings", "metrics", "history") for value in (None, 3, [1])]
DAMAGED += [{"metrics": {"loss": "low"}}, {"metrics": {"loss": math.nan}}, {"history": {"loss": ["a"], "epoch": [1]}}]
DAMAGED += [{"history": {"loss": 3}}, {"versions": None}, {"minutes": "long"}, {"finished": False}, {"parameters": [1]}]
DAMAGED += [{"history": {"loss": [1, 2], "epoch": [1]}}, {"degenerate": 3}, {"minutes": 10**400}]


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"rows": 3}', '{"table": "table"}', '{"rows": {"unet": 3}}', '{"rows": ' * 100_000, "\0\xff"]
    + [json.dumps({"rows": {"unet": {"published-f0-s0": RESULT | damage}}}) for damage in DAMAGED],
)
def test_a_damaged_file_of_records_is_refused_in_one_sentence_before_any_run(reproduced, text):
    COMMITTED.parent.mkdir()
    COMMITTED.write_text(text)
    for flag in ("--render", "--collect"):
        refused(reproduced, "results/table.json", "table", flag)


def test_the_commands_are_listed_with_their_cost_and_every_row_fold_and_seed_is_a_run_in_its_own_folder(reproduced):
    code, out, _, calls = reproduced(*ONE, "--list")
    assert (code, calls) == (0, [])
    assert re.search(r"# unet-published-f0-s0: about 6 minutes on one H200.*2 CPU cores 3\.9 hours", out)
    command = next(line for line in out.splitlines() if "--protocol holdout" in line)
    assert "--run_dir runs/reproduce/table/unet-holdout-f0-s0 " in command
    assert dilatedUnet.parse(command.split()[2:]).protocol == "holdout"
    calls = reproduced("table", "--only", "unet", "dilated", "--seeds", 2, "--folds", 2)[3]
    parts = [f"{row}-published-f0" for row in ("unet", "dilated")]
    parts += [f"{row}-kfold2-f{fold}" for row in ("unet", "dilated") for fold in (0, 1)]
    assert calls == [f"{part}-s{seed}" for seed in (0, 1) for part in parts]
    assert sorted(path.name for path in Path("runs/reproduce/table").iterdir()) == sorted(calls)
    calls = reproduced("study", "sections", "--folds", 3, "--seeds", 1)[3]
    assert calls == [f"sections-{n}-holdout-f0-s0" for n in (1, 2, 5, 10, 24)], "they name their training sections"


def test_finished_runs_are_not_repeated_and_quick_ones_are_others(reproduced):
    assert len(reproduced(*ONE)[3]) == 2
    code, out, err, calls = reproduced(*ONE)
    assert (code, calls) == (0, [])
    assert "0 of 2 runs to go" in err
    assert "2 runs, 4 minutes of training" in out
    assert len(reproduced(*ONE[:3], "--seeds", 2)[3]) == 2, "the other seed"
    quick = reproduced("table", "--quick", "--only", "unet")[3]
    assert quick == ["unet-published-f0-s0-quick", "unet-holdout-f0-s0-quick"]


def test_a_half_finished_run_is_shown_with_its_epoch_not_judged_and_resumed_in_its_folder(reproduced):
    words = (*ONE, "--protocol", "published")
    reproduced(*words, "--collect", suite=Suite(stop={"unet": 130}))
    result = kept("unet")["published-f0-s0"]
    assert (result["finished"], result["epoch"], result["metrics"]["val_loss"]) == (False, 4, 0.1)
    for runs in ("runs/reproduce", "elsewhere"):  # from its folder, and in a fresh clone
        code, out, _, _ = reproduced(*words, "--render", "--runs", runs)
        assert code == 1
        assert cells(out, "unet", "val loss")[4:7] == ["0.1000", "± 0.03", "not judged: epoch 4 of 500"]
        assert re.search(r"- unet-published-f0-s0: .*epoch 4 of 500 \(missing\)", out)
    assert reproduced(*words, "--missing")[3] == ["unet-published-f0-s0"]
    assert "finished" not in kept("unet")["published-f0-s0"]


def up_to(epochs):
    """The columns of a history of so many epochs."""
    columns = {"update": 0, "learning_rate": 0.1} | GOOD
    return {"epoch": list(range(1, epochs + 1))} | {key: [value] * epochs for key, value in columns.items()}


def test_of_half_finished_runs_the_one_that_has_come_furthest_is_shown(reproduced):
    words = ("table", "--only", "unet", "--protocol", "published", "--seeds", 3)
    reproduced(*words, suite=Suite({"unet": lambda args: up_to((2, 4, 3)[args.seed])}))
    for seed in range(3):
        change_record(f"unet-published-f0-s{seed}", lambda record: record.update(finished=False))
    found = cells(reproduced(*words, "--render")[1], "unet", "train loss")
    assert found[4:7] == ["0.0600", "± 0.03", "not judged: epoch 4 of 500"]


@pytest.mark.parametrize("change", [{"epochs": 10}, {"dilate_rate": 3}, {"filters": [1, 2]}])
def test_a_run_with_other_settings_counts_as_missing_and_is_left_alone(reproduced, change):
    reproduced(*ONE)
    (setting,) = change
    change_record("unet-holdout-f0-s0", lambda r: (r if setting in r else r["settings"]).update(change))
    code, out, err, calls = reproduced(*ONE)
    assert (code, calls) == (1, [])
    assert re.search(rf"unet-holdout-f0-s0 .*other settings \(--{setting} was .*\): move it away", err)
    assert "unet-holdout-f0-s0: " in out


def test_where_and_on_what_a_run_was_made_or_a_flag_that_is_younger_does_not_make_it_another(reproduced):
    def older(record):
        record["settings"] |= dict.fromkeys(("precision", "tensorboard", "run_dir", "steps_per_execution", "gpu"), "x")
        del record["settings"]["ema"], record["settings"]["gap"]

    reproduced(*ONE)
    change_record("unet-holdout-f0-s0", older)
    assert reproduced(*ONE)[3] == []
    change_record("unet-holdout-f0-s0", lambda record: record["settings"].pop("max_lr"))
    assert "other settings (--max_lr was 0.0005, is 0.01)" in reproduced(*ONE)[2]


@cases("text", "", "[]", "{}", '{"settings": 3, "epochs": 1}', '{"settings": {', '{"settings": ' * 100_000)
def test_a_broken_record_counts_as_missing_and_stops_nothing(reproduced, text):
    folder = Path("runs/reproduce/table/unet-holdout-f0-s0")
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(text)
    code, out, err, calls = reproduced(*ONE)
    assert (code, calls) == (1, ["unet-published-f0-s0"])
    assert "unet-holdout-f0-s0 cannot run: " in err
    assert "is not a run record" in out


def test_a_history_that_lacks_the_last_epochs_of_its_run_is_not_taken_for_all_of_it(reproduced):
    reproduced(*ONE)
    folder = Path("runs/reproduce/table/unet-holdout-f0-s0")
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | {"final": {"loss": 9.0, "epoch": 4}}))
    assert "cannot run" not in reproduced(*ONE)[2]
    (folder / "run.json").write_text(json.dumps(record | {"final": {"loss": 9.0, "epoch": 5}}))
    assert "it ends with epoch 5, history.csv with 4" in reproduced(*ONE)[2]


@cases("text", "", "epoch,loss\n", "epoch,loss\n1\n")
def test_a_history_that_is_cut_off_is_named(reproduced, text):
    reproduced(*ONE)
    folder = Path("runs/reproduce/table/unet-holdout-f0-s0")
    (folder / "history.csv").write_text(text)
    err = reproduced(*ONE)[2]
    assert f"cannot run: {folder}/history.csv is cut off or damaged: move the folder away" in err


def test_a_history_without_validation_has_no_such_columns(tmp_path):
    (tmp_path / "history.csv").write_text("epoch,loss,val_loss\n1,0.5,\n2,0.4,\n")
    assert records.read_history(tmp_path / "history.csv") == {"epoch": [1, 2], "loss": [0.5, 0.4]}


def test_a_run_that_changed_its_machine_names_both_and_the_epoch_between(tmp_path):
    first, second = ({"hardware": {"device": device}, "precision": p} for device, p in (("A", "bfloat16"), ("B", "x")))
    sittings = [first | {"from_epoch": 0}, first | {"from_epoch": 2}, second | {"from_epoch": 3}]
    assert records.ran_on(second | {"sittings": sittings}) == "A in bfloat16, after epoch 3 B"
    assert records.ran_on(first) == "A"


def test_what_starts_from_the_shipped_network_says_where_it_must_run(reproduced):
    refused(reproduced, "study starts from weights/isbi2012: run it in", "study", "finetune", "--quick")


def test_ctrl_c_starts_no_other_run_and_the_same_command_goes_on(reproduced):
    code, out, err, calls = reproduced("table", "--seeds", 1, suite=Suite(stop={"unet-a": 130}))
    assert code == 130
    assert calls == ["unet-published-f0-s0", "dilated-published-f0-s0", "unet-a-published-f0-s0"]
    assert "interrupted in unet-a-published-f0-s0: the same command goes on" in err
    assert "| unet |" in out
    calls = reproduced("table", "--seeds", 1)[3]
    assert (calls[0], len(calls)) == ("unet-a-published-f0-s0", 10)


def test_of_two_at_once_none_trains_the_others_row_or_loses_its_record(reproduced, monkeypatch):
    with locked("runs/reproduce/table/unet-published-f0-s0.row"):
        code, _, err, calls = reproduced(*ONE)
    assert (code, calls) == (1, ["unet-holdout-f0-s0"])
    assert "unet-published-f0-s0 is left to another process" in err
    """It has trained the second run before it is our turn."""

    class Both(Suite):
        def __call__(self, argv, watch=None):
            super().__call__([word.replace("published", "holdout") for word in argv])
            self.calls.pop()
            return super().__call__(argv)

    assert reproduced(*ONE, "--runs", "shared", suite=Both())[3] == ["unet-published-f0-s0"]
    """Another process has the file for a moment, and adds a record meanwhile."""
    reproduced("table", "--only", "dilated", "--seeds", 1, "--collect")
    theirs = COMMITTED.read_text()
    COMMITTED.unlink()
    with ExitStack() as lock:
        lock.enter_context(locked(COMMITTED))
        monkeypatch.setattr(records.time, "sleep", lambda _: COMMITTED.write_text(theirs) and lock.close())
        reproduced(*ONE, "--collect")
    assert kept("dilated")
    assert kept("unet")


CHILD = """
import pathlib, signal, sys, time
for number in (signal.SIGTERM, signal.SIGINT):  # the latter is ignored by what a shell runs in the background
    signal.signal(number, signal.default_int_handler)
folder = pathlib.Path(sys.argv[sys.argv.index("--run_dir") + 1]); folder.mkdir(parents=True, exist_ok=True)
(folder / "started").touch()
try:
    for epoch in range(1, 100):
        time.sleep(0.15)
        (folder / "history.csv").write_text("epoch\\n" + "1\\n" * epoch)
        (folder / "checkpoint.npz").write_text(str(epoch))
except KeyboardInterrupt:
    time.sleep(0.5)
    (folder / "saved").touch()
    sys.exit(130)
"""


@pytest.fixture
def child(tmp_path, monkeypatch):
    """A training that only counts epochs; its script."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce, "SUITE", tmp_path / "child.py")
    reproduce.SUITE.write_text(CHILD)
    return reproduce.SUITE


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_sigterm_reach_the_run_which_is_waited_for(child, tmp_path, number, code):
    """A terminal sends Ctrl-C to the whole process group, a batch system SIGTERM perhaps to the parent alone."""
    words = f"import sys; from files import shell; from studies import reproduce as r; r.SUITE = {str(child)!r}\n"
    words += "sys.exit(shell.ends(lambda: r.in_own_process(['--run_dir', 'run'])))"
    options = {"cwd": tmp_path, "env": {"PYTHONPATH": str(ROOT)}, "start_new_session": True, "preexec_fn": with_ctrl_c}
    parent = subprocess.Popen([sys.executable, "-c", words], **options)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "run/started").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.2)
        (os.killpg if number == signal.SIGINT else os.kill)(parent.pid, number)
        assert parent.wait(timeout=60) == code
        assert (tmp_path / "run/saved").exists(), "the child had time to save"
    finally:
        parent.kill()


def test_the_budget_ends_a_run_after_an_epoch_in_words(child, capsys):
    code, _, err = call_here(capsys, "reproduce", *ONE, "--budget", 3 / 3600)
    folder = Path("runs/reproduce/table/unet-published-f0-s0")
    assert code == 130
    assert re.search(r"the budget of .* hours is used up in unet-published-f0-s0: the same command goes on", err)
    assert (folder / "checkpoint.npz").exists()
    assert not Path("runs/reproduce/table/unet-holdout-f0-s0").exists()


@cases("epochs, late", (3, [False, False, True]), (2, [False, False, False]))
def test_a_run_stops_after_an_epoch_when_no_other_fits_but_ends_after_its_last(tmp_path, monkeypatch, epochs, late):
    """Epochs of 10 s, and 25 s of time."""
    clock, found = Mock(return_value=0), []
    monkeypatch.setattr(reproduce, "time", SimpleNamespace(monotonic=clock))
    watch = reproduce.Watch(tmp_path, epochs, deadline=25)
    for clock.return_value, done in ((9, 0), (10, 1), (20, 2)):
        if done:
            (tmp_path / "history.csv").write_text("epoch\n" + "1\n" * done)
            (tmp_path / "checkpoint.npz").touch()
            os.utime(tmp_path / "checkpoint.npz", (done, done))
        found.append(watch())
    assert (found, watch.late) == (late, late[-1])
    assert [reproduce.Watch(tmp_path, epochs, deadline).late for deadline in (20, 21)] == [True, False]


def test_a_run_is_the_suite_in_a_process_of_its_own_with_jax_s_compilations_kept(child, monkeypatch):
    given = "JAX_COMPILATION_CACHE_DIR"
    child.write_text(
        f"import os, sys\nprint(*sys.argv[1:], os.environ.get('{given}'), file=open('said', 'w'))\nsys.exit(3)"
    )
    monkeypatch.delenv(given, raising=False)
    for name, value, expected in (
        ("KERAS_BACKEND", "tensorflow", "None"),
        ("KERAS_BACKEND", "jax", str(reproduce.JAX_CACHE)),
        (given, "mine", "mine"),
    ):
        monkeypatch.setenv(name, value)
        assert reproduce.in_own_process(["--lr", "0.1"]) == 3
        assert Path("said").read_text() == f"--lr 0.1 {expected}\n"
    monkeypatch.delenv(given)
    monkeypatch.setattr(reproduce, "JAX_CACHE", Path("~/.cache"))  # of a user without a home folder
    assert (reproduce.in_own_process([]), Path("said").read_text()) == (3, "None\n")


def rising(step=0.001, **first):
    """Values that rise from seed to seed."""
    return lambda args: {key: value + step * args.seed for key, value in first.items()}


def near(published):
    return rising(**dict(zip(GOOD, published, strict=True)))


def all_near():
    return {name: near(values) for name, (_, values) in rows.ROWS_2017.items() if values}


@cases(
    "row, value, verdict",
    ("unet-a", 0.0864, "within"),
    ("unet-a", 0.2, "MISSED, above by 0.115"),
    ("unet", 0.01, "MISSED, below by 0.095"),
)
def test_a_row_that_misses_its_tolerance_on_either_side_is_named_with_exit_code_1(reproduced, row, value, verdict):
    values = all_near()
    loss, _, *dices = rows.ROWS_2017[row][1]
    code, out, err, _ = reproduced("table", suite=Suite(values | {row: near((loss, value, *dices))}))
    assert (cells(out, row, "val loss")[6], cells(out, row, "train loss")[6]) == (verdict, "within")
    missed = verdict.startswith("MISSED")
    assert code == missed
    assert re.findall("not reproduced: .*", err) == [f"not reproduced: {row}: val loss {verdict}"] * missed


def test_the_tolerance_is_the_prediction_interval_below_the_one_that_is_stated(reproduced):
    """Each of four rows has values 0, 1 and 2 thousandths apart: s = 0.001 with 8 degrees of freedom, n = 3."""
    from scipy import stats

    out = reproduced("table", suite=Suite(all_near()))[1]
    expected = stats.t.ppf(0.975, 8) * 0.001 * (1 + 1 / 3) ** 0.5
    assert cells(out, "unet", "val loss")[3:6] == ["0.106", "0.1070 ± 0.0010 (3)", f"± {expected:.2g}"]
    assert cells(out, "dilate-alone", "val loss")[3:] == ["-", "0.1000 ± 0.0000 (3)", "-", "", "0.1000 ± 0.0000 (3)"]
    noisy = dict.fromkeys(rows.ROWS_2017, rising(0.1, val_loss=0.1))
    out = reproduced("table", "--runs", "noisy", suite=Suite(noisy))[1]
    assert cells(out, "unet", "val loss")[5:7] == ["± 0.03", "MISSED, above by 0.094"]
    code, out, _, _ = reproduced("table", "--seeds", 1, "--runs", "one", suite=Suite(all_near()))
    assert code == 0
    assert [cells(out, "unet", metric)[5] for metric in ("val loss", "val Dice")] == ["± 0.03", "± 0.01"]


def test_the_values_are_those_of_the_epoch_whose_weights_were_kept_like_beside_like(reproduced):
    values = {"loss": [0.4, 0.3, 0.2, 0.1], "val_loss": [0.5, 0.2, 0.3, 0.4], "val_dice": [0.1, 0.97, 0.2, 0.3]}
    out = reproduced(*ONE, suite=Suite({"unet": values}))[1]
    assert cells(out, "unet", "train loss")[4] == "0.3000"
    assert cells(out, "unet", "val Dice (soft)")[4::3] == ["0.9700", "0.9700"], "not the held-out Dice at 0.5, 0.95"
    assert records.best_epoch({"loss": values["loss"]}) == -1, "without validation the last weights were kept"


def test_held_out_scores_stand_beside_with_their_spread_over_seeds_and_folds(reproduced):
    scores = {"unet": lambda args: {"v_rand": 0.9 + 0.02 * (args.fold or 0) + 0.001 * args.seed}}
    words = ("table", "--only", "unet", "--seeds", 2, "--folds", 2)
    out = reproduced(*words, suite=Suite(scores=scores))[1]
    assert "| unet | 500 x 10 updates of 3 windows of 512 px | 4 |" in out
    assert "| 0.9105 ± 0.0116 |" in out
    assert "| unet | V_rand | 0.9005 ± 0.0007 (2) | 0.9205 ± 0.0007 (2) | 0.9105 ± 0.0116 (4) |" in out
    assert "false borders" not in out
    for folder in Path("runs/reproduce/table").glob("unet-kfold*"):
        change_record(folder.name, lambda record: record.update(held_out_merged={"v_rand": 0.97, "v_info": 0.98}))
    out = reproduced(*words, suite=Suite(scores=scores))[1]
    assert "| unet | V_rand, false borders taken away | 0.9700 ± 0.0000 (2) | 0.9700 ± 0.0000 (2) |" in out


def test_a_finished_run_without_the_number_is_not_reproduced(reproduced):
    reproduced(*ONE)
    Path("runs/reproduce/table/unet-published-f0-s0/history.csv").unlink()
    code, _, err, _ = reproduced(*ONE)
    assert (code, "unet: val loss no value" in err) == (1, True)
    assert "train loss MISSED" in err, "the 9.0 of the record's last epoch"


def dilation(effect):
    """V_rand of the dilated rows differs by `effect`, plus a little that differs from seed to seed."""
    base, other = rising(0.01, v_rand=0.95), rising(0.0102, v_rand=0.9498 + effect)
    return Suite(all_near(), {"unet": base, "unet-a": base, "dilated": other, "dilated-a": other})


@cases(
    "effect, seeds, verdict",
    (0.0, 3, "confirmed"),
    (0.003, 3, "confirmed"),
    (-0.02, 3, "refuted"),
    (-0.02, 2, "too few runs"),
)
def test_the_2017_conclusion_is_judged_by_paired_differences_not_by_the_spread(reproduced, effect, seeds, verdict):
    out = reproduced("table", "--seeds", seeds, suite=dilation(effect))[1]
    assert re.search(rf"\| dilated against standard \| V_rand [^|]*\| [^|]* {seeds} seeds \| 0\.005 \| {verdict}", out)


def test_the_study_says_of_each_conclusion_whether_it_was_confirmed(reproduced):
    def falling(args):
        return {"loss": [1.0, 0.8, 0.6, 0.4 - 0.001 * args.seed], "val_loss": [1.0, 0.9, 0.7, 0.5 + 0.001 * args.seed]}

    def stagnant(args):
        return {"loss": [1.0, 0.9, 0.8, 0.7 - 0.001 * args.seed], "val_loss": [1.0, 0.9, 0.9, 0.89 + 0.001 * args.seed]}

    for base, other, verdict in ((falling, stagnant, "confirmed"), (stagnant, falling, "not confirmed")):
        out = reproduced("study", "depth", "--runs", verdict, suite=Suite({"base": base, "depth-3": other}))[1]
        assert re.findall(r"^\| (?:with depth|depth 4 ends).*\| (.*) \|$", out, re.M) == [verdict] * 3


@cases("values", up_to(3), {"val_loss": [1.0, 0.5, 0.1, 0.0]})
def test_a_history_too_short_or_not_above_zero_is_not_judged(reproduced, values):
    names = {row.name for row in rows.study_rows(quick=False).rows}
    code, out, _, _ = reproduced("study", suite=Suite(dict.fromkeys(names, values)))
    assert (code, out.count("| - | too few runs |")) == (0, sum(map(len, verdicts.CONCLUSIONS.values())))


def scored(row, score):
    return Suite(scores={row: score})


def fold(score):
    return lambda args: {"v_rand": score + 0.001 * (args.fold - 2), "v_info": 0.99}


LOW = "Dice 0.870 is no better than 'always interior'"
GOOD_ADAMAX, BEST = scored("adamax", rising(v_rand=0.97)), "best --only best"
NEAR_ADAMAX = scored("adamax", rising(0.01, v_rand=0.951))
FALLING = scored("sections-24", rising(0.0001, v_rand=0.9))


@cases(
    "words, suite, code, said",
    ("table", Suite(stop={"dilated": 2}), 1, "- dilated: no run of published-f0-s0, .*ed-published-f0-s0 failed with"),
    ("table --only unet", scored("unet", {"degenerate": LOW}), 1, f"not reproduced: unet-holdout-f0-s0: {LOW}"),
    ("study optimizer", scored("sgd", {"degenerate": LOW}), 0, f"- sgd-holdout-f0-s0: {LOW}"),
    (BEST, scored("best", fold(0.985)), 0, "best: mean V_rand, false borders taken away 0.9850 reaches the target of"),
    (BEST, scored("best", fold(0.98)), 1, "not reproduced: best: mean V_rand, false borders taken away 0.9800 misses"),
    ("study optimizer", GOOD_ADAMAX, 0, "Choose by cost: Adamax [^\n]* rests on too few runs"),
    ("study optimizer --seeds 3", GOOD_ADAMAX, 0, r"Choose Adamax: [^\n]* is ahead of SGD.* The study chose Adamax\."),
    ("study optimizer --seeds 3", NEAR_ADAMAX, 0, "Choose by cost: Adamax [^\n]* is within noise"),
    ("study sections --seeds 3", FALLING, 0, r"from 10 to 24 sections V_rand changes by -0\.0.*: confirmed"),
)
def test_what_failed_learned_nothing_reached_its_target_or_is_best_is_said(reproduced, words, suite, code, said):
    found = reproduced(*words.split(), *([] if "--seeds" in words else ["--seeds", 1]), suite=suite)
    assert found[0] == code
    assert re.search(said, found[1] + found[2], re.DOTALL)


def test_levels_are_ranked_by_the_seeds_that_all_of_them_have(reproduced):
    """Two more seeds of one level, both easy ones, do not make it the first."""
    scores = {row: rising(v_rand=v_rand) for row, v_rand in (("base", 0.90), ("raw", 0.85))}
    reproduced("study", "augmentation", "--seeds", 3, suite=Suite(scores=scores))
    scores = {"raw": lambda args: {"v_rand": 0.85 if args.seed < 3 else 0.99}}
    suite = Suite(scores=scores, stop={"base": 2})
    out = reproduced("study", "augmentation", "--seeds", 5, suite=suite)[1]
    assert "Choose augmented: its held-out V_rand, 0.9010 ± 0.0010 (3), is ahead of raw by +0.0500" in out


def test_a_target_is_judged_by_all_the_runs_that_are_planned(reproduced):
    words = ("best", "--only", "best", "--seeds", 1)
    assert reproduced(*words, suite=scored("best", fold(0.99)))[0] == 0
    Path("runs/reproduce/best/best-kfold5-f0-s0").rename("elsewhere")
    code, out, _, _ = reproduced(*words, "--render")
    so_far = "mean V_rand, false borders taken away 0.9905 in 4 of 5 runs; the target of 0.985 is for all"
    assert (code, so_far in out, "reaches" in out) == (1, True, False)


def test_runs_that_start_from_other_weights_of_the_same_name_are_told_apart(reproduced):
    Path("weights").mkdir()
    Path("weights/isbi2012.weights.h5").touch()
    words = ("study", "finetune", "--seeds", 2)
    records_of = lambda: sorted(Path("runs/reproduce/study").glob("finetune-1-*/run.json"))  # noqa: E731
    said = []
    for digests in ("", "aa", "ab"):
        said.append("**The runs do not start from one network.**" in reproduced(*words)[1])
        for digest, path in zip(digests, records_of(), strict=False):
            record = json.loads(path.read_text()) | {"init_from": {"weights": "w", "sha256": digest}}
            path.write_text(json.dumps(record))
    said.append("**The runs do not start from one network.**" in reproduced(*words, "--collect")[1])
    assert said == [False, False, False, True]
    assert '"init_from":"b"' in Path("results/study.json").read_text()


def test_cells_are_compared_by_their_mean_iou_and_the_learning_curve_by_what_more_sections_bring(reproduced):
    scores = {"cells": rising(mean_iou=0.84), "cells-flat": rising(mean_iou=0.8)}
    code, out, _, _ = reproduced("unet2015", suite=Suite(scores=scores))
    assert code == 0
    assert "Choose w0 = 10: its held-out mean IoU, 0.8410 ± 0.0010 (3)" in out
    assert "| the border weights | mean IoU (held-out) | +0.0400" in out
    assert "cells: mean mean IoU 0.8410 reaches the target of 0.7756" in out
    out = reproduced("study", "sections", suite=Suite(scores={"sections-24": rising(0.0001, v_rand=0.98)}))[1]
    assert re.search(r"- from 10 to 24 sections V_rand changes by \+0\.0201 \[.*: confirmed", out)
    assert re.search(r"- from 1 to 2 sections V_rand changes by \+0\.0000 .*: within noise", out)
    assert "- from 10 to 24 sections V_rand with false borders taken away changes by +0.0201 [" in out


def test_rendering_trains_nothing_and_names_what_is_missing(reproduced):
    code, out, _, calls = reproduced("table", "--render")
    assert (code, calls) == (1, [])
    assert "- unet: no run of published-f0-s0, holdout-f0-s0, published-f0-s1" in out
    reproduced(*ONE)
    code, out, _, calls = reproduced("table", "--render", "--seeds", 1)
    assert (code, calls) == (1, [])
    assert cells(out, "unet", "val loss")[4] == "0.1000"
    assert cells(out, "dilated", "val loss")[4:7] == ["-", "± 0.03", "no value"]
    assert "- unet: no run" not in out
    assert "- dilated: no run of published-f0-s0, holdout-f0-s0 (missing)" in out


def test_collected_records_render_the_same_table_in_a_fresh_clone_with_all_their_seeds(reproduced):
    words = ("table", "--folds", 2)
    reproduced(*words, "--seeds", 3, "--collect", suite=dilation(-0.02))
    before = reproduced(*words, "--render")[1]
    size = COMMITTED.stat().st_size
    Path("runs").rename("elsewhere")
    code, after, _, calls = reproduced(*words, "--render")
    assert (after, calls, code) == (before, [], 0)
    assert "(3)" in after
    assert size < 54 * 3000, "3 kB a run"
    assert "best.weights" not in COMMITTED.read_text()
    assert [*Path("results").iterdir()] == [COMMITTED]


def test_only_what_the_records_lack_is_trained_and_added_to_them(reproduced):
    words = ("table", "--only", "unet", "--seeds")
    reproduced(*words, 1, "--collect")
    Path("runs").rename("elsewhere")
    assert len(reproduced(*words, 1, suite=Suite(stop={"unet": 2}))[3]) == 2, "without --missing they stand in for none"
    listed = reproduced(*words, 2, "--missing", "--list")[1].splitlines()[::2]
    assert [line.split()[1] for line in listed] == ["unet-published-f0-s1:", "unet-holdout-f0-s1:"]
    _, out, _, calls = reproduced(*words, 2, "--missing")
    assert calls == ["unet-published-f0-s1", "unet-holdout-f0-s1"]
    assert "4 runs, 8 minutes" in out
    assert sorted(kept("unet")) == [f"{p}-f0-s{s}" for p in ("holdout", "published") for s in (0, 1)]
    COMMITTED.write_text(COMMITTED.read_text().replace('"step_size":2000', '"step_size":2001'))
    assert len(reproduced(*words, 1, "--missing")[3]) == 2, "the record of another recipe is none"


def test_collecting_where_nothing_was_trained_writes_no_record(reproduced):
    assert reproduced(*ONE, "--collect", suite=Suite(stop={"unet": 2}))[0] == 1
    assert not COMMITTED.exists()


def test_collecting_keeps_what_was_collected_before_and_one_line_per_run(reproduced):
    reproduced(*ONE, "--collect")
    first = COMMITTED.read_text().splitlines()
    Path("runs").rename("elsewhere")
    with pytest.raises(RuntimeError, match="power cut"):  # after a run whose records are there already
        reproduced("table", "--seeds", 1, "--collect", suite=Suite(stop={"unet-a": RuntimeError("power cut")}))
    assert {line.rstrip(",") for line in first} <= {line.rstrip(",") for line in COMMITTED.read_text().splitlines()}
    assert [*kept("dilated")] == ["published-f0-s0"]
    assert sorted(kept("unet")) == ["holdout-f0-s0", "published-f0-s0"]
    result = kept("unet")["holdout-f0-s0"]
    assert (result["device"], result["versions"]["keras"]) == ("Testing Machine, 2 cores", "3.15.1")
    assert result["metrics"]["held_out_v_rand"] == 0.96
    seen = kept("unet")["published-f0-s0"]["metrics"]
    assert seen["seen_v_rand"] == 0.96
    assert not [name for name in seen if name.startswith("held_out")], "its sections trained it"


def test_a_long_history_is_thinned_to_what_a_figure_shows():
    history = {"epoch": list(range(1, 501)), "loss": [float(i) for i in range(500)], "learning_rate": [0.1] * 500}
    found = records.thinned(history, best=333)
    assert len(found["epoch"]) <= records.POINTS + 2
    assert {1, 334, 500} <= set(found["epoch"])
    assert found == {"epoch": found["epoch"], "loss": [epoch - 1 for epoch in found["epoch"]]}
    assert records.thinned({}, -1) == {}


def test_the_committed_tables_are_what_the_committed_records_say(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    code, out, _ = call_here(capsys, "reproduce", "all", "--render")
    assert code in (0, 1)
    written = (ROOT / "results/README.md").read_text(encoding="utf-8")
    assert out == written, "reproduce all --render --output results/README.md"


def test_hardware_versions_a_mix_of_data_and_the_command_are_named_and_the_output_may_be_written_again(reproduced):
    out = reproduced(*ONE)[1]
    assert "on Testing Machine, 2 cores, bfloat16. python 3.12.1 keras 3.15.1" in out
    assert "Commit 0123456789." in out
    assert "one data set" not in out
    change_record("unet-holdout-f0-s0", lambda record: record["data"].update(image_sha256="bb"))
    assert "**The runs do not share one data set.**" in reproduced(*ONE)[1]
    words = ("table", "--quick", "--only", "unet", "--output", "docs/table.md")
    out = reproduced(*words)[1]
    assert Path("docs/table.md").read_text() == out
    assert out.startswith("<!-- written by `python dilatedUnet.py reproduce table --quick --only unet --render` -->\n")
    assert (reproduced(*words)[0], [path.name for path in Path("docs").iterdir()]) == (0, ["table.md"])


@pytest.mark.parametrize(("name", "factor"), TABLES)
def test_tables_have_as_many_cells_as_their_heads_and_quick_ones_say_so(reproduced, name, factor):
    words = [name, *([factor] if factor else []), "--seeds", 1, *(["--folds", 2] if name == "table" else [])]
    Path("weights").mkdir()
    Path("weights/isbi2012.weights.h5").touch()  # what fine-tuning starts from
    for quick in (False, True):
        out, width = reproduced(*words, *["--quick"] * quick)[1], None
        for line in out.splitlines():
            width = (width or line.count("|")) if line.startswith("|") else None
            assert width in (None, line.count("|")), line
            if "updates of" in line:
                assert ("| quick: " in line) == quick
        assert ("(QUICK: " in out) == quick


@pytest.fixture
def drawn(monkeypatch):
    """What `figures.factor` is given, by the name of the picture."""
    import figures

    found = {}
    keep = lambda panels, path, **words: found.update({path.name: (panels, words)}) or path  # noqa: E731
    monkeypatch.setattr(figures, "factor", keep)
    return found


def test_a_figure_per_factor_with_the_mean_and_spread_of_every_level(reproduced, drawn):
    values = {"base": lambda args: {"loss": [1.0, 0.8, 0.6, 0.4 + 0.1 * args.seed]}}
    reproduced("study", "--quick", "--seeds", 3, "--figures", "images", suite=Suite(values))
    assert sorted(drawn) == [f"study-{name}-quick.png" for name in ("augmentation", "depth", "lr", "optimizer")]
    panels, words = drawn["study-lr-quick.png"]
    assert list(panels) == ["training loss", "validation loss"]
    assert list(panels["training loss"]) == ["1e-5", "1e-4", "1e-3"]
    epochs, mean, deviation = panels["training loss"]["1e-4"]
    assert (epochs, mean) == ([1, 2, 3, 4], pytest.approx([1.0, 0.8, 0.6, 0.5]))
    assert deviation == pytest.approx([0, 0, 0, 0.1])
    assert ("QUICK" in words["title"], words["xlabel"]) == (True, "epoch")


def test_the_learning_curve_and_the_receptive_field_are_drawn_against_their_numbers(reproduced, drawn):
    suite = Suite(scores={"sections-5": rising(0.01, v_rand=0.9)})
    for factor in ("sections", "receptive"):
        reproduced("study", factor, "--seeds", 2, "--figures", "images", suite=suite)
    panels, words = drawn["study-sections.png"]
    x, mean, deviation = panels["held-out V_rand"][""]
    assert (x, mean) == ([1, 2, 5, 10, 24], pytest.approx([0.96, 0.96, 0.905, 0.96, 0.96]))
    assert deviation == pytest.approx([0, 0, 0.0070711, 0, 0], abs=1e-6)
    assert words["xlabel"] == "labelled training sections"
    assert "held-out V_rand, false borders taken away" in panels
    assert [*drawn["study-receptive.png"][0]] == ["held-out V_rand", "held-out Dice at 0.5"], "nothing was taken away"
    assert drawn["study-receptive.png"][0]["held-out Dice at 0.5"][""][0] == [120, 140, 170]


def test_the_figures_are_real_pictures_and_replaced_by_force_only(reproduced):
    words = ("study", "depth", "--seeds", 1, "--figures", "images")
    assert reproduced(*words)[0] == 0
    assert Path("images/study-depth.png").read_bytes().startswith(b"\x89PNG")
    assert [reproduced(*words, *force)[0] for force in ([], ["--force"])] == [2, 0]


def test_the_keys_that_are_read_are_the_keys_that_training_writes():
    source = "".join(path.read_text() for path in sorted((ROOT / "train").glob("*.py")))
    keys = "settings epochs finished final training_seconds held_out training_sections degenerate command commit"
    keys += " precision receptive_field_px versions hardware device image_sha256 epoch loss dice val_loss val_dice"
    for key in (*keys.split(), "run.json", "history.csv", "checkpoint.npz"):
        assert f'"{key}"' in source, key


def test_a_finished_record_is_not_replaced_by_a_run_that_is_half_way(reproduced):
    reproduced(*ONE, "--collect")
    before = COMMITTED.read_text()
    reproduced(*ONE, "--collect", "--runs", "elsewhere", suite=Suite(stop={"unet": 130}))
    assert COMMITTED.read_text() == before
    assert "finished" not in kept("unet")["published-f0-s0"]


def test_a_record_that_is_half_way_is_not_replaced_by_one_that_has_come_less_far(reproduced):
    for epochs, expected in ((2, 2), (4, 4), (3, 4)):
        suite = Suite({"unet": up_to(epochs)}, stop={"unet": 130})
        reproduced(*ONE, "--collect", "--runs", f"runs-{epochs}", suite=suite)
        assert kept("unet")["published-f0-s0"]["epoch"] == expected


def test_a_published_run_that_learned_nothing_is_named(reproduced):
    err = reproduced(*ONE, suite=scored("unet", {"degenerate": LOW}))[2]
    assert f"not reproduced: unet-published-f0-s0: {LOW}" in err


@cases("stop", 130, 143)
def test_after_ctrl_c_or_sigterm_no_other_run_starts(reproduced, stop):
    code, _, _, calls = reproduced("table", "--seeds", 1, suite=Suite(stop={"unet-a": stop}))
    assert (code, len(calls)) == (130, 3)
