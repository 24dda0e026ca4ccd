"""The README tells the truth: it is short, and every command in it runs."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engine import cli
from engine.commands import options

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHIPPED = ROOT / "assets" / "focus-tiny" / "model.safetensors"

# Commands that are too long for this test, and what is checked instead.
INSTEAD: dict[str, str] = {
    "make demo": "target",
    "make test": "target",
    "make train-tiny": "target",
    "make bench": "target",
    "make lint": "target",
    "focus demo": "help",
    "focus export focus-tiny --out out/bundle": "help",  # tests/engine/export runs these three
    "focus verify out/bundle": "help",
    "focus train focus_3b_stage3 --dry-run": "help",  # tests/parallel runs these two, smaller
    "focus plan focus_3b_stage3_256 --gpus 64 --gpu h100": "help",
    'focus edit photo.png "remove the red circle" --model out/bundle --backend onnx': "help",
    "focus train focus_tiny": "help",
    "focus evaluate focus-tiny --split test": "help",
    "focus evaluate focus-tiny --split test_unseen": "help",
}
PROSE = ("", "text")  # blocks that show output or a file tree


def blocks(language: str | None = None) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.M | re.S)
    return [body for name, body in found if language is None or name == language]


def commands() -> list[str]:
    lines = (
        line.partition("  #")[0].strip() for body in blocks("console") for line in body.split("\n")
    )
    return [line.removeprefix("$ ") for line in lines if line]


@cache
def shipped_model(load: Callable[[str], Any]) -> Any:
    return load("focus-tiny")


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with photo.png, the shipped model loaded once for all commands."""
    pixels = np.full((96, 128, 3), 235, np.uint8)
    rows, columns = np.mgrid[:96, :128]
    pixels[(rows - 40) ** 2 + (columns - 60) ** 2 < 500] = (210, 30, 40)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    load = options.load_model
    monkeypatch.setattr(options, "load_model", lambda *_: shipped_model(load))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_readme_fits_150_lines() -> None:
    assert 20 < README.count("\n") <= 150


def test_every_block_names_a_known_language() -> None:
    names = set(re.findall(r"^```(\w*)\n.*?^```$", README, flags=re.M | re.S))
    assert names <= {"console", "python", *PROSE}


def test_every_path_named_in_the_readme_exists() -> None:
    named = re.findall(
        r"`([\w./-]+/[\w./-]*|[\w-]+\.(?:md|toml|py))`|\]\((?!https?:)([^)#]+)\)", README
    )
    made = ("out/", "runs/")
    paths = [first or second for first, second in named]
    assert paths
    missing = [p for p in paths if not p.startswith(made) and not (ROOT / p).exists()]
    assert missing == []


@pytest.mark.parametrize("line", commands())
def test_readme_command_runs(line: str, workplace: Path) -> None:
    words = shlex.split(line)
    if INSTEAD.get(line) == "target":
        assert words[0] == "make"
        done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return
    assert words[0] == "focus", f"map {line!r} in INSTEAD"
    if INSTEAD.get(line) == "help":
        cli.build_parser().parse_args(words[1:])
        return
    needs_weights = words[1] in ("segment", "edit", "generate", "chat")
    if needs_weights and not SHIPPED.is_file():
        pytest.skip("this checkout holds no weights")
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        assert cli.main(words[1:]) == 0
    assert output.getvalue().strip()


@pytest.mark.parametrize("source", blocks("python"))
def test_readme_python_runs(source: str, workplace: Path) -> None:
    compile(source, "README.md", "exec")
    if not SHIPPED.is_file():
        pytest.skip("this checkout holds no weights")
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(source, {})
    assert output.getvalue().strip()
