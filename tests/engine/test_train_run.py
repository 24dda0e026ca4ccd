"""Typed overrides of a run."""

from __future__ import annotations

from typing import Any

import pytest

from engine.run import Run, RunError, derive_seed, override
from engine.stages.stage import Micro, find_stage

RUN = Run(
    name="r",
    stage="toy",
    model="focus_tiny",
    steps=10,
    rates={"llm.*": 1e-3},
    micro_batches=(("a", 4), ("b", 2)),
)


@pytest.mark.parametrize(
    ("assignment", "field", "value"),
    [
        ("steps=7", "steps", 7),
        ("clip=2", "clip", 2.0),
        ("clip=1e-1", "clip", 0.1),
        ("precision=bf16", "precision", "bf16"),
        ("ema=0.99", "ema", 0.99),
        ("ema=none", "ema", None),
        ("init_from=12", "init_from", "12"),
        ("init_from=runs/a", "init_from", "runs/a"),
        ("betas=(0.8, 0.9)", "betas", (0.8, 0.9)),
        ('micro_batches=(("a", 1),)', "micro_batches", (("a", 1),)),
        ("rates.seg.*=1e-4", "rates", {"llm.*": 1e-3, "seg.*": 1e-4}),
        ("rates.llm.*=0", "rates", {"llm.*": 0.0}),
        ("extra.px=256", "extra", {"px": 256}),
        ("extra.kind=soft", "extra", {"kind": "soft"}),
    ],
)
def test_override_parses_by_the_field_type(assignment: str, field: str, value: Any) -> None:
    changed = getattr(override(RUN, assignment), field)
    assert changed == value
    assert type(changed) is type(value)


def test_override_reaches_nested_records_and_keeps_the_rest() -> None:
    changed = override(RUN, "parallel.tp=2", "parallel.sequence_parallel=true")
    assert (changed.parallel.tp, changed.parallel.sequence_parallel) == (2, True)
    assert changed.steps == RUN.steps
    assert RUN.parallel.tp == 1


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("steps", "path.to.field=value"),
        ("stepz=1", "no field 'stepz' here; fields are .*steps"),
        ("steps=many", "steps: int expected, got 'many'"),
        ("steps=1.5", "int expected"),
        ("steps=true", "int expected"),
        ("steps=0", "steps must be at least 1"),
        ("precision=fp4", "'fp32' or 'bf16' or 'fp8' expected"),
        ("parallel.tpp=2", "no field 'tpp'"),
        ("steps.x=1", "has no fields of its own"),
        ("rates.llm.*=fast", "float expected"),
        ("micro_batches=((1, 2),)", "expected"),
    ],
)
def test_bad_override_says_what_was_expected(assignment: str, message: str) -> None:
    with pytest.raises(RunError, match=message):
        override(RUN, assignment)


def test_sample_numbers_are_unique_over_ranks_and_steps() -> None:
    seen: list[int] = []
    for step in range(3):
        for rank in range(2):
            for number, (task, size) in enumerate(RUN.micro_batches):
                micro = Micro(number=number, task=task, size=size, rank=rank, ranks=2)
                first = micro.first_sample(RUN, step)
                seen.extend(range(first, first + size))
    assert sorted(seen) == list(range(3 * 2 * 6))


def test_seeds_differ_by_part_and_repeat() -> None:
    assert derive_seed(1, "a", 2) == derive_seed(1, "a", 2)
    assert len({derive_seed(1, 23), derive_seed(12, 3), derive_seed(1, 2, 3)}) == 3


def test_unknown_stage_lists_what_exists() -> None:
    with pytest.raises(RunError, match="no stage 'nonsense'; stages are"):
        find_stage("nonsense")
