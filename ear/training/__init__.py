"""The training loop shared by all networks: trainer, optimiser, EMA, gradients over processes, checkpoints.

Losses, data and models are passed in; on CPUs, resuming from a checkpoint ends in the bytes of an uninterrupted
training.
"""
