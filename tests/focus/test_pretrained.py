"""Models on disk: shards, migration, refusals."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from focus.config import FORMAT_VERSION, ConfigError, to_json
from focus.errors import CheckpointMismatch, TargetError
from focus.migration import STEPS, migrate_config, migrate_name
from focus.presets import focus_3b, focus_tiny
from focus.pretrained import SkipRandom, find_model, load_weights, read_config, save_model
from focus.shards import DTYPES, ShardWriter, Weights, write_tensors


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


def snapshot(folder: Path) -> dict[str, bytes]:
    found = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*"))}
    return {name: p.read_bytes() if p.is_file() else b"" for name, p in found.items()}


def _photos(folder: Path) -> None:
    folder.mkdir()
    (folder / "holiday.jpg").write_bytes(b"photo")


def _nested(folder: Path) -> None:
    save_model(folder, net(0), focus_tiny())
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "state.json").write_text("{}")


def _another_library(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    (folder / "model.safetensors").write_bytes(b"theirs")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_photos, r"a FOCUS model expected, got \['holiday\.jpg'\]"),
        (_nested, r"without folders inside expected, got \['checkpoints'\]"),
        (_another_library, "a FOCUS model expected"),
        (lambda folder: folder.write_text("mine"), "a folder expected, got a file"),
    ],
)
def test_a_folder_of_somebody_else_is_not_replaced(
    tmp_path: Path, make: Callable[[Path], object], message: str
) -> None:
    make(tmp_path / "m")
    before = snapshot(tmp_path)
    with pytest.raises(TargetError, match=message):
        save_model(tmp_path / "m", net(1), focus_tiny())
    assert snapshot(tmp_path) == before


def test_neighbours_and_links_outlive_saving(tmp_path: Path) -> None:
    save_model(tmp_path / "m", net(0), focus_tiny())
    for name in ("m.old", "m.tmp"):
        _photos(tmp_path / name)
    (tmp_path / "m" / "model_before.safetensors").write_bytes(b"mine")
    (tmp_path / "m" / "link").symlink_to("../m.old/holiday.jpg")
    (tmp_path / "way").symlink_to("m")
    save_model(tmp_path / "way", net(1), focus_tiny())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "m.old", "m.tmp", "way"]
    assert (tmp_path / "way").is_symlink() and (tmp_path / "m" / "link").is_symlink()
    assert (tmp_path / "m" / "link").read_bytes() == b"photo"
    assert (tmp_path / "m" / "model_before.safetensors").read_bytes() == b"mine"
    saved = load_file(tmp_path / "m" / "model.safetensors")
    assert torch.equal(saved["0.weight"], net(1).state_dict()["0.weight"])


def test_a_failed_exchange_brings_the_old_model_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path / "m", net(0), focus_tiny())
    before, rename = snapshot(tmp_path), os.rename

    def refuse(source: Path, target: Path) -> None:
        if source.name.endswith(".tmp"):
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(OSError, match="Input/output"):
        save_model(tmp_path / "m", net(1), focus_tiny())
    assert snapshot(tmp_path) == before


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


def test_a_full_disk_is_named_and_leaves_the_old_model(tmp_path: Path) -> None:
    save_model(tmp_path / "m", net(0), focus_tiny())
    before = snapshot(tmp_path)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limit[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*model\.part-00001'"):
            save_model(tmp_path / "m", nn.Linear(600, 600), focus_tiny())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert snapshot(tmp_path) == before


def test_tensors_of_every_dtype_come_back(tmp_path: Path) -> None:
    bits = torch.arange(24, dtype=torch.uint8)
    tensors = {str(dtype): bits.view(dtype) for dtype in DTYPES if dtype != torch.bool}
    tensors |= {"bool": bits > 3, "scalar": torch.tensor(1.5), "none": torch.zeros(0, 3)}
    write_tensors(tmp_path / "a.safetensors", tensors)
    weights = Weights.open(tmp_path / "a.safetensors")
    for name, tensor in tensors.items():
        assert weights[name].dtype == tensor.dtype and weights.shape(name) == tuple(tensor.shape)
        found, given = weights[name].reshape(-1), tensor.reshape(-1)
        assert torch.equal(found.view(torch.uint8), given.view(torch.uint8)), name
    with pytest.raises(CheckpointMismatch, match=r"got torch\.complex64 for wave"):
        write_tensors(tmp_path / "b.safetensors", {"wave": torch.zeros(2, dtype=torch.complex64)})
    assert not (tmp_path / "b.safetensors").exists()


def _set(part: str, name: str, value: object) -> Callable[[dict[str, Any]], object]:
    return lambda values: {**values, part: {**values[part], name: value}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _values: [], "a config's JSON object expected, got list"),
        (lambda values: {**values, "format_version": True}, "format version 1 to"),
        (_set("llm", "num_layers", "6"), r"config\.llm\.num_layers: int expected, got '6'"),
        (_set("llm", "num_layers", 6.0), "int expected, got 6.0"),
        (_set("llm", "num_layers", True), "int expected, got True"),
        (_set("llm", "norm_eps", None), "float expected, got None"),
        (_set("llm", "norm_eps", float("nan")), "float expected, got nan"),
        (_set("llm", "tie_embeddings", 1), "bool expected, got 1"),
        (_set("llm", "num_kv_heads", 0), "modulo"),
        (_set("pixel", "multipliers", [1, "2"]), r"tuple\[int, \.\.\.\] expected"),
        (_set("pixel", "image_size", [64]), r"tuple\[int, int\] expected, got \[64\]"),
        (_set("region", "hierarchical_scale", "res9"), "expected, got 'res9'"),
        (_set("diffusion", "condition", ["mask"]), r"'queries'\] expected, got \['mask'\]"),
    ],
)
def test_wrong_values_of_a_config_are_named(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(change(to_json(focus_tiny()))))
    with pytest.raises(CheckpointMismatch, match=message) as caught:
        read_config(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_values_of_every_kind_survive_json(tmp_path: Path) -> None:
    for config in (focus_tiny(), focus_3b()):
        (tmp_path / "config.json").write_text(json.dumps(to_json(config)))
        assert read_config(tmp_path) == config
    none = _set("region", "hierarchical_scale", None)(to_json(focus_tiny()))
    (tmp_path / "config.json").write_text(json.dumps(none))
    assert read_config(tmp_path).region.hierarchical_scale is None


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
