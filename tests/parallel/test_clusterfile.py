"""Sharded checkpoints of a real stage to one file and back; what a finished run leaves behind."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from parallel.layout import ParallelConfig
from tests.parallel import ranks
from tests.parallel.test_sectioned import narrow

pytestmark = pytest.mark.distributed
TP2 = ParallelConfig(tp=2)


def trained(rank: int, folder: Path, layout: ParallelConfig, until: int) -> str:
    from engine.train import train

    stream = io.StringIO()
    run = narrow(3, parallel=layout, steps=2, save_every=1)
    train(run, folder, until=until, stream=stream)
    return stream.getvalue()


def converted(rank: int, cut: Path, out: Path, weights: Path, back: Path) -> str:
    """Shards to a file; the weights to shards and to a file again; a second conversion refused."""
    from engine.clusterfile import from_shards, to_shards
    from parallel.checkpoint import CheckpointMismatch

    run = narrow(3)
    from_shards(cut, out / "sharded.safetensors")
    to_shards(run, weights, back)
    from_shards(back, out / "again.safetensors", 0)
    with pytest.raises(CheckpointMismatch, match=r"already holds the steps \[0\]"):
        to_shards(run, weights, back)
    return str(json.loads((back / "checkpoints" / "step-0" / "state.json").read_text())["step"])


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in other)


def test_shards_become_one_file_and_shards_again(tmp_path: Path) -> None:
    from engine.clusterfile import find_checkpoint
    from parallel.checkpoint import CheckpointError, write_manifest

    run, cut, back = tmp_path / "run", tmp_path / "cut", tmp_path / "back"
    ranks.run(2, trained, run, TP2, 2)
    assert not (run / "checkpoints" / "step-1" / "model.safetensors").exists()
    whole = run / "checkpoints" / "step-2" / "model.safetensors"
    # As a cluster leaves it in the middle of a run: shards alone.
    copy = cut / "checkpoints" / "step-2"
    shutil.copytree(whole.parent, copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors, named in"):
        find_checkpoint(cut)
    write_manifest(copy)
    assert find_checkpoint(cut) == find_checkpoint(copy) == copy
    with pytest.raises(CheckpointError, match=r"step 7 expected, there are steps \[2\]"):
        find_checkpoint(cut, 7)
    ranks.run(1, converted, cut, tmp_path, whole, back)
    expected = load_file(whole)
    assert "trunk.layers.0.self_attn.q_proj.weight" in expected
    assert same(load_file(tmp_path / "sharded.safetensors"), expected)
    assert same(load_file(tmp_path / "again.safetensors"), expected)
    said: Any = ranks.run(2, trained, back, TP2, 1)
    assert "resuming after step 0" in said[0]
    first, again = (
        json.loads((folder / "log.jsonl").read_text().splitlines()[0]) for folder in (run, back)
    )
    assert again["step"] == first["step"] == 1
    assert again["loss"] < first["loss"]  # the same samples, two steps of learning later
