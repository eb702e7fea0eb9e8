"""One thin program per stage of dvc.yaml; each also works alone: `python -m stages.NAME`."""
