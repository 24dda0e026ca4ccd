"""Gated cross-attention adapter: learnable queries read one scale per layer (eq. 3-4)."""

# B batch, Q queries, L feature tokens, C channels, D adapter width

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from focus.config import SCALES, AdapterConfig, HierarchicalConfig, Scale
from focus.errors import ShapeError
from focus.vision.block import initialise, output_norm
from focus.vision.rope2d import grid_positions
from kernels.gated_cross_attention.api import gated_cross_attention, gated_ffn


def sincos_position(grid: tuple[int, int], dim: int, stride: int, device: torch.device) -> Tensor:
    """Return the fixed 2-D sine-cosine embedding of a feature map, [rows * columns, dim] in fp32.

    Cell centres are measured in units of 8 pixels on every scale, so that one place in the picture
    has the same phase at strides 8, 16 and 32. A quarter of the channels each: sin y, cos y, sin x,
    cos x, at frequencies 1e4^(-4i / dim). Raises ShapeError when dim is no multiple of 4.
    """
    if dim % 4:
        raise ShapeError(f"a feature width that is a multiple of 4 expected, got {dim}")
    extent = (grid[0] * stride / 8, grid[1] * stride / 8)
    rows, columns = grid_positions(grid, device, extent)
    exponent = torch.arange(dim // 4, dtype=torch.float32, device=device) / (dim // 4)
    frequency = 1.0 / (10_000.0**exponent)
    y, x = rows[:, None] * frequency, columns[:, None] * frequency
    return torch.cat([y.sin(), y.cos(), x.sin(), x.cos()], dim=-1)


class AdapterLayer(nn.Module):
    """One gated layer over one scale j.

    h' = h + tanh(gamma) MHA(LN(h), G_j(X_j))   (eq. 3)
    h'' = h' + tanh(beta) FFN(LN(h'))           (eq. 4)

    G_j is a Linear whose bias is the level embedding. gamma and beta start at zero, so the layer
    starts as the identity; the four attention weights then first get a gradient at the second step.
    """

    def __init__(self, dim: int, feature_dim: int, num_heads: int, ffn_ratio: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.feature = nn.Linear(feature_dim, dim)
        self.query = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.attention_gate = nn.Parameter(torch.zeros(()))
        self.ffn_norm = nn.LayerNorm(dim, eps=1e-6)
        self.up = nn.Linear(dim, int(dim * ffn_ratio))
        self.down = nn.Linear(int(dim * ffn_ratio), dim)
        self.ffn_gate = nn.Parameter(torch.zeros(()))

    def forward(self, h: Tensor, features: Tensor) -> Tensor:
        """h [B, Q, D], features [B, L, C] -> [B, Q, D]."""
        h = gated_cross_attention(
            h,
            self.norm(h),
            features,
            self.feature.weight,
            self.feature.bias,
            self.query.weight,
            self.key.weight,
            self.value.weight,
            self.out.weight,
            self.attention_gate,
            self.num_heads,
        )
        return gated_ffn(
            h,
            self.ffn_norm(h),
            self.up.weight,
            self.up.bias,
            self.down.weight,
            self.down.bias,
            self.ffn_gate,
        )


class GatedAdapter(nn.Module):
    """Fine-grained visual tokens h_Adapter for the language model (eq. 3-4).

    Layer l reads scale j = l of `config.scales`. The keys are the features alone (eq. 3 to the
    letter). Under autocast the residual stream keeps the dtype of the queries.
    """

    def __init__(
        self,
        config: AdapterConfig,
        hierarchical: HierarchicalConfig,
        llm_dim: int,
        gain: float | None = None,
    ) -> None:
        super().__init__()
        if config.dim % config.num_heads:
            raise ShapeError(
                f"adapter.dim ({config.dim}) must be a multiple of adapter.num_heads "
                f"({config.num_heads}); change one of them"
            )
        self.config = config
        self.queries = nn.Parameter(torch.randn(config.num_queries, config.dim))
        self.layers = nn.ModuleList(
            AdapterLayer(config.dim, hierarchical.dim_of(scale), config.num_heads, config.ffn_ratio)
            for scale in config.scales
        )
        self.norm = nn.LayerNorm(config.dim, eps=1e-6)
        self.project = nn.Linear(config.dim, llm_dim)
        initialise(self)
        self.out_norm = output_norm(llm_dim, gain)

    def forward(self, features: Sequence[Tensor], queries: Tensor | None = None) -> Tensor:
        """Four maps res2..res5, [B, C_i, H_i, W_i] -> [B, Q, llm_dim].

        `queries` [B, Q, D] replaces the learned ones (the previous frame's memory in video).
        Raises ShapeError when there are not four maps or the queries have another width.
        """
        if len(features) != len(SCALES):
            raise ShapeError(f"the four maps {SCALES} expected, got {len(features)}")
        h = self._start(features[0], queries)
        for layer, scale in zip(self.layers, self.config.scales, strict=True):
            h = layer(h, self._tokens(features, scale))
        out: Tensor = self.out_norm(self.project(self.norm(h)))
        return out

    def _start(self, feature: Tensor, queries: Tensor | None) -> Tensor:
        if queries is None:
            return self.queries.expand(feature.shape[0], -1, -1)
        if queries.ndim != 3 or queries.shape[-1] != self.config.dim:
            raise ShapeError(
                f"queries must be [B, Q, {self.config.dim}], got {tuple(queries.shape)}"
            )
        return queries

    def _tokens(self, features: Sequence[Tensor], scale: Scale) -> Tensor:
        index = SCALES.index(scale)
        feature = features[index]
        tokens = feature.flatten(2).transpose(1, 2)
        if self.config.position:
            grid = (feature.shape[-2], feature.shape[-1])
            position = sincos_position(grid, feature.shape[1], 4 << index, feature.device)
            tokens = tokens + position.to(tokens.dtype)
        return tokens
