"""What there is of the runs of a plan: in their folders, and in the committed file of results.

A committed file holds one line per run, without weights. A run that is half-way is kept too, with what it has reached,
as `"finished": false` and its epoch: it is shown and never judged.
"""

import csv
import json
import math
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import chain, groupby, pairwise
from pathlib import Path

from files.atomic import DataError, locked, read_json, write_text
from studies import rows

LARGEST = 1e100  # of a number that can be a score, a loss or a time
POINTS = 100  # of a history that is committed: a README's curve shows no more
PATIENCE_S = 60  # for a file of records that another process has just locked
BROKEN = (ValueError, LookupError, TypeError, AttributeError)  # what a damaged record leads to
VERSIONS = ("python", "backend", "keras", "tensorflow", "jax", "torch")
KEPT = ("command", "commit", "precision", "receptive_field_px", "parameters")
KINDS = {  # of a committed result
    **dict.fromkeys(("settings", "metrics", "history", "versions"), dict),
    **dict.fromkeys(("device", "precision", "data", "commit", "degenerate"), str | None),
    **dict.fromkeys(("receptive_field_px", "parameters"), int | None),
}


@dataclass(frozen=True)
class Found:
    """State of a run (finished, half, absent, other, broken), in words, and what it has reached, if anything."""

    state: str
    words: str
    result: dict | None = None


def find(plan, job) -> Found:
    """What there is of a run, in its folder or else among the committed records."""
    found, kept = look_up(plan, job), plan.committed.get(job.name)
    if found.state == "finished" or not kept or difference(plan, job, kept["settings"]):
        return found
    if kept.get("finished", True):
        return Found("finished", "committed", kept)
    return found if found.state != "absent" else Found("absent", f"no run here; {progress_words(kept)}", kept)


def look_up(plan, job) -> Found:
    """What there is of a run in its folder."""
    folder = plan.runs and plan.folder(job)
    if not folder or not (path := folder / "run.json").exists():
        return Found("absent", "no run")
    try:
        history = read_history(folder / "history.csv")
    except (DataError, OSError) as error:
        return Found("broken", f"{error}: move the folder away")
    try:
        record = read_json(path, "run record")
        differing = difference(plan, job, record["settings"] | {"epochs": record["epochs"]})
        if differing:
            return Found("other", f"{folder} holds a run with other settings ({differing}): move it away")
        result = check_result(result_of(record, history))
        ends = (record.get("final") or {}).get("epoch"), (history.get("epoch") or (None,))[-1]
        if record["finished"] and None not in ends and ends[0] != ends[1]:
            raise ValueError("it ends with epoch {}, history.csv with {:g}".format(*ends))
        if record["finished"]:
            return Found("finished", "finished", result)
        return Found("half", f"half-finished in {folder}, {progress_words(result)}", result)
    except (*BROKEN, OSError) as error:
        return Found("broken", f"{path} is not a run record ({type(error).__name__}: {error}): move it away")


def progress_words(result) -> str:
    return f"epoch {result['epoch']} of {result['settings']['epochs']}"


def difference(plan, job, settings) -> str:
    """The first setting in which a record is not this job; "" if it is. A flag younger than the record: its default."""
    defaults = rows.settings_of(plan.parse, ())
    for key, wanted in plan.settings(job).items():
        was = settings.get(key, defaults.get(key))
        if was != wanted:
            return f"--{key} was {was}, is {wanted}"
    return ""


# -- one result ---------------------------------------------------------------------------------------------------


def result_of(record, history) -> dict:
    """What is kept of a run: no weights, no curves of scores, a thinned history."""
    at = best_epoch(history)
    metrics = {key: column[at] for key, column in history.items()} or numbers(record.get("final"))
    metrics |= {f"held_out_{key}": value for key, value in numbers(record.get("held_out")).items()}
    merged = numbers(record.get("held_out_merged"))
    metrics |= {f"held_out_merged_{key}": merged[key] for key in ("v_rand", "v_info") if key in merged}
    metrics |= {f"seen_{key}": value for key, value in numbers(record.get("training_sections")).items()}
    scored = record.get("held_out") or record.get("training_sections") or {}
    settings = {key: value for key, value in record["settings"].items() if key not in rows.IGNORED}
    half = {} if record["finished"] else {"finished": False, "epoch": len(history.get("epoch", ()))}
    half |= {"init_from": record["init_from"]["sha256"]} if record.get("init_from") else {}  # the weights, by content
    return half | {
        **{key: record.get(key) for key in KEPT},
        "settings": settings | {"epochs": record["epochs"]},
        "device": ran_on(record),
        "versions": {key: value for key, value in record.get("versions", {}).items() if key in VERSIONS},
        "data": record.get("data", {}).get("image_sha256"),
        "minutes": round(record["training_seconds"] / 60, 2) if record["finished"] else 0,
        "degenerate": scored.get("degenerate"),
        "metrics": metrics,
        "history": thinned(history, at),
    }


def ran_on(record):
    """The device, or one after the other; the last one's precision is the record's own."""

    def where(one):
        return one.get("hardware", {}).get("device"), one.get("precision", record["precision"])

    sittings = [next(same) for _, same in groupby(record.get("sittings") or [record], where)]
    words = ["{} in {}, after epoch {} ".format(*where(one), then["from_epoch"]) for one, then in pairwise(sittings)]
    device, _ = where(sittings[-1])
    return device and "".join(words) + device


def check_result(result) -> dict:
    """The result, or ValueError or KeyError: what every reader of one relies on."""
    half = not result.get("finished", True)
    for key, kind in KINDS.items():
        if not isinstance(result[key], kind) or not isinstance(result.get("init_from"), str | None):
            raise ValueError(f"{key} must be {'an object' if kind is dict else 'a number or text'}")
    if half and not all(isinstance(epoch, int) for epoch in (result["epoch"], result["settings"]["epochs"])):
        raise ValueError("a run that is not finished must have its epoch")
    if not all(map(is_number, (result["minutes"], *result["metrics"].values()))):
        raise ValueError("minutes and metrics must be finite numbers")
    columns = result["history"].values()
    if len({len(column) for column in columns}) > 1 or not all(map(is_number, chain.from_iterable(columns))):
        raise ValueError("history must hold columns of numbers, all of one length")
    return result


def is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST


def short(value) -> float:
    """Six digits."""
    return float(f"{float(value):.6g}")


def numbers(scores) -> dict:
    """The plain numbers of a dict."""
    return {key: short(value) for key, value in (scores or {}).items() if is_number(value)}


def read_history(path) -> dict[str, list]:
    """Columns of history.csv; those that an epoch has no value of are left out."""
    if not path.exists():
        return {}
    try:
        with open(path, newline="", encoding="utf-8") as file:
            names, *lines = csv.reader(file)
        columns = zip(names, zip(*lines, strict=True), strict=True)
        return {name: [*map(short, column)] for name, column in columns if "" not in column}
    except ValueError as error:
        raise DataError(f"{path} is cut off or damaged") from error


def best_epoch(history) -> int:
    """Of the weights that were kept: lowest validation loss, or the last epoch where there is no validation."""
    losses = history.get("val_loss")
    return losses.index(min(losses)) if losses else -1


def thinned(history, best) -> dict:
    """At most `POINTS` epochs, the kept one and the last among them."""
    count = len(history.get("epoch", ()))
    every = math.ceil(count / POINTS) or 1
    kept = sorted({*range(0, count, every), count - 1, best % count}) if count else []
    return {key: [column[i] for i in kept] for key, column in history.items() if key not in ("update", "learning_rate")}


# -- the committed file -------------------------------------------------------------------------------------------


def record_file(folder, table) -> Path:
    return Path(folder) / f"{table.name}{'-quick' * table.quick}.json"


def committed(folder, table) -> dict[str, dict]:
    """Committed results by the name of the run."""
    return {
        f"{row}-{key}{'-quick' * table.quick}": run for row, runs in read(folder, table) for key, run in runs.items()
    }


def read(folder, table):
    """(row, {protocol, fold and seed: result}) of a committed file, every result checked."""
    path = record_file(folder, table)
    if not path.exists():
        return []
    kept, where = read_json(path, "--records").get("rows"), "rows"
    try:
        for row, runs in kept.items():
            for key, result in runs.items():
                where = f"{row}, {key}"
                check_result(result)
        return [*kept.items()]
    except BROKEN as error:
        raise DataError(f"--records: {path} is not a file of records ({where}: {error}).") from error


def collect(plan, folder):
    """Put what there is of the runs into the committed file, beside what is there; a finished run is not replaced by
    one that is half-way, nor one by another that has come less far.
    """
    path = record_file(folder, plan.table)
    with locked_patiently(path):
        kept = {row: dict(runs) for row, runs in read(folder, plan.table)}
        for job in plan.jobs:
            new, old = look_up(plan, job).result, kept.get(job.row.name, {}).get(job.key)
            if new and new["history"] and (old is None or epochs_done(new) >= epochs_done(old)):
                kept.setdefault(job.row.name, {})[job.key] = new
        if kept:
            write_text(path, as_lines(plan.table, kept))


def epochs_done(result):
    return result["epoch"] if not result.get("finished", True) else math.inf


def locked_patiently(path) -> ExitStack:
    """The lock, taken, of a file that nobody holds for long; `with` gives it back."""
    stack = ExitStack()
    for _ in range(5 * PATIENCE_S):
        with suppress(DataError):
            stack.enter_context(locked(path))
            return stack
        time.sleep(0.2)
    stack.enter_context(locked(path))
    return stack


def as_lines(table, kept) -> str:
    """JSON with a line per run, so that a change of one is a change of one line."""
    blocks = []
    for row, runs in sorted(kept.items()):
        lines = [f"  {json.dumps(key)}: {json.dumps(runs[key], separators=(',', ':'))}" for key in sorted(runs)]
        blocks.append(f" {json.dumps(row)}: {{\n" + ",\n".join(lines) + "\n }")
    head = f'{{"table": {json.dumps(table.name)}, "quick": {json.dumps(table.quick)}, "rows": {{\n'
    return head + ",\n".join(blocks) + "\n}}\n"


class Results:
    """The runs of a plan that are finished or half-way, and the words on those that are missing."""

    def __init__(self, plan):
        self.plan, self.table = plan, plan.table
        self.finished, self.halfway, self.missing, absent = [], [], [], {}
        for job in plan.jobs:
            found = find(plan, job)
            if found.state == "finished":
                self.finished.append((job, found.result))
                continue
            if found.result and found.result["history"]:
                self.halfway.append((job, found.result))
            if found.state == "absent" and not found.result:
                absent.setdefault(job.row.name, []).append(job.key)
            else:
                self.missing.append(f"{job.name}: {found.words}")
        self.missing += [f"{row}: no run of {', '.join(keys)}" for row, keys in absent.items()]

    def of(self, row, held_out=True):
        """{(seed, fold): result} of a row, held-out or published runs."""
        return {
            (job.seed, job.fold): result
            for job, result in self.finished
            if job.row.name == row and (job.protocol != "published") == held_out
        }

    def metric(self, row, name, held_out=True):
        """{(seed, fold): value}, where the run has it."""
        found = self.of(row, held_out)
        return {key: result["metrics"][name] for key, result in found.items() if name in result["metrics"]}

    def values(self, row, name, held_out=True):
        return list(self.metric(row, name, held_out).values())
