"""Sampling of latents with classifier-free guidance (EAR, section 4).

Shapes: B images, L tokens of D channels, W hidden width, n tokens drawn in a step.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ear.errors import UserError
from ear.model.autoregressive import AutoregressiveModel, Conditions, Plan
from ear.model.tokens import patchify, unpatchify
from ear.runtime.randomness import Stream
from ear.sampling.guidance import scale_at
from ear.sampling.settings import SamplingSettings


@torch.inference_mode()
def sample(
    model: AutoregressiveModel,  # in eval mode
    labels: Sequence[int],  # class numbers, one per image
    settings: SamplingSettings,
    *,
    source: Stream,  # one key per image, or one for all
    orders: Tensor | None = None,  # int64 [B, L]; default: drawn from `source`
    known: Tensor | None = None,  # normalised latents [B, C, h, w]; tokens outside `mask` are kept
    mask: Tensor | None = None,  # bool [B, L], true where tokens are drawn; required with `known`
    seen: Callable[[Tensor], None] | None = None,  # gets the latents before each step; 0 where none is drawn yet
) -> Tensor:
    """Draw normalised latents, float32 [B, C, h, w], one per label.

    Raises UserError if `known` is given to a causal model, masks differ in their number of tokens, or guidance is on
    but the model was trained without a null class.
    """
    if settings.guidance != 1 and not model.label_dropout:
        raise UserError(
            f"guidance is {settings.guidance:g}, but the model was trained with model.label_dropout 0, so it knows no "
            "null class; set guidance to 1."
        )
    device = model.positions.device
    interval = settings.guidance_from, settings.guidance_to
    conditions = Conditions.of([int(label) for label in labels], guided=settings.guidance != 1.0, device=device)

    def scale(masked: int) -> float:
        return scale_at(settings.schedule, settings.guidance, tokens=model.tokens, masked=masked, interval=interval)

    def draw_tokens(hidden: Tensor, masked: int) -> Tensor:
        """Hidden states [R, n, W] => tokens [B, n, D]; `masked` tokens are left afterwards."""
        if seen:
            seen(unpatchify(tokens, model.patch, model.shape.latent))
        conditional, *unconditional = (half.flatten(0, 1) for half in hidden.split(len(labels)))
        guidance = scale(masked)
        drawn = model.score.sample(
            conditional,
            source=source,
            temperature=settings.temperature,
            unconditional=unconditional[0] if unconditional and guidance != 1.0 else None,
            guidance=guidance,
            denoising=settings.denoising,
        )
        return drawn.unflatten(0, (len(labels), -1)).float()

    tokens = torch.zeros(len(labels), model.tokens, model.shape.token_channels, device=device)
    if orders is None:
        orders = model.draw_orders(len(labels), source, device)
    count = model.tokens
    if known is not None:
        assert mask is not None
        orders, count = model.editing_orders(orders, mask)
        tokens.copy_(model.score.represent(patchify(known, model.patch)))
    plan = Plan(count, settings.steps, guided=lambda masked: scale(masked) != 1.0)
    model.draw(tokens, orders, conditions, draw_tokens, plan)
    return unpatchify(tokens, model.patch, model.shape.latent)


def network_evaluations(model: AutoregressiveModel, settings: SamplingSettings) -> dict[str, int]:
    """Cost of one image without guidance: transformer passes, and head evaluations summed over tokens.

    Guidance doubles the rows of a head evaluation inside its interval, unless the score extrapolates the hidden state.
    It doubles the rows of a transformer pass inside its interval or, in a causal model, in every step.
    """
    per_token = model.score.evaluations_per_token(settings.denoising)
    return {"transformer": model.passes(settings.steps), "head": model.tokens * per_token}
