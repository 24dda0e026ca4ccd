"""Stage 0: what the fusion starts out looking at, and labels of the dense classifiers."""

import dataclasses

import numpy as np
import torch

from engine.data.scene_draw import render
from engine.data.scene_model import COLOURS, SHAPES, SIZES, random_scene, stream
from engine.runs import find_run
from engine.stages.dense import CLASSES, class_table, draw_dense
from engine.stages.foundation import look_here
from engine.stages.stage import Micro, find_stage
from focus.presets import focus_tiny
from focus.vision.fusion import FusionAttention

CONFIG = focus_tiny()
GRID = CONFIG.vanilla.grid


def reach(attention: FusionAttention) -> torch.Tensor:
    """Share of E's gradient at the middle cell that falls on each cell of res4, [rows, columns]."""
    generator = torch.Generator().manual_seed(1)
    low = torch.randn(4, GRID[0] * GRID[1], CONFIG.vanilla.out_dim, generator=generator)
    maps = [
        torch.randn(4, dim, 32 >> i, 32 >> i, generator=generator)
        for i, dim in enumerate(CONFIG.hierarchical.dims)
    ]
    maps[2].requires_grad_(True)
    attention(low, maps, GRID)[:, 3 * GRID[1] + 4].square().sum().backward()
    assert maps[2].grad is not None
    strength = maps[2].grad.norm(dim=1).mean(0)
    return strength / strength.sum()


def test_fused_tokens_start_out_with_their_own_place() -> None:
    torch.manual_seed(0)
    attention = FusionAttention(CONFIG.fusion, CONFIG.vanilla, CONFIG.hierarchical)
    torch.nn.init.normal_(attention.out.weight, std=0.1)
    assert reach(attention)[3, 4] < 0.1
    look_here(attention)
    found = reach(attention)
    assert found[3, 4] > 0.3 and found[3, 4] == found.max()


def test_labels_say_what_lies_where() -> None:
    scene = random_scene(stream("dense", 3, 5), "train")
    table = class_table(scene)
    assert table.shape == (3, 1 + len(scene.objects)) and not table[:, 0].any()
    for number, item in enumerate(scene.objects, start=1):
        colour, shape, size = table[:, number] - 1
        assert (tuple(COLOURS)[colour], SHAPES[shape], SIZES[size]) == (
            item.colour,
            item.shape,
            item.size,
        )
    batch = draw_dense(CONFIG, 3, 5, 1)
    _, instances = render(scene, CONFIG.hierarchical.image_size)
    assert np.array_equal(batch.classes[0].numpy(), table[:, instances[2::4, 2::4]])
    assert int(batch.classes.amax()) < max(CLASSES)


def test_every_map_and_token_is_told_what_it_shows() -> None:
    run = dataclasses.replace(find_run("focus_tiny_stage0_vision"), micro_batches=(("dense", 2),))
    stage = find_stage(run.stage)
    model = stage.build(run)
    batch = stage.batches(run, 0, Micro(number=0, task="dense", size=2))
    terms = stage.losses(model, batch, 0)
    assert set(terms) == {
        "dense",
        "res2",
        "res3",
        "res4",
        "res5",
        "vanilla",
        "vanilla_rgb",
        "fused",
    }
    terms["fused"].backward()
    grad = model.get_parameter("front.fusion.attention.out.weight").grad
    assert grad is not None and grad.abs().sum() > 0
