"""Noise schedules, guidance and the sampling loop of the diffusion decoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers import DDPMScheduler, SchedulerMixin
from torch import Tensor

from focus.config import DiffusionConfig
from focus.diffusion.unet import DiffusionError

# B batch, L latent channels, h w latent grid

SCHEDULERS: dict[str, str] = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "lms": "LMSDiscreteScheduler",
    "pndm": "PNDMScheduler",
}
NUM_TRAIN_STEPS = 1000
Generators = torch.Generator | list[torch.Generator] | None  # one for all rows, or one for each


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Scales of classifier-free guidance.

        e = e(0, m) + tokens (e(c, m) - e(0, m))                                   mask = None
        e = e(0, 0) + mask (e(0, m) - e(0, 0)) + tokens (e(c, m) - e(0, m))        otherwise

    c are the codes, m the mask. The first form keeps the mask in both branches, so that guidance
    scales the tokens only; tokens = 1 without `mask` needs one UNet call instead of two.
    """

    tokens: float = 2.0
    mask: float | None = None


def schedule(config: DiffusionConfig) -> dict[str, Any]:
    """SDXL's noise schedule: 1000 steps, betas 0.00085 to 0.012, linear in their square root."""
    return {
        "num_train_timesteps": NUM_TRAIN_STEPS,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": config.prediction,
    }


def training_scheduler(config: DiffusionConfig) -> DDPMScheduler:
    """The schedule that adds noise in training."""
    return DDPMScheduler(**schedule(config), clip_sample=False)


def build_scheduler(name: str, config: DiffusionConfig) -> SchedulerMixin:
    """Build a diffusers scheduler by short name or class name, on the training schedule.

    Steps are spaced "trailing" where the scheduler offers it: the first step is then the noisiest,
    which is what the loop starts from. Raises `DiffusionError` for an unknown name.
    """
    cls = getattr(diffusers, SCHEDULERS.get(name, name), None)
    if not (isinstance(cls, type) and issubclass(cls, SchedulerMixin)):
        raise DiffusionError(
            f"a scheduler of {sorted(SCHEDULERS)} or the name of a diffusers scheduler class "
            f"expected, got {name!r}"
        )
    base = DDPMScheduler(**schedule(config), clip_sample=False, timestep_spacing="trailing")
    settings = {k: v for k, v in base.config.items() if not k.startswith("_")}
    settings.update(set_alpha_to_one=False)
    scheduler: SchedulerMixin = cls.from_config(settings)  # type: ignore[attr-defined]
    return scheduler


@dataclass(frozen=True, kw_only=True)
class Blend:
    """Keep the source picture outside the mask while sampling (not in the paper; off by default).

    latents: [B, L, h, w] of the source. mask: [B, 1, h, w], 1 where the decoder may draw.
    """

    latents: Tensor
    mask: Tensor


def sample_latents(
    predict: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    scheduler: SchedulerMixin,
    steps: int,
    *,
    blend: Blend | None = None,
    generator: Generators = None,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Denoise `noise` [B, L, h, w], unit normal, in `steps` steps with any diffusers scheduler.

    predict: (latents in, scaled as the scheduler wants, timestep) -> guided prediction, same shape.
    generator: for the schedulers whose steps draw noise; a list has one for each row.
    on_step: called with the step number and the latents after it (progress, previews).
    """
    if steps < 1:
        raise DiffusionError(f"at least one sampling step expected, got {steps}")
    scheduler.set_timesteps(steps, device=noise.device)
    latents: Tensor = noise * scheduler.init_noise_sigma
    extra = _extra(scheduler, generator)
    timesteps = scheduler.timesteps
    for index, timestep in enumerate(timesteps):
        model_input = scheduler.scale_model_input(latents, timestep)
        output = predict(model_input, timestep)
        stepped: Tensor = scheduler.step(output, timestep, latents, return_dict=False, **extra)[0]
        latents = stepped
        if blend is not None:
            following = timesteps[index + 1 :][:1]
            latents = _blend(latents, blend, noise, scheduler, following)
        if on_step is not None:
            on_step(index, latents)
    return latents


def _blend(
    latents: Tensor, blend: Blend, noise: Tensor, scheduler: SchedulerMixin, following: Tensor
) -> Tensor:
    source = blend.latents
    if len(following):
        source = scheduler.add_noise(source, noise, following.expand(len(source)))
    blended: Tensor = blend.mask * latents + (1.0 - blend.mask) * source.to(latents.dtype)
    return blended


def _extra(scheduler: SchedulerMixin, generator: Generators) -> dict[str, Any]:
    """Pass the generator to the schedulers whose step draws noise."""
    names = scheduler.step.__code__.co_varnames
    return {"generator": generator} if "generator" in names else {}
