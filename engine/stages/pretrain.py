"""Stage 3: multimodal pretraining with segmentation (paper 3.5).

Words, visual tokens and masks together: CE + (2 cls + 5 BCE + 5 Dice) + 0.1 expected-code L2. The
diffusion decoder is frozen and not run.
"""

from __future__ import annotations

from engine.stages.multimodal import MultimodalStage


class PretrainStage(MultimodalStage):
    """Every task of Table 10 and question answering."""


STAGE = PretrainStage
