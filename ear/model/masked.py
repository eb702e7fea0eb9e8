"""The masked model: visible tokens and a class predict the masked tokens, as published (structure of MAR).

Shapes: see ear.model.autoregressive.
"""

import torch
from torch import Tensor, nn

from ear.model.autoregressive import AutoregressiveModel, Conditions, DrawTokens
from ear.model.masking import mask_first, mask_of, masked_after, masked_before_known, masked_count, random_orders
from ear.model.shape import Shape
from ear.model.tokens import pick
from ear.runtime.randomness import RandomSource


class MaskedModel(AutoregressiveModel):
    """Bidirectional attention over buffer tokens and image tokens, masked ones replaced by a learned vector."""

    mask_token: nn.Parameter  # [1, 1, W]

    def __init__(self, shape: Shape):
        options = shape.model
        super().__init__(
            shape,
            {
                "null_class": (1, options.width),
                "mask_token": (1, 1, options.width),
                "positions": (1, options.buffer_size + shape.tokens, options.width),
            },
        )
        self.mask_ratio_min = options.mask_ratio_min

    def hidden(self, tokens: Tensor, mask: Tensor, labels: Tensor, null: Tensor | None = None) -> Tensor:
        """Tokens [B, L, D], mask bool [B, L] (true: hidden), labels [B], null bool [B] (true: no class) => [B, L, W].

        The result does not depend on the tokens under the mask.
        """
        visible = self.token_embedding(tokens)  # [B, L, W]
        visible = torch.where(mask[..., None], self.mask_token.to(visible.dtype), visible)
        sequence = torch.cat([self.prefix(labels, null), visible], dim=1)  # [B, P + L, W]
        return self.transformer(sequence + self.positions)[:, self.buffer :]

    def training_positions(self, images: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Tensor:
        """int64 [B, n]: the masked positions. All images mask the same number, so the head runs on these only."""
        orders = random_orders(images, self.tokens, generator, device)
        return orders[:, : masked_count(self.tokens, self.mask_ratio_min, generator)]

    def predict(self, tokens: Tensor, positions: Tensor, labels: Tensor, null: Tensor | None = None) -> Tensor:
        """Mask the positions [B, n] of tokens [B, L, D] and predict them => hidden states [B, n, W]."""
        return pick(self.hidden(tokens, mask_of(positions, self.tokens), labels, null), positions)

    def draw_orders(self, images: int, source: RandomSource, device: torch.device | str = "cpu") -> Tensor:
        """int64 [B, L]: a random permutation per image; `draw` reveals it from its end to its start."""
        return random_orders(images, self.tokens, source, device)

    def editing_orders(self, orders: Tensor, mask: Tensor) -> tuple[Tensor, int]:
        """Move the masked positions to the start of each order; raises UserError if images mask different numbers."""
        return masked_before_known(orders, mask)

    def draw(
        self, tokens: Tensor, orders: Tensor, conditions: Conditions, draw_tokens: DrawTokens, *, count: int, steps: int
    ) -> None:
        """Draw the first `count` tokens of each order, in place, from the last of them to the first."""
        mask = mask_first(orders, count)
        for left in masked_after(count, steps):
            if left == count:
                continue  # with more steps than tokens, some steps reveal nothing
            revealed = orders[:, left:count].sort(dim=1).values  # [B, n]
            hidden = self.hidden(
                conditions.expand(tokens), conditions.expand(mask), conditions.labels, conditions.null
            )  # [R, L, W]
            drawn = draw_tokens(pick(hidden, conditions.expand(revealed)), left)
            tokens.scatter_(1, revealed[..., None].expand_as(drawn), drawn)
            mask.scatter_(1, revealed, False)
            count = left

    def passes(self, steps: int) -> int:
        """One pass per step that reveals a token."""
        return len(set(masked_after(self.tokens, steps)))
