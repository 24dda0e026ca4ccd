"""Small datasets, each written in the on-disk layout of the real one, and the truth they hold."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from engine.data.scenes import sample

H, W = 40, 60
SQUARE = [10.0, 5.0, 30.0, 5.0, 30.0, 25.0, 10.0, 25.0]
TRIANGLE = [35.5, 8.2, 55.1, 30.9, 33.3, 33.3]


def jpeg(seed: int = 0, size: tuple[int, int] = (H, W)) -> bytes:
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 255, (5, 6, 3), dtype=np.uint8)
    return encoded(Image.fromarray(small).resize(size[::-1], Image.Resampling.BICUBIC), "JPEG")


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def put(path: Path, data: bytes | str | Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(data, bytes):
        path.write_bytes(data)
    else:
        path.write_text(data if isinstance(data, str) else json.dumps(data))


def rectangle(y0: int, x0: int, y1: int, x1: int) -> np.ndarray:
    mask = np.zeros((H, W), bool)
    mask[y0:y1, x0:x1] = True
    return mask


def palette(ids: np.ndarray) -> bytes:
    image = Image.fromarray(ids.astype(np.uint8), "P")
    image.putpalette([(i * 53) % 256 for i in range(768)])
    return encoded(image)


def runs(mask: np.ndarray) -> dict[str, Any]:
    """Uncompressed RLE, written out the slow way."""
    counts, value = [0], False
    for pixel in mask.T.reshape(-1):
        if bool(pixel) != value:
            counts.append(0)
            value = not value
        counts[-1] += 1
    return {"size": [H, W], "counts": counts}


@dataclass(frozen=True)
class Expected:
    """What conversion must give: samples, their first task, and facts about the first sample."""

    count: int
    task: str
    masks: tuple[Any, ...] = ()  # arrays, or polygons / RLEs for pycocotools to decode
    text: str = ""
    texts: tuple[str, ...] = ()
    answer: str | None = None
    labels_named: tuple[str, ...] = ()
    ignored: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    split: str = ""
    variant: str = ""
    images: str = ""
    turns: tuple[tuple[str, str], ...] = ()
    tracks: tuple[tuple[Any, ...], ...] | None = None
    frames: int = 0
    regions: tuple[Any, ...] = ()


COCO_CATEGORIES = [{"id": i, "name": n} for i, n in ((1, "person"), (18, "dog"), (44, "bottle"))]


def _coco(categories: list[dict[str, Any]], name: str = "1.jpg") -> dict[str, Any]:
    crowd = {**runs(rectangle(30, 0, 40, 20))}
    return {
        "images": [
            {"id": 7, "file_name": name, "height": H, "width": W},
            {"id": 8, "file_name": name.replace("1.jpg", "gone.jpg"), "height": H, "width": W},
        ],
        "categories": categories,
        "annotations": [
            _annotation(1, 7, categories[1]["id"], [SQUARE]),
            _annotation(2, 7, categories[0]["id"], [TRIANGLE, SQUARE]),
            {**_annotation(3, 7, categories[0]["id"], crowd), "iscrowd": 1},
            _annotation(4, 8, categories[0]["id"], [SQUARE]),
        ],
    }


def _annotation(number: int, image: int, category: int, segmentation: Any) -> dict[str, Any]:
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "segmentation": segmentation,
        "iscrowd": 0,
        "area": 1.0,
        "bbox": [0, 0, 1, 1],
    }


def coco_instances(root: Path) -> Expected:
    put(root / "annotations/instances_train2017.json", _coco(COCO_CATEGORIES))
    put(root / "train2017/1.jpg", jpeg())
    return Expected(
        1,
        "class",
        masks=([SQUARE], [TRIANGLE, SQUARE]),
        labels_named=("dog", "person"),
        answer="dog, person",
        ignored=200,
        skipped={"missing_member": 1},
    )


def paco_lvis(root: Path) -> Expected:
    names = [{"id": 3, "name": "dog_(animal)"}, {"id": 9, "name": "dog_(animal):front_leg"}]
    told = _coco(names, "train2017/1.jpg")
    del told["images"][0]["file_name"]
    told["images"][0]["coco_url"] = "http://images.cocodataset.org/train2017/1.jpg"
    put(root / "paco_lvis_v1_train.json", told)
    put(root / "train2017/1.jpg", jpeg())
    return Expected(
        1,
        "class",
        masks=([SQUARE], [TRIANGLE, SQUARE]),
        labels_named=("dog front leg", "dog"),
        ignored=200,
        skipped={"missing_member": 1},
    )


def partimagenet(root: Path) -> Expected:
    names = [{"id": 0, "name": "Quadruped Head"}, {"id": 1, "name": "Quadruped Body"}]
    put(root / "train.json", _coco(names))
    put(root / "images/train/1.jpg", jpeg())
    named = ("Quadruped Body", "Quadruped Head")
    return Expected(1, "class", labels_named=named, ignored=200, skipped={"missing_member": 1})


def pascal_part(root: Path) -> Expected:
    names = [{"id": 1, "name": "dog:head"}, {"id": 2, "name": "dog:tail"}]
    put(root / "train.json", _coco(names))
    put(root / "VOCdevkit/VOC2010/JPEGImages/1.jpg", jpeg())
    named = ("dog tail", "dog head")
    return Expected(1, "class", labels_named=named, ignored=200, skipped={"missing_member": 1})


def coco_panoptic(root: Path) -> Expected:
    ids = np.zeros((H, W), np.int64)
    ids[0:20] = 5 + 256 * 3
    ids[20:30, 10:50] = 7 + 65536 * 2
    colours = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)
    segments = [
        {"id": 5 + 256 * 3, "category_id": 18, "iscrowd": 0},
        {"id": 7 + 65536 * 2, "category_id": 1, "iscrowd": 0},
    ]
    put(
        root / "annotations/panoptic_train2017.json",
        {
            "images": [{"id": 7, "file_name": "1.jpg", "height": H, "width": W}],
            "categories": COCO_CATEGORIES,
            "annotations": [{"image_id": 7, "file_name": "1.png", "segments_info": segments}],
        },
    )
    put(root / "annotations/panoptic_train2017/1.png", encoded(Image.fromarray(colours)))
    put(root / "train2017/1.jpg", jpeg())
    masks = (rectangle(0, 0, 20, W), rectangle(20, 10, 30, 50))
    ignored = H * W - sum(int(m.sum()) for m in masks)
    named = ("dog", "person")
    return Expected(1, "class", masks=masks, labels_named=named, ignored=ignored)


def _ref(number: int, annotation: Any, image: int = 7, split: str = "train") -> dict[str, Any]:
    sentences = [
        {"raw": "The dog!", "sent": "the dog", "tokens": ["the", "dog"], "sent_id": 1},
        {"raw": "left animal", "sent": "left animal", "tokens": [], "sent_id": 2},
    ]
    return {
        "ref_id": number,
        "ann_id": annotation,
        "image_id": image,
        "category_id": 18,
        "split": split,
        "file_name": "COCO_train2014_000000000007_1.jpg",
        "sent_ids": [1, 2],
        "sentences": sentences,
    }


def _refer(folder: str, splitter: str, pictures: str) -> Callable[[Path], Expected]:
    def write(root: Path) -> Expected:
        refs = [_ref(1, 1), _ref(2, 4, image=8), _ref(3, 1, split="testA")]
        (root / folder).mkdir(parents=True)
        with (root / folder / f"refs({splitter}).p").open("wb") as file:
            pickle.dump(refs, file, protocol=0)
        put(root / folder / "instances.json", _coco(COCO_CATEGORIES))
        put(root / pictures / "1.jpg", jpeg())
        return Expected(
            1,
            "referring",
            masks=([SQUARE],),
            text="the dog",
            texts=("left animal",),
            answer="dog",
            skipped={"missing_member": 1},
        )

    return write


def grefcoco(root: Path) -> Expected:
    refs = [_ref(1, [1, 2]), {**_ref(2, [-1]), "category_id": [-1]}]
    put(root / "grefcoco/grefs(unc).json", refs)
    put(root / "grefcoco/instances.json", _coco(COCO_CATEGORIES))
    put(root / "images/mscoco/images/train2014/1.jpg", jpeg())
    return Expected(
        2,
        "referring",
        masks=([SQUARE, TRIANGLE],),
        text="the dog",
        texts=("left animal",),
        answer="dog, person",
    )


def reasonseg(root: Path) -> Expected:
    def square(y0: int, x0: int, y1: int, x1: int) -> list[list[int]]:
        return [[x0, y0], [x1, y0], [x1, y1], [x0, y1]]

    shapes = [
        {"label": "target", "points": square(5, 5, 14, 19)},
        {"label": "ignore area", "points": square(20, 20, 29, 29)},
        {"label": "flag", "points": square(0, 0, 3, 3)},
    ]
    told = {"shapes": shapes, "text": ["the caf\u00e9 thing one drinks from"], "is_sentence": True}
    put(root / "train/a.json", json.dumps(told, ensure_ascii=False).encode("cp1252"))
    put(root / "train/a.jpg", jpeg())
    put(root / "explanatory/train.json", [{"image": "a.jpg", "query": "", "outputs": "a cup"}])
    return Expected(
        1,
        "reasoning",
        masks=(rectangle(5, 5, 15, 20),),
        text="the caf\u00e9 thing one drinks from",
        answer="a cup",
        ignored=100,
    )


def coco_interactive(root: Path) -> Expected:
    region = rectangle(8, 12, 10, 14)
    names = ("point", "mask", "box", "scribble")
    prompts = {f"{name}_visual_prompt_mask": runs(region) for name in names}
    annotation = {**_annotation(1, 7, 18, [SQUARE]), **prompts}
    info = {"id": 7, "file_name": "1.jpg", "height": H, "width": W}
    row = {"image": "1.jpg", "image_info": info, "new_img_id": 3, "anns": [annotation]}
    put(root / "coco_interactive_train_psalm.json", [row, {**row, "new_img_id": 4, "anns": []}])
    put(root / "train2017/1.jpg", jpeg())
    return Expected(
        1, "interactive", masks=([SQUARE],), regions=(region,), skipped={"bad_schema": 1}
    )


def _frames() -> tuple[np.ndarray, np.ndarray]:
    first, second = np.zeros((H, W), int), np.zeros((H, W), int)
    first[5:10, 5:10] = 1
    first[20:30, 20:30] = 2
    first[0, 0] = 255
    second[6:11, 6:11] = 1
    return first, second


def davis2017(root: Path) -> Expected:
    put(root / "ImageSets/2017/train.txt", "bear\n")
    for number, ids in enumerate(_frames()):
        put(root / f"JPEGImages/480p/bear/{number:05d}.jpg", jpeg(number))
        put(root / f"Annotations/480p/bear/{number:05d}.png", palette(ids))
    first, second = _frames()
    tracks = ((first == 1, second == 1), (first == 2, None))
    return Expected(1, "video", tracks=tracks, frames=2)


def youtube_vis(root: Path) -> Expected:
    first, _ = _frames()
    video = {"id": 3, "width": W, "height": H, "length": 2, "file_names": ["v/0.jpg", "v/1.jpg"]}
    annotation = {
        "id": 1,
        "video_id": 3,
        "category_id": 18,
        "iscrowd": 0,
        "segmentations": [runs(first == 2), None],
    }
    told = {"videos": [video], "categories": COCO_CATEGORIES, "annotations": [annotation]}
    put(root / "train.json", told)
    for number in (0, 1):
        put(root / f"train/JPEGImages/v/{number}.jpg", jpeg(number))
    return Expected(1, "video", tracks=((first == 2, None),), frames=2, answer="dog")


def ref_youtube_vos(root: Path) -> Expected:
    first, second = _frames()
    expressions = {"0": {"exp": "the walking bear", "obj_id": "1"}}
    told = {"videos": {"v": {"frames": ["00000", "00005"], "expressions": expressions}}}
    put(root / "meta_expressions/train/meta_expressions.json", told)
    for name, ids in zip(("00000", "00005"), _frames(), strict=True):
        put(root / f"train/JPEGImages/v/{name}.jpg", jpeg())
        put(root / f"train/Annotations/v/{name}.png", palette(ids))
    tracks = ((first == 1, second == 1),)
    return Expected(1, "video", tracks=tracks, frames=2, text="the walking bear")


def revos(root: Path) -> Expected:
    first, second = _frames()
    expressions = {
        "0": {"exp": "what may bite", "anno_id": [4, 5], "type_id": 1},
        "1": {"exp": "a pink whale", "anno_id": [], "type_id": 2},
    }
    told = {"videos": {"v": {"frames": ["0", "1"], "expressions": expressions}}}
    put(root / "meta_expressions_train_.json", told)
    masks = {"4": [runs(first == 1), runs(second == 1)], "5": [runs(first == 2), None]}
    put(root / "mask_dict.json", masks)
    for number in (0, 1):
        put(root / f"JPEGImages/v/{number}.jpg", jpeg(number))
    tracks = (((first == 1) | (first == 2), second == 1),)
    return Expected(2, "video", tracks=tracks, frames=2, text="what may bite")


TURNS = (("user", "What is it?"), ("assistant", "A dog."))


def llava(root: Path) -> Expected:
    said = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A dog."}]
    rows = [
        {"id": "a", "image": "coco/1.jpg", "conversations": said},
        {"id": "b", "conversations": said},
        {"id": "c", "image": "../../etc/passwd", "conversations": said},
    ]
    put(root / "mix.json", rows)
    put(root / "coco/1.jpg", jpeg())
    return Expected(2, "vqa", turns=TURNS, skipped={"bad_schema": 1})


def sharegpt(root: Path) -> Expected:
    messages = [{"role": "user", "content": "<image>What is it?"}]
    messages.append({"role": "assistant", "content": "A dog."})
    lines = [json.dumps({"messages": messages, "images": ["1.jpg"]}), "{broken"]
    put(root / "chat.jsonl", "\n".join(lines))
    put(root / "1.jpg", jpeg())
    return Expected(1, "vqa", turns=TURNS, skipped={"bad_json": 1})


def _parquet(path: Path, columns: dict[str, list[Any]]) -> None:
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path)


def _struct(data: bytes) -> dict[str, Any]:
    return {"bytes": data, "path": None}


def _edit(source: str, target: str, text: str, **more: Any) -> Callable[[Path], Expected]:
    def write(root: Path) -> Expected:
        instruction: Any = "make it blue"
        if text.endswith("_list"):
            instruction = ["make it blue", "paint it blue"]
        columns: dict[str, list[Any]] = {
            source: [_struct(jpeg(1)), _struct(jpeg(1)), _struct(b"<html>")],
            target: [_struct(jpeg(2)), _struct(jpeg(2, (20, 60))), _struct(jpeg(2))],
            text: [instruction] * 3,
        }
        mask = more.pop("mask", None)
        if mask:
            drawn = Image.fromarray(rectangle(4, 4, 12, 12).astype(np.uint8) * 255)
            columns[mask] = [_struct(encoded(drawn))] * 3
        for name, values in more.items():
            columns[name] = values
        _parquet(root / "data/train-00000-of-00001.parquet", columns)
        return Expected(
            1,
            "editing",
            text="make it blue",
            texts=("paint it blue",) if text.endswith("_list") else (),
            masks=(rectangle(4, 4, 12, 12),) if mask else (),
            skipped={"not_image": 1, "wrong_size": 1},
        )

    return write


def openorca(root: Path) -> Expected:
    columns = {"system_prompt": ["Be brief."], "question": ["Why?"], "response": ["Because."]}
    _parquet(root / "1M-GPT4.parquet", columns)
    turns = (("system", "Be brief."), ("user", "Why?"), ("assistant", "Because."))
    return Expected(1, "text", turns=turns)


def magpie(root: Path) -> Expected:
    said = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]
    _parquet(root / "data/train-0.parquet", {"uuid": ["u"], "conversations": [said]})
    return Expected(1, "text", turns=(("user", "Why?"), ("assistant", "Because.")))


def img2dataset(root: Path) -> Expected:
    root.mkdir(parents=True, exist_ok=True)
    with tarfile.open(root / "00000.tar", "w") as tar:
        for key, status, data in (
            ("000000000", "success", jpeg()),
            ("000000001", "failed_to_download", None),
            ("000000002", "success", b"<html>not here</html>"),
        ):
            told = {"caption": "a  dog", "url": "http://x/1.jpg", "key": key, "status": status}
            members = {"json": json.dumps(told).encode(), "txt": b"a dog"}
            if data is not None:
                members["jpg"] = data
            for ending, content in members.items():
                info = tarfile.TarInfo(f"{key}.{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    put(root / "00000_stats.json", {"count": 3})
    skipped = {"missing_member": 1, "not_image": 1}
    return Expected(1, "vqa", text="Describe the picture.", answer="a dog", skipped=skipped)


def world(root: Path) -> Expected:
    put(root / "world.json", {"seed": 0, "size": [H, W], "tasks": {"referring": 1, "vqa": 2}})
    return Expected(3, "referring", text=sample("referring", "train", 0, 0, (H, W)).text)


COCO_2014 = "images/mscoco/images/train2014"
LAYOUTS: dict[str, Callable[[Path], Expected]] = {
    "coco_instances": coco_instances,
    "coco_panoptic": coco_panoptic,
    "paco_lvis": paco_lvis,
    "partimagenet": partimagenet,
    "pascal_part": pascal_part,
    "refcoco": _refer("refcoco", "unc", COCO_2014),
    "refcoco_plus": _refer("refcoco+", "unc", COCO_2014),
    "refcocog": _refer("refcocog", "umd", COCO_2014),
    "refclef": _refer("refclef", "unc", "images/saiapr_tc-12"),
    "grefcoco": grefcoco,
    "reasonseg": reasonseg,
    "coco_interactive": coco_interactive,
    "davis2017": davis2017,
    "youtube_vis": youtube_vis,
    "ref_youtube_vos": ref_youtube_vos,
    "revos": revos,
    "llava": llava,
    "sharegpt": sharegpt,
    "instructpix2pix": _edit("original_image", "edited_image", "edit_prompt"),
    "magicbrush": _edit(
        "source_img",
        "target_img",
        "instruction",
        mask="mask_img",
        img_id=["5", "6", "7"],
        turn_index=[1, 1, 1],
    ),
    "ultraedit": _edit("source_image", "edited_image", "edit_prompt", mask="mask_image"),
    "anyedit": _edit("image_file", "edited_file", "edit", edit_type=["colour"] * 3),
    "omniedit": _edit("src_img", "edited_img", "edited_prompt_list", omni_edit_id=["a", "b", "c"]),
    "seed_edit": _edit("source_image", "target_image", "instruction"),
    "openorca": openorca,
    "magpie": magpie,
    "img2dataset": img2dataset,
    "world": world,
}
PARQUET = frozenset(
    ("instructpix2pix", "magicbrush", "ultraedit", "anyedit", "omniedit", "seed_edit")
) | {"openorca", "magpie"}
