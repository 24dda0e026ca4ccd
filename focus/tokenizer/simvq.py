"""SimVQ: a frozen Gaussian codebook seen through one learned linear map."""

# N vectors, K codes, d code width

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from focus.config import SimVQConfig
from focus.errors import ShapeError
from kernels.codebook_lookup.api import codebook_lookup, simvq


class Quantized(NamedTuple):
    """A quantised batch of vectors."""

    codes: Tensor  # [..., d] fp32; the gradient passes straight through to the input
    index: Tensor  # type: ignore[assignment]  # [...] int64; hides tuple.index
    loss: Tensor  # scalar fp32


class SimVQ(nn.Module):
    """Nearest code of C = C_0 W^T (+ b), with C_0 ~ N(0, 1/d) fixed and W learned.

    loss = mean((c - sg x)^2) + beta * mean((x - sg c)^2); codes = x + sg(c - x). The search and the
    loss run in fp32 whatever the input and autocast say. Source: SimVQ, arXiv 2411.02038.
    """

    codebook: Tensor

    def __init__(self, config: SimVQConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer(
            "codebook", torch.randn(config.num_codes, config.dim) * config.dim**-0.5
        )
        self.project = nn.Linear(config.dim, config.dim, bias=config.bias)

    def forward(self, x: Tensor) -> Quantized:
        """x [..., d] -> `Quantized`. Raises ShapeError when the last axis is not d."""
        self._check(x)
        with torch.autocast(x.device.type, enabled=False):
            codes, index, loss = simvq(
                x.float(),
                self.codebook.float(),
                self.project.weight.float(),
                None if self.project.bias is None else self.project.bias.float(),
                self.config.beta,
            )
        return Quantized(codes, index, loss)

    @torch.no_grad()
    def nearest(self, x: Tensor) -> Tensor:
        """x [..., d] -> index [...] of the nearest code, without gradient or loss."""
        self._check(x)
        index, _ = codebook_lookup(x.float().reshape(-1, self.config.dim), self.table())
        return index.view(x.shape[:-1])

    def lookup(self, index: Tensor) -> Tensor:
        """index [...] -> codes [..., d] in fp32; only W (and b) get a gradient."""
        return self._map(F.embedding(index, self.codebook))

    def table(self) -> Tensor:
        """Return every effective code, [K, d] in fp32."""
        return self._map(self.codebook)

    def _map(self, rows: Tensor) -> Tensor:
        with torch.autocast(rows.device.type, enabled=False):
            bias = self.project.bias
            return F.linear(
                rows.float(),
                self.project.weight.float(),
                None if bias is None else bias.float(),
            )

    def _check(self, x: Tensor) -> None:
        if x.shape[-1] != self.config.dim:
            raise ShapeError(
                f"vectors of width {self.config.dim} expected in the last axis, got "
                f"{tuple(x.shape)}; maps must be moved to channels-last first"
            )


class CodeUsage:
    """Counts how often each code was picked, over as many batches as it is shown."""

    def __init__(self, num_codes: int) -> None:
        self.counts = torch.zeros(num_codes, dtype=torch.int64)

    def update(self, index: Tensor) -> None:
        """Add the picks of one batch; index of any shape."""
        picks = torch.bincount(index.reshape(-1).cpu(), minlength=self.counts.shape[0])
        self.counts += picks

    def fraction(self) -> float:
        """Share of the codes that were picked at least once."""
        return float((self.counts > 0).double().mean())

    def perplexity(self) -> float:
        """exp of the entropy of the picks: how many codes the batches use as if evenly."""
        share = self.counts.double() / self.counts.sum().clamp(min=1)
        return float(torch.exp(-(share * share.clamp(min=1e-300).log()).sum()))
