"""Cached latents: posterior moments of every image and its mirror image.

`caching` writes them to a few large HDF5 files, `store` memory-maps them, `batches` feeds them to the training.
"""
