"""Real images after the tokenizer's round trip: what generated images could be at best."""

import numpy as np
import torch

from ear.autoencoder import Tokenizer
from ear.autoencoder_loss import reconstruct
from ear.prepared import PreparedImages


class Reconstructions:
    """Prepared images through the posterior mean of a tokenizer, made while read; a source for `ear.features`."""

    def __init__(self, originals: PreparedImages, tokenizer: Tokenizer, device: torch.device):
        self._originals, self._tokenizer, self._device = originals, tokenizer.to(device).eval(), device
        self.labels = originals.labels

    def __len__(self) -> int:
        return len(self._originals)

    def images(self, rows: range) -> np.ndarray:
        """uint8 [n, S, S, 3]."""
        return (
            reconstruct(self._tokenizer, torch.from_numpy(self._originals.images(rows)).to(self._device)).cpu().numpy()
        )
