"""What a training saves beside the engine's tensors, when it does, and how it goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from engine.run import RunError, to_json
from parallel.background import BackgroundSaver
from parallel.checkpoint import Staged
from parallel.engine import NonFiniteLoss

if TYPE_CHECKING:
    from engine.train import Training


class Saver:
    """Saves one training; with `run.async_save` the saves in the middle of it run in a thread.

    As a context it sees to it that a save in flight is published where all processes leave alike,
    and forgotten where one fails alone. Every process calls every method alike.
    """

    def __init__(self, training: Training, saved: int) -> None:
        self.training = training
        self.saved = saved  # newest step that is or is being saved, -1 for none
        self.background: BackgroundSaver | None = None
        if training.run.async_save:
            self.background = BackgroundSaver(training.folder, training.mesh)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.background is None:
            return
        try:
            if error is None or isinstance(error, NonFiniteLoss) or self.training.mesh.size == 1:
                self.background.wait()
        finally:
            self.background.abandon()

    def poll(self) -> None:
        """Move a save in flight on; raises `CheckpointError` when it failed."""
        if self.background is not None:
            self.background.poll()

    def save(self, step: int) -> None:
        """Publish a checkpoint of step N, or begin to; raises `CheckpointError`."""
        self.saved = step
        if self.background is None:
            _save(self.training, step)
        else:
            self.background.save(step, lambda path: _stage(self.training, step, path, copy=True))

    def finish(self, step: int) -> None:
        """Return when a checkpoint of step N is published, the last of this training."""
        if self.background is not None:
            self.background.wait()
        if self.saved != step:
            self.saved = step
            _save(self.training, step)


def _save(training: Training, step: int) -> None:
    """Write and publish now; at the run's end a split model is written whole as well."""

    def write(path: Path) -> None:
        staged = _stage(training, step, path)
        staged.write()
        staged.finish()
        if step >= training.run.steps:  # for the next stage and for inference
            training.engine.export(path / "model.safetensors")

    training.folder.save(step, write, training.mesh)


def _stage(training: Training, step: int, path: Path, *, copy: bool = False) -> Staged:
    """Return what writes step N: weights, optimizer, counters, the run itself."""
    training.ledger.settle(step)
    staged = training.engine.stage(path, copy=copy)
    if not training.mesh.leader:
        return staged
    state = {
        "step": step,
        "data_size": training.mesh.data_size,
        "run": to_json(training.run),
        "stage": training.stage.state(),
        "data": training.ledger.state(),
        "skipped": training.meter.skipped,
    }
    text = json.dumps(state, indent=1) + "\n"

    def write() -> None:
        staged.write()
        (path / "state.json").write_text(text)

    return Staged(write=write, finish=staged.finish)


def restore(training: Training, resume: bool, say: Callable[[str], None]) -> int:
    """Load the newest sound checkpoint; return the step to do next."""
    folder, stage = training.folder, training.stage
    if not resume and folder.steps():
        raise RunError(
            f"{folder.folder} already holds checkpoints of steps {folder.steps()}; resume, or "
            "remove them, or choose another folder"
        )

    def read(path: Path) -> dict[str, Any]:
        training.engine.load(path)
        state: dict[str, Any] = json.loads((path / "state.json").read_text())
        stage.load_state(state["stage"])
        return state

    if training.mesh.leader:
        folder.clean()
    found = folder.load(read, say, training.mesh)
    if found is None:
        return 0
    step, state = found
    training.meter.skipped = int(state.get("skipped", 0))
    training.ledger.resume(state.get("data", {}), step, int(state["data_size"]))
    new = json.loads(json.dumps(to_json(training.run)))
    changed = sorted(k for k in new if new[k] != state["run"].get(k, new[k]))
    say(f"resuming after step {step}" + (f"; changed since: {', '.join(changed)}" * bool(changed)))
    return step
