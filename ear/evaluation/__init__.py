"""Metrics of generated images: feature extractors, FID and others, and the protocol they were measured under."""
