"""Prediction in blocks: the same numbers as section by section, OME-Zarr in and out, kills, resumption, workers."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
from conftest import ROOT, cases, file_limit, ome_zarr, python, refused

import data
from files import atomic, omezarr
from predict import blocks, tiling

EXTRA = "the optional extra is not installed: pip install -r requirements-zarr.txt"
zarr = pytest.importorskip("zarr", reason=EXTRA)

FIELD = SimpleNamespace(multiple=4, shrink=0, remainder=0, radius=7)
NM = (40.0, 4.0, 8.0)


def load(weights, precision):
    """A maximum over 4 x 4 px, and those above it and on its right; zeros beyond the input.

    Beside the weights it notes its process and the number of its windows.
    """

    def predict(windows):
        with open(f"{weights}.log", "a") as log:
            log.write(f"{os.getpid()} {len(windows)}\n")
        count, height, width = windows.shape
        x = windows.astype(np.float32) / np.float32(255)
        low = x.reshape(count, height // 4, 4, width // 4, 4).max(axis=(2, 4))
        around = np.pad(low, ((0, 0), (1, 1), (1, 1)))
        low = 0.5 * low + 0.3 * around[:, :-2, 1:-1] + 0.2 * around[:, 1:-1, 2:]
        return (0.25 * x + 0.75 * low.repeat(4, axis=1).repeat(4, axis=2)).astype(np.float32)

    return predict


def load_not_a_number(weights, precision):
    return lambda windows: np.full(windows.shape, np.nan, np.float32)


def load_mortal(weights, precision):
    """`load`, which kills its process after DIES_AFTER calls."""
    network, left = load(weights, precision), iter(range(int(os.environ["DIES_AFTER"])))

    def predict(windows):
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return network(windows)

    return predict


def load_dying_once(weights, precision):
    """`load`, which kills the first process that comes to its fourth call."""
    network, left = load(weights, precision), iter(range(3))

    def predict(windows):
        if next(left, None) is None and not Path(f"{weights}.died").exists():
            Path(f"{weights}.died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return network(windows)

    return predict


def load_keras(weights, precision):
    from predict import prediction

    normalisation = prediction.read_record(weights)["normalisation"]
    return prediction.load_windows_predictor(weights, precision, "keras", json.dumps(normalisation))


def pixels(*shape, dtype=np.uint8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(dtype)


class Place:
    """A folder with weights, where images and their predictions are written."""

    def __init__(self, folder):
        self.folder, self.weights, self.output = folder, folder / "weights", folder / "prediction.ome.zarr"
        self.weights.write_bytes(b"0123")
        self.said = []

    def tiff(self, sections):
        tifffile.imwrite(self.folder / "image.tif", sections, photometric="minisblack")
        return self.folder / "image.tif"

    def zarr(self, sections, version="0.5", names="zyx", scale=NM, **more):
        path = self.folder / "image.ome.zarr"
        return ome_zarr(path, sections, version, names, scale, **more)

    def predict(self, source, *, network=load, field=FIELD, precision="float32", **flags):
        """The `predict` verb, in this process but for `workers`; returns the array of the output."""
        machine = {"output": str(self.output), "resume": False, "force": False, "scheduler": None, "workers": 0}
        args = SimpleNamespace(
            **machine | {"batch_size": 1, "tta": "none", "tile": 32, "overlap": None, "channel": None} | flags
        )
        how = {"settings": {"normalisation": {"mean": 1.0}}, "how": {"precision": precision}, "log": self.said.append}
        with data.iter_sections(source, channel=args.channel) as sections:
            blocks.run(args, sections, field, load=network, weights=self.weights, **how)
        return zarr.open_group(str(self.output), mode="r")["0"]

    def expected(self, sections, *, tile=32, overlap=None, tta="none", batch_size=1):
        """The prediction of one process, section by section, as `prediction.section_predictor` makes it."""
        predict = load(self.folder / "expected", "float32")
        grid = tiling.choose(sections.shape[1:], FIELD, max_tile=tile, halo=overlap)
        return np.stack([tiling.predict_section(each, predict, grid, tta=tta, batch=batch_size) for each in sections])

    def check(self, source, sections, **options):
        """Predict, and compare with `expected`."""
        found = self.predict(source, **options)[:]
        how = {key: options[key] for key in ("tile", "overlap", "tta", "batch_size") if key in options}
        np.testing.assert_array_equal(found, self.expected(sections, **how))
        return found

    def windows(self):
        """How many windows the network has seen for the output, and in how many processes."""
        log = Path(f"{self.weights}.log")
        lines = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
        return sum(int(count) for _, count in lines), len({process for process, _ in lines})

    def chunks(self):
        """Chunk files of an output of zarr v3, and when they were written."""
        return {file: file.stat().st_mtime_ns for file in (self.output / "0" / "c").rglob("*") if file.is_file()}


@pytest.fixture
def here(tmp_path):
    return Place(tmp_path)


@pytest.mark.parametrize(("tta", "batch_size"), [("none", 1), ("none", 3), ("4", 1), ("7", 3), ("8", 1)])
@pytest.mark.parametrize("shape", [(96, 80), (101, 43), (7, 210), (17, 19)])
@pytest.mark.parametrize("halo", [0, 8])
def test_blocks_equal_sections_bit_for_bit(here, shape, halo, tta, batch_size):
    """Whatever the size, and also where the halo is too small: then the places of the tiles show in the numbers."""
    sections, options = pixels(2, *shape), {"overlap": halo, "tta": tta, "batch_size": batch_size}
    assert here.check(here.tiff(sections), sections, **options).std() > 0.02, "a constant would prove nothing"


@pytest.mark.parametrize("chunks", [(1, 32, 32), (3, 24, 24), (64, 96, 80)])
@pytest.mark.parametrize("tta", ["none", "8"])
def test_sections_of_ome_zarr_are_predicted_whatever_their_chunks(here, chunks, tta):
    sections = pixels(7, 96, 80)
    here.check(here.zarr(sections, chunks=chunks), sections, overlap=0, tta=tta)


@pytest.mark.parametrize(("tta", "widest"), [("none", 32), ("8", 4 * 24 + 2 * 32)])
def test_no_more_of_a_section_is_read_than_the_tiles_of_a_block(here, monkeypatch, tta, widest):
    source, real, read = here.zarr(pixels(5, 40, 400), chunks=(4, 40, 40)), omezarr.ZarrReader.slab, []

    def slab(self, sections, rows, columns):
        read.append((sections.stop - sections.start, columns.stop - columns.start))
        return real(self, sections, rows, columns)

    monkeypatch.setattr(blocks, "_sample_sha256", lambda reader: "")
    monkeypatch.setattr(omezarr.ZarrReader, "slab", slab)
    here.predict(source, tta=tta, overlap=4)
    assert {depth for depth, _ in read} == {4, 1}, "sections that share chunks are read together"
    assert max(width for _, width in read) <= widest


def test_a_block_is_no_deeper_than_its_pixels_may_be_many(here, monkeypatch):
    monkeypatch.setattr(blocks, "SLAB_BYTES", 3 * 32 * 32)
    sections = pixels(7, 40, 40)
    here.check(here.zarr(sections, chunks=(7, 40, 40)), sections, overlap=4)
    assert here.said[-1] == "12 blocks"  # 2 x 2 tiles, three sections deep


def test_the_channel_that_is_named_is_predicted_and_written_alone(here):
    channels = pixels(2, 3, 40, 50)
    source = here.zarr(channels, names="czyx", scale=(1.0, *NM))
    found = here.predict(source, channel=1)
    assert found.shape == (1, 3, 40, 50)
    np.testing.assert_array_equal(found[0], here.expected(channels[1]))


def load_beyond(weights, precision):
    return lambda windows: windows / np.float32(100)


def test_a_probability_that_rounding_took_beyond_1_is_written_as_1(here):
    found = here.predict(here.tiff(pixels(1, 20, 24)), network=load_beyond)[:]
    np.testing.assert_array_equal(found, np.minimum(pixels(1, 20, 24) / np.float32(100), 1))


def attributes_of(path, version):
    """Metadata of an image, from the place where its version has it."""
    attributes = zarr.open_group(str(path), mode="r").attrs.asdict()
    if version == "0.4":
        assert attributes["multiscales"][0]["version"] == "0.4"
        return attributes["multiscales"]
    assert attributes["ome"]["version"] == "0.5"
    return attributes["ome"]["multiscales"]


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize("names", ["zyx", "tczyx", "yx"])
def test_the_prediction_has_the_axes_and_the_anisotropic_voxels_of_the_image(here, version, names):
    sections = pixels(2 if "z" in names else 1, 50, 30)
    shape = (1,) * (len(names) - 3) + sections.shape if "z" in names else sections.shape[1:]
    more = {"coordinateTransformations": [{"type": "scale", "scale": [1.0] * (len(names) - 1) + [1.5]}]}
    source = here.zarr(sections.reshape(shape), version, names, NM if "z" in names else NM[1:], **more)
    array = here.predict(source)
    (before,), (after,) = (attributes_of(path, version) for path in (source, here.output))
    assert after["axes"] == before["axes"]
    assert after["coordinateTransformations"] == more["coordinateTransformations"]
    assert (after["datasets"], array.shape) == ([before["datasets"][0] | {"path": "0"}], shape)
    assert array.chunks == (1,) * (len(names) - 2) + (16, 16)  # a tile of 32 without its halo of 8
    assert array.dtype == np.float32
    assert array.metadata.zarr_format == (2 if version == "0.4" else 3)
    assert version == "0.4" or array.metadata.dimension_names == tuple(names)
    with omezarr.open_zarr(here.output) as reader:
        assert reader.voxel_nm == (40.0 if "z" in names else None, 4.0, 12.0)
        np.testing.assert_array_equal(np.stack(list(reader)), here.expected(sections))


@cases(
    "voxel_nm, scale, units",
    (NM, [40.0, 4.0, 8.0], ["nanometer"] * 3),
    ((None, 4.0, 4.0), [1.0, 4.0, 4.0], [None, "nanometer", "nanometer"]),
    (None, [1.0] * 3, [None] * 3),
)
def test_the_prediction_of_a_tiff_carries_its_voxel_size_over(here, voxel_nm, scale, units):
    source = here.folder / "image.tif"
    data.write_mask(source, pixels(2, 20, 24) // 128, count=2, shape=(20, 24), voxel_nm=voxel_nm)
    here.predict(source)
    (multiscale,) = attributes_of(here.output, "0.5")
    assert [axis["name"] for axis in multiscale["axes"]] == ["z", "y", "x"]
    assert [axis.get("unit") for axis in multiscale["axes"]] == units
    assert multiscale["datasets"][0]["coordinateTransformations"] == [{"type": "scale", "scale": scale}]
    assert omezarr.open_zarr(here.output).voxel_nm == voxel_nm


def test_without_the_extra_the_error_says_what_to_install(here, monkeypatch):
    path = here.zarr(pixels(2, 8, 8))
    monkeypatch.setitem(sys.modules, "distributed", None)
    refused(r"OME-Zarr needs distributed: pip install -r requirements-zarr\.txt", here.predict, path, workers=None)
    assert not here.output.exists()
    here.predict(path, workers=0)
    monkeypatch.setitem(sys.modules, "zarr", None)
    refused("OME-Zarr needs zarr", omezarr.open_zarr, path)


def kill(here, source, after, **options):
    """Predict in a process of its own, which dies after so many windows."""
    code = f"""
from pathlib import Path
import test_blocks
here = test_blocks.Place(Path({str(here.folder)!r}))
here.predict(Path({str(source)!r}), network=test_blocks.load_mortal, **{options!r})
"""
    folders = os.pathsep.join(str(folder) for folder in (ROOT, ROOT / "tests"))
    environment = os.environ | {"DIES_AFTER": str(after), "PYTHONPATH": folders}
    python("-c", code, code=-signal.SIGKILL, env=environment)


@pytest.mark.parametrize(("tta", "versions", "after", "lost"), [("none", 1, 13, 0), ("8", 8, 200, 56)])
def test_a_killed_prediction_is_resumed_and_no_chunk_is_predicted_twice(here, monkeypatch, tta, versions, after, lost):
    """Lost are the windows of the part that was at work: of the third section, after 9 tiles in 8 versions of two."""
    sections, options = pixels(4, 60, 70), {"overlap": 4, "tta": tta}
    source = here.zarr(sections, chunks=(4, 24, 24))
    kill(here, source, after, **options)
    finished = here.chunks()
    assert len(finished) == (13 if tta == "none" else 18)
    monkeypatch.setenv("DIES_AFTER", "1000000")
    here.check(source, sections, network=load_mortal, resume=True, **options)
    assert finished.items() <= here.chunks().items(), "a finished chunk was written again"
    assert here.windows() == (4 * 9 * versions + lost, 2)


def test_a_finished_prediction_is_resumed_without_a_window(here):
    source = here.tiff(pixels(2, 40, 50))
    here.predict(source, resume=True)  # without an output it begins
    before = here.windows()
    here.predict(source, resume=True)
    assert here.windows() == before
    assert here.said[1::2] == ["24 blocks, 0 of them finished before", "24 blocks, 24 of them finished before"]
    assert here.said[0].startswith("sections of 40 x 50 px: 12 tiles of 32 x 32 px")


@cases(
    "damage",
    lambda chunk: chunk.unlink(),
    lambda chunk: chunk.write_bytes(b""),
    lambda chunk: chunk.write_bytes(chunk.read_bytes()[:50]),
    lambda chunk: chunk.write_bytes(chunk.read_bytes() + b"0"),
    lambda chunk: chunk.rename(chunk.with_suffix(".0123456789abcdef.partial")),  # zarr's name until it is whole
)
@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_a_chunk_that_is_not_whole_is_predicted_again(here, version, damage):
    source, options = here.zarr(pixels(2, 60, 70), version), {"tta": "8", "overlap": 4}
    whole = here.predict(source, **options)[:]
    once = here.windows()[0]
    damage(Path(here.output, "0", *([] if version == "0.4" else ["c"]), "1", "1", "1"))
    np.testing.assert_array_equal(here.predict(source, resume=True, **options)[:], whole)
    assert here.windows()[0] - once == once // 2, "one of the two sections, and nothing of the other"
    assert not list(here.output.rglob("*.partial"))


@pytest.mark.parametrize(("key", "value"), [("shape", [3000, 60, 70]), ("data_type", "float64"), ("shape", 7)])
def test_resume_refuses_an_array_that_is_not_as_it_was_made(here, key, value):
    source = here.tiff(pixels(2, 60, 70))
    here.predict(source)
    file = here.output / "0" / "zarr.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    refused("array", here.predict, source, resume=True)


def test_a_full_disk_is_said_with_the_name_of_the_output_and_resumed(here):
    """A real limit on the size of files."""
    source = here.tiff(pixels(1, 60, 70))
    with file_limit(3000), pytest.raises(data.DataError, match=r"prediction.ome.zarr could not be written"):
        here.predict(source, tile=64)
    here.check(source, pixels(1, 60, 70), tile=64, resume=True)


def test_two_do_not_write_one_output_and_a_prediction_that_is_not_finite_is_not_written(here):
    source = here.tiff(pixels(1, 20, 24))
    with atomic.locked(here.output), pytest.raises(data.DataError, match="in use by another run"):
        here.predict(source)
    with pytest.raises(data.DataError, match="the prediction of section 0 is not finite"):
        here.predict(here.tiff(pixels(1, 20, 24)), network=load_not_a_number)
    assert here.chunks() == {}


@cases(
    "change, words",
    ({"weights": b"9876"}, "weights_sha256"),
    ({"seed": 1}, "image_sha256"),
    ({"count": 3}, "image_shape"),
    ({"tile": 40}, "tile"),
    ({"overlap": 4}, "halo"),
    ({"tta": "4"}, "tta"),
    ({"precision": "bfloat16"}, "precision"),
)
def test_resume_refuses_what_is_made_of_something_else_and_force_replaces_it(here, change, words):
    here.predict(here.tiff(pixels(2, 60, 70)), overlap=8)
    before, made = here.chunks(), {"weights": b"0123", "seed": 0, "count": 2} | change
    here.weights.write_bytes(made.pop("weights"))
    sections = pixels(made.pop("count"), 60, 70, seed=made.pop("seed"))
    source, options = here.tiff(sections), {"overlap": 8} | made
    refused(r"exists already .--resume goes on with it, --force replaces it", here.predict, source, **options)
    with pytest.raises(data.DataError, match=f"is made of another (.*, )?{words}(, .*)? .--force begins anew"):
        here.predict(source, resume=True, **options)
    assert here.chunks() == before
    here.check(source, sections, force=True, **options)
    assert not list(here.folder.glob(".*")), "what was written beside the output is gone"


@pytest.mark.parametrize("flag", ["resume", "force"])
def test_an_image_that_is_no_prediction_is_kept(here, flag):
    sections = pixels(2, 20, 24)
    here.output = here.zarr(sections)
    with pytest.raises(data.DataError, match=r"for a prediction of this suite, and .*image.ome.zarr is none"):
        here.predict(here.tiff(sections), **{flag: True})
    np.testing.assert_array_equal(np.stack(list(omezarr.open_zarr(here.output))), sections)


@pytest.fixture
def distributed():
    """The module; what it leaves in the environment goes afterwards."""
    module, before = pytest.importorskip("distributed", reason=EXTRA), dict(os.environ)
    yield module
    for name in set(os.environ) - set(before):
        del os.environ[name]


@pytest.mark.slow
@pytest.mark.usefixtures("distributed")
def test_two_processes_one_of_which_dies_give_the_same_numbers(here):
    sections = pixels(4, 60, 70)
    here.check(here.zarr(sections), sections, network=load_dying_once, workers=2, overlap=4)
    assert Path(f"{here.weights}.died").exists()
    assert here.windows()[1] >= 2
    assert here.windows()[0] >= 4 * 9


def test_a_worker_sees_the_file_that_holds_an_array(tmp_path):
    (tmp_path / "x.h5").touch()
    job = SimpleNamespace(image=f"{tmp_path}/x.h5:/raw", weights=str(tmp_path), output=f"{tmp_path}/gone.h5:/raw")
    assert blocks.unseen(job) == [job.output]


@pytest.mark.slow
@pytest.mark.usefixtures("distributed")
def test_errors_of_workers_arrive_as_one_sentence(here, monkeypatch):
    import dask

    source = here.tiff(pixels(2, 20, 24))
    refused(r"the prediction of section . is not finite", here.predict, source, network=load_not_a_number, workers=1)
    monkeypatch.setenv("DIES_AFTER", "0")
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 1}),
        pytest.raises(data.DataError, match=r"2 workers died with the same block: out of memory\?"),
    ):
        here.predict(source, network=load_mortal, workers=1, resume=True)
    here.check(source, pixels(2, 20, 24), resume=True)


@pytest.fixture
def scheduler(tmp_path):
    """Address of a scheduler with one worker, which run in another folder and know the networks above but no suite."""
    pytest.importorskip("distributed", reason=EXTRA)
    file, environment = tmp_path / "elsewhere" / "scheduler.json", os.environ | {"PYTHONPATH": str(ROOT / "tests")}
    file.parent.mkdir()
    running = []
    for words in ("scheduler --port 0", f"worker --nthreads 2 --local-directory {tmp_path}"):
        command = [sys.executable, "-m", "dask", *words.split(), "--scheduler-file", file, "--no-dashboard"]
        running.append(subprocess.Popen(command, cwd=file.parent, env=environment, stderr=subprocess.DEVNULL))
    while not file.exists() or not file.read_text().endswith("}"):
        assert running[0].poll() is None
        time.sleep(0.05)
    yield json.loads(file.read_text())["address"]
    for process in reversed(running):
        process.terminate()
        process.wait(30)


@pytest.mark.slow
def test_workers_of_a_scheduler_that_is_there_need_not_know_the_suite(here, scheduler):
    sections = pixels(3, 60, 70)
    here.check(here.zarr(sections), sections, scheduler=scheduler, workers=None, overlap=4)
    assert here.windows()[1] == 1
    with pytest.raises(data.DataError, match=r"the prediction of section . is not finite"):
        here.predict(here.zarr(sections), network=load_not_a_number, scheduler=scheduler, workers=None, force=True)
    here.weights.write_bytes(b"new weights: a worker that is still there loads them")
    here.predict(here.zarr(sections), scheduler=scheduler, workers=None, force=True)
    assert here.windows() == (3 * 9 + 3 * 20, 1)


def say_hello(server):
    with server.accept()[0] as connection:
        connection.sendall(b"SSH-2.0-OpenSSH")
        connection.recv(1)


@pytest.mark.parametrize("found", ["nobody", "silence", "another program", "no address"])
def test_a_scheduler_that_cannot_be_reached_is_said_to_be(here, monkeypatch, distributed, found):
    monkeypatch.setattr(blocks, "CONNECT_S", 1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = "nonsense::x" if found == "no address" else f"tcp://127.0.0.1:{server.getsockname()[1]}"
        if found == "nobody":
            server.close()
        elif found == "another program":
            threading.Thread(target=say_hello, args=(server,), daemon=True).start()
        with pytest.raises(data.DataError, match=f"--scheduler must be .* tcp://host:8786. Received: {address}: "):
            here.predict(here.tiff(pixels(1, 20, 24)), scheduler=address, workers=None)
    assert not here.output.exists()


@pytest.mark.slow
def test_a_network_of_the_suite_gives_the_same_bits_as_section_by_section(here):
    from network import unet
    from predict import prediction

    settings = {"filters": [4, 6], "dilate": False, "dilate_rate": 1, "addition": True, "dropout": 0.0, "classes": 2}
    normalisation = data.Normalisation(120.0, 45.0)
    record = {"network": settings, "normalisation": normalisation.to_dict()}
    prediction.save_weights(unet.build(**settings, seed=0), here.weights, record)
    here.weights = prediction.weight_file(here.weights)
    network, _ = prediction.load_network(here.weights)
    options = {"tile": 64, "overlap": 8, "tta": "8"}
    section, field = pixels(70, 101), unet.field_from_settings(settings)
    expected = prediction.section_predictor(network, normalisation, batch=2, **options)(section)
    found = here.predict(here.tiff(section[None]), network=load_keras, field=field, batch_size=2, **options)[0]
    assert found.std() > 1e-3
    np.testing.assert_array_equal(found, expected)
