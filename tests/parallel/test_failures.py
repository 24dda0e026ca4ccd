"""What happens on several ranks when one of them dies, meets a NaN or is told to stop."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.checkpoint import CheckpointFolder
from parallel.layout import ParallelConfig
from parallel.mesh import Mesh
from tests.parallel import ranks
from tests.parallel.small import TASKS, SmallStage, small_run
from tests.parallel.test_shards import curve, train_part

pytestmark = pytest.mark.distributed
TP2 = ParallelConfig(tp=2)


def meet_nan(rank: int, layout: ParallelConfig, bad: int) -> tuple[str, float, float]:
    """(message, largest change of any parameter by the bad step, loss of the step after it)."""
    from engine.process import seed_everything
    from engine.run import derive_seed
    from engine.train import NonFiniteLoss, StepDataset, StepWork, build_engine
    from parallel.mesh import open_mesh

    tasks = TASKS[3][:: layout.data_size(ranks.world())]
    run = small_run(3, parallel=layout, micro_batches=tasks)
    stage = SmallStage(3, bad=(1, bad))
    with open_mesh(layout) as mesh:
        seed_everything(derive_seed(run.seed, "build"))
        engine = build_engine(run, stage, mesh)
        data = StepDataset(run, stage, mesh.data_rank, mesh.data_size)
        engine.step(0, data[0], StepWork(run, stage, 0, mesh))
        before = [p.detach().clone() for p in engine.model.parameters()]
        with pytest.raises(NonFiniteLoss) as caught:
            engine.step(1, data[1], StepWork(run, stage, 1, mesh))
        after = engine.model.parameters()
        change = max(float((a - b).abs().max()) for a, b in zip(after, before, strict=True))
        report = engine.step(2, data[2], StepWork(run, stage, 2, mesh))
    return str(caught.value), change, report.loss


@pytest.mark.parametrize(
    ("size", "layout", "bad"),
    [(2, {}, 1), (2, {"trunk": "megatron"}, 1), (2, {"pp": 2}, 1)],
    ids=["dp2plain", "dp2", "pp2"],
)
def test_nan_on_one_rank_stops_all_and_touches_nothing(
    size: int, layout: dict[str, Any], bad: int
) -> None:
    answers = ranks.run(size, meet_nan, ParallelConfig(**layout), bad)
    assert len({loss for _, _, loss in answers}) == 1
    for message, change, loss in answers:
        assert message.startswith("step 1: loss editing/words")
        assert "not finite" in message
        assert change == 0
        assert torch.isfinite(torch.tensor(loss))


def pass_over_nan(rank: int, folder: Path) -> None:
    from engine.train import train

    tasks = TASKS[3][::2]
    run = small_run(3, micro_batches=tasks, steps=3, skips=1, save_every=2)
    train(run, folder, stage=SmallStage(3, bad=(1, 1)))


def test_a_skipped_step_is_counted_and_remembered(tmp_path: Path) -> None:
    ranks.run(2, pass_over_nan, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line.get("skipped") for line in lines] == [None, 1.0, 1.0]
    assert "loss" not in lines[1]
    state = json.loads((tmp_path / "checkpoints" / "step-3" / "state.json").read_text())
    assert state["skipped"] == 1
    assert len(list((tmp_path / "ranks").glob("rank-*.jsonl"))) == 2


@pytest.fixture(scope="module")
def uncut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uncut")
    ranks.run(2, train_part, folder, TP2, 6, {"save_every": 1})
    return folder


def kill_often(folder: Path, kills: int, seed: int, steps: int) -> int:
    """Kill a random rank `kills` times at random moments; count the hits."""
    source = random.Random(seed)
    changes = {"steps": steps, "save_every": 1}
    hits = 0
    for _ in range(kills):
        processes = ranks.launch(2, folder, train_part, folder, TP2, steps, changes)
        wait_for_progress(folder, processes[0], source.randrange(4))  # some save before they die
        time.sleep(source.uniform(0.0, 0.3))
        victim = processes[source.randrange(2)]
        if victim.pid is not None and victim.is_alive():
            os.kill(victim.pid, signal.SIGKILL)
        hits += -signal.SIGKILL in ranks.codes(processes)
    return hits


def wait_for_progress(folder: Path, process: Any, steps: int = 0) -> None:
    """Wait until this attempt has opened its log and done some steps."""
    log = folder / "log.jsonl"
    before = log.stat().st_ino if log.exists() else None
    end = time.monotonic() + 300
    least: int | None = None
    while process.is_alive() and time.monotonic() < end:
        if log.exists() and log.stat().st_ino != before:
            found = log.read_bytes().count(b"\n")
            least = found + steps if least is None else least
            if found >= least:
                return
        time.sleep(0.02)


def test_a_killed_rank_ends_the_others_and_the_run_goes_on(uncut: Path, tmp_path: Path) -> None:
    assert kill_often(tmp_path, 2, 1, 6) >= 1
    ranks.run(2, train_part, tmp_path, TP2, 6, {"save_every": 1})
    assert curve(tmp_path) == curve(uncut)


LONG = 100  # steps that outlast all the kills


def equal_to_an_uncut_run(folder: Path) -> bool:
    """Whether two more steps end with the losses of a run that was never killed."""
    end = CheckpointFolder(folder / "checkpoints").steps()[0] + 2
    uncut = folder / "uncut"
    for place in (folder, uncut):
        ranks.run(2, train_part, place, TP2, end, {"steps": LONG, "save_every": LONG})
    return curve(folder, end) == curve(uncut, end)


@pytest.mark.slow
def test_ten_kills_of_a_random_rank_change_nothing(tmp_path: Path) -> None:
    assert kill_often(tmp_path, 10, 2, LONG) == 10
    assert equal_to_an_uncut_run(tmp_path)


def die_in_save(rank: int, folder: Path, victim: int, moment: int, changes: dict[str, Any]) -> None:
    """Train; the victim dies at the `moment`-th flush, rename or removal after its first save."""
    if rank == victim:
        arm(moment)
    train_part(rank, folder, TP2, LONG, changes)


def arm(moment: int) -> None:
    left = moment
    saving = False

    def counted(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= saving
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        setattr(owner, name, call)

    begin = CheckpointFolder.begin

    def began(folder: CheckpointFolder, step: int, mesh: Mesh | None = None) -> Path:
        nonlocal saving
        saving = True
        return begin(folder, step, mesh)

    CheckpointFolder.begin = began  # type: ignore[method-assign,assignment]
    for owner, name in ((os, "fsync"), (shutil, "rmtree"), (Path, "rename"), (Path, "replace")):
        counted(owner, name)


@pytest.mark.slow
def test_twenty_kills_during_a_save_lose_nothing(tmp_path: Path) -> None:
    """Every other attempt saves in the background."""
    source = random.Random(3)
    for attempt in range(20):
        victim = source.randrange(2)
        moment = source.randint(1, (24, 3)[victim])  # about a save and a half of either rank
        changes = {"steps": LONG, "save_every": 1, "async_save": bool(attempt % 2)}
        processes = ranks.launch(2, tmp_path, die_in_save, tmp_path, victim, moment, changes)
        found = ranks.codes(processes)
        assert found[victim] == -signal.SIGKILL, f"attempt {attempt} at moment {moment}: {found}"
    assert equal_to_an_uncut_run(tmp_path)


def test_sigterm_to_one_rank_stops_all_after_the_step(uncut: Path, tmp_path: Path) -> None:
    processes = ranks.launch(2, tmp_path, train_part, tmp_path, TP2, 6, {"save_every": 100})
    wait_for_progress(tmp_path, processes[0])
    while not (tmp_path / "log.jsonl").stat().st_size and processes[0].is_alive():
        time.sleep(0.02)  # until the first step is done
    assert processes[1].pid is not None
    for _ in range(2):
        os.kill(processes[1].pid, signal.SIGTERM)
        time.sleep(0.05)
    assert ranks.codes(processes, 120) == [0, 0]
    steps = list((tmp_path / "checkpoints").glob("step-*"))
    assert len(steps) == 1
    ranks.run(2, train_part, tmp_path, TP2, 6, {"save_every": 100})
    assert curve(tmp_path) == curve(uncut)
