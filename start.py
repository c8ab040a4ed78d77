"""Set-up and the main job in one command, on a fresh machine with Python >= 3.11 and nothing else:

python3 start.py          make .venv, fetch ISBI-2012, train, predict the test stack, show the picture
python3 start.py test     make .venv, run the linter and all tests
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
import webbrowser
from pathlib import Path

ROOT = Path(__file__).resolve().parent
RUN = Path("runs") / "start"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", nargs="?", default="demo", choices=("demo", "test"))
    job = parser.parse_args().job
    if sys.version_info < (3, 11):  # noqa: UP036 - this file is what an older Python is told it by
        sys.exit(f"Python 3.11 or newer is needed. This is {sys.version.split()[0]}.")
    sys.exit(test(environment("requirements-test.txt")) if job == "test" else demo(environment("requirements.txt")))


def run(words, **how):
    """The exit code of a program, 1 where there is none. After Ctrl-C, which it is sent as well, it ends by itself."""
    try:
        process = subprocess.Popen(words, **how)
    except OSError:
        return 1
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.wait()
        sys.exit(130)


def environment(requirements):
    """Make .venv beside this file, or use the one that is there, and install the requirements; its Python."""
    folder = ROOT / ".venv"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if run([python, "-m", "pip", "--version"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL):
        print(f"making {folder}", flush=True)
        try:
            venv.create(folder, with_pip=True)  # also over one that was left half made
        except subprocess.CalledProcessError:
            if shutil.disk_usage(ROOT).free < 2**25:
                sys.exit(f"{folder} could not be made: the disk is full.")
            sys.exit("Python's venv does not work here. On Debian and Ubuntu: sudo apt install python3-venv")
        except (OSError, ValueError) as error:
            sys.exit(f"{folder} could not be made: {error}")
        except KeyboardInterrupt:
            sys.exit(130)
    # pip would compile all of it, on one core: Python compiles what it imports, once
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    quick = ("--quiet", "--disable-pip-version-check", "--no-compile")
    install = [python, "-m", "pip", "install", *quick, "-r", ROOT / requirements]
    lock = ("-c", ROOT / "requirements.lock")
    print(f"installing {requirements}, as tested (requirements.lock)", flush=True)
    if requirements == "requirements-test.txt" and sys.platform == "linux":
        # PyPI's PyTorch for Linux brings several GB for GPUs; where this one cannot be had, that is taken
        without_gpu = ("--no-deps", "--retries", "1", "--index-url", "https://download.pytorch.org/whl/cpu", "torch")
        run([*install[:-2], *without_gpu, *lock], stderr=subprocess.DEVNULL)
    if run([*install, *lock]):
        print("the tested versions do not all install here: taking the ranges of the requirements", flush=True)
        if run(install):
            other = " TensorFlow has releases for Python 3.11 to 3.13." * (sys.version_info >= (3, 14))
            sys.exit(f"What is needed could not be installed: see above.{other}")
    return python


def test(python):
    """Linter, formatter, then all tests on TensorFlow, and beside them those of the second backend on JAX."""
    ruff, pytest = [python, "-m", "ruff"], [python, "-m", "pytest", "-q", "--durations", "10"]
    one = {"OMP_NUM_THREADS": "1", "TF_NUM_INTRAOP_THREADS": "1"}  # a process a core: threads would wait for each other
    jax = {"KERAS_BACKEND": "jax", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # compiles faster
    codes = [run([*ruff, *words], cwd=ROOT) for words in (("check", "."), ("format", "--check", "."))]
    with tempfile.TemporaryFile() as said:
        how = {"cwd": ROOT, "env": os.environ | one | jax, "stdout": said, "stderr": subprocess.STDOUT}
        beside = subprocess.Popen([*pytest, "-m", "jax"], **how)  # one of its tests waits most of its minutes
        of_all = os.environ | one | {"KERAS_BACKEND": "tensorflow"}
        codes.append(run([*pytest, "-n", "2", "--dist", "worksteal"], cwd=ROOT, env=of_all))
        codes.append(beside.wait())
        said.seek(0)
        print("\non JAX:\n" + said.read().decode(errors="replace"), flush=True)
    return int(any(codes))


def demo(python):
    """Fetch or find the data, train, predict the test stack, show the picture."""

    def suite(*words):
        print("\n$ python dilatedUnet.py", *words, flush=True)
        return run([python, "dilatedUnet.py", *map(str, words)], cwd=ROOT)

    name = "isbi2012"
    if suite("fetch", name):
        name = "synthetic"
        print("ISBI-2012 cannot be fetched here: going on with the built-in synthetic stack", flush=True)
    images, weights, prediction = ("--image_path", name), ("--weight_path", RUN / "weights"), RUN / "prediction.tif"
    training, record = ("--recipe", "quick", *images, *weights, "--run_dir", RUN), ROOT / RUN / "run.json"
    half = record.exists() and is_half_done(record, name)
    failed = suite(*training, "--resume" if half else "--force")
    if failed and half:
        print(f"\nthe training that was begun is in {RUN}: remove this folder to begin anew", flush=True)
    failed = failed or suite("predict", *images, *weights, "--output", prediction, "--tta", "--force")
    if not failed:
        show(ROOT / RUN / "held_out.png")
        print(f"\nprediction of the test stack: {prediction}\npicture of the held-out sections: {RUN / 'held_out.png'}")
    return failed


def is_half_done(record, name):
    """Whether a run record is of a training on that data set that has not come to its end."""
    try:
        found = json.loads(record.read_bytes())
        return not found["finished"] and found["settings"]["image_path"] == name
    except (ValueError, KeyError, TypeError):
        return False


def show(picture):
    """Open the picture where there is a screen."""
    if os.name == "nt" or sys.platform == "darwin" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        webbrowser.open(picture.as_uri())


if __name__ == "__main__":
    main()
