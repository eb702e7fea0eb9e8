"""Where and how code runs: devices, processes (torch.distributed), shards on an executor, random numbers.

Any number of processes sees the same batches and random numbers, which are functions of a seed and a position; only
sums round slightly differently.
"""
