"""The patch critic (discriminator) that sharpens reconstructions, trained together with the autoencoder.

Network: Isola et al. 2017, "Image-to-Image Translation with Conditional Adversarial Networks". Loss and adaptive
weight: Esser et al. 2021, "Taming Transformers".
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ear import config
from ear.runtime import distributed
from ear.training import checkpoint
from ear.training.optimizer import Group, adamw, set_rate

_WIDTH, _LAYERS, _GROUPS = 64, 3, 32
_PREFIX = "critic."  # of its tensors' names in a checkpoint
_BETAS = (0.5, 0.9)  # of AdamW, as published
_DELTA = 1e-6  # in the adaptive weight's denominator, as published
_MOST_WEIGHT = 100.0  # limit of the adaptive weight; published code allows 1e4 on a summed loss


class PatchCritic(nn.Module):
    """Images [B, 3, H, W] in [-1, 1], at least 24 pixels a side => logits [B, 1, h, w], high for real patches.

    Uses group normalisation instead of the published batch normalisation, so a judgement does not depend on the rest of
    the batch and there are no running statistics.
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
        """Draw convolutions from N(0, 0.02), as published, from a CPU generator; biases 0."""
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
    """The critic's loss, from its logits for real images and for reconstructions."""
    return 0.5 * ((1 - real).relu().mean() + (1 + fake).relu().mean())


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: nn.Parameter) -> Tensor:
    """Ratio of both losses' gradient norms at the decoder's last layer, clamped (Esser et al. 2021, eq. 7)."""
    norms = [
        torch.autograd.grad(loss, last_layer, retain_graph=True)[0].norm() for loss in (reconstruction, adversarial)
    ]
    return (norms[0] / (norms[1] + _DELTA)).clamp(max=_MOST_WEIGHT).detach()


class CriticTraining:
    """A critic with its optimiser. It trains from image `start` / 2, and contributes to the loss from image `start`.

    So the autoencoder never meets an untrained critic, whose noise would damage its reconstructions.
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
        self.batch_size = options.batch_size  # images of a step, over all its micro-batches
        groups = [Group(list(network.parameters()), weight_decay=0.0)]
        self.optimizer = adamw(groups, learning_rate=options.learning_rate, beta1=_BETAS[0], beta2=_BETAS[1])

    def __call__(
        self,
        images: Tensor,  # [B, 3, H, W] in [-1, 1]
        decoded: Tensor,  # their reconstructions, with autograd graph
        reconstruction: Tensor,  # reconstruction loss, with autograd graph
        last_layer: nn.Parameter,  # of the decoder
        position: int,  # images seen before these
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The critic's term of the autoencoder's loss, and figures to log; also trains the critic on the images.

        All micro-batches of a step see the same critic; each has its own adaptive weight, like each device's part of a
        batch in the published training.
        """
        zero = torch.zeros((), device=images.device)
        names = ("critic_loss", "critic_real", "critic_fake", "adversarial", "adversarial_weight")
        figures = dict.fromkeys(names, zero)
        begun = position - position % self.batch_size  # start of the step, so all its micro-batches are treated alike
        if begun < self.start // 2:
            return zero, figures
        figures |= self._learn(images, decoded.detach())
        # 0, or NaN (also its gradient) if the critic has diverged: then the trainer stops as for any other loss.
        term = 0.0 * figures["critic_loss"] * last_layer.sum()
        if begun < self.start:
            return term, figures
        adversarial = -self.network(decoded).mean()
        weight = self.weight * adaptive_weight(reconstruction, adversarial, last_layer)
        figures |= {"adversarial": adversarial.detach(), "adversarial_weight": weight}
        return term + weight * adversarial, figures

    def _learn(self, images: Tensor, decoded: Tensor) -> dict[str, Tensor]:
        """Accumulate the critic's gradients for these images; outside of this, the critic is frozen."""
        self.network.requires_grad_(True)
        real, fake = self.network(images), self.network(decoded)
        loss = hinge_loss(real, fake)
        (loss * (len(images) / self.batch_size)).backward()
        self.network.requires_grad_(False)
        means = (loss.detach(), real.detach().mean(), fake.detach().mean())
        return dict(zip(("critic_loss", "critic_real", "critic_fake"), means, strict=True))

    def step(self, position: int) -> None:
        """The critic's optimiser step, after the autoencoder's step that began at image `position`."""
        for parameter in self.network.parameters():
            if parameter.grad is not None:
                parameter.grad = distributed.total(parameter.grad)
        set_rate(self.optimizer, self.rate(position))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """Tensors that a checkpoint needs."""
        packed = checkpoint.pack({"weights": self.network}, self.optimizer)
        return {_PREFIX + name: tensor for name, tensor in packed.items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Load what `state` returned, ignoring other tensors. Raises UserError if one is missing."""
        ours = {name.removeprefix(_PREFIX): t for name, t in tensors.items() if name.startswith(_PREFIX)}
        checkpoint.unpack(ours, {"weights": self.network}, self.optimizer)
