"""Reading, between stages 2 and 3: a trunk learns to look up in a picture what a text names.

A public language model arrives with this skill; a trunk that starts from nothing has to acquire it,
and next-token cross-entropy alone is slow to teach it: nothing is gained before a question's words
are gathered where the answer begins, matched with the tokens that show them, and read out there.
Aids, none of which later stages need: rows of the token table are moved apart (words of one
kind share nearly all of their embedding, and what cannot be told apart cannot be matched), visual
tokens are aligned with words (`align.py`), some heads start out looking nearby, where a question's
words are (`look_nearby`), the trunk's matrices follow Muon, and an early layer learns to point:

    p(s | q) = softmax_s(<W_q h_q, W_k h_s> / sqrt(d)),  loss = -log sum_s c_s p(s | q)

q is the position where an answer begins, s a semantic token, c_s the share of its cell that the
objects in question cover, 1 for the best covered. The lookup is learnt soonest where visual tokens
say just what they show (`spelled`); it then holds for pictures whose tokens are aligned with words.
"""

# B batch, T sequence, D LLM width, Q answers of a dialogue, S semantic tokens

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from engine.data.scene_tasks import listed, scene_of, subjects, touched
from engine.data.source import config_of
from engine.data.words import text_rows, tiny_vocabulary
from engine.run import Run
from engine.stages.align import align, spoken
from engine.stages.drawing import Origins, origins
from engine.stages.multimodal import MultimodalStage, Step, segmentation_terms
from engine.stages.pointing import ReadingModel
from engine.stages.stage import Micro, load_initial
from engine.stages.unpaired import unpaired, unpaired_classes, unpaired_masks, without
from focus.batch import Batch, move
from focus.llm import Attention
from focus.losses import language_loss
from focus.model import FocusModel

NEARBY, PULL = 7, 2.0  # rotary pairs of a head that looks nearby, and their bias
SPREAD = 0.1  # of the noise on a text row's entries; the rows' own are about as large


@dataclass(frozen=True, kw_only=True)
class ReadingBatch:
    """A micro-batch with what its answers are about: [B, Q, S], see `subjects`.

    touched: [B, S] where its masks lie, see `touched`.
    says: [B, S, V] what visual tokens say in place of pictures, see `spoken`; None: pictures.
    drawn: what the cells of a picture to draw come from.
    unpaired: [B, T] see `unpaired`; None: every answer's softmax is over all words.
    unlisted: [B, K] see `unpaired_classes`; None: queries are scored against all candidates.
    mispaired: [B, N] see `unpaired_masks`.
    listed: [B, K, S] where what each candidate class names lies, see `listed`; None: no classes.
    """

    batch: Batch
    about: Tensor
    touched: Tensor
    says: Tensor | None = None
    drawn: Origins | None = None
    unpaired: Tensor | None = None
    unlisted: Tensor | None = None
    mispaired: Tensor | None = None
    listed: Tensor | None = None

    def to(self, device: torch.device | str) -> ReadingBatch:
        """Move every tensor."""
        return move(self, device)


@torch.no_grad()
def start_afresh(model: FocusModel) -> None:
    """Draw the trunk and the text rows anew, the rows as wide as `SPREAD` and unlike each other.

    A short while on text alone leaves both in a state from which lookups form later than from none.
    """
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.trunk.named_parameters():
        if parameter.dim() == 2:
            parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    table = model.front.token_embedding.weight
    table[: text_rows(tiny_vocabulary(model.config))].normal_(std=SPREAD, generator=generator)


@torch.no_grad()
def look_nearby(model: FocusModel) -> None:
    """Let the query heads of the first key head start with attention that falls with distance.

    Rotary positions turn constant queries and keys into a function of distance alone: biases of
    b on the rotary pairs P add b^2 / sqrt(d) sum_{i in P} cos(theta_i distance) to the score. Each
    of the heads takes seven pairs, from faster (nearer) to slower ones.
    """
    config = model.config.llm
    half, heads = config.head_dim // 2, config.num_heads // config.num_kv_heads
    for layer in model.trunk.layers:
        attention = cast(Attention, layer.self_attn)
        last = 0
        for head in range(heads):
            first = min(2 * head, max(0, half - NEARBY))
            last = min(first + NEARBY, half)
            bias = attention.q_proj.bias.view(config.num_heads, 2, half)[head]
            bias.zero_()
            bias[0, first:last] = PULL
        key = attention.k_proj.bias.view(config.num_kv_heads, 2, half)[0]
        key.zero_()
        key[0, :last] = PULL


class ReadingStage(MultimodalStage):
    """Aids to reading, then a multimodal stage.

    `extra`, beside a multimodal stage's: point_weight, point_layer, mask_layer (0: mask queries
    need not point), draw_layer (0: codes about to be written need not), class_layer
    (0: candidate classes need not), afresh (see
    `start_afresh`), spread (of text rows), nearby (whether heads start out so), align (scenes the
    projection is first fitted to), align_share (see `align`), unpaired (whether answers' softmax
    leaves words out, see `unpaired.py`) and spelled: visual tokens are the words for what they
    show, no picture is encoded (questions only, segmentation off).
    """

    def __init__(self) -> None:
        super().__init__()
        self.drawn: ReadingBatch | None = None  # of the next forward pass

    def build(self, run: Run) -> nn.Module:
        """Return the model with the previous stage's weights, its text rows moved apart."""
        self.run = run
        layers = (("point_layer", 2), ("mask_layer", 0), ("draw_layer", 0), ("class_layer", 0))
        model = ReadingModel(config_of(run), *(int(run.extra.get(*layer)) for layer in layers))
        load_initial(model, run.init_from, new=("*pointer.*",))
        if run.extra.get("afresh", False):
            start_afresh(model)
        table = model.front.token_embedding.weight
        words = text_rows(tiny_vocabulary(model.config))
        noise = torch.randn(words, table.shape[1], generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            table[:words] += float(run.extra.get("spread", SPREAD)) * noise
        if run.extra.get("nearby", False):
            look_nearby(model)
        count = int(run.extra.get("align", 0))
        if count:
            share = float(run.extra.get("align_share", 1.0))
            align(model, tiny_vocabulary(model.config), count=count, share=share)
        return model

    def batches(self, run: Run, step: int, micro: Micro) -> ReadingBatch:  # type: ignore[override]
        """Draw one task-homogeneous micro-batch with what its answers are about."""
        config = config_of(run)
        batch, drawn, kept = self.draw(run, step, micro)
        pairs = list(zip(drawn, kept, strict=True))
        found = [
            torch.from_numpy(subjects(old.id, config.vanilla.grid)) * (new is old)
            for old, new in pairs
        ]
        about = nn.utils.rnn.pad_sequence(found, batch_first=True)
        pictured = origins(batch, drawn, tiny_vocabulary(config), config.vanilla.grid)
        if pictured is not None:
            pictured.shares.mul_(torch.tensor([new is old for old, new in pairs])[:, None, None])
        area = np.stack([touched(old.id, config.vanilla.grid) * (new is old) for old, new in pairs])
        says = None
        if run.extra.get("spelled", False):
            vocabulary, grid = tiny_vocabulary(config), config.vanilla.grid
            says = torch.stack([spoken(scene_of(r.id), vocabulary, grid) for r in drawn])
        left_out = unlisted = mispaired = None
        if run.extra.get("unpaired", False):
            left_out = unpaired(batch, drawn, tiny_vocabulary(config))
            if batch.task == "class":
                unlisted, mispaired = unpaired_classes(drawn), unpaired_masks(drawn)
        classes = None
        if batch.task == "class":
            classes = nn.utils.rnn.pad_sequence(
                [torch.from_numpy(listed(r.id, config.vanilla.grid)) for r in drawn],
                batch_first=True,
            )
        return ReadingBatch(
            batch=batch,
            about=about,
            touched=torch.from_numpy(area),
            says=says,
            drawn=pictured,
            unpaired=left_out,
            unlisted=unlisted,
            mispaired=mispaired,
            listed=classes,
        )

    def words_term(self, model: FocusModel, hidden: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of the answers' words, without those that training never pairs."""
        left_out = None if self.drawn is None else self.drawn.unpaired
        return language_loss(hidden, labels, model.heads.lm_head.weight, without=left_out)

    def mask_terms(self, model: FocusModel, done: Step) -> dict[str, Tensor]:
        """Segmentation terms, the scores without candidates that training never pairs."""
        if self.drawn is None or self.drawn.unlisted is None:
            return super().mask_terms(model, done)
        assert done.prediction is not None
        found = without(done.prediction, self.drawn.unlisted)
        left_out = self.drawn.mispaired
        return segmentation_terms(model, replace(done, prediction=found), left_out=left_out)

    def losses(  # type: ignore[override]
        self, model: nn.Module, batch: ReadingBatch, step: int
    ) -> dict[str, Tensor]:
        """Return a multimodal stage's terms and the pointer's."""
        assert isinstance(model, ReadingModel) and self.run is not None
        model.says, self.drawn = batch.says, batch
        terms = super().losses(model, batch.batch, step)
        weight = float(self.run.extra.get("point_weight", 1.0))
        for name, pointed in (
            ("point", model.point(batch.batch, batch.about)),
            ("mask_point", model.point_masks(batch.batch, batch.touched)),
            ("draw_point", model.point_words(batch.batch, batch.drawn)),
            ("class_point", model.point_classes(batch.batch, batch.listed)),
        ):
            if pointed is not None:
                terms[f"{batch.batch.task}/{name}"] = weight * pointed
        return terms


STAGE = ReadingStage
