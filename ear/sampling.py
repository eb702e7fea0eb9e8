"""Generation of latents: reveal masked tokens in random order, several per step (EAR, section 4).

Shapes: B images, L tokens of D channels, W hidden width, n tokens revealed in a step.
"""

import torch
from torch import Tensor

from ear.guidance import scale_at
from ear.masking import masked_after, random_orders
from ear.model import Model, pick, unpatchify
from ear.randomness import Source


@torch.inference_mode()
def sample(
    model: Model,
    labels: Tensor,  # int64 [B], on the model's device
    *,
    steps: int,
    guidance: float = 1.0,  # scale; 1 is none
    schedule: str = "linear",  # of the guidance
    temperature: float = 1.0,  # inference temperature of the score
    source: Source,  # one stream per image, or one generator for all
    orders: Tensor | None = None,  # int64 [B, L]; drawn from `source` if not given
) -> Tensor:
    """Normalised latents [B, C, h, w] in float32. The model must be in eval mode."""
    images, device = len(labels), labels.device
    if orders is None:
        orders = random_orders(images, model.tokens, source, device)
    tokens = torch.zeros(images, model.tokens, model.token_embedding.in_features, device=device)
    mask = torch.ones(images, model.tokens, dtype=torch.bool, device=device)
    masked = model.tokens
    for left in masked_after(model.tokens, steps):
        if left == masked:
            continue  # more steps than tokens: this one reveals nothing
        revealed = orders[:, left:masked].sort(dim=1).values  # [B, n]
        scale = scale_at(schedule, guidance, tokens=model.tokens, masked=left)
        conditional, unconditional = _hidden(model, tokens, mask, labels, guided=guidance != 1.0)
        drawn = model.score.sample(
            pick(conditional, revealed).flatten(0, 1),
            source=source,
            temperature=temperature,
            unconditional=None if unconditional is None else pick(unconditional, revealed).flatten(0, 1),
            guidance=scale,
        )
        drawn = drawn.unflatten(0, (images, -1)).to(tokens.dtype)  # [B, n, D]
        tokens.scatter_(1, revealed[..., None].expand_as(drawn), drawn)
        mask.scatter_(1, revealed, False)
        masked = left
    return unpatchify(tokens, model.patch, model.shape.latent)


def _hidden(
    model: Model, tokens: Tensor, mask: Tensor, labels: Tensor, *, guided: bool
) -> tuple[Tensor, Tensor | None]:
    """Hidden states [B, L, W] with the class, and without it if `guided`, in one pass."""
    if not guided:
        return model.hidden(tokens, mask, labels), None
    null = torch.arange(2 * len(labels), device=labels.device) >= len(labels)
    both = model.hidden(tokens.repeat(2, 1, 1), mask.repeat(2, 1), labels.repeat(2), null)
    return both.chunk(2)
