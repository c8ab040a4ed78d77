"""Cyclical learning rates (L. N. Smith 2015, arXiv 1506.01186) for any Keras model and backend.

The schedule is a pure function of the update number, counted from 0.

    model.fit(x, y, callbacks=[CyclicLR(base_lr=1e-5, max_lr=1e-2, step_size=2000)])

>>> [rate_of("triangular", base_lr=0.0, max_lr=1.0, step_size=4)(n) for n in range(9)]
[0.0, 0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25, 0.0]
"""

import keras
import numpy as np

MODES = ("triangular", "triangular2", "exp_range")


def cycle_number(update, step_size):
    """Number of the cycle that `update` falls into, from 1; a cycle is two half cycles of `step_size` updates."""
    return update // (2 * step_size) + 1


def wave(update, step_size):
    """Height of the triangle, 0..1: 0 at the start of a cycle, 1 after `step_size` updates, 0 after two of them."""
    return 1 - abs(update % (2 * step_size) / step_size - 1)


def cosine(update, base_lr, max_lr, updates, warm_up=0):
    """Linear rise to `max_lr` over `warm_up` updates, then half a cosine down to `base_lr` at the last of `updates`.

    Loshchilov & Hutter 2016 (arXiv 1608.03983), without restarts: a schedule that ends low.
    """
    ops = np if isinstance(update, (int, float, np.ndarray, np.generic)) else keras.ops  # of the same names
    done = ops.clip((update - warm_up) / max(1, updates - 1 - warm_up), 0.0, 1.0)
    falling = base_lr + (max_lr - base_lr) * 0.5 * (1 + ops.cos(np.pi * done))
    return ops.where(update < warm_up, max_lr * (update + 1) / (warm_up + 1), falling)


def rate_of(mode, base_lr, max_lr, step_size, gamma=1.0, updates=0):
    """Learning rate as a function of the update, a number or a tensor: one of `MODES`, "none", or a run's "cosine".

    Every mode of `MODES` goes from base to max and back. "triangular2" halves the height after each cycle, "exp_range"
    multiplies it with gamma ** update.
    """
    if mode == "none":
        return lambda update: base_lr + 0 * update
    if mode == "cosine":
        return lambda update: cosine(update, base_lr, max_lr, updates, min(100, updates // 20))
    height = {
        "triangular": lambda update: 1.0,
        "triangular2": lambda update: 0.5 ** (cycle_number(update, step_size) - 1),
        "exp_range": lambda update: gamma**update,
    }[mode]
    return lambda update: base_lr + (max_lr - base_lr) * wave(update, step_size) * height(update)


# -- for Keras --------------------------------------------------------------------------------------------------


class Schedule(keras.optimizers.schedules.LearningRateSchedule):
    """A pure function of the update number as an in-graph schedule: no callback has to touch the optimizer.

    `rate` takes the update number, an int or a float32 tensor (exact up to 2**24), and gives the learning rate.
    """

    def __init__(self, rate):
        self.rate = rate

    def __call__(self, step):
        return keras.ops.cast(self.rate(keras.ops.cast(step, "float32")), "float32")


@keras.saving.register_keras_serializable("clr_callback")
class CyclicSchedule(Schedule):
    """That of a `CyclicLR` without a `scale_fn`, which is saved with a compiled model."""

    def __init__(self, **config):
        super().__init__(CyclicLR(**config).rate)
        self.config = config

    def get_config(self):
        return self.config


class CyclicLR(keras.callbacks.Callback):
    """Sets the learning rate of every update, and records the rate that was used.

    Parameters
    ----------
    base_lr, max_lr : float
        Lower and upper bound of the rate, 0 < base_lr <= max_lr.
    step_size : int
        Half a cycle, in updates (two to ten times the updates of an epoch, says the paper).
    mode : {"triangular", "triangular2", "exp_range"}
        Ignored if `scale_fn` is given.
    gamma : float
        Base of `exp_range`, in (0, 1].
    scale_fn : callable, optional
        Factor on the height of the triangle, a function of the cycle number or of the update number.
    scale_mode : {"cycle", "iterations"}
        What `scale_fn` is a function of.

    Attributes
    ----------
    history : dict of list
        "update" and "learning_rate", one entry per update: the rate that this update USED.

    Notes
    -----
    Counting starts from `optimizer.iterations`, so a resumed run goes on at the right update. With
    `steps_per_execution` above 1, or to save the write to the optimizer at each update, compile the optimizer with
    `learning_rate=callback.schedule()`; the callback then only records.
    """

    def __init__(
        self, base_lr=1e-5, max_lr=1e-2, step_size=2000, mode="triangular", gamma=1.0, scale_fn=None, scale_mode="cycle"
    ):
        super().__init__()
        self.base_lr, self.max_lr, self.step_size = base_lr, max_lr, step_size
        self.mode, self.gamma, self.scale_fn, self.scale_mode = mode, gamma, scale_fn, scale_mode
        self._check()
        self.update = 0
        self.history = {"update": [], "learning_rate": []}

    def _check(self):
        for name, good, rule in (
            ("base_lr", self.base_lr > 0, "above 0"),
            ("max_lr", self.max_lr >= self.base_lr, f"at least base_lr ({self.base_lr})"),
            ("step_size", self.step_size >= 1 and self.step_size % 1 == 0, "a whole number of updates, at least 1"),
            ("mode", self.scale_fn or self.mode in MODES, f"one of {', '.join(MODES)}"),
            ("gamma", 0 < self.gamma <= 1, "above 0 and at most 1"),
            ("scale_fn", self.scale_fn is None or callable(self.scale_fn), "a function of one number"),
            ("scale_mode", self.scale_mode in ("cycle", "iterations"), "cycle or iterations"),
        ):
            if not good:
                raise ValueError(f"{name} must be {rule}. Received: {getattr(self, name)}")

    def rate(self, update):
        """Learning rate of that update, counted from 0."""
        if self.scale_fn is None:
            return rate_of(self.mode, self.base_lr, self.max_lr, self.step_size, self.gamma)(update)
        x = cycle_number(update, self.step_size) if self.scale_mode == "cycle" else update
        return self.base_lr + (self.max_lr - self.base_lr) * wave(update, self.step_size) * self.scale_fn(x)

    def schedule(self):
        """The same rates as a `LearningRateSchedule`; with a `scale_fn` its optimizer cannot be saved with a model."""
        if self.scale_fn is not None:
            return Schedule(self.rate)
        config = {"base_lr": float(self.base_lr), "max_lr": float(self.max_lr), "step_size": int(self.step_size)}
        return CyclicSchedule(**config, mode=self.mode, gamma=float(self.gamma))

    @property
    def _optimizer(self):
        """The one that has the learning rate: in float16 Keras wraps it in another that scales the loss."""
        return getattr(self.model.optimizer, "inner_optimizer", self.model.optimizer)

    def on_train_begin(self, logs=None):
        self.update = int(self._optimizer.iterations)
        configured = self._optimizer._learning_rate
        self._in_graph = isinstance(configured, Schedule)
        if callable(configured) and not self._in_graph:
            raise ValueError("CyclicLR needs an optimizer with a constant learning rate, or with its own schedule().")
        if not self._in_graph and self.model.steps_per_execution > 1:
            steps = self.model.steps_per_execution
            raise ValueError(f"CyclicLR needs learning_rate=CyclicLR(...).schedule() with steps_per_execution={steps}")

    def on_train_batch_begin(self, batch, logs=None):
        if not self._in_graph:
            self.update = int(self._optimizer.iterations)
            self._optimizer.learning_rate = self.rate(self.update)

    def on_train_batch_end(self, batch, logs=None):
        if not self._in_graph and int(self._optimizer.iterations) == self.update:
            return  # gradients were accumulated, or too large for float16: no update
        # `batch` is the last one of an execution, which may hold several updates.
        for _ in range(self.model.steps_per_execution):
            self.history["update"].append(self.update)
            self.history["learning_rate"].append(float(self.rate(self.update)))
            self.update += 1

    def on_epoch_end(self, epoch, logs=None):
        # where the epoch's last execution ran out of batches
        too_many = self.update - int(self._optimizer.iterations)
        if too_many > 0:
            self.update -= too_many
            for column in self.history.values():
                del column[-too_many:]
        if logs is not None and self.history["learning_rate"]:
            logs["learning_rate"] = self.history["learning_rate"][-1]


def describe_schedule(updates, step_size):
    """What a cyclical schedule amounts to over a run, in words, with a warning if it ends in mid-cycle.

    >>> describe_schedule(8000, 2000)
    '8000 updates = 2 cycles of 4000 updates'
    """
    cycles = updates / (2 * step_size)
    words = f"{updates} updates = {cycles:.4g} cycle{'' if cycles == 1 else 's'} of {2 * step_size} updates"
    if updates % (2 * step_size) == 0:
        return words
    return words + f"; WARNING: the run ends in mid-cycle, {updates % (2 * step_size)} updates into it"


# -- the learning-rate range test -------------------------------------------------------------------------------


def smoothed(losses):
    """Exponential average of losses so far, 0.9 of it kept at each, without the bias towards 0 at the start."""
    from scipy import signal

    return signal.lfilter([0.1], [1, -0.9], losses) / (1 - 0.9 ** np.arange(1, len(losses) + 1))


def suggest_range(rates, losses):
    """Lower and upper learning rate suggested by a range test (Smith 2015, section 3.3); ValueError without a fall.

    Base: where the smoothed loss has made a tenth of its whole fall. Max: a third of the rate at which the smoothed
    loss is lowest, for beyond it the loss rises again.
    """
    curve = smoothed(losses)
    lowest = int(np.argmin(curve))
    if rates[lowest] / 3 < rates[0]:
        raise ValueError("the loss never fell in the range test: take more updates, or lower learning rates")
    start = int(np.argmax(curve[:lowest]))
    fallen = curve[start] - 0.1 * (curve[start] - curve[lowest])
    onset = start + int(np.argmax(curve[start:] <= fallen))
    high = rates[lowest] / 3
    return min(rates[onset], high / 3), high
