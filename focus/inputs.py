"""Samples to `Batch`: one decode feeds every resolution, one builder writes every sequence."""

# B batch, N masks, R regions, P points, H W picture in the hierarchical encoder's frame

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from focus import prompts
from focus.batch import Batch, Pictures
from focus.config import FocusConfig
from focus.geometry import letterbox
from focus.packing import plan_rows
from focus.regions import sample_points
from focus.sequence import collate as join
from focus.vocabulary import Vocabulary

Image = npt.NDArray[np.uint8]  # [H, W, 3] RGB
Mask = npt.NDArray[np.bool_]  # [H, W]


class Sample(prompts.RecordLike, Protocol):
    """What a batch is made of: a training record or a request."""

    @property
    def image(self) -> Image | None: ...  # noqa: D102
    @property
    def regions(self) -> Sequence[Mask]: ...  # noqa: D102
    @property
    def masks(self) -> Sequence[Mask]: ...  # noqa: D102
    @property
    def labels(self) -> Sequence[int]: ...  # noqa: D102
    @property
    def target(self) -> Image | None: ...  # noqa: D102


def to_pictures(images: Sequence[Image], config: FocusConfig) -> Pictures:
    """Letterbox pictures to X_H and derive X_L and the pixel branch's copy from it.

    Pictures that already have X_H's size are taken as they are. RGB in [0, 1].
    """
    size = config.hierarchical.image_size
    high = np.stack([i if i.shape[:2] == size else letterbox(i, size)[0] for i in images])
    pictures = torch.from_numpy(high).permute(0, 3, 1, 2).float().div_(255.0)
    return Pictures(
        vanilla=resize(pictures, config.vanilla.image_size),
        hierarchical=pictures,
        pixel=resize(pictures, config.pixel.image_size),
    )


def resize(pictures: Tensor, size: tuple[int, int]) -> Tensor:
    """Resample [B, 3, h, w] with an antialiased bicubic filter; exact halves by averaging."""
    height, width = pictures.shape[-2:]
    if (height, width) == size:
        return pictures
    if height % size[0] == 0 and width % size[1] == 0:
        return F.avg_pool2d(pictures, (height // size[0], width // size[1]))
    return F.interpolate(pictures, size, mode="bicubic", antialias=True).clamp(0, 1)


def fit_mask(mask: Mask, size: tuple[int, int]) -> Mask:
    """Letterbox a mask to `size`; masks of that size pass unchanged.

    A cell more than half covered is in. A mask too thin or small for that keeps every cell that one
    of its pixels falls in: no region vanishes.
    """
    if mask.shape == size:
        return mask
    grey = np.repeat(mask[..., None].astype(np.uint8) * 255, 3, 2)
    fitted, box = letterbox(grey, size, fill=0)
    found = np.asarray(fitted[..., 0] > 127)
    if not found.any():
        rows, columns = (
            at * content // source + offset
            for at, content, source, offset in zip(
                mask.nonzero(), box.content, box.source, box.offset, strict=True
            )
        )
        found[rows, columns] = True
    return found


def collate(
    records: Sequence[Sample],
    config: FocusConfig,
    vocabulary: Vocabulary,
    *,
    seed: int | None = None,
    until: prompts.Until = "end",
    pack: int = 0,
) -> Batch:
    """Build one batch of samples of one task.

    `seed` makes the points of regions random (None: evenly spaced); `until` as in `prompts.build`;
    `pack` is the length of packed rows in the trunk (0: a row per sequence).
    Raises ValueError when tasks differ.
    """
    tasks = {record.task for record in records}
    if len(tasks) != 1:
        raise ValueError(f"records of one task expected, got {sorted(tasks)}; batch them by task")
    sequences = [prompts.build(record, vocabulary, config, until=until) for record in records]
    fields: dict[str, object] = {**join(sequences, pad_id=vocabulary.pad_id)}
    if pack:
        fields["places"] = plan_rows([len(sequence) for sequence in sequences], pack)
    size = config.hierarchical.image_size
    images = [record.image for record in records if record.image is not None]
    if images:
        fields["pictures"] = to_pictures(images, config)
    targets = [record.target for record in records if record.target is not None]
    if targets:
        fields["target"] = to_pictures(targets, config)
    if any(record.regions for record in records):
        fields.update(_region_fields(records, config, seed))
    if any(record.masks for record in records):
        fields.update(_mask_fields(records, size))
    return Batch(task=records[0].task, **fields)  # type: ignore[arg-type]


def _region_fields(
    records: Sequence[Sample], config: FocusConfig, seed: int | None
) -> dict[str, Tensor]:
    size, points = config.hierarchical.image_size, config.region.num_points
    most = max(len(record.regions) for record in records)
    found = np.zeros((len(records), most, points, 2), np.float32)
    for row, record in enumerate(records):
        for number, region in enumerate(record.regions):
            own = None if seed is None else seed + 1009 * row + number
            found[row, number] = sample_points(fit_mask(region, size), points, own)
    return {"region_points": torch.from_numpy(found)}


def _mask_fields(records: Sequence[Sample], size: tuple[int, int]) -> dict[str, Tensor]:
    most = max(len(record.masks) for record in records)
    masks: npt.NDArray[np.bool_] = np.zeros((len(records), most, *size), np.bool_)
    labels = np.full((len(records), most), -1, np.int64)
    for row, record in enumerate(records):
        for number, (mask, label) in enumerate(zip(record.masks, record.labels, strict=True)):
            masks[row, number] = fit_mask(mask, size)
            labels[row, number] = label
    fields = {"masks": torch.from_numpy(masks), "mask_labels": torch.from_numpy(labels)}
    objects = _objects(records, most)
    if objects is not None:
        fields["mask_objects"] = objects
    if records[0].task == "editing":
        fields["edit_mask"] = fields["masks"][:, 0]
    return fields


def _objects(records: Sequence[Sample], most: int) -> Tensor | None:
    """Object numbers [B, N], the same in all frames of a clip, -1 padding; None without clips."""
    told = [tuple(getattr(record, "objects", ())) for record in records]
    if not any(told):
        return None
    numbers: dict[tuple[str, int], int] = {}
    found = np.full((len(records), most), -1, np.int64)
    for row, (record, objects) in enumerate(zip(records, told, strict=True)):
        for column, own in enumerate(objects):
            key = (str(getattr(record, "id", row)), int(own))
            found[row, column] = numbers.setdefault(key, len(numbers))
    return torch.from_numpy(found)
