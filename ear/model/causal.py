"""The causal model: one token after the other, in raster or in random order (EAR, table 5).

The sequence for an order pi is P buffer tokens (copies of the class embedding), then y_pi(1) .. y_pi(L-1). The slot of
y_pi(i-1) predicts y_pi(i); the last buffer token predicts y_pi(1). With `target_positions`, which random order needs,
a slot also embeds the position that it predicts.
Shapes: see ear.model.autoregressive.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ear.errors import UserError
from ear.model.autoregressive import EMBEDDING_SD, AutoregressiveModel, Conditions, DrawTokens, Plan
from ear.model.masking import random_orders
from ear.model.shape import Shape
from ear.model.tokens import pick
from ear.model.transformer import Cache
from ear.runtime.randomness import Stream


class Slots(NamedTuple):
    """Inputs of the transformer, in the order of the sequence."""

    embedded: Tensor  # [B, T, W]
    at: Tensor  # int64 [B, T], their positions: buffer tokens first, then the image's, row by row
    aim: Tensor  # int64 [B, T], the positions that they predict; buffer tokens before the last: their own

    def then(self, later: "Slots") -> "Slots":
        """Both, one after the other."""
        return Slots(*(torch.cat(both, dim=1) for both in zip(self, later, strict=True)))


class CausalModel(AutoregressiveModel):
    """Causal attention over buffer tokens and image tokens; every token is predicted from those before it."""

    target_positions: nn.Parameter | None  # [1, L, W]

    def __init__(self, shape: Shape):
        options = shape.model
        tables = {"null_class": (1, options.width), "positions": (1, options.buffer_size + shape.tokens, options.width)}
        if options.target_positions:
            tables["target_positions"] = (1, shape.tokens, options.width)
        super().__init__(shape, tables)
        if not options.target_positions:
            self.target_positions = None

    def initialise(self, generator: torch.Generator, embedding_sd: float = EMBEDDING_SD) -> "CausalModel":
        """As `AutoregressiveModel.initialise`; the table of predicted positions starts at 0."""
        super().initialise(generator, embedding_sd)
        if self.target_positions is not None:
            nn.init.zeros_(self.target_positions)
        return self

    def training_positions(self, images: int, source: Stream, device: torch.device | str = "cpu") -> Tensor:
        """int64 [B, L]: all positions, in the order in which they are predicted."""
        return self.draw_orders(images, source, device)

    def predict(self, tokens: Tensor, positions: Tensor, labels: Tensor, null: Tensor | None = None) -> Tensor:
        """Tokens [B, L, D], positions [B, L] (an order), labels [B], null bool [B] (true: no class) => [B, L, W].

        State i predicts the token at positions[:, i] and depends only on the i tokens before it in the order.
        """
        before, after = positions[:, :-1], positions[:, 1:]
        sequence = self.start(labels, null, positions[:, :1]).then(self.slots(pick(tokens, before), before, after))
        return self.states(sequence)[:, self.buffer - 1 :]

    def states(self, slots: Slots, caches: list[Cache] | None = None) -> Tensor:
        """Hidden states [B, T, W] of the slots; with `caches`, these follow the slots of earlier calls."""
        return self.transformer(slots.embedded, caches, rotation=self.rotation(slots.at, slots.aim))

    def start(self, labels: Tensor, null: Tensor | None, first: Tensor) -> Slots:
        """The P buffer tokens; the last one predicts the positions `first` [B, 1]."""
        prefix = self.prefix(labels, null) + self.positions[:, : self.buffer]
        embedded = torch.cat([prefix[:, :-1], self._aimed(prefix[:, -1:], first)], dim=1)
        at = torch.arange(self.buffer, device=first.device).expand(len(first), -1)
        return Slots(embedded, at, torch.cat([at[:, :-1], self.buffer + first], dim=1))

    def slots(self, tokens: Tensor, at: Tensor, next_at: Tensor) -> Slots:
        """Tokens [B, n, D] at positions `at` [B, n], to predict positions `next_at` [B, n] => n slots."""
        slots = self.token_embedding(tokens) + F.embedding(self.buffer + at, self.positions[0])
        return Slots(self._aimed(slots, next_at), self.buffer + at, self.buffer + next_at)

    def _aimed(self, slots: Tensor, next_at: Tensor) -> Tensor:
        """Add to slots [B, n, W] the embedding of the positions that they predict, [B, n]."""
        return slots if self.target_positions is None else slots + F.embedding(next_at, self.target_positions[0])

    def caches(self) -> list[Cache]:
        """Empty key-value caches for one sequence."""
        return self.transformer.caches(self.buffer + self.tokens - 1)

    def draw_orders(self, images: int, source: Stream, device: torch.device | str = "cpu") -> Tensor:
        """int64 [B, L]: row by row, or a random permutation per image."""
        if self.shape.model.order == "raster":
            return torch.arange(self.tokens, device=device).expand(images, -1)
        return random_orders(images, self.tokens, source, device)

    def editing_orders(self, orders: Tensor, mask: Tensor) -> tuple[Tensor, int]:
        """Always raises UserError: a causal model cannot see tokens that come later in its order."""
        raise UserError(
            "model.attention is 'causal', which cannot condition on later tokens; edit images with a bidirectional "
            "model."
        )

    def draw(self, tokens: Tensor, orders: Tensor, conditions: Conditions, draw_tokens: DrawTokens, plan: Plan) -> None:
        """Draw all tokens, in place, from the start of each order to its end; the transformer sees each slot once.

        Rows without a class are computed in every step: guidance in a later one needs their keys and values.
        """
        assert plan.count == self.tokens
        caches, positions = self.caches(), orders.split(1, dim=1)  # [B, 1] each
        slots = self.start(conditions.labels, conditions.null, conditions.expand(positions[0]))
        for number, at in enumerate(positions):
            hidden = self.states(slots, caches)[:, -1:]  # [R, 1, W]
            drawn = draw_tokens(hidden, self.tokens - number - 1)  # [B, 1, D]
            tokens.scatter_(1, at[..., None].expand_as(drawn), drawn)
            if number + 1 < self.tokens:
                slots = self.slots(*map(conditions.expand, (drawn, at, positions[number + 1])))

    def passes(self, steps: int) -> int:
        """One pass per token; all but the first are over a single position."""
        return self.tokens
