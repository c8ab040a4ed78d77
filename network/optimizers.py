"""The optimizers by name; RMSprop with the arithmetic of 2017."""

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


OPTIMIZERS = {
    "rmsprop": RMSprop,
    "adam": keras.optimizers.Adam,
    "adamax": keras.optimizers.Adamax,
    "sgd": keras.optimizers.SGD,
}
