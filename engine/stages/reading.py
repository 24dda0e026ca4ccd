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

from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.data.scene_tasks import scene_of, subjects, touched
from engine.data.source import config_of
from engine.data.words import text_rows, tiny_vocabulary
from engine.run import Run
from engine.stages.align import align, spoken
from engine.stages.answers import answer_starts
from engine.stages.drawing import Origins, about_to_draw, before_drawing, origins
from engine.stages.multimodal import MultimodalStage
from engine.stages.stage import Micro, load_initial
from engine.stages.unpaired import unpaired
from focus.batch import Batch, Source, move
from focus.config import FocusConfig
from focus.llm import Attention
from focus.losses import language_loss
from focus.model import Features, FocusModel, gather
from focus.vision.fusion import Fused

WIDTH = 64  # of the pointer's queries and keys
NEARBY, PULL = 7, 2.0  # rotary pairs of a head that looks nearby, and their bias
SPREAD = 0.1  # of the noise on a text row's entries; the rows' own are about as large


@dataclass(frozen=True, kw_only=True)
class ReadingBatch:
    """A micro-batch with what its answers are about: [B, Q, S], see `subjects`.

    touched: [B, S] where its masks lie, see `touched`.
    says: [B, S, V] what visual tokens say in place of pictures, see `spoken`; None: pictures.
    drawn: what the cells of a picture to draw come from.
    unpaired: [B, T] see `unpaired`; None: every answer's softmax is over all words.
    """

    batch: Batch
    about: Tensor
    touched: Tensor
    says: Tensor | None = None
    drawn: Origins | None = None
    unpaired: Tensor | None = None

    def to(self, device: torch.device | str) -> ReadingBatch:
        """Move every tensor."""
        return move(self, device)


class Pointer(nn.Module):
    """-log sum_s c_s p(s | q) of states that should know where in the picture something is."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(dim, WIDTH), nn.Linear(dim, WIDTH)

    def forward(
        self,
        states: Tensor,
        seen: Tensor,
        about: Tensor,
        allowed: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor | None:
        """Loss of states [B, Q, D] before tokens [B, S, D] and shares about [B, Q, S].

        Rows of zero shares are left out; None when no other is there. allowed: bool [B, S], the
        tokens to choose among. weight: [B, Q] of each state in the mean.
        """
        queries, keys = (F.rms_norm(x.float(), x.shape[-1:]) for x in (states, seen))
        scores = self.query(queries) @ self.key(keys).transpose(1, 2)
        if allowed is not None:
            scores = scores.masked_fill(~allowed[:, None], -torch.inf)
        chance = (scores.float() / WIDTH**0.5).softmax(-1)
        most = about.amax(-1)
        if not bool((most > 0).any()):
            return None
        share: Tensor = (about / most.clamp(min=1e-6)[..., None] * chance).sum(-1)
        told = share[most > 0].clamp(min=1e-6).log()
        if weight is None:
            return -told.mean()
        return -(told * weight[most > 0]).sum() / weight[most > 0].sum()


class ReadingModel(FocusModel):
    """FOCUS with throw-away pointers beside it.

    One reads the states behind layer `depth` where answers begin, one those behind `mask_depth` at
    mask queries (0: none), one those behind `draw_depth` where a semantic code follows (0: none).
    """

    def __init__(
        self, config: FocusConfig, depth: int, mask_depth: int = 0, draw_depth: int = 0
    ) -> None:
        super().__init__(config)
        self.pointer = Pointer(config.llm.dim)
        self.mask_pointer = Pointer(config.llm.dim) if mask_depth else None
        self.draw_pointer = Pointer(config.llm.dim) if draw_depth else None
        self.states: dict[int, Tensor] = {}
        self.depth, self.mask_depth, self.draw_depth = depth, mask_depth, draw_depth
        self.says: Tensor | None = None  # for the next forward pass, see `ReadingBatch`
        for layer in {depth, mask_depth, draw_depth} - {0}:
            self.trunk.layers[layer - 1].register_forward_hook(partial(self._keep, layer))

    def _keep(self, at: int, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.states[at] = output

    def forward(self, batch: Batch) -> tuple[Tensor, Features | None]:
        """See `FocusModel.forward`; the pointers' states stay in `states`, [B, T, D] by layer."""
        self.states.clear()
        if self.says is None:
            found: tuple[Tensor, Features | None] = super().forward(batch)
            return found
        features = self.spell(self.says)
        embeddings = self.front.embed(batch, features)
        return self.trunk(embeddings, lengths=batch.lengths), features

    def spell(self, says: Tensor) -> Features:
        """Return features without any encoder: visual tokens are sums of words, the rest zero."""
        config, size = self.config, len(says)
        projected = self.front.fusion.out_norm(
            says @ self.front.token_embedding.weight[: says.shape[2]]
        )
        empty = projected.new_zeros(size, 0)
        pixel = projected.new_zeros(size, config.pixel.codebook.dim, *config.pixel.grid)
        adapter = projected.new_zeros(size, config.adapter.num_queries, config.llm.dim)
        fused = Fused(e_prime=empty, e_img=empty, projected=projected)
        return Features(maps=(), low=empty, fused=fused, pixel=pixel, adapter=adapter)

    def point(self, batch: Batch, about: Tensor) -> Tensor | None:
        """Return the answers' pointer loss, or None when no answer is about an object."""
        states = self.states[self.depth]
        begins = answer_starts(batch, about.shape[1])  # [B, Q]
        asked = states.gather(1, begins.clamp(min=0)[..., None].expand(-1, -1, states.shape[-1]))
        seen = gather(states, batch.source == Source.SEMANTIC, about.shape[2])
        found: Tensor | None = self.pointer(asked, seen, about * (begins >= 0)[..., None])
        return found

    def point_masks(self, batch: Batch, touched: Tensor) -> Tensor | None:
        """Return the mask queries' pointer loss; their targets are the cells [B, S] of masks."""
        queries = batch.source == Source.MASK_QUERY
        if self.mask_pointer is None or not bool(queries.any()):
            return None
        states = self.states[self.mask_depth]
        count = self.config.segment.num_queries
        asked = gather(states, queries, count)
        seen = gather(states, batch.source == Source.SEMANTIC, touched.shape[1])
        shared = touched[:, None].expand(-1, count, -1)
        found: Tensor | None = self.mask_pointer(asked, seen, shared)
        return found

    def point_words(self, batch: Batch, drawn: Origins | None) -> Tensor | None:
        """Return the pointer loss of codes about to be written; None without `drawn`."""
        if self.draw_pointer is None or drawn is None:
            return None
        states = self.states[self.draw_depth]
        asked = gather(states, about_to_draw(batch), drawn.shares.shape[1])
        allowed = before_drawing(batch)
        found: Tensor | None = self.draw_pointer(asked, states, drawn.shares, allowed, drawn.weight)
        return found


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
    need not point), draw_layer (0: codes about to be written need not), afresh (see
    `start_afresh`), spread (of text rows), nearby (whether heads start out so), align (scenes the
    projection is first fitted to), align_share (see `align`), unpaired (whether answers' softmax
    leaves words out, see `unpaired.py`) and spelled: visual tokens are the words for what they
    show, no picture is encoded (questions only, segmentation off).
    """

    def __init__(self) -> None:
        super().__init__()
        self.left_out: Tensor | None = None  # of the next forward pass, see `ReadingBatch.unpaired`

    def build(self, run: Run) -> nn.Module:
        """Return the model with the previous stage's weights, its text rows moved apart."""
        self.run = run
        layers = (("point_layer", 2), ("mask_layer", 0), ("draw_layer", 0))
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
        left_out = None
        if run.extra.get("unpaired", False):
            left_out = unpaired(batch, drawn, tiny_vocabulary(config))
        return ReadingBatch(
            batch=batch,
            about=about,
            touched=torch.from_numpy(area),
            says=says,
            drawn=pictured,
            unpaired=left_out,
        )

    def words_term(self, model: FocusModel, hidden: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of the answers' words, without those that training never pairs."""
        return language_loss(hidden, labels, model.heads.lm_head.weight, without=self.left_out)

    def losses(  # type: ignore[override]
        self, model: nn.Module, batch: ReadingBatch, step: int
    ) -> dict[str, Tensor]:
        """Return a multimodal stage's terms and the pointer's."""
        assert isinstance(model, ReadingModel) and self.run is not None
        model.says, self.left_out = batch.says, batch.unpaired
        terms = super().losses(model, batch.batch, step)
        weight = float(self.run.extra.get("point_weight", 1.0))
        for name, pointed in (
            ("point", model.point(batch.batch, batch.about)),
            ("mask_point", model.point_masks(batch.batch, batch.touched)),
            ("draw_point", model.point_words(batch.batch, batch.drawn)),
        ):
            if pointed is not None:
                terms[f"{batch.batch.task}/{name}"] = weight * pointed
        return terms


STAGE = ReadingStage
