"""Pairs of frames of one clip, their objects numbered: what object embeddings learn from.

Task "video" of a run's `micro_batches`, used when `extra["track_weight"]` is set. From shards the
loader gives both frames (`loader.Settings.pairs`); here they are drawn.
"""

# N objects, H W picture

from __future__ import annotations

from typing import Literal

import numpy as np

from engine.data.records import Record
from engine.data.scene_model import stream
from engine.data.scene_video import Clip, clip
from engine.run import Run
from engine.stages.stage import Micro

VIDEO = "video"
FRAMES = 12  # of a drawn clip: far enough apart for objects to cross and to hide


def draw_pair(seed: int, index: int, size: tuple[int, int]) -> tuple[Record, Record]:
    """Two frames of clip `index`, asked by the classes of all its objects.

    Objects that a frame hides have no mask there.
    """
    found = clip("train", seed, index, FRAMES, size)
    rng = stream("pair", "train", seed, index)
    first, second = rng.choice(FRAMES, 2, replace=False).tolist()
    names = [f"{item.colour} {item.shape}" for item in found.scenes[0].objects]
    classes = tuple(str(name) for name in rng.permutation(list(dict.fromkeys(names))))
    return _frame(found, first, names, classes), _frame(found, second, names, classes)


def _frame(found: Clip, number: int, names: list[str], classes: tuple[str, ...]) -> Record:
    """One frame as a sample of class-based segmentation."""
    masks = [np.asarray(found.instances[number] == i + 1) for i in range(len(names))]
    shown = [(classes.index(names[i]), i) for i, mask in enumerate(masks) if mask.any()]
    shown.sort()  # names are said in the order of the prompt
    task: Literal["class"] = "class"
    return Record(
        id=found.id,
        task=task,
        answer=", ".join(classes[label] for label, _ in shown),
        classes=classes,
        image=found.frames[number],
        masks=tuple(masks[i] for _, i in shown),
        labels=tuple(label for label, _ in shown),
        objects=tuple(i for _, i in shown),
        kind=VIDEO,
    )


def draw_pairs(run: Run, step: int, micro: Micro, size: tuple[int, int]) -> list[Record]:
    """The frames of one micro-batch of the built-in world: two for each of `micro.size` clips."""
    seed = int(run.extra.get("data_seed", run.seed))
    first = micro.first_sample(run, step)
    pairs = [draw_pair(seed, first + number, size) for number in range(micro.size)]
    return [record for pair in pairs for record in pair]
