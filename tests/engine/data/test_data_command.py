from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.cli import main
from engine.data.codes import CodeReader
from engine.data.manifest import Dataset
from tests.engine.data.layouts import LAYOUTS, PARQUET
from tests.engine.data.test_convert import need
from tests.engine.data.test_loader import corrupt
from tests.engine.data.test_shards import items, write


def run(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, dict[str, object]]:
    code = main(["data", *map(str, words), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_convert_lists_every_format(capsys: pytest.CaptureFixture[str]) -> None:
    code, told = run(capsys, "convert", "--list")
    assert code == 0
    assert set(told["formats"]) == set(LAYOUTS)  # type: ignore[call-overload]


@pytest.mark.parametrize("name", sorted(set(LAYOUTS) - PARQUET) + sorted(PARQUET))
def test_convert_validate_and_inspect_work_on_every_format(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    need(name)
    expected = LAYOUTS[name](tmp_path / "in")
    shards = tmp_path / "shards"
    code, told = run(
        capsys, "convert", name, tmp_path / "in", "--out", shards, "--licence", "CC0", "--rle"
    )
    assert (code, told["samples"], told["skipped"]) == (0, expected.count, expected.skipped)
    code, told = run(capsys, "validate", shards)
    assert (code, told["samples"], told["broken"]) == (0, expected.count, [])
    code, told = run(capsys, "inspect", shards, "--out", tmp_path / "look")
    assert (code, told["licence"], told["samples"]) == (0, "CC0", expected.count)
    sheet = np.asarray(Image.open(tmp_path / "look" / "sheet.png"))
    colours = len(np.unique(sheet.reshape(-1, 3), axis=0))
    assert colours >= (2 if expected.task == "text" else 50)


def test_validate_names_every_broken_sample_and_denies_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reasons = corrupt(tmp_path, 60)
    (tmp_path / ".00001.tar.partial").write_bytes(b"half")
    code, told = run(capsys, "validate", tmp_path, "--deny")
    broken = told["broken"]
    assert isinstance(broken, list)
    assert code == 1
    assert {one["key"]: one["reason"] for one in broken} == reasons
    remarks = " ".join(told["shards"])  # type: ignore[arg-type]
    assert "SHA-256" in remarks and "half written" in remarks
    assert len(Dataset(tmp_path).denied) == len(reasons) == 3


def test_validate_repairs_missing_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, items())
    before = Dataset(tmp_path).rows.copy()
    (tmp_path / "00000.rows.npy").unlink()
    assert main(["data", "inspect", str(tmp_path)]) == 2
    assert "--repair" in capsys.readouterr().err
    code, told = run(capsys, "validate", tmp_path, "--repair")
    assert (code, told["repaired"]) == (0, 1)
    assert np.array_equal(Dataset(tmp_path).rows, before)


def test_convert_tells_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "convert", "llava"]) == 2
    assert "SOURCE" in capsys.readouterr().err
    words = ["data", "convert", "llava", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main(words) == 2
    assert "a JSON file of dialogues expected" in capsys.readouterr().err


def test_world_writes_what_runs_draw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("world", "focus_tiny_stage2", "focus_tiny_stage3", "--out", tmp_path / "w")
    code, told = run(capsys, *words, "--samples", "3", "--per-shard", "10")
    tasks = ("class", "editing", "generation", "interactive", "referring", "vqa")
    assert (code, told["shards"], told["tasks"]) == (0, 2, dict.fromkeys(tasks, 3))
    assert run(capsys, "validate", tmp_path / "w")[0] == 0
    assert main(["data", *map(str, words), "--samples", "4"]) == 2
    assert "other scenes" in capsys.readouterr().err


def test_encode_adds_the_models_own_codes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    from engine.data.encode import sizes_of
    from engine.data.pil import Copies, PilDecoder, Work
    from engine.data.views import make_view
    from focus.batch import Pictures
    from focus.model import FocusModel
    from focus.presets import focus_tiny
    from focus.pretrained import save_model

    torch.manual_seed(0)
    config = focus_tiny()
    model = FocusModel(config).eval()
    save_model(tmp_path / "model", model, config)
    given = [item for item in items() if item.task in ("vqa", "editing", "text", "generation")]
    write(tmp_path / "shards", given)
    words = ("encode", tmp_path / "shards", "--model", tmp_path / "model", "--loader", "pil")
    code, told = run(capsys, *words)
    assert (code, told["samples"]) == (0, 3)
    dataset = Dataset(tmp_path / "shards")
    reader = CodeReader(dataset)
    sizes = sizes_of(config)
    assert sizes is not None
    for number, item in enumerate(given):
        codes = reader.read(number)
        picture = item.target or item.image
        if picture is None:
            assert codes is None
            continue
        assert codes is not None
        work = Work(picture, make_view((40, 60), sizes))
        (found,) = PilDecoder().decode([work])
        assert isinstance(found, Copies)
        copies = {"vanilla": found.vit, "hierarchical": found.frame, "pixel": found.pixel}
        tensors = {
            name: torch.from_numpy(one.copy()).permute(2, 0, 1)[None] / 255
            for name, one in copies.items()
        }
        with torch.no_grad():
            expected = model.front.tokenize(Pictures(**tensors))
        assert np.array_equal(codes.semantic, expected.semantic[0].numpy())
        assert np.array_equal(codes.pixel, expected.pixel[0].numpy())
        assert codes.pixel.shape == config.pixel.grid


@pytest.mark.slow
def test_two_processes_write_the_codes_of_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    from focus.model import FocusModel
    from focus.presets import focus_tiny
    from focus.pretrained import save_model

    torch.manual_seed(0)
    save_model(tmp_path / "model", FocusModel(focus_tiny()).eval(), focus_tiny())
    for name in ("one", "two"):
        words = ("world", "focus_tiny_stage2", "--out", tmp_path / name, "--samples", "6")
        assert run(capsys, *words, "--per-shard", "2")[0] == 0
        told = ("encode", tmp_path / name, "--model", tmp_path / "model", "--loader", "pil")
        code, report = run(capsys, *told, "--workers", "1" if name == "one" else "2")
        assert (code, report["samples"]) == (0, 6)
    files = sorted(path.name for path in (tmp_path / "one").glob("*.codes.safetensors"))
    assert len(files) == 3
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    # An interrupted encoding goes on: only the missing shard is written.
    kept = (tmp_path / "two" / files[0]).stat().st_mtime_ns
    (tmp_path / "two" / files[2]).unlink()
    told = ("encode", tmp_path / "two", "--model", tmp_path / "model", "--loader", "pil")
    assert run(capsys, *told)[1]["samples"] == 6
    assert (tmp_path / "two" / files[0]).stat().st_mtime_ns == kept
    assert (tmp_path / "two" / files[2]).read_bytes() == (tmp_path / "one" / files[2]).read_bytes()
