"""Where a run's records come from: the built-in world, or shards (`extra["shards"]`)."""

from __future__ import annotations

import typing

from engine.data.feed import open_feed
from engine.data.records import Record, Task
from engine.data.scenes import sample
from engine.run import Run
from engine.stages.stage import Micro
from focus.config import FocusConfig
from focus.presets import CONFIGS


def config_of(run: Run) -> FocusConfig:
    """Return the model config that a run names."""
    return CONFIGS[run.model]()


def draw_records(run: Run, step: int, micro: Micro) -> list[Record]:
    """Return the training records of one micro-batch: a pure function of its arguments.

    The data seed is `extra["data_seed"]`, by default the run's own. With `extra["shards"]` the
    records are read from there, in the order of a mixture; broken ones are missing.
    Raises: DataError when the shards hold nothing readable.
    """
    feed = open_feed(run)
    if feed is not None:
        return feed.records(run, step, micro)
    task = typing.cast(Task, micro.task)
    seed = int(run.extra.get("data_seed", run.seed))
    size = config_of(run).hierarchical.image_size
    first = micro.first_sample(run, step)
    return [sample(task, "train", seed, first + i, size) for i in range(micro.size)]
