"""Predicted masks as cross-attention context of the UNet (eq. 6).

The mask sequence replaces SDXL's text: every `attn2` keeps its weights (to_q, to_k, to_v, to_out)
and attends over the cells of the mask instead of over words.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.mask_attention.api import mask_attention

# B batch, M mask channels, N query cells of a level, H heads, d head width, C context width


class MaskContext(NamedTuple):
    """What the UNet carries to every `MaskAttention` in place of `encoder_hidden_states`.

    masks: one [B, M, Hk, Wk] per UNet level, the mask on the key grid of that level.
    projection: [C, M], the bias-free map f_m = w m from mask to context.
    height, width: the latent grid; positions are measured in its cells.
    tokens: [B, N, C] context vectors that are attended to instead of the masks (an ablation).
    """

    masks: tuple[Tensor, ...]
    projection: Tensor
    height: int
    width: int
    tokens: Tensor | None = None


class MaskAttention(nn.Module):
    """Cross-attention of one transformer block over the mask sequence.

        out = W_o softmax(R q (R k)^T / sqrt(d)) v + b_o,   k = W_k w m,  v = W_v w m        (eq. 6)

    R rotates queries and keys by their place in the picture: without it keys that are a projection
    of a scalar know nothing of where they lie, and a binary mask would convey only its area.
    A mask of zeros, or no context at all, gives b_o exactly: the unconditioned decoder.
    """

    def __init__(
        self,
        dim: int,
        *,
        context_dim: int,
        num_heads: int,
        head_dim: int,
        level: int,
        position: Literal["rope", "none"],
    ) -> None:
        super().__init__()
        inner = num_heads * head_dim
        self.num_heads, self.head_dim = num_heads, head_dim
        self.level, self.position = level, position
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_k = nn.Linear(context_dim, inner, bias=False)
        self.to_v = nn.Linear(context_dim, inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, dim), nn.Dropout(0.0))

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: MaskContext | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend from hidden_states [B, N, dim], row-major over the level's grid; same shape out.

        `attention_mask` exists for diffusers' calling convention and must stay None.
        """
        if encoder_hidden_states is None:
            inner = self.to_q.out_features
            projected: Tensor = self.to_out(hidden_states.new_zeros(1, 1, inner))
            return projected.expand_as(hidden_states)
        context = encoder_hidden_states
        batch, num_queries, _ = hidden_states.shape
        query = self.to_q(hidden_states).view(batch, num_queries, self.num_heads, self.head_dim)
        if context.tokens is not None:
            out = self._attend_tokens(query, context.tokens)
            attended: Tensor = self.to_out(out.to(hidden_states.dtype))
            return attended
        stride = 1 << self.level
        out = mask_attention(
            query.transpose(1, 2),
            context.masks[self.level],
            self._fold(self.to_k, context.projection),
            self._fold(self.to_v, context.projection),
            (-(-context.height // stride), -(-context.width // stride)),
            (context.height, context.width),
            self.position,
        )
        out = out.transpose(1, 2).reshape(batch, num_queries, -1)
        projected = self.to_out(out.to(hidden_states.dtype))
        return projected

    def _attend_tokens(self, query: Tensor, tokens: Tensor) -> Tensor:
        """Plain cross-attention of query [B, N, H, d] over context vectors [B, L, C]."""
        split = (*tokens.shape[:2], self.num_heads, self.head_dim)
        key, value = self.to_k(tokens).view(split), self.to_v(tokens).view(split)
        out = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        )
        return out.transpose(1, 2).flatten(2)

    def _fold(self, layer: nn.Module, projection: Tensor) -> Tensor:
        """Fold a projection of the context into vectors per head and mask channel: [H, M, d]."""
        vectors: Tensor = layer(projection.t())
        return vectors.view(-1, self.num_heads, self.head_dim).transpose(0, 1)


def mask_context(
    mask: Tensor,
    projection: Tensor,
    latent_size: tuple[int, int],
    num_levels: int,
    grid: Literal["pooled", "full"],
) -> MaskContext:
    """Bring a mask [B, M, H, W] in [0, 1] to the latent grid and pool it to every level's grid.

    Pooling is by area, so a cell holds the share of it that the mask covers. `grid="full"` keeps
    the latent grid at every level. Differentiable in the mask.
    """
    height, width = latent_size
    base = resize_area(mask, latent_size)
    masks = [base]
    for level in range(1, num_levels):
        stride = 1 << level
        size = (-(-height // stride), -(-width // stride))
        masks.append(resize_area(base, size) if grid == "pooled" else base)
    return MaskContext(tuple(masks), projection, height, width)


def resize_area(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize [B, M, H, W] by area averages (down) or bilinearly (up) to `size`."""
    height, width = mask.shape[-2:]
    if (height, width) == size:
        return mask
    if height % size[0] == 0 and width % size[1] == 0:
        return F.avg_pool2d(mask, (height // size[0], width // size[1]))
    if size[0] > height or size[1] > width:
        return F.interpolate(mask, size=size, mode="bilinear", align_corners=False)
    return F.interpolate(mask, size=size, mode="area")


def match_dtype(mask: Tensor, reference: Tensor) -> Tensor:
    """Convert a bool or other mask to the dtype and device of `reference`."""
    return mask.to(device=reference.device, dtype=reference.dtype)


def context_rows(context: MaskContext | None, keep: Tensor) -> MaskContext | None:
    """Zero the mask of the rows where `keep` [B] is False (mask drop)."""
    if context is None:
        return None
    masks = tuple(m * keep.to(m.dtype)[:, None, None, None] for m in context.masks)
    tokens = context.tokens
    if tokens is not None:
        tokens = tokens * keep.to(tokens.dtype)[:, None, None]
    return context._replace(masks=masks, tokens=tokens)


def repeat_context(context: MaskContext | None, keeps: list[bool]) -> MaskContext | None:
    """Stack the context once per guidance branch; a branch with False sees a mask of zeros."""
    if context is None:
        return None
    masks = tuple(
        torch.cat([m if keep else torch.zeros_like(m) for keep in keeps]) for m in context.masks
    )
    tokens = context.tokens
    if tokens is not None:
        tokens = torch.cat([tokens if keep else torch.zeros_like(tokens) for keep in keeps])
    return context._replace(masks=masks, tokens=tokens)
