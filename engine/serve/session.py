"""One picture, many wishes: what an interactive page or a notebook holds between two clicks.

    session = Session(model).open("photo.png")
    session.segment("the red circle")
    session.edit("make it blue", Click(40, 52))
    session.undo()

The picture is encoded and read once; every later request pays for its own words only. An edit makes
its result the picture of what follows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.serve.engine import Engine
from focus.api import Focus, Picture, read_pixels
from focus.regions import Region
from focus.request import EditResult, Pixels, RequestError, SegmentResult
from focus.segment.infer import Thresholds


class Session:
    """Requests about one picture, with a history.

    model: an `Engine` (many sessions may share it), or a `Focus` that becomes one.
    """

    def __init__(self, model: Focus) -> None:
        self.model = model if isinstance(model, Engine) else Engine(model)
        self._pictures: list[Pixels] = []
        self._undone: list[Pixels] = []
        self._dialogue: list[tuple[str, str]] = []

    @property
    def image(self) -> Pixels:
        """The picture as it is now, uint8 [H, W, 3]. Raises `RequestError` before `open`."""
        if not self._pictures:
            raise RequestError("an open picture expected, got none; call open(image) first")
        return self._pictures[-1]

    @property
    def history(self) -> int:
        """Number of edits that `undo` can take back."""
        return max(0, len(self._pictures) - 1)

    def open(self, image: Picture) -> Session:
        """Start over with a picture, and read it while the user still thinks."""
        pixels = np.ascontiguousarray(read_pixels(image))
        self._pictures, self._undone, self._dialogue = [pixels], [], []
        self.model.warm(pixels)
        return self

    def segment(
        self,
        text: str | None = None,
        regions: Sequence[Region] | None = None,
        task: str | None = None,
        seed: int = 0,
        thresholds: Thresholds | None = None,
    ) -> SegmentResult:
        """Find what a text names or regions point at; see `Focus.segment`."""
        return self.model.segment(self.image, text, regions, task, seed, thresholds)

    def chat(self, text: str, seed: int = 0) -> str:
        """Answer a question about the picture, in the light of those before; see `Focus.chat`."""
        answer = self.model.chat(self.image, text, history=self._dialogue, seed=seed)
        self._dialogue.append((text, answer))
        return answer

    def edit(
        self,
        text: str,
        region: Region | None = None,
        seed: int = 0,
        steps: int | None = None,
        *,
        apply: bool = True,
    ) -> EditResult:
        """Change the picture; see `Focus.edit`. `apply=False` only shows what would come."""
        result = self.model.edit(self.image, text, region, seed, steps)
        if apply:
            self._show(np.asarray(result.image.convert("RGB")))
            self._undone = []
        return result

    def undo(self) -> Pixels:
        """Take the last edit back; raises `RequestError` if there is none."""
        if not self.history:
            raise RequestError("an edit to take back expected, got none; the picture is as opened")
        self._undone.append(self._pictures.pop())
        self._dialogue = []
        return self.image

    def redo(self) -> Pixels:
        """Bring the edit back that was taken back last; raises `RequestError` if there is none."""
        if not self._undone:
            raise RequestError("an edit that was taken back expected, got none")
        self._show(self._undone.pop())
        return self.image

    def _show(self, pixels: Pixels) -> None:
        self._pictures.append(pixels)
        self._dialogue = []
