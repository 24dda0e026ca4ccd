"""`Focus` on the engine: the same object, the same answers, less waiting.

model = Engine(Focus.from_pretrained("focus-tiny"))
model.edit("photo.png", "remove the red circle")
model.edit("photo.png", "make the star green")      # the picture is not read again
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from engine.serve.decode import Decoder
from engine.serve.pipeline import EnginePipeline
from engine.serve.prefix import Memory
from engine.serve.scheduler import Scheduler
from focus.api import Focus, Picture, read_pixels
from focus.pipeline import Pipeline
from focus.request import Request


class Engine(Focus):
    """A `Focus` that decodes through `engine.serve.decode` and remembers pictures.

    int8: weight-only int8 in the trunk. speculate: tokens of a picture that one pass may check.
    memory_bytes: for pictures seen before; 0 remembers the last one only.
    slots: rows of a `Scheduler`, for calls from several threads at once; None decodes in the
    calling thread, on a GPU in a scheduler of two rows: CUDA graphs need its fixed cache.

    The weights are read once, here; build another engine after changing them.
    """

    def __init__(
        self,
        focus: Focus,
        *,
        int8: bool = False,
        speculate: int = 1,
        memory_bytes: int = 1 << 28,
        slots: int | None = None,
    ) -> None:
        super().__init__(focus.model, focus.vocabulary, focus.settings)
        if slots is None and focus.model.front.mask_queries.device.type == "cuda":
            slots = 2
        self.decoder: Decoder
        if slots is None:
            self.decoder = Decoder(focus.model, focus.vocabulary, int8=int8, speculate=speculate)
        else:
            self.decoder = Scheduler(
                focus.model, focus.vocabulary, slots=slots, int8=int8, speculate=speculate
            )
        self.memory = Memory(memory_bytes)

    @classmethod
    def from_pretrained(cls, name: str | Path, dtype: torch.dtype | None = None) -> Engine:
        """Load a model as `Focus.from_pretrained` does, onto the engine."""
        return cls(Focus.from_pretrained(name, dtype))

    def pipeline(self, steps: int | None = None) -> Pipeline:
        """Return what runs requests, with this model's defaults."""
        settings = self.settings if steps is None else replace(self.settings, steps=steps)
        return EnginePipeline(
            self.decoder.model,
            self.vocabulary,
            settings,
            decoder=self.decoder,
            memory=self.memory,
            speculate=self.decoder.speculate > 1,
        )

    def warm(self, image: Picture) -> None:
        """Encode a picture and read the start that all prompts about it share."""
        self.pipeline().open([Request(task="vqa", text="?", image=read_pixels(image))])

    def close(self) -> None:
        """Stop the scheduler, if there is one."""
        if isinstance(self.decoder, Scheduler):
            self.decoder.close()
