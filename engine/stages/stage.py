"""What a training stage is. One file per stage in this folder, ending in `STAGE = ...()`."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from engine.run import Run, RunError, derive_seed
from parallel.checkpoint import CheckpointFolder, CheckpointMismatch
from parallel.tensors import read_tensors


@dataclass(frozen=True, kw_only=True)
class Micro:
    """One micro-batch of one step: its task and size, and which rank of how many asks for it."""

    number: int
    task: str
    size: int
    rank: int = 0
    ranks: int = 1

    def seed(self, run: Run, step: int) -> int:
        """The seed of everything random in this micro-batch."""
        return derive_seed(run.seed, run.name, step, self.number, self.rank)

    def first_sample(self, run: Run, step: int) -> int:
        """Number of this micro-batch's first sample, counting every step, rank and micro-batch.

        Assumes the run's own `micro_batches`; two micro-batches never share a sample number.
        """
        sizes = [size for _, size in run.micro_batches]
        before = sum(sizes[: self.number]) * self.ranks
        return step * sum(sizes) * self.ranks + before + self.rank * self.size


class Stage(Protocol):
    """A training stage. Subclass it; `build`, `batches` and `losses` must be written."""

    def build(self, run: Run) -> nn.Module:
        """Return the model with its initial weights loaded (see `load_initial`)."""
        ...

    def batches(self, run: Run, step: int, micro: Micro) -> Any:
        """Return one micro-batch of CPU tensors.

        A pure function of its arguments, called in data worker processes; torch, numpy and random
        are seeded with `micro.seed(run, step)` before the call.
        """
        ...

    def losses(self, model: nn.Module, batch: Any, step: int) -> dict[str, Tensor]:
        """Return the already weighted scalar terms of one micro-batch; their sum is minimised."""
        ...

    def micro_batches(self, run: Run, step: int) -> tuple[tuple[str, int], ...]:
        """Return the (task, batch size) pairs of one step."""
        return run.micro_batches

    def panel(self, model: nn.Module, step: int) -> npt.NDArray[np.uint8] | None:
        """Return a picture [H, W, 3] of what the model does now, or None."""
        return None

    def state(self) -> dict[str, Any]:
        """Return JSON values to keep in the checkpoint beside the model."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` returned."""
        return None


def find_stage(name: str) -> Stage:
    """Return `STAGE` of `engine/stages/<name>.py`; raises `RunError`."""
    module = f"engine.stages.{name}"
    if not name.isidentifier() or importlib.util.find_spec(module) is None:
        known = sorted(p.stem for p in Path(__file__).parent.glob("*.py"))
        known = [k for k in known if k not in ("__init__", "stage")]
        raise RunError(f"no stage {name!r}; stages are {', '.join(known)}")
    stage = getattr(importlib.import_module(module), "STAGE", None)
    if stage is None:
        raise RunError(f"{module} defines no STAGE")
    found: Stage = stage() if isinstance(stage, type) else stage
    return found


def find_weights(source: str, beside: Path) -> Path:
    """Return the safetensors file that `source` means.

    `source` is a file, a checkpoint folder, a run folder (its newest checkpoint), a folder with
    model.safetensors, or the name of a run folder inside `beside`. An averaged copy (ema) is merged
    by `load_initial`. Raises `RunError`.
    """
    for path in (Path(source), beside / source):
        if path.is_file():
            return path
        if (path / "model.safetensors").is_file():
            return path / "model.safetensors"
        folder = CheckpointFolder(path / "checkpoints")
        if folder.steps():
            return folder.path(folder.steps()[0]) / "model.safetensors"
    raise RunError(
        f"init_from={source!r}: expected a safetensors file, a checkpoint, a run folder or the "
        f"name of a finished run in {beside}; train that run first or give a path"
    )


def load_initial(
    model: nn.Module, source: str | Path | None, *, new: tuple[str, ...] = (), ema: bool = True
) -> None:
    """Copy weights of an earlier run into `model`; None does nothing.

    Names of the model that match a glob of `new` may be missing; names that the model lacks are
    ignored. The averaged weights beside the file replace the raw ones when `ema`.
    Raises `CheckpointMismatch`.
    """
    if source is None:
        return
    path = Path(source)
    saved = read_tensors(path)
    averaged = path.with_name("ema.safetensors")
    if ema and path.name == "model.safetensors" and averaged.is_file():
        saved.update(read_tensors(averaged))
    own = model.state_dict()
    wrong = [n for n in own if n in saved and own[n].shape != saved[n].shape]
    stored = {t.data_ptr() for n, t in own.items() if n in saved}
    missing = [
        n
        for n, t in own.items()
        if n not in saved
        and t.data_ptr() not in stored
        and not any(fnmatchcase(n, glob) for glob in new)
    ]
    if wrong or missing or not stored:
        raise CheckpointMismatch(
            f"{path} does not fit this model: missing {missing[:5]}, other shapes {wrong[:5]}; "
            "use weights of the same config, or name new parts in load_initial(new=...)"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            if name in saved:
                tensor.copy_(saved[name])
