# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,operator,misc"
"""Absorbed attention over long features on tensor cores: split over tokens, then combined.

Rows are the absorbed queries; the features are keys and values at once, so a tile of them is read
from memory one time for both products. The channel axis is cut into two powers of two.

Axes: B batch, R rows (heads x queries), L tokens, C = C1 + C2 channels, S splits.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import tuning
from kernels.device import power_of_two
from kernels.gated_cross_attention import absorbed, absorbed_backward, launch

LOG2E = 1.0 / math.log(2.0)


@triton.jit
def _load_rows(base, index, channel, stride, ok, C: tl.constexpr):
    return tl.load(
        base + index[:, None] * stride + channel[None, :],
        mask=ok[:, None] & (channel < C)[None, :],
        other=0.0,
    )


@triton.jit
def split_forward(
    rows, features, bias, partial, partial_lse, R, L, span, scale_log2e,
    C: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BIAS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write softmax(rows f^T) f over one span of tokens [B, S, R, C] and its log2-sum-exp2."""
    tile, part, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    r = tile * BM + tl.arange(0, BM)
    c1 = tl.arange(0, C1)
    ok = r < R
    q1 = _load_rows(rows + b * R * C, r, c1, C, ok, C)
    a1 = tl.zeros((BM, C1), tl.float32)
    if C2 > 0:
        c2 = C1 + tl.arange(0, C2)
        q2 = _load_rows(rows + b * R * C, r, c2, C, ok, C)
        a2 = tl.zeros((BM, C2), tl.float32)
    top = tl.full((BM,), -1e30, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    first = part * span
    last = tl.minimum(first + span, L)
    for start in tl.range(first, last, BN, num_stages=STAGES):
        n = start + tl.arange(0, BN)
        inside = n < last
        f1 = _load_rows(features + b * L * C, n, c1, C, inside, C)
        scores = tl.dot(q1, tl.trans(f1), input_precision=PRECISION)
        if C2 > 0:
            f2 = _load_rows(features + b * L * C, n, c2, C, inside, C)
            scores = tl.dot(q2, tl.trans(f2), scores, input_precision=PRECISION)
        scores = scores * scale_log2e
        if BIAS:
            scores += tl.load(bias + b * L + n, mask=inside, other=0.0)[None, :]
        scores = tl.where(inside[None, :], scores, -float("inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        decay = tl.exp2(top - higher)
        share = tl.exp2(scores - higher[:, None])
        total = total * decay + tl.sum(share, 1)
        top = higher
        low = share.to(f1.dtype)
        a1 = tl.dot(low, f1, a1 * decay[:, None], input_precision=PRECISION)
        if C2 > 0:
            a2 = tl.dot(low, f2, a2 * decay[:, None], input_precision=PRECISION)
    inverse = tl.where(total > 0.0, 1.0 / total, 0.0)
    at = (b * tl.num_programs(1) + part) * R
    out = partial + (at + r)[:, None] * C
    tl.store(out + c1[None, :], a1 * inverse[:, None], mask=ok[:, None] & (c1 < C)[None, :])
    if C2 > 0:
        tl.store(out + c2[None, :], a2 * inverse[:, None], mask=ok[:, None] & (c2 < C)[None, :])
    lse = tl.where(total > 0.0, top + tl.log2(total), -float("inf"))
    tl.store(partial_lse + at + r, lse, mask=ok)


@triton.jit
def split_backward_rows(
    rows, features, bias, grad, lse, mean, partial, R, L, span, scale_log2e,
    C: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BIAS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the gradient of the rows over one span of tokens: P (grad f^T - mean) f."""
    tile, part, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    r = tile * BM + tl.arange(0, BM)
    c1 = tl.arange(0, C1)
    ok = r < R
    q1 = _load_rows(rows + b * R * C, r, c1, C, ok, C)
    g1 = _load_rows(grad + b * R * C, r, c1, C, ok, C)
    a1 = tl.zeros((BM, C1), tl.float32)
    if C2 > 0:
        c2 = C1 + tl.arange(0, C2)
        q2 = _load_rows(rows + b * R * C, r, c2, C, ok, C)
        g2 = _load_rows(grad + b * R * C, r, c2, C, ok, C)
        a2 = tl.zeros((BM, C2), tl.float32)
    log_sum = tl.load(lse + b * R + r, mask=ok, other=float("inf"))
    centre = tl.load(mean + b * R + r, mask=ok, other=0.0)
    first = part * span
    last = tl.minimum(first + span, L)
    for start in tl.range(first, last, BN, num_stages=STAGES):
        n = start + tl.arange(0, BN)
        inside = n < last
        f1 = _load_rows(features + b * L * C, n, c1, C, inside, C)
        scores = tl.dot(q1, tl.trans(f1), input_precision=PRECISION)
        slope = tl.dot(g1, tl.trans(f1), input_precision=PRECISION)
        if C2 > 0:
            f2 = _load_rows(features + b * L * C, n, c2, C, inside, C)
            scores = tl.dot(q2, tl.trans(f2), scores, input_precision=PRECISION)
            slope = tl.dot(g2, tl.trans(f2), slope, input_precision=PRECISION)
        scores = scores * scale_log2e
        if BIAS:
            scores += tl.load(bias + b * L + n, mask=inside, other=0.0)[None, :]
        share = tl.where(inside[None, :], tl.exp2(scores - log_sum[:, None]), 0.0)
        low = (share * (slope - centre[:, None])).to(f1.dtype)
        a1 = tl.dot(low, f1, a1, input_precision=PRECISION)
        if C2 > 0:
            a2 = tl.dot(low, f2, a2, input_precision=PRECISION)
    out = partial + ((b * tl.num_programs(1) + part) * R + r)[:, None] * C
    tl.store(out + c1[None, :], a1, mask=ok[:, None] & (c1 < C)[None, :])
    if C2 > 0:
        tl.store(out + c2[None, :], a2, mask=ok[:, None] & (c2 < C)[None, :])


@triton.jit
def backward_features(
    rows, features, bias, grad, lse, mean, out, R, L, scale_log2e,
    C: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BIAS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the gradient of one tile of tokens: dS^T rows + P^T grad. One program per tile."""
    tile, b = tl.program_id(0), tl.program_id(1)
    n = tile * BN + tl.arange(0, BN)
    inside = n < L
    c1 = tl.arange(0, C1)
    f1 = _load_rows(features + b * L * C, n, c1, C, inside, C)
    a1 = tl.zeros((BN, C1), tl.float32)
    if C2 > 0:
        c2 = C1 + tl.arange(0, C2)
        f2 = _load_rows(features + b * L * C, n, c2, C, inside, C)
        a2 = tl.zeros((BN, C2), tl.float32)
    if BIAS:
        shift = tl.load(bias + b * L + n, mask=inside, other=0.0)
    for start in tl.range(0, R, BM, num_stages=STAGES):
        r = start + tl.arange(0, BM)
        ok = r < R
        q1 = _load_rows(rows + b * R * C, r, c1, C, ok, C)
        g1 = _load_rows(grad + b * R * C, r, c1, C, ok, C)
        scores = tl.dot(f1, tl.trans(q1), input_precision=PRECISION)
        slope = tl.dot(f1, tl.trans(g1), input_precision=PRECISION)
        if C2 > 0:
            q2 = _load_rows(rows + b * R * C, r, c2, C, ok, C)
            g2 = _load_rows(grad + b * R * C, r, c2, C, ok, C)
            scores = tl.dot(f2, tl.trans(q2), scores, input_precision=PRECISION)
            slope = tl.dot(f2, tl.trans(g2), slope, input_precision=PRECISION)
        log_sum = tl.load(lse + b * R + r, mask=ok, other=float("inf"))
        centre = tl.load(mean + b * R + r, mask=ok, other=0.0)
        scores = scores * scale_log2e
        if BIAS:
            scores += shift[:, None]
        share = tl.where(ok[None, :], tl.exp2(scores - log_sum[None, :]), 0.0)
        low = (share * (slope - centre[None, :])).to(f1.dtype)
        weight = share.to(f1.dtype)
        a1 = tl.dot(low, q1, a1, input_precision=PRECISION)
        a1 = tl.dot(weight, g1, a1, input_precision=PRECISION)
        if C2 > 0:
            a2 = tl.dot(low, q2, a2, input_precision=PRECISION)
            a2 = tl.dot(weight, g2, a2, input_precision=PRECISION)
    to = out + b * L * C + n[:, None] * C
    kind = out.dtype.element_ty
    tl.store(to + c1[None, :], a1.to(kind), mask=inside[:, None] & (c1 < C)[None, :])
    if C2 > 0:
        tl.store(to + c2[None, :], a2.to(kind), mask=inside[:, None] & (c2 < C)[None, :])


def cut(channels: int) -> tuple[int, int]:
    """Return two powers of two (the second may be 0) that cover the channels."""
    first = power_of_two(channels)
    if first == channels or channels <= 32:
        return first, 0
    first //= 2
    return first, power_of_two(channels - first)


def precision(dtype: torch.dtype) -> str:
    """Return the product precision: exact fp32 for fp32 operands."""
    return "ieee" if dtype is torch.float32 else "tf32"


def _settings(kernel: str, features: Tensor) -> dict[str, int]:
    channels = features.shape[2]
    on_gpu = features.device.type == "cuda"
    older = on_gpu and torch.cuda.get_device_capability(features.device) < (9, 0)
    default = launch.settings(kernel, channels, features.dtype is torch.float32, older)
    key = f"{kernel}/C{channels}/{str(features.dtype)[6:]}"
    return tuning.lookup("gated_cross_attention", key, features.device, default)


def _splits(tiles: int, tokens: int, device: torch.device) -> tuple[int, int]:
    """Return (number of spans, tokens per span): the fewest spans that fill 85% of a wave."""
    if device.type != "cuda":
        count = 3 if tokens > 128 else 1  # more than one, so that the interpreter proves combining
    else:
        slots = 2 * torch.cuda.get_device_properties(device).multi_processor_count
        most = max(1, min(64, tokens // 256))
        waves = [tiles * s / slots for s in range(1, most + 1)]
        fill = [w / math.ceil(w) for w in waves]
        count = next(s + 1 for s, f in enumerate(fill) if f >= 0.85 * max(fill))
    span = -(-tokens // (count * 64)) * 64
    return -(-tokens // span), span


def attend(rows: Tensor, features: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return softmax(rows f^T) f [B, R, C] and the log-sum-exp [B, R], both fp32."""
    rows, features = rows.contiguous(), features.contiguous()
    batch, num_rows, channels = rows.shape
    tokens = features.shape[1]
    setting = _settings("forward", features)
    tiles = triton.cdiv(num_rows, setting["BM"])
    count, span = _splits(tiles * batch, tokens, rows.device)
    partial = torch.empty(batch, count, num_rows, channels, device=rows.device)
    partial_lse = torch.empty(batch, count, num_rows, device=rows.device)
    c1, c2 = cut(channels)
    split_forward[(tiles, count, batch)](
        rows, features, bias if bias is not None else rows, partial, partial_lse,
        num_rows, tokens, span, LOG2E, C=channels, C1=c1, C2=c2, BIAS=bias is not None,
        PRECISION=precision(features.dtype), **setting,
    )  # fmt: skip
    lse = torch.logsumexp(partial_lse * math.log(2.0), 1)
    weight = torch.exp2(partial_lse - lse[:, None] * LOG2E).nan_to_num(nan=0.0)
    context = torch.einsum("bsr,bsrc->brc", weight, partial)
    return context, lse.masked_fill(lse == -float("inf"), float("inf"))


def attend_backward(
    rows: absorbed_backward.Rows, features: Tensor, bias: Tensor | None, needs_features: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the rows [B, R, C] and of the features (or empty)."""
    if features.shape[2] > launch.BACKWARD_CHANNELS:
        return absorbed_backward.attend_backward(rows, features, bias, needs_features)
    features = features.contiguous()
    batch, num_rows, channels = rows.query.shape
    tokens = features.shape[1]
    q, grad = rows.query.contiguous(), rows.grad.contiguous()
    lse, mean = (rows.lse * LOG2E).contiguous(), rows.mean.contiguous()
    c1, c2 = cut(channels)
    common: dict[str, Any] = {
        "C": channels,
        "C1": c1,
        "C2": c2,
        "BIAS": bias is not None,
        "PRECISION": precision(features.dtype),
    }
    shift = bias if bias is not None else q
    setting = _settings("backward_rows", features)
    tiles = triton.cdiv(num_rows, setting["BM"])
    count, span = _splits(tiles * batch, tokens, q.device)
    partial = torch.empty(batch, count, num_rows, channels, device=q.device)
    split_backward_rows[(tiles, count, batch)](
        q, features, shift, grad, lse, mean, partial, num_rows, tokens, span, LOG2E,
        **common, **setting,
    )  # fmt: skip
    out = features.new_empty(0)
    if needs_features:
        out = torch.empty_like(features)
        setting = _settings("backward_features", features)
        backward_features[(triton.cdiv(tokens, setting["BN"]), batch)](
            q, features, shift, grad, lse, mean, out, num_rows, tokens, LOG2E, **common, **setting
        )
    return partial.sum(1), out


def forward(*arguments: Any) -> tuple[Tensor, ...]:
    """Do `absorbed.forward` with the attention on tensor cores."""
    return absorbed.forward(*arguments, attend=attend)


def gated_cross_attention(*arguments: Any) -> Tensor:
    """Return the output alone, with remembered folded weights."""
    w_feature, b_feature, _, w_k, w_v, _, _, num_heads = arguments[3:11]
    weights = absorbed.fold_once(w_feature, b_feature, w_k, w_v, num_heads)
    return absorbed.forward(*arguments[:12], weights=weights, attend=attend)[0]


def backward(*arguments: Any) -> list[Tensor]:
    """Do `absorbed_backward.backward` with the loops over tokens on tensor cores."""
    return absorbed_backward.backward(*arguments, attend=attend_backward)


def gated_cross_attention_backward(*arguments: Any) -> list[Tensor]:
    """Return the gradients without a saved context."""
    weights = arguments[1:9]
    _, *saved = forward(arguments[0], *weights, *arguments[9:12])
    return backward(*arguments, *saved)
