"""Tokenizers: the maps between images and continuous latents, their training, import and description.

A tokenizer is a KL autoencoder (trained here or imported), principal components or the identity; `posterior` defines
what it outputs.
"""
