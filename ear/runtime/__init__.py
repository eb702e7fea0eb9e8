"""Where and how code runs: devices, processes (torch.distributed), shards on an executor, random numbers.

Results do not depend on how many processes share the work; random numbers are functions of a seed and a position.
"""
