"""Losses and the metric of the 2017 study, on interior probabilities; the weighted loss of the 2015 U-Net.

The former take `truth` and `interior`, tensors of shape (B, h, w), float32: 1 = interior, 0 = membrane, and return a
float32 scalar. The latter, `weighted_cross_entropy`, takes logits, and a weight for every pixel, which numpy and scipy
make of instance masks once a run: `separate`, `border_weights`. Each takes `labelled` as well, of shape (B, h, w): 0
where a pixel is left out, else 1; None: all count.

>>> border_weights(np.array([[1, 0, 2]])).round(2)  # 1 + 10 exp(-(1 + 1)^2 / 50) between cells
array([[ 1.  , 10.23,  1.  ]], dtype=float32)
"""

from math import ceil, inf, log, sqrt

import numpy as np
from keras import ops

from network import distribution

SMOOTHING = 1.0
CLIP = 1e-7  # keeps the logarithm finite, as keras.losses.BinaryCrossentropy does
NEGLIGIBLE = 1e-6  # border terms below this fraction of w0 may be left out


def soft_dice(truth, interior, labelled=None):
    """Soft Dice of the interior over the whole batch, (2 sum(t p) + 1) / (sum(t) + sum(p) + 1).

    The smoothing of 1 is the study's; an empty mask predicted empty scores 1 (Milletari et al. 2016, arXiv
    1606.04797, without the squares).
    """
    if labelled is not None:
        truth, interior = truth * labelled, interior * labelled
    sums = ops.stack([ops.sum(truth * interior), ops.sum(truth), ops.sum(interior)])
    overlap, of_truth, of_interior = ops.unstack(distribution.total(sums))
    return (2 * overlap + SMOOTHING) / (of_truth + of_interior + SMOOTHING)


def bce(truth, interior, labelled=None):
    """Mean binary cross-entropy, in nats per pixel."""
    p = ops.clip(interior, CLIP, 1 - CLIP)
    return -mean(truth * ops.log(p) + (1 - truth) * ops.log(1 - p), labelled)


def mean(values, labelled=None):
    """Mean over the pixels, or over those of the whole batch that are labelled; 0 where none is."""
    if labelled is None:
        return ops.mean(values)
    of_values, count = ops.unstack(distribution.total(ops.stack([ops.sum(values * labelled), ops.sum(labelled)])))
    return of_values / ops.maximum(count, 1)


def dice(truth, interior, labelled=None):
    """1 - soft Dice."""
    return 1 - soft_dice(truth, interior, labelled)


def bce_dice(truth, interior, labelled=None):
    """Binary cross-entropy + (1 - soft Dice): the loss of the 2017 study."""
    return bce(truth, interior, labelled) + dice(truth, interior, labelled)


LOSSES = {"bce_dice": bce_dice, "bce": bce, "dice": dice}  # `weighted_cross_entropy` takes other arguments


# -- the weighted loss of 2015 ----------------------------------------------------------------------------------


def weighted_cross_entropy(truth, logits, weights, labelled=None):
    """Mean over all pixels, or those that are labelled, of weight times softmax cross-entropy, in nats.

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
    """
    likelihood = ops.log_softmax(ops.cast(logits, "float32"), axis=-1)
    chosen = ops.one_hot(ops.cast(truth, "int32"), logits.shape[-1], dtype="float32")
    return -mean(weights * ops.sum(chosen * likelihood, axis=-1), labelled)


def separate(labels):
    """Put background between touching instances: the separation border of the 2015 paper.

    A pixel with a pixel of another instance among its 8 neighbours becomes background, so that a border is 2 px wide,
    one from either. `labels` are integers of shape (H, W), 0 = background, and so is the result, in the same dtype. An
    instance no wider than its borders is gone.

    >>> separate(np.array([[1, 1, 2, 2, 0, 3]]))
    array([[1, 0, 0, 2, 0, 3]])
    """
    from scipy import ndimage

    others = np.where(labels == 0, labels.max(initial=0), labels)  # background must not be the smallest label
    alone = (labels == ndimage.maximum_filter(labels, 3)) & (labels == ndimage.minimum_filter(others, 3))
    return np.where(alone, labels, 0).astype(labels.dtype)


def border_weights(labels, *, w0=10.0, sigma=5.0, balance=(1.0, 1.0)):
    """Weight of every pixel: w_c + w0 exp(-(d1 + d2)^2 / (2 sigma^2)), equation 2 of arXiv 1505.04597.

    d1 and d2 are the distances of a background pixel to the nearest and to the second nearest instance, Euclidean, in
    px, from its centre to the centre of the instance's nearest pixel, which lies on its border. Inside instances the
    second term is 0, as in the paper's figure 3 d: it exists to make the network learn the background that separates.

    Parameters
    ----------
    labels : ndarray of int, shape (H, W)
        Instances, 0 = background; the parts of one label are one instance. Instances that touch have no background
        between them to be weighted: `separate` them first, in the truth as well.
    w0 : float
        Weight at a border of no width, at least 0.
    sigma : float
        Standard deviation of the border term, px, above 0.
    balance : (float, float)
        w_c of background and interior: `class_weights`.

    Returns
    -------
    ndarray of shape (H, W)
        float32. Exact to `NEGLIGIBLE` w0 and the rounding of float32: instances farther away than a term of that size
        allows are not looked at. With fewer than two instances, w_c alone.
    """
    background, interior = balance
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


def _two_nearest(labels, reach):
    """Distances of every pixel to its nearest and second nearest instance; inf for some that exceed `reach`.

    One distance transform for each instance, in its bounding box grown by `reach`: outside, the distance exceeds it.
    """
    from scipy import ndimage
    from skimage.segmentation import relabel_sequential

    dense = relabel_sequential(labels)[0]
    first, second = np.full(labels.shape, inf), np.full(labels.shape, inf)
    for number, box in enumerate(ndimage.find_objects(dense), 1):
        window = tuple(slice(max(0, cut.start - reach), cut.stop + reach) for cut in box)
        distance = ndimage.distance_transform_edt(dense[window] != number)
        nearest, next_nearest = first[window], second[window]
        np.minimum(next_nearest, np.maximum(nearest, distance), out=next_nearest)
        np.minimum(nearest, distance, out=nearest)
    return first, second
