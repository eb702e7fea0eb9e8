"""Hydra groups and presets, composed into params.yaml by `python -m ear.configure`."""
