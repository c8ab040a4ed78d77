"""The optimizers by name; RMSprop with the arithmetic of 2017; moving averages that are warmed up."""

import keras
from keras import ops


class RMSprop(keras.optimizers.RMSprop):
    """RMSprop as Keras 1 and 2 computed it, and so the study of 2017: lr g / (sqrt(v) + epsilon).

    Keras 3 divides by sqrt(v + epsilon) instead. With its epsilon of 1e-7 a gradient below about 3e-4 then moves a
    weight by less than the study's did. v is the moving average of g^2 with `rho` 0.9 (Tieleman & Hinton 2012).
    """

    def update_step(self, gradient, variable, learning_rate):
        rate, gradient = ops.cast(learning_rate, variable.dtype), ops.cast(gradient, variable.dtype)
        index = self._get_variable_index(variable)
        velocity = self._velocities[index]
        self.assign(velocity, self.rho * velocity + (1 - self.rho) * ops.square(gradient))
        step = rate * gradient / (ops.sqrt(velocity) + self.epsilon)
        if self.momentum > 0:
            self.assign(self._momentums[index], self.momentum * self._momentums[index] + step)
            step = self._momentums[index]
        self.assign_sub(variable, step)


def warmed_up(momentum, update):
    """Momentum of a moving average at an update, from 0: of the first few it is the mean, not of its start.

    min(momentum, (1 + t) / (10 + t)), as in `tf.train.ExponentialMovingAverage`.
    """
    update = ops.cast(update, "float32")
    return ops.minimum(momentum, (1 + update) / (10 + update))


class Warm:
    """An optimizer whose moving average of the weights is warmed up: before the optimizer in the list of bases."""

    @property
    def ema_momentum(self):
        return warmed_up(self._ema_momentum, self.iterations)

    @ema_momentum.setter
    def ema_momentum(self, momentum):
        self._ema_momentum = momentum


OPTIMIZERS = {
    "rmsprop": RMSprop,
    "adam": keras.optimizers.Adam,
    "adamax": keras.optimizers.Adamax,
    "sgd": keras.optimizers.SGD,
}
