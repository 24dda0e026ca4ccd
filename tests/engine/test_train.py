"""The training loop on a toy stage: exact resume, kills, full disks, bad numbers, signals."""

from __future__ import annotations

import io
import json
import os
import random
import resource
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from engine.run import Run, RunError
from engine.stages.stage import Micro, Stage, find_weights, load_initial
from engine.train import NonFiniteLoss, Outcome, send, train
from focus.batch import Pictures
from parallel import checkpoint
from parallel.checkpoint import CheckpointCorrupt, CheckpointError, CheckpointMismatch
from parallel.optimizer import RateError
from parallel.tensors import to_device


class Toy(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, width), nn.GELU(), nn.Dropout(0.1))
        self.head = nn.Linear(width, 4)
        self.frozen = nn.Linear(8, 4)


class ToyStage(Stage):
    """Regression onto a fixed linear map; dropout makes the random state matter."""

    def __init__(self, bad_step: int = -1, pause: float = 0.0) -> None:
        self.bad_step = bad_step
        self.pause = pause
        self.seen = 0

    def build(self, run: Run) -> nn.Module:
        model = Toy(int(run.extra.get("width", 16)))
        load_initial(model, run.init_from)
        return model

    def batches(self, run: Run, step: int, micro: Micro) -> dict[str, Tensor]:
        x = torch.randn(micro.size, 8)
        return {"x": x, "y": x[:, :4].cumsum(1) * (2.0 if micro.task == "double" else 1.0)}

    def losses(self, model: nn.Module, batch: Any, step: int) -> dict[str, Tensor]:
        assert isinstance(model, Toy)
        time.sleep(self.pause)
        self.seen += len(batch["x"])
        out = model.head(model.body(batch["x"]))
        fit = (out - batch["y"]).square().mean()
        if step == self.bad_step:
            fit = fit / 0.0
        return {"fit": fit, "decay": 1e-3 * out.square().mean()}

    def panel(self, model: nn.Module, step: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        assert not model.training
        return np.full((4, 6, 3), step % 256, np.uint8)

    def state(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state(self, state: Any) -> None:
        self.seen = state["seen"]


def toy_run(**changes: Any) -> Run:
    base: dict[str, Any] = {
        "name": "toy",
        "stage": "toy",
        "model": "focus_tiny",
        "steps": 12,
        "rates": {"head.*": 1e-1, "body.*": 1e-2},
        "micro_batches": (("plain", 4), ("double", 2)),
        "schedule": "cosine",
        "warmup": 3,
        "save_every": 4,
        "panel_every": 6,
        "ema": 0.9,
        "workers": 0,
    }
    return Run(**{**base, **changes})


def go(run: Run, folder: Path, stage: ToyStage | None = None, **options: Any) -> Outcome:
    return train(run, folder, stage=stage or ToyStage(), stream=io.StringIO(), **options)


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[tuple[int, Any, float]]:
    return [(line["step"], line["terms"], line["grad_norm"]) for line in log(folder)]


def in_child(work: Callable[[], None]) -> int:
    """Fork, run `work` there, and return the child's pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setpgid(0, 0)
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def uncut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uncut")
    outcome = go(toy_run(), folder)
    assert outcome == Outcome(step=12, stopped=False, checkpoint=folder / "checkpoints/step-12")
    return folder


def test_loss_falls_and_everything_is_written(uncut: Path) -> None:
    lines = log(uncut)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert falls(lines)
    assert sorted(lines[0]["terms"]) == ["decay", "fit"]
    assert lines[0]["rate"] == pytest.approx(1 / 3)
    assert lines[-1]["rate"] < 0.05
    assert sorted(p.name for p in (uncut / "panels").iterdir()) == [
        "step-0000006.png",
        "step-0000012.png",
    ]
    assert list((uncut / "tensorboard").iterdir())
    assert sorted(p.name for p in (uncut / "checkpoints").iterdir()) == [
        "latest",
        "step-12",
        "step-8",
    ]


def test_frozen_parameters_stay_and_have_no_state(uncut: Path) -> None:
    saved = checkpoint_tensors(uncut, 12, "model")
    before = checkpoint_tensors(uncut, 8, "model")
    assert torch.equal(saved["frozen.weight"], before["frozen.weight"])
    assert not torch.equal(saved["head.weight"], before["head.weight"])
    assert not [n for n in checkpoint_tensors(uncut, 12, "optimizer") if "frozen" in n]


def falls(lines: list[dict[str, Any]]) -> bool:
    values = [line["terms"]["fit"] for line in lines]
    return sum(values[-4:]) < 0.9 * sum(values[:4])


def checkpoint_tensors(folder: Path, step: int, part: str) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / f"checkpoints/step-{step}/{part}.safetensors")


@pytest.mark.parametrize("cut", [1, 5, 8])
def test_resume_repeats_the_uninterrupted_losses_exactly(
    uncut: Path, tmp_path: Path, cut: int
) -> None:
    go(toy_run(), tmp_path, until=cut)
    stage = ToyStage()
    go(toy_run(workers=1), tmp_path, stage)
    assert losses(tmp_path) == losses(uncut)
    assert stage.seen == 12 * 6
    for part in ("model", "optimizer", "ema"):
        mine, theirs = checkpoint_tensors(tmp_path, 12, part), checkpoint_tensors(uncut, 12, part)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[n], theirs[n]) for n in mine)


def test_kill_at_random_moments_resumes_with_the_same_losses(uncut: Path, tmp_path: Path) -> None:
    source = random.Random(5)
    kills = 0
    for _ in range(60):
        pid = in_child(
            lambda: void(go(toy_run(save_every=1, workers=1), tmp_path, ToyStage(-1, 0.05)))
        )
        time.sleep(source.uniform(0.05, 0.3))
        try:
            os.killpg(pid, signal.SIGKILL)
        except ProcessLookupError:
            os.kill(pid, signal.SIGKILL)
        code = wait(pid)
        kills += code == -signal.SIGKILL
        if code == 0:
            break
    go(toy_run(), tmp_path)
    assert kills >= 5
    assert losses(tmp_path) == losses(uncut)


def void(_value: object) -> None:
    return None


def test_kill_at_every_moment_of_a_save_keeps_a_sound_checkpoint(
    uncut: Path, tmp_path: Path
) -> None:
    go(toy_run(), tmp_path / "start", until=4)
    moments = 0
    for moment in range(1, 40):
        folder = tmp_path / str(moment)
        copy_tree(tmp_path / "start", folder)
        pid = in_child(lambda folder=folder, moment=moment: die_while_saving(folder, moment))
        code = wait(pid)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        moments += 1
        go(toy_run(), folder)
        assert losses(folder) == losses(uncut)
        left = sorted(p.name for p in (folder / "checkpoints").iterdir())
        assert left == ["latest", "step-12", "step-8"]
    assert moments >= 8


def copy_tree(source: Path, target: Path) -> None:
    import shutil

    shutil.copytree(source, target)


def die_while_saving(folder: Path, moment: int, run: Run | None = None, until: int = 8) -> None:
    """Train to step `until` and die at the `moment`-th flush, rename or removal of its saves."""
    calls = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    checkpoint._flush = counted(checkpoint._flush)
    checkpoint.shutil.rmtree = counted(checkpoint.shutil.rmtree)  # type: ignore[attr-defined]
    Path.rename = counted(Path.rename)  # type: ignore[method-assign]
    Path.replace = counted(Path.replace)  # type: ignore[method-assign]
    go(run or toy_run(), folder, until=until)


def test_flipped_byte_takes_the_checkpoint_before_it(uncut: Path, tmp_path: Path) -> None:
    for name in ("model.safetensors", "optimizer.safetensors", "ema.safetensors", "state.json"):
        folder = tmp_path / name
        go(toy_run(), folder, until=8)
        path = folder / "checkpoints/step-8" / name
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        stream = io.StringIO()
        train(toy_run(), folder, stage=ToyStage(), stream=stream)
        assert f"step-8/{name} differs" in stream.getvalue()
        assert "resuming after step 4" in stream.getvalue()
        assert losses(folder) == losses(uncut)


def test_no_sound_checkpoint_is_an_error(tmp_path: Path) -> None:
    go(toy_run(), tmp_path, until=2)
    (tmp_path / "checkpoints/step-2/manifest.json").unlink()
    with pytest.raises(CheckpointCorrupt, match=r"none of the 1 checkpoints .* is sound"):
        go(toy_run(), tmp_path)


def test_full_disk_is_one_clear_error_and_keeps_checkpoints(tmp_path: Path) -> None:
    wide = {"width": 4096}
    go(toy_run(extra=wide), tmp_path, until=4)

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        with pytest.raises(CheckpointError, match=r"no room to save step 8 .* earlier checkpoints"):
            go(toy_run(extra=wide), tmp_path)

    assert wait(in_child(fill)) == 0
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-4"]
    go(toy_run(extra=wide), tmp_path)
    assert len(log(tmp_path)) == 12


def test_non_finite_loss_names_term_and_step_and_saves_nothing(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLoss, match=r"step 6: loss fit is not finite"):
        go(toy_run(), tmp_path, ToyStage(bad_step=6))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-4"]
    assert len(log(tmp_path)) == 6


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_finishes_the_step_saves_and_returns(
    uncut: Path, tmp_path: Path, number: signal.Signals
) -> None:
    def work() -> None:
        outcome = go(toy_run(workers=1), tmp_path, ToyStage(-1, 0.1))
        assert outcome.stopped
        assert outcome.checkpoint.is_dir()

    pid = in_child(work)
    while not (tmp_path / "log.jsonl").exists() or not log(tmp_path):
        time.sleep(0.02)
    os.killpg(pid, number)
    time.sleep(0.01)
    os.killpg(pid, number)
    assert wait(pid) == 0
    assert 0 < len(log(tmp_path)) < 12
    go(toy_run(), tmp_path)
    assert losses(tmp_path) == losses(uncut)


def test_two_trainings_in_one_folder_are_refused(tmp_path: Path) -> None:
    pid = in_child(lambda: void(go(toy_run(), tmp_path, ToyStage(-1, 0.2))))
    while not (tmp_path / "log.jsonl").exists():
        time.sleep(0.02)
    with pytest.raises(RunError, match="another training is writing"):
        go(toy_run(), tmp_path)
    os.kill(pid, signal.SIGKILL)
    wait(pid)


def test_resume_false_refuses_to_overwrite(tmp_path: Path) -> None:
    go(toy_run(), tmp_path, until=1)
    with pytest.raises(RunError, match=r"already holds checkpoints of steps \[1\]"):
        go(toy_run(), tmp_path, resume=False)


def test_another_model_is_refused_by_name(tmp_path: Path) -> None:
    go(toy_run(), tmp_path, until=1)
    with pytest.raises(CheckpointMismatch, match=r"shapes \['body.0"):
        go(toy_run(extra={"width": 8}), tmp_path)


def test_init_from_takes_the_averaged_weights_of_the_run_beside(uncut: Path) -> None:
    path = find_weights(uncut.name, uncut.parent)
    assert path == uncut / "checkpoints/step-12/model.safetensors"
    model = ToyStage().build(toy_run(init_from=str(path)))
    ema = checkpoint_tensors(uncut, 12, "ema")
    assert torch.equal(model.state_dict()["head.weight"], ema["head.weight"])
    with pytest.raises(RunError, match="expected a safetensors file"):
        find_weights("nothing-here", uncut.parent)
    with pytest.raises(CheckpointMismatch, match=r"head\.weight"):
        ToyStage().build(toy_run(init_from=str(path), extra={"width": 3}))


def test_rate_that_matches_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RateError, match=r"match no parameter: \['haed"):
        go(toy_run(rates={"haed.*": 1.0}), tmp_path)


def test_bf16_trains(tmp_path: Path) -> None:
    go(toy_run(precision="bf16", ema=None), tmp_path)
    assert falls(log(tmp_path))
    assert checkpoint_tensors(tmp_path, 12, "model")["head.weight"].dtype == torch.float32


def test_every_kind_of_batch_is_sent_to_the_device() -> None:
    part = torch.zeros(1, 3, 2, 2)
    pictures = Pictures(vanilla=part, hierarchical=part, pixel=part)
    sent = send([{"x": part}, (pictures,), None], torch.device("meta"))
    found = [sent[0]["x"], *vars(sent[1][0]).values()]
    assert len(found) == 4
    assert all(tensor.device.type == "meta" for tensor in found)
    assert sent[2] is None


def test_parked_modules_keep_their_place_and_must_not_learn(tmp_path: Path) -> None:
    model = Toy(4)
    body = model.body[0]
    to_device(model, torch.device("meta"), ["body.0", "frozen"])
    assert model.body[0] is body
    places = {name: p.device.type for name, p in model.named_parameters()}
    assert places["head.weight"] == "meta"
    assert places["body.0.weight"] == places["frozen.bias"] == "cpu"
    with pytest.raises(ValueError, match=r"no module 'haed'; modules begin with \['body'"):
        to_device(model, torch.device("cpu"), ["haed"])
    go(toy_run(parked=("frozen",)), tmp_path, until=1)
    with pytest.raises(RateError, match=r"\['head'\] cannot learn, got rates for \['head.weight'"):
        go(toy_run(parked=("head",)), tmp_path / "other")
