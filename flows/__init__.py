"""Prefect flows over the DVC pipeline: `pipeline` runs its stages, `sweep` compares parameters, `search` chooses them.

Only DVC decides what is out of date; without Prefect, `dvc repro` gives the same results.
"""
