from __future__ import annotations

import importlib.util
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from engine.data.convert.driver import Job, convert
from engine.data.convert.format import DataError, Options, pick_classes, read_pickle
from engine.data.convert.reason import draw_shapes
from engine.data.convert.registry import FORMATS
from engine.data.manifest import Dataset
from engine.data.schema import Item, decode
from tests.engine.data.layouts import LAYOUTS, PARQUET, H, W, jpeg, put

PYCOCO = importlib.util.find_spec("pycocotools") is not None


def truth(given: object) -> np.ndarray:
    """A mask as it is, or decoded by pycocotools (the fixtures hold polygons and RLEs)."""
    if isinstance(given, np.ndarray):
        return given
    if not PYCOCO:
        pytest.skip("pycocotools is not installed")
    from pycocotools import mask as coco

    return coco.decode(coco.merge(coco.frPyObjects(given, H, W))).astype(bool)


def items(folder: Path) -> list[Item]:
    dataset = Dataset(folder)
    return [decode(dataset.read(number)) for number in range(len(dataset))]


def need(name: str) -> None:
    if name in PARQUET:
        pytest.importorskip("pyarrow", reason="pyarrow is not installed: no parquet")


def test_layouts_cover_every_format() -> None:
    assert set(LAYOUTS) == set(FORMATS)


@pytest.mark.parametrize("name", LAYOUTS)
def test_convert_reads_the_layout(name: str, tmp_path: Path) -> None:
    need(name)
    expected = LAYOUTS[name](tmp_path / "in")
    out = tmp_path / "out"
    manifest = convert(Job(format=name, source=tmp_path / "in", out=out, licence="CC-BY-4.0"))
    found = items(out)
    first = found[0]
    assert (len(found), first.task, manifest.licence) == (
        expected.count,
        expected.task,
        "CC-BY-4.0",
    )
    assert dict(manifest.skipped) == expected.skipped
    assert sum(manifest.tasks.values()) == expected.count == manifest.samples
    if expected.text:
        assert first.text == expected.text
        assert first.texts == expected.texts
    if expected.answer is not None:
        assert first.answer == expected.answer
    assert first.turns == expected.turns
    named = tuple(first.classes[label] for label in first.labels) if expected.labels_named else ()
    assert named == expected.labels_named
    for mask, given in zip(first.masks, expected.masks, strict=bool(expected.masks)):
        assert np.array_equal(mask, truth(given))
    for region, given in zip(first.regions, expected.regions, strict=True):
        assert np.array_equal(region, given)
    assert (0 if first.ignore is None else int(first.ignore.sum())) == expected.ignored
    assert len(first.frames) == expected.frames
    for track, given in zip(first.tracks, expected.tracks or (), strict=True):
        for mask, want in zip(track, given, strict=True):
            assert (mask is None and want is None) or np.array_equal(mask, want)


def many(root: Path, count: int) -> None:
    """A dataset of dialogues; every seventh has no picture."""
    said = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "it"}]
    rows = [{"id": i, "image": f"{i}.jpg", "conversations": said} for i in range(count)]
    put(root / "chat.json", rows)
    for number in range(count):
        if number % 7:
            put(root / f"{number}.jpg", jpeg(number, (16, 16)))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("0*"))}


def test_convert_is_the_same_for_any_number_of_workers_and_interruptions(tmp_path: Path) -> None:
    many(tmp_path / "in", 40)

    def job(out: str, workers: int) -> Job:
        return Job(
            format="llava",
            source=tmp_path / "in",
            out=tmp_path / out,
            per_shard=6,
            workers=workers,
        )

    whole = convert(job("whole", 1))
    assert whole.samples == 34
    assert whole.skipped == {"missing_member": 6}
    convert(job("parallel", 3))

    class Stop(Exception):
        pass

    def interrupt(_seen: int, shards: int) -> None:
        if shards == 3:
            raise Stop

    with pytest.raises(Stop):
        convert(job("cut", 1), interrupt)
    assert not (tmp_path / "cut" / "manifest.json").exists()
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "cut").glob("0*.tar")}
    assert len(before) == 3
    resumed = convert(job("cut", 2))
    after = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "cut").glob("0*.tar")}
    assert {name: after[name] for name in before} == before  # finished shards stay untouched
    assert contents(tmp_path / "whole") == contents(tmp_path / "parallel")
    assert contents(tmp_path / "whole") == contents(tmp_path / "cut")
    assert resumed.shards == whole.shards
    lines = (tmp_path / "cut" / "skipped.jsonl").read_text().splitlines()
    assert [json.loads(line)["name"] for line in lines[:2]] == ["chat.json 0", "chat.json 7"]


def test_convert_refuses_another_jobs_folder(tmp_path: Path) -> None:
    many(tmp_path / "in", 8)
    job = Job(format="llava", source=tmp_path / "in", out=tmp_path / "out", per_shard=4)
    convert(job)
    other = Job(format="llava", source=tmp_path / "in", out=tmp_path / "out", per_shard=5)
    with pytest.raises(DataError, match=r"another conversion .other per_shard"):
        convert(other)


def test_convert_names_known_formats_and_places(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"coco_instances.*got 'cocoo'"):
        convert(Job(format="cocoo", source=tmp_path, out=tmp_path / "out"))
    with pytest.raises(DataError, match=r"instances_train2017\.json expected"):
        convert(Job(format="coco_instances", source=tmp_path, out=tmp_path / "out"))


def test_pickles_that_name_a_class_are_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {tmp_path}/owned",)

    for protocol in (0, 2, 4):
        path = tmp_path / f"{protocol}.p"
        path.write_bytes(pickle.dumps([{"ref_id": 1}, Evil()], protocol))
        with pytest.raises(DataError, match="plain values expected"):
            read_pickle(path)
        path.write_bytes(pickle.dumps([{"ref_id": 1, "text": "\u00e9"}], protocol))
        assert read_pickle(path) == [{"ref_id": 1, "text": "\u00e9"}]
    assert not (tmp_path / "owned").exists()


def test_generation_variant_puts_the_picture_to_draw(tmp_path: Path) -> None:
    LAYOUTS["img2dataset"](tmp_path / "in")
    options = Options(variant="generation")
    convert(
        Job(format="img2dataset", source=tmp_path / "in", out=tmp_path / "out", options=options)
    )
    (item,) = items(tmp_path / "out")
    assert (item.task, item.text, item.image) == ("generation", "a dog", None)
    assert item.target == jpeg()


def test_long_videos_become_clips(tmp_path: Path) -> None:
    LAYOUTS["davis2017"](tmp_path / "in")
    job = Job(
        format="davis2017",
        source=tmp_path / "in",
        out=tmp_path / "out",
        options=Options(frames=1),
    )
    convert(job)
    found = items(tmp_path / "out")
    assert [item.source for item in found] == ["bear/00000.jpg", "bear/00001.jpg"]
    assert [len(item.tracks) for item in found] == [2, 1]


def test_no_target_expressions_have_no_mask(tmp_path: Path) -> None:
    LAYOUTS["grefcoco"](tmp_path / "in")
    convert(Job(format="grefcoco", source=tmp_path / "in", out=tmp_path / "out"))
    kinds = [(item.kind, len(item.masks)) for item in items(tmp_path / "out")]
    assert kinds == [("several", 1), ("no_target", 0)]


def test_reason_shapes_draw_the_largest_first() -> None:
    def box(low: int, high: int) -> list[list[int]]:
        return [[low, low], [high, low], [high, high], [low, high]]

    shapes = [
        {"label": "ignore", "points": box(4, 7)},
        {"label": "target", "points": box(2, 12)},
    ]
    mask, ignore = draw_shapes(shapes, 20, 20)
    assert int(mask.sum()) == 11 * 11 - 4 * 4
    assert int(ignore.sum()) == 16


def test_candidates_hold_the_present_classes_and_others() -> None:
    names = [f"c{i}" for i in range(100)]
    chosen = pick_classes(names, ["c7", "c90", "c7"], 20, "key")
    assert len(chosen) == len(set(chosen)) == 20
    assert {"c7", "c90"} <= set(chosen)
    assert chosen == pick_classes(names, ["c7", "c90"], 20, "key")
    assert chosen != pick_classes(names, ["c7", "c90"], 20, "other")
    assert set(pick_classes(names, names, 20, "key")) == set(names)
