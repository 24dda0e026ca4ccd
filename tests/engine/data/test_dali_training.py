"""Every tiny stage, trained from shards through DALI: the same losses, weights and figures."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from engine.data import cache
from engine.data.dali import DaliDecoder, dali_problem
from engine.data.words import tiny_vocabulary
from engine.evaluate.tasks import evaluate
from engine.run import Run
from engine.runs import TINY_SEQUENCE
from engine.stages.stage import load_initial
from engine.train import train
from focus.api import Focus
from focus.model import FocusModel
from focus.presets import focus_tiny

STEPS = 3


def shortened(run: Run, loader: str, before: Path | None) -> Run:
    """A few steps of a run, one small micro-batch of every task, in one process."""
    tasks = dict.fromkeys(task for task, _ in run.micro_batches)
    extra = {**run.extra, "loader": loader, "tasks_per_step": len(tasks), "align": 0, "whiten": 0}
    return dataclasses.replace(
        run,
        steps=STEPS,
        warmup=0,
        micro_batches=tuple((task, 2) for task in tasks),
        save_every=STEPS,
        panel_every=0,
        workers=0,
        precision="fp32",
        init_from=None if before is None else str(before),
        extra=extra,
    )


def trained(folder: Path, loader: str) -> tuple[list[dict[str, float]], Path]:
    """The terms of every step of every stage in sequence, and the last weights."""
    terms, before = [], None
    for make in TINY_SEQUENCE:
        run = shortened(make(), loader, before)
        before = train(run, folder / run.name).checkpoint
        lines = (folder / run.name / "log.jsonl").read_text().splitlines()
        terms += [json.loads(line)["terms"] for line in lines]
    assert before is not None
    return terms, before / "model.safetensors"


@pytest.mark.slow
@pytest.mark.skipif(dali_problem() is not None, reason=str(dali_problem()))
def test_all_tiny_stages_train_the_same_through_dali(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(cache.FOLDER, str(tmp_path / "cache"))
    figures, logs, decoded = [], [], []
    decode = DaliDecoder.decode
    monkeypatch.setattr(DaliDecoder, "decode", lambda *a: decoded.append(1) or decode(*a))
    for loader in ("pil", "dali"):
        assert not decoded
        terms, weights = trained(tmp_path / loader, loader)
        model = FocusModel(focus_tiny())
        load_initial(model, weights)
        ready = Focus(model, tiny_vocabulary(focus_tiny()))
        figures.append(evaluate(ready, num=4, tasks=("referring", "vqa", "tokenizer")))
        logs.append(terms)
    assert decoded
    assert len(logs[0]) == STEPS * len(TINY_SEQUENCE)
    assert logs[0] == logs[1]
    assert figures[0] == figures[1]
    assert torch.isfinite(torch.tensor([sum(t.values()) for t in logs[1]])).all()
