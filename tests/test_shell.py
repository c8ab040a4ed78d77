"""The program at a shell: streams that are gone or full, signals, and terminals without letters for it."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, cases, python

LIST = "reproduce table --list"
ENDS = "import atexit, os, signal, sys, time\nfrom files import shell\n{}\nsys.exit(shell.ends(main))"
KILL = "os.kill(os.getpid(), signal.{})"


def shell(line, **environment):
    """A line for the shell, in which `suite` is the program; its exit code, stdout and stderr."""
    command = f"suite() {{ '{sys.executable}' dilatedUnet.py \"$@\"; }}; set -o pipefail; {line}"
    options = {"cwd": ROOT, "env": os.environ | environment, "capture_output": True, "text": True, "timeout": 120}
    done = subprocess.run(["bash", "-c", command], **options)
    assert "Traceback" not in done.stderr
    return done


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@cases(
    "line, code, words",
    (f"suite {LIST} | true", 141, ""),
    (f"suite {LIST} >&-", 0, ""),
    (f"suite {LIST} > /dev/full", 2, "dilatedUnet.py: stdout could not be written: No space left on device\n"),
    (f"suite {LIST} 2> /dev/full", 0, ""),
    ("suite --epochs 0 2>&-", 2, ""),
    ("suite --epochs 0 2> /dev/full", 2, ""),
)
def test_a_stream_that_is_gone_or_full_ends_as_other_programs_do(line, code, words):
    done = shell(line)
    assert (done.returncode, done.stderr) == (code, words)


def test_what_is_to_be_written_is_though_nobody_reads_and_ctrl_c_while_importing_is_no_traceback(small, tmp_path):
    labels, numbers = small / "labels.tif", tmp_path / "numbers.json"
    line = f"suite evaluate --prediction '{labels}' --mask_path '{labels}' --scores dice --json '{numbers}' | true"
    assert shell(line, PYTHONUNBUFFERED="1").returncode == 141
    assert '"dice"' in numbers.read_text()
    done = shell("suite check --image_path 膜.tif", PYTHONIOENCODING="ascii", PYTHONUTF8="1")
    assert (done.returncode, "\\u819c.tif does not exist" in done.stderr) == (2, True), "a terminal without the letters"
    (tmp_path / "argparse.py").write_text("raise KeyboardInterrupt")
    done = shell("suite --help", PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.SIGINT, "", "")


@cases(
    "main, code",
    (f"def main(): {KILL.format('SIGTERM')}", 143),
    (f"def main():\n try: {KILL.format('SIGTERM')}\n except KeyboardInterrupt: return 130", 143),
    (f"def main():\n signal.signal(signal.SIGINT, signal.default_int_handler)\n {KILL.format('SIGINT')}", 130),
    (f"class Main:\n def __del__(self): {KILL.format('SIGTERM')}\ndef main(): Main(); time.sleep(60)", 143),
    (f"def main(): atexit.register(lambda: 1 / 0); {KILL.format('SIGTERM')}", 143),
    ("def main(): sys.exit(2)", 2),
    ("def main(): return 0", 0),
    ("def main():\n import matplotlib\n return matplotlib.get_backend() != 'agg'", 0),
)
def test_a_signal_has_its_exit_code(main, code):
    done = python("-c", ENDS.format(main), code=code, env=os.environ | {"MPLBACKEND": "nonsense"})
    assert (done.stdout, done.stderr) == ("", "")
