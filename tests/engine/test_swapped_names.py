"""Records that say another's names: what is asked stays, what is said carries no loss."""

from __future__ import annotations

import dataclasses

import torch

from engine.data.scene_tasks import sample
from engine.data.words import tiny_vocabulary
from engine.runs import find_run
from engine.stages.multimodal import MultimodalStage, hush, swap_names
from engine.stages.stage import Micro
from focus.batch import IGNORE
from focus.inputs import collate
from focus.presets import focus_tiny

CONFIG = focus_tiny()


def test_swapped_records_keep_what_is_asked_and_take_the_next_ones_names() -> None:
    records = [sample("referring", "train", 0, i, 128) for i in range(8)]
    found, swapped = swap_names(records, 0.5, 3)
    assert 0 < sum(swapped) < 8
    for number, (old, new, wrong) in enumerate(zip(records, found, swapped, strict=True)):
        assert new.text == old.text and new.masks is old.masks
        assert new.answer == (records[(number + 1) % 8].answer if wrong else old.answer)
    assert swap_names(records, 0.0, 3) == (records, [False] * 8)
    for task in ("vqa", "editing", "generation", "class"):
        others = [sample(task, "train", 0, i, 64) for i in range(3)]  # type: ignore[arg-type]
        assert swap_names(others, 1.0, 0) == (others, [False] * 3)


def test_what_swapped_records_say_carries_no_loss() -> None:
    records = [sample("interactive", "train", 0, i, 128) for i in range(3)]
    batch = collate(records, CONFIG, tiny_vocabulary(CONFIG), seed=0)
    hushed = hush(batch, [True, False, True])
    assert bool((hushed.labels[[0, 2]] == IGNORE).all())
    assert torch.equal(hushed.labels[1], batch.labels[1])
    assert torch.equal(hushed.input_ids, batch.input_ids)
    assert hush(batch, [False] * 3) is batch


def test_a_stage_swaps_the_share_that_its_run_asks_for() -> None:
    run = find_run("focus_tiny_stage3")
    extra = {**run.extra, "shards": "live", "swap_names": 1.0}
    run = dataclasses.replace(run, extra=extra)
    micro = Micro(number=0, task="referring", size=3)
    batch = MultimodalStage().batches(run, 0, micro)
    assert bool((batch.labels[1:] == IGNORE).all()) and batch.masks is not None
    assert bool((batch.labels[0] != IGNORE).any())  # a rank without any name would lack a term
    plain = MultimodalStage().batches(dataclasses.replace(run, extra={"shards": "live"}), 0, micro)
    assert plain.masks is not None and torch.equal(batch.masks, plain.masks)
    assert bool((plain.labels != IGNORE).any())
