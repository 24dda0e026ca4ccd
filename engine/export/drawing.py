"""The parts that turn codes into pictures: code map, denoising step, autoencoder, pixel decoder.

Their sizes follow the bucket. A config of one bucket gets fixed heights and widths; one of several
gets dims `rows` and `columns`, counted in pixel tokens.
"""

# B batch, K code channels, L latents

from __future__ import annotations

import torch

from engine.export import sections
from engine.export.errors import ExportError
from engine.export.part import Axis, Dim, Part, TensorSpec, numbers, picture, tensor
from focus.buckets import buckets_for
from focus.config import FocusConfig
from focus.model import FocusModel

VISION = 23  # ONNX opset: native attention, norms and GELU
BATCH = Dim(name="batch", min=1, opt=1, max=8)
BRANCHES = Dim(name="batch", min=1, opt=2, max=24)  # guidance runs two or three branches
TRAINED_STEPS = 1000


def codes_condition(model: FocusModel) -> Part:
    """Semantic and pixel codes -> merged code map."""
    config = model.config
    semantic, pixel = config.semantic.codebook, config.pixel.codebook
    coarse = _axes(config, "semantic")
    fine = _axes(config, "pixel")
    return Part(
        name="codes_condition",
        module=sections.CodesSection(model.front.tokenizer),
        inputs=(
            numbers("semantic_codes", "batch", *coarse, high=semantic.num_codes),
            numbers("pixel_codes", "batch", *fine, high=pixel.num_codes),
        ),
        outputs=(_exact("codes", "batch", config.code_channels, *fine),),
        dims=(BATCH, *_moving(config, "semantic"), *_moving(config, "pixel")),
        opset=VISION,
    )


def unet(model: FocusModel) -> Part:
    """One denoising step with mask attention (eq. 6)."""
    config = model.config
    settings = config.diffusion
    latents = settings.vae.latent_channels
    size = _latent_size(config)
    pooled = settings.mask_grid == "pooled"
    masks = [
        TensorSpec(
            name=f"mask_{level}",
            shape=(
                "batch",
                settings.num_masks,
                *(_latent_size(config, 1 << level) if pooled else size),
            ),
            values="mask",
        )
        for level in range(len(settings.channels))
    ]
    return Part(
        name="unet",
        module=sections.DenoiseSection(model.heads.diffusion),
        inputs=(
            tensor("latents", "batch", latents, *size),
            tensor("codes", "batch", config.code_channels, *size),
            numbers("timestep", "batch", high=TRAINED_STEPS),
            numbers("size_index", "batch", high=settings.num_sizes),
            *masks,
        ),
        outputs=(tensor("prediction", "batch", latents, *size),),
        dims=(BRANCHES, *_moving(config, "pixel")),
        opset=VISION,
    )


def vae_encode(model: FocusModel) -> Part:
    """Picture -> standardised latents."""
    config = model.config
    return Part(
        name="vae_encode",
        module=sections.LatentEncode(model.heads.diffusion.vae),
        inputs=(picture("images", _picture_size(config)),),
        outputs=(
            tensor("latents", "batch", config.diffusion.vae.latent_channels, *_latent_size(config)),
        ),
        dims=(BATCH, *_moving(config, "pixel")),
        opset=VISION,
    )


def vae_decode(model: FocusModel) -> Part:
    """Standardised latents -> picture."""
    config = model.config
    return Part(
        name="vae_decode",
        module=sections.LatentDecode(model.heads.diffusion.vae),
        inputs=(
            tensor("latents", "batch", config.diffusion.vae.latent_channels, *_latent_size(config)),
        ),
        outputs=(picture("images", _picture_size(config)),),
        dims=(BATCH, *_moving(config, "pixel")),
        opset=VISION,
    )


def token_decoder(model: FocusModel) -> Part:
    """Merged code map -> picture, without diffusion (the tokenizer's own decoder)."""
    config = model.config
    stride = config.pixel.stride
    return Part(
        name="token_decoder",
        module=model.front.tokenizer.pixel_decoder,
        inputs=(tensor("codes", "batch", config.code_channels, *_axes(config, "pixel")),),
        outputs=(picture("images", _axes(config, "pixel", stride)),),
        dims=(BATCH, *_moving(config, "pixel")),
        opset=VISION,
    )


def _exact(name: str, *shape: Axis) -> TensorSpec:
    """Return a tensor that is fp32 in every precision."""
    return TensorSpec(name=name, shape=shape, dtype=torch.float32)


def _grid_dims(config: FocusConfig, level: str) -> tuple[Dim, ...]:
    """Rows and columns of a level's tokens: the profile that holds every bucket of a config."""
    grids = [
        bucket.pixel_grid if level == "pixel" else bucket.semantic_grid
        for bucket in buckets_for(config)
    ]
    own = config.pixel.grid if level == "pixel" else config.vanilla.grid
    names = ("rows", "columns") if level == "pixel" else ("coarse_rows", "coarse_columns")
    return tuple(
        Dim(
            name=name,
            min=min(grid[axis] for grid in grids),
            opt=own[axis],
            max=max(grid[axis] for grid in grids),
        )
        for axis, name in enumerate(names)
    )


def _moving(config: FocusConfig, level: str) -> tuple[Dim, ...]:
    """The grid's dims that change from bucket to bucket."""
    return tuple(dim for dim in _grid_dims(config, level) if dim.min != dim.max)


def _axes(config: FocusConfig, level: str, factor: int = 1) -> tuple[Axis, Axis]:
    """Height and width of a level's grid times a factor."""
    first, second = (
        _times(dim.name, factor) if dim.min != dim.max else factor * dim.opt
        for dim in _grid_dims(config, level)
    )
    return first, second


def _times(name: str, factor: int) -> Axis:
    return name if factor == 1 else f"{factor}*{name}"


def _latent_size(config: FocusConfig, divided: int = 1) -> tuple[Axis, Axis]:
    """Height and width of the latent grid, or of a deeper level of the UNet."""
    pixels = config.pixel.stride * config.diffusion.upscale
    stride = config.diffusion.vae.stride
    latents = pixels // stride
    if pixels % stride:
        raise ExportError(
            f"pixel tokens that cover whole latents expected, got {pixels} pixels per token and "
            f"{stride} per latent; change diffusion.upscale"
        )
    if not _moving(config, "pixel"):
        rows, columns = (-(-side * latents // divided) for side in config.pixel.grid)
        return rows, columns
    if latents % divided:
        raise ExportError(
            f"buckets whose latents, {latents} per token, divide by {divided} expected; export a "
            "config of one picture size"
        )
    return _axes(config, "pixel", latents // divided)


def _picture_size(config: FocusConfig) -> tuple[Axis, Axis]:
    return _axes(config, "pixel", config.pixel.stride * config.diffusion.upscale)
