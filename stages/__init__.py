"""One small program per stage of dvc.yaml; each also runs by itself: `python -m stages.NAME`."""
