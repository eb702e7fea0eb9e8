"""The interface of an autoregressive model over continuous tokens (EAR, section 4), and what both models share.

A model turns visible tokens and a class into one hidden state per predicted position; its `score` turns a hidden state
into a loss or into a token. Masked and causal models differ in which positions they predict in training
(`training_positions`, `predict`) and in how they draw all tokens of an image (`draw`).

Shapes: B images, R rows (B, or 2 B with guidance), C latent channels, (h, w) latent grid, L tokens of D = C p^2
channels (patch side p), P buffer tokens, W width, n predicted positions.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ear import scores
from ear.model.rotary import RotaryTable, Rotation
from ear.model.shape import Shape
from ear.model.tokens import patchify, pick
from ear.model.transformer import Transformer
from ear.runtime import randomness
from ear.runtime.device import compile_in_place
from ear.runtime.randomness import Stream
from ear.runtime.sharding import shard

EMBEDDING_SD = 0.02  # standard deviation of initial embeddings and position tables, as published

# Hidden states [R, n, W] and the number of tokens left to draw afterwards => tokens [B, n, D].
DrawTokens = Callable[[Tensor, int], Tensor]


class MeanLoss(NamedTuple):
    """The training loss of a batch, a mean over its predicted tokens, and parts of it that are worth watching."""

    value: Tensor  # []
    parts: dict[str, Tensor]  # by name, [] each, detached
    predicted: float  # share of the tokens that were predicted


@dataclass(frozen=True)
class Conditions:
    """The class of every row of a sampling batch; with guidance, each image has a second row without a class."""

    labels: Tensor  # int64 [R]
    null: Tensor | None  # bool [R], true for rows without a class; None if there are none
    rows_per_image: int  # 1, or 2 with guidance
    distinct: "Conditions | None" = None  # the same conditions without duplicates; None within `distinct`
    row_to_distinct: Tensor | None = None  # int64 [R], every row's index into `distinct`
    unguided: "Conditions | None" = None  # the same images in steps without guidance; None if no step has guidance

    @classmethod
    def of(cls, labels: Sequence[int], *, guided: bool, device: torch.device | str) -> "Conditions":
        """Labels of B images => the conditions of B rows or, if guided, of 2 B: with class first, then without."""
        rows = [*labels, *([None] * len(labels) if guided else [])]
        unguided = cls.of(labels, guided=False, device=device) if guided else None
        known = list(dict.fromkeys(rows))
        place = {label: number for number, label in enumerate(known)}
        distinct = cls._of_rows(known, guided, device)
        row_to_distinct = torch.tensor([place[label] for label in rows]).to(device, non_blocking=True)
        return dataclasses.replace(
            cls._of_rows(rows, guided, device), distinct=distinct, row_to_distinct=row_to_distinct, unguided=unguided
        )

    @classmethod
    def _of_rows(cls, rows: Sequence[int | None], guided: bool, device: torch.device | str) -> "Conditions":
        labels = torch.tensor([label or 0 for label in rows]).to(device, non_blocking=True)
        null = torch.tensor([label is None for label in rows]).to(device, non_blocking=True) if guided else None
        return cls(labels, null, 1 + guided)

    def for_step(self, guided: bool) -> "Conditions":
        """The conditions of a step of `draw` with or without guidance."""
        return self if guided or self.unguided is None else self.unguided

    def expand(self, values: Tensor) -> Tensor:
        """Values per image [B, ...] => values per row [R, ...]."""
        return values.repeat(self.rows_per_image, *[1] * (values.dim() - 1))


@dataclass(frozen=True)
class Plan:
    """How many tokens of each image `draw` generates, and in how many steps."""

    count: int
    steps: int  # of a masked model, at most; a causal model takes one per token
    guided: Callable[[int], bool]  # tokens left after a step => whether that step uses guidance


class AutoregressiveModel(nn.Module, ABC):
    """Common parts of the masked and the causal model: embeddings, transformer, score, loss."""

    null_class: nn.Parameter  # [1, W]
    positions: nn.Parameter  # [1, P + L, W], learned embeddings

    def __init__(self, shape: Shape, tables: Mapping[str, tuple[int, ...]]):
        """`tables`: names and sizes of the model's own parameters, in the order in which `initialise` draws them."""
        super().__init__()
        options = shape.model
        self.shape, self.patch, self.tokens = shape, options.patch_size, shape.tokens
        self.buffer, self.label_dropout = options.buffer_size, options.label_dropout
        for name, size in tables.items():
            self.register_parameter(name, nn.Parameter(torch.empty(size)))
        self.class_embedding = nn.Embedding(len(shape.classes), options.width)
        self.token_embedding = nn.Linear(shape.token_channels, options.width)
        self.transformer = Transformer(options)
        self.rotary = None
        if options.blocks == "modern":
            self.rotary = RotaryTable(shape.grid, buffer=self.buffer, channels=options.width // options.heads)
        self.score = scores.build(
            shape.score,
            scores.HeadSize(
                hidden_width=options.width,
                token_channels=shape.token_channels,
                width=options.head_width,
                depth=options.head_depth,
            ),
        )

    def initialise(self, generator: torch.Generator, embedding_sd: float = EMBEDDING_SD) -> "AutoregressiveModel":
        """Draw all weights: embeddings and tables N(0, embedding_sd^2), matrices Xavier-uniform, biases 0; then heads.

        embedding_sd: above 0. A token of D channels of unit variance is embedded with variance 2 D / (D + W), and a
        position embedding of 0.02 is small beside it; a short training does not change that (docs/method.md).
        """
        for tensor in (self.class_embedding.weight, *self.parameters(recurse=False)):
            nn.init.normal_(tensor, std=embedding_sd, generator=generator)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                nn.init.zeros_(module.bias)
        self.score.initialise(generator)
        return self

    def compile_parts(self) -> None:
        """torch.compile the transformer and the head's network, in place; the number of predicted tokens may vary."""
        compile_in_place(self.transformer)
        for network in self.score.networks():
            compile_in_place(network, dynamic=True)

    def shard(self, device: torch.device) -> None:
        """Divide the weights among the ranks, in place; afterwards, `loss` is the only method that computes."""
        shard(self, [*self.transformer.blocks, *self.score.networks()], method="loss", device=device)

    def rotation(self, at: Tensor, aim: Tensor) -> Rotation | None:
        """For positions `at` in the sequence (keys), used to predict `aim` (queries), int64 [b, T] each.

        None if the blocks do not rotate.
        """
        return None if self.rotary is None else self.rotary(queries=aim, keys=at)

    def prefix(self, labels: Tensor, null: Tensor | None = None) -> Tensor:
        """Labels [B], null bool [B] (true: no class) => buffer tokens [B, P, W], without their positions."""
        condition = self.class_embedding(labels)  # [B, W]
        if null is not None:
            condition = torch.where(null[:, None], self.null_class.to(condition.dtype), condition)
        return condition[:, None].expand(-1, self.buffer, -1)

    def loss(self, latents: Tensor, labels: Tensor, *, temperature: float, source: Stream) -> MeanLoss:
        """Mean loss per predicted token, with its parts; label dropout, positions and noise are drawn from `source`.

        latents: normalised, [B, C, h, w], or [k, B, C, h, w] for k posterior draws of the same images, if the score
        takes several targets: the transformer sees the first draw, all draws are targets (as in CALM, Shao et al.,
        2025). temperature: training temperature, in (0, 1].
        """
        draws = latents if latents.dim() == 5 else latents[None]
        tokens = torch.stack([self.score.represent(patchify(draw, self.patch)) for draw in draws])  # [k, B, L, D]
        dropped = self.label_dropout if self.training else 0.0
        null = randomness.uniform((len(labels),), source, latents.device) < dropped
        positions = self.training_positions(len(labels), source, latents.device)
        return self.loss_at(positions, tokens, labels, null, temperature=temperature, source=source)

    def loss_at(
        self,
        positions: Tensor,  # int64 [B, n], the predicted positions
        tokens: Tensor,  # [k, B, L, D]
        labels: Tensor,
        null: Tensor,  # bool [B]
        *,
        temperature: float,
        source: Stream,  # of the head's noise
    ) -> MeanLoss:
        """The loss of `loss` for given positions and dropped labels."""
        hidden = self.predict(tokens[0], positions, labels, null)
        target = torch.stack([pick(draw, positions).flatten(0, 1) for draw in tokens]).squeeze(0)  # k = 1: [B n, D]
        per_token = self.score.loss(hidden.flatten(0, 1), target, temperature=temperature, source=source)
        parts = {name: part.mean() for name, part in per_token.parts.items()}
        return MeanLoss(per_token.value.mean(), parts, positions.shape[1] / self.tokens)

    @abstractmethod
    def training_positions(self, images: int, source: Stream, device: torch.device | str = "cpu") -> Tensor:
        """int64 [B, n]: positions to predict in training, drawn at random; n is the same for all images."""

    @abstractmethod
    def predict(self, tokens: Tensor, positions: Tensor, labels: Tensor, null: Tensor | None = None) -> Tensor:
        """Tokens [B, L, D], positions [B, n] as `training_positions` returns them => hidden states [B, n, W]."""

    @abstractmethod
    def draw_orders(self, images: int, source: Stream, device: torch.device | str = "cpu") -> Tensor:
        """int64 [B, L]: for each image, a permutation of the positions for `draw`."""

    @abstractmethod
    def editing_orders(self, orders: Tensor, mask: Tensor) -> tuple[Tensor, int]:
        """Orders [B, L] and mask bool [B, L] (true: to be drawn) => orders for `draw`, and how many tokens to draw.

        Raises UserError if this model cannot draw some tokens given all others.
        """

    @abstractmethod
    def draw(self, tokens: Tensor, orders: Tensor, conditions: Conditions, draw_tokens: DrawTokens, plan: Plan) -> None:
        """Fill `plan.count` positions of each image of `tokens` [B, L, D], in place; the others are given."""

    @abstractmethod
    def passes(self, steps: int) -> int:
        """Transformer passes that `draw` needs for one image with this number of steps."""
