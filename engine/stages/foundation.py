"""Stage 0: the parts that the paper takes from public checkpoints, learnt from nothing.

At full scale this stage does not exist: `focus import` brings QwenViT, ConvNeXt, SDXL's VAE and
Qwen2.5. A model that trains on a laptop without a download needs somebody to play those parts, so
both encoders and their fusion learn the world's colours, shapes and sizes (factorised, so that
pairs held out of training stay describable), the VAE learns its pictures and the trunk its
language. Later stages treat them exactly as the paper treats the public ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from engine.data.scenes import texts
from engine.data.words import pack_texts, tiny_vocabulary
from engine.run import Run
from engine.stages.dense import DenseBatch, DenseHeads, draw_dense
from engine.stages.stage import Micro, Stage, load_initial
from focus.batch import Batch, Pictures
from focus.config import FocusConfig
from focus.diffusion.vae import vae_losses
from focus.losses import language_loss
from focus.model import FocusModel
from focus.presets import CONFIGS
from focus.vision.fusion import FusionAttention

SQUARE = 10.0  # weight of the VAE's squared error: small bright objects count for little in L1
NEAR, HERE = 2, 6.5  # frequencies of an axis that tell places apart, and their bias


@torch.no_grad()
def look_here(attention: FusionAttention) -> None:
    """Let fused tokens start with what the hierarchical maps hold at their own place.

    Biases b on queries and keys add b^2 / sqrt(d) sum_f (cos(f dy) + cos(f dx)) to the score of a
    key (dy, dx) cells away, f the fastest frequencies. Found by descent alone, places take longer
    than all the rest of this stage.
    """
    width, axis = attention.head_dim, attention.head_dim // 4
    here = torch.zeros(width)
    here[:NEAR] = here[axis : axis + NEAR] = HERE
    attention.query.bias.view(-1, width).copy_(here)
    for layer in attention.key_value.values():
        assert isinstance(layer, nn.Linear)
        layer.bias.view(2, -1, width)[0].copy_(here)


class FoundationModel(FocusModel):
    """FOCUS with the throw-away classifiers beside it."""

    def __init__(self, config: FocusConfig) -> None:
        super().__init__(config)
        self.scratch = DenseHeads(config)


class FoundationStage(Stage):
    """Micro-batches "dense" (encoders and fusion), "latent" (VAE) and "text" (trunk).

    `extra`: here (see `look_here`).
    """

    def build(self, run: Run) -> nn.Module:
        """Return a fresh model, or the previous part of stage 0."""
        model = FoundationModel(CONFIGS[run.model]())
        load_initial(model, run.init_from, new=("scratch.*",))
        if run.extra.get("here", False):
            look_here(model.front.fusion.attention)
        return model

    def batches(self, run: Run, step: int, micro: Micro) -> DenseBatch | Pictures | Batch:
        """Draw scenes or texts; a pure function of its arguments."""
        config = CONFIGS[run.model]()
        if micro.task == "text":
            lines = texts("train", micro.seed(run, step), micro.size)
            return pack_texts(lines, tiny_vocabulary(config))
        drawn = draw_dense(config, run.seed, micro.first_sample(run, step), micro.size)
        return drawn.pictures if micro.task == "latent" else drawn

    def losses(self, model: nn.Module, batch: Any, step: int) -> dict[str, Tensor]:
        """Return the terms of whichever part the micro-batch trains."""
        assert isinstance(model, FoundationModel)
        if isinstance(batch, Batch):
            hidden, _ = model(batch)
            table = model.heads.lm_head.weight
            return {"text": language_loss(hidden, batch.labels, table)}
        if isinstance(batch, Pictures):
            latent = vae_losses(model.heads.diffusion.vae, batch.pixel, square_weight=SQUARE)
            return {f"latent/{name}": value for name, value in latent.items()}
        maps = model.front.hierarchical(batch.pictures.hierarchical)
        low = model.front.vanilla(batch.pictures.vanilla)
        fused = model.front.fusion(low, maps).e_img
        terms: dict[str, Tensor] = model.scratch(maps, low, fused, batch)
        return terms


STAGE = FoundationStage
