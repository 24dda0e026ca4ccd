"""Throw-away classifiers that teach encoders which colour and which shape lies where."""

# B batch, h w stride-4 grid, S vanilla tokens

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.data.scene_draw import render
from engine.data.scene_model import COLOURS, SHAPES, Scene, random_scene, stream
from focus.batch import Pictures, move
from focus.config import SCALES, FocusConfig
from focus.inputs import to_pictures

STRIDE = 4  # of the label maps
CLASSES = (len(COLOURS) + 1, len(SHAPES) + 1)  # 0 is background
PATCHES = 4  # coarse RGB patches that a vanilla token must tell, each way


@dataclass(frozen=True, kw_only=True)
class DenseBatch:
    """Pictures with what lies where: colour and shape per stride-4 cell, 0 = background."""

    pictures: Pictures
    colour: Tensor  # [B, h, w] int64
    shape: Tensor  # [B, h, w] int64

    def to(self, device: torch.device | str) -> DenseBatch:
        """Move every tensor."""
        return move(self, device)


def class_tables(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Return colour and shape class by instance number, 0 for the background."""
    colours, shapes = list(COLOURS), list(SHAPES)
    return (
        np.array([0] + [1 + colours.index(o.colour) for o in scene.objects]),
        np.array([0] + [1 + shapes.index(o.shape) for o in scene.objects]),
    )


def draw_dense(config: FocusConfig, seed: int, first: int, count: int) -> DenseBatch:
    """Draw `count` training scenes from number `first` on, with their label maps."""
    images, colours, shapes = [], [], []
    for index in range(first, first + count):
        scene = random_scene(stream("dense", seed, index), "train")
        image, instance = render(scene, config.hierarchical.image_size)
        middle = instance[STRIDE // 2 :: STRIDE, STRIDE // 2 :: STRIDE]
        colour, shape = class_tables(scene)
        images.append(image)
        colours.append(colour[middle])
        shapes.append(shape[middle])
    return DenseBatch(
        pictures=to_pictures(images, config),
        colour=torch.from_numpy(np.stack(colours)),
        shape=torch.from_numpy(np.stack(shapes)),
    )


class DenseHeads(nn.Module):
    """Classify every ConvNeXt scale, their sum, and every vanilla token's content and colours."""

    def __init__(self, config: FocusConfig) -> None:
        super().__init__()
        dims, out = config.hierarchical.dims, sum(CLASSES)
        self.grid = config.vanilla.grid
        self.scales = nn.ModuleList(nn.Conv2d(dim, out, 1) for dim in dims)
        self.lateral = nn.ModuleList(nn.Conv2d(dim, 48, 1) for dim in dims)
        self.fine = nn.Sequential(nn.GELU(), nn.Conv2d(48, out, 3, padding=1))
        self.token = nn.Linear(config.vanilla.out_dim, out + 3 * PATCHES**2)

    def forward(self, maps: Sequence[Tensor], low: Tensor, batch: DenseBatch) -> dict[str, Tensor]:
        """Return the loss terms of ConvNeXt maps [B, C, ., .] and vanilla tokens [B, S, D]."""
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
        coarse = F.adaptive_avg_pool2d(
            batch.pictures.vanilla, (PATCHES * self.grid[0], PATCHES * self.grid[1])
        )
        told = F.pixel_shuffle(tokens[:, sum(CLASSES) :].float(), PATCHES)
        terms["vanilla_rgb"] = F.l1_loss(told, coarse)
        return terms


def _content(batch: DenseBatch) -> Tensor:
    """One-hot colour and shape maps, concatenated: [B, colours + shapes, h, w]."""
    colour, shape = F.one_hot(batch.colour, CLASSES[0]), F.one_hot(batch.shape, CLASSES[1])
    return torch.cat([colour, shape], -1).permute(0, 3, 1, 2).float()


def _dense_loss(logits: Tensor, content: Tensor) -> Tensor:
    """Soft cross-entropy of colour plus shape against the share of each class in a cell.

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
