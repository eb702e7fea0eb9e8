"""What the weights of a model depend on."""

from dataclasses import dataclass

from ear import config
from ear.config.scores import ScoreOptions, score_options
from ear.errors import UserError


@dataclass(frozen=True)
class Shape:
    """Everything that determines the tensors of a model and its loss; stored with the weights.

    Raises UserError if the patches do not tile the latent grid.
    """

    latent: tuple[int, int, int]  # channels C, height h, width w
    classes: tuple[str, ...]  # class names by label
    model: config.Model
    score: ScoreOptions

    def __post_init__(self):
        _, h, w = self.latent
        patch = self.model.patch_size
        if h % patch or w % patch:
            raise UserError(
                f"model.patch_size is {patch}, but must divide the latent grid, {h} x {w}; choose a divisor."
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        _, h, w = self.latent
        return h // self.model.patch_size, w // self.model.patch_size

    @property
    def tokens(self) -> int:
        """Tokens of an image, L."""
        return self.grid[0] * self.grid[1]

    @property
    def token_channels(self) -> int:
        """Channels of a token, D = C p^2 for patches of p x p latent cells."""
        return self.latent[0] * self.model.patch_size**2

    def as_dict(self) -> dict:
        """Plain values that JSON can hold."""
        return {
            "latent": list(self.latent),
            "classes": list(self.classes),
            "model": self.model.model_dump(mode="json"),
            "score": self.score.model_dump(mode="json"),
        }

    @classmethod
    def from_dict(cls, stored: dict) -> "Shape":
        """The inverse of `as_dict`; raises UserError or pydantic.ValidationError for other content."""
        model = config.Model.model_validate({"blocks": "vit", **stored["model"]})  # files of earlier versions lack it
        return cls(tuple(stored["latent"]), tuple(stored["classes"]), model, score_options(stored["score"]))
