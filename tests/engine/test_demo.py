"""The demo judges rightly: an oracle is right everywhere, a blind model nowhere."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engine import demo, demo_sections
from engine.data.records import REGION_KINDS, Record
from engine.data.scenes import clip
from engine.demo_page import Figure, render
from focus.settings import Settings


@dataclass
class Result:
    masks: list[np.ndarray]
    names: list[str]
    labels: list[int]
    text: str


@dataclass
class Edited:
    image: Image.Image
    mask: np.ndarray
    text: str


class Oracle:
    """Knows every answer by the picture it is shown."""

    settings = Settings()

    def __init__(self) -> None:
        self.records: dict[tuple[str, str, bytes], Record] = {}
        self.frames: dict[bytes, np.ndarray] = {}

    def learn(self, record: Record) -> Record:
        shown = b"" if record.image is None else record.image.tobytes()
        text = ", ".join(record.classes) if record.task == "class" else record.text
        self.records[record.task, text, shown] = record
        return record

    def watch(self, film: Any) -> Any:
        for frame, mask in zip(film.frames, film.masks(), strict=True):
            self.frames[frame.tobytes()] = mask
        return film

    def segment(self, image: Image.Image, *, text: str | None, task: str, **_: Any) -> Result:
        if image.tobytes() in self.frames:
            return Result([self.frames[image.tobytes()]], [""], [0], "")
        record = self.records[task, text or "", image.tobytes()]
        names = [record.classes[i] if record.classes else record.answer for i in record.labels]
        return Result(list(record.masks), names, list(record.labels), record.answer)

    def edit(self, image: Image.Image, text: str, *, region: Any, seed: int) -> Edited:
        record = self.records["editing", text, image.tobytes()]
        assert (region is not None) == bool(record.regions)
        return Edited(Image.fromarray(record.target), np.any(record.masks, axis=0), record.answer)

    def generate(self, text: str, *, seed: int) -> Image.Image:
        return Image.fromarray(self.records["generation", text, b""].target)

    def chat(self, image: Image.Image, text: str, *, seed: int) -> str:
        return self.records["vqa", text, image.tobytes()].answer


class Blind:
    """Sees nothing and changes nothing."""

    settings = Settings(decoder="pixel")

    def segment(self, image: Image.Image, **_: Any) -> Result:
        return Result([], [], [], "")

    def edit(self, image: Image.Image, text: str, **_: Any) -> Edited:
        return Edited(Image.new("RGB", image.size), np.zeros(image.size[::-1], bool), "")

    def generate(self, text: str, **_: Any) -> Image.Image:
        return Image.new("RGB", (64, 64))

    def chat(self, image: Image.Image, text: str, *, seed: int) -> str:
        return "I do not know"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_sections, "SIZE", 48)
    monkeypatch.setattr(demo_sections, "CLIP_FRAMES", 3)


@pytest.fixture
def oracle(monkeypatch: pytest.MonkeyPatch) -> Oracle:
    """An oracle that learns each record at the moment when the demo draws it."""
    oracle = Oracle()
    draw = demo_sections.sample
    monkeypatch.setattr(demo_sections, "sample", lambda *given: oracle.learn(draw(*given)))
    film = clip("test_unseen", 0, 0, 3, 48)
    oracle.watch(film)
    return oracle


@pytest.mark.parametrize("make", demo_sections.SECTIONS)
def test_an_oracle_is_right_everywhere(oracle: Oracle, make: Any) -> None:
    section = make(oracle, 0)
    assert section.examples
    assert {example.verdict for example in section.examples} == {"good"}
    for example in section.examples:
        assert example.figures.get("iou", 1.0) == 1.0
        assert example.figures.get("mask_iou", 1.0) == 1.0


@pytest.mark.parametrize("make", demo_sections.SECTIONS)
def test_a_blind_model_is_right_nowhere(make: Any) -> None:
    section = make(Blind(), 0)
    assert "good" not in {example.verdict for example in section.examples}
    assert demo.summary(section).startswith("0 of ")


def test_every_region_kind_and_every_edit_is_shown(oracle: Oracle) -> None:
    captions = [
        example.shots[0].caption for example in demo_sections.interactive(oracle, 0).examples
    ]
    assert captions == [f"picture and {kind}" for kind in REGION_KINDS]
    kinds = [example.kind for example in demo_sections.editing(oracle, 0).examples]
    assert kinds == list(demo_sections.EDITS)


def test_region_prompts_cover_what_a_person_marked() -> None:
    from focus.regions import region_mask

    mask = np.zeros((40, 60), bool)
    mask[10:15, 20:30] = True
    box = demo_sections.region(mask, "box")
    np.testing.assert_array_equal(region_mask(box, mask.shape), mask)
    click = demo_sections.region(mask, "click")
    assert (click.x, click.y) == (24.5, 12.0)
    for kind in ("scribble", "mask"):
        drawn = region_mask(demo_sections.region(mask, kind), mask.shape)
        assert drawn[mask].all()


def test_demo_writes_page_and_report(
    oracle: Oracle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = {
        "test": {"referring_miou": 0.5, "interactive_iou": {"box": 0.25}},
        "test_unseen": {},
    }
    monkeypatch.setattr(demo, "measure", lambda *_: measured)
    lines: list[str] = []
    report = demo.run_demo(oracle, model_name="oracle", out=tmp_path, train=False, say=lines.append)
    assert len(lines) == len(demo_sections.SECTIONS)
    written = json.loads((tmp_path / "report.json").read_text())
    assert written == json.loads(json.dumps(report))
    assert written["figures"] == measured
    page = (tmp_path / "index.html").read_text()
    assert page.count("<article>") == len(report["examples"])
    assert "{{" not in page
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)  # all in one file
    assert 'style="width:25.0%"' in page


def train_fake(stopped: bool) -> Any:
    def train(run: Any, folder: Path, **_: Any) -> SimpleNamespace:
        folder.mkdir(parents=True)
        steps = [] if stopped else [{"loss": 2.0, "samples_per_s": 4.0}] * 2
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps))
        return SimpleNamespace(stopped=stopped)

    return train


def test_training_touches_only_a_folder_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine.runs import TINY_SEQUENCE

    monkeypatch.setattr("engine.train.train", train_fake(stopped=False))
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "mine.txt").write_text("weeks of work")
    curves = list(demo.train_a_little(tmp_path, lambda _line: None))
    assert [curve.losses for curve in curves] == [(2.0, 2.0)] * len(TINY_SEQUENCE)
    assert [p.name for p in tmp_path.iterdir()] == ["training"]
    assert (tmp_path / "training" / "mine.txt").read_text() == "weeks of work"


def test_an_interrupt_ends_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.train.train", train_fake(stopped=True))
    lines: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        list(demo.train_a_little(tmp_path, lines.append))
    assert lines == [] and list(tmp_path.iterdir()) == []


def test_page_escapes_what_users_and_models_say() -> None:
    page = render(
        facts=[("model", "<script>alert(1)</script>")], figures=[], sections=[], curves=[]
    )
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page


def test_figures_leave_out_what_was_not_measured() -> None:
    found = demo.figures({"test": {"vqa_accuracy": 0.5}, "test_unseen": {"tokenizer_psnr": 20.0}})
    assert found == [
        Figure(
            name="Answers",
            told="exact match of the answer",
            values={"test": 0.5},
            goals={"test": 0.85, "test_unseen": 0.7},
        ),
        Figure(
            name="Tokenizer",
            told="reconstruction, dB",
            values={"test_unseen": 20.0},
            goals={"test": 24.0, "test_unseen": 24.0},
            top=40.0,
            unit=" dB",
        ),
    ]
