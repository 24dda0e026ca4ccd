"""Stage 2: projector warm-up (paper 3.5): projections, adapter queries and gates, new vocabulary.

Encoders, trunk and heads are frozen; the loss is next-token cross-entropy on words. Of the token
table only the rows of the extended vocabulary learn: the gradient of the text rows is zeroed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine.data.source import config_of
from engine.data.words import tiny_vocabulary
from engine.run import Run
from engine.stages.multimodal import MultimodalStage
from focus.model import FocusModel


class WarmupStage(MultimodalStage):
    """Image-to-text only."""

    def build(self, run: Run) -> nn.Module:
        """Return the model; text rows of the token table get no gradient."""
        model = super().build(run)
        assert isinstance(model, FocusModel)
        text_size = min(tiny_vocabulary(config_of(run)).structure.values())

        def keep_text(gradient: Tensor) -> Tensor:
            rows = torch.arange(len(gradient), device=gradient.device)
            return gradient * (rows >= text_size)[:, None]

        model.front.token_embedding.weight.register_hook(keep_text)  # type: ignore[no-untyped-call]
        return model


STAGE = WarmupStage
