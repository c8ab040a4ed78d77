"""Milliseconds per 512 x 512 pair of image and mask, all in one interleaved run, the best round of each.

    python benchmarks/warp.py [--window 512] [--batch 3] [--repeats 15]

"compiled" is the warp as a training step runs it (XLA on TensorFlow, jit on JAX), "graph" TensorFlow without XLA,
"host" the draws and source windows, "scipy" two calls of scipy.ndimage.map_coordinates with a map already made.
"""

import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import keras
import numpy as np
from keras import ops
from scipy import ndimage

import augment

LIMIT_MS = 4.0


def contenders(recipe, images, masks, window, count):
    """Functions of no argument, each doing one batch of `count` pairs, by name."""
    kwargs = {"seed": 0, "epoch": 0, "indices": range(count), "window": window, "sections": range(len(images))}
    arrays = augment.batch(images, masks, recipe, **kwargs)
    tensors = {name: ops.convert_to_tensor(array) for name, array in arrays.items()}

    def warp(inputs):
        return augment.warp(inputs, recipe, window=window, mean=127.0, std=42.0)

    found = {"host": lambda: augment.batch(images, masks, recipe, **kwargs)}
    for name, function in compiled(warp).items():
        found[name] = lambda function=function: [ops.convert_to_numpy(part) for part in function(tensors)]
    rows, columns = augment._coordinates(arrays, recipe, window)
    places = np.stack([ops.convert_to_numpy(rows), ops.convert_to_numpy(columns)], axis=1)
    found["scipy"] = lambda: [
        ndimage.map_coordinates(source[k], places[k], order=order, output=np.float32)
        for k in range(count)
        for source, order in ((arrays["image"], 1), (arrays["mask"], 0))
    ]
    return found


def compiled(function):
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        tf.get_logger().setLevel("ERROR")  # each recipe is another function: traced anew on purpose
        return {"compiled": tf.function(function, jit_compile=True), "graph": tf.function(function)}
    if keras.backend.backend() == "jax":
        import jax

        return {"compiled": jax.jit(function)}
    return {"eager": function}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--window", type=int, default=512, help="px (default: 512)")
    parser.add_argument("--batch", type=int, default=3, help="pairs per call (default: 3)")
    parser.add_argument("--repeats", type=int, default=15, help="interleaved rounds (default: 15)")
    args = parser.parse_args()
    images = np.random.default_rng(0).integers(0, 256, (6, 512, 512)).astype(np.uint8)
    masks = (images > 60).astype(np.uint8)
    table = {
        (recipe, name): run
        for recipe in augment.RECIPES
        for name, run in contenders(augment.RECIPES[recipe], images, masks, args.window, args.batch).items()
    }
    times = {key: [] for key in table}
    for _ in range(args.repeats + 1):  # the first round compiles
        for key, run in table.items():
            start = time.perf_counter()
            run()
            times[key].append((time.perf_counter() - start) / args.batch * 1e3)
    print(f"{keras.backend.backend()}, {os.cpu_count()} cores, window {args.window}, batch {args.batch}")
    for recipe in augment.RECIPES:
        cells = {name: min(taken[1:]) for (of, name), taken in times.items() if of == recipe}
        words = "  ".join(f"{name} {ms:6.2f} ({ms / cells['scipy']:.2f} of scipy)" for name, ms in cells.items())
        print(f"{recipe:8s} ms per pair: {words}")
        if recipe == "all" and cells.get("compiled", 0) > LIMIT_MS:
            print(f"compiled is slower than the limit of {LIMIT_MS} ms")


if __name__ == "__main__":
    main()
