"""The built-in world: procedural scenes with exact ground truth for every task, at any size.

Everything is a pure function of (split, seed, index); see `scene_model` for what a scene is,
`scene_draw` for its pixels, `scene_query` for what words mean, and `scene_tasks` for samples.

    record = sample("referring", "train", seed=0, index=7, size=(128, 128))
"""

from __future__ import annotations

from collections.abc import Iterator

from engine.data.records import TASKS
from engine.data.scene_answer import FREE_KINDS
from engine.data.scene_draw import render
from engine.data.scene_model import (
    BACKGROUND_COLOURS,
    COLOURS,
    HELD_OUT,
    SHAPES,
    SPLITS,
    Background,
    DataError,
    Scene,
    SceneObject,
    Split,
    random_scene,
    stream,
)
from engine.data.scene_sheet import write_samples
from engine.data.scene_tasks import Draft, Requested, draft, requested, sample
from engine.data.scene_video import Clip, clip

__all__ = [
    "BACKGROUND_COLOURS",
    "COLOURS",
    "FREE_KINDS",
    "HELD_OUT",
    "SHAPES",
    "SPLITS",
    "Background",
    "Clip",
    "DataError",
    "Draft",
    "Requested",
    "Scene",
    "SceneObject",
    "Split",
    "clip",
    "draft",
    "random_scene",
    "render",
    "requested",
    "sample",
    "stream",
    "texts",
    "write_samples",
]


def texts(split: str, seed: int, num: int) -> Iterator[str]:
    """Yield `num` lines of the world's language, going round the tasks: text, classes, answer.

    Never rendered, so cheap. "<region>" is left out: it is not a word.
    """
    for index in range(num):
        plan, _ = draft(TASKS[index % len(TASKS)], split, seed, index // len(TASKS))
        parts = (plan.text, ", ".join(plan.classes), plan.answer)
        line = " ".join(part for part in parts if part)
        yield " ".join(line.replace("<region>", " ").split())
