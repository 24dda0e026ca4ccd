from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.data.guard import BadSample, DataError, check_picture, decode_map, decode_picture
from engine.data.layers import encode_map, from_cells, to_cells
from engine.data.manifest import Dataset, Manifest, Tally
from engine.data.rle import decode_rle, draw_polygon, encode_rle
from engine.data.schema import Item, decode, encode
from engine.data.shards import (
    CROPPED_AWAY,
    RATIO_BUCKETS,
    ShardReader,
    ShardWriter,
    bucket_number,
    crop_share,
    make_row,
    read_index,
)
from tests.engine.data.layouts import H, W, encoded, jpeg, palette, rectangle


def items() -> list[Item]:
    """One sample of every task."""
    picture, mask = jpeg(), rectangle(5, 5, 20, 20)
    return [
        Item(
            key="c",
            task="class",
            classes=("dog", "cat"),
            image=picture,
            masks=(mask, rectangle(10, 10, 30, 30)),
            labels=(1, 0),
            ignore=rectangle(0, 0, 12, 12),
        ),
        Item(key="r", task="referring", text="the dog", image=picture, masks=(mask,), labels=(0,)),
        Item(
            key="s", task="reasoning", text="what barks", image=picture, masks=(mask,), labels=(0,)
        ),
        Item(
            key="i",
            task="interactive",
            image=picture,
            masks=(mask,),
            labels=(0,),
            regions=(rectangle(7, 7, 8, 8),),
            region_kinds=("click",),
        ),
        Item(key="g", task="generation", text="a dog", target=picture),
        Item(key="e", task="editing", text="blue", image=picture, target=jpeg(3)),
        Item(key="v", task="vqa", text="what?", answer="a dog", image=picture),
        Item(key="t", task="text", turns=(("user", "hi"), ("assistant", "hello"))),
        Item(
            key="m",
            task="video",
            text="the dog",
            frames=(picture, jpeg(1)),
            tracks=((mask, None), (rectangle(6, 6, 9, 30), mask)),
        ),
    ]


def write(folder: Path, given: list[Item], *, rle: bool = False, name: str = "00000") -> Manifest:
    writer = ShardWriter(folder, name)
    for item in given:
        members, header = encode(item, rle=rle)
        writer.add(item.key, members, make_row(item.task, header))
    manifest = Manifest(name="t", format="test", source="s", licence="l", shards=(writer.close(),))
    manifest.write(folder)
    return manifest


def same(a: Item, b: Item) -> bool:
    def arrays(item: Item) -> list[object]:
        ignore = [] if item.ignore is None else [item.ignore]
        return [*item.masks, *item.regions, *ignore, *(m for t in item.tracks for m in t)]

    pairs = zip(arrays(a), arrays(b), strict=True)
    plain = ("key", "task", "text", "answer", "classes", "labels", "turns", "image", "target")
    return all(np.array_equal(x, y) for x, y in pairs) and all(  # type: ignore[arg-type]
        getattr(a, name) == getattr(b, name) for name in plain
    )


@pytest.mark.parametrize("rle", [False, True])
def test_every_task_reads_back_as_written(tmp_path: Path, rle: bool) -> None:
    given = items()
    write(tmp_path, given, rle=rle)
    dataset = Dataset(tmp_path)
    found = [decode(dataset.read(n)) for n in range(len(dataset))]
    assert all(same(a, b) for a, b in zip(given, found, strict=True))
    assert dataset.manifest.samples == len(given)


def test_index_points_at_the_members_of_a_plain_tar(tmp_path: Path) -> None:
    write(tmp_path, items())
    with tarfile.open(tmp_path / "00000.tar") as tar:
        listed = {info.name: (info.offset_data, info.size) for info in tar}
    places = {p.name: (p.offset, p.size) for s in read_index(tmp_path / "00000.idx") for p in s}
    assert places == listed
    assert "e.target.jpg" in listed


def test_an_unfinished_shard_is_invisible(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "00000")
    members, header = encode(items()[0])
    writer.add("c", members, make_row("class", header))
    assert [path.name for path in tmp_path.iterdir()] == [".00000.tar.partial"]
    with pytest.raises(DataError, match="'c' twice"):
        writer.add("c", members, make_row("class", header))
    writer.abandon()
    assert list(tmp_path.iterdir()) == []


def test_overlapping_masks_come_back_from_one_map() -> None:
    rng = np.random.default_rng(0)
    masks = [rng.random((23, 31)) < share for share in (0.5, 0.1, 0.0, 1.0, 0.7, 0.3, 0.3, 0.9)]
    found, cells = to_cells(masks, (23, 31))
    assert found.max() > 40
    back = from_cells(decode_map(encode_map(found)), cells)
    assert all(np.array_equal(a, b) for a, b in zip(masks, back, strict=True))


def test_more_than_255_cells_need_a_16_bit_map() -> None:
    masks = [np.arange(400).reshape(20, 20) == n for n in range(300)]
    found, cells = to_cells(masks, (20, 20))
    data = encode_map(found)
    assert check_picture(data).bits == 16
    assert all(
        np.array_equal(a, b)
        for a, b in zip(masks, from_cells(decode_map(data), cells), strict=True)
    )


def test_runs_and_polygons_agree_with_pycocotools() -> None:
    coco = pytest.importorskip("pycocotools.mask", reason="pycocotools is not installed")
    rng = np.random.default_rng(1)
    for number in range(150):
        height, width = (int(n) for n in rng.integers(1, 90, 2))
        polygon = rng.uniform(-10, 100, 2 * int(rng.integers(3, 9)))
        polygon = (polygon if number % 3 else polygon.round()).tolist()
        theirs = coco.decode(coco.frPyObjects([polygon], height, width))[..., 0]
        assert np.array_equal(draw_polygon(polygon, height, width), theirs.astype(bool))
        mask = rng.random((height, width)) < rng.random()
        packed = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
        assert encode_rle(mask)["counts"] == packed["counts"].decode()
        assert np.array_equal(decode_rle(packed), mask)


def test_runs_that_do_not_fill_the_picture_are_refused() -> None:
    for rle in (
        {"size": [4, 4], "counts": [3, 5]},
        {"size": [4, 4], "counts": [-1, 17]},
        {"size": [10**6, 10**6], "counts": [10**12]},
        {"size": [4, 4], "counts": "\x7f"},
        {"size": [4, 4], "counts": "P"},
        {"counts": [16]},
    ):
        with pytest.raises(DataError):
            decode_rle(rle)


def bomb(width: int) -> bytes:
    """A PNG of width x width whose header is true; its pixels compress to nothing."""
    return encoded(Image.new("L", (width, width)))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"\xff", "not_image"),
        (b"<html>404</html>", "not_image"),
        (jpeg()[:200], "truncated"),
        (b"\xff\xd8\xff\xe0" + b"\xff\xda" + b"\xff\xd9", "not_image"),
        (jpeg()[:-2], "truncated"),
        (encoded(Image.new("RGB", (9, 9)))[:-8], "truncated"),
        (encoded(Image.new("RGB", (64, 9)), "WEBP")[:-5], "truncated"),
        (bomb(8200), "bomb"),
    ],
)
def test_guard_names_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(BadSample) as caught:
        check_picture(data)
    assert caught.value.reason == reason


def test_guard_refuses_a_faked_size_without_decoding() -> None:
    data = bytearray(jpeg())
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = (60000).to_bytes(2, "big") * 2
    with pytest.raises(BadSample, match="bomb"):
        check_picture(bytes(data))


def test_guard_takes_trailing_junk_and_turns_sizes_upright() -> None:
    assert check_picture(jpeg() + b"junk").height == H
    image = Image.open(io.BytesIO(jpeg()))
    exif = image.getexif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif)
    header = check_picture(buffer.getvalue())
    assert (header.height, header.width, header.turned) == (W, H, True)
    assert decode_picture(buffer.getvalue()).shape == (W, H, 3)


def test_palette_maps_are_refused() -> None:
    with pytest.raises(BadSample, match="mode P"):
        decode_map(palette(np.zeros((H, W))))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"text": " "}, "bad_schema"),
        ({"labels": (1,)}, "bad_schema"),
        ({"key": "a.b"}, "bad_schema"),
        ({"image": None}, "bad_schema"),
        ({"target": jpeg()}, "bad_schema"),
        ({"image": b"GIF89a"}, "not_image"),
        ({"masks": (np.ones((3, 3), bool),)}, "wrong_size"),
    ],
)
def test_writing_refuses_what_a_task_cannot_use(change: dict[str, object], reason: str) -> None:
    import dataclasses

    good = items()[1]
    encode(good)
    with pytest.raises(BadSample) as caught:
        encode(dataclasses.replace(good, **change))  # type: ignore[arg-type]
    assert caught.value.reason == reason


def test_reader_names_cut_moved_and_missing_shards(tmp_path: Path) -> None:
    write(tmp_path, items())
    tar = tmp_path / "00000.tar"
    whole = tar.read_bytes()

    def reasons() -> list[str]:
        dataset, found = Dataset(tmp_path), []
        for number in range(len(dataset)):
            try:
                decode(dataset.read(number))
                found.append("ok")
            except BadSample as error:
                found.append(error.reason)
        return found

    assert set(reasons()) == {"ok"}
    last = read_index(tmp_path / "00000.idx")[-1]
    tar.write_bytes(whole[: last[0].offset])
    assert reasons() == ["ok"] * 8 + ["shard_truncated"]
    tar.write_bytes(bytes(512) + whole)
    assert set(reasons()) == {"stale_index"}
    tar.unlink()
    assert set(reasons()) == {"shard_missing"}


def test_a_shard_that_vanishes_while_open_is_counted(tmp_path: Path) -> None:
    write(tmp_path, items())
    reader = ShardReader(tmp_path, keep=1)
    write(tmp_path, items(), name="00001")
    reader.read("00000", 0)
    (tmp_path / "00000.tar").unlink()
    reader.read("00000", 1)  # an open file goes on
    reader.read("00001", 0)  # and is closed for the next
    with pytest.raises(BadSample, match="shard_missing"):
        reader.read("00000", 2)


def test_reader_keeps_few_files_open(tmp_path: Path) -> None:
    for number in range(6):
        write(tmp_path, items(), name=f"{number:05d}")
    reader = ShardReader(tmp_path, keep=2)
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    for number in range(6):
        reader.read(f"{number:05d}", 0)
    after = len(os.listdir("/proc/self/fd")) if before else 0
    assert after <= before + 2


def test_tally_stops_past_the_share_and_past_a_row() -> None:
    tally = Tally(share=0.1, least=100, row=1000)
    for number in range(200):
        if number % 12 == 0:
            tally.refuse(BadSample("truncated", "x", f"k{number}"))
        else:
            tally.count()
    assert tally.facts() == {"data/good": 183.0, "data/bad_truncated": 17.0}
    for _ in range(3):
        tally.refuse(BadSample("truncated", "x"))
    with pytest.raises(DataError, match=r"at most 10% bad.*got 21 of 204.*truncated.*k999"):
        tally.refuse(BadSample("truncated", "x", "k999"))
    tally = Tally(row=2)
    tally.refuse(BadSample("empty", "x"))
    with pytest.raises(DataError, match="2 in a row"):
        tally.refuse(BadSample("empty", "x"))


def test_buckets_follow_the_crop_rule() -> None:
    assert len(RATIO_BUCKETS) == 11
    assert RATIO_BUCKETS[bucket_number(1000, 1000)].size == (512, 512)
    assert RATIO_BUCKETS[bucket_number(768, 1024)].size == (384, 512)
    assert bucket_number(100, 1000) == CROPPED_AWAY
    for height in range(60, 400, 17):
        for width in range(60, 400, 13):
            number = bucket_number(height, width)
            shares = [crop_share(height, width, bucket) for bucket in RATIO_BUCKETS]
            assert number == CROPPED_AWAY or shares[number] <= 0.2
    # cut of a crop to the bucket's shape: 1 - 400 * (4 / 3) / 600 of the pixels
    bucket = RATIO_BUCKETS[bucket_number(400, 600)]
    assert bucket.size == (384, 576)
    assert crop_share(400, 600, bucket) == pytest.approx(0.0)
    assert crop_share(400, 600, RATIO_BUCKETS[2]) == pytest.approx(1 - (4 / 3) / 1.5)


def test_manifest_of_another_schema_is_refused(tmp_path: Path) -> None:
    write(tmp_path, items())
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace('"schema": 1', '"schema": 9'))
    with pytest.raises(DataError, match="schema 1 expected, got 9"):
        Manifest.read(tmp_path)
    with pytest.raises(DataError, match="focus data convert"):
        Manifest.read(tmp_path / "nowhere")
