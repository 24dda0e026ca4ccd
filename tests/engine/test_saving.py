"""Checkpoints that a thread writes: equal bytes, one at a time, and no way to lose one."""

from __future__ import annotations

import errno
import signal
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from engine.run import override
from parallel import checkpoint
from parallel.background import BackgroundSaver
from parallel.checkpoint import CheckpointError, CheckpointFolder, Staged, verify_manifest
from parallel.engine import NonFiniteLoss
from parallel.layout import ParallelConfig
from parallel.mesh import open_mesh
from parallel.tensors import write_tensors
from tests.engine.test_signals import Signalled
from tests.engine.test_train import (
    ToyStage,
    copy_tree,
    die_while_saving,
    go,
    in_child,
    losses,
    toy_run,
    wait,
)

BACKGROUND = override(toy_run(), "async_save=true")


@pytest.fixture(scope="module")
def uncut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uncut")
    go(toy_run(), folder)
    return folder


def slow_writer(monkeypatch: pytest.MonkeyPatch, seconds: float) -> list[str]:
    """Make every file slow to write; return the list of the threads that wrote."""
    threads: list[str] = []
    original = write_tensors

    def write(*arguments: Any) -> None:
        threads.append(threading.current_thread().name)
        time.sleep(seconds)
        original(*arguments)

    monkeypatch.setattr("parallel.engine.write_tensors", write)
    return threads


def test_bytes_equal_those_of_a_synchronous_save(
    uncut: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps go on while files are written, so what is written must be a copy."""
    threads = slow_writer(monkeypatch, 0.1)
    go(BACKGROUND, tmp_path)
    assert threads[0].startswith("checkpoint")
    assert threads[-1] == threading.main_thread().name  # nothing is left to do meanwhile
    assert losses(tmp_path) == losses(uncut)
    for step in (8, 12):
        mine, theirs = (f / f"checkpoints/step-{step}" for f in (tmp_path, uncut))
        verify_manifest(mine)
        for name in ("model", "optimizer", "ema"):
            file = f"{name}.safetensors"
            assert (mine / file).read_bytes() == (theirs / file).read_bytes(), (step, name)
    left = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert left == ["latest", "step-12", "step-8"]


def test_steps_are_done_while_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 4's files are held back until step 7 is under way."""
    gate = threading.Event()
    original = write_tensors
    found: list[list[int]] = []

    def write(*arguments: Any) -> None:
        assert gate.wait(60)
        original(*arguments)

    class Opening(ToyStage):
        def losses(self, model: Any, batch: Any, step: int) -> Any:
            if step == 7 and not gate.is_set():
                found.append(CheckpointFolder(tmp_path / "checkpoints").steps())
                gate.set()
            return super().losses(model, batch, step)

    monkeypatch.setattr("parallel.engine.write_tensors", write)
    go(BACKGROUND, tmp_path, Opening(), until=8)
    assert found == [[]]
    assert CheckpointFolder(tmp_path / "checkpoints").steps() == [8, 4]


def test_kill_at_every_moment_of_a_save_in_the_background_loses_nothing(
    uncut: Path, tmp_path: Path
) -> None:
    go(toy_run(), tmp_path / "start", until=4)
    moments = 0
    for moment in range(1, 60):
        folder = tmp_path / str(moment)
        copy_tree(tmp_path / "start", folder)
        pid = in_child(partial(die_while_saving, folder, moment, BACKGROUND, 12))
        code = wait(pid)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        moments += 1
        go(BACKGROUND, folder)
        assert losses(folder) == losses(uncut)
        left = {p.name for p in (folder / "checkpoints").iterdir()}
        assert left - {"step-4"} == {"latest", "step-12", "step-8"}  # 4: died while removing it
    assert moments >= 20  # both saves, of steps 8 and 12


@pytest.mark.parametrize("slow", [0.0, 0.3], ids=["at once", "late"])
def test_an_error_of_the_writer_ends_the_run_and_keeps_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: float
) -> None:
    """At once: the next step reports it. Late: the last save does, which waits for it."""
    go(toy_run(), tmp_path, until=4)

    def fail(path: Path, *_: Any) -> None:
        time.sleep(slow)
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("parallel.engine.write_tensors", fail)
    with pytest.raises(CheckpointError, match=r"no room to save step 8 .* earlier checkpoints"):
        go(BACKGROUND, tmp_path)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-4"]


def test_an_error_while_publishing_is_reported_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(folder: Path) -> None:
        raise OSError(errno.EIO, "Input/output error", str(folder))

    monkeypatch.setattr(checkpoint, "write_manifest", fail)
    with pytest.raises(CheckpointError, match="could not save step 4"):
        go(BACKGROUND, tmp_path, until=8)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_signal_waits_for_the_save_in_flight(
    uncut: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal comes while step 4 is staged; its files are written later."""
    slow_writer(monkeypatch, 0.1)
    found = go(BACKGROUND, tmp_path, Signalled(signal.SIGTERM))
    assert (found.step, found.stopped) == (4, True)
    verify_manifest(found.checkpoint)
    go(BACKGROUND, tmp_path)
    assert losses(tmp_path) == losses(uncut)


def test_a_broken_loss_still_publishes_the_save_in_flight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_writer(monkeypatch, 0.1)
    with pytest.raises(NonFiniteLoss):
        go(BACKGROUND, tmp_path, ToyStage(bad_step=4))
    assert CheckpointFolder(tmp_path / "checkpoints").steps() == [4]


def test_one_save_at_a_time(tmp_path: Path) -> None:
    gate = threading.Event()
    running: list[int] = []
    most: list[int] = []

    def stage(path: Path) -> Staged:
        def write() -> None:
            running.append(1)
            most.append(len(running))
            assert gate.wait(60)
            (path / "file").write_text("x")
            running.pop()

        return Staged(write=write)

    with open_mesh(ParallelConfig()) as mesh:
        folder = CheckpointFolder(tmp_path, keep=0)
        saver = BackgroundSaver(folder, mesh)
        saver.save(1, stage)
        saver.poll()
        assert (saver.step, folder.steps()) == (1, [])
        gate.set()
        saver.save(2, stage)
        assert folder.steps()[-1] == 1
        saver.wait()
        assert saver.step is None
        saver.abandon()
    assert folder.steps() == [2, 1]
    assert most == [1, 1]
    assert (tmp_path / "latest").read_text() == "step-2\n"
