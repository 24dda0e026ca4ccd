"""Weights in half precision: half the memory, the same answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from engine.data.scenes import clip, sample
from focus import Box, Focus, MaskRegion
from focus.pretrained import parameters_in


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / max(1, (a | b).sum()))


def test_parameters_are_born_in_the_wanted_precision_and_buffers_are_not() -> None:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)
            self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
            self.count = nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False)
            self.register_buffer("table", torch.ones(2))

    with parameters_in(torch.bfloat16):
        part = Part()
    assert {n: t.dtype for n, t in part.state_dict().items()} == {
        "linear.weight": torch.bfloat16,
        "linear.bias": torch.bfloat16,
        "frozen": torch.bfloat16,
        "count": torch.int64,
        "table": torch.float32,
    }
    assert not part.frozen.requires_grad and part.linear.weight.requires_grad
    with parameters_in(None):
        assert Part().linear.weight.dtype == torch.float32
    assert Part().linear.weight.dtype == torch.float32  # the hook is gone


@pytest.fixture(scope="module")
def both() -> tuple[Focus, Focus]:
    full = Focus.from_pretrained("focus-tiny")
    half = Focus.from_pretrained("focus-tiny", dtype=torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in half.model.parameters())
    assert half.model.front.tokenizer.pixel_codes.codebook.dtype == torch.float32
    return full, half


def test_half_precision_answers_as_full_precision_does(both: tuple[Focus, Focus]) -> None:
    record = sample("referring", "val", 0, 3)
    photo = record.image
    assert photo is not None
    box = Box(10, 10, 60, 60)

    def answers(model: Focus) -> dict[str, Any]:
        return {
            "referring": model.segment(photo, record.text).masks[0],
            "interactive": model.segment(photo, regions=[box]).masks[0],
            # Whether a second, faint star passes the threshold is up to the last bits.
            "class": set(model.segment(photo, "red circle, star", task="class").labels),
            "vqa": model.chat(photo, "how many objects are there?"),
        }

    full, half = map(answers, both)
    assert iou(full["referring"], half["referring"]) > 0.9
    assert iou(full["interactive"], half["interactive"]) > 0.9
    assert (full["class"], full["vqa"]) == (half["class"], half["vqa"])


def test_half_precision_draws_and_follows(both: tuple[Focus, Focus]) -> None:
    found = clip("val", 0, 1, 3)
    drawn, tracked = zip(
        *(
            (
                np.asarray(model.generate("a red circle", steps=2)).astype(float),
                model.track(found.frames, regions=[MaskRegion(found.masks()[1])], start=1),
            )
            for model in both
        ),
        strict=True,
    )
    assert np.abs(drawn[0] - drawn[1]).mean() < 4  # of 255 levels
    for one, other in zip(tracked[0].masks[0], tracked[1].masks[0], strict=True):
        assert iou(one, other) > 0.9
