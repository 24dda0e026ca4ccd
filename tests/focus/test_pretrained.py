"""Models on disk: shards, migration, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from focus.config import FORMAT_VERSION, ConfigError, focus_tiny, to_json
from focus.errors import CheckpointMismatch
from focus.migration import STEPS, migrate_config, migrate_name
from focus.pretrained import SkipRandom, find_model, load_weights, read_config, save_model
from focus.shards import ShardWriter, Weights


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    made = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.Linear(32, 16, bias=False))
    return made


@pytest.mark.parametrize("limit", [10**9, 2500, 1])
def test_shards_hold_the_same_model(tmp_path: Path, limit: int) -> None:
    saved, loaded = net(0), net(1)
    save_model(tmp_path / "m", saved, focus_tiny(), max_shard_bytes=limit)
    files = sorted(p.name for p in (tmp_path / "m").glob("*.safetensors"))
    assert len(files) == {10**9: 1, 2500: 2, 1: 8}[limit]
    if limit != 10**9:
        index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(saved.state_dict())
        sizes = [t.numel() * t.element_size() for t in saved.state_dict().values()]
        assert index["metadata"]["total_size"] == sum(sizes)
    for path in (tmp_path / "m", tmp_path / "m" / "model.safetensors"):
        load_weights(loaded, path)
        for name, tensor in saved.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name


def test_saving_again_leaves_no_old_shards(tmp_path: Path) -> None:
    save_model(tmp_path / "m", net(0), focus_tiny(), max_shard_bytes=1)
    (tmp_path / "m" / "notes.txt").write_text("kept")
    save_model(tmp_path / "m", net(1), focus_tiny())
    names = sorted(p.name for p in (tmp_path / "m").iterdir())
    assert names == ["config.json", "model.safetensors", "notes.txt"]


def test_transformers_reads_our_index(tmp_path: Path) -> None:
    from transformers import ConvNextConfig, ConvNextModel

    config = ConvNextConfig(depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 8, 8])
    model = ConvNextModel(config)
    config.save_pretrained(tmp_path)
    writer = ShardWriter(tmp_path, max_bytes=3000)
    for name, tensor in model.state_dict().items():
        writer.add(name, tensor)
    assert len(writer.finish()) > 2
    again = ConvNextModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


def test_broken_shards_are_named(tmp_path: Path) -> None:
    save_model(tmp_path / "m", net(0), focus_tiny(), max_shard_bytes=2500)
    first, second = sorted((tmp_path / "m").glob("*.safetensors"))
    whole = second.read_bytes()
    second.write_bytes(whole[:-40])
    with pytest.raises(CheckpointMismatch, match=f"{second.name}: a whole safetensors file"):
        load_weights(net(1), tmp_path / "m")
    second.unlink()
    with pytest.raises(CheckpointMismatch, match=r"listed in .*index\.json, but there is no such"):
        load_weights(net(1), tmp_path / "m")
    second.write_bytes(first.read_bytes())
    with pytest.raises(CheckpointMismatch, match="expected according to"):
        load_weights(net(1), tmp_path / "m")


def test_skipped_initialisation_leaves_only_what_is_loaded(tmp_path: Path) -> None:
    saved = net(0)
    save_model(tmp_path / "m", saved, focus_tiny())
    state = torch.random.get_rng_state()
    with SkipRandom():
        loaded = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.Linear(32, 16, bias=False))
    assert torch.equal(torch.random.get_rng_state(), state)  # nothing was drawn
    assert torch.equal(loaded[1].running_var, torch.ones(32))  # constants are there
    load_weights(loaded, tmp_path / "m")
    for name, tensor in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_a_tensor_cannot_come_twice(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, max_bytes=1)
    writer.add("a", torch.zeros(2))
    writer.add("b", torch.zeros(2))
    with pytest.raises(CheckpointMismatch, match="a comes twice"):
        writer.add("a", torch.zeros(2))


def test_pickles_are_refused_with_advice(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointMismatch, match="convert it where you trust it"):
        find_model(tmp_path)
    with pytest.raises(CheckpointMismatch, match=r"model\.bin is a pickle"):
        Weights.open(tmp_path / "model.bin")


def test_version_1_models_are_migrated(tmp_path: Path) -> None:
    class Old(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.ModuleDict({"segment": nn.ModuleDict({"score": nn.ModuleDict()})})
            self.heads["segment"]["score"]["classes"] = nn.Linear(2, 3)

    model = Old()
    save_model(tmp_path / "m", model, focus_tiny())
    path = tmp_path / "m" / "model.safetensors"
    old = {name.replace("classes", "class"): t for name, t in load_file(path).items()}
    save_file(old, path)
    with pytest.raises(CheckpointMismatch, match="unknown"):
        load_weights(Old(), tmp_path / "m")
    config = tmp_path / "m" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "format_version": 1}))
    loaded = Old()
    load_weights(loaded, tmp_path / "m")
    assert torch.equal(
        loaded.heads["segment"]["score"]["classes"].weight, old["heads.segment.score.class.weight"]
    )
    assert read_config(tmp_path / "m") == focus_tiny()


def test_there_is_a_step_from_every_version() -> None:
    assert sorted(STEPS) == list(range(1, FORMAT_VERSION))
    assert migrate_name("heads.segment.condition.region.bias", 1) == (
        "heads.segment.condition.regions.bias"
    )
    assert migrate_name("heads.segment.condition.regions.bias", 1) == (
        "heads.segment.condition.regions.bias"
    )
    for version in (0, FORMAT_VERSION + 1, "2", None):
        with pytest.raises(ConfigError, match=f"version 1 to {FORMAT_VERSION} expected"):
            migrate_config({**to_json(focus_tiny()), "format_version": version})
