"""The data sets: found in the cache, or fetched into it and checked, so that a wrong file never stays there.

`DILATED_UNET_DATA` names another cache folder. `data.py` is the door to all this.
"""

import contextlib
import os
import re
import shutil
import zipfile
import zlib
from pathlib import Path

from files import atomic
from files.atomic import DataError
from files.sections import flag
from files.stacks import load, open_stack, sha256_pixels

DATA_SETS = ("isbi2012", "synthetic", "dic-hela", "phc-u373")
ISBI_ROLES = {
    "image": "train-volume.tif",
    "mask": "train-labels.tif",
    "test": "test-volume.tif",
    "test_mask": "test-labels.tif",
}
ISBI_ARCHIVE = "https://downloads.imagej.net/ISBI-2012-challenge.zip"
ISBI_MIRRORS = (
    "https://raw.githubusercontent.com/alexklibisz/isbi-2012/238a567ae843f7c03e5cc5d3f233cd3f93f0da17/data",
    "https://raw.githubusercontent.com/zhixuhao/unet/b45af4d458437d8281cc218a07fd4380818ece4a/data/membrane",
)
ISBI_FILES = {  # SHA-256 of the decoded pixels
    "train-volume.tif": "200da3d452d726e6c9ca1ce04b869d4edb727320d23b516d01cce707dc8c4760",
    "train-labels.tif": "a7cb64000a1a7e542682927e19c91339f58f9f178e0bcce4e207371116f0ca36",
    "test-volume.tif": "1b58fa7ec1d0ff9d39a855622db3ff66a97863036339b0d04be51b2f5a99b0e9",
}
ISBI_SHAPE = (30, 512, 512)
CELL_ARCHIVES = {  # url, SHA-256 of the zip file
    "dic-hela": (
        "http://data.celltrackingchallenge.net/training-datasets/DIC-C2DH-HeLa.zip",
        "832fed2d05bb7488cf9c51a2994b75f8f3f53b3c3098856211f2d39023c34e1a",
    ),
    "phc-u373": (
        "http://data.celltrackingchallenge.net/training-datasets/PhC-C2DH-U373.zip",
        "b18185c18fce54e8eeb93e4bbb9b201d757add9409bbf2283b8114185a11bc9e",
    ),
}
TIMEOUT_S = (6, 30)  # to connect, and between two pieces: a machine without network must not wait long
DOWNLOAD_ERRORS = (OSError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error)


def data_dir():
    """Return the cache folder: `DILATED_UNET_DATA`, or this user's cache folder on this system."""
    named = os.environ.get("DILATED_UNET_DATA")
    if named:
        folder = os.path.expanduser(named)
        if folder.startswith("~"):
            raise DataError(f"DILATED_UNET_DATA must be a folder, and nobody here is {named.split('/')[0]}: {named}")
        return Path(folder)
    import pooch

    try:
        return Path(pooch.os_cache("dilated-unet"))
    except RuntimeError as error:  # as in a container
        raise DataError("You have no home folder to keep data in. Name a folder by DILATED_UNET_DATA.") from error


def fetch(name, *, log=print):
    """Fetch a data set into the cache, where it is not there already, and return its folder.

    Where no source gives the files, a DataError has every source's reason and what to do.
    """
    if name != "isbi2012" and name not in CELL_ARCHIVES:
        raise DataError(f"fetch: the data sets are isbi2012, {', '.join(CELL_ARCHIVES)}. Received: {name}")
    folder = data_dir() / name
    if name in CELL_ARCHIVES:
        masks = [folder / f"01_{kind}" / "SEG" for kind in ("ST", "GT")]
        if not ((folder / "01").is_dir() and any(mask.is_dir() for mask in masks)):
            with _scratch_in(folder) as scratch:
                _fetch_cells(name, folder, scratch, log)
    elif wanted := [file for file in ISBI_FILES if not is_published(folder / file)]:
        with _scratch_in(folder) as scratch:
            _fetch_isbi(folder, scratch, wanted, log)
    return folder


@contextlib.contextmanager
def _scratch_in(folder):
    """Give a temporary folder inside `folder`, so that what is good can be moved by one rename."""
    scratch = atomic.beside(folder / "fetched")
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        atomic.remove_abandoned(folder)
        yield scratch
    except OSError as error:
        raise DataError(f"fetch: {folder} cannot be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.rmdir()  # goes only if nothing came


def dataset_path(name, role, *, log=print):
    """Return the file or folder that plays `role` (image, mask, test, test_mask) in a data set."""
    if name == "isbi2012":
        places, only = [ISBI_ROLES[role]], f" (it comes only with {ISBI_ARCHIVE})"
        cached = data_dir() / name / places[0]
        if cached.name in ISBI_FILES and is_published(cached):
            return cached  # whatever else is missing
    else:
        sequence, only = "02" if role.startswith("test") else "01", ""
        places = [f"{sequence}_ST/SEG", f"{sequence}_GT/SEG"] if role.endswith("mask") else [sequence]
    folder = fetch(name, log=log)
    found = [folder / place for place in places if (folder / place).exists()]
    if not found:
        raise DataError(f"{flag(role)}: {folder} holds no {' or '.join(places)}{only}.")
    return found[0]


# --- ISBI-2012 ----------------------------------------------------------------------------------------------


def is_published(file):
    """Tell whether a file holds the official pixels of its name, in whatever container."""
    with contextlib.suppress(DataError):
        return file.is_file() and sha256_pixels(load(open_stack(file)).sections) == ISBI_FILES[file.name]
    return False


def _fetch_isbi(folder, scratch, wanted, log):
    """Ask the archive and then the mirrors for what is still wanted; keep what passes the check."""
    reasons = [f"{folder / name} is not the published file" for name in wanted if (folder / name).exists()]
    for url in (ISBI_ARCHIVE, *ISBI_MIRRORS):
        log(f"fetching {', '.join(wanted)} from {url}")
        try:
            for file in _offers(url, wanted, scratch):
                if reason := _unfit(file):
                    reasons.append(f"{url}: {file.name} {reason}")
                else:
                    os.replace(file, folder / file.name)
                    checked = "checked" if file.name in ISBI_FILES else "kept unchecked, its hash is not known"
                    log(f"{file.name}: {checked}")
        except DOWNLOAD_ERRORS as error:
            reasons.append(f"{url}: {_in_short(error)}")
        wanted = [name for name in wanted if not is_published(folder / name)]
        if not wanted:
            return
    raise DataError(
        f"isbi2012 could not be fetched ({'; '.join(reasons)}): check the connection, or put {', '.join(wanted)} "
        f"into {folder}, or use the built-in stack: --image_path synthetic --mask_path synthetic."
    )


def _offers(url, wanted, scratch):
    """Download what is wanted: from an archive, wherever it lies there, or from a mirror's folder."""
    if not url.endswith(".zip"):
        return (Path(_download(f"{url}/{name}", scratch, name)) for name in wanted)
    return (file for file in _unzipped(url, scratch) if file.name in {*wanted, ISBI_ROLES["test_mask"]})


def _unfit(file):
    """Say why a downloaded file is not accepted; None where it is."""
    if file.name in ISBI_FILES:
        return None if is_published(file) else "is not the published file (cut off or changed)"
    try:
        shape = open_stack(file).shape
        return None if shape == ISBI_SHAPE else f"must have shape {ISBI_SHAPE}. Received: {shape}"
    except DataError as error:
        return str(error)


# --- Cell Tracking Challenge --------------------------------------------------------------------------------


def _fetch_cells(name, folder, scratch, log):
    url, sha256 = CELL_ARCHIVES[name]
    log(f"fetching {url}")
    try:
        _unzipped(url, scratch, f"sha256:{sha256}")
    except DOWNLOAD_ERRORS as error:
        raise DataError(
            f"{name} could not be fetched ({url}: {_in_short(error)}): check the connection, or unpack "
            f"{url.rsplit('/', 1)[-1]} so that {folder} holds 01 and 01_ST or 01_GT."
        ) from error
    for part in sorted((scratch / "unpacked").glob("*/*")):
        if not (folder / part.name).exists():
            os.replace(part, folder / part.name)


# --- Downloads ----------------------------------------------------------------------------------------------


def _download(url, scratch, name, known_hash=None, processor=None):
    import pooch

    pooch.get_logger().setLevel("WARNING")  # it would print the hash of every file and advise to keep it
    (scratch / name).unlink(missing_ok=True)
    how = {"downloader": pooch.HTTPDownloader(timeout=TIMEOUT_S), "processor": processor}
    return pooch.retrieve(url, known_hash, fname=name, path=scratch, **how)


def _unzipped(url, scratch, known_hash=None):
    import pooch

    unzip = pooch.Unzip(extract_dir="unpacked")
    return sorted(map(Path, _download(url, scratch, "archive.zip", known_hash, unzip)))


def _in_short(error):
    """Say a network error in a few words; the libraries nest the same failure four deep."""
    kinds = {"ConnectionError": "no connection", "ConnectTimeout": "no answer", "ReadTimeout": "no answer"}
    return kinds.get(type(error).__name__) or re.sub(r"\s+", " ", str(error))[:160] or type(error).__name__
