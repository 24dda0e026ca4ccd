"""Latent space of the diffusion decoder: diffusers' AutoencoderKL and its standardisation."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from focus.config import VAEConfig

# B batch, L latent channels, H W picture, h w latent grid

Perceptual = Callable[[Tensor, Tensor], Tensor]


class LatentAutoencoder(nn.Module):
    """Pictures [B, 3, H, W] in [0, 1] to standardised latents [B, L, h, w] and back.

        z = (posterior(2 x - 1) - shift) * scale

    `scale` starts as the config's scaling factor and `shift` as zero (SDXL's 0.13025); both are
    buffers per channel, which `measure` overwrites for an autoencoder trained from nothing, so that
    the diffusion sees unit variance.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        count = len(config.channels)
        self.model = AutoencoderKL(
            in_channels=3,
            out_channels=3,
            down_block_types=("DownEncoderBlock2D",) * count,
            up_block_types=("UpDecoderBlock2D",) * count,
            block_out_channels=config.channels,
            layers_per_block=config.layers_per_block,
            latent_channels=config.latent_channels,
            norm_num_groups=config.norm_groups,
            sample_size=1024,
            scaling_factor=config.scaling_factor,
        )
        self.tile(config.tile)
        self.register_buffer("scale", torch.full((config.latent_channels,), config.scaling_factor))
        self.register_buffer("shift", torch.zeros(config.latent_channels))

    def tile(self, side: int) -> None:
        """Code pictures larger than `side` pixels in tiles from now on; 0: every picture whole.

        Raises: ValueError for a side that latents do not divide.
        """
        stride = self.config.stride
        if side < 0 or side % stride:
            raise ValueError(f"a multiple of {stride} expected for the side of tiles, got {side}")
        self.model.use_tiling = side > 0
        if side:
            self.model.tile_sample_min_size = side
            self.model.tile_latent_min_size = side // stride

    def encode(
        self, images: Tensor, *, sample: bool = False, generator: torch.Generator | None = None
    ) -> Tensor:
        """Standardised latents: the posterior's mean, or a sample of it."""
        images = images.to(self._dtype)
        posterior = self.model.encode(images * 2.0 - 1.0).latent_dist
        latents = posterior.sample(generator) if sample else posterior.mode()
        standard: Tensor = (latents - self._axis(self.shift)) * self._axis(self.scale)
        return standard

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures in the [0, 1] scale, not clamped."""
        latents = latents / self._axis(self.scale) + self._axis(self.shift)
        decoded: Tensor = self.model.decode(latents.to(self._dtype), return_dict=False)[0]
        return decoded * 0.5 + 0.5

    @torch.no_grad()
    def measure(self, images: Tensor) -> None:
        """Set `shift` and `scale` from the latents of a batch, so that they have unit variance."""
        latents = self.model.encode(images * 2.0 - 1.0).latent_dist.mode().float()
        self.shift.copy_(latents.mean(dim=(0, 2, 3)))
        self.scale.copy_(1.0 / latents.std(dim=(0, 2, 3)).clamp(min=1e-6))

    @property
    def _dtype(self) -> torch.dtype:
        """Precision of the weights; latents are standardised in at least that of the buffers."""
        dtype: torch.dtype = self.model.decoder.conv_in.weight.dtype
        return dtype

    @staticmethod
    def _axis(values: Tensor) -> Tensor:
        return values[None, :, None, None]


def vae_losses(
    vae: LatentAutoencoder,
    images: Tensor,
    *,
    kl_weight: float = 1e-6,
    square_weight: float = 0.0,
    perceptual: Perceptual | None = None,
    perceptual_weight: float = 1.0,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Losses that train the autoencoder from nothing.

        L = |x^ - x|_1 + square_weight |x^ - x|^2 + kl_weight KL(q(z|x) || N(0, 1))
            + perceptual_weight d(x^, x)

    images: [B, 3, H, W] in [0, 1]. L1 is the mean in [0, 1] units, KL summed over latents and
    divided by the number of pixels. Returns weighted fp32 scalars "l1", "kl" and, when asked for,
    "square" and "perceptual".
    """
    posterior = vae.model.encode(images * 2.0 - 1.0).latent_dist
    decoded = vae.model.decode(posterior.sample(generator), return_dict=False)[0] * 0.5 + 0.5
    losses = {
        "l1": F.l1_loss(decoded.float(), images.float()),
        "kl": kl_weight * posterior.kl().float().sum() / images[:, 0].numel(),
    }
    if square_weight:
        losses["square"] = square_weight * F.mse_loss(decoded.float(), images.float())
    if perceptual is not None:
        losses["perceptual"] = perceptual_weight * perceptual(decoded, images)
    return losses
