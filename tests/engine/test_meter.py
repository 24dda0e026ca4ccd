"""Rates, the hang watch, traces, exit codes and what the doctor says."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.cli import main
from engine.meter import Meter, profiled, watched
from engine.monitor import Monitor
from engine.run import Run
from engine.train import Outcome
from focus.batch import Batch
from parallel.mesh import Mesh


def a_run(**changes: Any) -> Run:
    base: dict[str, Any] = {"name": "r", "stage": "s", "model": "m", "steps": 9, "rates": {"*": 1}}
    return Run(**{**base, **changes})


def a_mesh(rank: int = 0, size: int = 1) -> Mesh:
    return Mesh(rank=rank, size=size, data_rank=rank, data_size=size, device=torch.device("cpu"))


def a_batch(lengths: list[int]) -> Batch:
    size, longest = len(lengths), max(lengths)
    return Batch(
        task="vqa",
        input_ids=torch.zeros(size, longest, dtype=torch.int64),
        labels=torch.zeros(size, longest, dtype=torch.int64),
        source=torch.zeros(size, longest, dtype=torch.uint8),
        grid=torch.zeros(size, longest, 3, dtype=torch.int16),
        condition=torch.zeros(size, longest, dtype=torch.int16),
        lengths=torch.tensor(lengths),
    )


def test_meter_counts_tokens_of_all_ranks_and_flops_per_rank(tmp_path: Path) -> None:
    meter = Meter(a_run(), a_mesh(1, 4), tmp_path)
    meter.flops_per_sample, meter.peak, meter.skipped = 3e12, 6e12, 2
    found = meter.facts(7, [a_batch([3, 5]), a_batch([2])], 12, 2.0, 0.5)
    meter.close()
    assert found["samples_per_s"] == 6
    assert found["tokens_per_s"] == 10 * 4 / 2
    assert found["tflops_per_rank"] == pytest.approx(3 * 12 / 2 / 4)
    assert found["mfu"] == pytest.approx(4.5e12 / 6e12)
    assert found["skipped"] == 2
    assert found["memory_gib"] > 0.01
    line = json.loads((tmp_path / "ranks" / "rank-00001.jsonl").read_text())
    assert (line["step"], line["seconds"], line["data_wait"]) == (7, 2.0, 0.5)


def test_a_hang_ends_the_process_with_its_stack(tmp_path: Path) -> None:
    path = tmp_path / "stderr"
    child = os.fork()
    if child == 0:
        with path.open("w") as file:
            os.dup2(file.fileno(), 2)
            sys.stderr = os.fdopen(2, "w")
            with watched(0.3) as alive:
                alive()
                time.sleep(60)
        os._exit(0)
    began = time.monotonic()
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 1
    assert time.monotonic() - began < 30
    assert "Timeout" in path.read_text()
    assert "test_a_hang_ends" in path.read_text()


def test_work_that_goes_on_is_left_alone() -> None:
    with watched(0.5) as alive:
        for _ in range(4):
            alive()
            time.sleep(0.2)
    time.sleep(0.6)  # and afterwards nothing watches any more


def test_named_steps_are_traced(tmp_path: Path) -> None:
    with profiled(a_run(profile=(2, 3)), tmp_path, 0) as tracer:
        for _ in range(4):
            torch.ones(8, 8) @ torch.ones(8, 8)
            tracer.step()
    traces = list((tmp_path / "profile").glob("*.json"))
    assert len(traces) == 1
    events = json.loads(traces[0].read_text())["traceEvents"]
    assert sum(event.get("name") == "aten::mm" for event in events) == 2
    with profiled(a_run(), tmp_path, 0) as nothing:
        assert nothing is None


@pytest.mark.parametrize(
    ("stopped", "requeue", "code"), [(False, False, 0), (True, True, 75), (True, False, 130)]
)
def test_exit_codes_tell_a_scheduler_from_a_person(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stopped: bool, requeue: bool, code: int
) -> None:
    def train(*_: Any, **__: Any) -> Outcome:
        return Outcome(step=1, stopped=stopped, checkpoint=tmp_path, requeue=requeue)

    monkeypatch.setattr("engine.train.train", train)
    assert main(["train", "focus_tiny_stage2", "--out", str(tmp_path)]) == code


def test_only_rank_0_replies(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "engine.train.train",
        lambda *_, **__: Outcome(step=1, stopped=False, checkpoint=tmp_path),
    )
    monkeypatch.setenv("RANK", "3")
    assert main(["train", "focus_tiny_stage2", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out == ""


class Remote:
    """Stands for the wandb package."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished = False

    def init(self, **options: Any) -> Remote:
        self.options = options
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished = True


def test_wandb_gets_terms_and_facts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    remote = Remote()
    monkeypatch.setitem(sys.modules, "wandb", remote)
    monitor = Monitor(
        tmp_path, name="r", steps=4, start=0, log_every=2, project="focus", stream=sys.stderr
    )
    for step in (1, 2):
        monitor.step(step, {"words": 0.5}, {"mfu": 0.25, "samples_per_s": 2.0})
    monitor.close()
    assert remote.logged == [(2, {"loss/words": 0.5, "run/mfu": 0.25, "run/samples_per_s": 2.0})]
    assert remote.finished
    assert remote.options["project"] == "focus"


def test_a_missing_wandb_is_said_and_no_reason_to_stop(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monitor = Monitor(
        tmp_path, name="r", steps=4, start=0, log_every=1, project="focus", stream=sys.stderr
    )
    monitor.step(1, {"words": 0.5}, {})
    monitor.close()
    assert "wandb is not installed" in capsys.readouterr().err


def test_doctor_says_what_each_part_is_for_and_what_replaces_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["doctor", "--json"]) == 0
    parts = {part["name"]: part for part in json.loads(capsys.readouterr().out)["parts"]}
    assert {"CUDA", "megatron-core", "transformer-engine", "apex", "flash-attn", "DALI"} <= set(
        parts
    )
    assert parts["megatron-core"]["usable"]
    assert parts["megatron-core"]["version"] == "0.16.1"
    for part in parts.values():
        assert part["used_for"]
        assert part["instead"]
    if not torch.cuda.is_available():
        assert not parts["CUDA"]["usable"]
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(parts)
    assert any(line.startswith("megatron-core") and "used for splitting" in line for line in lines)
