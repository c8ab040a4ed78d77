"""How far a run is, on stderr."""

import sys
import time
from datetime import timedelta

from files.shell import say

QUIET_S = 60  # between the lines of a log at least; an epoch may take longer


class Progress:
    """One line that is written over on a terminal; elsewhere a line per epoch or per minute, whichever is rarer."""

    def __init__(self, course):
        self.course, self.active = course, sys.stderr.isatty()

    def start(self, update):
        self.began = self.said = time.monotonic()
        self.first = update

    def show(self, update, loss, dice, rate):
        """After an update."""
        if self.active:
            say(f"\r{self.line(update, loss, dice, rate)}\x1b[K", end="")

    def log(self, row):
        """After an epoch."""
        if self.active or time.monotonic() - self.said < QUIET_S:
            return
        self.said = time.monotonic()
        validation = f"  val_loss {row['val_loss']:.3f}" if "val_loss" in row else ""
        say(self.line(row["update"], row["loss"], row["dice"], row["learning_rate"]) + validation)

    def line(self, update, loss, dice, rate):
        course, total = self.course, self.course.updates
        seconds = (time.monotonic() - self.began) / max(1, update - self.first)
        filled = 20 * update // total
        return (
            f"epoch {-(-update // course.steps_per_epoch)}/{course.epochs} [{'#' * filled}{'.' * (20 - filled)}] "
            f"update {update}/{total}  loss {loss:.3f}  dice {dice:.3f}  lr {rate:.1e}  "
            f"{course.batch_size / seconds:.2f} images/s  {timedelta(seconds=round(seconds * (total - update)))} left"
        )

    def end(self):
        if self.active:
            say("")
