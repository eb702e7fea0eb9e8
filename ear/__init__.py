"""Quantisation-free autoregressive image generation by maximising strictly proper scores."""
