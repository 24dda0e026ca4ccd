"""SDXL's UNet with code channels at its input and mask attention in its transformer blocks."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from focus.config import DiffusionConfig
from focus.diffusion.attention import MaskAttention, MaskContext

# B batch, L latent channels, K code channels, h w latent grid

NUM_TIME_IDS = 6  # SDXL's original size, crop and target size; FOCUS writes the size index last


class DiffusionError(ValueError):
    """A diffusion config or input that does not fit."""


def text_dim(config: DiffusionConfig) -> int:
    """Width of SDXL's pooled text vector (1280 of context 2048), fed with zeros."""
    return config.context_dim * 5 // 8


def time_dim(config: DiffusionConfig) -> int:
    """Width of the embedding of each time id (256 of context 2048)."""
    return config.context_dim // 8


def build_unet(config: DiffusionConfig, code_channels: int) -> UNet2DConditionModel:
    """Build the UNet: input [B, L + K, h, w] (noisy latents, then codes), output [B, L, h, w].

    Levels with transformer depth 0 have no attention. Every `attn2` is a `MaskAttention` with the
    parameter names of the module it replaces, so SDXL checkpoints load. Size conditioning is SDXL's
    "text_time": six ids, five zeros and the bucket number, beside a zero pooled text vector.
    Raises `DiffusionError` for contradictory sizes.
    """
    _check(config)
    heads = tuple(channels // config.head_dim for channels in config.channels)
    depth = config.transformer_depth
    unet = UNet2DConditionModel(
        in_channels=config.vae.latent_channels + code_channels,
        out_channels=config.vae.latent_channels,
        block_out_channels=config.channels,
        layers_per_block=config.layers_per_block,
        down_block_types=tuple("CrossAttnDownBlock2D" if d else "DownBlock2D" for d in depth),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=tuple("CrossAttnUpBlock2D" if d else "UpBlock2D" for d in reversed(depth)),
        transformer_layers_per_block=[max(d, 1) for d in depth],
        attention_head_dim=heads,  # diffusers' name for the number of heads
        cross_attention_dim=config.context_dim,
        use_linear_projection=True,
        norm_num_groups=config.norm_groups,
        addition_embed_type="text_time",
        addition_time_embed_dim=time_dim(config),
        projection_class_embeddings_input_dim=text_dim(config) + NUM_TIME_IDS * time_dim(config),
    )
    _replace_attention(unet, config)
    return unet


def _check(config: DiffusionConfig) -> None:
    if len(config.transformer_depth) != len(config.channels):
        raise DiffusionError(
            f"one transformer depth per level expected: {len(config.channels)} levels, got "
            f"{config.transformer_depth}"
        )
    if not config.transformer_depth[-1]:
        raise DiffusionError(
            f"the deepest level needs a transformer, got depths {config.transformer_depth}; "
            "the middle block attends to the mask"
        )
    for channels in config.channels:
        if channels % config.head_dim or channels % config.norm_groups:
            raise DiffusionError(
                f"channels must be multiples of head_dim {config.head_dim} and norm_groups "
                f"{config.norm_groups}, got {config.channels}"
            )


def _replace_attention(unet: UNet2DConditionModel, config: DiffusionConfig) -> None:
    last = len(config.channels) - 1
    parts: list[tuple[nn.Module, int]] = [(unet.mid_block, last)]
    parts += [(block, level) for level, block in enumerate(unet.down_blocks)]
    parts += [(block, last - index) for index, block in enumerate(unet.up_blocks)]
    for part, level in parts:
        for module in part.modules():
            if isinstance(module, BasicTransformerBlock):
                module.attn2 = MaskAttention(
                    module.attn2.to_q.in_features,
                    context_dim=config.context_dim,
                    num_heads=module.attn2.heads,
                    head_dim=config.head_dim,
                    level=level,
                    position=config.mask_position,
                )


def mask_attentions(unet: nn.Module) -> list[MaskAttention]:
    """All mask attentions of the UNet: with the mask projection, what stage 4 trains."""
    return [module for module in unet.modules() if isinstance(module, MaskAttention)]


def size_condition(
    size_index: Tensor, config: DiffusionConfig, dtype: torch.dtype
) -> dict[str, Tensor]:
    """SDXL's added conditions for bucket numbers [B]: no text, the number as last time id."""
    ids = torch.zeros(size_index.shape[0], NUM_TIME_IDS, device=size_index.device, dtype=dtype)
    ids = torch.cat([ids[:, :-1], size_index[:, None].to(dtype)], dim=1)
    text = ids.new_zeros(size_index.shape[0], text_dim(config))
    return {"text_embeds": text, "time_ids": ids}


def run_unet(
    unet: nn.Module,
    latents: Tensor,
    codes: Tensor,
    timestep: Tensor,
    context: MaskContext | None,
    size_index: Tensor,
    config: DiffusionConfig,
) -> Tensor:
    """One UNet call: latents [B, L, h, w], codes [B, K, h, w], timestep [B] -> [B, L, h, w]."""
    condition = size_condition(size_index, config, latents.dtype)
    out: Tensor = unet(
        torch.cat([latents, codes], dim=1),
        timestep,
        encoder_hidden_states=context,
        added_cond_kwargs=condition,
        return_dict=False,
    )[0]
    return out


def widen_input(weight: Tensor, in_channels: int) -> Tensor:
    """Give SDXL's `conv_in.weight` [C, 4, 3, 3] zero-initialised code channels: [C, in, 3, 3]."""
    if weight.shape[1] > in_channels:
        raise DiffusionError(
            f"conv_in with at most {in_channels} input channels expected, got {weight.shape[1]}"
        )
    extra = weight.new_zeros(weight.shape[0], in_channels - weight.shape[1], *weight.shape[2:])
    return torch.cat([weight, extra], dim=1)
