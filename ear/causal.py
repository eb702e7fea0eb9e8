"""The causal model over continuous tokens: one token after the other, in raster or in random order (EAR, table 5).

The sequence of an order pi is P class tokens, then y_pi(1) .. y_pi(L-1); the slot of y_pi(i-1) predicts y_pi(i), and
the last class token predicts y_pi(1). In random order a slot is told which position it predicts.
Shapes: B images, L tokens of D channels, P buffer tokens, W width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ear.masking import random_orders
from ear.model import Model, Shape, pick
from ear.randomness import Source
from ear.transformer import Cache


class CausalModel(Model):
    """The parts of the masked model with causal attention; every token is predicted, from those before it."""

    def __init__(self, shape: Shape):
        super().__init__(shape)
        del self.mask_token  # nothing is masked
        self.order = shape.model["order"]
        table = torch.empty(1, self.tokens, shape.model["width"])
        self.target_positions = nn.Parameter(table) if shape.model["target_positions"] else None

    def initialise(self, generator: torch.Generator) -> "CausalModel":
        """As the masked model; the table of predicted positions starts at 0."""
        super().initialise(generator)
        if self.target_positions is not None:
            nn.init.zeros_(self.target_positions)
        return self

    def draw_orders(self, images: int, source: Source, device: torch.device | str = "cpu") -> Tensor:
        """int64 [B, L]: row by row, or a random permutation per image."""
        if self.order == "raster":
            return torch.arange(self.tokens, device=device).expand(images, -1)
        return random_orders(images, self.tokens, source, device)

    def hidden(self, tokens: Tensor, orders: Tensor, labels: Tensor, null: Tensor | None = None) -> Tensor:
        """tokens [B, L, D], orders [B, L], labels [B], null bool [B] (true: no class) => [B, L, W].

        Row i predicts the token at position orders[:, i] and depends on the i tokens before it in the order alone.
        """
        before, after = orders[:, :-1], orders[:, 1:]
        sequence = [self.start(labels, null, orders[:, :1]), self.slots(pick(tokens, before), before, after)]
        return self.transformer(torch.cat(sequence, dim=1))[:, self.buffer - 1 :]

    def start(self, labels: Tensor, null: Tensor | None, first: Tensor) -> Tensor:
        """The class tokens [B, P, W], the last of which predicts the positions `first` [B, 1]."""
        prefix = self.prefix(labels, null) + self.positions[:, : self.buffer]
        return torch.cat([prefix[:, :-1], self._aimed(prefix[:, -1:], first)], dim=1)

    def slots(self, tokens: Tensor, at: Tensor, next_at: Tensor) -> Tensor:
        """Tokens [B, n, D] of the positions `at` [B, n], each before the position `next_at` [B, n] => [B, n, W]."""
        slots = self.token_embedding(tokens) + F.embedding(self.buffer + at, self.positions[0])
        return self._aimed(slots, next_at)

    def _aimed(self, slots: Tensor, next_at: Tensor) -> Tensor:
        """Slots [B, n, W] that know the position which they predict, [B, n]."""
        return slots if self.target_positions is None else slots + F.embedding(next_at, self.target_positions[0])

    def caches(self) -> list[Cache]:
        """Empty caches for one sequence."""
        return self.transformer.caches(self.buffer + self.tokens - 1)

    def predictions(
        self, tokens: Tensor, labels: Tensor, null: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """tokens [B, L, D] => hidden states [B, L, W] and the positions [B, L] that they predict: all of them."""
        orders = self.draw_orders(len(tokens), generator, tokens.device)
        return self.hidden(tokens, orders, labels, null), orders
