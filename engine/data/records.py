"""One training or evaluation sample, before tokenisation: the schema every data source yields.

Synthetic scenes, WebDataset shards and converted public datasets all produce `Record`; everything
after it (prompts, collation, metrics) knows nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Task = Literal[
    "class",  # class-based segmentation: condition = candidate class names
    "referring",  # referring segmentation: condition = expression
    "reasoning",  # reasoning segmentation: condition = indirect description
    "interactive",  # segmentation by regions (click, scribble, box, mask)
    "generation",  # text to image
    "editing",  # image + instruction (+ regions) -> changed region and edited image
    "vqa",  # question answering, captioning, dialogue
]
TASKS: tuple[Task, ...] = (
    "class",
    "referring",
    "reasoning",
    "interactive",
    "generation",
    "editing",
    "vqa",
)
RegionKind = Literal["click", "scribble", "box", "mask"]
REGION_KINDS: tuple[RegionKind, ...] = ("click", "scribble", "box", "mask")

Image = npt.NDArray[np.uint8]  # [H, W, 3] RGB
Mask = npt.NDArray[np.bool_]  # [H, W]


@dataclass(frozen=True, kw_only=True)
class Record:
    """One sample of one task.

    task: one of `TASKS`.
    text: S_C, the condition: expression, description, caption to draw, edit instruction, question;
        empty for class and interactive segmentation. An editing text may contain "<region>" where
        a region prompt stands in for words ("make <region> blue").
    answer: what the model says in words: the answer to a question, or the names of the objects it
        is about to segment, in prompt order of first appearance ("red circle, blue star").
    classes: candidate class names (class task), else empty.
    image: the input picture; None for generation.
    masks, labels: target masks and, for each, its candidate number: index into `classes`
        (class task), into `regions` (interactive), 0 otherwise. For editing: the one region that
        changes.
    regions, region_kinds: prompt regions as binary masks and how the user gave each.
    target: the picture to produce (generation, editing).
    objects: for a frame of a clip, the number of each mask's object, the same in all frames; frames
        of one clip share their id. Empty otherwise.
    turns: further (question, answer) pairs of a dialogue that begins with text and answer.
    """

    id: str
    task: Task
    text: str = ""
    answer: str = ""
    classes: tuple[str, ...] = ()
    image: Image | None = None
    masks: tuple[Mask, ...] = ()
    labels: tuple[int, ...] = ()
    objects: tuple[int, ...] = ()
    regions: tuple[Mask, ...] = ()
    region_kinds: tuple[RegionKind, ...] = ()
    target: Image | None = None
    turns: tuple[tuple[str, str], ...] = ()
    kind: str = ""  # finer kind for reports: "left_of", "recolour", "count", ...
