"""Projected visual tokens that say in words what they show: a linear fit to the token table.

Public vision towers come aligned with their language model (Qwen2-VL's was trained together with
Qwen2). Here the fit is in closed form: semantic features e of drawn scenes are regressed on the sum
of the embeddings of the words for what lies under each token,

    W' = (1 - P) W + k (R^T Y) (R^T R + l)^(-1),  P the projector on the span of the words

with R the centred features, Y the centred sums. What the projection told beside words, it still
tells. k sets the words' share.
"""

# N tokens, C channels of e, D LLM width, V text rows of the token table

from __future__ import annotations

from collections.abc import Sequence

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
from engine.data.scene_tasks import coverage
from engine.data.words import text_rows
from focus.inputs import to_pictures
from focus.model import FocusModel
from focus.vocabulary import Vocabulary

BATCH = 32
SHRINK = 1e-4  # of the mean variance, added to every direction of the regression
BACKDROP = "background"


def _rows(word: str, vocabulary: Vocabulary) -> list[int]:
    """Rows of the table that write a word."""
    return vocabulary.encode(" " + word)


def _names(scene: Scene) -> list[list[str]]:
    """Return what the background (first) and each object is called, word by word."""
    backdrop = [BACKDROP, *scene.background.first.split()]
    return [backdrop, *([o.colour, o.shape, o.size] for o in scene.objects)]


def spoken(scene: Scene, vocabulary: Vocabulary, grid: tuple[int, int]) -> Tensor:
    """Return how much of each text row a token says: [rows * columns, V] float32.

    Every word for what lies in a token's cell counts by the share of the cell that it covers.
    """
    names = _names(scene)
    said = torch.zeros(len(names), text_rows(vocabulary))
    for row, words in enumerate(names):
        for word in words:
            found = _rows(word, vocabulary)
            said[row, found] += 1 / len(found)
    return torch.from_numpy(coverage(scene, grid)) @ said


def centred_words(table: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Return the text rows [V, D] (fp64) less the mean of those that name things."""
    backdrops = [word for name in BACKGROUND_COLOURS for word in name.split()]
    words = dict.fromkeys((*SHAPES, *SIZES, *COLOURS, *backdrops, BACKDROP))
    rows = sorted({row for word in words for row in _rows(word, vocabulary)})
    text = table[: text_rows(vocabulary)].double()
    return text - text[rows].mean(0)


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
    config, grid = model.config, model.config.vanilla.grid
    words = centred_words(model.front.token_embedding.weight, vocabulary)
    scenes = [random_scene(stream("align", seed, i), "train") for i in range(count)]
    inputs, told = [], []
    for first in range(0, count, BATCH):
        part: Sequence[Scene] = scenes[first : first + BATCH]
        images = [render(scene, config.hierarchical.image_size)[0] for scene in part]
        inputs.append(model.front.encode(to_pictures(images, config)).fused.e_img.flatten(0, 1))
        told += [spoken(scene, vocabulary, grid) for scene in part]
    features, counts = torch.cat(inputs).double(), torch.cat(told).double()
    weight, bias = ridge(features, counts @ words)
    used = words[counts.any(0)]
    basis = torch.linalg.svd(used.T, full_matrices=False).U
    rest = torch.eye(len(basis), dtype=torch.float64) - basis @ basis.T
    project = model.front.fusion.project
    old_weight, old_bias = rest @ project.weight.double(), rest @ project.bias.double()
    lengths = [(features @ w.T + b).norm(dim=1).mean() for w, b in
               ((old_weight, old_bias), (weight, bias))]  # fmt: skip
    k = share * lengths[0] / lengths[1]
    project.weight.copy_(old_weight + k * weight)
    project.bias.copy_(old_bias + k * bias)
