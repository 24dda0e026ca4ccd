"""Sharded checkpoints: any layout resumes from any other, with optimizer state."""

from __future__ import annotations

import errno
import io
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from parallel.layout import ParallelConfig
from tests.parallel import ranks
from tests.parallel.small import TASKS, SmallStage, small_run
from tests.parallel.test_layouts import gentle

CUT, END, FAR = 3, 6, 13  # a run is cut after 3 steps; it ends after 6, the slow tests' after 13
AFAR: dict[str, Any] = {"steps": FAR, "rates": gentle(small_run(3)).rates}
WHOLE = ParallelConfig(trunk="megatron")


def train_part(
    rank: int, folder: Path, layout: ParallelConfig, until: int, changes: dict[str, Any]
) -> str:
    """Train stage 3 in `folder` up to `until` steps of 6; return what the run said."""
    from engine.train import train

    tasks = TASKS[3][:: layout.data_size(ranks.world())]
    base = {"steps": END, "save_every": CUT, "parallel": layout, "micro_batches": tasks}
    stream = io.StringIO()
    train(
        small_run(3, **{**base, **changes}), folder, stage=SmallStage(3), until=until, stream=stream
    )
    return stream.getvalue()


def go(size: int, folder: Path, layout: ParallelConfig, until: int = END, **changes: Any) -> str:
    text: str = ranks.run(size, train_part, folder, layout, until, changes)[0]
    return text


def curve(folder: Path, end: int = END) -> list[tuple[dict[str, float], float]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, end + 1))
    return [(line["terms"], line["grad_norm"]) for line in lines]


def worst(folder: Path, reference: Path, end: int = END) -> float:
    largest = 0.0
    found, expected = curve(folder, end), curve(reference, end)
    for (terms, norm), (true_terms, true_norm) in zip(found, expected, strict=True):
        pairs = [(terms[name], true_terms[name]) for name in true_terms] + [(norm, true_norm)]
        largest = max(largest, *(abs(a - b) / abs(b) for a, b in pairs))
    return largest


@pytest.fixture(scope="module")
def uncut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uncut")
    go(1, folder, WHOLE)
    return folder


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on four ranks (tp2 x pp2), stopped in the middle."""
    folder = tmp_path_factory.mktemp("cut")
    go(4, folder, ParallelConfig(tp=2, pp=2), CUT)
    return folder


@pytest.mark.parametrize("size", [1, 2], ids=["one", "dp2"])
def test_another_layout_goes_on_as_if_nothing_had_happened(
    cut: Path, uncut: Path, tmp_path: Path, size: int
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(cut, folder)
    said = go(size, folder, WHOLE)
    assert f"resuming after step {CUT}" in said
    assert worst(folder, uncut) <= 1e-4


@pytest.fixture(scope="module")
def far(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same two, ten steps longer than the cut: one process uncut, four ranks cut."""
    folder = tmp_path_factory.mktemp("far")
    go(1, folder / "uncut", WHOLE, FAR, **AFAR)
    go(4, folder / "cut", ParallelConfig(tp=2, pp=2), CUT, **AFAR)
    return folder / "uncut", folder / "cut"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "layout"),
    [
        (1, {"trunk": "megatron"}),
        (2, {"tp": 2}),
        (2, {"pp": 2}),
        (2, {"trunk": "megatron"}),
        (4, {"tp": 2, "pp": 2}),
    ],
    ids=["one", "tp2", "pp2", "dp2", "tp2pp2"],
)
def test_the_next_ten_steps_at_another_layout_equal_the_uncut_run(
    far: tuple[Path, Path], tmp_path: Path, size: int, layout: dict[str, Any]
) -> None:
    uncut, cut = far
    folder = tmp_path / "run"
    shutil.copytree(cut, folder)
    said = go(size, folder, ParallelConfig(**layout), FAR, **AFAR)
    assert f"resuming after step {CUT}" in said
    assert len(curve(folder, FAR)) - CUT == 10
    assert worst(folder, uncut, FAR) <= 1e-4


def test_rates_of_each_part_survive_a_resume(cut: Path, uncut: Path, tmp_path: Path) -> None:
    """Groups that differ only in their rate must not swap on load: other rates, other losses."""
    folder = tmp_path / "run"
    shutil.copytree(cut, folder)
    rates = {**small_run(3).rates, "heads.segment.*": 5e-4}
    go(1, folder, WHOLE, rates=rates)
    assert worst(folder, uncut) > 1e-3


def test_one_flipped_byte_in_any_file_is_refused_by_name(cut: Path, tmp_path: Path) -> None:
    """And the checkpoint before it is taken."""
    from parallel.checkpoint import CheckpointFolder

    source = cut / "checkpoints" / f"step-{CUT}"
    files = [p for p in source.rglob("*") if p.is_file() and p.stat().st_size]
    assert len(files) >= 5
    folder = CheckpointFolder(tmp_path)
    shutil.copytree(source, folder.path(CUT - 1))
    for path in files:
        shutil.copytree(source, folder.path(CUT), dirs_exist_ok=True)
        victim = folder.path(CUT) / path.relative_to(source)
        data = bytearray(victim.read_bytes())
        data[len(data) // 2] ^= 4
        victim.write_bytes(data)
        said: list[str] = []
        assert folder.load(lambda found: found, said.append) == (CUT - 1, folder.path(CUT - 1))
        assert str(victim) in said[0] or victim.name in said[0]


def save_in_background(rank: int, folder: Path, fails: int | None) -> str:
    """Train four steps, saving after two; a rank's files are written late, or not at all."""
    from parallel import shards
    from parallel.checkpoint import CheckpointError

    original = shards._writer

    def writer(request: Any, copy: bool) -> Callable[[], None]:
        write = original(request, copy)

        def late() -> None:
            time.sleep(0.5)  # steps go on meanwhile and change every parameter
            if rank == fails:
                raise OSError(errno.ENOSPC, "No space left on device", "here")
            write()

        return late

    shards._writer = writer
    changes = {"steps": 4, "save_every": 2, "async_save": True}
    try:
        train_part(rank, folder, ParallelConfig(tp=2), 4, changes)
    except CheckpointError as error:
        return str(error)
    return ""


def test_shards_written_in_the_background_equal_those_written_at_once(tmp_path: Path) -> None:
    once, late = tmp_path / "once", tmp_path / "late"
    go(2, once, ParallelConfig(tp=2), 4, steps=4, save_every=2)
    assert ranks.run(2, save_in_background, late, None) == ["", ""]
    assert curve(late, 4) == curve(once, 4)
    for step in (2, 4):
        mine, theirs = (f / "checkpoints" / f"step-{step}" / "shards" for f in (late, once))
        names = sorted(p.name for p in theirs.iterdir())
        assert names == sorted(p.name for p in mine.iterdir())
        assert len([name for name in names if name.endswith(".distcp")]) == 4
        for name in names:  # .metadata holds a random id
            assert name == ".metadata" or (mine / name).read_bytes() == (theirs / name).read_bytes()


def test_one_rank_that_cannot_write_in_the_background_stops_all(tmp_path: Path) -> None:
    first, second = ranks.run(2, save_in_background, tmp_path, 1)
    assert first == "another process could not save its share; see its log"
    assert second.startswith("no room to save step 2")
    assert list((tmp_path / "checkpoints").iterdir()) == []
