"""Signals at the worst of moments: while a checkpoint is being written, and twice."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from engine.train import Outcome
from parallel.checkpoint import verify_manifest
from tests.engine.test_train import ToyStage, go, losses, toy_run


class Signalled(ToyStage):
    """Sends signals to its own process while step 4's checkpoint is being written."""

    def __init__(self, *numbers: int) -> None:
        super().__init__()
        self.numbers = list(numbers)

    def state(self) -> dict[str, Any]:
        while self.numbers:
            os.kill(os.getpid(), self.numbers.pop())
        return super().state()


@pytest.mark.parametrize(
    ("numbers", "requeue"),
    [
        ((signal.SIGTERM,), True),
        ((signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM), True),
        ((signal.SIGINT,), False),
    ],
    ids=["once", "three", "person"],
)
def test_a_signal_during_a_save_lets_it_finish_and_loses_nothing(
    tmp_path: Path, numbers: tuple[int, ...], requeue: bool
) -> None:
    cut, uncut = tmp_path / "cut", tmp_path / "uncut"
    go(toy_run(), uncut)
    found: Outcome = go(toy_run(), cut, Signalled(*numbers))
    assert (found.step, found.stopped, found.requeue) == (4, True, requeue)
    assert found.checkpoint == cut / "checkpoints" / "step-4"
    verify_manifest(found.checkpoint)
    assert not go(toy_run(), cut).stopped
    assert losses(cut) == losses(uncut)
