"""Faults for the real pipeline: `python -m tests.faults` injects them and writes docs/reliability.md."""
