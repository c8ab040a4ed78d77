"""The one way a file is replaced, kept to oneself, or read as a record; what goes wrong is a `DataError`."""

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import tempfile
import time
from pathlib import Path

HOST = hashlib.sha256(platform.node().encode()).hexdigest()[:6]
ABANDONED_S = 24 * 3600  # of another machine's file: its processes cannot be asked for here


class DataError(ValueError):
    """Bad input or output, said in one sentence that names the argument, the rule and the value."""


# --- Writing ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path, *others, force=False):
    """Give a path beside `path` to write to, and move it there when all went well.

    Whatever happens, `path` is the old file or the whole new one. An existing file needs `force`. Of several files
    that belong together, given as `others`, all are on the disk before the first is moved; a list is given for them.
    """
    targets = [replaceable(path, force) for path in (path, *others)]
    partials = [beside(target) for target in targets]
    try:
        for target in targets:
            target.parent.mkdir(parents=True, exist_ok=True)
            remove_abandoned(target.parent)
        yield partials if others else partials[0]
        for partial in partials:
            _sync(partial, os.O_RDWR)
        for partial, target in zip(partials, targets, strict=True):
            os.replace(partial, target)
        for folder in {target.parent for target in targets}:
            with contextlib.suppress(OSError):  # Windows opens no folders, and some file systems sync none
                _sync(folder, os.O_RDONLY)
    except OSError as error:
        raise could_not_be_written(path, error) from error
    finally:
        for partial in partials:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)


def replaceable(path, force):
    """Follow links, so that a link stays one; refuse what must not be replaced."""
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise DataError(f"{path} is a folder or a device, and cannot be replaced by a file.")
    if not force:
        refuse_existing(path)
    return target


def beside(path):
    """Return where what will be `path` is written: the name says by which process, and keeps its suffix."""
    return Path(path).with_name(f".part{os.getpid()}_{HOST}-{Path(path).name}")


def remove_abandoned(folder):
    """Remove what processes that are gone have left half written in a folder."""
    for path in Path(folder).glob(".part*-*"):
        with contextlib.suppress(OSError):
            if _is_abandoned(path):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _is_abandoned(path):
    found = re.fullmatch(r"\.part([0-9]{1,9})_([0-9a-f]{6})-.+", path.name)
    if found and found[2] == HOST:
        return not _is_alive(int(found[1]))
    return bool(found) and time.time() - path.stat().st_mtime > ABANDONED_S


def _is_alive(process):
    if os.name == "nt":
        return True  # os.kill would end it
    try:
        os.kill(process, 0)
    except OSError as error:
        return not isinstance(error, ProcessLookupError)  # another user's may not be asked for
    return True


def _sync(path, mode):
    descriptor = os.open(path, mode)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def could_not_be_written(path, error):
    """Return the error that names the file, whatever the system or a library said."""
    return DataError(f"{path} could not be written: {error.strerror or f'disk full? ({error})'}.")


def write_text(path, text, *, force=True):
    """Write a text file in UTF-8, replaced as a whole."""
    with replacing(path, force=force) as partial:
        partial.write_bytes(text.encode("utf-8", "backslashreplace"))  # file names need not be text


def write_json(path, record, *, force=True, indent=1):
    """Write a record, replaced as a whole."""
    write_text(path, json.dumps(record, indent=indent) + "\n", force=force)


def read_json(path, what):
    """Read a record, a dict; `what` is the argument that led to it, for messages."""
    try:
        record = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise DataError(f"{what}: {path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{what}: {path} is no JSON file, or is cut off: {error}.") from error
    if not isinstance(record, dict):
        raise DataError(f"{what}: {path} must hold a JSON object. Received: {type(record).__name__}")
    return record


def sha256(path):
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- One run at a time --------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(path):
    """Keep a folder or file, there or to be made, to this process; the lock goes with it, however it ends."""
    target = Path(os.path.realpath(path))
    file = target.with_name(f".{target.name}.lock") if target.name else target / ".lock"  # of the root folder
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(file.parent, os.W_OK) and target.is_dir():
            file = target / ".lock"
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise could_not_be_written(file, error) from error
    try:
        if not _take(descriptor):
            raise DataError(f"{path} is in use by another run: wait for it, or choose another place.")
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # Windows removes no open file
                file.unlink()
    finally:
        os.close(descriptor)


def _take(descriptor):
    """Take a lock without waiting; True where the system (Windows) or the file system knows none."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except (ImportError, OSError):
        return True
    return os.fstat(descriptor).st_nlink > 0  # or else its last owner removed it in this moment


# --- What must not be overwritten ---------------------------------------------------------------------------


def within(path):
    """Split a source into the file or folder on the disk and the path inside of it: `x.h5:/raw` -> x.h5, raw.

    One letter before the colon is a drive of Windows; and what exists as it is written has no inside.
    """
    text = os.path.expanduser(os.fspath(path))
    found = re.fullmatch(r"(..+?):[/\\]+(.*)", text)
    if not found or os.path.exists(text) or not os.path.exists(found[1]):
        return text, ""
    return found[1], found[2].replace("\\", "/").strip("/")


def is_zarr(path):
    """Whether a path is a folder of zarr's."""
    return any((Path(path) / name).is_file() for name in ("zarr.json", ".zgroup", ".zarray"))


def refuse_inputs(flag, output, *inputs):
    """Refuse an output that is an input, or in an input's Zarr, or would be one more section of an input's folder."""
    target = Path(os.path.realpath(output))
    for given in inputs:
        if not isinstance(given, (str, os.PathLike)) or not os.path.exists(within(given)[0]):
            continue  # a stack in memory, or a data set's name
        source = Path(os.path.realpath(within(given)[0]))
        a_section = target.parent == source and target.suffix.lower() in (".tif", ".tiff", ".png")
        if a_section or (source in target.parents and is_zarr(source)) or (target.exists() and target.samefile(source)):
            raise DataError(f"{flag} must not be an input, or a file in its folder. Received: {output}, input: {given}")


def refuse_existing(*paths, words="--force replaces it"):
    """Refuse the first path that exists; `words` say what to do."""
    for path in paths:
        if os.path.lexists(path):
            raise DataError(f"{path} exists already ({words}).")


def make_writable(*folders):
    """Make folders, and find out now, not after hours of work, whether they can be written."""
    for folder in folders:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise could_not_be_written(folder, error) from error


def make_nameable(*paths):
    """Refuse, before the work, a name that is too long for `beside`, which lengthens it while the file is written."""
    for path in paths:
        try:
            beside(path).touch()
            beside(path).unlink()
        except OSError as error:
            raise could_not_be_written(path, error) from error
