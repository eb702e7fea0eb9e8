"""Hydra groups and presets, composed into params.yaml by `ear configure`."""
