"""What is trained: augmentation, network and loss as one compiled step, and the course of its updates."""

import contextlib
import math
from dataclasses import dataclass
from functools import cached_property, partial

import keras
import numpy as np
from keras import ops

import augment
import clr_callback
from network import device, distribution, layers, losses, unet


@dataclass(frozen=True)
class Course:
    """How long a training is, and the learning rate of every update, a pure function of its number."""

    epochs: int
    steps_per_epoch: int
    batch_size: int
    patience: int  # epochs; 0: no early stopping
    mode: str  # --clr_mode
    lr: float
    max_lr: float
    step_size: int
    gamma: float

    @property
    def updates(self):
        return self.epochs * self.steps_per_epoch

    @cached_property
    def rate(self):
        """Learning rate of an update, counted from 0: a function of a number or of a tensor."""
        return clr_callback.rate_of(self.mode, self.lr, self.max_lr, self.step_size, self.gamma, self.updates)

    @property
    def highest(self):
        """The flag of the highest rate."""
        return "--lr" if self.mode == "none" else "--max_lr"

    def describe(self, window):
        crops = f"{self.updates * self.batch_size} crops of {window} x {window} px"
        if self.mode == "none":
            return f"{self.updates} updates, {crops}, learning rate {self.lr:g} throughout"
        if self.mode == "cosine":
            falling = f"learning rate {self.max_lr:g} falling to {self.lr:g} along a cosine"
            return f"{self.updates} updates, {crops}, {falling}"
        cycles = clr_callback.describe_schedule(self.updates, self.step_size)
        return f"{self.mode} {self.lr:g}..{self.max_lr:g}, {crops}, {cycles}"


class Trainee(keras.Model):
    """Windows and numbers in, loss out.

    Its input is what `augment.batch` returns; its output holds the interior probability and the mask that was warped
    with the image, and for the weighted loss the weights, warped likewise, and the logits. An unpadded network loses
    `shrink` px on each side, and so do mask and weights. `partly`: pixels whose mask is below 0 are left out.
    `warmup`: batch norm's averages are warmed up.
    """

    def __init__(self, network, *, recipe, window, normalisation, loss, shrink=0, partly=False, warmup=False):
        super().__init__(name="trainee")
        self.network, self.shrink, self.partly = network, shrink, partly
        self.with_logits = unet.with_logits(network) if loss == "weighted" else None
        self.recipe, self.window, self.normalisation = recipe, window, normalisation
        constants = {"window": window, "mean": normalisation.mean, "std": normalisation.std}
        self.warp_training = device.fused(partial(augment.warp, recipe=recipe, **constants))
        self.warp_validation = device.fused(partial(augment.warp, recipe=augment.RECIPES["none"], **constants))
        self.loss_function = weighted_loss if self.with_logits else partial(plain_loss, losses.LOSSES[loss])
        self.dice = keras.metrics.Mean(name="dice")
        self.updates = self.add_weight(initializer="zeros", trainable=False, name="updates") if warmup else None
        for layer in network.layers if warmup else ():
            if isinstance(layer, layers.BatchNormDropout):
                layer.update = lambda: self.updates - 1  # `call` has counted this one

    def call(self, x, training=False):
        if training and self.updates is not None:
            self.updates.assign_add(1)
        image, *labels = (self.warp_training if training else self.warp_validation)(x)
        kept = slice(self.shrink, labels[0].shape[1] - self.shrink)
        labels = [label[:, kept, kept] for label in labels]
        if self.with_logits:
            interior, logits = self.with_logits(image, training=training)
            return interior, *labels, logits
        return self.network(image, training=training), *labels

    def _maybe_symbolic_build(self, **_):
        """Nothing: all variables are there already, and Keras's own (3.15) cannot average a dict over workers."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        found = self.loss_function(*y_pred, labelled=self.labelled(y_pred[1]))
        return found / distribution.replicas()  # their gradients are summed

    def labelled(self, mask):
        """1 where a pixel counts, 0 where not; None where all do."""
        return ops.cast(mask >= 0, "float32") if self.partly else None

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        interior, mask, *_ = y_pred
        self.dice.update_state(losses.soft_dice(ops.cast(mask > 0, "float32"), interior, self.labelled(mask)))
        return {key: distribution.for_logs(value) for key, value in self.get_metrics_result().items()}

    def state(self):
        """Everything that changes during training: weights, statistics, dropout keys, optimizer slots."""
        counted = [] if self.updates is None else [self.updates]
        return [*self.network.variables, *self.optimizer.variables, *counted]

    def take_over(self, other):
        """Become what another trainee, perhaps on several devices, is."""
        for mine, variable in zip(self.state(), other.state(), strict=True):
            mine.assign(ops.convert_to_numpy(variable))

    def is_finite(self):
        return all(np.isfinite(ops.convert_to_numpy(variable)).all() for variable in self.network.variables)

    def validate(self, batches):
        """Loss and Dice as the mean over the windows of all batches, each weighed by how much of it is labelled."""
        found, sizes = [], []
        for batch in batches:
            self.reset_metrics()
            found.append(self.test_on_batch(batch, return_dict=True))
            kept = slice(self.shrink, batch["mask"].shape[1] - self.shrink)
            sizes.append(len(batch["key"]) * np.mean(batch["mask"][:, kept, kept] >= 0))
        return {
            f"val_{key}": float(np.average([float(f[key]) for f in found], weights=sizes)) for key in ("loss", "dice")
        }


def plain_loss(loss, interior, mask, labelled):
    return loss(mask, interior, labelled)


def weighted_loss(interior, mask, weights, logits, labelled):
    return losses.weighted_cross_entropy(mask > 0, logits, weights, labelled)


@contextlib.contextmanager
def averaged_weights(trainee):
    """With the optimizer's moving average of the weights in place, where it keeps one."""
    averages = trainee.optimizer._model_variables_moving_average if trainee.optimizer.use_ema else []
    variables = trainee.network.trainable_variables if averages else []
    # Copies, for JAX gives the buffers of a variable away to the step that it compiles.
    trained = [np.array(variable) for variable in variables]
    for variable, average in zip(variables, averages, strict=True):
        variable.assign(np.array(average))
    try:
        yield
    finally:
        for variable, value in zip(variables, trained, strict=True):
            variable.assign(value)


def find_rates(trainee, feed, count, lowest=1e-7, highest=1.0):
    """The range test: raise the learning rate from update to update until the loss explodes; rates and losses."""
    rates, found = np.geomspace(lowest, highest, count), []
    factor = (highest / lowest) ** (1 / (count - 1))
    trainee.optimizer._learning_rate = clr_callback.Schedule(lambda update: lowest * factor**update)
    for _ in rates:
        trainee.reset_metrics()
        found.append(float(trainee.train_on_batch(next(feed)[0], return_dict=True)["loss"]))
        curve = clr_callback.smoothed(found)  # the loss of single windows goes up and down
        if not math.isfinite(found[-1]) or curve[-1] > 4 * min(curve):
            break
    found = [loss for loss in found if math.isfinite(loss)] or [math.inf]
    return rates[: len(found)], found
