"""Pointers of the reading stage: states of a trunk that should know where in a picture things lie.

    p(s | q) = softmax_s(<W_q h_q, W_k h_s> / sqrt(d)),  loss = -log sum_s c_s p(s | q)

h are states behind one layer, s a semantic token (or, for a picture to draw, any position before
it), c_s the share of its cell that what q is about covers, 1 for the best covered. `reading.py`
says what for.
"""

# B batch, T sequence, D LLM width, Q answers of a dialogue, S semantic tokens, K candidates

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.stages.answers import answer_starts
from engine.stages.drawing import Origins, about_to_draw, before_drawing
from focus.batch import Batch, Source
from focus.config import FocusConfig
from focus.model import Features, FocusModel, gather
from focus.vision.fusion import Fused

WIDTH = 64  # of the pointer's queries and keys


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
    mask queries (0: none), one those behind `draw_depth` where a semantic code follows (0: none),
    one those behind `class_depth` at the [SEG] of each candidate class (0: none).
    """

    def __init__(
        self,
        config: FocusConfig,
        depth: int,
        mask_depth: int = 0,
        draw_depth: int = 0,
        class_depth: int = 0,
    ) -> None:
        super().__init__(config)
        self.pointer = Pointer(config.llm.dim)
        self.mask_pointer = Pointer(config.llm.dim) if mask_depth else None
        self.draw_pointer = Pointer(config.llm.dim) if draw_depth else None
        self.class_pointer = Pointer(config.llm.dim) if class_depth else None
        self.states: dict[int, Tensor] = {}
        self.depth, self.mask_depth, self.draw_depth = depth, mask_depth, draw_depth
        self.class_depth = class_depth
        self.says: Tensor | None = None  # for the next forward pass, see `ReadingBatch`
        for layer in {depth, mask_depth, draw_depth, class_depth} - {0}:
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

    def point_classes(self, batch: Batch, listed: Tensor | None) -> Tensor | None:
        """Return the pointer loss of candidate classes that are there; None without `listed`."""
        if self.class_pointer is None or listed is None:
            return None
        states = self.states[self.class_depth]
        ends = candidate_ends(batch.condition, listed.shape[1])  # [B, K]
        asked = states.gather(1, ends[..., None].expand(-1, -1, states.shape[-1]))
        seen = gather(states, batch.source == Source.SEMANTIC, listed.shape[2])
        found: Tensor | None = self.class_pointer(asked, seen, listed)
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


def candidate_ends(condition: Tensor, num: int) -> Tensor:
    """Position [B, num] of the last token of each candidate, 0 where there are fewer.

    condition: [B, T], see `Batch`.
    """
    position = torch.arange(condition.shape[1], device=condition.device)
    number = torch.arange(num, device=condition.device)
    own = condition[:, None, :] == number[:, None]
    return (own * position).amax(-1)
