"""Losses and the metric of the 2017 study, on interior probabilities; the weighted loss of the 2015 U-Net.

The former take `truth` and `interior`, tensors of shape (B, h, w), float32: 1 = interior, 0 = membrane, and return a
float32 scalar. The latter, `weighted_cross_entropy`, takes logits, and a weight for every pixel, which numpy and scipy
make of instance masks once a run: `separate`, `border_weights`.

>>> truth = ops.array([[[1.0, 0.0]]])
>>> round(float(soft_dice(truth, truth)), 3)
1.0
>>> border_weights(np.array([[1, 0, 2]]), class_balance=False).round(2)  # 1 + 10 exp(-(1 + 1)^2 / 50) between cells
array([[ 1.  , 10.23,  1.  ]], dtype=float32)
"""

from math import ceil, inf, log, sqrt

import numpy as np
from keras import ops

from network import distribution

SMOOTHING = 1.0
CLIP = 1e-7  # keeps the logarithm finite, as keras.losses.BinaryCrossentropy does
NEGLIGIBLE = 1e-6  # border terms below this fraction of w0 may be left out


def soft_dice(truth, interior):
    """Soft Dice of the interior over the whole batch, (2 sum(t p) + 1) / (sum(t) + sum(p) + 1).

    The smoothing of 1 is the study's; an empty mask predicted empty scores 1 (Milletari et al. 2016, arXiv
    1606.04797, without the squares).
    """
    sums = ops.stack([ops.sum(truth * interior), ops.sum(truth), ops.sum(interior)])
    overlap, of_truth, of_interior = ops.unstack(distribution.total(sums))
    return (2 * overlap + SMOOTHING) / (of_truth + of_interior + SMOOTHING)


def bce(truth, interior):
    """Mean binary cross-entropy, in nats per pixel."""
    p = ops.clip(interior, CLIP, 1 - CLIP)
    return -ops.mean(truth * ops.log(p) + (1 - truth) * ops.log(1 - p))


def dice(truth, interior):
    """1 - soft Dice."""
    return 1 - soft_dice(truth, interior)


def bce_dice(truth, interior):
    """Binary cross-entropy + (1 - soft Dice): the loss of the 2017 study."""
    return bce(truth, interior) + dice(truth, interior)


LOSSES = {"bce_dice": bce_dice, "bce": bce, "dice": dice}  # `weighted_cross_entropy` takes other arguments


def get(name):
    """The loss of that name; ValueError names the choices."""
    if name not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}. Received: {name}")
    return LOSSES[name]


# -- the weighted loss of 2015 ----------------------------------------------------------------------------------


def weighted_cross_entropy(truth, logits, weights):
    """Mean over all pixels of weight times softmax cross-entropy, in nats.

    Equation 1 of the 2015 U-Net (arXiv 1505.04597) divided by the number of pixels, so that it does not grow with
    the tile. It is not divided by the sum of the weights: a tile with many borders shall count more.

    Parameters
    ----------
    truth : tensor of shape (B, h, w)
        Class numbers, in any dtype; 1 = interior.
    logits : tensor of shape (B, h, w, classes)
        Before the softmax (`unet.with_logits`).
    weights : tensor of shape (B, h, w)
        float32, from `border_weights`; 0 leaves a pixel out.

    Returns
    -------
    float32 scalar
    """
    likelihood = ops.log_softmax(ops.cast(logits, "float32"), axis=-1)
    chosen = ops.one_hot(ops.cast(truth, "int32"), logits.shape[-1], dtype="float32")
    return -ops.mean(weights * ops.sum(chosen * likelihood, axis=-1))


def separate(labels, reach=1):
    """Put background between touching instances: the separation border of the 2015 paper.

    Parameters
    ----------
    labels : ndarray of int, shape (H, W)
        Instances, 0 = background.
    reach : int
        An instance's pixel with a pixel of another instance within so many rows and columns becomes background. 1 is
        a border of 2 px where instances touch, one from either; 0 changes nothing.

    Returns
    -------
    ndarray of shape (H, W)
        In the dtype of `labels`. An instance no wider than its borders is gone.

    Examples
    --------
    >>> separate(np.array([[1, 1, 2, 2, 0, 3]]))
    array([[1, 0, 0, 2, 0, 3]])
    """
    from scipy import ndimage

    if reach < 0:
        raise ValueError(f"reach must be at least 0. Received: {reach}")
    labels = np.asarray(labels)
    window = 2 * reach + 1
    others = np.where(labels == 0, labels.max(initial=0), labels)  # background must not be the smallest label
    highest, lowest = ndimage.maximum_filter(labels, window), ndimage.minimum_filter(others, window)
    return np.where((labels == highest) & (labels == lowest), labels, 0).astype(labels.dtype)


def border_weights(labels, *, w0=10.0, sigma=5.0, class_balance=True):
    """Weight of every pixel: w_c + w0 exp(-(d1 + d2)^2 / (2 sigma^2)), equation 2 of arXiv 1505.04597.

    d1 and d2 are the distances of a background pixel to the nearest and to the second nearest instance; the distance
    to an instance is the Euclidean one, in px, from the pixel's centre to the centre of the instance's nearest pixel,
    which lies on its border. Inside instances the second term is 0, as in the paper's figure 3 d: it exists to make
    the network learn the background that separates, and an instance's own pixels are no such background.

    Parameters
    ----------
    labels : ndarray of int, shape (H, W)
        Instances, 0 = background; the parts of one label are one instance. Instances that touch have no background
        between them to be weighted: `separate` them first, in the truth as well.
    w0 : float
        Weight at a border of no width.
    sigma : float
        Standard deviation of the border term, px.
    class_balance : bool or (float, float)
        w_c of `class_weights` for these labels, or as given, (background, interior); False: w_c = 1.

    Returns
    -------
    ndarray of shape (H, W)
        float32. Exact to `NEGLIGIBLE` w0 and the rounding of float32: instances farther away than a term of that size
        allows are not looked at. With fewer than two instances, w_c alone.

    Raises
    ------
    ValueError
        If an argument breaks a rule; the message names it.
    """
    labels = _checked(labels, w0, sigma)
    if class_balance is True:
        class_balance = class_weights(np.count_nonzero(labels), labels.size)
    background, interior = class_balance or (1.0, 1.0)
    first, second = _two_nearest(labels, reach=ceil(sigma * sqrt(-2 * log(NEGLIGIBLE))))
    border = w0 * np.exp(-((first + second) ** 2) / (2 * sigma**2))
    return np.where(labels > 0, interior, background + border).astype(np.float32)


def class_weights(interior, total):
    """w_c of (background, interior) for so many interior pixels of `total`: total / (2 pixels of the class).

    Both classes then weigh the same in sum, and the mean weight is 1; with one class absent, both are 1.

    >>> class_weights(25, 100)
    (0.6666666666666666, 2.0)
    """
    if interior in (0, total):
        return 1.0, 1.0
    return total / (2 * (total - interior)), total / (2 * interior)


def _checked(labels, w0, sigma):
    """Labels numbered from 1 without gaps, background 0."""
    labels = np.asarray(labels)
    if labels.ndim != 2 or not labels.size or labels.dtype.kind not in "biu":
        raise ValueError(f"labels must be whole numbers of shape (H, W). Received: {labels.dtype} of {labels.shape}")
    if labels.min() < 0:
        raise ValueError(f"labels must be 0 for background and positive for instances. Received: {labels.min()}")
    if not 0 <= w0 < inf:
        raise ValueError(f"w0 must be at least 0. Received: {w0}")
    if not 0 < sigma < inf:
        raise ValueError(f"sigma must be above 0. Received: {sigma}")
    numbers, dense = np.unique(labels, return_inverse=True)
    return (dense.reshape(labels.shape) + (numbers[0] > 0)).astype(np.int32)


def _two_nearest(labels, reach):
    """Distances of every pixel to its nearest and second nearest instance; inf for some that exceed `reach`.

    One distance transform for each instance, in its bounding box grown by `reach`: outside of it, the distance
    exceeds `reach`.
    """
    from scipy import ndimage

    first, second = np.full(labels.shape, inf), np.full(labels.shape, inf)
    for number, box in enumerate(ndimage.find_objects(labels), 1):
        window = tuple(slice(max(0, cut.start - reach), cut.stop + reach) for cut in box)
        distance = ndimage.distance_transform_edt(labels[window] != number)
        nearest, next_nearest = first[window], second[window]
        np.minimum(next_nearest, np.maximum(nearest, distance), out=next_nearest)
        np.minimum(nearest, distance, out=nearest)
    return first, second
