"""Exact nearest code by a fp64 screen over chunks and the direct distance of what survives.

Axes: N tokens, K codes, d code width.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 21  # scores of one chunk: 16 MB in fp64
PAIR_ELEMENTS = 1 << 22  # gathered values of one rescoring step


def nearest(x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Return (argmin_k |x_n - c_k|^2, the minimum), computed in fp64, lowest index on ties.

    A token that is not finite, or any token when a code is not finite, gives (-1, NaN).
    """
    num_tokens, num_codes = x.shape[0], codes.shape[0]
    index = torch.empty(num_tokens, dtype=torch.int64, device=x.device)
    distance = torch.empty(num_tokens, dtype=torch.float64, device=x.device)
    exact = codes.detach().to(torch.float64)
    centre = exact.mean(0)  # distances do not change, the rounding bound shrinks
    centred = exact - centre
    norm = centred.square().sum(1)
    rows = max(1, CHUNK_ELEMENTS // num_codes)
    for start in range(0, num_tokens, rows):
        part = slice(start, start + rows)
        chunk = x[part].detach().to(torch.float64)
        survives = _screen(chunk - centre, centred, norm)
        index[part], distance[part] = _rescore(chunk, exact, survives)
    bad = ~torch.isfinite(x).all(-1) | ~torch.isfinite(codes).all()
    index.masked_fill_(bad, -1)
    distance.masked_fill_(bad, float("nan"))
    return index, distance.to(torch.float32)


def _screen(x: Tensor, codes: Tensor, norm: Tensor) -> Tensor:
    """Return [n, K] booleans: codes whose |c|^2 - 2 x.c may be the least, rounding considered."""
    score = torch.addmm(norm, x, codes.T, alpha=-2.0)
    unit = torch.finfo(torch.float64).eps * (x.shape[1] + 4)
    reach = x.square().sum(1, keepdim=True).sqrt() + norm.max().sqrt()
    return score <= score.amin(1, keepdim=True) + 4.0 * unit * reach.square()


def _rescore(x: Tensor, codes: Tensor, survives: Tensor) -> tuple[Tensor, Tensor]:
    """Return the least direct distance of each token's survivors, and its lowest index."""
    num_tokens, num_codes = survives.shape
    token, code = survives.nonzero(as_tuple=True)
    distance = torch.empty_like(token, dtype=torch.float64)
    step = max(1, PAIR_ELEMENTS // x.shape[1])
    for start in range(0, token.shape[0], step):
        pair = slice(start, start + step)
        distance[pair] = (x[token[pair]] - codes[code[pair]]).square().sum(1)
    best = torch.full((num_tokens,), float("inf"), dtype=torch.float64, device=x.device)
    best.scatter_reduce_(0, token, distance, "amin")
    winner = torch.where(distance == best[token], code, num_codes)
    index = torch.full((num_tokens,), num_codes, dtype=torch.int64, device=x.device)
    index.scatter_reduce_(0, token, winner, "amin")
    return index.clamp_(max=num_codes - 1), best
