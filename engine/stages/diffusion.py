"""Stage 1b: the diffusion decoder learns to draw a picture from its codes (appendix A, eps-MSE).

All encoders and codebooks are frozen. The latent scale of an autoencoder that was trained from
nothing is measured once, on the first step.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from engine.data.source import config_of, draw_records
from engine.run import Run
from engine.stages.panel import tile
from engine.stages.stage import Micro, Stage, load_initial
from focus.batch import Pictures
from focus.config import FocusConfig
from focus.inputs import resize, to_pictures
from focus.model import FocusModel


def output_size(config: FocusConfig) -> tuple[int, int]:
    """Size of the decoder's pictures: the bucket times `upscale`."""
    height, width = config.pixel.image_size
    return height * config.diffusion.upscale, width * config.diffusion.upscale


class DiffusionStage(Stage):
    """Reconstruction of pictures from frozen codes."""

    def __init__(self) -> None:
        self._shown: Pictures | None = None

    def build(self, run: Run) -> nn.Module:
        """Return the model with the tokenizer's weights and the latent scale measured."""
        model = FocusModel(config_of(run))
        load_initial(model, run.init_from)
        if run.extra.get("measure_latents", False):
            number, size = 0, 64
            micro = Micro(number=number, task=run.micro_batches[0][0], size=size)
            pictures = self.batches(run, 0, micro)
            model.heads.diffusion.vae.measure(
                resize(pictures.hierarchical, output_size(model.config))
            )
        return model

    def batches(self, run: Run, step: int, micro: Micro) -> Pictures:
        """Return pictures of the built-in world."""
        records = draw_records(run, step, micro)
        return to_pictures([r.image for r in records if r.image is not None], config_of(run))

    def losses(self, model: nn.Module, batch: Pictures, step: int) -> dict[str, Tensor]:
        """Return the mean squared error of the predicted noise."""
        assert isinstance(model, FocusModel)
        with torch.no_grad():
            codes = model.front.tokenizer.embed(model.front.tokenize(batch))
        target = resize(batch.hierarchical, output_size(model.config))
        self._shown = Pictures(**{k: v[:6] for k, v in vars(batch).items()})
        return {"epsilon": model.heads.diffusion.loss(codes, target, None)}

    def panel(self, model: nn.Module, step: int) -> npt.NDArray[np.uint8] | None:
        """Draw pictures, the pixel decoder's and the diffusion decoder's reconstructions."""
        assert isinstance(model, FocusModel)
        if self._shown is None:
            return None
        codes = model.front.tokenize(self._shown)
        merged = model.front.tokenizer.embed(codes)
        generator = torch.Generator().manual_seed(0)
        drawn = model.heads.diffusion.sample(
            merged, None, 12, 1.0, generator, size=output_size(model.config)
        )
        return tile([self._shown.pixel, model.front.tokenizer.decode(codes), drawn])


STAGE = DiffusionStage
