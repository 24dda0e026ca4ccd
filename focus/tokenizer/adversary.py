"""What judges a reconstruction: a PatchGAN with hinge losses, and a perceptual distance.

Both sides of the GAN come out of one forward and one backward: the generator's term runs through a
discriminator whose parameters are detached, the discriminator's term through detached pictures.
"""

# B batch, H W picture, h w patch logits, C channels

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

Features = Callable[[Tensor], Sequence[Tensor]]


def call_frozen(module: nn.Module, *inputs: Tensor) -> object:
    """Call a module so that gradients reach its inputs but none of its parameters."""
    detached = {name: value.detach() for name, value in module.named_parameters()}
    return functional_call(module, detached, inputs)


class Discriminator(nn.Module):
    """PatchGAN: convolutions of kernel 4, one logit per patch (pix2pix).

    `norm="group"` works at batch 1; `norm="batch"` is the published choice.
    """

    def __init__(
        self, channels: int = 64, num_layers: int = 3, norm: Literal["group", "batch"] = "group"
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(3, channels, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
        ]
        width = channels
        for index in range(1, num_layers + 1):
            wider = channels * min(2**index, 8)
            stride = 2 if index < num_layers else 1
            layers += [
                nn.Conv2d(width, wider, 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(min(32, channels), wider)
                if norm == "group"
                else nn.BatchNorm2d(wider),
                nn.LeakyReLU(0.2),
            ]
            width = wider
        layers.append(nn.Conv2d(width, 1, 4, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] in [0, 1] -> logits [B, 1, h, w], high for real."""
        logits: Tensor = self.layers(images * 2.0 - 1.0)
        return logits


def hinge_generator(fake: Tensor) -> Tensor:
    """-mean D(x^), in fp32."""
    return -fake.float().mean()


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """(mean relu(1 - D(x)) + mean relu(1 + D(x^))) / 2, in fp32."""
    return 0.5 * (F.relu(1.0 - real.float()).mean() + F.relu(1.0 + fake.float()).mean())


class AdversaryTerms(NamedTuple):
    """Weighted losses of one step and the mean logits to watch."""

    generator: Tensor
    discriminator: Tensor
    real: Tensor
    fake: Tensor


class Adversary(nn.Module):
    """A discriminator with the schedule and the weights of its two losses.

    The discriminator learns from `discriminator_start` on, the generator hears it from `start` on;
    ILLUME+ starts both at step 20 000, and an untrained judge then often wrecks the generator:
    start the discriminator earlier.
    """

    def __init__(
        self,
        discriminator: Discriminator,
        *,
        weight: float = 0.5,
        discriminator_weight: float = 0.5,
        start: int = 20_000,
        discriminator_start: int = 20_000,
    ) -> None:
        super().__init__()
        self.discriminator = discriminator
        self.weight = weight
        self.discriminator_weight = discriminator_weight
        self.start = start
        self.discriminator_start = discriminator_start

    def forward(self, reconstruction: Tensor, images: Tensor, step: int) -> AdversaryTerms | None:
        """reconstruction, images [B, 3, H, W] in [0, 1] -> terms, or None before both starts."""
        if step < min(self.start, self.discriminator_start):
            return None
        zero = reconstruction.new_zeros((), dtype=torch.float32)
        generator = discriminator = zero
        if step >= self.start:
            judged = call_frozen(self.discriminator, reconstruction)
            assert isinstance(judged, Tensor)
            generator = self.weight * hinge_generator(judged)
        real = self.discriminator(images.detach())
        fake = self.discriminator(reconstruction.detach())
        if step >= self.discriminator_start:
            discriminator = self.discriminator_weight * hinge_discriminator(real, fake)
        return AdversaryTerms(
            generator, discriminator, real.detach().float().mean(), fake.detach().float().mean()
        )


class PerceptualLoss:
    """Distance of normalised features, LPIPS with whatever features one has.

    sum over maps l of mean over positions of sum_c w_lc (f_lc / |f_l| - g_lc / |g_l|)^2.
    `features` turns pictures [B, 3, H, W] in [0, 1] into maps [B, C_l, h_l, w_l]; when it is a
    module, its parameters get no gradient and it is not part of any state dict. `weights` holds
    one [C_l] per map (the linear heads of LPIPS); without it, all ones.
    """

    def __init__(self, features: Features, weights: Sequence[Tensor] | None = None) -> None:
        self.features = features
        self.weights = weights

    def __call__(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        """Two batches [B, 3, H, W] in [0, 1] -> scalar fp32; gradient to the first alone."""
        with torch.no_grad():
            references = self._maps(images)
        distance = reconstruction.new_zeros((), dtype=torch.float32)
        for index, (one, two) in enumerate(
            zip(self._maps(reconstruction), references, strict=True)
        ):
            square = (_unit(one) - _unit(two)).square()
            if self.weights is not None:
                square = square * self.weights[index].to(square).view(1, -1, 1, 1)
            distance = distance + square.sum(1).mean()
        return distance

    def _maps(self, images: Tensor) -> Sequence[Tensor]:
        if isinstance(self.features, nn.Module):
            maps = call_frozen(self.features, images)
            assert isinstance(maps, Sequence)
            return maps
        return self.features(images)


def _unit(feature: Tensor) -> Tensor:
    value = feature.float()
    return value * torch.rsqrt(value.square().sum(1, keepdim=True) + 1e-10)
