"""Nearest code written out: a fp64 screen over chunks, then the direct distance of what survives.

Axes: N tokens, K codes, d code width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_ELEMENTS = 1 << 21  # scores of one chunk: 16 MB in fp64
PAIR_ELEMENTS = 1 << 22  # gathered values of one rescoring step


def codebook_lookup(x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
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


def project(codebook: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the effective codes of SimVQ: codebook W^T + b, [K, d]."""
    return F.linear(codebook, weight, bias)


def gather(codes: Tensor, index: Tensor) -> Tensor:
    """Return codes[index]; the rows of index -1 (no finite nearest code) become NaN."""
    rows = F.embedding(index.clamp(min=0), codes)
    return rows.masked_fill((index < 0).unsqueeze(-1), float("nan"))


def commit(x: Tensor, nearest: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Return (straight-through codes, loss) of tokens and their nearest codes, both [N, d].

    loss = mean((q - sg x)^2) + beta * mean((x - sg q)^2); 0 for no tokens.
    """
    if x.numel() == 0:
        return nearest.clone(), x.new_zeros(())
    return x + (nearest - x), (1.0 + beta) * F.mse_loss(nearest, x)


def commit_backward(
    x: Tensor,
    nearest: Tensor,
    rows: Tensor,
    grad_quantised: Tensor,
    grad_loss: Tensor,
    beta: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x [N, d], weight [d, d] and bias [d]; `rows` = codebook[index].

    gx = g + (2 beta l / Nd)(x - q);  r = (2 l / Nd)(q - x);  gW = r^T rows;  gb = sum r.
    """
    scale = 2.0 * grad_loss / max(1, x.numel())
    residual = (nearest - x) * scale
    return grad_quantised - beta * residual, residual.T @ rows, residual.sum(0)
