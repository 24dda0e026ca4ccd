"""Stage 1a: the dual tokenizer (paper 3.1, appendix A): L1, perceptual, GAN, SimVQ, 1 - cosine.

Both encoders are frozen; the fusion's cross-attention, the semantic blocks, the pixel encoder and
decoder and both codebooks' linear maps learn. The perceptual distance uses the hierarchical
encoder's features: VGG's cannot be downloaded here, and any features may be plugged in.
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
from focus.inputs import to_pictures
from focus.model import FocusModel
from focus.tokenizer.adversary import Adversary, Discriminator, PerceptualLoss
from focus.tokenizer.dual import CodeNoise, TokenizerWeights


class TokenizerModel(FocusModel):
    """FOCUS with the discriminator beside it."""

    def __init__(
        self, config: FocusConfig, channels: int, weight: float, start: int, warm: int
    ) -> None:
        super().__init__(config)
        self.scratch = Adversary(
            Discriminator(channels, num_layers=2 if config.pixel.image_size[0] < 128 else 3),
            weight=weight,
            start=start,
            discriminator_start=warm,
        )


class TokenizerStage(Stage):
    """`extra`: gan_channels, gan_weight, gan_start, gan_warm (the discriminator's), perceptual.

    And code_noise: so many of the pictures get so many of their pixel codes from a neighbour (0.1
    in the first phase of facts section 7), which the decoder has to see through; 0: none.
    """

    def __init__(self) -> None:
        self._weights = TokenizerWeights()
        self._noise: CodeNoise | None = None
        self._shown: Pictures | None = None

    def build(self, run: Run) -> nn.Module:
        """Return the model with the foundation's weights."""
        extra = run.extra
        self._weights = TokenizerWeights(perceptual=extra.get("perceptual", 1.0))
        rate = float(extra.get("code_noise", 0.0))
        self._noise = CodeNoise(sample_rate=rate, token_rate=rate) if rate else None
        model = TokenizerModel(
            config_of(run),
            extra.get("gan_channels", 64),
            extra.get("gan_weight", 0.5),
            extra.get("gan_start", 20_000),
            extra.get("gan_warm", 20_000),
        )
        load_initial(model, run.init_from, new=("scratch.*",))
        return model

    def batches(self, run: Run, step: int, micro: Micro) -> Pictures:
        """Return pictures of the built-in world."""
        records = draw_records(run, step, micro)
        return to_pictures([r.image for r in records if r.image is not None], config_of(run))

    def losses(self, model: nn.Module, batch: Pictures, step: int) -> dict[str, Tensor]:
        """Return every loss of facts section 7 as a named term."""
        assert isinstance(model, TokenizerModel)
        front = model.front
        with torch.no_grad():
            low = front.vanilla(batch.vanilla)
            maps = front.hierarchical(batch.hierarchical)
        result = front.tokenizer.train_step(
            front.fusion(low, maps).e_prime,
            low,
            batch.pixel,
            step=step,
            perceptual=PerceptualLoss(lambda x: front.hierarchical(x)[:3]),
            adversary=model.scratch,
            noise=self._noise,
            weights=self._weights,
        )
        self._shown = Pictures(**{k: v[:6] for k, v in vars(batch).items()})
        return result["losses"]

    def panel(self, model: nn.Module, step: int) -> npt.NDArray[np.uint8] | None:
        """Draw pictures above their reconstructions."""
        assert isinstance(model, TokenizerModel)
        if self._shown is None:
            return None
        codes = model.front.tokenize(self._shown)
        return tile([self._shown.pixel, model.front.tokenizer.decode(codes)])


STAGE = TokenizerStage
