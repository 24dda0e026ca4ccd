"""Codebook lookup and SimVQ written out.

Axes: N tokens, K codes, d code width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kernels.codebook_lookup.exact import nearest


def codebook_lookup(x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Return (argmin_k |x_n - c_k|^2, the minimum); see `exact.nearest`."""
    return nearest(x, codes)


def project(codebook: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the effective codes of SimVQ: codebook W^T + b, [K, d]."""
    return F.linear(codebook, weight, bias)


def gather(codes: Tensor, index: Tensor) -> Tensor:
    """Return codes[index]; the rows of index -1 (no finite nearest code) become NaN."""
    rows = F.embedding(index.clamp(min=0), codes)
    return rows.masked_fill((index < 0).unsqueeze(-1), float("nan"))


def commit(x: Tensor, code: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Return (straight-through codes, loss) of tokens and their nearest codes, both [N, d].

    loss = mean((q - sg x)^2) + beta * mean((x - sg q)^2); 0 for no tokens.
    """
    if x.numel() == 0:
        return code.clone(), x.new_zeros(())
    return x + (code - x), (1.0 + beta) * F.mse_loss(code, x)


def commit_backward(
    x: Tensor,
    code: Tensor,
    rows: Tensor,
    grad_quantised: Tensor,
    grad_loss: Tensor,
    beta: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x [N, d], weight [d, d] and bias [d]; `rows` = codebook[index].

    gx = g + (2 beta l / Nd)(x - q);  r = (2 l / Nd)(q - x);  gW = r^T rows;  gb = sum r.
    """
    scale = 2.0 * grad_loss / max(1, x.numel())
    residual = (code - x) * scale
    return grad_quantised - beta * residual, residual.T @ rows, residual.sum(0)
