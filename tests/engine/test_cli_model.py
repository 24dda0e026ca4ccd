"""The command line with a real model: odd pictures are handled, wrong weights are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine import cli
from engine.commands import options
from focus import Focus
from focus.model import FocusModel
from focus.presets import focus_tiny
from focus.vocabulary import Vocabulary

VOCABULARY = Path(__file__).resolve().parents[2] / "assets" / "focus-tiny"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with an untrained focus_tiny."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights")
    Focus(FocusModel(focus_tiny()), Vocabulary.load(VOCABULARY)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(weights: Path) -> Focus:
    return options.load_model(str(weights))


@pytest.fixture
def loaded(model: Focus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "load_model", lambda *_: model)


def pictures() -> dict[str, Image.Image]:
    noise = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    return {
        "pixel": Image.new("RGB", (1, 1), (9, 9, 9)),
        "flat": Image.new("RGB", (700, 3), (250, 20, 20)),
        "deep": Image.fromarray(noise[..., 0].astype(np.uint16) * 257),
        "clear": Image.fromarray(np.dstack([noise, noise[..., 0]])),
        "noise": Image.fromarray(noise),
    }


@pytest.mark.parametrize("name", pictures())
def test_odd_pictures_are_segmented(
    loaded: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    image = pictures()[name]
    image.save(tmp_path / "a.png")
    arguments = [
        "segment",
        str(tmp_path / "a.png"),
        "--click",
        "0,0",
        "--out",
        str(tmp_path),
        "--json",
    ]
    assert cli.main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["size"] == list(image.size)
    for item in report["objects"]:
        assert Image.open(item["mask"]).size == image.size
        assert 0 <= item["score"] <= 1


def test_an_edit_keeps_the_size_of_the_picture(
    loaded: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures()["noise"].save(tmp_path / "a.png")
    arguments = ["edit", str(tmp_path / "a.png"), "make it red", "--box", "10,10,50,40"]
    assert cli.main([*arguments, "--steps", "1", "--out", str(tmp_path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert Image.open(report["edited"]).size == (120, 90)
    assert Image.open(report["mask"]).size == (120, 90)


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _truncated(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def _garbage(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x00" * 4096)


def _other_config(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    values["llm"]["num_layers"] -= 1
    (folder / "config.json").write_text(json.dumps(values))


def _unknown_key(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    values["llm"]["num_ears"] = 2
    (folder / "config.json").write_text(json.dumps(values))


def _no_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def _pickle_only(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    (folder / "model.bin").write_bytes(b"\x80\x04.")


def _empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def _gone(folder: Path) -> None:
    shutil.rmtree(folder)


def _no_vocabulary(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    "spoil",
    [
        _no_weights,
        _truncated,
        _garbage,
        _other_config,
        _unknown_key,
        _no_json,
        _pickle_only,
        _empty,
        _gone,
        _no_vocabulary,
    ],
)
def test_wrong_weights_are_one_line_and_exit_code_2(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: object
) -> None:
    folder = tmp_path / "weights"
    shutil.copytree(weights, folder)
    spoil(folder)  # type: ignore[operator]
    code = cli.main(["generate", "x", "--model", str(folder), "--out", str(tmp_path / "o")])
    out, err = capsys.readouterr()
    assert (code, out) == (2, ""), err
    assert err.count("\n") == 1
    assert str(folder) in err
    assert not (tmp_path / "o").exists()


def test_info_counts_the_parameters_of_a_model_directory(
    weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["info", str(weights), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    expected = sum(parameter.numel() for parameter in FocusModel(focus_tiny()).parameters())
    assert report["parameters"]["total"] == expected < 30e6
    assert report["config"]["name"] == "focus_tiny"
