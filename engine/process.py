"""A training as a process among others: its signals, its random state, its folder."""

from __future__ import annotations

import fcntl
import random
import signal
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.run import RunError
from parallel.mesh import Mesh


def seed_everything(seed: int) -> None:
    """Seed torch, numpy and random."""
    torch.manual_seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002  (libraries draw from the global state)
    random.seed(seed)


class StopSignals:
    """Which signals asked for an end so far; calling it says whether any did."""

    def __init__(self) -> None:
        self.caught: list[int] = []

    def __call__(self) -> bool:
        """Whether any signal asked for an end."""
        return bool(self.caught)

    @property
    def interrupted(self) -> bool:
        """Whether a person did (SIGINT)."""
        return signal.SIGINT in self.caught


@contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """Turn SIGTERM, SIGINT and SIGUSR1 (Slurm's warning) into a flag while the block runs."""
    stop = StopSignals()

    def remember(number: int, _frame: types.FrameType | None) -> None:
        stop.caught.append(number)

    before: dict[signal.Signals, Any] = {}
    try:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            before[number] = signal.signal(number, remember)
    except ValueError:
        pass  # not the main thread: whoever started it decides when to stop
    try:
        yield stop
    finally:
        for restored, handler in before.items():
            signal.signal(restored, handler)


def ignore_signals(_worker: int) -> None:
    """Leave a signal to the process group to the training process, which finishes its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


@contextmanager
def own_folder(out_dir: Path, mesh: Mesh) -> Iterator[None]:
    """Hold the run folder's lock, so that two trainings never write into one folder."""
    if not mesh.leader:
        yield
        return
    out_dir.mkdir(parents=True, exist_ok=True)
    with (out_dir / "lock").open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunError(f"another training is writing to {out_dir}; choose another") from error
        yield
