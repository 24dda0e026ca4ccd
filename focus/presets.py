"""The named configs: one function each, found by name in `CONFIGS`.

`focus_tiny()` and `focus_3b()` build the same modules from different numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from focus.config import (
    AdapterConfig,
    DiffusionConfig,
    FocusConfig,
    FusionConfig,
    HierarchicalConfig,
    LLMConfig,
    PixelConfig,
    RegionConfig,
    SegmentConfig,
    SemanticConfig,
    SimVQConfig,
    VAEConfig,
    VanillaConfig,
)


def focus_3b() -> FocusConfig:
    """The paper's model: Qwen2.5-3B, QwenViT, ConvNeXt-L, MoVQ, Mask2Former, SDXL."""
    return FocusConfig(name="focus_3b")


def at_bucket(config: FocusConfig, name: str, size: tuple[int, int]) -> FocusConfig:
    """Return a config whose own picture size is another bucket; the parameters are the same.

    The vanilla copy is the largest multiple of its stride, the pixel copy the bucket itself.
    """
    vit = tuple(side // config.vanilla.stride * config.vanilla.stride for side in size)
    return dataclasses.replace(
        config,
        name=name,
        vanilla=dataclasses.replace(config.vanilla, image_size=(vit[0], vit[1])),
        pixel=dataclasses.replace(config.pixel, image_size=size),
    )


def focus_3b_512() -> FocusConfig:
    """focus_3b at the second phase's picture size; the decoder then draws 1024 pixels."""
    return at_bucket(focus_3b(), "focus_3b_512", (512, 512))


def focus_300m() -> FocusConfig:
    """A tenth of the paper's model with its structure and picture sizes; trains on one GPU."""
    return FocusConfig(
        name="focus_300m",
        vanilla=VanillaConfig(depth=12, dim=384, num_heads=6, out_dim=768),
        hierarchical=HierarchicalConfig(
            image_size=(512, 512), depths=(3, 3, 9, 3), dims=(96, 192, 384, 768)
        ),
        fusion=FusionConfig(dim=384, num_heads=6),
        adapter=AdapterConfig(num_queries=64, dim=384, num_heads=6),
        semantic=SemanticConfig(
            depth=4, dim=384, num_heads=6, codebook=SimVQConfig(num_codes=8192)
        ),
        pixel=PixelConfig(
            encoder_channels=64, decoder_channels=96, codebook=SimVQConfig(num_codes=16_384)
        ),
        llm=LLMConfig(
            num_layers=16,
            dim=768,
            num_heads=12,
            num_kv_heads=4,
            head_dim=64,
            ffn_dim=2048,
            vocab_size=25_600,
            max_length=8192,
        ),
        diffusion=DiffusionConfig(
            channels=(64, 128, 256),
            transformer_depth=(0, 1, 4),
            head_dim=32,
            context_dim=512,
            vae=VAEConfig(channels=(64, 128, 256, 256)),
        ),
    )


def focus_300m_512() -> FocusConfig:
    """focus_300m at the second phase's picture size."""
    return at_bucket(focus_300m(), "focus_300m_512", (512, 512))


def focus_3b_shallow() -> FocusConfig:
    """focus_3b with at most 2 layers in every stack: its widths, tokens and picture sizes."""
    full = focus_3b()
    return dataclasses.replace(
        full,
        name="focus_3b_shallow",
        vanilla=dataclasses.replace(full.vanilla, depth=2),
        hierarchical=dataclasses.replace(full.hierarchical, depths=(2, 2, 2, 2)),
        semantic=dataclasses.replace(full.semantic, depth=2),
        pixel=dataclasses.replace(full.pixel, num_blocks=1),
        llm=dataclasses.replace(full.llm, num_layers=2),
        segment=dataclasses.replace(full.segment, encoder_layers=2, decoder_layers=2),
        diffusion=dataclasses.replace(full.diffusion, transformer_depth=(0, 2, 2)),
    )


def focus_tiny() -> FocusConfig:
    """Every part of the paper in fewer than 30 M parameters, trainable on two CPU cores."""
    return FocusConfig(
        name="focus_tiny",
        vanilla=VanillaConfig(
            image_size=(112, 112), patch_size=7, depth=4, dim=128, num_heads=4, out_dim=192
        ),
        hierarchical=HierarchicalConfig(
            image_size=(128, 128), depths=(2, 2, 4, 2), dims=(32, 64, 128, 192)
        ),
        fusion=FusionConfig(dim=128, num_heads=4, scales=("res4",)),
        adapter=AdapterConfig(num_queries=16, dim=128, num_heads=4),
        semantic=SemanticConfig(
            depth=2, dim=128, num_heads=4, codebook=SimVQConfig(num_codes=256, dim=8)
        ),
        pixel=PixelConfig(
            image_size=(64, 64),
            encoder_channels=24,
            decoder_channels=32,
            multipliers=(1, 1, 2, 2),
            num_blocks=1,
            attention_levels=(3,),
            norm_groups=8,
            codebook=SimVQConfig(num_codes=1024, dim=8),
        ),
        llm=LLMConfig(
            num_layers=6,
            dim=192,
            num_heads=6,
            num_kv_heads=2,
            head_dim=32,
            ffn_dim=640,
            vocab_size=2048,
            rope_theta=1e4,
            max_length=768,
            visual_position=True,
            visual_gain=0.1,
        ),
        segment=SegmentConfig(
            dim=64,
            num_queries=12,
            num_heads=4,
            encoder_layers=1,
            encoder_ffn_dim=128,
            decoder_layers=3,
            decoder_ffn_dim=128,
            num_points=256,
            place=True,
        ),
        region=RegionConfig(num_points=64, hierarchical_scale=None, position=True),
        diffusion=DiffusionConfig(
            channels=(48, 96),
            layers_per_block=1,
            transformer_depth=(1, 1),
            head_dim=16,
            context_dim=64,
            norm_groups=8,
            upscale=1,
            vae=VAEConfig(
                channels=(16, 32, 64), layers_per_block=1, norm_groups=2, scaling_factor=1.0
            ),
            prediction="v_prediction",  # noise alone says nothing of the colour at high noise
            num_sizes=1,
        ),
    )


CONFIGS: dict[str, Callable[[], FocusConfig]] = {
    "focus_3b": focus_3b,
    "focus_3b_512": focus_3b_512,
    "focus_300m": focus_300m,
    "focus_300m_512": focus_300m_512,
    "focus_3b_shallow": focus_3b_shallow,
    "focus_tiny": focus_tiny,
}
