from __future__ import annotations

import json
import resource
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.data.codes import CodeReader, Encoding, SampleCodes, encode_shard
from engine.data.dali import dali_problem
from engine.data.guard import DataError
from engine.data.loader import Loaded, Loader, Settings
from engine.data.manifest import Dataset, Manifest, Tally
from engine.data.mixture import Mixture, Part
from engine.data.pil import Copies, open_decoder
from engine.data.scenes import sample
from engine.data.schema import Item
from engine.data.shards import read_index
from engine.data.views import Augment, Sizes
from tests.engine.data.layouts import encoded, jpeg, rectangle
from tests.engine.data.test_shards import items, write

SIZES = Sizes(frame=(64, 64), vit=(28, 28), pixel=(32, 32))
LOADERS = [
    "pil",
    pytest.param(
        "dali", marks=pytest.mark.skipif(dali_problem() is not None, reason=str(dali_problem()))
    ),
]


def load(folder: Path, task: str, size: int, settings: Settings, name: str = "pil") -> Loaded:
    mixed = Mixture([Part(dataset=str(folder), task=task, weight=1, size=size)])
    return Loader(mixed, open_decoder(name, 1), settings).load(mixed.pick(0))


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize(
    "task", ["class", "referring", "reasoning", "interactive", "generation", "editing", "vqa"]
)
def test_scenes_come_back_from_shards_as_they_were(tmp_path: Path, task: str, name: str) -> None:
    """A scene written as PNG and read at its own size is the same record, pixel by pixel."""
    records = [sample(task, "train", 0, index, 64) for index in range(6)]  # type: ignore[arg-type]

    def png(image: np.ndarray | None) -> bytes | None:
        return None if image is None else encoded(Image.fromarray(image))

    write(
        tmp_path,
        [
            Item(
                key=record.id,
                task=record.task,
                kind=record.kind,
                text=record.text,
                answer=record.answer,
                classes=record.classes,
                image=png(record.image),
                target=png(record.target),
                masks=record.masks,
                labels=record.labels,
                regions=record.regions,
                region_kinds=record.region_kinds,
            )
            for record in records
        ],
    )
    loaded = load(tmp_path, task, 6, Settings(frame=(64, 64), sizes=SIZES, crop=False), name)
    by_id = {record.id: record for record in loaded.records}
    assert sorted(by_id) == sorted(record.id for record in records)
    for record in records:
        found = by_id[record.id]
        for field in ("task", "kind", "text", "answer", "classes", "labels", "region_kinds"):
            assert getattr(found, field) == getattr(record, field), field
        for mine, theirs in zip(
            (found.image, found.target, *found.masks, *found.regions),
            (record.image, record.target, *record.masks, *record.regions),
            strict=True,
        ):
            assert (mine is None and theirs is None) or np.array_equal(mine, theirs)  # type: ignore[arg-type]


def corrupt(folder: Path, count: int) -> dict[str, str]:
    """A dataset of `count` captions; then every twentieth member is damaged. Keys and reasons."""
    given = [
        Item(key=f"p{n:04d}", task="vqa", text="what?", answer=str(n), image=jpeg(n, (32, 32)))
        for n in range(count)
    ]
    write(folder, given)
    tar = bytearray((folder / "00000.tar").read_bytes())
    reasons = {}
    for number, places in enumerate(read_index(folder / "00000.idx")):
        if number % 20 != 7:
            continue
        place = {p.ending: p for p in places}["jpg" if number % 3 else "json"]
        data = b"<html>".ljust(place.size, b" ") if number % 3 == 1 else b"{".ljust(place.size)
        if number % 3 == 2:
            data = bytes(tar[place.offset : place.offset + place.size - 9]) + bytes(9)
        tar[place.offset : place.offset + place.size] = data
        reasons[f"p{number:04d}"] = ("bad_json", "not_image", "truncated")[number % 3]
    (folder / "00000.tar").write_bytes(tar)
    return reasons


@pytest.mark.parametrize("name", LOADERS)
def test_one_in_twenty_broken_trains_through_with_exact_counts(tmp_path: Path, name: str) -> None:
    reasons = corrupt(tmp_path, 200)
    mixed = Mixture([Part(dataset=str(tmp_path), task="vqa", weight=1, size=8)], seed=2)
    tally = Tally(log=tmp_path / "bad.jsonl")
    loader = Loader(mixed, open_decoder(name, 1), Settings(frame=(64, 64), sizes=SIZES), tally)
    seen: Counter[str] = Counter()
    lost = 0
    for loaded in loader.run():
        seen.update(record.id for record in loaded.records)
        lost += loaded.lost
        if loaded.pick.index == 24:
            break
    assert len(reasons) == lost == 10
    assert seen == Counter({f"p{n:04d}": 1 for n in range(200) if n % 20 != 7})
    lines = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert {line["key"]: line["reason"] for line in lines if line["key"] in reasons} == reasons


def test_too_many_broken_samples_stop_with_a_clear_error(tmp_path: Path) -> None:
    corrupt(tmp_path, 100)
    mixed = Mixture([Part(dataset=str(tmp_path), task="vqa", weight=1, size=10)])
    tally = Tally(share=0.02, least=20)
    loader = Loader(mixed, open_decoder("pil"), Settings(frame=(64, 64), sizes=SIZES), tally)
    with pytest.raises(DataError, match=r"at most 2% bad samples.*focus data validate"):
        list(zip(range(20), loader.run(), strict=False))


def test_a_vanished_shard_is_counted_and_ends_in_an_error_not_a_hang(tmp_path: Path) -> None:
    given = [
        Item(key=f"p{n}", task="vqa", text="?", answer="a", image=jpeg(n, (32, 32)))
        for n in range(40)
    ]
    write(tmp_path, given)
    mixed = Mixture([Part(dataset=str(tmp_path), task="vqa", weight=1, size=4)])
    (tmp_path / "00000.tar").unlink()
    tally = Tally(row=12)
    loader = Loader(mixed, open_decoder("pil"), Settings(frame=(64, 64), sizes=SIZES), tally)
    with pytest.raises(DataError, match=r"12 in a row.*shard_missing"):
        list(zip(range(20), loader.run(), strict=False))


def test_the_thread_changes_nothing_and_ends(tmp_path: Path) -> None:
    import threading

    write(tmp_path, [item for item in items() if item.task == "referring"])
    mixed = Mixture([Part(dataset=str(tmp_path), task="referring", weight=1, size=1)], seed=5)
    settings = Settings(
        frame=(64, 64), sizes=SIZES, augment=Augment(flip=0.5, shift=True, brightness=0.2)
    )

    def run(ahead: int, start: int, count: int) -> list[np.ndarray]:
        loader = Loader(mixed, open_decoder("pil"), settings)
        found = []
        for loaded in loader.run(ahead=ahead, start=start):
            image = loaded.records[0].image
            assert image is not None
            found.append(image)
            if len(found) == count:
                break
        return found

    straight, threaded, resumed = run(0, 0, 12), run(3, 0, 12), run(2, 7, 5)
    assert all(np.array_equal(a, b) for a, b in zip(straight, threaded, strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(straight[7:], resumed, strict=True))
    assert len({image.tobytes() for image in straight}) > 4
    assert not [thread for thread in threading.enumerate() if thread.name == "loader"]


def test_flipping_swaps_sides_in_texts_masks_and_picture(tmp_path: Path) -> None:
    image = np.full((40, 60, 3), 255, np.uint8)
    image[5:20, 5:20] = 0
    item = Item(
        key="r",
        task="referring",
        text="the dog on the left",
        answer="dog",
        image=encoded(Image.fromarray(image)),
        masks=(rectangle(5, 5, 20, 20),),
        labels=(0,),
    )
    write(tmp_path, [item])
    loaded = load(
        tmp_path,
        "referring",
        1,
        Settings(frame=(60, 60), sizes=SIZES, crop=False, augment=Augment(flip=1.0)),
    )
    (record,) = loaded.records
    assert record.image is not None
    assert record.text == "the dog on the right"
    dark = record.image[..., 0] < 128
    assert (dark == record.masks[0]).mean() > 0.99
    assert dark[:, 40:].any() and not dark[:, :30].any()


def test_a_clip_gives_frames_with_their_own_masks(tmp_path: Path) -> None:
    write(tmp_path, [item for item in items() if item.task == "video"])
    mixed = Mixture([Part(dataset=str(tmp_path), task="video", weight=1, size=1)])
    settings = Settings(frame=(60, 60), sizes=SIZES, crop=False)
    loader = Loader(mixed, open_decoder("pil"), settings)
    counts = {len(loader.load(mixed.pick(n)).records[0].masks) for n in range(12)}
    assert counts == {2, 1}  # both objects, then one
    assert loader.load(mixed.pick(0)).records[0].task == "referring"


def test_a_clip_gives_pairs_of_frames_with_numbered_objects(tmp_path: Path) -> None:
    write(tmp_path, [item for item in items() if item.task == "video"])
    mixed = Mixture([Part(dataset=str(tmp_path), task="video", weight=1, size=1)])
    settings = Settings(frame=(60, 60), sizes=SIZES, crop=False)
    loader = Loader(mixed, open_decoder("pil"), settings, pairs=True)
    seen = set()
    for index in range(12):
        one, two = loader.load(mixed.pick(index)).records
        assert one.id == two.id
        assert one.image is not None and not np.array_equal(one.image, two.image)
        for record in (one, two):
            assert len(record.objects) == len(record.masks) == len(set(record.objects))
        seen.add((one.objects, two.objects))
    assert {objects for pair in seen for objects in pair} == {(0, 1), (1,)}


def test_memory_stays_flat(tmp_path: Path) -> None:
    given = [
        Item(key=f"p{n}", task="vqa", text="?", answer="a", image=jpeg(n, (32, 32)))
        for n in range(60)
    ]
    write(tmp_path, given)
    mixed = Mixture([Part(dataset=str(tmp_path), task="vqa", weight=1, size=10)])
    loader = Loader(mixed, open_decoder("pil"), Settings(frame=(64, 64), sizes=SIZES))
    for index in range(30):
        loader.load(mixed.pick(index))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for index in range(30, 90):
        loader.load(mixed.pick(index))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 4096  # KiB, 600 samples


def mean_codes(copies: list[Copies]) -> list[SampleCodes]:
    """A stand-in tokenizer: the mean level of 8 x 8 blocks."""

    def blocks(image: np.ndarray) -> np.ndarray:
        grey = image.mean(-1)[: image.shape[0] // 8 * 8, : image.shape[1] // 8 * 8]
        return grey.reshape(grey.shape[0] // 8, 8, -1, 8).mean((1, 3)).astype(np.int32)

    return [SampleCodes(blocks(one.vit), blocks(one.pixel)) for one in copies]


def test_codes_are_those_of_the_plain_picture_and_resume(tmp_path: Path) -> None:
    import dataclasses

    given = [item for item in items() if item.task in ("vqa", "editing", "text")]
    write(tmp_path, given)
    dataset = Dataset(tmp_path)
    how = Encoding(fingerprint="abc", frame=(64, 64))
    decoder = open_decoder("pil")
    assert encode_shard(dataset, 0, mean_codes, decoder, how) == 2
    before = (tmp_path / "00000.codes.safetensors").stat().st_mtime_ns

    def never(_copies: object) -> list[SampleCodes]:
        raise AssertionError("the shard was encoded twice")

    assert encode_shard(dataset, 0, never, decoder, how) == 2
    assert (tmp_path / "00000.codes.safetensors").stat().st_mtime_ns == before
    with pytest.raises(DataError, match="focus data encode"):
        CodeReader(dataset)
    told = Manifest.read(tmp_path)
    dataclasses.replace(told, codes={".codes.safetensors": "abc"}).write(tmp_path)
    augment = Augment(flip=1.0, brightness=0.5)
    loaded = load(tmp_path, "vqa", 1, Settings(frame=(64, 64), augment=augment, codes=True))
    copies = loaded.pictures[0]
    assert copies is not None and loaded.codes[0] is not None
    (expected,) = mean_codes([copies])
    assert np.array_equal(loaded.codes[0].semantic, expected.semantic)
    assert np.array_equal(loaded.codes[0].pixel, expected.pixel)
    assert loaded.codes[0].pixel.shape == (384 // 8, 576 // 8)
    dataclasses.replace(told, codes={".codes.safetensors": "xyz"}).write(tmp_path)
    with pytest.raises(DataError, match="codes of tokenizer xyz expected, got abc"):
        load(tmp_path, "vqa", 1, Settings(frame=(64, 64), codes=True))
