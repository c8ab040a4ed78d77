"""What happens after every epoch: validation, best weights, early stopping, history, checkpoint, in this order."""

import contextlib
import math
import sys
import time
from datetime import timedelta

import keras

from data import DataError
from files import shell
from network import device, distribution
from predict import prediction
from train.record import Journal, save_checkpoint
from train.trainee import averaged_weights

QUIET_S = 60  # between the lines of a log at least; an epoch may take longer
OF_WEIGHTS = (
    *("network", "normalisation", "intensity", "seed", "precision", "split", "data", "command", "versions", "commit"),
    *("receptive_field_px", "init_from"),
)


class Recorder(keras.callbacks.Callback):
    """One callback, for the order matters: the checkpoint is written last and holds all that the others changed.

    `validation` is `Feed.validation()`; `copy`, where several devices train, the trainee on one, to validate and save.
    """

    def __init__(self, place, record, course, journal=None, *, validation=None, spread=None, copy=None):
        super().__init__()
        self.place, self.record, self.course, self.journal = place, record, course, journal or Journal()
        self.validation, self.spread, self.copy = validation, spread or distribution.Alone(), copy
        self.progress = Progress(course)
        self.checkpointed = len(self.journal.rows)  # epochs in the checkpoint

    @property
    def alone(self):
        """What is on one device: the copy, or else the trainee itself."""
        return self.model if self.copy is None else self.copy

    @property
    def done(self):
        """Updates, up to the end of the last epoch; `checkpointed` lags behind while this one is saved."""
        return len(self.journal.rows) * self.course.steps_per_epoch

    @contextlib.contextmanager
    def apart(self):
        """By itself, with the copy up to date."""
        with self.spread.apart():
            if self.copy is not None:
                self.copy.take_over(self.model)
            yield

    def on_train_begin(self, logs=None):
        if self.spread.chief and not self.journal.rows:
            with self.apart():
                self.save_checkpoint()
        self.progress.start(self.done)
        self.began = time.monotonic() - self.journal.seconds

    def on_train_batch_end(self, batch, logs=None):
        loss, dice = float(logs["loss"]), float(logs["dice"])
        update = self.done + batch
        for stop in shell.received:  # and lost on the way here
            raise stop
        self.check(math.isfinite(loss), update, "the loss is")
        self.progress.show(update + 1, loss, dice, float(self.course.rate(update)))

    def check(self, finite, update, what):
        """Stop the run where something is not finite."""
        if finite:
            return
        self.progress.end()
        raise DataError(
            f"{what} not finite at update {update} (learning rate {float(self.course.rate(update)):.3g}): the run "
            f"stops, and the checkpoint of epoch {len(self.journal.rows)} stays. Try a lower {self.course.highest}."
        )

    def on_epoch_end(self, epoch, logs=None):
        update = (epoch + 1) * self.course.steps_per_epoch
        row = {"epoch": epoch + 1, "update": update, "learning_rate": float(self.course.rate(update - 1))}
        row |= {"loss": float(logs["loss"]), "dice": float(logs["dice"])}
        if self.spread.chief:
            with self.apart():
                self.close_epoch(row)
            logs |= {key: row[key] for key in row if key not in ("epoch", "update")}  # for TensorBoard
            self.progress.log(row)
        else:
            self.journal.rows.append(row)
        self.journal.stopped = bool(self.spread.agree(self.journal.stopped))
        if self.journal.stopped:
            self.model.stop_training = True

    def close_epoch(self, row):
        """Validate and save."""
        journal, last = self.journal, row["update"] - 1
        device.start_copying(self.alone.state())
        self.check(self.alone.is_finite(), last, "the weights are")
        with averaged_weights(self.alone):
            if self.validation:
                row |= self.alone.validate(self.validation(row["epoch"]))
                self.check(math.isfinite(row["val_loss"]), last, "the validation loss is")
            journal.rows.append(row)
            if self.validation and journal.judge(row["val_loss"], self.course.patience):
                self.save_weights(self.place.weights)
        journal.seconds = time.monotonic() - self.began
        journal.write_history(self.place.history)
        self.save_checkpoint()

    def save_weights(self, path):
        kept = {key: self.record[key] for key in OF_WEIGHTS} | {"window": self.record["settings"]["window"]}
        prediction.save_weights(self.alone.network, path, kept | {"after": self.journal.rows[-1]})

    def save_checkpoint(self):
        save_checkpoint(self.place.checkpoint, self.alone.state(), self.journal)
        self.checkpointed = len(self.journal.rows)

    def on_train_end(self, logs=None):
        self.progress.end()


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
            shell.say(f"\r{self.line(update, loss, dice, rate)}\x1b[K", end="")

    def log(self, row):
        """After an epoch."""
        if self.active or time.monotonic() - self.said < QUIET_S:
            return
        self.said = time.monotonic()
        validation = f"  val_loss {row['val_loss']:.3f}" if "val_loss" in row else ""
        shell.say(self.line(row["update"], row["loss"], row["dice"], row["learning_rate"]) + validation)

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
            shell.say("")
