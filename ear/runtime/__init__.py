"""Where and how code runs: devices, processes (torch.distributed), shards on an executor, random numbers.

Batches and random numbers are functions of a seed and a position, so they are the same at any world size; only sums
round slightly differently.
"""
