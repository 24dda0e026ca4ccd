"""Stage 2: projector warm-up (paper 3.5): projections, adapter queries and gates, new vocabulary.

Encoders, trunk and heads are frozen; the loss is next-token cross-entropy on words. Of the token
table only the rows of the extended vocabulary learn: the gradient of the text rows is zeroed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine.data.source import config_of, draw_records
from engine.data.words import text_rows, tiny_vocabulary
from engine.run import Run
from engine.stages.multimodal import MultimodalStage
from engine.stages.stage import Micro
from focus.batch import Pictures
from focus.inputs import to_pictures
from focus.model import FocusModel
from focus.vision.whiten import whiten


class WarmupStage(MultimodalStage):
    """Image-to-text only. `extra`: whiten (pictures that the projections are first fitted to)."""

    def build(self, run: Run) -> nn.Module:
        """Return the model; text rows of the token table get no gradient."""
        model = super().build(run)
        assert isinstance(model, FocusModel)
        count = int(run.extra.get("whiten", 0))
        if count:
            micro = Micro(number=0, task="vqa", size=count)
            records = draw_records(run, 0, micro)
            images = [record.image for record in records if record.image is not None]
            whiten_projections(model, to_pictures(images, model.config))
        text_size = text_rows(tiny_vocabulary(config_of(run)))

        def keep_text(gradient: Tensor) -> Tensor:
            rows = torch.arange(len(gradient), device=gradient.device)
            return gradient * (rows >= text_size)[:, None]

        model.front.token_embedding.weight.register_hook(keep_text)  # type: ignore[no-untyped-call]
        return model


@torch.no_grad()
def whiten_projections(model: FocusModel, pictures: Pictures) -> None:
    """Start the projections of semantic and pixel features with all directions equally strong."""
    features = model.front.encode(pictures)
    generator = torch.Generator().manual_seed(0)
    whiten(model.front.fusion.project, features.fused.e_img, generator)
    first = model.front.pixel_project[0]
    assert isinstance(first, nn.Linear)
    whiten(first, features.pixel.flatten(2).transpose(1, 2), generator)


STAGE = WarmupStage
