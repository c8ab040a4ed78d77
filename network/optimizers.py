"""The optimizers by name; RMSprop with the arithmetic of 2017; Muon; moving averages that are warmed up."""

import math

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


class Muon(keras.optimizers.Adam):
    """Muon for the kernels of convolutions, Adam for everything else (biases, batch norm, the head).

    A kernel is taken as a matrix of (rows x columns x inputs) by outputs. Its step is the nearest matrix of
    orthonormal columns to its Nesterov momentum, so that rare directions are learned as fast as frequent ones. Source:
    K. Jordan et al. 2024, kellerjordan.github.io/posts/muon. The step is scaled to the size of one of Adam's, so both
    take the same learning rate (Liu et al. 2025, arXiv 2502.16982).
    """

    momentum = 0.95
    smallest = 8  # side of a matrix; there is little to make orthogonal in a smaller one

    def update_step(self, gradient, variable, learning_rate):
        shape = variable.shape
        rows, columns = math.prod(shape[:-1]), shape[-1]
        if len(shape) != 4 or min(rows, columns) < self.smallest:
            super().update_step(gradient, variable, learning_rate)
            return
        rate, gradient = ops.cast(learning_rate, variable.dtype), ops.cast(gradient, variable.dtype)
        average = self._momentums[self._get_variable_index(variable)]
        self.assign(average, self.momentum * average + gradient)
        matrix = ops.reshape(gradient + self.momentum * average, (rows, columns))
        step = 0.2 * math.sqrt(max(rows, columns)) * orthogonal(matrix)
        self.assign_sub(variable, rate * ops.reshape(step, shape))


def orthogonal(matrix):
    """Near to U V^T of a matrix U S V^T, (m, n): five Newton-Schulz steps bring singular values to about 0.7 .. 1.2."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = ops.transpose(matrix) if tall else matrix
    x = x / (ops.norm(x) + 1e-7)
    for _ in range(5):
        gram = ops.matmul(x, ops.transpose(x))
        x = 3.4445 * x + ops.matmul(2.0315 * ops.matmul(gram, gram) - 4.7750 * gram, x)
    return ops.transpose(x) if tall else x


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
    "muon": Muon,
}
