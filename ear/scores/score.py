"""The interface between a model and a score with its head.

Shapes: N tokens, D token channels, W hidden width.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ear.runtime.randomness import Stream
from ear.scores.modulated_mlp import ModulatedMLP


@dataclass(frozen=True)
class HeadSize:
    """Sizes of a head: its input, its output, and its hidden layers."""

    hidden_width: int  # W, of the transformer's hidden states
    token_channels: int  # D
    width: int  # of the head's residual blocks; a head that is one linear layer has none
    depth: int  # residual blocks


class TokenLoss(NamedTuple):
    """The training loss of each token, and parts of it that are worth watching."""

    value: Tensor  # [N]
    parts: dict[str, Tensor] = {}  # by name, [N] each, detached  # noqa: RUF012 - never changed


@dataclass(frozen=True)
class Denoising:
    """How a diffusion head draws a token; heads without noise levels ignore it."""

    steps: int = 100  # of hyvarinen.TRAINING_STEPS
    limit: float = 5.0  # clamp of predicted tokens, in standard deviations; 0: off, as published


DENOISING = Denoising()  # without the clamp, the first steps of a head that is not perfect can explode


class Score(nn.Module, ABC):
    """A score with the head that it trains; the transformer does not depend on which one it is.

    At training temperature 1 it is strictly proper, for tokens that the head can draw.

    A subclass is constructed from its options (a class of ear.config.scores) and a HeadSize.
    """

    learns_tokens: bool = False  # whether `learn` needs training tokens
    targets: int = 1  # draws of each token from the tokenizer's posterior that the loss takes at once
    # Facts for comparisons of scores.
    temperature_scales: str  # what the inference temperature scales
    guidance_extrapolates: str  # which quantity guidance extrapolates

    def facts(self) -> dict:
        """The facts above by name, as plain values."""
        names = ("temperature_scales", "guidance_extrapolates")
        return {name: getattr(self, name) for name in names}

    def evaluations_per_token(self, denoising: Denoising = DENOISING) -> int:
        """Passes of the head's network per drawn token, without guidance."""
        return 1

    @abstractmethod
    def initialise(self, generator: torch.Generator) -> None:
        """Overwrite the default weights (Xavier-uniform matrices, zero biases) where the head needs others."""

    @abstractmethod
    def loss(self, hidden: Tensor, target: Tensor, *, temperature: float, source: Stream) -> TokenLoss:
        """Hidden [N, W], target [N, D] => negative score per token [N], float32, with its parts if it has several.

        If `targets` is above 1, target may be [targets, N, D]: several draws for the same hidden state. `temperature`
        is the training temperature, the weight of the repulsion between samples; scores without such a term ignore it.
        """

    @abstractmethod
    def sample(
        self,
        hidden: Tensor,
        *,
        source: Stream,
        temperature: float = 1.0,
        unconditional: Tensor | None = None,  # hidden states of the null class, for guidance
        guidance: float = 1.0,
        denoising: Denoising = DENOISING,
    ) -> Tensor:
        """Hidden [N, W] => one token per row [N, D]."""

    def networks(self) -> list[nn.Module]:
        """Parts of the head that are worth compiling."""
        return [module for module in self.children() if isinstance(module, ModulatedMLP)]

    def learn(self, tokens: Tensor, seed: int) -> None:
        """Fit parameters to training tokens [N, D] once, before training; most scores have none."""

    def references(self, tokens: Tensor, temperature: float) -> dict[str, float]:
        """Losses to compare with, by name, from training tokens [images, L, D]; most scores have none."""
        return {}

    def represent(self, tokens: Tensor) -> Tensor:
        """Tokens [..., D] => the nearest tokens that the head can draw; a continuous head can draw all."""
        return tokens
