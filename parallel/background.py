"""Saving while training goes on: a thread writes what was copied to host memory.

One save passes through four phases. Staging, on the main thread of every process, copies the state;
a thread of every process writes its files; then, on the main threads again, the processes talk to
each other; last, a thread of the leader hashes every file, flushes, renames and points `latest`.
Threads touch files alone: every message between processes is sent by a main thread, in one order.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from parallel.checkpoint import CheckpointFolder, Staged, nothing, together
from parallel.mesh import Mesh


@dataclass(frozen=True, kw_only=True)
class _Flight:
    step: int
    staged: Staged
    task: Future[None]  # writing, then publishing
    publishing: bool = False


class BackgroundSaver:
    """Saves into one folder, one save at a time; every process calls every method alike.

    A failure is raised as `CheckpointError` by the next call of any method but `abandon`; earlier
    checkpoints stay. A thread dies with its process, so nothing writes after a kill.
    """

    def __init__(self, folder: CheckpointFolder, mesh: Mesh) -> None:
        self.folder = folder
        self.mesh = mesh
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._flight: _Flight | None = None

    @property
    def step(self) -> int | None:
        """The step that is being saved."""
        return None if self._flight is None else self._flight.step

    def save(self, step: int, stage: Callable[[Path], Staged]) -> None:
        """Copy a state with `stage(folder)` and begin to write it; waits for an earlier save."""
        self.wait()
        made: list[Staged] = []
        with self.folder.guarded(step, self.mesh):
            unfinished = self.folder.begin(step, self.mesh)
            together(self.mesh, lambda: made.append(stage(unfinished)))
        task = self._pool.submit(made[0].write)
        self._flight = _Flight(step=step, staged=made[0], task=task)

    def poll(self) -> None:
        """Move on if all processes can, else return at once."""
        if self._flight is not None and not self.mesh.any(not self._flight.task.done()):
            self._advance()

    def wait(self) -> None:
        """Return when the save in flight is published."""
        while self._flight is not None:
            self._advance()

    def abandon(self) -> None:
        """Let this process's thread end and forget the save; sends no messages."""
        if self._flight is not None:
            wait([self._flight.task])
            self._flight = None
        self._pool.shutdown()

    def _advance(self) -> None:
        """Wait for this process's thread and begin the next phase."""
        flight = self._flight
        assert flight is not None
        self._flight = None  # on a failure the save is over
        with self.folder.guarded(flight.step, self.mesh):
            together(self.mesh, flight.task.result)
            if flight.publishing:
                return
            together(self.mesh, flight.staged.finish)
        unfinished = self.folder.unfinished(flight.step)
        publish = partial(self.folder.publish, flight.step, unfinished)
        # Without `staged`, so that its copies are freed now.
        task = self._pool.submit(publish if self.mesh.leader else nothing)
        self._flight = _Flight(step=flight.step, staged=Staged(), task=task, publishing=True)
