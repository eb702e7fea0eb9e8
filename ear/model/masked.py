"""The masked model: it predicts masked tokens from the visible ones and the class (MAR's architecture, used by EAR).

Shapes: B images, R rows (B, or 2 B with guidance), L tokens of D channels, P buffer tokens, W width, n predicted
positions.
"""

import torch
from torch import Tensor, nn

from ear.model.autoregressive import AutoregressiveModel, Conditions, DrawTokens, Plan
from ear.model.masking import mask_first, mask_of, masked_after, masked_before_known, masked_count, random_orders
from ear.model.shape import Shape
from ear.runtime.randomness import Stream


class MaskedModel(AutoregressiveModel):
    """A bidirectional transformer over P buffer tokens and the L image tokens of an image.

    The buffer tokens are copies of the class embedding. A masked image token is replaced by a learned vector.
    """

    mask_token: nn.Parameter  # [1, 1, W]

    def __init__(self, shape: Shape):
        options = shape.model
        super().__init__(
            shape,
            {  # `initialise` draws them in this order, so it determines the weights of a seed
                "null_class": (1, options.width),
                "mask_token": (1, 1, options.width),
                "positions": (1, options.buffer_size + shape.tokens, options.width),  # learned position embeddings
            },
        )
        self.mask_ratio_min = options.mask_ratio_min

    def hidden(
        self, tokens: Tensor, mask: Tensor, labels: Tensor, null: Tensor | None = None, wanted: Tensor | None = None
    ) -> Tensor:
        """Hidden states [B, L, W] of all image tokens, masked or not, or [B, n, W] of those `wanted`, int64 [B, n].

        tokens: [B, L, D]; values under the mask are ignored. mask: bool [B, L], true where a token is masked. labels:
        int64 [B]. null: bool [B], true where the class is dropped; None keeps all classes.
        """
        embedded = self.token_embedding(tokens)  # [B, L, W]
        embedded = torch.where(mask[..., None], self.mask_token.to(embedded.dtype), embedded)
        sequence = torch.cat([self.prefix(labels, null), embedded], dim=1)  # [B, P + L, W]
        at = torch.arange(sequence.shape[1], device=sequence.device)[None]
        rotation = self.rotation(at, at)
        if wanted is not None:
            return self.transformer(sequence + self.positions, wanted=wanted + self.buffer, rotation=rotation)
        return self.transformer(sequence + self.positions, rotation=rotation)[:, self.buffer :]

    def training_positions(self, images: int, source: Stream, device: torch.device | str = "cpu") -> Tensor:
        """int64 [B, n]: random positions to mask in each of B images.

        n is drawn once for the batch, so the hidden states at these positions are one tensor [B, n, W], and the head
        need not run on the others.
        """
        orders = random_orders(images, self.tokens, source, device)
        return orders[:, : masked_count(self.tokens, self.mask_ratio_min, source)]

    def predict(self, tokens: Tensor, positions: Tensor, labels: Tensor, null: Tensor | None = None) -> Tensor:
        """Hidden states [B, n, W] at `positions`, int64 [B, n], after masking these in `tokens` [B, L, D]."""
        return self.hidden(tokens, mask_of(positions, self.tokens), labels, null, wanted=positions)

    def draw_orders(self, images: int, source: Stream, device: torch.device | str = "cpu") -> Tensor:
        """int64 [B, L]: a random order per image.

        The masked positions are always the first ones of an order, so `draw` reveals it from its end to its start.
        """
        return random_orders(images, self.tokens, source, device)

    def editing_orders(self, orders: Tensor, mask: Tensor) -> tuple[Tensor, int]:
        """Orders int64 [B, L], mask bool [B, L] (true: draw again) => (masked positions first, their number per image).

        Raises UserError if two images have different numbers of masked tokens.
        """
        return masked_before_known(orders, mask)

    def draw(self, tokens: Tensor, orders: Tensor, conditions: Conditions, draw_tokens: DrawTokens, plan: Plan) -> None:
        """Generate the tokens at the first positions of each order, and write them into `tokens` [B, L, D].

        It proceeds from the last of these positions to the first. Each step draws several tokens at once, given all
        tokens known so far. `draw_tokens(hidden [R, n, W], remaining)` returns the tokens [B, n, D]; the guidance scale
        depends on `remaining`, the tokens still masked after the step. Unguided steps skip the rows without a class.
        """
        mask, still_masked = mask_first(orders, plan.count), plan.count
        for remaining in masked_after(plan.count, plan.steps):
            if remaining == still_masked:
                continue  # with more steps than tokens, some steps reveal nothing
            rows = conditions.for_step(plan.guided(remaining))
            # Sorted, so a token's noise depends only on the set of positions drawn in this step.
            revealed = orders[:, remaining:still_masked].sort(dim=1).values  # [B, n]
            wanted = rows.expand(revealed)
            if still_masked == self.tokens:
                hidden = self._hidden_all_masked(rows, wanted)
            else:
                hidden = self.hidden(rows.expand(tokens), rows.expand(mask), rows.labels, rows.null, wanted=wanted)
            drawn = draw_tokens(hidden, remaining)  # [R, n, W] => [B, n, D]
            tokens.scatter_(1, revealed[..., None].expand_as(drawn), drawn)
            mask.scatter_(1, revealed, False)
            still_masked = remaining

    def _hidden_all_masked(self, conditions: Conditions, wanted: Tensor) -> Tensor:
        """Hidden states [R, n, W] at the positions `wanted` [R, n] while all tokens are masked.

        They depend on the class alone, so one row is computed per class.
        """
        distinct, row_to_distinct = conditions.distinct, conditions.row_to_distinct
        assert distinct is not None
        assert row_to_distinct is not None
        rows = len(distinct.labels)
        mask = torch.ones(rows, self.tokens, dtype=torch.bool, device=wanted.device)
        tokens = torch.zeros(rows, self.tokens, self.shape.token_channels, device=wanted.device)
        hidden = self.hidden(tokens, mask, distinct.labels, distinct.null)  # [rows, L, W]
        return hidden.flatten(0, 1)[wanted + row_to_distinct[:, None] * self.tokens]

    def passes(self, steps: int) -> int:
        """Passes of the transformer to generate all L tokens in `steps` steps; a guided pass counts once."""
        return len(set(masked_after(self.tokens, steps)) - {self.tokens})  # `draw` skips steps that reveal nothing
