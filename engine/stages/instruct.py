"""Stage 4: instruction tuning for region-controlled editing (paper 3.5, eq. 6).

To the losses of stage 3 comes the diffusion decoder's, on the true codes of the edited picture and
with a mask in cross-attention: the true one at first, more and more the predicted one, whose
gradient flows back through the predictor into the language model.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from engine.stages.diffusion import output_size
from engine.stages.multimodal import MultimodalStage, Step, best_mask, resize_masks
from engine.stages.panel import tile, tint
from focus.batch import Batch, Source
from focus.inputs import resize
from focus.model import FocusModel, gather


class InstructStage(MultimodalStage):
    """`extra`: true_mask (chance at the end of feeding the true mask), diffusion_weight."""

    def losses(self, model: nn.Module, batch: Batch, step: int) -> dict[str, Tensor]:
        """Add the noise-prediction error of edited pictures under their masks."""
        assert isinstance(model, FocusModel) and self.run is not None
        terms = super().losses(model, batch, step)
        weight = float(self.run.extra.get("diffusion_weight", 1.0))
        done = self.shown[batch.task]
        if weight and done.prediction is not None and done.codes is not None:
            terms[f"{batch.task}/epsilon"] = weight * self._diffusion_loss(model, done, step)
        return terms

    def _diffusion_loss(self, model: FocusModel, done: Step, step: int) -> Tensor:
        assert self.run is not None and done.prediction is not None and done.codes is not None
        batch = done.batch
        assert batch.target is not None and batch.edit_mask is not None
        size = output_size(model.config)
        predicted = resize_masks(best_mask(done.prediction), size)
        true = resize_masks(batch.edit_mask, size)
        last = float(self.run.extra.get("true_mask", 0.5))
        chance = 1.0 + (last - 1.0) * step / max(1, self.run.steps)
        pick = torch.rand(len(true), device=true.device) < chance
        mask = torch.where(pick[:, None, None], true, predicted)[:, None]
        codes = model.front.tokenizer.embed(done.codes)
        states = gather(
            done.hidden, batch.source == Source.MASK_QUERY, model.config.segment.num_queries
        )
        target = resize(batch.target.hierarchical, size)
        return model.heads.diffusion.loss(codes, target, mask, states=states)

    def panel(self, model: nn.Module, step: int) -> npt.NDArray[np.uint8] | None:
        """Draw source, mask, edit from true codes, and truth."""
        done = self.shown.get("editing")
        if done is None or done.prediction is None or done.codes is None:
            return super().panel(model, step)
        assert isinstance(model, FocusModel)
        batch = done.batch
        assert batch.pictures is not None and batch.target is not None
        size = output_size(model.config)
        mask = resize_masks(best_mask(done.prediction), size)[:6]
        codes = model.front.tokenizer.embed(done.codes)[:6]
        generator = torch.Generator().manual_seed(0)
        drawn = model.heads.diffusion.sample(codes, mask[:, None], 12, 1.0, generator, size=size)
        source, target = (resize(p.hierarchical[:6], size) for p in (batch.pictures, batch.target))
        return tile([source, tint(source, mask), drawn, target])


STAGE = InstructStage
