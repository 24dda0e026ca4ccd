"""FOCUS in three lines:

    from focus import Focus
    model = Focus.from_pretrained("focus-tiny")
    model.segment(image, "the red circle")

One object answers questions about a picture, segments what words, clicks, scribbles, boxes or masks
point at, draws pictures, and edits exactly the region that is meant.
"""

# H W picture

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image as PILImage

from focus import settings as generation_settings
from focus.buckets import Bucket, buckets_for, match_bucket
from focus.config import FocusConfig
from focus.geometry import Letterbox, lay_in_frame
from focus.model import CONDITION_KINDS, FocusModel
from focus.paste import paste
from focus.pictures import read_picture, rgb_of
from focus.pipeline import Pipeline, Session, codes_of, to_uint8
from focus.pretrained import (
    WEIGHTS,
    SkipRandom,
    find_model,
    load_weights,
    parameters_in,
    read_config,
    save_model,
)
from focus.prompts import REGION
from focus.regions import Region, region_mask
from focus.request import Bitmap, EditResult, Pixels, Request, RequestError, SegmentResult
from focus.segment.infer import Instances, Thresholds, decode
from focus.segment.predictor import Prediction
from focus.segment.refine import Refinement
from focus.settings import Settings
from focus.video import Tracks, edit_clip, track_classes, track_regions, track_text
from focus.vocabulary import Vocabulary

Picture = PILImage.Image | np.ndarray | str | Path
SegmentTask = Literal["referring", "reasoning", "class", "interactive"]
SEGMENT_TASKS = ("referring", "reasoning", "class", "interactive")


class Focus:
    """A FOCUS model with its vocabulary and decoding defaults.

    Every method takes one picture (PIL, array uint8 [H, W, 3], or a path) of any size; the
    `*_batch` methods take requests of one task and are what evaluation and serving call.
    """

    def __init__(
        self, model: FocusModel, vocabulary: Vocabulary, settings: Settings | None = None
    ) -> None:
        self.model = model.eval()
        self.vocabulary = vocabulary
        self.settings = settings or Settings()

    @property
    def config(self) -> FocusConfig:
        """Sizes of the model."""
        return self.model.config

    @classmethod
    def from_pretrained(cls, name: str | Path, dtype: torch.dtype | None = None) -> Focus:
        """Load a directory, or a model that ships with FOCUS ("focus-tiny").

        dtype: precision of the weights in memory; torch.bfloat16 halves it and runs every task.
        Raises `CheckpointMismatch` when files are missing, truncated, pickled or of another config.
        """
        directory = find_model(name)
        config = read_config(directory)
        with SkipRandom(), parameters_in(dtype):
            model = FocusModel(config)
        load_weights(model, directory / WEIGHTS)
        vocabulary = Vocabulary.load(directory)
        return cls(model, vocabulary, generation_settings.read(directory))

    def save_pretrained(self, directory: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write weights, config, vocabulary and decoding defaults, atomically.

        Raises `TargetError` when the folder holds something else than a model, and `OSError`.
        """
        settings = {generation_settings.FILE: generation_settings.write(self.settings)}
        extra = {**settings, **self.vocabulary.files()}
        save_model(directory, self.model, self.config, dtype=dtype, extra=extra)

    # -- one picture ------------------------------------------------------------------------------

    def segment(
        self,
        image: Picture,
        text: str | None = None,
        regions: Sequence[Region] | None = None,
        task: str | None = None,
        seed: int = 0,
        thresholds: Thresholds | None = None,
    ) -> SegmentResult:
        """Find what a text names or regions point at.

        task: "referring" or "reasoning" (an expression), "class" (names by commas), "interactive"
        (regions); by default interactive when regions come without text. Give a text or regions,
        not both. Masks have the picture's size. Raises `RequestError`, `RegionError`.
        """
        task = task or ("interactive" if regions and not text else "referring")
        if task not in SEGMENT_TASKS:
            raise RequestError(f"a task of {', '.join(SEGMENT_TASKS)} expected, got {task!r}")
        if regions and (task != "interactive" or (text and text.strip())):
            raise RequestError(
                "a text or regions expected, got both; an edit takes both, a segmentation does not"
            )
        pixels = read_pixels(image)
        if task == "interactive":
            if not regions:
                raise RequestError("interactive segmentation needs at least one region, got none")
            request = Request(
                task=task, image=pixels, regions=self._masks(regions, pixels), seed=seed
            )
        elif not text or not text.strip():
            raise RequestError(f"{task} segmentation needs a text, got none")
        elif task == "class":
            names = tuple(part.strip() for part in text.split(",") if part.strip())
            request = Request(task=task, image=pixels, classes=names, seed=seed)
        else:
            request = Request(task=task, image=pixels, text=text, seed=seed)
        return self.segment_batch([request], thresholds)[0]

    def edit(
        self,
        image: Picture,
        text: str,
        region: Region | None = None,
        seed: int = 0,
        steps: int | None = None,
    ) -> EditResult:
        """Change a picture as a text says, at the object it names or a region points at.

        "<region>" in the text stands for the region; without it the region takes the place of
        "it", "this" or "that", or is added at the end. Raises `RequestError`, `RegionError`.
        """
        if not text.strip():
            raise RequestError("an instruction expected, got an empty text")
        pixels = read_pixels(image)
        regions: tuple[Bitmap, ...] = ()
        if region is not None:
            regions = self._masks([region], pixels)
            text = point(text)
        elif REGION in text:
            raise RequestError(f"the text says {REGION}, but no region came; give one")
        request = Request(task="editing", text=text, image=pixels, regions=regions, seed=seed)
        return self.edit_batch([request], steps)[0]

    def generate(
        self,
        text: str,
        seed: int = 0,
        steps: int | None = None,
        size: tuple[int, int] | None = None,
    ) -> PILImage.Image:
        """Draw a picture from a text.

        size: (height, width) wished for; the bucket of the nearest aspect is drawn. By default the
        model's own resolution.
        """
        if not text.strip():
            raise RequestError("a description expected, got an empty text")
        request = Request(task="generation", text=text, seed=seed)
        bucket = None if size is None else match_bucket(*size, buckets_for(self.config))
        return PILImage.fromarray(self.generate_batch([request], steps, bucket)[0])

    def chat(
        self,
        image: Picture,
        text: str,
        history: Sequence[tuple[str, str]] = (),
        seed: int = 0,
    ) -> str:
        """Answer a question about a picture; `history`: the (question, answer) pairs before it."""
        if not text.strip():
            raise RequestError("a question expected, got an empty text")
        pixels = read_pixels(image)
        if not history:
            return self.chat_batch([Request(task="vqa", text=text, image=pixels, seed=seed)])[0]
        (first, answer), *later = history
        request = Request(
            task="vqa",
            text=first,
            answer=answer,
            turns=(*later, (text, "")),
            image=pixels,
            seed=seed,
        )
        return self.chat_batch([request])[0]

    # -- clips ------------------------------------------------------------------------------------

    def track(
        self,
        frames: Sequence[Picture],
        text: str | None = None,
        regions: Sequence[Region] | None = None,
        start: int = 0,
        classes: Sequence[str] | None = None,
        seed: int = 0,
    ) -> Tracks:
        """Follow objects through a clip: what a text names, regions of one frame mark, or classes.

        regions: of frame `start`, any frame; masks spread forwards and backwards. text: found in
        every frame. classes: all their objects, each under one number. Give exactly one of them.
        Raises `RequestError`, `RegionError`.
        """
        given = [bool(text and text.strip()), bool(regions), bool(classes)]
        if sum(given) != 1:
            raise RequestError("one of text, regions or classes expected; give exactly one")
        clip = [read_pixels(frame) for frame in frames]
        if regions:
            return track_regions(self, clip, regions, start, seed=seed)
        if classes:
            return track_classes(self, clip, classes, seed=seed)
        return track_text(self, clip, text or "", seed=seed)

    def edit_clip(
        self,
        frames: Sequence[Picture],
        text: str,
        region: Region | None = None,
        start: int = 0,
        seed: int = 0,
        steps: int | None = None,
    ) -> list[EditResult]:
        """Edit every frame of a clip with one instruction and the same noise; see `edit`.

        A region of frame `start` is followed through the clip first.
        """
        clip = [read_pixels(frame) for frame in frames]
        return edit_clip(self, clip, text, region, start, seed=seed, steps=steps)

    # -- batches of one task ----------------------------------------------------------------------

    def segment_batch(
        self, requests: Sequence[Request], thresholds: Thresholds | None = None
    ) -> list[SegmentResult]:
        """Segment pictures of one task; see `segment`."""
        pipeline = self.pipeline()
        session = pipeline.open(requests)
        words = pipeline.say(session)
        refinement = self.settings.refinement
        found = self._decode(session, pipeline.segment(session), thresholds, refinement)
        return [
            _result(request, instances, said.text)
            for request, instances, said in zip(requests, found, words, strict=True)
        ]

    def edit_batch(self, requests: Sequence[Request], steps: int | None = None) -> list[EditResult]:
        """Edit pictures; see `edit`."""
        pipeline = self.pipeline(steps)
        session = pipeline.open(requests)
        words = pipeline.say(session)
        # Unrefined: an edit may reach where the picture has no edge, such as an object's new place.
        found = self._decode(session, pipeline.segment(session))
        frame = self.config.hierarchical.image_size
        boxes = [self._box(request) for request in requests]
        framed = lay_in_frame([instances.probabilities for instances in found], boxes, frame)
        touched = lay_in_frame([instances.masks for instances in found], boxes, frame)
        keep = [mask.numpy() for mask in touched[:, 0] > 0] if self.settings.keep_tokens else None
        drawings = pipeline.draw(session, sampling=self.settings.editing, masks=keep)
        seeds = [request.seed for request in requests]
        painted = to_uint8(pipeline.paint(codes_of(drawings), framed, seeds, session.mask_states))
        results = []
        for request, raw, instances, box, said in zip(
            requests, painted, found, boxes, words, strict=True
        ):
            mask = instances.masks[0].numpy()
            results.append(
                EditResult(
                    image=PILImage.fromarray(self._fit(request, raw, mask, box)),
                    mask=mask,
                    text=said.text,
                    raw=PILImage.fromarray(raw),
                )
            )
        return results

    def generate_batch(
        self,
        requests: Sequence[Request],
        steps: int | None = None,
        bucket: Bucket | None = None,
    ) -> list[Pixels]:
        """Draw pictures [h, w, 3] of one bucket, the model's own by default; see `generate`."""
        pipeline = self.pipeline(steps)
        session = pipeline.open(requests, bucket=bucket)
        drawings = pipeline.draw(session, sampling=self.settings.generation)
        seeds = [request.seed for request in requests]
        return list(to_uint8(pipeline.paint(codes_of(drawings), None, seeds)))

    def chat_batch(self, requests: Sequence[Request]) -> list[str]:
        """Answer questions; see `chat`."""
        pipeline = self.pipeline()
        return [words.text.strip() for words in pipeline.say(pipeline.open(requests))]

    # -- pieces -----------------------------------------------------------------------------------

    def pipeline(self, steps: int | None = None) -> Pipeline:
        """Return what runs requests, with this model's defaults."""
        settings = self.settings if steps is None else replace(self.settings, steps=steps)
        return Pipeline(self.model, self.vocabulary, settings)

    def _masks(self, regions: Sequence[Region], pixels: Pixels) -> tuple[Bitmap, ...]:
        size = (pixels.shape[0], pixels.shape[1])
        return tuple(region_mask(region, size, self.config.region) for region in regions)

    def _box(self, request: Request) -> Letterbox:
        assert request.image is not None
        size = (request.image.shape[0], request.image.shape[1])
        return Letterbox.fit(size, self.config.hierarchical.image_size)

    def _decode(
        self,
        session: Session,
        prediction: Prediction,
        thresholds: Thresholds | None = None,
        refinement: Refinement | None = None,
    ) -> list[Instances]:
        assert session.batch.num_conditions is not None
        return decode(
            prediction,
            CONDITION_KINDS[session.batch.task],
            session.batch.num_conditions,
            [self._box(request) for request in session.requests],
            thresholds=thresholds or Thresholds(object=self.settings.object_score),
            points=session.batch.region_points,
            pictures=session.frames,
            refinement=refinement,
        )

    def _fit(self, request: Request, raw: Pixels, mask: Bitmap, box: Letterbox) -> Pixels:
        """Bring the decoder's picture to the source's size, and paste it under the mask only."""
        assert request.image is not None
        fitted = box.image_back(raw)
        if not self.settings.paste_outside:
            return fitted
        return paste(request.image, fitted, mask, max(mask.shape) / max(raw.shape[:2]))


def read_pixels(image: Picture) -> Pixels:
    """Return a picture as uint8 [H, W, 3]; raises `RequestError`.

    Files are turned upright; alpha is laid over white and deep grey brought to 8 bits, as
    `focus.pictures` says. A PIL picture keeps its sides, so that masks and clicks fit it.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise RequestError(
                f"a picture [H, W, 3] uint8 expected, got {image.shape} {image.dtype}"
            )
        return image
    if isinstance(image, PILImage.Image):
        return np.asarray(rgb_of(image))
    return np.asarray(read_picture(image).image)


def point(text: str) -> str:
    """Put "<region>" where a text points, if it does not say it itself."""
    if REGION in text:
        return text
    replaced, count = re.subn(
        r"\b(it|this one|that one|this|that)\b", REGION, text, count=1, flags=re.IGNORECASE
    )
    return replaced if count else f"{text.rstrip()} {REGION}"


def _result(request: Request, found: Instances, said: str) -> SegmentResult:
    labels = [int(label) for label in found.labels]
    if request.task == "class":
        names = [request.classes[label] for label in labels]
    elif request.task == "interactive":
        spoken = [part.strip() for part in said.split(",")]
        usable = len(spoken) == len(request.regions) and all(spoken)
        names = [spoken[label] if usable else f"region {label + 1}" for label in labels]
    else:
        names = [said.strip() or request.text] * len(labels)
    return SegmentResult(
        masks=[mask.numpy() for mask in found.masks],
        names=names,
        scores=[float(score) for score in found.scores],
        labels=labels,
        text=said.strip(),
        probabilities=[probability.numpy() for probability in found.probabilities],
    )
