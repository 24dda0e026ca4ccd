"""The built-in world as shards: the scenes that a run would draw, rendered once.

Pictures are stored as PNG, so a record read back is the record that was drawn, to the last pixel.
The plan (`world.json`, beside the shards) says which samples; writing them is a conversion like any
other: parallel, and going on where it stopped.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image as Pillow

from engine.data.convert.format import Format, Lazy, Options, read_json
from engine.data.records import Record, Task
from engine.data.scene_model import DataError
from engine.data.scenes import sample
from engine.data.schema import Item
from engine.data.shards import write_atomic
from engine.run import Run
from focus.presets import CONFIGS

PLAN = "world.json"
FASTEST = 1  # PNG compression level: flat colours compress well at any


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Samples 0 .. tasks[task] - 1 of each task, of one seed, at one size (height, width)."""

    seed: int
    size: tuple[int, int]
    tasks: Mapping[str, int]

    def write(self, folder: Path) -> None:
        """Write world.json. Raises: DataError when the folder holds another plan."""
        told = {"seed": self.seed, "size": list(self.size), "tasks": dict(self.tasks)}
        path = folder / PLAN
        if path.exists() and read_json(path) != told:
            raise DataError(
                f"{folder} holds other scenes ({path.read_text().strip()}); choose another folder"
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, (json.dumps(told) + "\n").encode())

    @classmethod
    def read(cls, folder: Path) -> Plan:
        """Read world.json. Raises: DataError when it is not a plan."""
        told: Any = read_json(folder / PLAN)
        try:
            height, width = map(int, told["size"])
            tasks = {str(task): int(count) for task, count in told["tasks"].items()}
            if not set(tasks) <= set(get_args(Task)) or min(tasks.values(), default=0) < 1:
                raise ValueError(f"tasks of {get_args(Task)}, each with a count, got {tasks}")
            return cls(seed=int(told["seed"]), size=(height, width), tasks=tasks)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{folder / PLAN}: seed, size and tasks expected: {error}") from error


def plan_of(run: Run, most: int | None = None) -> Plan:
    """As many scenes of each task as the run draws on one rank, at most `most` of each.

    Raises: DataError for a run whose data are not records (the foundation's label maps and texts).
    """
    counts: dict[str, int] = {}
    per_step = int(run.extra.get("tasks_per_step", len(run.micro_batches)))
    rounds = -(-run.steps * per_step // len(run.micro_batches))
    for task, size in run.micro_batches:
        if task not in get_args(Task):
            raise DataError(
                f"{run.name}: tasks of {', '.join(get_args(Task))} expected, got {task!r}; this "
                "run draws label maps or texts, which are no records"
            )
        counts[task] = counts.get(task, 0) + rounds * size
    if most is not None:
        counts = {task: min(count, most) for task, count in counts.items()}
    seed = int(run.extra.get("data_seed", run.seed))
    frame = CONFIGS[run.model]().hierarchical.image_size
    return Plan(seed=seed, size=frame, tasks=counts)


def join_plans(plans: Sequence[Plan]) -> Plan:
    """What several runs draw. Raises: DataError when their seeds or sizes differ."""
    first = plans[0]
    if any((plan.seed, plan.size) != (first.seed, first.size) for plan in plans):
        raise DataError("runs of one data seed and one picture size expected; write two folders")
    tasks: dict[str, int] = {}
    for plan in plans:
        for task, count in plan.tasks.items():
            tasks[task] = max(count, tasks.get(task, 0))
    return Plan(seed=first.seed, size=first.size, tasks=tasks)


def scenes(root: Path, options: Options) -> Iterator[Lazy]:
    """The plan's samples, tasks in turn so that every shard holds all of them."""
    plan = Plan.read(root)
    split = options.split or "train"
    for index in range(max(plan.tasks.values())):
        for task, count in plan.tasks.items():
            if index < count:
                make = partial(draw, task, split, plan.seed, index, plan.size)
                yield Lazy(f"{task}-{index}", make)


FORMAT = Format(name="world", layout=f"{PLAN}: seed, size and samples per task", convert=scenes)


def draw(task: Any, split: str, seed: int, index: int, size: tuple[int, int]) -> Item:
    """Draw one sample of the built-in world."""
    return to_item(sample(task, split, seed, index, size))


def to_item(record: Record) -> Item:
    """A record as a sample to store, its pictures without loss."""
    pairs = ((record.text, record.answer), *record.turns) if record.turns else ()
    return Item(
        key=record.id,
        task=record.task,
        kind=record.kind,
        text=record.text,
        answer=record.answer,
        classes=record.classes,
        turns=tuple(t for q, a in pairs for t in (("user", q), ("assistant", a))),
        image=None if record.image is None else encode_png(record.image),
        target=None if record.target is None else encode_png(record.target),
        masks=record.masks,
        labels=record.labels,
        regions=record.regions,
        region_kinds=record.region_kinds,
        source="built-in world",
    )


def encode_png(image: npt.NDArray[np.uint8]) -> bytes:
    """Encode a picture [H, W, 3] as PNG."""
    buffer = io.BytesIO()
    Pillow.fromarray(image).save(buffer, "PNG", compress_level=FASTEST)
    return buffer.getvalue()
