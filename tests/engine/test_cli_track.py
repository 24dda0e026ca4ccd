"""`focus track`: clips in, clips, masks and a report out."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engine import cli
from engine.commands import options
from engine.data.scenes import clip
from engine.video_files import read_clip, write_clip

FRAMES = list(clip("train", 0, 0, 3, (48, 64)).frames)


class FakeModel:
    def __init__(self) -> None:
        self.given: dict[str, Any] = {}

    def track(self, frames: list[np.ndarray], **given: Any) -> Any:
        self.given = given
        masks = [np.zeros((48, 64), bool) for _ in frames]
        masks[1][10:20, 10:30] = True
        return SimpleNamespace(masks=[masks], names=["circle"], scores=[[0.1, 0.9, 0.2]])

    def edit_clip(self, frames: list[np.ndarray], text: str, *rest: Any, **given: Any) -> Any:
        self.given = {"text": text, "rest": rest, **given}
        return [SimpleNamespace(image=Image.fromarray(255 - frame)) for frame in frames]


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> FakeModel:
    fake = FakeModel()
    monkeypatch.setattr(options, "load_model", lambda *_: fake)
    return fake


@pytest.fixture
def frames(tmp_path: Path) -> str:
    return str(write_clip(tmp_path / "clip", FRAMES))


def test_tracking_writes_masks_and_a_clip(
    model: FakeModel, frames: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["track", frames, "--click", "10,12", "--frame", "1", "--out", str(out), "--json"]
    assert cli.main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert model.given["start"] == 1 and model.given["regions"][0].x == 10
    assert report["objects"][0]["seen"] == 1
    mask = np.asarray(Image.open(out / "clip.mask-1" / "00001.png"))
    assert (mask > 0).sum() == 200
    assert len(read_clip(report["written"]).frames) == 3


def test_a_shorter_run_leaves_no_frames_of_the_longer(
    model: FakeModel, frames: str, tmp_path: Path
) -> None:
    arguments = ["track", frames, "a circle", "--out", str(tmp_path / "out")]
    assert cli.main(arguments) == 0
    for number in (2, 3):
        write_clip(tmp_path / "stale", FRAMES).rename(tmp_path / "out" / f"clip.mask-{number}")
    (tmp_path / "out" / "clip.mask-3" / "notes.txt").write_text("mine")
    assert cli.main([*arguments, "--limit", "2"]) == 0
    assert len(list((tmp_path / "out" / "clip.mask-1").iterdir())) == 2
    folders = sorted(p.name for p in (tmp_path / "out").iterdir() if p.is_dir())
    assert folders == ["clip.mask-1", "clip.mask-3"]
    assert len(list((tmp_path / "out" / "clip.mask-3").iterdir())) == 4


def test_what_cannot_be_written_is_said_before_the_work(
    model: FakeModel,
    frames: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dotted = Path(frames).rename(tmp_path / "take.v2")  # a folder, not a format
    out = tmp_path / "out"
    assert cli.main(["track", str(dotted), "a circle", "--out", str(out)]) == 0
    assert (out / "take.tracked.gif").is_file()
    (out / "take.mask-1" / "notes.txt").write_text("mine")
    monkeypatch.setattr(options, "load_model", lambda *_: pytest.fail("the model was loaded"))
    assert cli.main(["track", str(dotted), "a circle", "--out", str(out)]) == 2
    assert "got ['notes.txt']" in capsys.readouterr().err


def test_class_names_are_stripped(model: FakeModel, frames: str, tmp_path: Path) -> None:
    arguments = ["track", frames, "--classes", " red circle, ,blue star "]
    assert cli.main([*arguments, "--out", str(tmp_path / "out")]) == 0
    assert model.given["classes"] == ["red circle", "blue star"]


def test_editing_writes_the_edited_frames(
    model: FakeModel, frames: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    assert cli.main(["track", frames, "--edit", "make it red", "--seed", "4", "--out", out]) == 0
    assert model.given == {"text": "make it red", "rest": (None, 0), "seed": 4}
    assert "clip.edited.gif" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one of TEXT, --classes or regions"),
        (["a circle", "--classes", "star"], "give one of TEXT"),
        (["a circle", "--edit", "make it red"], "--edit takes its text and at most one region"),
        (["--edit", "", "--click", "1,1"], "--edit is empty; say what you want in words"),
        ([" "], "TEXT is empty"),
        (["", "--click", "1,1"], "TEXT is empty"),
        (["x" * 1001], "TEXT has 1001 characters"),
        (["--classes", "\ud800"], "--classes is not valid UTF-8"),
        (["--classes", " , ,"], "--classes: names by commas expected, got ', ,'"),
        (["--click", "1,1", "--frame", "3"], "--frame: 0 to 2 expected, got 3"),
        (["--click", "99,1"], "a point inside the picture expected"),
    ],
)
def test_bad_input_is_one_line(
    model: FakeModel,
    frames: str,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert cli.main(["track", frames, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
