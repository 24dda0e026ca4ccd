"""Sharded checkpoints of a cluster to one file of whole tensors, and back; one process does either.

A split model can be loaded at any layout, so the layout of one process serves to read them all.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from engine.run import Run, from_json, to_json
from engine.sectioned import sectioned
from engine.stages.stage import find_stage
from parallel.checkpoint import (
    CheckpointError,
    CheckpointFolder,
    CheckpointMismatch,
    verify_manifest,
)
from parallel.layout import ParallelConfig
from parallel.mesh import open_mesh

if TYPE_CHECKING:
    from parallel.split_engine import SplitEngine

ONE = ParallelConfig(trunk="megatron")


def find_checkpoint(source: Path, step: int | None = None) -> Path:
    """Return the checkpoint folder that a run folder or a checkpoint folder means.

    Raises `CheckpointError` when there is none, `CheckpointCorrupt` when its files are damaged.
    """
    found = source
    if not (source / "state.json").is_file():
        folder = CheckpointFolder(source / "checkpoints")
        steps = folder.steps()
        if not steps or (step is not None and step not in steps):
            wanted = "a checkpoint" if step is None else f"step {step}"
            raise CheckpointError(
                f"{source}: {wanted} expected, there are steps {steps}; give a run folder or a "
                "checkpoint folder"
            )
        found = folder.path(steps[0] if step is None else step)
    verify_manifest(found)
    return found


@contextmanager
def _engine(run: Run) -> Iterator[SplitEngine]:
    from engine.train import build_engine
    from parallel.split_engine import SplitEngine

    run = dataclasses.replace(run, parallel=ONE, ema=None)
    stage = sectioned(find_stage(run.stage))
    with open_mesh(ONE) as mesh:
        engine = build_engine(run, stage, mesh)
        assert isinstance(engine, SplitEngine)
        yield engine


def from_shards(source: Path, out: Path, step: int | None = None) -> Path:
    """Write the whole model of a checkpoint as one safetensors file and return its path.

    A checkpoint of a model that was never split already holds such a file, which is copied.
    """
    found = find_checkpoint(source, step)
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(out.name + ".tmp")
    if (found / "model.safetensors").is_file():
        shutil.copyfile(found / "model.safetensors", unfinished)
    else:
        run = from_json(json.loads((found / "state.json").read_text())["run"])
        with _engine(dataclasses.replace(run, init_from=None)) as engine:
            engine.load_weights(found)
            engine.export(unfinished)
    unfinished.replace(out)
    return out


def to_shards(run: Run, weights: Path, folder: Path) -> Path:
    """Write `weights` as step 0 of `run` in the run folder; return the checkpoint folder.

    Any layout goes on from it, with a fresh optimizer. Raises `CheckpointMismatch` when the folder
    already holds steps or the weights are of another model.
    """
    checkpoints = CheckpointFolder(folder / "checkpoints")
    if checkpoints.steps():
        raise CheckpointMismatch(
            f"{folder} already holds the steps {checkpoints.steps()}; choose another folder"
        )
    with _engine(dataclasses.replace(run, init_from=str(weights))) as engine:

        def write(path: Path) -> None:
            engine.save_weights(path)
            state = {"step": 0, "data_size": 1, "run": to_json(run), "stage": {}}
            (path / "state.json").write_text(json.dumps(state, indent=1) + "\n")

        return checkpoints.save(0, write)
