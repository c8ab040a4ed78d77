"""What a shell expects of a program: streams that may be gone, signals, exit codes."""

import contextlib
import errno
import os
import signal
import sys
import threading

BROKEN_PIPE = 141  # 128 + SIGPIPE, as of other programs whose reader has left
received = []  # what signals raised: a framework that is tracing may lose it, or make another error of it


class Terminated(KeyboardInterrupt):
    """SIGTERM, which batch systems send: like Ctrl-C, a run ends with a checkpoint."""

    code = 143

    def __str__(self):
        return "ended by SIGTERM"


class Stream:
    """stdout or stderr that may be gone or full: what nobody reads must not stop a training.

    What the terminal has no letter for is written as an escape.
    """

    def __init__(self, stream):
        self.stream, self.error = stream, None
        stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        self._safely(self.stream.write, text)
        return len(text)

    def flush(self):
        self._safely(self.stream.flush)

    def _safely(self, function, *words):
        try:
            function(*words)
        except OSError as error:
            self.error = error
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())  # for the rest of the run


def say(words, end="\n"):
    print(words, end=end, file=sys.stderr, flush=True)


def ends(main):
    """Exit code of `main`, called as a shell expects it; from then on signals come too late."""
    _open_streams()
    os.environ["MPLBACKEND"] = "agg"  # pictures go to files, whatever a notebook around this has set
    sys.stdout, sys.stderr = Stream(sys.stdout), Stream(sys.stderr)
    sys.unraisablehook = _again
    signal.signal(signal.SIGTERM, _stop)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is to be ignored
        signal.signal(signal.SIGINT, _stop)
    try:
        code = main()
    except SystemExit as stop:  # argparse's way out
        code = stop.code
    except BaseException as error:
        if not received and not isinstance(error, KeyboardInterrupt):
            raise
        code = getattr((received or [error])[0], "code", 130)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    sys.stdout.flush()
    lost = sys.stdout.error
    if lost and not code:
        if lost.errno == errno.EPIPE:
            return BROKEN_PIPE
        print(f"{os.path.basename(sys.argv[0])}: stdout could not be written: {lost.strerror}", file=sys.stderr)
        return 2
    return getattr(received[0], "code", 130) if received and code == 130 else code


def _stop(number, _):
    received.append(Terminated() if number == signal.SIGTERM else KeyboardInterrupt())
    raise received[-1]


def _again(lost):
    """What a signal raised where Python drops errors, such as in a finalizer, is raised once more, elsewhere."""
    if isinstance(lost.exc_value, KeyboardInterrupt):
        number = signal.SIGTERM if isinstance(lost.exc_value, Terminated) else signal.SIGINT
        threading.Timer(0.1, _send, [number]).start()
    elif not received:  # else a library stumbles on its way out, where it was half-way started
        sys.__unraisablehook__(lost)


def _send(number):
    """Send a signal to the main thread, which may be asleep and would not notice one sent to another."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident, number)
    else:
        signal.raise_signal(number)


def _open_streams():
    """A stream that was closed takes what is written: else the next file that is opened would get its number."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


@contextlib.contextmanager
def quiet_stderr():
    """Hold back what the frameworks' C++ writes while they load; it is shown if loading fails."""
    import tempfile

    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        except Exception:
            file.seek(0)
            os.write(kept, file.read())
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def known(error):
    """What an exception of Python or of a framework says, if that is a full disk or too little memory."""
    said = str(error)
    if full := next((line for line in said.splitlines() if "No space left on device" in line), None):
        return full  # which TensorFlow calls exhausted, too
    kinds = ("MemoryError", "ResourceExhaustedError", "OutOfMemoryError")
    if any(kind.__name__ in kinds for kind in type(error).__mro__) or "RESOURCE_EXHAUSTED" in said:
        return "out of memory; a smaller --batch_size, --window or --tile takes less"
    return None
