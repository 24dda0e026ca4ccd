"""What a training stage is. One file per stage in this folder, ending in `STAGE = ...()`."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from engine.run import Run, RunError, derive_seed
from focus.batch import Batch
from parallel.checkpoint import CheckpointFolder, CheckpointMismatch
from parallel.sections import Handover, TableHead
from parallel.tensors import read_tensors

if TYPE_CHECKING:
    from focus.model import Front, Heads


@dataclass(frozen=True, kw_only=True)
class Micro:
    """One micro-batch of one step: its task and size, and which rank of how many asks for it."""

    number: int
    task: str
    size: int
    rank: int = 0
    ranks: int = 1

    @property
    def index(self) -> int:
        """Number among the micro-batches of all ranks; two ranks with one equal one with two."""
        return self.number * self.ranks + self.rank

    def seed(self, run: Run, step: int) -> int:
        """The seed of everything random in this micro-batch."""
        return derive_seed(run.seed, run.name, step, self.index)

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


class SectionStage(Stage):
    """A stage of the whole model, written along its sections so that a pipeline can cut it.

    Write `prepare` and `head_losses` instead of `losses`. Everything trainable before the trunk is
    reached through `Front.encode` and `Front.embed`, which the engine calls.
    """

    def prepare(self, front: Front, batch: Batch, step: int) -> tuple[Batch, dict[str, Tensor]]:
        """Return the batch and extra tensors that need the front but no gradient.

        The place to tokenise target pictures; called without gradients where the front lives, and
        what it returns is sent to the heads.
        """
        return batch, {}

    def head_losses(self, heads: Heads, state: Handover, step: int) -> dict[str, Tensor]:
        """Return the weighted terms of one micro-batch; language losses by `state.language`."""
        raise NotImplementedError

    def losses(self, model: nn.Module, batch: Any, step: int) -> dict[str, Tensor]:
        """Run the three sections on one process."""
        whole: Any = model
        seed = torch.initial_seed()
        with torch.no_grad():
            batch, extras = self.prepare(whole.front, batch, step)
        torch.manual_seed(seed)
        hidden, features = whole(batch)
        torch.manual_seed(derive_seed(seed, "heads"))
        state = Handover(
            batch=batch,
            hidden=hidden,
            maps=None if features is None else features.maps,
            language=TableHead(whole.heads.lm_head.weight),
            extras=extras,
        )
        return self.head_losses(whole.heads, state, step)


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


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return read_tensors(path)
    except SafetensorError as error:
        raise CheckpointMismatch(
            f"{path}: a whole safetensors file expected, got {error}; copy it again, or use an "
            "earlier checkpoint"
        ) from error


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
    saved = _read(path)
    averaged = path.with_name("ema.safetensors")
    if ema and path.name == "model.safetensors" and averaged.is_file():
        saved.update(_read(averaged))
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
