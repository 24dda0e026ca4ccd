"""Where a run's records come from: shards, of the built-in world unless `extra["shards"]` differs.

`extra["shards"]` is a folder of shards; "cache" (the default): the built-in world, kept as shards
in the user's cache folder (`engine/data/cache.py`); "live" or none: the same scenes, drawn anew.
With `extra["direct"]` questions name objects by their looks alone, and are always drawn anew.
"""

from __future__ import annotations

import typing

from engine.data.cache import open_cache
from engine.data.clips import VIDEO, draw_pairs
from engine.data.feed import CACHE, decoder_of, open_feed
from engine.data.records import Record, Task
from engine.data.scene_model import DIRECT
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

    The data seed is `extra["data_seed"]`, by default the run's own. From a folder of shards the
    records come in the order of a mixture, broken ones missing; the built-in world's are the same
    whether they are read or drawn. Task "video" gives two frames of each of `micro.size` clips,
    always drawn anew where they are the built-in world's.
    Raises: DataError when the shards hold nothing readable.
    """
    direct = bool(run.extra.get("direct", False))
    feed = None if direct else open_feed(run)
    if feed is not None:
        return feed.records(run, step, micro)
    if micro.task == VIDEO:
        return draw_pairs(run, step, micro, config_of(run).hierarchical.image_size)
    task = typing.cast(Task, micro.task)
    seed = int(run.extra.get("data_seed", run.seed))
    size = config_of(run).hierarchical.image_size
    first = micro.first_sample(run, step)
    if direct:
        return [sample(task, DIRECT, seed, first + i, size) for i in range(micro.size)]
    if run.extra.get("shards", CACHE) == CACHE:
        kept = open_cache(seed, size)
        return kept.records(task, first, micro.size, decoder_of(run))
    return [sample(task, "train", seed, first + i, size) for i in range(micro.size)]
