"""The masked autoregressive model over continuous tokens (EAR, section 4; structure of MAR with one transformer).

Shapes: B images, C latent channels, (h, w) latent grid, L tokens of D = C p^2 channels (patch side p), P buffer tokens,
W width, n masked tokens.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ear import randomness, scores
from ear.checkpoint import load_weights
from ear.masking import mask_first, masked_count, random_orders
from ear.optimizer import Group
from ear.records import read_tensors, write_tensors
from ear.transformer import Transformer

FORMAT = "ear-model-1"
_INIT_SD = 0.02  # of class embedding, null class, mask token and positions


@dataclass(frozen=True)
class Shape:
    """Everything that the sizes of the weights and the loss depend on; kept with the weights."""

    latent: tuple[int, int, int]  # C, h, w
    classes: tuple[str, ...]  # names, in the order of the labels
    model: dict  # section model of params.yaml
    score: dict  # of section score, the name and the options of that score


def patchify(latents: Tensor, p: int) -> Tensor:
    """[B, C, h, w] => tokens [B, L, D]: patches row by row; within one channel, row, column."""
    b, c, h, w = latents.shape
    patches = latents.reshape(b, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(b, (h // p) * (w // p), c * p * p)


def unpatchify(tokens: Tensor, p: int, latent: tuple[int, int, int]) -> Tensor:
    """The inverse of `patchify`: tokens [B, L, D] => [B, C, h, w]."""
    c, h, w = latent
    patches = tokens.reshape(-1, h // p, w // p, c, p, p).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(-1, c, h, w)


class Model(nn.Module):
    """Predicts masked tokens from visible ones and the class; `score` turns a hidden state into a loss or a sample."""

    def __init__(self, shape: Shape):
        super().__init__()
        options, (channels, h, w) = shape.model, shape.latent
        self.shape, self.patch = shape, options["patch_size"]
        if h % self.patch or w % self.patch:
            raise ValueError(
                f"model.patch_size is {self.patch} and does not divide the latent grid, {h} x {w}; choose a divisor."
            )
        width = options["width"]
        self.tokens = (h // self.patch) * (w // self.patch)
        self.buffer, self.label_dropout = options["buffer_size"], options["label_dropout"]
        self.mask_ratio_min = options["mask_ratio_min"]
        token_channels = channels * self.patch**2

        self.class_embedding = nn.Embedding(len(shape.classes), width)
        self.null_class = nn.Parameter(torch.empty(1, width))
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.positions = nn.Parameter(torch.empty(1, self.buffer + self.tokens, width))
        self.token_embedding = nn.Linear(token_channels, width)
        sizes = {key: options[key] for key in ("width", "depth", "heads", "mlp_ratio", "dropout")}
        self.transformer = Transformer(**sizes, causal=options["attention"] == "causal")
        head = {"width": options["head_width"], "depth": options["head_depth"]}
        self.score = scores.build(shape.score, hidden_width=width, token_channels=token_channels, **head)

    def initialise(self, generator: torch.Generator) -> "Model":
        """Draw the weights: embeddings N(0, 0.02^2), matrices xavier-uniform, biases and the head's output 0."""
        for tensor in (self.class_embedding.weight, *self.parameters(recurse=False)):
            nn.init.normal_(tensor, std=_INIT_SD, generator=generator)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                nn.init.zeros_(module.bias)
        self.score.initialise(generator)
        return self

    def prefix(self, labels: Tensor, null: Tensor | None = None) -> Tensor:
        """labels [B], null bool [B] (true: no class) => buffer tokens [B, P, W], without their positions."""
        condition = self.class_embedding(labels)  # [B, W]
        if null is not None:
            condition = torch.where(null[:, None], self.null_class.to(condition.dtype), condition)
        return condition[:, None].expand(-1, self.buffer, -1)

    def hidden(self, tokens: Tensor, mask: Tensor, labels: Tensor, null: Tensor | None = None) -> Tensor:
        """tokens [B, L, D], mask bool [B, L] (true: hidden), labels [B], null bool [B] (true: no class) => [B, L, W].

        The result does not depend on the tokens under the mask.
        """
        visible = self.token_embedding(tokens)  # [B, L, W]
        visible = torch.where(mask[..., None], self.mask_token.to(visible.dtype), visible)
        sequence = torch.cat([self.prefix(labels, null), visible], dim=1)  # [B, P + L, W]
        return self.transformer(sequence + self.positions)[:, self.buffer :]

    def loss(self, latents: Tensor, labels: Tensor, *, temperature: float, generator: torch.Generator) -> Tensor:
        """Mean loss per predicted token of normalised latents; orders, masks and noise come from `generator`.

        latents: [B, C, h, w], or k posterior draws of the same images [k, B, C, h, w] where the score takes several
        targets: the first one is what the transformer sees, all are targets (as in CALM, Shao et al., 2025).
        """
        draws = latents if latents.dim() == 5 else latents[None]
        tokens = [self.score.represent(patchify(draw, self.patch)) for draw in draws]  # k of [B, L, D]
        dropped = self.label_dropout if self.training else 0.0
        null = randomness.uniform((len(labels),), generator, latents.device) < dropped
        hidden, positions = self.predictions(tokens[0], labels, null, generator)
        target = torch.stack([pick(draw, positions).flatten(0, 1) for draw in tokens]).squeeze(0)  # k = 1: [B n, D]
        return self.score.loss(hidden.flatten(0, 1), target, temperature=temperature, generator=generator).mean()

    def predictions(
        self, tokens: Tensor, labels: Tensor, null: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """tokens [B, L, D] => hidden states [B, n, W] and the positions [B, n] that they predict, n masked at random.

        All images of the call have equally many masked tokens, so that the head runs on these alone.
        """
        orders = random_orders(len(tokens), self.tokens, generator, tokens.device)
        masked = orders[:, : masked_count(self.tokens, self.mask_ratio_min, generator)]
        hidden = self.hidden(tokens, mask_first(orders, masked.shape[1]), labels, null)
        return pick(hidden, masked), masked

    def parameter_groups(self, *, weight_decay: float, head_rate: float) -> list[Group]:
        """The published groups: vectors and biases; the head's matrices, at a lower rate; the rest, decayed."""
        head = {id(p) for p in self.score.parameters() if p.dim() > 1}
        vectors = [p for p in self.parameters() if p.dim() <= 1]
        matrices = [p for p in self.parameters() if p.dim() > 1]
        return [
            Group(vectors, weight_decay=0.0),
            Group([p for p in matrices if id(p) in head], weight_decay=0.0, rate=head_rate),
            Group([p for p in matrices if id(p) not in head], weight_decay=weight_decay),
        ]


def build(shape: Shape) -> Model:
    """An uninitialised model of that shape: the masked one above or, for causal attention, that of ear.causal."""
    from ear.causal import CausalModel  # which extends the class above

    return (CausalModel if shape.model["attention"] == "causal" else Model)(shape)


def pick(rows: Tensor, positions: Tensor) -> Tensor:
    """rows [B, L, X], positions [B, n] => [B, n, X]."""
    return rows.gather(1, positions[..., None].expand(-1, -1, rows.shape[-1]))


def save(path: str | Path, model: Model, description: dict) -> None:
    """Weights, shape and `description` (statistics of the latents, origin) in one safetensors file."""
    write_tensors(path, model.state_dict(), {**description, "format": FORMAT, "shape": asdict(model.shape)})


def load(path: str | Path) -> tuple[Model, dict]:
    """(model in eval mode, description) of a file written by `save`.

    Raises FileNotFoundError, or ValueError for another format or tensors that do not fit the shape.
    """
    tensors, description = read_tensors(path)
    if description.get("format") != FORMAT:
        raise ValueError(f"{path} has format {description.get('format')!r}, not {FORMAT!r}; it is no model of ours.")
    stored = description["shape"]
    shape = Shape(tuple(stored["latent"]), tuple(stored["classes"]), stored["model"], stored["score"])
    model = build(shape)
    load_weights(model, tensors, origin=str(path))
    return model.eval(), description
