"""What the tests share: the real data where it is, small stacks, and the command line as a user calls it."""

import contextlib
import csv
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import settings

from files.atomic import DataError

settings.register_profile("suite", deadline=None)  # a busy machine is slow
settings.load_profile("suite")

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
if "DILATED_UNET_DATA" not in os.environ and (SHARED / "isbi2012").is_dir():
    os.environ["DILATED_UNET_DATA"] = str(SHARED)


def pytest_collection_modifyitems(items):
    """The slow ones first: one of two workers begins with them, and the other one takes over what is left."""
    items.sort(key=lambda item: "slow" not in item.keywords)


def _real(name):
    folder = Path(os.environ.get("DILATED_UNET_DATA", "")) / name
    if not os.environ.get("DILATED_UNET_DATA") or not folder.is_dir():
        pytest.skip(f"real data: DILATED_UNET_DATA names no folder that holds {name}")
    return folder


@pytest.fixture(scope="session")
def isbi():
    """Folder with the real ISBI-2012 files, or a skip that says why."""
    return _real("isbi2012")


@pytest.fixture(scope="session")
def hela():
    """Folder with real DIC-HeLa frames, or a skip that says why."""
    return _real("dic-hela")


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """Folder with images.tif and labels.tif (0/255): ten sections of 64 x 80 px that look like EM."""
    import tifffile

    import data

    folder = tmp_path_factory.mktemp("small")
    images, masks = data.synthetic(10, (64, 80), seed=0)
    tifffile.imwrite(folder / "images.tif", images.sections, imagej=True, metadata={"axes": "ZYX"})
    tifffile.imwrite(folder / "labels.tif", masks.sections * np.uint8(255), imagej=True, metadata={"axes": "ZYX"})
    return folder


@pytest.fixture(scope="session")
def labelled():
    """Interior probability, worse in section 4, and labels 0/255 of six sections with crooked cells."""
    from scipy import ndimage

    rng = np.random.default_rng(7)
    truth = np.zeros((6, 64, 80), np.uint8)
    for section in truth:
        height = ndimage.gaussian_filter(rng.normal(size=section.shape), 5)
        section[:] = 255 * (np.abs(height) > 0.25 * height.std())
    proposal = ndimage.gaussian_filter(truth / 255.0, (0, 1, 1)) + rng.normal(0, 0.05, truth.shape)
    proposal[4] = 0.5 * proposal[4] + 0.4
    return np.clip(proposal, 0, 1).astype(np.float32), truth


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """The command line in this process, in a folder of its own; returns the exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    return lambda *words, code=None: call_here(capsys, *words).ended(code)


def call_here(capsys, *words, main=None):
    import dilatedUnet

    capsys.readouterr()
    try:
        code = (main or dilatedUnet.main)([str(word) for word in words])
    except SystemExit as stop:  # argparse's way out
        code = stop.code
    return Called(code, *capsys.readouterr())


def cases(names, *rows):
    """A test for every row of a table with these columns."""
    return pytest.mark.parametrize(names, rows)


def python(*words, code=0, **options):
    """Python in a process of its own, in the folder of the suite, which ends with that exit code."""
    options = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 600} | options
    done = subprocess.run([sys.executable, *map(str, words)], **options)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def refused(words, function, *args, **options):
    """The call must end in the sentence that the program would say, which holds these words."""
    with pytest.raises(DataError, match=words):
        function(*args, **options)


@pytest.fixture
def suite(tmp_path):
    """`python dilatedUnet.py ...` in a folder of its own, in a process of its own."""
    return lambda *words, **options: python(ROOT / "dilatedUnet.py", *words, **{"cwd": tmp_path} | options)


@contextlib.contextmanager
def file_limit(size):
    """No file may become larger than that: as if the disk were full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def history(folder):
    """The rows of a run's history.csv; a column is left out of the rows where it is empty."""
    with open(folder / "history.csv", newline="") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def with_ctrl_c():
    """For `preexec_fn`: a shell that runs the tests in the background has its children ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Called(NamedTuple):
    """What a command did: its exit code, and what it wrote to stdout and stderr."""

    code: int
    out: str
    err: str

    def ended(self, code):
        assert code in (None, self.code), self.err
        return self


@pytest.fixture
def refuses(call):
    """A command that must end with exit code 2 and one sentence on stderr that holds certain words."""

    def refuse(words, *argv):
        done = call(*argv, code=2)
        assert "Traceback" not in done.err + done.out
        said = [line for line in done.err.splitlines() if line.startswith("dilatedUnet.py")]
        assert len(said) == 1, done.err
        assert said[0] == done.err.splitlines()[-1]
        assert words in said[0], said[0]
        return said[0]

    return refuse


def ome_zarr(
    path, sections, version="0.5", names="zyx", scale=(40.0, 4.0, 8.0), *, unit="nanometer", chunks=None, **more
):
    """Write an OME-Zarr image of two levels; `scale` is that of the last axes, `more` goes into its metadata."""
    import zarr

    kinds = {"t": "time", "c": "channel"}
    axes = [{"name": n, "type": kinds.get(n, "space")} | ({} if n in kinds else {"unit": unit}) for n in names]
    levels = {"s0": sections, "s1": sections[..., ::2, ::2]}
    factors = [1.0] * (len(names) - len(scale)) + list(scale)
    steps = ({"type": "scale", "scale": [f * 2**i for f in factors]} for i in range(len(levels)))
    datasets = [{"path": level, "coordinateTransformations": [step]} for level, step in zip(levels, steps, strict=True)]
    multiscale = {"axes": axes, "datasets": datasets} | more
    old, new = {"multiscales": [{"version": "0.4"} | multiscale]}, {"version": "0.5", "multiscales": [multiscale]}
    zarr_format, dimensions = (2, None) if version == "0.4" else (3, list(names))
    attributes = old if version == "0.4" else {"ome": new}
    group = zarr.create_group(str(path), zarr_format=zarr_format, attributes=attributes, overwrite=True)
    for level, array in levels.items():
        sides = chunks or tuple(min(n, 24) for n in array.shape)
        group.create_array(level, data=array, chunks=sides, dimension_names=dimensions)
    return path


# -- training runs ---------------------------------------------------------------------------------------------

TINY = "--filters 2,3 --window 32 --precision float32 --batch_size 2 --steps_per_epoch 2 --epochs 2"
HOLDOUT = "--protocol holdout --val_sections 8-9 --gap 1 --inner_sections 2"
FINISHED = (
    f"{TINY} {HOLDOUT} --augment all --epochs 3 --lr 1e-4 --max_lr 1e-2 --step_size 4 --clr_mode triangular2 --seed 7 "
    "--image_path images.tif --mask_path labels.tif --weight_path weights/x.weights"
).split()


@pytest.fixture(scope="session")
def finished(small, tmp_path_factory):
    """Folder of a run that ended well, and what it said; not to be written to."""
    folder = tmp_path_factory.mktemp("finished")
    for name in ("images.tif", "labels.tif"):
        shutil.copy(small / name, folder)
    call_quietly(folder, FINISHED)
    return folder


def call_quietly(folder, words):
    """The command line in this process, in that folder, for a fixture of a whole session."""
    import dilatedUnet

    here, stderr = os.getcwd(), sys.stderr
    os.chdir(folder)
    try:
        with open(folder / "stderr.txt", "w") as sys.stderr:
            assert dilatedUnet.main([str(word) for word in words]) == 0
    finally:
        os.chdir(here)
        sys.stderr = stderr


@pytest.fixture
def again(finished, tmp_path, monkeypatch, capsys):
    """The command of the finished run in a copy of its folder, with more flags."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return lambda more="", code=0: call_here(capsys, *FINISHED, *more.split()).ended(code)


@pytest.fixture
def train(call, small):
    """`train` on the small stack with a tiny network; later flags replace earlier ones."""
    files = ("--image_path", small / "images.tif", "--mask_path", small / "labels.tif")
    return lambda words="", *more, code=0: call(*files, *TINY.split(), *words.split(), *more, code=code)


def arrays(path):
    """What is in a checkpoint, but for the seconds it took."""
    with np.load(path, allow_pickle=False) as file:
        found = {name: file[name] for name in file.files if name != "meta"}
        meta = json.loads(str(file["meta"]))
    meta.pop("seconds")
    # Keras counts up the names it makes within one process
    meta["names"] = [re.sub(r"_[0-9]+(?=/|$)", "", name) for name in meta["names"]]
    return found, meta


def weights_in(path):
    import h5py

    found = {}
    with h5py.File(path) as file:
        file.visititems(lambda name, item: found.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None)
    assert found
    return found


def same(first, second):
    """Bit for bit, name by name."""
    assert first.keys() == second.keys()
    return all(a.dtype == second[k].dtype and a.tobytes() == second[k].tobytes() for k, a in first.items())


def same_weights(path, other):
    return same(weights_in(path), weights_in(other))


def assert_same_run(run, other, weights=("best", "best")):
    """Two run folders hold the same history, checkpoint, best and last weights, bit for bit."""
    assert (run / "history.csv").read_bytes() == (other / "history.csv").read_bytes()
    (mine, my_meta), (theirs, their_meta) = (arrays(folder / "checkpoint.npz") for folder in (run, other))
    assert my_meta == their_meta
    assert same(mine, theirs)
    for ours, others in (weights, ("last", "last")):
        assert same_weights(run / f"{ours}.weights.h5", other / f"{others}.weights.h5"), ours
        assert strict(run / f"{ours}.json")["after"] == strict(other / f"{others}.json")["after"]


def files(folder):
    return {path: path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def strict(path):
    """JSON as the standard has it: no NaN, no Infinity."""

    def refuse(word):
        raise AssertionError(f"{path} holds {word}")

    return json.loads(Path(path).read_text(), parse_constant=refuse)


def with_(**changed):
    """A function that writes these values into a JSON file."""
    return lambda path: path.write_text(json.dumps(strict(path) | changed))
