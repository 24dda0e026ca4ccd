"""The language model: a Qwen2 trunk with a static key/value cache.

Parameter names are those of transformers' `Qwen2Model` (without the embedding table), so that
public checkpoints load name by name. One layer is

    h = x + W_o Attention(RMSNorm(x))
    y = h + W_down (silu(W_gate RMSNorm(h)) * W_up RMSNorm(h))

with grouped-query attention, biases on q, k and v, and rotary positions on halves of a head.
"""

# B batch, T positions of this call, S slots of the cache, D width, H heads, K key/value heads,
# d head width, L layers

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from focus.config import LLMConfig
from focus.errors import ShapeError


class KVCache:
    """Keys and values of every layer in fixed buffers; each row stands at its own position.

    keys, values: [L, B, K, S, d]; slot j of a row holds its j-th token. One spare slot at the end
    takes the writes of padding, so that a padded row never overwrites its own tokens.
    lengths: [B] int64, tokens that a row holds. A call of the trunk appends its valid tokens.

    `whole=True` attends over all slots, so that shapes stay the same from call to call (CUDA
    graphs); otherwise only over the slots that some row has filled.
    """

    def __init__(
        self,
        config: LLMConfig,
        batch: int,
        max_length: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        whole: bool = False,
    ) -> None:
        shape = (config.num_layers, batch, config.num_kv_heads, max_length + 1, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.max_length = max_length
        self.whole = whole
        self._bound = 0  # no row holds more tokens than this

    @property
    def batch(self) -> int:
        """Number of rows."""
        return self.keys.shape[1]

    @property
    def bound(self) -> int:
        """A number of tokens that no row exceeds, known without asking the device."""
        return self._bound

    def reserve(self, num: int, lengths: Tensor | None = None) -> int:
        """Return the slots to attend over when `num` positions follow, `lengths` [B] of them valid.

        Raises:
            ShapeError: a row would not fit.
        """
        if self._bound + num > self.max_length:
            self._bound = int(self.lengths.max())
            needed = int((self.lengths + (num if lengths is None else lengths)).max())
            if needed > self.max_length:
                raise ShapeError(
                    f"at most {self.max_length} tokens in the key/value cache expected, "
                    f"got {needed}; build the KVCache with a larger max_length"
                )
        return self.max_length if self.whole else min(self._bound + num, self.max_length)

    def advance(self, lengths: Tensor | None, num: int) -> None:
        """Count the tokens just written: `lengths` [B] of them per row, or `num` in every row."""
        self.lengths = self.lengths + (num if lengths is None else lengths)
        self._bound = min(self._bound + num, self.max_length)

    def truncate(self, lengths: Tensor) -> None:
        """Forget all but the first `lengths` [B] tokens of each row (prefix reuse)."""
        self.lengths = torch.minimum(self.lengths, lengths.to(self.lengths))
        self._bound = int(self.lengths.max())

    def select(self, rows: Tensor) -> KVCache:
        """Return a new cache that holds copies of `rows` [B'], which may repeat."""
        return self._like(
            self.keys.index_select(1, rows),
            self.values.index_select(1, rows),
            self.lengths.index_select(0, rows),
        )

    @staticmethod
    def join(caches: Sequence[KVCache]) -> KVCache:
        """Return one cache with copies of the rows of several; the largest sets the size."""
        largest = max(caches, key=lambda cache: cache.max_length)
        spare = [largest.max_length - cache.max_length for cache in caches]
        return largest._like(
            torch.cat([F.pad(c.keys, (0, 0, 0, n)) for c, n in zip(caches, spare, strict=True)], 1),
            torch.cat(
                [F.pad(c.values, (0, 0, 0, n)) for c, n in zip(caches, spare, strict=True)], 1
            ),
            torch.cat([cache.lengths for cache in caches]),
        )

    def view(self, rows: slice) -> KVCache:
        """Return a cache over some rows that shares their keys and values, but counts by itself."""
        new = self._like(self.keys[:, rows], self.values[:, rows], self.lengths[rows], self._bound)
        new.lengths = new.lengths.clone()
        return new

    def settle(self, rows: slice, view: KVCache) -> None:
        """Count what a view of `rows` has appended to them."""
        self.lengths[rows] = view.lengths
        self._bound = max(self._bound, view.bound)

    def read(self, row: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return copies of the keys and values [L, K, N, d] of one row's tokens start..stop."""
        where = slice(start, stop)
        return self.keys[:, row, :, where].clone(), self.values[:, row, :, where].clone()

    def write(self, row: int, keys: Tensor, values: Tensor, start: int = 0) -> None:
        """Let a row end in these tokens, from `start` on: keys, values [L, K, N, d].

        Raises:
            ShapeError: they do not fit.
        """
        stop = start + keys.shape[2]
        if stop > self.max_length:
            raise ShapeError(
                f"at most {self.max_length} tokens in the key/value cache expected, got {stop}; "
                "build the KVCache with a larger max_length"
            )
        self.keys[:, row, :, start:stop] = keys
        self.values[:, row, :, start:stop] = values
        self.lengths[row] = stop
        self._bound = max(self._bound, stop)

    def _like(
        self, keys: Tensor, values: Tensor, lengths: Tensor, bound: int | None = None
    ) -> KVCache:
        new = object.__new__(KVCache)
        new.keys, new.values, new.lengths = keys, values, lengths
        new.max_length, new.whole = self.max_length, self.whole
        new._bound = int(lengths.max()) if bound is None else bound
        return new


@dataclass(frozen=True, kw_only=True)
class _Step:
    """What every layer of one call shares."""

    cos: Tensor  # [B or 1, 1, T, d]
    sin: Tensor
    mask: Tensor | None  # bool, True = may attend, broadcasts to [B, H, T, S]; None: causal
    rows: Tensor | None = None  # [B, 1] and
    slots: Tensor | None = None  # [B, T]: where keys and values go in the cache
    span: int = 0


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dim, in fp32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., dim]; keeps the dtype."""
        normed = F.rms_norm(x.float(), self.weight.shape, None, self.eps)
        return self.weight * normed.to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: LLMConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.dim, width)
        self.k_proj = nn.Linear(config.dim, kv_width)
        self.v_proj = nn.Linear(config.dim, kv_width)
        self.o_proj = nn.Linear(width, config.dim, bias=False)

    def forward(self, x: Tensor, step: _Step, keys: Tensor | None, values: Tensor | None) -> Tensor:
        """Attend [B, T, D]; with one layer's `keys`, `values` [B, K, S, d], over the cache."""
        query = _rotate(_split(self.q_proj(x), self.num_heads), step)
        key = _rotate(_split(self.k_proj(x), self.num_kv_heads), step)
        value = _split(self.v_proj(x), self.num_kv_heads)
        if keys is not None and values is not None:
            assert step.rows is not None
            assert step.slots is not None
            keys[step.rows, :, step.slots] = key.transpose(1, 2).to(keys.dtype)
            values[step.rows, :, step.slots] = value.transpose(1, 2).to(values.dtype)
            key = keys[:, :, : step.span].to(query.dtype)
            value = values[:, :, : step.span].to(query.dtype)
        attended = _attend(query, key, value.to(query.dtype), step.mask)
        projected: Tensor = self.o_proj(attended.transpose(1, 2).flatten(2))
        return projected


class MLP(nn.Module):
    """SwiGLU: W_down (silu(W_gate x) * W_up x)."""

    def __init__(self, config: LLMConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.up_proj = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.down_proj = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., D] to [..., D]."""
        mapped: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return mapped


class Layer(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: LLMConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, step: _Step, keys: Tensor | None, values: Tensor | None) -> Tensor:
        """Map [B, T, D] to [B, T, D]."""
        x = x + self.self_attn(self.input_layernorm(x), step, keys, values)
        mapped: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return mapped


class Qwen2Trunk(nn.Module):
    """Qwen2 without embedding table and head; equal to transformers' `Qwen2Model`.

    Without cache and segments attention is plainly causal: right padding needs no mask, because no
    token sees what follows it (states at padding positions mean nothing).
    """

    def __init__(self, config: LLMConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights N(0, 1/fan_in), the two that write to the residual scaled by (2L)^-1/2."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                std = module.in_features**-0.5
                if name.endswith(("o_proj", "down_proj")):
                    std *= (2 * self.config.num_layers) ** -0.5
                nn.init.normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(
        self,
        embeddings: Tensor,
        *,
        positions: Tensor | None = None,
        lengths: Tensor | None = None,
        segments: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Return the final-normed hidden states [B, T, D] of embeddings [B, T, D].

        positions: [B, T] rotary positions; default 0, 1, ... per row, per segment, or from where
            the cache stands.
        lengths: [B] valid (right-padded) positions of this call; with a cache only these are kept.
        segments: [B, T] document numbers of a packed row; tokens see only their own document.
        cache: keys and values of what came before; the call appends to it.

        Raises:
            ShapeError: segments together with a cache, or a cache that is too small.
        """
        self._check(embeddings, segments, cache)
        if cache is not None:
            step = self._cached_step(embeddings, positions, lengths, cache)
        else:
            step = self._plain_step(embeddings, positions, segments)
        x = embeddings
        for index, layer in enumerate(self.layers):
            keys = None if cache is None else cache.keys[index]
            values = None if cache is None else cache.values[index]
            x = layer(x, step, keys, values)
        if cache is not None:
            cache.advance(lengths, embeddings.shape[1])
        normed: Tensor = self.norm(x)
        return normed

    def _plain_step(
        self, embeddings: Tensor, positions: Tensor | None, segments: Tensor | None
    ) -> _Step:
        num = embeddings.shape[1]
        order = torch.arange(num, device=embeddings.device)
        mask = None
        if segments is not None:
            causal = order[:, None] >= order
            mask = (segments[:, None, :, None] == segments[:, None, None, :]) & causal
            if positions is None:
                positions = _positions_in_segment(segments)
        cos, sin = self._rotation(order[None] if positions is None else positions)
        return _Step(cos=cos, sin=sin, mask=mask)

    def _cached_step(
        self, embeddings: Tensor, positions: Tensor | None, lengths: Tensor | None, cache: KVCache
    ) -> _Step:
        batch, num = embeddings.shape[:2]
        device = embeddings.device
        span = cache.reserve(num, lengths)
        order = torch.arange(num, device=device)
        slots = cache.lengths[:, None] + order
        mask = torch.arange(span, device=device) <= slots[..., None]  # [B, T, S]
        cos, sin = self._rotation(slots if positions is None else positions)
        if lengths is not None:
            slots = torch.where(order < lengths[:, None], slots, cache.max_length)
        rows = torch.arange(batch, device=device)[:, None]
        return _Step(cos=cos, sin=sin, mask=mask[:, None], rows=rows, slots=slots, span=span)

    def _rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        dim = self.config.head_dim
        order = torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device)
        frequency = 1.0 / (self.config.rope_theta ** (order / dim))
        angle = positions[:, None, :, None].float() * frequency  # [B, 1, T, d / 2]
        angle = torch.cat([angle, angle], -1)
        return angle.cos(), angle.sin()

    def _check(self, embeddings: Tensor, segments: Tensor | None, cache: KVCache | None) -> None:
        if embeddings.ndim != 3 or embeddings.shape[2] != self.config.dim:
            raise ShapeError(
                f"embeddings [B, T, {self.config.dim}] expected, got {tuple(embeddings.shape)}"
            )
        if cache is None:
            return
        if segments is not None:
            raise ShapeError("packed segments cannot be cached; give segments or a cache, not both")
        if cache.batch != embeddings.shape[0]:
            raise ShapeError(
                f"a cache of {embeddings.shape[0]} rows expected, got {cache.batch}; "
                "select() the rows or build another cache"
            )


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, causal without a mask; [B, H, T, d]."""
    dtype, grouped = query.dtype, query.shape[1] != key.shape[1]
    if dtype == torch.bfloat16 and query.device.type == "cpu" and query.requires_grad:
        # PyTorch's CPU kernel has a bf16 backward almost twice as slow as its fp32 one.
        with torch.autocast("cpu", enabled=False):
            query, key, value = query.float(), key.float(), value.float()
            attended = F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
            )
        return attended.to(dtype)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
    )


def _split(x: Tensor, num_heads: int) -> Tensor:
    return x.view(*x.shape[:-1], num_heads, -1).transpose(1, 2)


def _rotate(x: Tensor, step: _Step) -> Tensor:
    first, second = x.chunk(2, -1)
    turned = torch.cat([-second, first], -1)
    return x * step.cos.to(x.dtype) + turned * step.sin.to(x.dtype)


def _positions_in_segment(segments: Tensor) -> Tensor:
    order = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return order - torch.where(begins, order, 0).cummax(1).values
