"""Stages 2 to 4 along the model's sections, so that megatron-core's pipeline can cut them.

`engine/stages` is written against the whole model. `sectioned` puts a stage of that kind behind the
interface of `SectionStage` without a second copy of its losses: they are called with a `View`,
which looks like the whole model and holds only what is present where the heads are.
"""

# B batch, T sequence, D LLM width, d code width, V rows of the token table

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from engine.data.source import config_of
from engine.data.words import text_rows, tiny_vocabulary
from engine.run import Run
from engine.stages.multimodal import MultimodalStage
from engine.stages.stage import Micro, SectionStage, Stage
from engine.stages.warmup import WarmupStage
from focus.batch import Batch
from focus.model import Features, FocusModel
from focus.sequence import fill_codes
from focus.tokenizer.dual import Codes
from parallel.optimizer import freeze_rows
from parallel.sections import Handover, LanguageHead


def sectioned(stage: Stage) -> Stage:
    """Return the stage written along the sections, or itself where it is not of that kind."""
    if isinstance(stage, MultimodalStage):
        return SectionedStage(stage)
    return stage


class SectionedStage(SectionStage):
    """One of warm-up, pretraining and instruction tuning, cut at the sections."""

    def __init__(self, inner: MultimodalStage) -> None:
        self.inner = inner

    def build(self, run: Run) -> nn.Module:
        """Return the inner stage's model; a gradient hook on the token table becomes a row count.

        A split table has no hook that sees all its rows (`parallel.optimizer.freeze_rows`).
        """
        model = self.inner.build(run)
        if isinstance(self.inner, WarmupStage):
            assert isinstance(model, FocusModel)
            weight = model.front.token_embedding.weight
            assert isinstance(weight, nn.Parameter)
            if weight._backward_hooks is not None:
                weight._backward_hooks.clear()
            rows = text_rows(tiny_vocabulary(config_of(run)))
            freeze_rows(weight, rows)
        return model

    def batches(self, run: Run, step: int, micro: Micro) -> Batch:
        """See the inner stage."""
        return self.inner.batches(run, step, micro)

    def micro_batches(self, run: Run, step: int) -> tuple[tuple[str, int], ...]:
        """See the inner stage."""
        return self.inner.micro_batches(run, step)

    def prepare(self, front: Any, batch: Batch, step: int) -> tuple[Batch, dict[str, Tensor]]:
        """Write the target's codes into the sequences; hand the heads what they need of them."""
        if batch.target is None:
            return batch, {}
        codes = front.tokenize(batch.target)
        return fill_codes(batch, codes, tiny_vocabulary(front.config)), {
            "semantic": codes.semantic,
            "pixel": codes.pixel,
            "merged": front.tokenizer.embed(codes),
            "vectors": front.tokenizer.pixel_codes.table(),
        }

    def head_losses(self, heads: Any, state: Handover, step: int) -> dict[str, Tensor]:
        """Return the inner stage's terms of one micro-batch."""
        return self.inner.losses(View(heads, state), state.batch, step)

    def panel(self, model: nn.Module, step: int) -> npt.NDArray[np.uint8] | None:
        """Draw true and predicted masks where the heads are; nothing on other ranks."""
        return MultimodalStage.panel(self.inner, model, step)


class View(FocusModel):
    """The whole model as a stage's losses see it, where only the heads are.

    Calling it gives the hidden states and maps that reached the heads; `front` answers with what
    `prepare` computed; `heads.lm_head.weight` is a `Table`. It owns no parameter.
    """

    def __init__(self, heads: Any, state: Handover) -> None:
        nn.Module.__init__(self)
        self.config = heads.config
        self._state = state
        parts: dict[str, Any] = {
            "heads": _Heads(heads, Table(state.language)),
            "front": SimpleNamespace(tokenize=self._codes, tokenizer=_Tokenizer(state)),
        }
        self.__dict__.update(parts)

    def forward(self, batch: Batch) -> tuple[Tensor, Features | None]:
        """Return the hidden states [B, T, D] and the picture's maps."""
        maps = self._state.maps
        features = None if maps is None else cast(Features, SimpleNamespace(maps=maps))
        return self._state.hidden, features

    def _codes(self, _pictures: Any) -> Codes:
        extras = self._state.extras
        return Codes(semantic=extras["semantic"], pixel=extras["pixel"])


class _Heads:
    def __init__(self, heads: Any, table: Table) -> None:
        self._heads = heads
        self.lm_head = SimpleNamespace(weight=table)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._heads, name)


class _Tokenizer:
    def __init__(self, state: Handover) -> None:
        self._state = state
        self.pixel_codes = SimpleNamespace(lookup=lambda index: state.extras["vectors"][index])

    def embed(self, codes: Codes) -> Tensor:
        """Return the merged codes [B, 2d, h, w] of this micro-batch's targets."""
        return self._state.extras["merged"]


@dataclass(frozen=True)
class Table:
    """The token table as losses see it; its rows may lie on several ranks (`focus.losses`)."""

    head: LanguageHead

    def loss(self, hidden: Tensor, labels: Tensor, weight: Tensor | None = None) -> Tensor:
        """Mean next-token cross-entropy over the whole vocabulary."""
        return self.head.loss(hidden, labels, weight)

    def __getitem__(self, ids: slice) -> Rows:
        return Rows(self.head, ids)


@dataclass(frozen=True)
class Rows:
    """The rows `ids` of a table that may lie on several ranks."""

    head: LanguageHead
    ids: slice

    def code_loss(self, hidden: Tensor, index: Tensor, codes: Tensor) -> Tensor:
        """Expected-code loss over these rows."""
        return self.head.code_loss(hidden, index, self.ids, codes)
