"""Projected visual tokens that say in words what they show: a linear fit to the token table.

Public vision towers come aligned with their language model (Qwen2-VL's was trained together with
Qwen2). Here the fit is in closed form: semantic features e of drawn scenes are regressed on the sum
of the embeddings of the words for what lies under each token,

    W' = (1 - P) W + k (R^T Y) (R^T R + l)^(-1),  P the projector on the span of the words

with R the centred features, Y the centred sums. What the projection told beside words, it still
tells. k sets the words' share.
"""

# N tokens, C channels of e, D LLM width, V words

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engine.data.scene_draw import render
from engine.data.scene_model import (
    BACKGROUND_COLOURS,
    COLOURS,
    SHAPES,
    SIZES,
    Scene,
    random_scene,
    stream,
)
from focus.inputs import to_pictures
from focus.model import FocusModel
from focus.vocabulary import Vocabulary

BATCH = 32
SHRINK = 1e-4  # of the mean variance, added to every direction of the regression
BACKDROP = "background"


def word_vectors(table: Tensor, vocabulary: Vocabulary) -> dict[str, Tensor]:
    """Return the centred embeddings [D] of the words that name objects and backgrounds."""
    backdrops = [word for name in BACKGROUND_COLOURS for word in name.split()]
    words = dict.fromkeys((*SHAPES, *SIZES, *COLOURS, *backdrops, BACKDROP))
    rows = {word: table[vocabulary.encode(" " + word)].mean(0).double() for word in words}
    mean = torch.stack(list(rows.values())).mean(0)
    return {word: row - mean for word, row in rows.items()}


def said(scene: Scene, words: dict[str, Tensor]) -> Tensor:
    """Return what the background (first row) and each object is called: [1 + objects, D]."""
    behind = scene.background.first.split()
    rows = [words[BACKDROP] + torch.stack([words[w] for w in behind]).mean(0)]
    rows += [words[o.colour] + words[o.shape] + words[o.size] for o in scene.objects]
    return torch.stack(rows)


def pooled_words(scene: Scene, words: dict[str, Tensor], grid: tuple[int, int]) -> Tensor:
    """Mean of the words over each token's cell: [rows * columns, D]."""
    fine = 4
    _, instances = render(scene, (grid[0] * fine, grid[1] * fine))
    shown = said(scene, words)[torch.from_numpy(instances.astype(np.int64))]
    cells = shown.view(grid[0], fine, grid[1], fine, -1).mean((1, 3))
    return cells.flatten(0, 1)


def ridge(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return weight [D, C] and bias [D] of the shrunk least-squares fit of [N, C] to [N, D]."""
    mean, level = inputs.mean(0), targets.mean(0)
    centred = inputs - mean
    moments = centred.T @ centred
    moments.diagonal().add_(SHRINK * moments.diagonal().mean())
    weight = torch.linalg.solve(moments, centred.T @ (targets - level)).T
    return weight, level - weight @ mean


@torch.no_grad()
def align(
    model: FocusModel, vocabulary: Vocabulary, *, count: int, share: float, seed: int = 0
) -> None:
    """Fit the projection of semantic features to words, over `count` drawn training scenes.

    share: length of the words' part of a projected token over the length of the rest.
    """
    config = model.config
    words = word_vectors(model.front.token_embedding.weight, vocabulary)
    scenes = [random_scene(stream("align", seed, i), "train") for i in range(count)]
    inputs, targets = [], []
    for first in range(0, count, BATCH):
        part: Sequence[Scene] = scenes[first : first + BATCH]
        images = [render(scene, config.hierarchical.image_size)[0] for scene in part]
        inputs.append(model.front.encode(to_pictures(images, config)).fused.e_img.flatten(0, 1))
        targets += [pooled_words(scene, words, config.vanilla.grid) for scene in part]
    features = torch.cat(inputs).double()
    weight, bias = ridge(features, torch.cat(targets))
    basis = torch.linalg.svd(torch.stack(list(words.values())).T, full_matrices=False).U
    project = model.front.fusion.project
    rest = torch.eye(len(basis), dtype=torch.float64) - basis @ basis.T
    old_weight, old_bias = rest @ project.weight.double(), rest @ project.bias.double()
    lengths = [(features @ w.T + b).norm(dim=1).mean() for w, b in
               ((old_weight, old_bias), (weight, bias))]  # fmt: skip
    k = share * lengths[0] / lengths[1]
    project.weight.copy_(old_weight + k * weight)
    project.bias.copy_(old_bias + k * bias)
