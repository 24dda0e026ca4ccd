"""Training from shards: the same records as the built-in world, exact order, exact counts."""

from __future__ import annotations

import dataclasses
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from engine.data.convert.driver import Job, convert
from engine.data.dali import dali_problem
from engine.data.feed import START, Feed, index_of, positions
from engine.data.guard import DataError
from engine.data.ledger import Ledger
from engine.data.records import Record
from engine.data.scenes import sample
from engine.data.shards import read_index
from engine.data.source import draw_records
from engine.data.world import Plan, join_plans, plan_of
from engine.run import Run
from engine.runs import find_run
from engine.stages.stage import Micro, Stage, find_stage
from engine.train import CountedDataset, train
from focus.batch import Batch
from parallel.mesh import Mesh

TASKS = ("class", "referring", "reasoning", "interactive", "generation", "editing", "vqa")
SIZE = (128, 128)  # of focus_tiny's frame
SAMPLES = 24


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of the built-in world, every task."""
    folder = tmp_path_factory.mktemp("world")
    Plan(seed=3, size=SIZE, tasks=dict.fromkeys(TASKS, SAMPLES)).write(folder)
    convert(Job(format="world", source=folder, out=folder, per_shard=50))
    return folder


def make_run(folder: Path | None, **changes: Any) -> Run:
    extra = {"data_seed": 3, "tasks_per_step": 2, "loader": "pil", **changes.pop("extra", {})}
    if folder is not None:
        extra["shards"] = str(folder)
    base: dict[str, Any] = {
        "name": "toy",
        "stage": "pretrain",
        "model": "focus_tiny",
        "steps": 6,
        "rates": {"*": 1e-2},
        "micro_batches": (("vqa", 4), ("editing", 2), ("vqa", 4)),
        "save_every": 2,
        "panel_every": 0,
        "workers": 0,
        "extra": extra,
    }
    return Run(**{**base, **changes})


def same(one: Record, two: Record) -> bool:
    pairs = [(getattr(one, f.name), getattr(two, f.name)) for f in dataclasses.fields(Record)]
    for a, b in pairs:
        if isinstance(a, np.ndarray) and not np.array_equal(a, b):
            return False
        if isinstance(a, tuple) and a and isinstance(a[0], np.ndarray):
            if len(a) != len(b) or not all(map(np.array_equal, a, b)):
                return False
        elif not isinstance(a, np.ndarray) and a != b:
            return False
    return True


LOADERS = [
    "pil",
    pytest.param(
        "dali", marks=pytest.mark.skipif(dali_problem() is not None, reason=str(dali_problem()))
    ),
]


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("task", TASKS)
def test_records_from_shards_are_those_of_the_world(world: Path, task: str, loader: str) -> None:
    run = make_run(world, micro_batches=((task, 6),), extra={"loader": loader})
    run = dataclasses.replace(run, extra={**run.extra, "tasks_per_step": 1})
    seen = []
    for step in range(SAMPLES // 6):
        for record in draw_records(run, step, Micro(number=0, task=task, size=6)):
            index = int(record.id.rpartition("-")[2])
            assert same(record, sample(task, "train", 3, index, SIZE))  # type: ignore[arg-type]
            seen.append(index)
    assert sorted(seen) == list(range(SAMPLES))  # one epoch, nothing twice
    assert seen != sorted(seen)


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
def test_batches_of_every_stage_equal_those_of_the_world(
    world: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stage's own collation of the same records gives the same tensors, bit by bit."""
    run = find_run(name)
    tasks = tuple((task, 3) for task in dict.fromkeys(task for task, _ in run.micro_batches))
    extra = {**run.extra, "shards": str(world), "loader": "pil", "data_seed": 3}
    extra |= {"tasks_per_step": len(tasks)}
    run = dataclasses.replace(run, micro_batches=tasks, extra=extra)
    stage = find_stage(run.stage)
    for number, (task, size) in enumerate(tasks):
        micro = Micro(number=number, task=task, size=size)
        ids = [record.id for record in draw_records(run, 1, micro)]
        torch.manual_seed(0)
        ours = stage.batches(run, 1, micro)
        drawn = [sample(task, "train", 3, int(i.rpartition("-")[2]), SIZE) for i in ids]  # type: ignore[arg-type]
        for module in ("multimodal", "tokenizer", "diffusion"):
            monkeypatch.setattr(f"engine.stages.{module}.draw_records", lambda *_, d=drawn: d)
        torch.manual_seed(0)
        theirs = stage.batches(run, 1, micro)
        monkeypatch.undo()
        assert equal(ours, theirs)


def equal(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, two)
    if dataclasses.is_dataclass(one):
        names = [f.name for f in dataclasses.fields(one)]
        return all(equal(getattr(one, n), getattr(two, n)) for n in names)
    return bool(one == two)


def go_on(run: Run, step: int, ranks: int) -> Run:
    """The run as it goes on after `ranks` ranks did the steps before `step`."""
    return dataclasses.replace(run, extra={**run.extra, START: positions(run, step, ranks)})


def ids_of(run: Run, step: int, rank: int, ranks: int) -> list[list[str]]:
    found = []
    for number in range(2):
        task, size = run.micro_batches[(step * 2 + number) % 3]
        micro = Micro(number=number, task=task, size=size, rank=rank, ranks=ranks)
        found.append([task, *(record.id for record in draw_records(run, step, micro))])
    return found


def test_one_then_two_then_four_ranks_go_on_in_the_same_order(world: Path) -> None:
    """Whatever the ranks, the samples of a task come in the order of one rank."""
    run = make_run(world, steps=100)
    alone: dict[str, list[str]] = {"vqa": [], "editing": []}
    for step in range(30):
        for task, *ids in ids_of(run, step, 0, 1):
            alone[task] += ids
    found: dict[str, list[str]] = {"vqa": [], "editing": []}
    for first, last, ranks in ((0, 4, 1), (4, 9, 2), (9, 12, 4)):
        for step in range(first, last):
            by_rank = [ids_of(run, step, rank, ranks) for rank in range(ranks)]
            for of_all in zip(*by_rank, strict=True):
                for task, *ids in of_all:
                    found[task] += ids
        run = go_on(run, last, ranks)
    for task, ids in found.items():
        assert len(ids) > 15
        assert ids == alone[task][: len(ids)]


def test_numbers_have_no_gap_and_no_repeat_at_any_change_of_ranks() -> None:
    run = make_run(None, steps=100)
    seen: dict[str, list[int]] = {"vqa": [], "editing": []}
    for first, last, ranks in ((0, 5, 2), (5, 5, 4), (5, 11, 3), (11, 20, 1)):
        for step in range(first, last):
            for number in range(2):
                task, size = run.micro_batches[(step * 2 + number) % 3]
                for rank in range(ranks):
                    micro = Micro(number=number, task=task, size=size, rank=rank, ranks=ranks)
                    seen[task].append(index_of(run, step, micro))
        run = go_on(run, last, ranks)
    assert all(numbers == list(range(len(numbers))) for numbers in seen.values())


class Reader(Stage):
    """Keeps the ids it was given; learns next to nothing."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def build(self, run: Run) -> nn.Module:
        return nn.Linear(1, 1)

    def micro_batches(self, run: Run, step: int) -> tuple[tuple[str, int], ...]:
        return tuple(run.micro_batches[(step * 2 + i) % len(run.micro_batches)] for i in range(2))

    def batches(self, run: Run, step: int, micro: Micro) -> list[str]:
        return [record.id for record in draw_records(run, step, micro)]

    def losses(self, model: nn.Module, batch: Any, step: int) -> dict[str, Tensor]:
        self.seen += batch
        return {"fit": model(torch.ones(1, 1)).square().sum()}


def go(run: Run, folder: Path, **options: Any) -> list[str]:
    stage = Reader()
    train(run, folder, stage=stage, stream=io.StringIO(), **options)
    return stage.seen


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_resumed_training_reads_the_exact_next_samples(world: Path, tmp_path: Path) -> None:
    whole = go(make_run(world), tmp_path / "whole")
    parts = go(make_run(world), tmp_path / "cut", until=3)
    parts += go(make_run(world, workers=1), tmp_path / "cut")
    assert parts == whole
    assert log(tmp_path / "cut")[-1]["data/good"] == len(whole) == 4 * 8 + 2 * 4
    state = json.loads((tmp_path / "cut/checkpoints/step-6/state.json").read_text())
    assert state["data"]["drawn"] == {"step": 6, "before": {"editing/2": 4, "vqa/4": 8}}


def test_a_checkpoint_of_two_ranks_goes_on_with_one(world: Path, tmp_path: Path) -> None:
    """The same shards with half the ranks, and so twice the micro-batches: nothing is lost."""
    go(make_run(world), tmp_path, until=2)
    state = json.loads((tmp_path / "checkpoints/step-2/state.json").read_text())["data"]
    state["drawn"] = positions(make_run(world), 2, 2)
    mesh = Mesh(rank=0, size=1, data_rank=0, data_size=1, device=torch.device("cpu"))
    wide = make_run(world, extra={"tasks_per_step": 3})
    ledger = Ledger(wide, tmp_path, mesh)
    ledger.resume(state, 2, 2)
    assert ledger.state()["drawn"] == {"step": 2, "before": {"editing/2": 2, "vqa/4": 6}}
    feed = Feed(wide, world)
    for task, size, before in (("vqa", 4, 6), ("editing", 2, 2)):
        micro = Micro(number=wide.micro_batches.index((task, size)), task=task, size=size)
        assert index_of(ledger.planned(), 2, micro) == before
        expected = feed.mixture(task, size).pick(before).slot.numbers.tolist()
        records = draw_records(ledger.planned(), 2, micro)
        keys = [feed.datasets[str(world)].read(number).key for number in expected]
        assert [record.id for record in records] == keys


def test_other_data_are_refused_on_resume(world: Path, tmp_path: Path) -> None:
    go(make_run(world), tmp_path, until=2)
    with pytest.raises(DataError, match="resume with those"):
        go(make_run(world, extra={"data_seed": 4}), tmp_path)


def damage(source: Path, folder: Path, every: int) -> dict[str, str]:
    """Copy a dataset, then damage the picture or the JSON of every `every`-th sample."""
    reasons = {}
    folder.mkdir()
    for path in source.iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    number = 0
    for index in sorted(folder.glob("*.idx")):
        tar = bytearray(index.with_suffix(".tar").read_bytes())
        for places in read_index(index):
            number += 1
            if number % every:
                continue
            pictures = [p for p in places if p.ending in ("png", "target.png")]
            place = pictures[0] if number % (2 * every) else places[0]
            kind = "not_image" if place.ending != "json" else "bad_json"
            tar[place.offset : place.offset + place.size] = b"{".ljust(place.size)
            reasons[place.name.partition(".")[0]] = kind
        index.with_suffix(".tar").write_bytes(tar)
    return reasons


@pytest.mark.parametrize("workers", [0, 1])
def test_one_in_twenty_broken_trains_through_with_exact_counts(
    world: Path, tmp_path: Path, workers: int
) -> None:
    reasons = damage(world, tmp_path / "shards", 20)
    run = make_run(
        tmp_path / "shards",
        micro_batches=tuple((task, 4) for task in TASKS),
        steps=6 * len(TASKS) // 2,  # one epoch
        extra={"bad_share": 0.2},
        workers=workers,
        save_every=7,
    )
    seen = go(run, tmp_path / "run", until=9) + go(run, tmp_path / "run")
    total = SAMPLES * len(TASKS)
    assert Counter(seen) == Counter(
        f"train-3-{task}-{n}"
        for task in TASKS
        for n in range(SAMPLES)
        if f"train-3-{task}-{n}" not in reasons
    )
    last = log(tmp_path / "run")[-1]
    counts = Counter(reasons.values())
    assert len(reasons) == total // 20 and len(counts) == 2
    assert last["data/good"] == total - len(reasons)
    assert {k: v for k, v in last.items() if k.startswith("data/bad_")} == {
        f"data/bad_{reason}": count for reason, count in counts.items()
    }
    lines = (tmp_path / "run/skipped.jsonl").read_text().splitlines()
    assert {e["key"]: e["reason"] for e in map(json.loads, lines)} == reasons
    assert len(lines) == len(reasons)


def test_too_many_broken_samples_end_the_training(world: Path, tmp_path: Path) -> None:
    damage(world, tmp_path / "shards", 3)
    run = make_run(tmp_path / "shards", steps=200, micro_batches=(("vqa", 4),))
    with pytest.raises(DataError, match=r"at most 10% bad samples.*not_image.*focus data validate"):
        go(run, tmp_path / "run")
    assert len(log(tmp_path / "run")) == 200 // 8 - 1  # looked at from 200 samples on


def test_a_micro_batch_without_a_sound_sample_is_replaced_and_counted(
    world: Path, tmp_path: Path
) -> None:
    damage(world, tmp_path / "shards", 4)
    run = make_run(tmp_path / "shards", micro_batches=(("vqa", 1),), steps=12)
    run = dataclasses.replace(run, extra={**run.extra, "bad_share": 1.0})
    seen = go(run, tmp_path / "run")
    last = log(tmp_path / "run")[-1]
    assert len(seen) == 24 == last["data/good"]
    assert last["data/replaced"] == sum(v for k, v in last.items() if k.startswith("data/bad_")) > 0
    damage(world, tmp_path / "all", 1)
    with pytest.raises(DataError, match="9 micro-batches without one"):
        go(make_run(tmp_path / "all"), tmp_path / "none")


def test_datasets_side_by_side_are_mixed_by_their_weights(world: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        damage(world, tmp_path / name, 10**6)
    feed = Feed(make_run(tmp_path), tmp_path)
    assert [part.weight for part in feed.mixture("vqa", 4).parts] == [SAMPLES, SAMPLES]
    (tmp_path / "two").rename(tmp_path / "anyedit")
    parts = Feed(make_run(tmp_path), tmp_path).mixture("editing", 2).parts
    assert [(Path(p.dataset).name, p.task) for p in parts] == [("anyedit", "editing")]
    with pytest.raises(DataError, match="focus data world RUN"):
        Feed(make_run(None), tmp_path / "nothing")


def test_a_stage_may_measure_on_all_there_is(world: Path) -> None:
    """Asking for more samples than there are, outside of the schedule, gives them all."""
    run = make_run(world)
    found = draw_records(run, 0, Micro(number=0, task="vqa", size=256))
    assert len({record.id for record in found}) == len(found) == SAMPLES
    short = dataclasses.replace(run, micro_batches=(("vqa", 25),))
    with pytest.raises(DataError, match="25 samples expected"):
        draw_records(short, 0, Micro(number=0, task="vqa", size=25))


def test_workers_count_what_they_read(world: Path) -> None:
    run = make_run(world)
    draw_records(run, 9, Micro(number=0, task="vqa", size=4))  # no step's
    items, drawn = CountedDataset(run, Reader(), 0, 1)[0]
    assert drawn.good == sum(map(len, items)) == 6
    assert not CountedDataset(make_run(None), Reader(), 0, 1)[0][1]


def test_a_plan_covers_what_its_run_draws() -> None:
    run = find_run("focus_tiny_stage4")
    plan = plan_of(run)
    stage = find_stage(run.stage)
    drawn = sum(
        size
        for step in range(run.steps)
        for task, size in stage.micro_batches(run, step)
        if task == "editing"
    )
    cycle = sum(size for task, size in run.micro_batches if task == "editing")
    assert drawn <= plan.tasks["editing"] < drawn + cycle
    assert plan_of(run, 50).tasks["editing"] == 50
    both = join_plans([plan_of(run, 50), plan_of(find_run("focus_tiny_stage2"), 70)])
    assert (both.tasks["vqa"], both.tasks["editing"]) == (70, 50)
    with pytest.raises(DataError, match="no records"):
        plan_of(find_run("focus_tiny_stage0_language"))


def test_a_folder_keeps_one_plan(tmp_path: Path) -> None:
    Plan(seed=0, size=(8, 8), tasks={"vqa": 2}).write(tmp_path)
    with pytest.raises(DataError, match="other scenes"):
        Plan(seed=1, size=(8, 8), tasks={"vqa": 2}).write(tmp_path)


def test_batches_know_how_to_be_pinned() -> None:
    batch = find_stage("pretrain").batches(make_run(None), 0, Micro(number=0, task="vqa", size=1))
    assert isinstance(batch, Batch) and callable(batch.pin_memory)
    if torch.cuda.is_available():
        assert batch.pin_memory().input_ids.is_pinned()
