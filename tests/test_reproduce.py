"""Rows are command lines; runs are found, resumed and never repeated; tables say what was and was not reproduced."""

import argparse
import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import with_ctrl_c

import dilatedUnet
from studies import reproduce

ROOT = Path(reproduce.__file__).resolve().parent.parent
NAMES = ("table", "best", "study", "unet2015")
GOOD = {"loss": 0.06, "val_loss": 0.1, "dice": 0.985, "val_dice": 0.979}
SCORES = {"v_rand": 0.96, "v_info": 0.98, "dice": 0.95, "bce": 0.12, "pixel_error": 0.05}
LEVELS = [(name, factor) for name in NAMES for factor in ((None,) if name != "study" else (None, *reproduce.FACTORS))]


def tables(quick):
    for name, factor in LEVELS:
        yield reproduce.study_rows(quick, factor) if name == "study" else reproduce.TABLES[name](quick)


def arguments(*words):
    parser = argparse.ArgumentParser()
    reproduce.add_arguments(parser)
    return parser.parse_args([str(word) for word in words])


class Suite:
    """Stands in for training: leaves the record that a run of the command line would leave, and counts."""

    def __init__(self, values=None, scores=None, stop=None):
        self.calls, self.values, self.scores, self.stop = [], values or {}, scores or {}, stop or {}

    def __call__(self, argv):
        args = dilatedUnet.parse(argv)
        folder = Path(args.run_dir)
        self.calls.append(folder.name)
        row = next((name for name in self.stop if folder.name.startswith(f"{name}-")), None)
        if row is not None:
            what = self.stop[row]
            if isinstance(what, int):
                return what
            write(args, folder, finished=False)
            raise what
        write(args, folder, values=self.of(self.values, folder, args), scores=self.of(self.scores, folder, args))
        return 0

    @staticmethod
    def of(table, folder, args):
        found = next((table[name] for name in sorted(table, reverse=True) if folder.name.startswith(f"{name}-")), {})
        return found(args) if callable(found) else found


def write(args, folder, *, finished=True, values=None, scores=None, **record):
    """run.json and history.csv as training.py writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {key: value for key, value in vars(args).items() if key not in ("run", "argv", "verb", "epochs")}
    part = "training_sections" if args.protocol == "published" else "held_out"
    record = {
        "argv": args.argv,
        "command": "python dilatedUnet.py ...",
        "settings": settings,
        "epochs": args.epochs,
        "finished": finished,
        "versions": {"python": "3.12.1", "backend": "tensorflow", "keras": "3.15.1", "numpy": "2"},
        "commit": "0123456789abcdef",
        "hardware": {"device": "Testing Machine, 2 cores", "cores": 2},
        "precision": "bfloat16",
        "data": {"image_sha256": "aa"},
        "receptive_field_px": 100 + 50 * args.dilate + 20 * args.dilate_rate,
    } | record
    if finished:
        record |= {"training_seconds": 120.0, "final": {"loss": 9.0}}
        record[part] = {"sections": [24], "degenerate": None, "curves": {"v_rand": [1, 2]}} | SCORES | (scores or {})
        write_history(folder / "history.csv", GOOD | (values or {}))
    (folder / "run.json").write_text(json.dumps(record))


def write_history(path, values, epochs=4):
    """Falls, with its best validation loss in the third epoch; `values` may hold whole columns."""
    columns = {key: value if isinstance(value, list) else [value + 1, value + 0.5, value, value + 0.5]
               for key, value in values.items()}  # fmt: skip
    count = max(len(column) for column in columns.values())
    columns = {key: column if len(column) == count else [column[2]] * count for key, column in columns.items()}
    columns |= {"epoch": list(range(1, count + 1)), "update": [0] * count, "learning_rate": [0.1] * count}
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))


@pytest.fixture
def reproduced(tmp_path, monkeypatch, capsys):
    """`reproduce ...` in a folder of its own; returns exit code, stdout, stderr and the runs that were started."""
    monkeypatch.chdir(tmp_path)

    def call(*words, suite=None):
        suite = suite or Suite()
        suite.calls.clear()
        capsys.readouterr()
        code = reproduce.run(arguments(*words), dilatedUnet.parse, suite)
        return (code, *capsys.readouterr(), list(suite.calls))

    return call


# -- rows


@pytest.mark.parametrize("quick", [False, True])
def test_every_row_is_a_command_line_of_the_suite(quick):
    for table in tables(quick):
        args = arguments(table.name, "--seeds", 2, *(["--quick"] if quick else []))
        jobs = reproduce.jobs_of(table, args, {})
        assert {job.row.name for job in jobs} == {row.name for row in table.rows}
        for row in table.rows:
            assert settings(row)["seed"] == 0
        for job in jobs:
            parsed = dilatedUnet.parse(job.command(Path("runs/x")))
            assert (parsed.protocol, parsed.seed, parsed.resume) == (job.protocol, job.seed, True)
            assert job.row.minutes > 0


def test_the_published_rows_are_the_published_commands_and_values():
    rows = {row.name: row for row in reproduce.table_rows(quick=False).rows}
    published = {
        "unet": "--lr 0.00001 --max_lr 0.01 --epochs 500 --dilate_rate 1 --dilate 0 --addition 1",
        "dilated": "--lr 0.00001 --max_lr 0.01 --epochs 500 --dilate_rate 2 --dilate 1 --addition 1",
        "unet-a": "--lr 0.00001 --max_lr 0.01 --epochs 500 --dilate_rate 1 --dilate 0 --addition 0",
        "dilated-a": "--lr 0.00001 --max_lr 0.01 --epochs 500 --dilate_rate 2 --dilate 1 --addition 0",
    }
    assert {name: " ".join(rows[name].argv) for name in published} == published
    assert [list(rows[name].published.values()) for name in published] == [
        [0.056, 0.106, 0.985, 0.979],
        [0.057, 0.111, 0.985, 0.978],
        [0.073, 0.0864, 0.981, 0.980],
        [0.0579, 0.114, 0.985, 0.978],
    ]
    parsed = dilatedUnet.parse(rows["unet"].argv)
    assert (parsed.optimizer, parsed.step_size, parsed.steps_per_epoch, parsed.batch_size) == ("rmsprop", 2000, 10, 3)
    assert (parsed.window, parsed.clr_mode, parsed.loss, parsed.patience) == (512, "triangular", "bce_dice", 300)


def settings(row):
    return reproduce.settings_of(dilatedUnet.parse, (*row.argv, "--protocol", row.protocols[0]))


def changed(row, base):
    one, other = settings(row), settings(base)
    return {key for key in one if one[key] != other[key]}


@pytest.mark.parametrize("quick", [False, True])
def test_one_factor_rows_of_the_table_change_one_setting(quick):
    rows = {row.name: row for row in reproduce.table_rows(quick).rows}
    assert changed(rows["dilate-alone"], rows["unet"]) == {"dilate"}
    assert changed(rows["dilate_rate-alone"], rows["unet"]) == {"dilate_rate"}
    assert changed(rows["dilated"], rows["unet"]) == {"dilate", "dilate_rate"}
    assert changed(rows["unet-a"], rows["unet"]) == {"addition"}


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize(
    ("factor", "setting"),
    [
        ("depth", "filters"),
        ("augmentation", "augment"),
        ("lr", "lr"),
        ("optimizer", "optimizer"),
        ("sections", "train_sections"),
    ],
)
def test_a_factor_changes_its_setting_and_nothing_else(factor, setting, quick):
    table = reproduce.study_rows(quick, factor)
    rows = {row.name: row for row in table.rows}
    (chosen,) = table.factors
    base = rows[chosen.levels[chosen.base]]
    for row in set(rows.values()) - {base}:
        assert changed(row, base) == {setting}, row.name
    assert len(rows) == len(chosen.levels) >= 2


@pytest.mark.parametrize("quick", [False, True])
def test_the_receptive_field_grows_by_one_setting_at_a_time(quick):
    rows = {row.name: row for row in reproduce.study_rows(quick, "receptive").rows}
    assert changed(rows["dilation-centre"], rows["dilation-off"]) == {"dilate"}
    assert changed(rows["dilation-encoder"], rows["dilation-off"]) == {"dilate_rate"}


def test_the_factors_of_the_poster_share_one_base_run():
    table = reproduce.study_rows(quick=False)
    assert [factor.name for factor in table.factors] == ["depth", "augmentation", "lr", "optimizer"]
    assert [row.name for row in table.rows].count("base") == 1
    assert len(table.rows) == 7


def test_the_quick_best_is_the_recipe_of_start_py_but_for_folds_and_rotations():
    import start

    best = reproduce.best_rows(quick=True).rows[0]
    ours, theirs = (vars(dilatedUnet.parse(argv)) for argv in ([*best.argv, "--protocol", "kfold"], start.RECIPE))
    assert {key for key in ours if ours[key] != theirs[key]} == {"argv", "recipe", "protocol", "tta"}


def test_the_learning_curve_labels_1_2_5_10_and_24_sections_none_of_them_held_out():
    import data

    for row in reproduce.study_rows(quick=False, factor="sections").rows:
        chosen = data.parse_sections(settings(row)["train_sections"])
        split = data.split_sections(30, "holdout", inner=0, train_sections=chosen)
        assert len(split.train) == int(row.name.rpartition("-")[2])
        assert split.held_out == (24, 25, 26, 27, 28, 29)


def test_quick_runs_are_reduced_hold_whole_cycles_and_keep_their_promise():
    """At most 20 minutes a row of the table (1.0 s per 512 x 512 window on 2 cores), 40 for the four factors."""
    for quick, full in zip(tables(True), tables(False), strict=True):
        for row, whole in zip(quick.rows, full.rows, strict=True):
            s, f = settings(row), settings(whole)
            windows = s["epochs"] * s["steps_per_epoch"] * s["batch_size"]
            assert windows * s["window"] ** 2 < f["epochs"] * f["steps_per_epoch"] * f["batch_size"] * f["window"] ** 2
            if s["clr_mode"] == "triangular":
                assert s["epochs"] * s["steps_per_epoch"] % (2 * s["step_size"]) == 0
            if s["filters"] == [44, 88, 176]:
                assert windows * (s["window"] / 512) ** 2 + 100 < 60 * row.minutes
                assert row.minutes * len(row.protocols) <= 20
    assert sum(row.minutes for row in reproduce.study_rows(quick=True).rows) <= 40


@pytest.mark.parametrize("quick", [False, True])
def test_the_rows_of_2015_have_the_papers_values_beside_them_and_differ_in_what_they_compare(quick):
    rows = {row.name: row for row in reproduce.unet2015_rows(quick).rows}
    paper = {"held_out_warping_error": 0.000353, "held_out_rand_error": 0.0382, "held_out_pixel_error": 0.0611}
    assert rows["isbi"].published == paper
    assert rows["cells"].published == rows["cells"].target == {"held_out_mean_iou": 0.7756}
    cells, flat = settings(rows["cells"]), settings(rows["cells-flat"])
    assert {key for key in cells if cells[key] != flat[key]} == {"w0"}
    assert (cells["instances"], cells["image_path"], flat["w0"]) == (True, "dic-hela", 0)
    published = settings(rows["isbi-published"])
    assert (published["optimizer"], published["momentum"], published["batch_size"]) == ("sgd", 0.99, 1)
    assert (published["batch_norm"], published["padding"], published["tta"]) == (False, "valid", "7")
    assert sum(row.minutes for row in reproduce.unet2015_rows(quick=True).rows) <= 30


def test_cells_are_ranked_and_compared_by_their_mean_iou(reproduced):
    scores = {
        "cells": lambda args: {"mean_iou": 0.84 + 0.001 * args.seed, "seg": 0.83},
        "cells-flat": lambda args: {"mean_iou": 0.80 + 0.001 * args.seed, "seg": 0.79},
        "isbi": {"warping_error": 0.0004, "rand_error": 0.04, "v_rand": 0.97},
    }
    code, out, _, _ = reproduced("unet2015", suite=Suite(scores=scores))
    assert code == 0
    assert "Choose w0 = 10: its held-out mean IoU, 0.8410 ± 0.0010 (3), is ahead of w0 = 0" in out
    assert "| the border weights | mean IoU (held-out) | +0.0400" in out
    assert "| 0.8410 ± 0.0010 | 0.8300 ± 0.0000 |" in out
    assert "cells: mean mean IoU 0.8410 reaches the target of 0.7756" in out


# -- bad usage


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["table", "lr"], "lr is a factor of study"),
        (["table", "--only", "unet", "nothing"], r"--only must name rows of table: unet, .*Received: nothing"),
        (["table", "--seeds", "0"], "--seeds must be at least 1 .* Received: 0 and 5"),
        (["table", "--folds", "1"], "--folds at least 2. Received: 3 and 1"),
        (["best", "--protocol", "published"], "--protocol must be one that best has. Received: published"),
        (["table", "--list", "--render"], "--render trains nothing"),
        (["table", "--missing", "--render"], "--render trains nothing"),
        (["table", "--output", "README.md"], "README.md exists and is not a table written by reproduce"),
        (["table", "--output", "."], "exists and is not a table written by reproduce"),
    ],
)
def test_bad_usage_is_one_sentence_and_exit_code_2_and_starts_nothing(reproduced, words, sentence):
    Path("README.md").write_text("# mine\n")
    code, out, err, calls = reproduced(*words)
    assert (code, out, calls) == (2, "", [])
    assert len(err.splitlines()) == 1
    assert re.search(sentence, err)
    assert Path("README.md").read_text() == "# mine\n"


@pytest.mark.parametrize("text", ["", "[]", '{"rows": 3}', '{"table": "table"}'])
@pytest.mark.parametrize("flag", ["--render", "--collect"])
def test_a_broken_file_of_records_is_refused_by_name_before_any_run(reproduced, text, flag):
    Path("results").mkdir()
    Path("results/table.json").write_text(text)
    code, _, err, calls = reproduced("table", flag)
    assert (code, calls) == (2, [])
    assert "results/table.json is not a file of records" in err


# -- runs


def test_the_commands_are_listed_and_nothing_is_run(reproduced):
    code, out, _, calls = reproduced("table", "--list", "--only", "unet", "--seeds", 1)
    assert (code, calls) == (0, [])
    assert "# unet-published-f0-s0: about 2.5 minutes on one H200-class GPU" in out
    command = next(line for line in out.splitlines() if "--protocol holdout" in line)
    assert command.startswith("python dilatedUnet.py --lr 0.00001")
    assert "--run_dir runs/reproduce/table/unet-holdout-f0-s0 " in command
    assert dilatedUnet.parse(command.split()[2:]).protocol == "holdout"


def test_every_row_protocol_fold_and_seed_is_a_run_in_its_own_folder_seeds_outermost(reproduced):
    calls = reproduced("table", "--only", "unet", "dilated", "--seeds", 2, "--folds", 2)[3]
    first = [
        *("unet-published-f0-s0", "dilated-published-f0-s0"),
        *("unet-kfold2-f0-s0", "unet-kfold2-f1-s0", "dilated-kfold2-f0-s0", "dilated-kfold2-f1-s0"),
    ]
    assert calls == first + [name.replace("s0", "s1") for name in first]
    assert sorted(path.name for path in Path("runs/reproduce/table").iterdir()) == sorted(calls)


def test_folds_leave_rows_alone_that_name_their_training_sections(reproduced):
    calls = reproduced("study", "sections", "--folds", 3, "--seeds", 1)[3]
    assert calls == [f"sections-{n}-holdout-f0-s0" for n in (1, 2, 5, 10, 24)]


def test_quick_runs_and_full_ones_do_not_meet(reproduced):
    quick = reproduced("table", "--quick", "--only", "unet")[3]
    assert quick == ["unet-published-f0-s0-quick", "unet-holdout-f0-s0-quick"]
    assert len(reproduced("table", "--only", "unet", "--seeds", 1)[3]) == 2


def test_finished_runs_are_not_repeated(reproduced):
    words = ("table", "--only", "unet", "dilated", "--seeds", 1)
    assert len(reproduced(*words)[3]) == 4
    code, out, err, calls = reproduced(*words)
    assert (code, calls) == (0, [])
    assert "0 of 4 runs to go" in err
    assert "4 runs, 8 minutes of training" in out
    assert len(reproduced("table", "--only", "unet", "dilated", "--seeds", 2)[3]) == 4, "the other seed"


def test_a_half_finished_run_is_resumed_in_its_folder(reproduced):
    words = ("table", "--only", "unet", "--seeds", 1, "--protocol", "holdout")
    job = reproduce.jobs_of(reproduce.table_rows(False), arguments(*words), {})[0]
    folder = Path("runs/reproduce/table") / job.name
    write(dilatedUnet.parse(job.command(folder)), folder, finished=False)
    code, out, _, _ = reproduced(*words, "--render")
    assert code == 1
    assert f"{job.name}: half-finished in runs/reproduce/table/{job.name} (missing)" in out
    code, _, err, calls = reproduced(*words)
    assert (code, calls) == (0, [job.name])
    assert "half-finished" in err


@pytest.mark.parametrize(
    "change", [{"epochs": 10}, {"settings": {"dilate_rate": 3}}, {"settings": {"filters": [1, 2]}}]
)
def test_a_run_with_other_settings_counts_as_missing_and_is_left_alone(reproduced, change):
    words = ("table", "--only", "unet", "--seeds", 1)
    reproduced(*words)
    path = Path("runs/reproduce/table/unet-holdout-f0-s0/run.json")
    record = json.loads(path.read_text())
    record |= {key: record[key] | value if isinstance(value, dict) else value for key, value in change.items()}
    path.write_text(json.dumps(record))
    before = path.read_text()
    code, out, err, calls = reproduced(*words)
    assert (code, calls) == (1, [])
    assert path.read_text() == before
    setting = next(iter(change.get("settings", change)))
    assert re.search(rf"unet-holdout-f0-s0 .*other settings \(--{setting} was .*\): move it away", err)
    assert "unet-holdout-f0-s0: " in out


@pytest.mark.parametrize("key", ["precision", "tensorboard", "run_dir", "steps_per_execution", "gpu"])
def test_where_and_on_what_a_run_was_made_does_not_make_it_another(reproduced, key):
    words = ("table", "--only", "unet", "--seeds", 1)
    reproduced(*words)
    path = Path("runs/reproduce/table/unet-holdout-f0-s0/run.json")
    record = json.loads(path.read_text())
    record["settings"][key] = "another"
    path.write_text(json.dumps(record))
    code, _, _, calls = reproduced(*words)
    assert (code, calls) == (0, [])


def test_a_record_older_than_a_flag_counts_as_having_its_default(reproduced):
    words = ("table", "--only", "unet", "--seeds", 1)
    reproduced(*words)
    path = Path("runs/reproduce/table/unet-holdout-f0-s0/run.json")
    record = json.loads(path.read_text())
    del record["settings"]["ema"], record["settings"]["gap"]
    path.write_text(json.dumps(record))
    code, _, _, calls = reproduced(*words)
    assert (code, calls) == (0, [])
    del record["settings"]["max_lr"]  # 0.01 in the row, 0.0005 by default
    path.write_text(json.dumps(record))
    assert "other settings (--max_lr was 0.0005, is 0.01)" in reproduced(*words)[2]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"settings": 3, "epochs": 1}', '{"settings": {'])
def test_a_broken_record_counts_as_missing_and_stops_nothing(reproduced, text):
    folder = Path("runs/reproduce/table/unet-holdout-f0-s0")
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(text)
    code, out, err, calls = reproduced("table", "--only", "unet", "--seeds", 1)
    assert (code, calls) == (1, ["unet-published-f0-s0"])
    assert "unet-holdout-f0-s0 cannot run: " in err
    assert "is not a run record" in out


def test_a_run_that_fails_is_named_and_the_others_go_on(reproduced):
    code, out, err, calls = reproduced("table", "--seeds", 1, suite=Suite(stop={"dilated": 2}))
    assert len(calls) == 12
    assert code == 1
    assert "dilated-published-f0-s0 failed with exit code 2; the others go on" in err
    assert "- dilated: no run of published-f0-s0, holdout-f0-s0 (missing)" in out
    assert "not reproduced: dilated: no run of published-f0-s0" in err


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), 130])
def test_ctrl_c_starts_no_other_run_and_the_same_command_goes_on(reproduced, stop):
    code, out, err, calls = reproduced("table", "--seeds", 1, suite=Suite(stop={"unet-a": stop}))
    assert code == 130
    assert calls == ["unet-published-f0-s0", "dilated-published-f0-s0", "unet-a-published-f0-s0"]
    assert "the same command goes on from here" in err
    assert "| unet |" in out
    code, _, _, calls = reproduced("table", "--seeds", 1)
    assert calls[0] == "unet-a-published-f0-s0"
    assert len(calls) == 10


def test_ctrl_c_is_passed_on_and_waited_for(tmp_path):
    """A real process group: the child leaves by itself and its exit code is the run's."""
    child = tmp_path / "dilatedUnet.py"
    child.write_text(
        "import pathlib, sys, time\n"
        "pathlib.Path('started').touch()\n"
        "try:\n    time.sleep(60)\n"
        "except KeyboardInterrupt:\n    time.sleep(0.5)\n    pathlib.Path('saved').touch()\n    sys.exit(130)\n"
    )
    code = f"import pathlib, sys, reproduce; reproduce.SUITE = pathlib.Path({str(child)!r})\n"
    code += "sys.exit(reproduce.in_own_process(['x']))"
    parent = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        start_new_session=True,
        preexec_fn=with_ctrl_c,
    )
    try:
        for _ in range(200):
            if (tmp_path / "started").exists():
                break
            time.sleep(0.05)
        time.sleep(0.2)
        os.killpg(parent.pid, signal.SIGINT)
        assert parent.wait(timeout=30) == 130
        assert (tmp_path / "saved").exists(), "the child had time to save"
    finally:
        parent.kill()


def test_a_run_is_the_suite_in_a_process_of_its_own(tmp_path, monkeypatch):
    script = tmp_path / "dilatedUnet.py"
    script.write_text("import sys\nopen('words', 'w').write(' '.join(sys.argv[1:]))\nsys.exit(3)\n")
    monkeypatch.setattr(reproduce, "SUITE", script)
    monkeypatch.chdir(tmp_path)
    assert reproduce.in_own_process(["--lr", "0.1"]) == 3
    assert Path("words").read_text() == "--lr 0.1"


# -- comparison with what was published


def cells(out, row, metric):
    """The line of a row's metric in the first table."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("| ")]
    return next(line for line in lines if line[0] == row and line[2] == metric)


def near(published):
    return lambda args: dict(zip(GOOD, (value + 0.001 * args.seed for value in published), strict=True))


def all_near():
    return {name: near(values) for name, (_, values) in reproduce.PUBLISHED_2017.items()}


def test_all_rows_within_their_tolerance_is_exit_code_0(reproduced):
    code, out, err, _ = reproduced("table", suite=Suite(all_near()))
    assert code == 0
    assert "Not reproduced" not in out
    assert "not reproduced" not in err
    found = cells(out, "dilated", "val loss")
    assert found[3:5] == ["0.111", "0.1120 ± 0.0010 (3)"]
    assert found[6] == "within"


def test_a_row_that_misses_its_tolerance_is_named_with_exit_code_1(reproduced):
    values = all_near() | {"unet-a": near((0.073, 0.2, 0.981, 0.980))}
    code, out, err, _ = reproduced("table", suite=Suite(values))
    assert code == 1
    assert cells(out, "unet-a", "val loss")[6] == "MISSED, above by 0.115"
    assert cells(out, "unet-a", "train loss")[6] == "within"
    assert [line for line in err.splitlines() if "not reproduced" in line] == [
        "not reproduced: unet-a: val loss MISSED, above by 0.115"
    ]


def test_lower_than_published_is_a_miss_as_well(reproduced):
    code, out, _, _ = reproduced("table", suite=Suite(all_near() | {"unet": near((0.01, 0.106, 0.985, 0.979))}))
    assert code == 1
    assert cells(out, "unet", "train loss")[6] == "MISSED, below by 0.045"


def test_the_tolerance_is_the_prediction_interval_from_the_spread_over_seeds(reproduced):
    """Each of four rows has values 0, 1 and 2 thousandths apart: s = 0.001 with 8 degrees of freedom, n = 3."""
    from scipy import stats

    out = reproduced("table", suite=Suite(all_near()))[1]
    expected = stats.t.ppf(0.975, 8) * 0.001 * (1 + 1 / 3) ** 0.5
    assert cells(out, "unet", "val loss")[5] == f"± {expected:.2g}"
    assert "t s sqrt(1 + 1/n)" in out


def test_with_one_seed_the_tolerance_is_the_one_stated_in_the_row(reproduced):
    code, out, _, _ = reproduced("table", "--seeds", 1, suite=Suite(all_near()))
    assert code == 0
    assert cells(out, "unet", "val loss")[5] == "± 0.03"
    assert cells(out, "unet", "val Dice")[5] == "± 0.01"


def test_one_factor_rows_are_shown_beside_the_published_ones_and_not_judged(reproduced):
    out = reproduced("table", suite=Suite(all_near()))[1]
    found = cells(out, "dilate-alone", "val loss")
    assert found[3:] == ["-", "0.1000 ± 0.0000 (3)", "-", "", "0.1000 ± 0.0000 (3)"]


def test_the_values_are_those_of_the_epoch_whose_weights_were_kept(reproduced):
    values = {"loss": [0.4, 0.3, 0.2, 0.1], "val_loss": [0.5, 0.2, 0.3, 0.4]}
    out = reproduced("table", "--only", "unet", "--seeds", 1, suite=Suite({"unet": values}))[1]
    assert cells(out, "unet", "train loss")[4] == "0.3000"


def test_without_validation_the_last_weights_were_kept(reproduced):
    reproduced("study", "sections", "--seeds", 1, suite=Suite({"sections": {"loss": [0.4, 0.1, 0.3]}}))
    folder = Path("runs/reproduce/study/sections-1-holdout-f0-s0")
    with open(folder / "history.csv") as file:
        rows = [row | {"val_loss": "", "val_dice": ""} for row in csv.DictReader(file)]
    with open(folder / "history.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    record = json.loads((folder / "run.json").read_text())
    result = reproduce.result_of(record, folder / "history.csv")
    assert result["metrics"]["loss"] == 0.3
    assert "val_loss" not in result["metrics"]


def test_held_out_scores_stand_beside_with_their_spread_over_seeds_and_folds(reproduced):
    scores = {"unet": lambda args: {"v_rand": 0.9 + 0.02 * (args.fold or 0) + 0.001 * args.seed}}
    out = reproduced("table", "--only", "unet", "--seeds", 2, "--folds", 2, suite=Suite(scores=scores))[1]
    assert "| unet | 500 x 10 updates of 3 windows of 512 px | 4 |" in out
    assert "| 0.9105 ± 0.0116 |" in out
    assert "| V_rand | fold 0 | fold 1 | all |" in out
    assert "| unet | 0.9005 ± 0.0007 (2) | 0.9205 ± 0.0007 (2) | 0.9105 ± 0.0116 (4) |" in out
    assert cells(out, "unet", "val Dice")[7] == "0.9500 ± 0.0000 (4)", "Dice of the held-out sections"


def test_a_row_that_learned_nothing_is_not_reproduced_but_a_level_of_a_factor_may(reproduced):
    words = "Dice 0.870 is no better than 'always interior'"
    suite = Suite(scores={"unet": {"degenerate": words}, "sgd": {"degenerate": words}})
    code, out, err, _ = reproduced("table", "--only", "unet", "--seeds", 1, suite=suite)
    assert code == 1
    assert f"not reproduced: unet-holdout-f0-s0: {words}" in err
    code, out, _, _ = reproduced("study", "optimizer", "--seeds", 1, suite=suite)
    assert code == 0
    assert f"Learned nothing:\n\n- sgd-holdout-f0-s0: {words}" in out


@pytest.mark.parametrize(("score", "code"), [(0.985, 0), (0.98, 1)])
def test_the_target_of_the_best_recipe_is_enforced_on_the_mean_of_all_folds(reproduced, score, code):
    scores = {"best-standard": lambda args: {"v_rand": score + 0.001 * (args.fold - 2)}}
    found, out, err, calls = reproduced("best", "--only", "best-standard", "--seeds", 1, suite=Suite(scores=scores))
    assert (found, len(calls)) == (code, 5)
    sentence = f"best-standard: mean V_rand {score:.4f} {'misses' if code else 'reaches'} the target of 0.985"
    assert sentence in out
    assert (f"not reproduced: {sentence}" in err) == bool(code)


def test_a_finished_run_without_the_number_is_not_reproduced(reproduced):
    words = ("table", "--only", "unet", "--seeds", 1)
    reproduced(*words)
    Path("runs/reproduce/table/unet-published-f0-s0/history.csv").unlink()
    code, _, err, _ = reproduced(*words)
    assert code == 1
    assert "unet: val loss no value" in err
    assert "train loss MISSED" in err, "the 9.0 of the record's last epoch"


# -- verdicts


def dilation(effect, seeds=3):
    """V_rand of the dilated rows differs by `effect`, plus a little that differs from seed to seed."""
    pattern = [0.0004, -0.0004, 0.0]
    base = lambda args: {"v_rand": 0.95 + 0.01 * args.seed}  # noqa: E731
    other = lambda args: {"v_rand": 0.95 + 0.01 * args.seed + effect + pattern[args.seed]}  # noqa: E731
    return Suite(all_near(), {"unet": base, "unet-a": base, "dilated": other, "dilated-a": other})


@pytest.mark.parametrize(
    ("effect", "verdict"),
    [
        (0.0, "| confirmed, it makes no difference |"),
        (-0.02, "| refuted, it does make a difference |"),
        (0.003, "| refuted, it does make a difference, but one below the margin |"),
    ],
)
def test_the_2017_conclusion_is_judged_by_paired_differences_not_by_the_spread(reproduced, effect, verdict):
    out = reproduced("table", suite=dilation(effect))[1]
    line = next(x for x in out.splitlines() if x.startswith("| dilated against standard | V_rand"))
    assert verdict in line
    assert f"{effect:+.4f} [" in line
    assert "3 pairs" in line


def test_with_two_seeds_there_is_no_verdict(reproduced):
    out = reproduced("table", "--seeds", 2, suite=dilation(-0.02))[1]
    line = next(x for x in out.splitlines() if x.startswith("| dilated against standard | V_rand"))
    assert line.endswith("| too few runs |")


def test_the_study_says_of_each_conclusion_whether_it_was_confirmed(reproduced):
    def falling(args):
        return {"loss": [1.0, 0.8, 0.6, 0.4 - 0.01 * args.seed], "val_loss": [1.0, 0.9, 0.7, 0.5 + 0.01 * args.seed]}

    def stagnant(args):
        return {"loss": [1.0, 0.9, 0.8, 0.7 - 0.01 * args.seed], "val_loss": [1.0, 0.9, 0.9, 0.89 + 0.001 * args.seed]}

    out = reproduced("study", "depth", suite=Suite({"base": falling, "depth-3": stagnant}))[1]
    lines = [line for line in out.splitlines() if line.startswith(("| with depth", "| depth 4 ends"))]
    assert [line.split("|")[-2].strip() for line in lines] == ["confirmed"] * 3
    swapped = reproduced("study", "depth", "--runs", "other", suite=Suite({"base": stagnant, "depth-3": falling}))[1]
    lines = [line for line in swapped.splitlines() if line.startswith(("| with depth", "| depth 4 ends"))]
    assert [line.split("|")[-2].strip() for line in lines] == ["not confirmed"] * 3


def test_the_study_says_what_to_choose_and_how_sure_that_is(reproduced):
    scores = {"adamax": lambda args: {"v_rand": 0.97 + 0.001 * args.seed}}
    out = reproduced("study", "optimizer", suite=Suite(scores=scores))[1]
    assert "Choose Adamax: its held-out V_rand, 0.9710 ± 0.0010 (3), is ahead of SGD by +0.0110 [" in out
    assert "3 pairs. The study chose Adamax." in out
    out = reproduced("study", "optimizer", "--seeds", 1, suite=Suite(scores=scores))[1]
    assert "Choose by cost: Adamax has the highest held-out V_rand, 0.9700, but its lead over SGD" in out
    assert "rests on too few runs. The study chose Adamax." in out
    noisy = {"adamax": lambda args: {"v_rand": 0.961 + 0.01 * (args.seed - 1)}}
    out = reproduced("study", "optimizer", "--runs", "noisy", suite=Suite(scores=noisy))[1]
    assert "is within noise. The study chose Adamax." in out


def test_the_learning_curve_says_what_more_sections_bring(reproduced):
    scores = {"sections-24": lambda args: {"v_rand": 0.98 + 0.001 * args.seed}}
    out = reproduced("study", "sections", suite=Suite(scores=scores))[1]
    assert re.search(r"- from 10 to 24 sections V_rand changes by \+0\.0210 \[.*3 pairs: confirmed", out)
    assert "- from 1 to 2 sections V_rand changes by +0.0000 [+0.0000, +0.0000], 3 pairs: within noise" in out


# -- records and rendering


def test_rendering_trains_nothing_and_names_what_is_missing(reproduced):
    code, out, _, calls = reproduced("table", "--render")
    assert (code, calls) == (1, [])
    assert "No finished run yet." in out
    assert "- unet: no run of published-f0-s0, holdout-f0-s0, published-f0-s1" in out
    reproduced("table", "--only", "unet", "--seeds", 1)
    code, out, _, calls = reproduced("table", "--render", "--seeds", 1)
    assert (code, calls) == (1, [])
    assert cells(out, "unet", "val loss")[4] == "0.1000"
    assert cells(out, "dilated", "val loss")[4:7] == ["-", "± 0.03", "no value"]
    assert "- unet: no run" not in out
    assert "- dilated: no run of published-f0-s0, holdout-f0-s0 (missing)" in out


def test_rendering_takes_as_many_seeds_as_there_are(reproduced):
    reproduced("table", "--only", "unet", "--quick", "--seeds", 4)
    assert "(4)" in reproduced("table", "--only", "unet", "--quick", "--render")[1]


def test_collected_records_render_the_same_table_in_a_fresh_clone(reproduced):
    words = ("table", "--seeds", 3, "--folds", 2)
    reproduced(*words, "--collect", suite=dilation(-0.02))
    before = reproduced(*words, "--render")[1]
    size = Path("results/table.json").stat().st_size
    Path("runs").rename("elsewhere")
    code, after, _, calls = reproduced(*words, "--render")
    assert (after, calls, code) == (before, [], 0)
    assert size < 54 * 3000, "3 kB a run"
    assert "best.weights" not in Path("results/table.json").read_text()
    assert sorted(path.name for path in Path("results").iterdir()) == ["table.json"]


def test_committed_records_do_not_stand_in_for_runs_when_reproducing(reproduced):
    words = ("table", "--only", "unet", "--seeds", 1)
    reproduced(*words, "--collect")
    Path("runs").rename("elsewhere")
    code, out, _, calls = reproduced(*words, "--collect", suite=Suite(stop={"unet": 2}))
    assert len(calls) == 2
    assert code == 1
    assert "no run of published-f0-s0, holdout-f0-s0 (missing)" in out


def test_only_what_the_records_lack_is_trained_and_added_to_them(reproduced):
    words = ("table", "--only", "unet", "--seeds")
    reproduced(*words, 1, "--collect")
    Path("runs").rename("elsewhere")
    listed = reproduced(*words, 2, "--missing", "--list")[1].splitlines()[::2]
    assert [line.split()[1] for line in listed] == ["unet-published-f0-s1:", "unet-holdout-f0-s1:"]
    _, out, err, calls = reproduced(*words, 2, "--missing")
    assert calls == ["unet-published-f0-s1", "unet-holdout-f0-s1"]
    assert "2 of 4 runs to go" in err
    assert "4 runs, 8 minutes" in out
    kept = json.loads(Path("results/table.json").read_text())["rows"]["unet"]
    assert sorted(kept) == [f"{p}-f0-s{s}" for p in ("holdout", "published") for s in (0, 1)]
    other = Path("results/table.json").read_text().replace('"step_size":2000', '"step_size":2001')
    Path("results/table.json").write_text(other)
    assert len(reproduced(*words, 1, "--missing")[3]) == 2, "the record of another recipe is none"


def test_collecting_keeps_what_was_collected_before_and_one_line_per_run(reproduced):
    reproduced("table", "--only", "unet", "--seeds", 1, "--collect")
    first = Path("results/table.json").read_text().splitlines()
    Path("runs").rename("elsewhere")
    reproduced("table", "--only", "dilated", "--seeds", 1, "--collect")
    lines = Path("results/table.json").read_text().splitlines()
    kept = json.loads("\n".join(lines))
    assert {row: sorted(runs) for row, runs in kept["rows"].items()} == {
        row: ["holdout-f0-s0", "published-f0-s0"] for row in ("unet", "dilated")
    }
    assert {line.rstrip(",") for line in first} <= {line.rstrip(",") for line in lines}
    result = kept["rows"]["unet"]["holdout-f0-s0"]
    assert result["device"] == "Testing Machine, 2 cores"
    assert result["metrics"]["held_out_v_rand"] == 0.96
    assert result["versions"]["keras"] == "3.15.1"


def test_records_are_collected_after_every_run(reproduced):
    with pytest.raises(RuntimeError, match="power cut"):
        reproduced("table", "--seeds", 1, "--collect", suite=Suite(stop={"dilated": RuntimeError("power cut")}))
    assert list(json.loads(Path("results/table.json").read_text())["rows"]) == ["unet"]


def test_a_long_history_is_thinned_to_what_a_figure_shows():
    history = {"epoch": list(range(1, 501)), "loss": [float(i) for i in range(500)], "learning_rate": [0.1] * 500}
    kept = reproduce.thinned(history, best=333)
    assert len(kept["epoch"]) <= reproduce.POINTS + 2
    assert {1, 334, 500} <= set(kept["epoch"])
    assert kept["loss"] == [epoch - 1 for epoch in kept["epoch"]]
    assert "learning_rate" not in kept
    assert reproduce.thinned({}, -1) == {}


def test_the_output_holds_the_command_and_may_be_written_again(reproduced):
    words = ("table", "--quick", "--only", "unet", "--output", "docs/table.md")
    out = reproduced(*words)[1]
    assert Path("docs/table.md").read_text() == out
    assert out.startswith("<!-- written by `python dilatedUnet.py reproduce table --quick --only unet --render` -->\n")
    assert reproduced(*words)[0] == 0
    assert [path.name for path in Path("docs").iterdir()] == ["table.md"]


def test_hardware_versions_and_a_mix_of_data_are_named(reproduced):
    words = ("table", "--only", "unet", "--seeds", 1)
    out = reproduced(*words)[1]
    assert "2 runs, 4 minutes of training, on Testing Machine, 2 cores, bfloat16. python 3.12.1 keras 3.15.1" in out
    assert "Commit 0123456789." in out
    assert "one data set" not in out
    path = Path("runs/reproduce/table/unet-holdout-f0-s0/run.json")
    path.write_text(path.read_text().replace('"aa"', '"bb"'))
    assert "**The runs do not share one data set.**" in reproduced(*words)[1]


@pytest.mark.parametrize("name", NAMES)
def test_quick_says_so_in_the_heading_and_in_every_row(reproduced, name):
    quick = reproduced(name, "--quick")[1]
    assert "(QUICK: reduced recipe, not the full one)" in quick
    rows = [line for line in quick.splitlines() if "updates of" in line]
    assert rows
    assert all("| quick: " in line for line in rows)
    full = reproduced(name, "--seeds", 1)[1]
    assert "quick" not in full.lower().replace("quick recipe", "")


def test_every_markdown_table_has_as_many_cells_as_its_head(reproduced):
    for words in (("table", "--folds", 2), ("study",), ("study", "sections"), ("study", "receptive"), ("best",)):
        width = None
        for line in reproduced(*words, "--seeds", 1)[1].splitlines():
            if not line.startswith("|"):
                width = None
                continue
            width = width or line.count("|")
            assert line.count("|") == width, line


# -- figures


def watched(monkeypatch):
    """What `figures.factor` is given, by the name of the picture."""
    import figures

    drawn = {}
    keep = lambda panels, path, **words: drawn.update({path.name: (panels, words)}) or path  # noqa: E731
    monkeypatch.setattr(figures, "factor", keep)
    return drawn


def test_a_figure_per_factor_with_the_mean_and_spread_of_every_level(reproduced, monkeypatch):
    drawn = watched(monkeypatch)
    values = {"base": lambda args: {"loss": [1.0, 0.8, 0.6, 0.4 + 0.1 * args.seed]}}
    reproduced("study", "--quick", "--seeds", 3, "--figures", "images", suite=Suite(values))
    assert sorted(drawn) == [f"study-{name}-quick.png" for name in ("augmentation", "depth", "lr", "optimizer")]
    panels, words = drawn["study-lr-quick.png"]
    assert list(panels) == ["training loss", "validation loss"]
    assert list(panels["training loss"]) == ["1e-5", "1e-4", "1e-3"]
    epochs, mean, deviation = panels["training loss"]["1e-4"]
    assert epochs == [1, 2, 3, 4]
    assert mean == pytest.approx([1.0, 0.8, 0.6, 0.5])
    assert deviation == pytest.approx([0, 0, 0, 0.1])
    assert "QUICK" in words["title"]
    assert words["xlabel"] == "epoch"


def test_the_learning_curve_and_the_receptive_field_are_drawn_against_their_numbers(reproduced, monkeypatch):
    drawn = watched(monkeypatch)
    scores = {"sections-5": lambda args: {"v_rand": 0.9 + 0.01 * args.seed}}
    for factor in ("sections", "receptive"):
        reproduced("study", factor, "--seeds", 2, "--figures", "images", suite=Suite(scores=scores))
    panels, words = drawn["study-sections.png"]
    x, mean, deviation = panels["held-out V_rand"][""]
    assert x == [1, 2, 5, 10, 24]
    assert mean == pytest.approx([0.96, 0.96, 0.905, 0.96, 0.96])
    assert deviation == pytest.approx([0, 0, 0.0070711, 0, 0], abs=1e-6)
    assert words["xlabel"] == "labelled training sections"
    assert drawn["study-receptive.png"][0]["held-out Dice"][""][0] == [120, 140, 170]


def test_the_figures_are_real_pictures(reproduced):
    reproduced("study", "depth", "--seeds", 1, "--figures", "images")
    assert Path("images/study-depth.png").read_bytes().startswith(b"\x89PNG")
    Path("runs").rename("elsewhere")
    reproduced("study", "lr", "--seeds", 1, "--figures", "images", "--render")
    assert not Path("images/study-lr.png").exists(), "nothing to draw yet"


# -- the seam to training


def test_the_keys_that_are_read_are_the_keys_that_training_writes():
    source = (ROOT / "training.py").read_text()
    keys = (
        "settings",
        "epochs",
        "finished",
        "final",
        "training_seconds",
        "held_out",
        "training_sections",
        "degenerate",
    )
    keys += ("command", "commit", "precision", "receptive_field_px", "versions", "hardware", "device", "image_sha256")
    for key in (*keys, "epoch", "loss", "dice", "val_loss", "val_dice"):
        assert f'"{key}"' in source, key
    for name in ('"run.json"', '"history.csv"'):
        assert name in source


def test_importing_reproduce_loads_neither_keras_nor_numpy():
    heavy = ("keras", "tensorflow", "jax", "torch", "numpy", "scipy", "matplotlib")
    probe = f"import sys, reproduce; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
