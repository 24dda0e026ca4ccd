"""The built-in world's cache of shards: the default road, and the records that would be drawn."""

from __future__ import annotations

import dataclasses
import io
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from engine.data import cache
from engine.data.cache import WorldCache, cache_limit, folder_bytes, open_cache, world_version
from engine.data.pil import PilDecoder
from engine.data.records import TASKS, Record
from engine.data.scene_model import DataError
from engine.data.scenes import sample
from engine.data.source import draw_records
from engine.run import Run
from engine.runs import find_run
from engine.stages.stage import Micro, Stage, find_stage
from engine.train import train

SIZE = (64, 96)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own."""
    monkeypatch.setenv(cache.FOLDER, str(tmp_path / "cache"))
    return tmp_path / "cache"


def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Record:
        raise AssertionError("a sample was drawn that the cache holds")

    monkeypatch.setattr(cache, "sample", fail)


def live(task: str, first: int, count: int) -> list[Record]:
    return [sample(task, "train", 5, first + i, SIZE) for i in range(count)]  # type: ignore[arg-type]


def same(one: Any, two: Any) -> bool:
    if dataclasses.is_dataclass(one):
        names = [f.name for f in dataclasses.fields(one)]
        return all(same(getattr(one, n), getattr(two, n)) for n in names)
    if isinstance(one, Tensor):
        return torch.equal(one, two)
    if isinstance(one, np.ndarray):
        return np.array_equal(one, two)
    if isinstance(one, (tuple, list)):
        return len(one) == len(two) and all(map(same, one, two))
    return bool(one == two and type(one) is type(two))


@pytest.mark.parametrize("task", TASKS)
def test_what_is_read_is_what_would_be_drawn(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 12
    drawn, decoder = live(task, 30, count), PilDecoder()
    assert same(WorldCache(5, SIZE).records(task, 30, count, decoder), drawn)
    no_drawing(monkeypatch)
    again = WorldCache(5, SIZE)
    assert same(again.records(task, 30, count, decoder), drawn)
    assert again.written == 0
    if task == "vqa":
        assert any(record.turns for record in drawn)  # several questions to one picture
    with pytest.raises(AssertionError, match="was drawn"):
        again.records(task, 31, count, decoder)


@pytest.mark.parametrize(
    "name",
    [
        "focus_tiny_stage1_tokenizer",
        "focus_tiny_stage1_diffusion",
        "focus_tiny_stage2",
        "focus_tiny_stage3",
        "focus_tiny_stage4",
    ],
)
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_stage_gets_the_same_batches_from_shards_by_default(
    name: str, ranks: int, folder: Path
) -> None:
    run = find_run(name)
    tasks = tuple((task, 2) for task in dict.fromkeys(task for task, _ in run.micro_batches))
    run = dataclasses.replace(run, micro_batches=tasks, extra={**run.extra, "tasks_per_step": 1})
    assert "shards" not in run.extra
    stage = find_stage(run.stage)
    for number, (task, size) in enumerate(tasks):
        micro = Micro(number=number, task=task, size=size, rank=ranks - 1, ranks=ranks)
        found = []
        for extra in ({}, {"shards": "live"}, {"shards": None}, {"shards": "cache"}):
            torch.manual_seed(0)
            own = dataclasses.replace(run, extra={**run.extra, **extra})
            found.append(stage.batches(own, 3, micro))
            if extra == {}:
                assert len(list(folder.rglob("*.tar"))) == number + 1
        assert all(same(found[0], other) for other in found[1:])


class Reader(Stage):
    """Keeps the ids it was given; learns next to nothing."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def build(self, run: Run) -> nn.Module:
        return nn.Linear(1, 1)

    def batches(self, run: Run, step: int, micro: Micro) -> list[str]:
        return [record.id for record in draw_records(run, step, micro)]

    def losses(self, model: nn.Module, batch: Any, step: int) -> dict[str, Tensor]:
        self.seen += batch
        return {"fit": model(torch.ones(1, 1)).square().sum()}


def go(folder: Path, until: int | None = None, shards: str | None = "cache") -> list[str]:
    run = Run(
        name="toy",
        stage="pretrain",
        model="focus_tiny",
        steps=5,
        rates={"*": 1e-2},
        micro_batches=(("vqa", 3), ("editing", 2)),
        save_every=2,
        panel_every=0,
        workers=1,
        extra={"shards": shards},
    )
    stage = Reader()
    train(run, folder, stage=stage, until=until, stream=io.StringIO())
    return stage.seen


def test_training_reads_shards_writes_only_its_steps_and_resumes_exactly(
    tmp_path: Path, folder: Path
) -> None:
    whole = go(tmp_path / "live", shards="live")
    assert not folder.exists()
    parts = go(tmp_path / "cut", until=2)
    assert 4 <= len(list(folder.rglob("*.tar"))) <= 8  # two steps, and what was read ahead
    parts += go(tmp_path / "cut")
    assert parts == whole
    assert len(list(folder.rglob("*.tar"))) == 10
    assert go(tmp_path / "again") == whole


@pytest.mark.parametrize("damage", ["cut", "gone", "nonsense", "index"])
def test_a_broken_shard_is_drawn_again(
    damage: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn, decoder = live("editing", 4, 3), PilDecoder()
    WorldCache(5, SIZE).records("editing", 4, 3, decoder)
    (tar,) = folder.rglob("*.tar")
    whole = tar.read_bytes()
    if damage == "cut":
        tar.write_bytes(whole[: len(whole) // 2])
    elif damage == "gone":
        tar.unlink()
    elif damage == "nonsense":
        tar.write_bytes(whole[:4000] + bytes(len(whole) - 4000))
    else:
        tar.with_suffix(".idx").write_text("v1.2 1\n")
    assert same(WorldCache(5, SIZE).records("editing", 4, 3, decoder), drawn)
    no_drawing(monkeypatch)
    assert same(WorldCache(5, SIZE).records("editing", 4, 3, decoder), drawn)
    assert tar.read_bytes() == whole


def _write(ready: Any, out: Any) -> None:
    ready.wait()
    records = WorldCache(5, SIZE).records("class", 0, 6, PilDecoder())
    out.put([record.id for record in records])


def test_two_processes_may_write_the_same_shard(folder: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready, out = context.Barrier(2), context.Queue()
    both = [context.Process(target=_write, args=(ready, out)) for _ in range(2)]
    for process in both:
        process.start()
    found = [out.get(timeout=60) for _ in both]
    for process in both:
        process.join(timeout=60)
    assert found[0] == found[1] == [record.id for record in live("class", 0, 6)]
    names = sorted(path.name for path in folder.rglob("class-*"))
    assert names == [f"class-000000000-6{ending}" for ending in (".idx", ".rows.npy", ".tar")]
    assert not list(folder.rglob(".part-*"))
    assert same(WorldCache(5, SIZE).records("class", 0, 6, PilDecoder()), live("class", 0, 6))


def test_nothing_is_kept_past_the_limit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, drawn = PilDecoder(), live("vqa", 0, 2)
    monkeypatch.setenv(cache.LIMIT, "0")
    assert same(open_cache(5, SIZE).records("vqa", 0, 2, decoder), drawn)
    assert not folder.exists()
    monkeypatch.setenv(cache.LIMIT, "0.00002")  # 20 kB: the first shard passes it
    kept = open_cache(5, SIZE)
    for first in range(0, 20, 2):
        assert same(kept.records("vqa", first, 2, decoder), live("vqa", first, 2))
    assert 1 <= kept.written < 10
    monkeypatch.setenv(cache.LIMIT, "much")
    with pytest.raises(DataError, match="gigabytes expected, got 'much'"):
        cache_limit()


def test_worlds_of_other_versions_make_room(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = folder / "world" / "0123" / "5-64x96"
    old.mkdir(parents=True)
    (old / "vqa-000000000-2.tar").write_bytes(bytes(200_000))
    kept = WorldCache(5, SIZE)
    kept.records("vqa", 0, 2, PilDecoder())
    assert old.exists() and kept.folder.parent.name == world_version()
    monkeypatch.setenv(cache.LIMIT, "0.0001")
    WorldCache(5, SIZE).records("vqa", 2, 2, PilDecoder())
    assert not old.exists() and 0 < folder_bytes(folder) < 100_000


def test_a_folder_that_cannot_be_written_costs_one_warning(folder: Path) -> None:
    folder.write_text("not a folder")
    kept = WorldCache(5, SIZE)
    with pytest.warns(UserWarning, match="set FOCUS_CACHE to a folder with room"):
        found = kept.records("vqa", 0, 2, PilDecoder())
    assert same(found, live("vqa", 0, 2))
    assert same(kept.records("vqa", 2, 2, PilDecoder()), live("vqa", 2, 2))  # without another
