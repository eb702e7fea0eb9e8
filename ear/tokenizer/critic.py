"""The patch critic that sharpens an autoencoder's reconstructions, trained beside it.

Isola et al. 2017, "Image-to-Image Translation with Conditional Adversarial Networks", for the network; Esser et al.
2021, "Taming Transformers", for the loss and its adaptive weight.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ear import config
from ear.training import checkpoint
from ear.training.optimizer import Group, adamw, set_rate

_WIDTH, _LAYERS, _GROUPS = 64, 3, 32
_PREFIX = "critic."  # of its tensors in a checkpoint
_BETAS = (0.5, 0.9)  # of AdamW, as published
_DELTA = 1e-6  # in the adaptive weight's denominator, as published
_MOST_WEIGHT = 100.0  # of the adaptive weight; published code allows 1e4, where a satisfied critic can wreck a decoder


class PatchCritic(nn.Module):
    """Images [B, 3, H, W] in [-1, 1], 24 pixels a side or more => a map of logits [B, 1, h, w], high for real patches.

    Group normalisation instead of the published batch normalisation: a judgement does not depend on what else is in
    the batch, and there are no running figures to keep.
    """

    def __init__(self):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, _WIDTH, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = _WIDTH
        for number in range(1, _LAYERS + 1):
            stride = 2 if number < _LAYERS else 1
            layers += [
                nn.Conv2d(width, 2 * width, 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(_GROUPS, 2 * width),
                nn.LeakyReLU(0.2),
            ]
            width *= 2
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, 1, 4, padding=1))

    def initialise(self, generator: torch.Generator) -> "PatchCritic":
        """Convolutions from N(0, 0.02), as published, drawn from a CPU generator alone; biases 0."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        return self

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        return self.layers(images)


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """What the critic minimises, over logits of real images and of reconstructions."""
    return 0.5 * ((1 - real).relu().mean() + (1 + fake).relu().mean())


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: nn.Parameter) -> Tensor:
    """Esser et al. 2021, eq. 7: the ratio of both losses' gradient norms at the decoder's last layer, clamped."""
    norms = [
        torch.autograd.grad(loss, last_layer, retain_graph=True)[0].norm() for loss in (reconstruction, adversarial)
    ]
    return (norms[0] / (norms[1] + _DELTA)).clamp(max=_MOST_WEIGHT).detach()


class CriticTraining:
    """A critic with its optimiser: it learns from `start` / 2 images on, and is heard from `start` on.

    So the autoencoder never meets an untrained critic, whose noise would undo its reconstructions.
    """

    def __init__(
        self,
        network: PatchCritic,
        options: config.Tokenizer,
        *,
        rate: Callable[[int], float],  # images seen => factor of the learning rate
    ):
        self.network, self.rate = network, rate
        self.weight, self.start = options.adversarial_weight, options.adversarial_start
        self.batch_size = options.batch_size  # of a step, which may come in several micro-batches
        groups = [Group(list(network.parameters()), weight_decay=0.0)]
        self.optimizer = adamw(groups, learning_rate=options.learning_rate, beta1=_BETAS[0], beta2=_BETAS[1])

    def __call__(
        self,
        images: Tensor,  # [B, 3, H, W] in [-1, 1]
        decoded: Tensor,  # the autoencoder's reconstructions of them, with their graph
        reconstruction: Tensor,  # their loss, with its graph
        last_layer: nn.Parameter,  # of the decoder
        position: int,  # images seen before these
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What its judgement adds to the autoencoder's loss, and figures to log; it learns from the images on the way.

        All micro-batches of a step meet the same critic, and each has an adaptive weight of its own, as each device's
        part of a batch has in the published training.
        """
        zero = torch.zeros((), device=images.device)
        names = ("critic_loss", "critic_real", "critic_fake", "adversarial", "adversarial_weight")
        figures = dict.fromkeys(names, zero)
        begun = position - position % self.batch_size  # the step, so that its micro-batches are treated alike
        if begun < self.start // 2:
            return zero, figures
        figures |= self._learn(images, decoded.detach())
        # 0, but NaN with its gradient where the critic has diverged: then the trainer stops as for any other loss.
        term = 0.0 * figures["critic_loss"] * last_layer.sum()
        if begun < self.start:
            return term, figures
        adversarial = -self.network(decoded).mean()
        weight = self.weight * adaptive_weight(reconstruction, adversarial, last_layer)
        figures |= {"adversarial": adversarial.detach(), "adversarial_weight": weight}
        return term + weight * adversarial, figures

    def _learn(self, images: Tensor, decoded: Tensor) -> dict[str, Tensor]:
        """Add to the critic's gradients the images' share in the step; the critic is frozen outside of it."""
        self.network.requires_grad_(True)
        real, fake = self.network(images), self.network(decoded)
        loss = hinge_loss(real, fake)
        (loss * (len(images) / self.batch_size)).backward()
        self.network.requires_grad_(False)
        means = (loss.detach(), real.detach().mean(), fake.detach().mean())
        return dict(zip(("critic_loss", "critic_real", "critic_fake"), means, strict=True))

    def step(self, position: int) -> None:
        """The critic's own step, behind the autoencoder's that began at image `position`; none before it learns."""
        set_rate(self.optimizer, self.rate(position))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold of it."""
        packed = checkpoint.pack({"weights": self.network}, self.optimizer)
        return {_PREFIX + name: tensor for name, tensor in packed.items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take up what `state` gave; other tensors are ignored. Raises ValueError where one is missing."""
        ours = {name.removeprefix(_PREFIX): t for name, t in tensors.items() if name.startswith(_PREFIX)}
        checkpoint.unpack(ours, {"weights": self.network}, self.optimizer)
