"""Cached latents: posterior moments of every image and its mirror image.

`caching` writes them to HDF5 shards, `store` memory-maps them, `batches` feeds them to the training.
"""
