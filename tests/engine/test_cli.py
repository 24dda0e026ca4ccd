"""The command line: quick help, one line for every error, files and JSON of what it did."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engine import cli
from engine.commands import NAMES, load, options

SIZE = (60, 40)  # width, height
HEAVY = ("torch", "numpy", "PIL", "transformers", "diffusers", "scipy", "megatron")


@dataclass
class SegmentResult:
    masks: list[np.ndarray]
    names: list[str]
    scores: list[float]
    text: str = ""


@dataclass
class EditResult:
    image: Image.Image
    mask: np.ndarray
    text: str


@dataclass
class FakeModel:
    """Answers at once and remembers how it was asked."""

    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def segment(self, image: Image.Image, **given: Any) -> SegmentResult:
        self.calls.append(("segment", {"size": image.size, "mode": image.mode, **given}))
        mask = np.zeros(SIZE[::-1], bool)
        mask[10:20, 10:40] = True
        return SegmentResult([mask, ~mask], ["red circle", "rest"], [0.9, 0.25], "red circle")

    def edit(self, image: Image.Image, text: str, **given: Any) -> EditResult:
        self.calls.append(("edit", {"text": text, **given}))
        mask = np.zeros(SIZE[::-1], bool)
        mask[:10] = True
        return EditResult(Image.new("RGB", image.size, (1, 2, 3)), mask, "red circle")

    def generate(self, text: str, **given: Any) -> Image.Image:
        self.calls.append(("generate", {"text": text, **given}))
        return Image.new("RGB", (64, 64), (given["seed"], 0, 0))

    def chat(self, image: Image.Image, text: str, **given: Any) -> str:
        self.calls.append(("chat", {"text": text, **given}))
        return "two"


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> FakeModel:
    fake = FakeModel()
    monkeypatch.setattr(options, "load_model", lambda *_: fake)
    return fake


@pytest.fixture
def photo(tmp_path: Path) -> str:
    path = tmp_path / "a photo.png"
    Image.new("RGBA", SIZE, (200, 30, 30, 255)).save(path)
    return str(path)


def focus(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Run the command line in this process; return exit code, output, errors."""
    try:
        code = cli.main(arguments)
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys, engine.cli\n"
        "try: engine.cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        f"print('heavy:', [m for m in {HEAVY!r} if m in sys.modules])"
    )
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith("heavy: []\n")
    assert time.perf_counter() - start < 5  # under 0.2 s on an idle machine


@pytest.mark.parametrize("name", NAMES)
def test_every_command_has_help_with_an_example(
    capsys: pytest.CaptureFixture[str], name: str
) -> None:
    code, out, _ = focus(capsys, name, "--help")
    assert code == 0
    assert f"focus {name}" in out
    for example in load(name).EXAMPLES:
        assert example in out
        assert example.startswith(f"focus {name}")
    assert "--json" in out or name == "data"  # a group: its actions have their own


def test_segment_writes_overlay_masks_and_report(
    capsys: pytest.CaptureFixture[str], model: FakeModel, photo: str, tmp_path: Path
) -> None:
    code, out, err = focus(
        capsys,
        "segment",
        photo,
        " the red circle ",
        "--out",
        str(tmp_path / "o"),
        "--json",
        "--seed",
        "7",
    )
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert model.calls == [
        (
            "segment",
            {
                "size": SIZE,
                "mode": "RGB",
                "text": "the red circle",
                "regions": None,
                "task": "referring",
                "seed": 7,
            },
        )
    ]
    assert [item["name"] for item in report["objects"]] == ["red circle", "rest"]
    assert report["objects"][0]["share"] == pytest.approx(300 / 2400)
    mask = np.asarray(Image.open(report["objects"][0]["mask"]))
    assert mask.shape == SIZE[::-1]
    assert (mask == 255).sum() == 300
    assert Image.open(report["overlay"]).width >= 384
    written = json.loads(Path(report["report"]).read_text())
    assert {**written, "report": report["report"]} == report
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == [
        "a-photo.json",
        "a-photo.mask-1.png",
        "a-photo.mask-2.png",
        "a-photo.overlay.png",
    ]


def test_segment_takes_regions_of_every_kind(
    capsys: pytest.CaptureFixture[str], model: FakeModel, photo: str, tmp_path: Path
) -> None:
    painted = np.zeros(SIZE[::-1], np.uint8)
    painted[5:9, 5:9] = 255
    Image.fromarray(painted).save(tmp_path / "m.png")
    (tmp_path / "s.json").write_text("[[1, 2], [30, 2.5]]")
    arguments = ["--click", "3,4", "--box", "1,2,30,40", "--mask", str(tmp_path / "m.png")]
    arguments += ["--scribble", str(tmp_path / "s.json"), "--scribble", str(tmp_path / "m.png")]
    code, _, err = focus(capsys, "segment", photo, *arguments, "--out", str(tmp_path))
    assert (code, err) == (0, "")
    from focus.regions import Box, Click, MaskRegion, Scribble

    _, given = model.calls[0]
    assert given["task"] == "interactive"
    assert given["text"] is None
    click, box, mask, points, strokes = given["regions"]
    assert click == Click(3.0, 4.0)
    assert box == Box(1.0, 2.0, 30.0, 40.0)
    assert isinstance(mask, MaskRegion)
    assert isinstance(points, Scribble)
    assert isinstance(strokes, Scribble)


def test_edit_writes_result_mask_and_before_after(
    capsys: pytest.CaptureFixture[str], model: FakeModel, photo: str, tmp_path: Path
) -> None:
    code, out, _ = focus(
        capsys,
        "edit",
        photo,
        "make <region> blue",
        "--click",
        "3,4",
        "--out",
        str(tmp_path / "o"),
        "--json",
    )
    assert code == 0
    report = json.loads(out)
    assert Image.open(report["edited"]).getpixel((0, 0)) == (1, 2, 3)
    assert report["share"] == pytest.approx(0.25)
    assert report["regions"] == [{"kind": "click", "value": "3,4"}]
    assert Path(report["before_after"]).is_file()
    assert "steps" not in model.calls[0][1]


def test_generate_and_chat(
    capsys: pytest.CaptureFixture[str], model: FakeModel, photo: str, tmp_path: Path
) -> None:
    code, out, _ = focus(capsys, "generate", "a / star", "--seed", "9", "--out", str(tmp_path))
    assert code == 0
    assert Image.open(tmp_path / "a-star.seed-9.png").getpixel((0, 0)) == (9, 0, 0)
    assert str(tmp_path / "a-star.seed-9.png") in out
    code, out, _ = focus(capsys, "chat", photo, "How many?", "--out", str(tmp_path))
    assert (code, out) == (0, "two\n")
    assert json.loads((tmp_path / "a-photo.json").read_text())["answer"] == "two"


def test_scenes_writes_samples_of_every_task_with_their_truth(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ["scenes", "--num", "1", "--seed", "3", "--size", "64", "--out", str(tmp_path)]
    code, out, err = focus(capsys, *arguments, "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    from engine.data.records import TASKS
    from engine.data.scenes import sample

    assert [item["task"] for item in report["samples"]] == list(TASKS)
    for item in report["samples"]:
        record = sample(item["task"], "val", 3, 0, 64)
        assert (item["text"], item["answer"]) == (record.text, record.answer)
        for path, truth in zip(item["masks"], record.masks, strict=True):
            np.testing.assert_array_equal(np.asarray(Image.open(path)) > 0, truth)
        for key in ("image", "target"):
            if (truth := getattr(record, key)) is not None:
                np.testing.assert_array_equal(np.asarray(Image.open(item[key])), truth)
    assert all(Path(path).stat().st_size > 1000 for path in report["sheets"])


BAD = {
    "no command": ([], "arguments are required"),
    "unknown command": (["paint"], "invalid choice"),
    "missing picture": (["segment", "none.png", "x"], "No such file"),
    "no text": (["segment", "PHOTO"], "TEXT is missing"),
    "empty text": (["segment", "PHOTO", "  "], "TEXT is empty"),
    "long text": (["chat", "PHOTO", "x" * 10_000], "has 10000 characters"),
    "not UTF-8": (["generate", "a\udcff"], "not valid UTF-8"),
    "unknown task": (["segment", "PHOTO", "x", "--task", "paint"], "invalid choice"),
    "no region": (["segment", "PHOTO", "--task", "interactive"], "needs --click"),
    "region unsaid": (["edit", "PHOTO", "make <region> red"], "point at it"),
    "two regions": (["edit", "PHOTO", "x", "--click", "1,1", "--box", "1,1,2,2"], "not allowed"),
    "click outside": (["segment", "PHOTO", "--click", "60,5"], "x below 60, y below 40"),
    "click words": (["segment", "PHOTO", "--click", "a,b"], "2 numbers"),
    "click nan": (["segment", "PHOTO", "--click", "nan,1"], "2 numbers"),
    "box outside": (["segment", "PHOTO", "--box", "1,1,61,9"], "x1 <= 60"),
    "box reversed": (["segment", "PHOTO", "--box", "9,9,1,1"], "x0 < x1"),
    "box short": (["segment", "PHOTO", "--box", "9,9,1"], "4 numbers"),
    "mask size": (["edit", "PHOTO", "x", "--mask", "OTHER"], "must have the picture's size"),
    "mask missing": (["edit", "PHOTO", "x", "--mask", "none.png"], "No such file"),
    "scribble words": (["segment", "PHOTO", "--scribble", "BAD.json"], "JSON \\[\\[x, y\\]"),
    "negative seed": (["generate", "x", "--seed", "-1"], "0 to"),
    "no steps": (["edit", "PHOTO", "x", "--steps", "0"], "1 to 1000"),
    "out is a file": (["generate", "x", "--out", "PHOTO"], "cannot be written"),
    "evaluate task": (["evaluate", "--tasks", "paint"], "no task paint"),
    "evaluate split": (["evaluate", "--split", "mine"], "invalid choice"),
    "scenes size": (["scenes", "--size", "4"], "32 to 2048"),
    "info config": (["info", "focus_9000b"], "no model 'focus_9000b'"),
    "train nothing": (["train"], "RUN is missing"),
    "train unknown": (["train", "nothing"], "no run 'nothing'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str],
    model: FakeModel,
    photo: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    case: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("L", (5, 5), 255).save(tmp_path / "other.png")
    (tmp_path / "bad.json").write_text('{"x": 1}')
    names = {"PHOTO": photo, "OTHER": "other.png", "BAD.json": "bad.json"}
    arguments, message = BAD[case]
    code, out, err = focus(capsys, *(names.get(word, word) for word in arguments))
    assert (code, out) == (2, "")
    assert err.startswith("focus")
    assert err.count("\n") == 1
    assert len(err) < 600
    assert re.search(message, err), err


def test_a_bundle_is_opened_on_its_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.serve.backends.load_model", lambda *given: given)
    assert options.load_model("bundle", "onnx") == ("bundle", "onnx")


def test_figures_are_printed_before_a_file_that_fails(
    capsys: pytest.CaptureFixture[str],
    model: FakeModel,
    photo: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    figures = {"vqa_accuracy": 0.5, "interactive_iou": {"box": 0.25}}
    monkeypatch.setattr("engine.evaluate.tasks.evaluate", lambda *_, **__: figures)
    code, out, err = focus(capsys, "evaluate", "--json", f"{photo}/figures.json")
    assert code == 2 and "cannot be written" in err
    assert out.split() == ["vqa_accuracy", "0.500", "interactive_iou.box", "0.250"]
    code, out, err = focus(capsys, "info", "--no-flops", "--json", f"{photo}/sizes.json")
    assert code == 2 and "cannot be written" in err
    assert out.startswith("focus_tiny:") and "machine" in out


def test_info_writes_its_report(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "deep" / "sizes.json"
    code, out, _ = focus(capsys, "info", "--no-flops", "--json", str(path))
    assert code == 0 and out.startswith("focus_tiny:")
    assert json.loads(path.read_text())["command"] == "info"
    assert [p.name for p in path.parent.iterdir()] == ["sizes.json"]


REPORT = {"split": "test", "seed": 0, "num": 5, "vqa_accuracy": 0.5}


@pytest.mark.parametrize(
    ("report", "message"),
    [
        ("{", "f.json: a report of `focus evaluate` expected"),
        ("[]", "it has no split, seed, num"),
        (json.dumps({"seed": 0, "num": 5}), "it has no split"),
        (json.dumps({**REPORT, "vqa_accuracy": "good"}), "a number expected for vqa_accuracy"),
        (json.dumps(REPORT), ""),
    ],
)
def test_publish_checks_its_card_before_it_replaces_a_model(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    report: str,
    message: str,
) -> None:
    published: list[Path] = []

    def publish(_run: str, out: Path) -> SimpleNamespace:
        published.append(out)
        return SimpleNamespace(model=SimpleNamespace(parameters=list))

    monkeypatch.setattr("engine.publish.publish", publish)
    (tmp_path / "f.json").write_text(report)
    arguments = ["publish", "run", "--out", str(tmp_path / "m"), "--figures"]
    code, _, err = focus(capsys, *arguments, str(tmp_path / "f.json"))
    assert message in err
    assert (code, published) == ((2, []) if message else (0, [tmp_path / "m"]))
    if not message:
        card = (tmp_path / "m" / "README.md").read_text()
        assert "| question answering, exact match | 0.500 |" in card
        assert [p.name for p in (tmp_path / "m").iterdir()] == ["README.md"]


def test_publish_names_a_checkpoint_that_tells_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "run" / "checkpoints" / "step-1").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "latest").write_text("step-1")
    (tmp_path / "run" / "checkpoints" / "step-1" / "state.json").write_text("{}")
    arguments = ["publish", "run", "--out", str(tmp_path / "m"), "--trained"]
    code, _, err = focus(capsys, *arguments, str(tmp_path / "run"))
    assert code == 2 and "does not say how it was trained" in err


def test_an_internal_error_is_one_line_and_exit_code_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: str) -> None:
        raise RuntimeError("weights\nare gone")

    monkeypatch.setattr(options, "load_model", broken)
    code, _, err = focus(capsys, "generate", "x")
    assert code == 1
    assert (
        err == "focus generate: error: RuntimeError: weights are gone (FOCUS_DEBUG=1 shows where)\n"
    )
    monkeypatch.setenv("FOCUS_DEBUG", "1")
    assert "Traceback" in focus(capsys, "generate", "x")[2]


def test_a_warning_of_ours_is_one_line_and_one_of_a_library_is_silent(
    capsys: pytest.CaptureFixture[str], model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def warn(*_: str) -> None:
        for name, place in (("ours", options.__file__), ("theirs", np.__file__)):
            warnings.warn_explicit(f"{name} is weak", UserWarning, place, 1)
        raise ValueError("enough")

    monkeypatch.setattr(options, "load_model", warn)
    code, _, err = focus(capsys, "generate", "x")
    assert (code, err) == (2, "note: ours is weak\nfocus generate: error: enough\n")


def test_an_interrupt_is_exit_code_130(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(options, "load_model", interrupted)
    assert focus(capsys, "generate", "x") == (130, "", "focus: interrupted\n")


def test_a_closed_pipe_is_no_error() -> None:
    done = subprocess.run(
        f"{sys.executable} -m engine segment --help | true; echo ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Traceback" not in done.stderr


def test_a_long_error_is_cut() -> None:
    line = cli.one_line(ValueError("x" * 5000 + "\n" * 9), internal=False)
    assert len(line) == cli.MAX_LINE
    assert cli.one_line(FileNotFoundError(2, "No such file", "a.png"), internal=False) == (
        "a.png: No such file"
    )
