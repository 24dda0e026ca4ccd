"""Choosing tokens: guidance, temperature, top-k, top-p, and noise made of (seed, step) alone.

A sample is argmax(logits / T + g) with Gumbel noise g hashed from (seed, step, token id). A row's
result therefore does not depend on who shares its batch, nor on which slice of the vocabulary the
head computed, nor on the device.
"""

# B rows, V ids

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn.

    temperature: 0 takes the likeliest. A pair is for (semantic, pixel) codes: where things lie and
    what they look like; text uses the first.
    top_k: largest number of candidates, for (semantic, pixel) codes; text uses the first.
    top_p: smallest set of candidates that holds this probability.
    guidance: s in s * (log p_cond - log p_uncond) + log p_uncond; 1 is off.
    """

    temperature: float | tuple[float, float] = 1.0
    top_k: tuple[int | None, int | None] = (None, None)
    top_p: float = 1.0
    guidance: float = 1.0

    def __post_init__(self) -> None:
        if min(self.temperatures) < 0 or not 0 < self.top_p <= 1 or self.guidance < 0:
            raise ValueError(
                "temperature >= 0, 0 < top_p <= 1 and guidance >= 0 expected, "
                f"got {self.temperature}, {self.top_p} and {self.guidance}"
            )
        if any(k is not None and k < 1 for k in self.top_k):
            raise ValueError(f"top_k of at least 1 or None expected, got {self.top_k}")

    @property
    def temperatures(self) -> tuple[float, float]:
        """Temperature of semantic and of pixel codes."""
        given = self.temperature
        return given if isinstance(given, tuple) else (given, given)

    @property
    def greedy(self) -> bool:
        """Whether nothing is left to chance."""
        return not any(self.temperatures)


GREEDY = Sampling(temperature=0.0)
GENERATION = Sampling(temperature=1.0, top_k=(2048, 6144), top_p=1.0, guidance=2.0)
EDITING = Sampling(temperature=0.7, top_k=(512, 1536), top_p=0.8, guidance=1.25)


def gumbel(seeds: Tensor, steps: Tensor, ids: Tensor) -> Tensor:
    """Return standard Gumbel noise [B, V] for seeds [B], steps [B] and token ids [V], int64."""
    key = _mix(seeds & _MASK)
    key = _mix(key ^ ((seeds >> 32) & _MASK))
    key = _mix(key ^ (steps & _MASK))
    bits = _mix(_mix(key[:, None] ^ ids) ^ key[:, None])
    uniform = ((bits >> 9).float() + 0.5) * 2.0**-23  # 23 bits: neither 0 nor 1
    return -torch.log(-torch.log(uniform))


def _mix(x: Tensor) -> Tensor:
    """Mix 32 bits (a bijection; multiply and xor-shift with well-tested constants)."""
    x = (x + 0x9E3779B9) & _MASK
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Return s * (log p_c - log p_u) + log p_u of two logit tensors [B, V] (before any masking)."""
    given = conditional.float().log_softmax(-1)
    free = unconditional.float().log_softmax(-1)
    return scale * (given - free) + free


def choose(
    logits: Tensor,
    ids: Tensor,
    sampling: Sampling,
    levels: Sequence[int | None],
    seeds: Tensor,
    steps: Tensor,
    noise: Tensor | None = None,
) -> Tensor:
    """Draw one id per row, as `sampling` says.

    logits: [B, V], -inf where not allowed; column j stands for token ids[j], ids [V] int64.
    levels: of each row's code (0 semantic or text, 1 pixel); None: any candidate. seeds, steps: [B]
    int64, see `gumbel`, whose result [B, V] `noise` is where it was computed ahead.
    Returns ids [B] int64.
    """
    logits = logits.float()
    if sampling.greedy:
        return ids[logits.argmax(-1)]
    size = logits.shape[1]
    top_k = [None if level is None else sampling.top_k[level] for level in levels]
    counts = [size if k is None else min(k, size) for k in top_k]
    heat = [sampling.temperatures[level or 0] for level in levels]
    if noise is None:
        noise = gumbel(seeds, steps, ids)
    if len(set(heat)) == 1 and heat[0] > 0:
        logits = logits / heat[0]
    else:
        warm = torch.tensor(heat, device=logits.device)[:, None]
        logits = logits / warm.where(warm > 0, 1)
        noise = noise * (warm > 0)  # without noise the likeliest is taken
    if min(counts) == size and sampling.top_p == 1:
        return ids[(logits + noise).argmax(-1)]
    num = max(counts)
    best, order = logits.topk(num, dim=-1)
    if min(counts) < num:
        rank = torch.arange(num, device=logits.device)
        limit = torch.tensor(counts, device=logits.device)
        best = best.masked_fill(rank >= limit[:, None], -torch.inf)
    if sampling.top_p < 1:
        probability = best.softmax(-1)
        before = probability.cumsum(-1) - probability
        best = best.masked_fill(before >= sampling.top_p, -torch.inf)
    winner = (best + noise.gather(1, order)).argmax(-1, keepdim=True)
    return ids[order.gather(1, winner)[:, 0]]
