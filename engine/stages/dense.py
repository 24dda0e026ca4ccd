"""Throw-away classifiers: which colour, shape and size lie where, for encoders and their fusion."""

# B batch, h w stride-4 grid, S vanilla tokens

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.data.scene_draw import render
from engine.data.scene_model import COLOURS, SHAPES, SIZES, Scene, random_scene, stream
from focus.batch import Pictures, move
from focus.config import SCALES, FocusConfig
from focus.inputs import to_pictures

STRIDE = 4  # of the label maps
KINDS = (tuple(COLOURS), SHAPES, SIZES)  # what an object is told by
CLASSES = tuple(len(names) + 1 for names in KINDS)  # 0 is background
PATCHES = 4  # coarse RGB patches that a vanilla token must tell, each way


@dataclass(frozen=True, kw_only=True)
class DenseBatch:
    """Pictures with what lies where, per stride-4 cell."""

    pictures: Pictures
    classes: Tensor  # [B, 3, h, w] int64: colour, shape, size; 0 = background

    def to(self, device: torch.device | str) -> DenseBatch:
        """Move every tensor."""
        return move(self, device)


def class_table(scene: Scene) -> np.ndarray:
    """Return colour, shape and size class [3, 1 + objects] by instance, 0 for the background."""
    rows = [
        [
            1 + names.index(value)
            for names, value in zip(KINDS, (o.colour, o.shape, o.size), strict=True)
        ]
        for o in scene.objects
    ]
    return np.array([[0] * len(KINDS), *rows]).T


def draw_dense(config: FocusConfig, seed: int, first: int, count: int) -> DenseBatch:
    """Draw `count` training scenes from number `first` on, with their label maps."""
    images, classes = [], []
    for index in range(first, first + count):
        scene = random_scene(stream("dense", seed, index), "train")
        image, instance = render(scene, config.hierarchical.image_size)
        middle = instance[STRIDE // 2 :: STRIDE, STRIDE // 2 :: STRIDE]
        images.append(image)
        classes.append(class_table(scene)[:, middle])
    return DenseBatch(
        pictures=to_pictures(images, config),
        classes=torch.from_numpy(np.stack(classes)),
    )


class DenseHeads(nn.Module):
    """Classify every ConvNeXt scale, their sum, vanilla tokens and fused ones.

    Vanilla tokens also tell coarse colours. Fused tokens only gain from the hierarchical encoder
    what their cross-attention fetches: reconstruction alone hardly opens it.
    """

    def __init__(self, config: FocusConfig) -> None:
        super().__init__()
        dims, out = config.hierarchical.dims, sum(CLASSES)
        self.grid = config.vanilla.grid
        self.scales = nn.ModuleList(nn.Conv2d(dim, out, 1) for dim in dims)
        self.lateral = nn.ModuleList(nn.Conv2d(dim, 48, 1) for dim in dims)
        self.fine = nn.Sequential(nn.GELU(), nn.Conv2d(48, out, 3, padding=1))
        self.token = nn.Linear(config.vanilla.out_dim, out + 3 * PATCHES**2)
        self.fused = nn.Linear(config.fusion.dim, out)

    def forward(
        self, maps: Sequence[Tensor], low: Tensor, fused: Tensor, batch: DenseBatch
    ) -> dict[str, Tensor]:
        """Return the terms of ConvNeXt maps [B, C, ., .], vanilla and fused tokens [B, S, D]."""
        size = maps[0].shape[-2:]
        summed = torch.stack(
            [
                F.interpolate(layer(x), size, mode="bilinear")
                for layer, x in zip(self.lateral, maps, strict=True)
            ]
        ).sum(0)
        content = _content(batch)
        terms = {"dense": _dense_loss(self.fine(summed), content)}
        for name, layer, x in zip(SCALES, self.scales, maps, strict=True):
            terms[name] = 0.25 * _dense_loss(layer(x), content)
        tokens = self.token(low).transpose(1, 2).unflatten(2, self.grid)
        terms["vanilla"] = _dense_loss(tokens[:, : sum(CLASSES)], content)
        terms["fused"] = _dense_loss(
            self.fused(fused).transpose(1, 2).unflatten(2, self.grid), content
        )
        coarse = F.adaptive_avg_pool2d(
            batch.pictures.vanilla, (PATCHES * self.grid[0], PATCHES * self.grid[1])
        )
        told = F.pixel_shuffle(tokens[:, sum(CLASSES) :].float(), PATCHES)
        terms["vanilla_rgb"] = F.l1_loss(told, coarse)
        return terms


def _content(batch: DenseBatch) -> Tensor:
    """One-hot colour, shape and size maps, concatenated: [B, sum of CLASSES, h, w]."""
    maps = zip(batch.classes.unbind(1), CLASSES, strict=True)
    return torch.cat([F.one_hot(x, n) for x, n in maps], -1).permute(0, 3, 1, 2).float()


def _dense_loss(logits: Tensor, content: Tensor) -> Tensor:
    """Soft cross-entropies, summed, against the share of each class in a cell.

    Cells with objects are rare, so they weigh in proportion to how much object they hold.
    """
    share = F.adaptive_avg_pool2d(content, (logits.shape[-2], logits.shape[-1]))
    pairs = zip(
        torch.split(logits.float(), list(CLASSES), 1),
        torch.split(share, list(CLASSES), 1),
        strict=True,
    )
    weight = 1.2 - share[:, 0]
    loss = torch.stack([-(target * F.log_softmax(x, 1)).sum(1) for x, target in pairs]).sum(0)
    return (loss * weight).sum() / weight.sum()
