"""The run folder: what is written, what a run remembers, what must be the same when it goes on."""

import contextlib
import csv
import io
import json
import math
import os
import platform
import shlex
import subprocess
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import keras
import numpy as np
from keras import ops

from data import DataError
from files import atomic
from files.shell import say
from network import device
from predict import prediction
from predict.intensity import dark_lines

# What may differ between a run and its resumption; every other setting must be the same.
FREE_ON_RESUME = (
    *("epochs", "resume", "force", "tensorboard", "gpu", "precision", "distribute", "lr_find", "augment_preview"),
    *("verb", "run", "argv", "recipe", "minutes"),
)
# Compared by what they lead to, not by their spelling.
PATHS = ("image_path", "mask_path", "run_dir", "weight_path", "init_from")
NEEDED = {"settings": dict, "data": dict, "precision": str, "epochs": int, "finished": bool, "sittings": list}
AT_THE_END = {"final": dict, "stopped_early": bool}  # what a finished run record has as well
PROVENANCE = ("command", "versions", "commit", "hardware")
HISTORY = ("epoch", "update", "learning_rate", "loss", "dice", "val_loss", "val_dice")
MIN_DELTA = 1e-3  # of the validation loss, for early stopping; the study's value


@dataclass(frozen=True)
class Place:
    """Where a run writes."""

    folder: Path
    weights: Path

    record = property(lambda self: self.folder / "run.json")
    history = property(lambda self: self.folder / "history.csv")
    checkpoint = property(lambda self: self.folder / "checkpoint.npz")
    last = property(lambda self: self.folder / "last.weights.h5")

    def picture(self, name):
        return self.folder / f"{name}.png"

    def outputs(self):
        """Every file that a run may write."""
        names = ("curves", "learning_rate", "held_out", "training_sections", "weights")
        networks = [f for path in (self.weights, self.last) for f in (path, prediction.record_file(path))]
        networks.append(prediction.borders_file(self.weights))
        return [self.record, self.checkpoint, self.history, *networks, *map(self.picture, names)]


# -- what a run remembers ---------------------------------------------------------------------------------------


@dataclass
class Journal:
    """What a run remembers from epoch to epoch beside its variables; all of it is in the checkpoint."""

    rows: list = field(default_factory=list)  # of the history
    best: float = math.inf  # validation loss of the weights that are kept
    reference: float = math.inf  # that early stopping compares with: moves by MIN_DELTA or more
    waited: int = 0  # epochs since it moved
    stopped: bool = False
    seconds: float = 0.0  # of training, over all sittings

    def judge(self, loss, patience):
        """Whether the weights of this validation loss are the best so far; stops after `patience` epochs in vain."""
        improved = loss < self.reference - MIN_DELTA
        self.reference, self.waited = (loss, 0) if improved else (self.reference, self.waited + 1)
        self.stopped = self.waited >= patience > 0
        better, self.best = loss < self.best, min(loss, self.best)
        return better

    @property
    def validated(self):
        return any("val_loss" in row for row in self.rows)

    def write_history(self, path):
        text = io.StringIO()
        writer = csv.DictWriter(text, HISTORY, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        atomic.write_text(path, text.getvalue())

    @classmethod
    def of(cls, kept):
        """From a checkpoint's values; ValueError where they are of another kind."""
        usual = asdict(cls())
        for key in usual:
            if not _is_like(kept[key], usual[key]):
                raise ValueError(f"{key} is {kept[key]!r:.40}")
        for row in kept["rows"]:
            named = isinstance(row, dict) and set(HISTORY[:5]) <= set(row) <= set(HISTORY)
            if not named or not all(_is_like(value, 0.0) for value in row.values()):
                raise ValueError(f"a row is {row!r:.40}")
        return cls(**{key: kept[key] for key in usual})


def _is_like(value, usual):
    return type(value) in ((int, float) if isinstance(usual, float) else (type(usual),))


def save_checkpoint(path, variables, journal):
    """Variables and what the run remembers in one .npz file, replaced as a whole."""
    arrays = {f"{i:04d}": ops.convert_to_numpy(variable) for i, variable in enumerate(variables)}
    names = [variable.path for variable in variables]
    with atomic.replacing(path, force=True) as partial, open(partial, "wb") as file:
        np.savez(file, meta=np.array(json.dumps({"names": names, **asdict(journal)})), **arrays)


@contextlib.contextmanager
def opened_checkpoint(path):
    """The file of a checkpoint, and what it holds beside arrays; DataError where reading it fails."""
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            yield file, json.loads(str(file["meta"]))
    except Exception as error:  # a broken zip shows itself as one of a dozen kinds
        raise DataError(f"{path} is not a checkpoint, or a broken one: {error}.") from error


def load_checkpoint(path, variables):
    """Set the variables and return the journal; DataError where the file does not belong to them."""
    with opened_checkpoint(path) as (file, kept):
        arrays = [file[f"{i:04d}"] for i in range(len(kept["names"]))]
        journal = Journal.of(kept)
    if [a.shape for a in arrays] != [tuple(v.shape) for v in variables] or any(
        a.dtype.kind not in "fiu" for a in arrays
    ):
        raise DataError(f"{path} belongs to another network or optimizer.")
    for variable, array in zip(variables, arrays, strict=True):
        variable.assign(array)
    return journal


# -- the run record ---------------------------------------------------------------------------------------------


def read_record(path):
    """The run record, or None where there is none."""
    if not os.path.lexists(path):
        return None
    try:
        record = atomic.read_json(path, "--run_dir")
    except DataError as error:
        raise DataError(f"{path} is not a run record: {error}") from error
    record = {"sittings": []} | record  # which older records lack
    for key, kind in (NEEDED | (AT_THE_END if record.get("finished") is True else {})).items():
        if not isinstance(record.get(key), kind):
            raise DataError(f"{path} is not a run record: {key} is missing, or of another form.")
    if record["precision"] not in device.PRECISIONS:
        raise DataError(f"{path} is not a run record: its precision is {record['precision']}.")
    return record


def sitting(argv, precision):
    """Who computes now: the command, versions, commit, hardware and precision."""
    return {
        "command": shlex.join(["python", "dilatedUnet.py", *argv]),
        "versions": versions(),
        "commit": commit(),
        "hardware": hardware(),
        "precision": precision,
    }


def continued(record, before, epoch):
    """The record of a run that goes on after `epoch`: scores stay until there are new ones, and every sitting."""
    earlier = [one for one in before.get("sittings", []) if isinstance(one, dict)]
    earlier = earlier or [{key: before.get(key) for key in PROVENANCE} | {"from_epoch": 0}]
    earlier = [{"precision": before["precision"]} | one for one in earlier]  # which older sittings lack
    now = record["sittings"][-1] | {"from_epoch": epoch}
    if found := differences(earlier[-1], now):
        say(f"--resume: not as in the sitting before: {'; '.join(found)}")
    first = {"init_from": before.get("init_from")} | {key: before[key] for key in PROVENANCE[1:] if key in before}
    return before | record | first | {"sittings": [*earlier, now]}


def differences(before, now):
    """What is not as it was, in words."""

    def flat(one):
        parts = [one.get(key) for key in ("versions", "hardware")]
        plain = {key: one.get(key) for key in ("commit", "precision")}
        return plain | {k: v for d in parts if isinstance(d, dict) for k, v in d.items()}

    was, here = flat(before), flat(now)
    keys = sorted(was.keys() | here.keys())
    return [f"{key} was {was.get(key)}, is {here.get(key)}" for key in keys if was.get(key) != here.get(key)]


def versions():
    """Versions of Python and of the libraries that numbers depend on, where they are installed; the backend."""
    found = {"python": platform.python_version(), "backend": keras.backend.backend()}
    for name in ("keras", "tensorflow", "jax", "torch", "openvino", "numpy", "tifffile"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit():
    """The suite's own Git commit, with "+" where its program or networks have changed since; None outside a clone."""

    def git(*words):
        here = Path(__file__).parent.parent
        return subprocess.run(["git", "-C", here, *words], capture_output=True, text=True, timeout=10)

    try:
        within = git("rev-parse", "--show-prefix")
        if within.returncode or within.stdout.strip():
            return None  # a copy of the suite in another repository
        head = git("rev-parse", "--verify", "--quiet", "HEAD")
        changed = git("status", "--porcelain", "-uno", "--", "*.py", "*.weights.h5").stdout
        return head.stdout.strip() + "+" * bool(changed) or None
    except (OSError, subprocess.SubprocessError):
        return None


def hardware():
    """What computes: the device's name, the processor's cores, the system."""
    return {"device": device.name(), "cores": os.cpu_count(), "system": platform.platform()}


def intensity(sections, pixels=2**22):
    """The gray values that a network is trained on: type, range, lines, percentiles 1..99 (of every nth row)."""
    few = sections[:, :: max(1, math.ceil(sections.size / pixels))]
    few = few.view(np.uint8) if few.dtype == bool else few
    ends = {"dtype": str(sections.dtype), "min": float(sections.min()), "max": float(sections.max())}
    ends["dark_lines"] = dark_lines(sections[[0, len(sections) // 2, -1]])
    return ends | {"percentiles": np.percentile(few, range(1, 100)).round(4).tolist()}


# -- before a run begins ----------------------------------------------------------------------------------------


def prepare(place, record, *, resume, force, inputs, defaults):
    """Refuse to overwrite what is not this run's, or to go on with another; returns the record of the run before.

    `defaults` are the settings of a command line without flags: an older run whose record lacks a flag had those.
    """
    outputs = place.outputs()
    check_apart(place, inputs)
    before = read_record(place.record) if resume else None
    if resume and before and place.checkpoint.exists():
        check_same_run(place, before, record, defaults)
        check_own_weights(place, before)
        return before
    if resume:  # without a checkpoint: what was killed before its first one has a record, and perhaps a picture
        begun = [place.record, place.picture("weights")] if before and not before["finished"] else []
        words = "there is no checkpoint that it belongs to; --force starts anew"
        atomic.refuse_existing(*(path for path in outputs if path not in begun), words=words)
        say(f"--resume: no checkpoint in {place.folder} yet, so the run starts at its beginning")
    elif not force:
        atomic.refuse_existing(*outputs, words="--resume continues the run, --force replaces it")
    atomic.make_writable(place.folder, place.weights.parent)
    atomic.make_nameable(place.weights, prediction.borders_file(place.weights))
    if force:  # now, or old weights would stand beside a new run that has none yet
        for path in [*outputs, *place.folder.glob("tensorboard/*/events.out.tfevents.*")]:
            atomic.replaceable(path, force=True).unlink(missing_ok=True)
    return None


def check_apart(place, inputs):
    """No output is another one, an input, or something that no file replaces."""
    outputs, named = place.outputs(), (place.weights, prediction.record_file(place.weights))
    resolved = [str(atomic.replaceable(path, force=True)) for path in outputs]
    for path in named:  # by --weight_path
        if resolved.count(os.path.realpath(path)) > 1:
            raise DataError(f"--weight_path must not be one of the run's own files. Received: {place.weights}")
    for path in outputs:
        atomic.refuse_inputs("--weight_path" if path in named else "--run_dir", path, *inputs)


def folder_named(name):
    """The run folder where --run_dir names none: after the weights, with or without their ending."""
    return Path("runs") / name.removesuffix(".h5").removesuffix(".weights")


def check_same_run(place, before, record, defaults):
    now = json.loads(json.dumps(record["settings"]))
    was = {key: defaults[key] for key in now if key in defaults} | before["settings"]
    later = ("tta",) if was.get("merge") else ("tta", "merge")  # how a finished run may be scored once more
    free = {*PATHS, *later, *FREE_ON_RESUME}  # older records hold some of the last
    for key in sorted((was.keys() | now.keys()) - free):
        if was.get(key) != now.get(key):
            raise DataError(f"--resume needs the same settings: --{key} was {was.get(key)}. Received: {now.get(key)}")
    check_same_start(before, was.get("init_from"), now.get("init_from"))
    weights = prediction.weight_file(str(was.get("weight_path") or place.folder / "best.weights"))
    default = folder_named(weights.name) if was.get("weight_path") else place.folder
    old = Path(was.get("run_dir") or default)
    moved = os.path.relpath(weights, old) == os.path.relpath(place.weights, place.folder)  # both, with their folder
    if os.path.realpath(weights) != os.path.realpath(place.weights) and not moved:
        raise DataError(f"--resume needs the same settings: --weight_path was {weights}. Received: {place.weights}")
    if any(before["data"].get(key) != record["data"][key] for key in ("image_sha256", "mask_sha256")):
        raise DataError("--resume needs the same data: the pixels of --image_path or --mask_path have changed.")
    if before.get("split", record["split"]) != record["split"]:
        raise DataError("--resume needs the same split, and this version of the program splits the sections otherwise.")
    if now["clr_mode"] == "cosine" and before["epochs"] != record["epochs"]:
        rule = f"--epochs may not change on --resume with --clr_mode cosine, laid out for {before['epochs']} epochs"
        raise DataError(f"{rule}. Received: {record['epochs']}")


def check_own_weights(place, before):
    """What stands at the run's weights is its own, and not of another run with the same --weight_path."""

    def known(record):
        data = record.get("data") or {}
        hashes = [data.get(key) for key in ("image_sha256", "mask_sha256")]
        return [*hashes, *(record.get(key) for key in ("seed", "split", "network"))]

    with opened_checkpoint(place.checkpoint) as (_, kept):
        rows = Journal.of(kept).rows
    for path in (place.weights, place.last):
        if not (path.exists() and prediction.record_file(path).exists()):
            continue
        beside = prediction.read_record(path)
        after = beside.get("after")  # a row of this run, or of the epoch that no checkpoint holds yet
        own = not after or after in rows or after.get("epoch") == len(rows) + 1
        alike = (was == now for was, now in zip(known(before), known(beside), strict=True) if None not in (was, now))
        if not (own and all(alike)):
            words = "is of another run now: move it away, with the files beside it, or train with another --weight_path"
            raise DataError(f"--resume: {path} {words}.")


def check_same_start(before, was, now):
    """A run that goes on is past its start; other weights to start from would be named in vain."""
    file, begun = now and prediction.weight_file(now), before.get("init_from")
    same = bool(was) == bool(now)
    if same and was != now and file.is_file() and isinstance(begun, dict):
        same = begun.get("sha256") in (None, atomic.sha256(file))
    if not same:
        raise DataError(f"--resume needs the same settings: --init_from was {was}. Received: {now}")


def nothing_left(place, before, args):
    """A sentence if the run needs no more epochs, nor to be scored in another way, and its weights stand; else None."""
    was = before["settings"]
    if (args.merge and not was.get("merge")) or was.get("tta", args.tta) != args.tta:
        return None
    if not (before["finished"] and (before["epochs"] >= args.epochs or before["stopped_early"])):
        return None
    if not (place.weights.exists() and prediction.record_file(place.weights).exists()):
        return None
    more = "raise --epochs to go on"
    if args.minutes or was.get("clr_mode") == "cosine":
        more = "it was laid out for these epochs: --force trains anew"
    if before["stopped_early"]:
        more = "it stopped early, so more --epochs change nothing"
    return f"finished after epoch {before['final'].get('epoch')} already; {more}"
