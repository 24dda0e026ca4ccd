"""Diffusion decoder: merged visual codes and a mask become a picture (eq. 6)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from focus.config import DiffusionConfig
from focus.diffusion.attention import (
    MaskContext,
    context_rows,
    mask_context,
    match_dtype,
    repeat_context,
    resize_area,
)
from focus.diffusion.sampler import (
    Blend,
    Generators,
    Guidance,
    build_scheduler,
    sample_latents,
    training_scheduler,
)
from focus.diffusion.unet import DiffusionError, build_unet, run_unet
from focus.diffusion.vae import LatentAutoencoder

# B batch, K code channels (half semantic, half pixel), M mask channels, L latent channels,
# hp wp pixel-token grid, h w latent grid, H W picture


@dataclass(frozen=True, kw_only=True)
class Drop:
    """Chances, per training row, of hiding a condition (the basis of guidance).

    semantic, pixel: only that half of the codes; both: all codes; mask: the mask.
    """

    semantic: float = 0.1
    pixel: float = 0.1
    both: float = 0.05
    mask: float = 0.1


class DiffusionDecoder(nn.Module):
    """Latent diffusion conditioned on codes (input channels) and a mask (cross-attention).

        z_{t-1} = UNet(z_t, codes, t, f_m),   f_m = w m                                      (eq. 6)

    (The paper prints z_{t+1}.) w [context_dim, M] is bias-free and starts at zero: a mask changes
    nothing before training and a mask of zeros never does.
    """

    def __init__(
        self,
        config: DiffusionConfig,
        code_channels: int,
        *,
        code_stride: int | None = None,
        llm_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.code_channels = code_channels
        self.code_stride = code_stride
        self.unet = build_unet(config, code_channels)
        self.vae = LatentAutoencoder(config.vae)
        self.mask_projection = nn.Linear(config.num_masks, config.context_dim, bias=False)
        nn.init.zeros_(self.mask_projection.weight)
        self.query_projection: nn.Linear | None = None
        if config.condition == "queries":
            if llm_dim is None:
                raise DiffusionError("condition 'queries' needs llm_dim, the width of the states")
            self.query_projection = nn.Linear(llm_dim, config.context_dim, bias=False)
            nn.init.zeros_(self.query_projection.weight)
        with torch.device("cpu"):  # a table, not a weight: real even where the model is on meta
            self.noise_schedule = training_scheduler(config)

    def loss(
        self,
        codes: Tensor,
        images: Tensor | None,
        mask: Tensor | None,
        size_index: Tensor | None = None,
        generator: torch.Generator | None = None,
        *,
        latents: Tensor | None = None,
        drop: Drop | None = None,
        states: Tensor | None = None,
    ) -> Tensor:
        """Mean squared error of the predicted noise (or velocity), a fp32 scalar.

        codes: [B, K, hp, wp] merged codes of the target. images: [B, 3, H, W] in [0, 1], the
        target; or its standardised `latents` [B, L, h, w]. mask: [B, M, H', W'] in [0, 1] or bool;
        None is a mask of zeros. size_index: [B] bucket numbers (default 0). states: [B, N, llm_dim]
        of the mask tokens, for condition "queries". Differentiable in codes, states and (with
        `mask_gradient`) mask; the autoencoder gets no gradient.
        Raises `DiffusionError` on shapes that do not fit.
        """
        if latents is None:
            if images is None:
                raise DiffusionError("the target picture or its latents expected, got neither")
            with torch.no_grad():
                latents = self.vae.encode(images)
        if mask is not None and not self.config.mask_gradient:
            mask = mask.detach()
        codes, context = self.conditions(codes, mask, tuple(latents.shape[-2:]), states)
        codes, context = _drop(codes, context, drop or Drop(), generator)
        batch, device = latents.shape[0], latents.device
        num_steps = self.noise_schedule.config.num_train_timesteps
        timestep = torch.randint(num_steps, (batch,), device=device, generator=generator)
        noise = torch.randn(latents.shape, device=device, dtype=latents.dtype, generator=generator)
        noisy = self.noise_schedule.add_noise(latents, noise, timestep)
        output = self.predict(noisy, codes, timestep, context, size_index)
        if self.config.prediction == "epsilon":
            target = noise
        else:
            target = self.noise_schedule.get_velocity(latents, noise, timestep)
        return F.mse_loss(output.float(), target.float())

    def predict(
        self,
        noisy: Tensor,
        codes: Tensor,
        timestep: Tensor,
        context: MaskContext | None,
        size_index: Tensor | None = None,
    ) -> Tensor:
        """One UNet call on conditions prepared by `conditions`; everything on the latent grid."""
        if size_index is None:
            size_index = torch.zeros(noisy.shape[0], dtype=torch.int64, device=noisy.device)
        return run_unet(self.unet, noisy, codes, timestep, context, size_index, self.config)

    def conditions(
        self,
        codes: Tensor,
        mask: Tensor | None,
        latent_size: tuple[int, ...],
        states: Tensor | None = None,
    ) -> tuple[Tensor, MaskContext | None]:
        """Bring codes (nearest) and mask (area averages) to the latent grid (h, w).

        With condition "queries" the context is made of `states` [B, N, llm_dim], not of the mask.
        """
        size = (latent_size[-2], latent_size[-1])
        if codes.dim() != 4 or codes.shape[1] != self.code_channels:
            raise DiffusionError(
                f"codes [B, {self.code_channels}, hp, wp] expected, got {tuple(codes.shape)}; "
                "pass the merged semantic and pixel codes"
            )
        resized = F.interpolate(codes, size=size, mode="nearest")
        if self.query_projection is not None:
            if states is None:
                return resized, None
            tokens = self.query_projection(states)
            weight = self.mask_projection.weight
            return resized, MaskContext((), weight, *size, tokens=tokens)
        if mask is None:
            return resized, None
        if mask.dim() != 4 or mask.shape[1] != self.config.num_masks:
            raise DiffusionError(
                f"mask [B, {self.config.num_masks}, H, W] expected, got {tuple(mask.shape)}; "
                "take the union of the targets or raise diffusion.num_masks"
            )
        context = mask_context(
            match_dtype(mask, codes),
            self.mask_projection.weight,
            size,
            len(self.config.channels),
            self.config.mask_grid,
        )
        return resized, context

    def picture_size(self, codes: Tensor) -> tuple[int, int]:
        """(H, W) that codes [B, K, hp, wp] describe: tokens times `code_stride` times `upscale`."""
        if self.code_stride is None:
            raise DiffusionError(
                "the size of the picture is unknown: pass size=(H, W), or build the decoder with "
                "code_stride (pixels per pixel token, pixel.stride of the config)"
            )
        scale = self.code_stride * self.config.upscale
        return codes.shape[-2] * scale, codes.shape[-1] * scale

    @torch.no_grad()
    def sample(
        self,
        codes: Tensor,
        mask: Tensor | None = None,
        steps: int = 50,
        guidance: Guidance | float = 2.0,
        generator: Generators = None,
        scheduler: str = "ddim",
        *,
        size: tuple[int, int] | None = None,
        size_index: Tensor | None = None,
        noise: Tensor | None = None,
        source: Tensor | None = None,
        states: Tensor | None = None,
        on_step: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Draw pictures [B, 3, H, W] in [0, 1].

        codes: [B, K, hp, wp]. mask: [B, M, H', W'] in [0, 1]. size: (H, W) of the output,
        by default `picture_size(codes)`.
        guidance: a scale for the tokens or a `Guidance`. scheduler: see `build_scheduler`.
        generator: of all that is drawn; a list has one for each row, so that rows do not depend on
        their batch.
        noise: [B, L, h, w] unit normal to start from (video frames share one); drawn if None.
        states: [B, N, llm_dim] of the mask tokens, for condition "queries".
        source: [B, 3, H, W]; when given with a mask, everything outside the mask is kept from it
        by blending latents at every step (not in the paper).
        """
        guidance = guidance if isinstance(guidance, Guidance) else Guidance(tokens=guidance)
        stride = self.config.vae.stride
        size = self.picture_size(codes) if size is None else size
        latent_size = (size[0] // stride, size[1] // stride)
        if size[0] % stride or size[1] % stride:
            raise DiffusionError(f"a size in multiples of {stride} pixels expected, got {size}")
        resized, context = self.conditions(codes, mask, latent_size, states)
        if noise is None:
            shape = (codes.shape[0], self.config.vae.latent_channels, *latent_size)
            noise = randn_tensor(shape, generator, codes.device, codes.dtype)
        latents = sample_latents(
            self._guided(resized, context, guidance, size_index),
            noise,
            build_scheduler(scheduler, self.config),
            steps,
            blend=self._source(source, mask, latent_size),
            generator=generator,
            on_step=on_step,
        )
        return self.vae.decode(latents.to(codes.dtype)).clamp(0.0, 1.0)

    def _source(
        self, source: Tensor | None, mask: Tensor | None, size: tuple[int, int]
    ) -> Blend | None:
        if source is None:
            return None
        if mask is None:
            raise DiffusionError("a mask is expected with a source picture: it says what to keep")
        latents = self.vae.encode(source)
        union = match_dtype(mask, latents).amax(dim=1, keepdim=True)
        return Blend(latents=latents, mask=resize_area(union, size))

    def _guided(
        self,
        codes: Tensor,
        context: MaskContext | None,
        guidance: Guidance,
        size_index: Tensor | None,
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """One batched UNet call per step over the branches that the guidance needs."""
        empty = torch.zeros_like(codes)
        branches = [(codes, True)]
        with_mask = guidance.mask is not None and context is not None
        if guidance.tokens != 1.0 or with_mask:
            branches.append((empty, True))
        if with_mask:
            branches.append((empty, False))
        stacked = torch.cat([branch for branch, _ in branches])
        contexts = repeat_context(context, [keep for _, keep in branches])
        if size_index is not None:
            size_index = size_index.repeat(len(branches))

        def predict(latents: Tensor, timestep: Tensor) -> Tensor:
            # The schedule runs in the precision of the noise, the network in its own.
            noisy = torch.cat([latents] * len(branches)).to(stacked.dtype)
            times = timestep.to(latents.device).expand(len(noisy))
            found = self.predict(noisy, stacked, times, contexts, size_index).to(latents.dtype)
            parts = found.chunk(len(branches))
            if len(parts) == 1:
                return parts[0]
            guided = parts[1] + guidance.tokens * (parts[0] - parts[1])
            if len(parts) == 3 and guidance.mask is not None:
                guided = guided + (guidance.mask - 1.0) * (parts[1] - parts[2])
            return guided

        return predict


def _drop(
    codes: Tensor, context: MaskContext | None, drop: Drop, generator: torch.Generator | None
) -> tuple[Tensor, MaskContext | None]:
    """Hide code groups and masks at random, per row."""
    batch, channels = codes.shape[:2]
    draws = torch.rand(batch, 4, device=codes.device, generator=generator)
    hidden = draws[:, :3] < draws.new_tensor([drop.semantic, drop.pixel, drop.both])
    keep = ~(hidden[:, :2] | hidden[:, 2:])
    keep = keep.to(codes.dtype).repeat_interleave(channels // 2, dim=1)
    return codes * keep[:, :, None, None], context_rows(context, draws[:, 3] >= drop.mask)
