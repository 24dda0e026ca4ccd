"""Packed rows change the work, never the result."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from engine.data.scenes import sample
from engine.data.source import config_of
from engine.data.words import tiny_vocabulary
from engine.run import Run
from engine.runs import find_run
from engine.stages.stage import Micro, find_stage
from focus.errors import ShapeError
from focus.inputs import collate
from focus.llm import Qwen2Trunk
from focus.packing import plan_rows, run_packed
from focus.presets import focus_tiny


@pytest.fixture(scope="module")
def trunk() -> Qwen2Trunk:
    torch.manual_seed(0)
    return Qwen2Trunk(dataclasses.replace(focus_tiny().llm, num_layers=2)).double()


def test_rows_are_filled_and_nothing_overlaps() -> None:
    lengths = [5, 3, 9, 2, 2, 6, 1, 8, 4]
    places = plan_rows(lengths, 10).tolist()
    taken = {
        (row, start + n)
        for (row, start), size in zip(places, lengths, strict=True)
        for n in range(size)
    }
    assert len(taken) == sum(lengths) == 40
    assert {row for row, _ in taken} == {0, 1, 2, 3}  # 40 tokens in 4 rows of 10: no padding
    assert max(column for _, column in taken) == 9
    with pytest.raises(ShapeError, match="at least 9 tokens expected, got 8"):
        plan_rows(lengths, 8)


def test_packed_states_and_gradients_are_those_of_single_rows(trunk: Qwen2Trunk) -> None:
    torch.manual_seed(1)
    lengths = [4, 11, 7, 2, 1]
    x = torch.randn(5, 11, trunk.config.dim, dtype=torch.float64, requires_grad=True)
    valid = torch.arange(11) < torch.tensor(lengths)[:, None]
    alone = trunk(x)[valid]
    packed = run_packed(trunk, x, plan_rows(lengths, 13), torch.tensor(lengths))
    assert packed.shape == x.shape and packed[~valid].abs().max() == 0
    assert torch.allclose(packed[valid], alone, atol=1e-12, rtol=1e-9)
    weight = torch.randn_like(alone)
    (one,) = torch.autograd.grad((alone * weight).sum(), x, retain_graph=True)
    (two,) = torch.autograd.grad((packed[valid] * weight).sum(), x)
    assert torch.allclose(one[valid], two[valid], atol=1e-12, rtol=1e-9)


def test_documents_do_not_see_one_another(trunk: Qwen2Trunk) -> None:
    lengths = torch.tensor([4, 5, 3])
    places = plan_rows(lengths.tolist(), 12)
    assert places[:, 0].tolist() == [0, 0, 0]  # one row holds all three
    x = torch.randn(3, 5, trunk.config.dim, dtype=torch.float64)
    before = run_packed(trunk, x, places, lengths)
    other = x.clone()
    other[1] += 1
    after = run_packed(trunk, other, places, lengths)
    assert torch.equal(before[0], after[0]) and torch.equal(before[2], after[2])
    assert not torch.allclose(before[1], after[1])


@pytest.mark.parametrize("task", ["referring", "editing"])
def test_a_stage_with_packing_has_the_same_losses(task: str) -> None:
    run: Run = find_run("focus_tiny_stage3")
    run = dataclasses.replace(run, micro_batches=((task, 3),), init_from=None)
    found = []
    for pack in (0, 512):
        own = dataclasses.replace(run, extra={**run.extra, "tasks_per_step": 1, "pack": pack})
        stage = find_stage(run.stage)
        torch.manual_seed(0)
        model = stage.build(own)
        batch = stage.batches(own, 0, Micro(number=0, task=task, size=3))
        assert (batch.places is None) == (pack == 0)
        torch.manual_seed(2)
        terms = stage.losses(model.eval(), batch, 0)
        found.append({name: float(term.detach()) for name, term in terms.items()})
    # Which points a mask loss samples depends on the last bits of how uncertain they are.
    assert found[0] == pytest.approx(found[1], rel=5e-4)


def test_packing_saves_positions() -> None:
    run = find_run("focus_tiny_stage3")
    config = config_of(run)
    records = [sample("class", "train", 0, index, 128) for index in range(8)]
    batch = collate(records, config, tiny_vocabulary(config), pack=8 * config.llm.max_length)
    assert batch.places is not None
    rows = int(batch.places[:, 0].max()) + 1
    width = int((batch.places[:, 1] + batch.lengths).max())
    assert rows * width < batch.input_ids.numel()
