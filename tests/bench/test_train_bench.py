"""What the training benchmark attributes to each part, and how it compares contenders."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.train import GOAL, MEGATRON, PARTS, PEER, PLAIN, STAGES, Spans, plan_run, report, watch
from engine.workload import per_step


def test_time_goes_to_the_part_that_ran_forward_and_backward() -> None:
    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, seconds: float) -> torch.Tensor:
            ctx.seconds = seconds
            time.sleep(seconds)
            return x * 2

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
            time.sleep(ctx.seconds)
            return gradient * 2, None

    front = SimpleNamespace(embed=lambda x: Slow.apply(x, 0.05))  # type: ignore[no-untyped-call]
    trunk = SimpleNamespace(forward=lambda x: Slow.apply(x, 0.1))  # type: ignore[no-untyped-call]
    spans = Spans(torch.device("cpu"))
    embed, forward, backward = front.embed, trunk.forward, torch.autograd.backward
    targets = [
        (front, "embed", "front", "front"),
        (trunk, "forward", "trunk", "trunk"),
        (torch.autograd, "backward", "heads", ""),
    ]
    with watch(spans, targets):
        spans.last = spans.now()
        hidden = trunk.forward(front.embed(torch.ones(2, requires_grad=True)))
        time.sleep(0.03)
        torch.autograd.backward(hidden.sum())
        time.sleep(0.02)
        spans.mark("data")
    assert (front.embed, trunk.forward, torch.autograd.backward) == (embed, forward, backward)
    found = spans.seconds
    assert found["front"] >= 0.1
    assert found["trunk"] >= 0.2
    assert 0.03 <= found["heads"] < found["trunk"]
    assert 0.02 <= found["optimizer"] < found["trunk"]
    assert sum(found.values()) == pytest.approx(sum(found[p] for p in PARTS))


def test_report_gives_the_megatron_road_over_the_peer() -> None:
    rows = [
        {
            "stage": "s",
            "contender": name,
            "samples": 4,
            "tokens": 800,
            "precision": "fp32",
            "device": "here",
            "step_ms": wall,
            "step_cpu_ms": cpu,
            "samples_per_s": 1.0,
            "tokens_per_s": 200.0,
            "shares": dict.fromkeys(PARTS, 1.0),
        }
        for name, wall, cpu in (
            (PEER, 200.0, 100.0),
            (PLAIN, 150.0, 90.0),
            (MEGATRON, 230.0, 105.0),
        )
    ]
    last = report(rows)[-1]
    assert last == f"  megatron road over the peer: 1.15 wall, 1.05 cpu (goal {GOAL})"
    last = report(rows[:2])[-1]  # stage 1 has no trunk to split
    assert last == f"  our engine over the peer: 0.75 wall, 0.90 cpu (goal {GOAL})"


@pytest.mark.parametrize("model", ["focus_tiny", "focus_300m"])
def test_every_stage_of_a_model_can_be_measured(model: str) -> None:
    for stage in STAGES:
        run = plan_run(stage, model, 2, 2, "fp32")
        assert run.init_from is None
        mixture = per_step(run)
        assert all(size == 2 for _, size in mixture)
        if stage in "34":
            assert mixture[0][0] == "editing"
            assert len(mixture) == 2
