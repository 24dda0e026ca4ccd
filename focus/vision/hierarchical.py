"""Hierarchical encoder: ConvNeXt from transformers, four normalised scales (paper 3.1)."""

# B batch, H W picture, C channels of one scale

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import ConvNextBackbone, ConvNextConfig

from focus.config import HierarchicalConfig
from focus.errors import ShapeError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class HierarchicalEncoder(nn.Module):
    """ConvNeXt: X_H [B, 3, H, W] -> res2..res5, maps [B, C_i, H / s, W / s] at s = 4, 8, 16, 32.

    Each map goes through its own LayerNorm over channels, as in `ConvNextBackbone`, whose weights
    live under `backbone`. Layer scale starts at 0.1 in shallow nets and at 1e-6 beyond 18 blocks
    (the CaiT rule): with 1e-6 a net trained from scratch learns nothing for its first steps.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: HierarchicalConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = ConvNextBackbone(
            ConvNextConfig(
                depths=list(config.depths),
                hidden_sizes=list(config.dims),
                num_stages=4,
                drop_path_rate=config.drop_path,
                layer_scale_init_value=0.1 if sum(config.depths) <= 18 else 1e-6,
                out_features=["stage1", "stage2", "stage3", "stage4"],
            )
        )
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """images [B, 3, H, W], RGB in [0, 1] -> four maps, finest first.

        Raises ShapeError when H or W is no multiple of 32.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ShapeError(f"images must be [B, 3, H, W], got {tuple(images.shape)}")
        height, width = images.shape[-2:]
        if height % 32 or width % 32:
            raise ShapeError(
                f"picture sides must be multiples of 32 pixels, got {height} x {width}; "
                "letterbox the picture first"
            )
        # The stages are called one by one: the wrapper's output hooks do not trace or export.
        normed = ((images - self.mean) / self.std).to(images.dtype)
        x = self.backbone.embeddings(normed)
        maps: list[Tensor] = []
        for index, stage in enumerate(self.backbone.encoder.stages, start=1):
            x = stage(x)
            maps.append(self.backbone.hidden_states_norms[f"stage{index}"](x))
        return maps
