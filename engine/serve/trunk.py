"""The trunk as the engine runs it: fewer, larger operations, the same weights, the same cache.

`FusedTrunk` stands wherever `focus.llm.Qwen2Trunk` does and gives its states up to rounding. It
reads q, k and v, and gate and up, in one product each, takes rotations from a table, attends
without a mask where all rows stand at one position, and groups the query heads of a key head
instead of repeating keys. Optionally its weights are int8, one scale per output channel.
"""

# B rows, T positions of this call, S slots, D width, H heads, K key/value heads, G = H / K, d head
# width, L layers

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from focus.errors import ShapeError
from focus.llm import KVCache, Layer, Qwen2Trunk, RMSNorm

Product = Callable[[Tensor], Tensor]


class FusedTrunk(nn.Module):
    """A `Qwen2Trunk` for decoding. The weights are read once, here: train the other one.

    int8: keep the large matrices as int8 (weight-only, symmetric, per output channel); activations
    stay as they are. Without it the fused matrices replace the modules' own storage, so that the
    model does not grow.
    """

    def __init__(self, trunk: Qwen2Trunk, *, int8: bool = False) -> None:
        super().__init__()
        self.config = trunk.config
        self._plain = [trunk]  # in a list: its parameters are not this module's
        self._layers = [_Fused(layer, int8) for layer in trunk.layers if isinstance(layer, Layer)]
        self._table = (torch.empty(0), torch.empty(0))

    def forward(
        self,
        embeddings: Tensor,
        *,
        lengths: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Return final-normed hidden states [B, T, D]; append to the cache. See `Qwen2Trunk`.

        Raises:
            ShapeError: embeddings of another width, a cache of another batch or too small.
        """
        plain = self._plain[0]
        if cache is None:
            states: Tensor = plain(embeddings, lengths=lengths)
            return states
        if embeddings.ndim != 3 or embeddings.shape[2] != self.config.dim:
            raise ShapeError(
                f"embeddings [B, T, {self.config.dim}] expected, got {tuple(embeddings.shape)}"
            )
        if cache.batch != embeddings.shape[0]:
            raise ShapeError(
                f"a cache of {embeddings.shape[0]} rows expected, got {cache.batch}; "
                "view() or select() the rows"
            )
        step = self._step(embeddings, lengths, cache)
        x = embeddings
        for index, layer in enumerate(self._layers):
            x = layer(x, step, cache.keys[index], cache.values[index])
        cache.advance(lengths, embeddings.shape[1])
        return _norm(x, plain.norm)

    def _step(self, embeddings: Tensor, lengths: Tensor | None, cache: KVCache) -> _Step:
        batch, num = embeddings.shape[:2]
        span = cache.reserve(num, lengths)
        cos, sin = self._rotation(cache.max_length + num, embeddings)
        start = None if cache.whole or lengths is not None else _common(cache.lengths)
        if start is not None:
            where = slice(start, start + num)
            mask = None
            if num > 1 and start:
                mask = embeddings.new_ones(num, start + num, dtype=torch.bool).tril(start)
            return _Step(cos[where, None], sin[where, None], mask, where=where, span=start + num)
        order = torch.arange(num, device=embeddings.device)
        slots = cache.lengths[:, None] + order
        mask = torch.arange(span, device=embeddings.device) <= slots[..., None]
        turns = cos[slots][:, :, None], sin[slots][:, :, None]
        if lengths is not None:
            slots = torch.where(order < lengths[:, None], slots, cache.max_length)
        rows = torch.arange(batch, device=embeddings.device)[:, None]
        return _Step(*turns, mask[:, None], rows=rows, slots=slots, span=span)

    def _rotation(self, num: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines [num or more, d], computed once per length and device."""
        cos, _ = self._table
        if cos.shape[0] < num or cos.device != like.device or cos.dtype != like.dtype:
            dim = self.config.head_dim
            order = torch.arange(0, dim, 2, dtype=torch.float32, device=like.device)
            frequency = 1.0 / (self.config.rope_theta ** (order / dim))
            angle = torch.arange(num, device=like.device).float()[:, None] * frequency
            cosine, sine = angle.cos(), angle.sin()
            self._table = (
                torch.cat([cosine, cosine], -1).to(like.dtype),
                torch.cat([-sine, sine], -1).to(like.dtype),
            )
        return self._table


@dataclass(frozen=True)
class _Step:
    """What every layer of one call shares."""

    cos: Tensor  # [T, 1, d] or [B, T, 1, d]
    sin: Tensor  # the first half negative
    mask: Tensor | None  # bool [T, S] or [B, 1, T, S]; None: all slots, or causal from the start
    where: slice | None = None  # slots to write, where all rows stand at one position
    rows: Tensor | None = None  # [B, 1] and
    slots: Tensor | None = None  # [B, T] otherwise
    span: int = 0


class _Fused:
    """One layer; see `focus.llm.Layer`."""

    def __init__(self, layer: Layer, int8: bool) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.layer = layer
        self.heads, self.kv_heads = attention.num_heads, attention.num_kv_heads
        self.qkv = _product([attention.q_proj, attention.k_proj, attention.v_proj], int8)
        self.out = _product([attention.o_proj], int8)
        self.gate_up = _product([mlp.gate_proj, mlp.up_proj], int8)
        self.down = _product([mlp.down_proj], int8)

    def __call__(self, x: Tensor, step: _Step, keys: Tensor, values: Tensor) -> Tensor:
        x = x + self._attend(_norm(x, self.layer.input_layernorm), step, keys, values)
        gate, up = self.gate_up(_norm(x, self.layer.post_attention_layernorm)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)

    def _attend(self, x: Tensor, step: _Step, keys: Tensor, values: Tensor) -> Tensor:
        batch, num = x.shape[:2]
        turned = self.heads + self.kv_heads
        qkv = self.qkv(x).view(batch, num, turned + self.kv_heads, -1)
        rotated = _rotate(qkv[:, :, :turned], step)
        query, key = rotated[:, :, : self.heads], rotated[:, :, self.heads :]
        _store(keys, key, step)
        _store(values, qkv[:, :, turned:], step)
        key, value = keys[:, :, : step.span].to(x.dtype), values[:, :, : step.span].to(x.dtype)
        if num == 1:  # the heads of a group are so many queries of one key head
            query = query.reshape(batch, self.kv_heads, self.heads // self.kv_heads, -1)
            attended = F.scaled_dot_product_attention(query, key, value, attn_mask=step.mask)
            return self.out(attended.reshape(batch, 1, -1))
        attended = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            key,
            value,
            attn_mask=step.mask,
            is_causal=step.mask is None,
            enable_gqa=self.heads != self.kv_heads,
        )
        return self.out(attended.transpose(1, 2).flatten(2))


def _store(cache: Tensor, new: Tensor, step: _Step) -> None:
    """Put new [B, T, K, d] into [B, K, S, d]."""
    if step.where is not None:
        cache[:, :, step.where] = new.transpose(1, 2)
    else:
        assert step.rows is not None and step.slots is not None
        cache[step.rows, :, step.slots] = new.to(cache.dtype)


def _rotate(x: Tensor, step: _Step) -> Tensor:
    return torch.addcmul(x * step.cos, x.roll(x.shape[-1] // 2, -1), step.sin)


def _norm(x: Tensor, norm: RMSNorm) -> Tensor:
    if x.dtype == torch.float32:
        return F.rms_norm(x, norm.weight.shape, norm.weight, norm.eps)
    normed: Tensor = norm(x)
    return normed


def _common(lengths: Tensor) -> int | None:
    """The position at which all rows stand; None if they differ, or if asking would stall a GPU."""
    if lengths.device.type != "cpu":
        return None
    found = lengths.tolist()
    return int(found[0]) if found.count(found[0]) == len(found) else None


def _product(linears: Sequence[nn.Linear], int8: bool) -> Product:
    """Return x -> [W_1 x + b_1, W_2 x + b_2, ...] as one product."""
    weight = torch.cat([linear.weight.detach() for linear in linears])
    biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
    bias = torch.cat(biases) if biases else None
    if int8:
        return quantised(weight, bias)
    first = 0
    for linear in linears:
        linear.weight.data = weight[first : first + linear.out_features]
        first += linear.out_features
    return lambda x: F.linear(x, weight, bias)


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 [N, K] and scales [N] with weight ~ int8 * scale: round to nearest, symmetric."""
    scale = weight.float().abs().amax(1).clamp(min=1e-12) / 127
    return (weight.float() / scale[:, None]).round().to(torch.int8), scale.to(weight.dtype)


def quantised(weight: Tensor, bias: Tensor | None) -> Product:
    """Return the product with an int8 copy of `weight` [N, K]; PyTorch's own kernel does it."""
    numbers, scale = quantise(weight)

    def product(x: Tensor) -> Tensor:
        found = torch._weight_int8pack_mm(x.reshape(-1, x.shape[-1]), numbers, scale)
        found = found.view(*x.shape[:-1], -1)
        return found if bias is None else found + bias

    return product
