"""The one list of dataset formats. To add one: a function in a file beside, and a line here."""

from __future__ import annotations

from functools import partial

from engine.data.convert import chat, coco, reason, refer, table, video
from engine.data.convert.format import Format
from engine.data.scene_model import DataError
from engine.data.world import FORMAT as WORLD

_REFS = "refs({}).p and instances.json below {}; COCO train2014 below images"

_LIST = (
    Format(
        name="coco_instances",
        layout="annotations/instances_SPLIT.json, SPLIT/*.jpg",
        convert=coco.instances,
    ),
    Format(
        name="coco_panoptic",
        layout="annotations/panoptic_SPLIT.json and its PNGs, SPLIT/*.jpg",
        convert=coco.panoptic,
    ),
    Format(
        name="paco_lvis",
        layout="annotations/paco_lvis_v1_SPLIT.json; COCO 2017 pictures",
        convert=coco.paco,
    ),
    Format(name="partimagenet", layout="SPLIT.json, images/SPLIT/*", convert=coco.parts),
    Format(
        name="pascal_part",
        layout="SPLIT.json of VLPart, VOCdevkit/VOC2010/JPEGImages",
        convert=coco.parts,
    ),
    *(
        Format(
            name=name.replace("+", "_plus"),
            layout=_REFS.format(splitter, name),
            convert=partial(refer.single, name, splitter),
        )
        for name, splitter in (
            ("refcoco", "unc"),
            ("refcoco+", "unc"),
            ("refcocog", "umd"),
            ("refclef", "unc"),
        )
    ),
    Format(
        name="grefcoco",
        layout="grefs(unc).json and instances.json; COCO train2014",
        convert=refer.grouped,
    ),
    Format(name="reasonseg", layout="SPLIT/NAME.jpg with NAME.json", convert=reason.reasonseg),
    Format(
        name="coco_interactive",
        layout="coco_interactive_SPLIT_psalm.json; COCO 2017 pictures",
        convert=reason.interactive,
    ),
    Format(
        name="davis2017",
        layout="ImageSets/2017/SPLIT.txt, JPEGImages/480p, Annotations/480p",
        convert=video.davis,
    ),
    Format(
        name="youtube_vis",
        layout="SPLIT.json, SPLIT/JPEGImages/VIDEO/*.jpg",
        convert=video.youtube_vis,
    ),
    Format(
        name="ref_youtube_vos",
        layout="meta_expressions/SPLIT/meta_expressions.json, SPLIT/{JPEGImages,Annotations}",
        convert=video.ref_youtube,
    ),
    Format(
        name="revos",
        layout="meta_expressions_SPLIT_.json, mask_dict.json, VIDEO/*.jpg",
        convert=video.revos,
    ),
    Format(name="llava", layout="JSON of dialogues; pictures in --images", convert=chat.chat),
    Format(name="sharegpt", layout="JSON of dialogues; pictures in --images", convert=chat.chat),
    *(
        Format(
            name=name,
            layout=f"*.parquet with {', '.join((*columns.source, *columns.target, *columns.text))}",
            convert=partial(table.edits, name),
        )
        for name, columns in table.EDITS.items()
    ),
    Format(
        name="openorca",
        layout="*.parquet with system_prompt, question, response",
        convert=table.texts,
    ),
    Format(name="magpie", layout="*.parquet with conversations", convert=table.texts),
    Format(
        name="img2dataset",
        layout="NNNNN.tar of KEY.jpg, KEY.txt, KEY.json (COYO, LAION)",
        convert=chat.web,
    ),
    WORLD,
)
FORMATS: dict[str, Format] = {each.name: each for each in _LIST}


def find_format(name: str) -> Format:
    """Return the format of that name. Raises: DataError that lists the known ones."""
    if name not in FORMATS:
        raise DataError(f"a format of {', '.join(FORMATS)} expected, got {name!r}")
    return FORMATS[name]
