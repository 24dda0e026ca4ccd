"""Random small checkpoints in the public formats, written by the libraries' own save functions."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, VQModel
from torch import nn
from transformers import (
    ConvNextConfig,
    ConvNextModel,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLConfig,
    Qwen2VLModel,
    SwinConfig,
)
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
)

from focus.config import FocusConfig
from focus.presets import focus_tiny
from focus.prompts import training_texts
from focus.vocabulary import Vocabulary

DEPTHS, DIMS = [1, 1, 2, 1], [8, 16, 24, 32]
TABLE = 512  # rows of the language model's own table


def base() -> FocusConfig:
    """Sizes of what no checkpoint states."""
    tiny = focus_tiny()
    return dataclasses.replace(
        tiny,
        name="small",
        adapter=dataclasses.replace(tiny.adapter, num_queries=4, dim=32, num_heads=2),
        fusion=dataclasses.replace(tiny.fusion, dim=32, num_heads=2),
        semantic=dataclasses.replace(tiny.semantic, depth=1, dim=32, num_heads=2),
        llm=dataclasses.replace(tiny.llm, vocab_size=640, visual_position=False),
    )


def shake(model: nn.Module) -> nn.Module:
    """Move every parameter off its initial value, so that ones and zeros cannot hide a mix-up."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def qwen2(path: Path, tied: bool = True, shard: str = "5GB") -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=TABLE,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=tied,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
    )
    model = shake(Qwen2ForCausalLM(config))
    model.save_pretrained(path, max_shard_size=shard)
    Vocabulary.train(training_texts(), 300, 1, 1).save(path)  # tokenizer.json beside
    (path / "vocabulary.json").unlink()
    return model


def qwen2_vl(path: Path) -> Qwen2VLModel:
    vision = {
        "depth": 2,
        "embed_dim": 32,
        "num_heads": 2,
        "mlp_ratio": 2,
        "hidden_size": 40,
        "patch_size": 7,
    }
    text = {
        "vocab_size": 64,
        "hidden_size": 40,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 4, 4], "rope_theta": 1e4},
    }
    config = Qwen2VLConfig(vision_config=vision, text_config=text)
    model = shake(Qwen2VLModel(config))
    model.save_pretrained(path)
    return model


def qwen2_5_vl(path: Path) -> nn.Module:
    config = Qwen2_5_VLVisionConfig(
        depth=3,
        hidden_size=32,
        num_heads=2,
        intermediate_size=44,
        out_hidden_size=40,
        patch_size=7,
        window_size=28,
        fullatt_block_indexes=[1],
    )
    model = shake(Qwen2_5_VisionTransformerPretrainedModel(config))
    model.save_pretrained(path)
    return model


def convnext(path: Path) -> ConvNextModel:
    config = ConvNextConfig(depths=DEPTHS, hidden_sizes=DIMS, layer_scale_init_value=0.5)
    model = shake(ConvNextModel(config))
    model.save_pretrained(path)
    return model


def mask2former(path: Path, embed_dim: int = 8) -> Mask2FormerForUniversalSegmentation:
    """Backbone widths are embed_dim x 1, 2, 4, 8: other than the ConvNeXt's."""
    stages = [f"stage{i}" for i in range(1, 5)]
    swin = SwinConfig(
        image_size=64,
        depths=[1, 1, 1, 1],
        embed_dim=embed_dim,
        num_heads=[1, 1, 1, 1],
        window_size=2,
        out_features=stages,
    )
    config = Mask2FormerConfig(
        backbone_config=swin,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        num_queries=5,
        num_attention_heads=2,
        encoder_layers=1,
        encoder_feedforward_dim=24,
        decoder_layers=3,
        dim_feedforward=40,
    )
    model = shake(Mask2FormerForUniversalSegmentation(config))
    model.save_pretrained(path)
    return model


def sdxl(path: Path) -> tuple[UNet2DConditionModel, AutoencoderKL]:
    unet = UNet2DConditionModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=[1, 2],
        attention_head_dim=[2, 4],
        cross_attention_dim=64,
        use_linear_projection=True,
        norm_num_groups=8,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=40 + 6 * 8,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=0.13025,
    )
    shake(unet).save_pretrained(path / "unet")
    shake(vae).save_pretrained(path / "vae")
    return unet, vae


def movq(path: Path) -> VQModel:
    model = VQModel(
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        latent_channels=8,
        num_vq_embeddings=40,
        norm_num_groups=32,
        norm_type="spatial",
    )
    shake(model).save_pretrained(path)
    return model
