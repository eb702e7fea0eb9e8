"""Every score trained at one budget and compared: `python -m benchmarks.comparison` writes docs/scores.md."""
