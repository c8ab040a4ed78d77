"""Prediction: weights in and out, tiles, what computes, blocks of an OME-Zarr image."""
