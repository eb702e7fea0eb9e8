"""Generation of latents: masked tokens are revealed in random order, several per step (EAR, section 4); a causal model
draws one token after the other.

Shapes: B images, R rows (B, or with guidance 2 B), L tokens of D channels, W hidden width, n tokens drawn in a step.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ear.causal import CausalModel
from ear.guidance import scale_at
from ear.masking import mask_first, masked_after, masked_before_known, random_orders
from ear.model import Model, patchify, pick, unpatchify
from ear.randomness import Source

_Draw = Callable[[Tensor, int], Tensor]  # hidden [R, n, W], number still masked afterwards => tokens [B, n, D]


@torch.inference_mode()
def sample(
    model: Model,
    labels: Tensor,  # int64 [B], on the model's device
    *,
    steps: int,  # a causal model takes one per token whatever this says
    guidance: float = 1.0,  # scale; 1 is none
    schedule: str = "linear",  # of the guidance
    temperature: float = 1.0,  # inference temperature of the score
    source: Source,  # one stream per image, or one generator for all
    orders: Tensor | None = None,  # int64 [B, L]; drawn from `source` if not given
    known: Tensor | None = None,  # normalised latents [B, C, h, w], of which tokens outside `mask` are kept
    mask: Tensor | None = None,  # bool [B, L], true where tokens are drawn; equally many in every image
) -> Tensor:
    """Normalised latents [B, C, h, w] in float32. The model must be in eval mode.

    Raises ValueError for less than one step, and where a causal model is given known latents: it cannot see what comes
    later in its order.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; it must be at least 1.")
    rows = _Rows.of(labels, guided=guidance != 1.0)

    def draw(hidden: Tensor, masked: int) -> Tensor:
        conditional, *unconditional = (half.flatten(0, 1) for half in hidden.split(len(labels)))
        drawn = model.score.sample(
            conditional,
            source=source,
            temperature=temperature,
            unconditional=unconditional[0] if unconditional else None,
            guidance=scale_at(schedule, guidance, tokens=model.tokens, masked=masked),
        )
        return drawn.unflatten(0, (len(labels), -1)).float()

    tokens = torch.zeros(len(labels), model.tokens, model.token_embedding.in_features, device=labels.device)
    if isinstance(model, CausalModel):
        if known is not None:
            raise ValueError("model.attention is causal, which sees no later token; edit with a bidirectional model.")
        orders = model.draw_orders(len(labels), source, labels.device) if orders is None else orders
        _append(model, tokens, orders, rows, draw)
    else:
        orders = random_orders(len(labels), model.tokens, source, labels.device) if orders is None else orders
        count = model.tokens
        if known is not None:
            tokens.copy_(model.score.represent(patchify(known, model.patch)))
            orders, count = masked_before_known(orders, mask)
        _reveal(model, tokens, orders, rows, draw, count=count, steps=steps)
    return unpatchify(tokens, model.patch, model.shape.latent)


def network_evaluations(model: Model, steps: int) -> dict[str, int]:
    """What one image of `sample` costs: passes of the transformer, and evaluations of the head over all tokens.

    A pass of a causal model but the first one is over a single position. With guidance each pass is over twice the
    rows, and so are the head's evaluations unless guidance extrapolates the hidden state.
    """
    passes = model.tokens if isinstance(model, CausalModel) else len(set(masked_after(model.tokens, steps)))
    return {"transformer": passes, "head": model.tokens * model.score.evaluations_per_token}


@dataclass(frozen=True)
class _Rows:
    """What the transformer is asked about: each image with its class and, for guidance, once more without one."""

    labels: Tensor  # [R]
    null: Tensor | None  # bool [R]
    per_image: int

    @classmethod
    def of(cls, labels: Tensor, *, guided: bool) -> "_Rows":
        if not guided:
            return cls(labels, None, 1)
        return cls(labels.repeat(2), torch.arange(2 * len(labels), device=labels.device) >= len(labels), 2)

    def spread(self, values: Tensor) -> Tensor:
        """Values of the images [B, ...] => of the rows [R, ...]."""
        return values.repeat(self.per_image, *[1] * (values.dim() - 1))


def _reveal(model: Model, tokens: Tensor, orders: Tensor, rows: _Rows, draw: _Draw, *, count: int, steps: int) -> None:
    """Draw the first `count` tokens of each order, in place, from the last of them to the first."""
    mask = mask_first(orders, count)
    for left in masked_after(count, steps):
        if left == count:
            continue  # more steps than tokens: this one reveals nothing
        revealed = orders[:, left:count].sort(dim=1).values  # [B, n]
        hidden = model.hidden(rows.spread(tokens), rows.spread(mask), rows.labels, rows.null)  # [R, L, W]
        drawn = draw(pick(hidden, rows.spread(revealed)), left)
        tokens.scatter_(1, revealed[..., None].expand_as(drawn), drawn)
        mask.scatter_(1, revealed, False)
        count = left


def _append(model: CausalModel, tokens: Tensor, orders: Tensor, rows: _Rows, draw: _Draw) -> None:
    """Draw all tokens, in place, in the order of each image; the transformer sees every slot once."""
    caches, positions = model.caches(), orders.split(1, dim=1)  # [B, 1] each
    slots = model.start(rows.labels, rows.null, rows.spread(positions[0]))
    for number, at in enumerate(positions):
        hidden = model.transformer(slots, caches)[:, -1:]  # [R, 1, W]
        drawn = draw(hidden, model.tokens - number - 1)  # [B, 1, D]
        tokens.scatter_(1, at[..., None].expand_as(drawn), drawn)
        if number + 1 < model.tokens:
            slots = model.slots(*map(rows.spread, (drawn, at, positions[number + 1])))
