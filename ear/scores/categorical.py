"""The discrete baseline: tokens quantised with a k-means codebook, scored by the logarithm (cross-entropy).

The same transformer on the same latents, so that the question whether quantisation hurts can be asked.
Shapes: N tokens, D token channels, W hidden width, V codes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ear.config.scores import Categorical
from ear.errors import UserError
from ear.runtime.randomness import RandomSource, choose
from ear.scores.score import HeadSize, Score

_INIT_SD = 0.02


class CategoricalScore(Score):
    """Cross-entropy over the codebook; the logits are linear in the hidden state."""

    learns_tokens = True
    temperature_scales = "the logits, which it divides"
    guidance_extrapolates = "logits"

    codebook: Tensor  # [V, D]

    def __init__(self, options: Categorical, size: HeadSize):
        super().__init__()
        self.projection = nn.Linear(size.hidden_width, options.codes)
        self.register_buffer("codebook", torch.zeros(options.codes, size.token_channels))

    def initialise(self, generator: torch.Generator) -> None:
        """Small logits."""
        nn.init.normal_(self.projection.weight, std=_INIT_SD, generator=generator)

    def learn(self, tokens: Tensor, seed: int) -> None:
        """The codebook is the k-means centres of `tokens` [N, D]; raises ValueError for fewer tokens than codes."""
        from sklearn.cluster import KMeans

        if len(tokens) < len(self.codebook):
            raise UserError(
                f"score.codes is {len(self.codebook)}, more than the {len(tokens)} tokens to learn them from; lower it."
            )
        centres = KMeans(len(self.codebook), n_init=1, random_state=seed % 2**32).fit(tokens.cpu().numpy())
        self.codebook.copy_(torch.as_tensor(centres.cluster_centers_))

    def quantise(self, tokens: Tensor) -> Tensor:
        """tokens [..., D] => numbers of their nearest codes [...]."""
        flat = tokens.float().reshape(-1, tokens.shape[-1])
        return torch.cdist(flat, self.codebook).argmin(-1).view(tokens.shape[:-1])

    def represent(self, tokens: Tensor) -> Tensor:
        """tokens [..., D] => their nearest codes [..., D]."""
        return self.codebook[self.quantise(tokens)]

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [N, W] => [N, V] in float32."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.projection(hidden.float())

    def loss(self, hidden: Tensor, target: Tensor, *, temperature: float, generator: torch.Generator) -> Tensor:
        """hidden [N, W], target [N, D] => cross-entropy [N] in nats; training temperature has no meaning here."""
        return F.cross_entropy(self.logits(hidden), self.quantise(target), reduction="none")

    def sample(
        self,
        hidden: Tensor,
        *,
        source: RandomSource,
        temperature: float = 1.0,  # divides the logits; 0 takes the likeliest code
        unconditional: Tensor | None = None,
        guidance: float = 1.0,
    ) -> Tensor:
        """hidden [N, W] => codes [N, D]; guidance extrapolates the logits."""
        logits = self.logits(hidden)
        if unconditional is not None:
            logits = guidance * logits + (1 - guidance) * self.logits(unconditional)
        index = logits.argmax(-1) if temperature == 0 else choose(logits / temperature, source)
        return self.codebook[index]
