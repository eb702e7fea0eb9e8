"""The training loop shared by all networks: trainer, optimiser, EMA, gradient sums over ranks, checkpoints.

Losses, data and models are passed in. On CPUs, a resumed training gives the same bytes as an uninterrupted one.
"""
