"""The quantised baseline: tokens replaced by the codes of a k-means codebook, scored by cross-entropy.

It shows what quantisation costs, with the same transformer on the same latents.
Shapes: N tokens, D token channels, W hidden width, V codes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ear.config.scores import Categorical
from ear.errors import UserError
from ear.runtime.randomness import Stream, choose
from ear.scores.score import DENOISING, Denoising, HeadSize, Score, TokenLoss

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
        """Draw small logits: weights N(0, 0.02^2)."""
        nn.init.normal_(self.projection.weight, std=_INIT_SD, generator=generator)

    def learn(self, tokens: Tensor, seed: int) -> None:
        """Fit the codebook: k-means centres of `tokens` [N, D]. Raises UserError for fewer tokens than codes."""
        from sklearn.cluster import KMeans
        from threadpoolctl import threadpool_limits

        if len(tokens) < len(self.codebook):
            raise UserError(
                f"score.codes is {len(self.codebook)}, but must be at most {len(tokens)} (number of tokens); lower it."
            )
        with threadpool_limits(1):  # several threads would add their sums in the order in which they end
            centres = KMeans(len(self.codebook), n_init=1, random_state=seed % 2**32).fit(tokens.cpu().numpy())
        self.codebook.copy_(torch.as_tensor(centres.cluster_centers_))

    def quantise(self, tokens: Tensor) -> Tensor:
        """Tokens [..., D] => indices of their nearest codes [...]."""
        flat = tokens.float().reshape(-1, tokens.shape[-1])
        # Not by a matrix product, which TF32 would round.
        distances = torch.cdist(flat, self.codebook, compute_mode="donot_use_mm_for_euclid_dist")
        return distances.argmin(-1).view(tokens.shape[:-1])

    def represent(self, tokens: Tensor) -> Tensor:
        """Tokens [..., D] => their nearest codes [..., D]."""
        return self.codebook[self.quantise(tokens)]

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [N, W] => logits [N, V] in float32."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.projection(hidden.float())

    def loss(self, hidden: Tensor, target: Tensor, *, temperature: float, source: Stream) -> TokenLoss:
        """Hidden [N, W], target [N, D] => cross-entropy [N] in nats; the training temperature is ignored."""
        return TokenLoss(F.cross_entropy(self.logits(hidden), self.quantise(target), reduction="none"))

    def sample(
        self,
        hidden: Tensor,
        *,
        source: Stream,
        temperature: float = 1.0,  # divides the logits; 0 selects the most likely code
        unconditional: Tensor | None = None,
        guidance: float = 1.0,
        denoising: Denoising = DENOISING,  # ignored
    ) -> Tensor:
        """Hidden [N, W] => codes [N, D]; guidance extrapolates the logits."""
        logits = self.logits(hidden)
        if unconditional is not None:
            logits = guidance * logits + (1 - guidance) * self.logits(unconditional)
        best = logits.amax(-1, keepdim=True)
        # Differences from the best code do not overflow at low temperatures.
        index = logits.argmax(-1) if temperature == 0 else choose((logits - best) / temperature, source)[:, 0]
        return self.codebook[index] + 0 * best  # NaN stays NaN, for the check of the image
