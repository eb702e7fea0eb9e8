"""Measurements: one program per question; each prints JSON, and `--save` keeps it in benchmarks/results/."""
