"""Fetching: from a server on this machine, good and bad; nothing wrong ever stays in the cache."""

import hashlib
import http.server
import io
import shutil
import threading
import time
import zipfile
from unittest.mock import Mock

import numpy as np
import pooch
import pytest
import tifffile
from conftest import refused

from data import DataError, fetch, read_stack, resolve, sha256_pixels
from files import atomic, fetching

NAMES, LABELS = ("train-volume.tif", "train-labels.tif", "test-volume.tif"), "test-labels.tif"


def tiff(sections, **options):
    file = io.BytesIO()
    tifffile.imwrite(file, sections, photometric="minisblack", **options)
    return file.getvalue()


def zipped(files):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return file.getvalue()


PIXELS = np.random.default_rng(0).integers(0, 255, (4, 3, 16, 16), np.uint8)
STACKS = dict(zip((*NAMES, LABELS), PIXELS, strict=True))
OFFICIAL = {name: tiff(sections) for name, sections in STACKS.items()}


class Web:
    """A web server: `files` is what it has, `cut` what it stops sending half way, `asked` what was asked for."""

    def __init__(self):
        self.files, self.cut, self.asked = {}, set(), []
        web = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                web.asked.append(self.path)
                content = web.files.get(self.path)
                self.send_response(404 if content is None else 200)
                self.send_header("Content-Length", str(len(content or b"")))
                self.end_headers()
                self.wfile.write((content or b"")[: len(content or b"") // (2 if self.path in web.cut else 1)])

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def not_fetched(web, *words, left=()):
    """Fetching must end in a sentence that holds the words, and leave only whole files in the cache."""
    with pytest.raises(DataError) as caught:
        fetch("isbi2012", log=web.said.append)
    assert not [word for word in (*words, "could not be fetched", str(web.cache)) if word not in str(caught.value)]
    assert [path.name for path in web.cache.glob("*")] == list(left)


@pytest.fixture
def web(tmp_path, monkeypatch):
    """A small challenge on a server of this machine, and an empty cache."""
    web = Web()
    monkeypatch.setattr(fetching, "ISBI_FILES", {name: sha256_pixels(STACKS[name]) for name in NAMES})
    monkeypatch.setattr(fetching, "ISBI_SHAPE", (3, 16, 16))
    monkeypatch.setattr(fetching, "ISBI_ARCHIVE", f"{web.url}/archive.zip")
    monkeypatch.setattr(fetching, "ISBI_MIRRORS", (f"{web.url}/mirror1/data", f"{web.url}/mirror2"))
    monkeypatch.setenv("DILATED_UNET_DATA", str(tmp_path / "cache"))
    web.cache = tmp_path / "cache" / "isbi2012"
    web.said = []
    yield web
    web.close()


def offer_archive(web, changed):
    files = {f"ISBI-2012-challenge/deep/{name}": content for name, content in (OFFICIAL | changed).items()}
    web.files["/archive.zip"] = zipped(files | {"__MACOSX/._train-volume.tif": b"left by a Mac"})


def offer_mirror(web, folder, changed):
    web.files |= {f"/{folder}/{name}": changed.get(name, OFFICIAL[name]) for name in NAMES}


def fetched(web, names=NAMES):
    """Fetch, and check that the cache holds exactly these files, whole."""
    assert fetch("isbi2012", log=web.said.append) == web.cache
    assert sorted(path.name for path in web.cache.iterdir()) == sorted(names)
    for name in names:
        np.testing.assert_array_equal(read_stack(web.cache / name).sections, STACKS[name])


PACKED = {name: tiff(STACKS[name], compression="zlib", byteorder=">") for name in NAMES}
WRONG_PIXEL = {"train-labels.tif": tiff(STACKS["train-labels.tif"] ^ (np.arange(16) == 7))}
WRONG_SHAPE = {LABELS: tiff(np.zeros((2, 16, 16), np.uint8))}
NO_TIFF = {"test-volume.tif": b"<html>not found</html>"}
MIRROR = [f"/mirror1/data/{name}" for name in NAMES]
SOURCES = {  # what the archive, the first and the second mirror offer that is not official; what comes; what is asked
    "archive": ({}, None, None, [*NAMES, LABELS], ["/archive.zip"]),
    "archive, the same pixels in another container": (PACKED, None, None, [*NAMES, LABELS], ["/archive.zip"]),
    "archive cut off": ({}, {}, None, NAMES, ["/archive.zip", *MIRROR]),
    "archive with wrong pixels": (WRONG_PIXEL, {}, None, [*NAMES, LABELS], ["/archive.zip", MIRROR[1]]),
    "archive with wrong labels, which no hash tells": (WRONG_SHAPE, None, None, NAMES, ["/archive.zip"]),
    "mirror": (None, {}, None, NAMES, ["/archive.zip", *MIRROR]),
    "mirror with a wrong file": (None, NO_TIFF, {}, NAMES, ["/archive.zip", *MIRROR, "/mirror2/test-volume.tif"]),
}


@pytest.mark.parametrize("case", SOURCES)
def test_what_one_source_lacks_comes_from_the_next(web, case):
    archive, first, second, names, asked = SOURCES[case]
    if archive is not None:
        offer_archive(web, archive)
    if case == "archive cut off":
        web.cut.add("/archive.zip")
    for folder, changed in (("mirror1/data", first), ("mirror2", second)):
        if changed is not None:
            offer_mirror(web, folder, changed)
    fetched(web, names)
    assert web.asked == asked
    if LABELS in names:
        assert resolve("isbi2012", "test_mask") == resolve("isbi2012-test", "mask") == web.cache / LABELS
        return
    refused("it comes only with", resolve, "isbi2012", "test_mask")


def test_nothing_that_is_cut_off_or_not_the_published_file_stays_and_it_is_said_why_and_what_to_do(web):
    web.files["/mirror2/train-volume.tif"] = b"II*\0 cut"
    reasons = ("archive.zip: 404", "mirror1/data: 404", "train-volume.tif is not the published file")
    not_fetched(web, *reasons, "put", "--image_path synthetic")
    offer_archive(web, {})
    web.files["/archive.zip"] = web.files["/archive.zip"][:-40]  # by its server, without a word
    not_fetched(web)
    assert not web.cache.exists()
    offer_mirror(web, "mirror1/data", {})
    web.cut.add("/mirror1/data/train-labels.tif")
    not_fetched(web, "put train-labels.tif, test-volume.tif into", left=["train-volume.tif"])


def test_wrong_file_in_the_cache_is_replaced_but_not_lost_before(web):
    web.cache.mkdir(parents=True)
    (web.cache / "train-volume.tif").write_bytes(OFFICIAL["train-volume.tif"][:-300])
    not_fetched(web, "train-volume.tif is not the published file", left=["train-volume.tif"])
    offer_mirror(web, "mirror2", {})
    fetched(web)


def test_file_that_is_there_needs_no_network_even_if_others_are_missing(web):
    web.cache.mkdir(parents=True)
    (web.cache / "test-volume.tif").write_bytes(OFFICIAL["test-volume.tif"])
    assert (resolve("isbi2012", "test"), web.asked) == (web.cache / "test-volume.tif", [])


def test_no_network_is_told_within_seconds(web):
    web.close()
    start = time.perf_counter()
    not_fetched(web, "no connection")
    assert time.perf_counter() - start < 10


def test_an_unwritable_cache_and_unknown_names_are_a_sentence(web, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    for named, words in ((tmp_path / "file", "cannot be written"), ("~no-such-user/x", "nobody here is ~no-such-user")):
        monkeypatch.setenv("DILATED_UNET_DATA", str(named))
        refused(words, fetch, "isbi2012", log=web.said.append)
    monkeypatch.delenv("DILATED_UNET_DATA")
    monkeypatch.setattr(pooch, "os_cache", Mock(side_effect=RuntimeError("could not determine the home directory")))
    refused("no home folder .* DILATED_UNET_DATA", fetch, "isbi2012", log=web.said.append)
    for name in ("synthetic", "isbi2013", ""):
        refused("the data sets are isbi2012, dic-hela, phc-u373", fetch, name)


def test_what_a_killed_download_left_goes_and_cached_files_are_not_asked_for_again(web):
    (web.cache / f".part{2**22 + 1}_{atomic.HOST}-fetched").mkdir(parents=True)
    offer_archive(web, {})
    fetched(web, [*NAMES, LABELS])
    for _ in range(2):
        assert fetch("isbi2012", log=web.said.append) == web.cache
    assert resolve("isbi2012", "test") == resolve("isbi2012-test", "image") == web.cache / "test-volume.tif"
    assert web.asked == ["/archive.zip"]
    assert {f"{LABELS}: kept unchecked, its hash is not known", "train-volume.tif: checked"} < set(web.said)


@pytest.fixture
def cells(web, monkeypatch):
    files = {"DIC/01/t000.tif": b"a", "DIC/01_ST/SEG/man_seg000.tif": b"b", "DIC/02/t000.tif": b"c"}
    web.files["/cells.zip"] = zipped(files)
    sha256 = hashlib.sha256(web.files["/cells.zip"]).hexdigest()
    monkeypatch.setattr(fetching, "CELL_ARCHIVES", {"dic-hela": (f"{web.url}/cells.zip", sha256)})
    web.cache = web.cache.with_name("dic-hela")
    return web


def test_cells_are_unpacked_without_their_top_folder(cells):
    assert fetching.fetch("dic-hela", log=cells.said.append) == cells.cache
    assert sorted(path.name for path in cells.cache.iterdir()) == ["01", "01_ST", "02"]
    assert resolve("dic-hela", "mask") == cells.cache / "01_ST" / "SEG"
    assert resolve("dic-hela", "test") == cells.cache / "02"
    refused("02_ST/SEG or 02_GT/SEG", resolve, "dic-hela", "test_mask")
    assert cells.asked == ["/cells.zip"]


def test_cells_with_another_hash_never_stay(cells):
    cells.files["/cells.zip"] = zipped({"DIC/01/t000.tif": b"other"})
    refused(r"dic-hela could not be fetched.*01 and 01_ST or 01_GT", fetch, "dic-hela", log=cells.said.append)
    assert not cells.cache.exists()


def test_cells_that_are_there_are_used_as_they_are_and_not_overwritten(cells):
    (cells.cache / "01").mkdir(parents=True)
    (cells.cache / "01_GT" / "SEG").mkdir(parents=True)
    assert resolve("dic-hela", "image") == cells.cache / "01"
    assert (resolve("dic-hela", "mask"), cells.asked) == (cells.cache / "01_GT" / "SEG", [])
    shutil.rmtree(cells.cache / "01_GT")
    (cells.cache / "01" / "mine.tif").write_text("mine")
    fetch("dic-hela", log=cells.said.append)
    assert [path.name for path in (cells.cache / "01").iterdir()] == ["mine.tif"]
    assert (cells.cache / "01_ST" / "SEG" / "man_seg000.tif").exists()


def test_local_copy_has_the_published_pixels(isbi, monkeypatch):
    monkeypatch.setenv("DILATED_UNET_DATA", str(isbi.parent))
    for name, pixels in fetching.ISBI_FILES.items():
        stack = read_stack(isbi / name)
        assert (stack.sections.shape, sha256_pixels(stack.sections)) == (fetching.ISBI_SHAPE, pixels)
    monkeypatch.setattr(fetching, "_download", None)  # a download would fail
    assert fetch("isbi2012") == isbi
