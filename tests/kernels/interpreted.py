"""Triton kernels in Triton's interpreter; `test_triton.py` runs this file in its own process."""

from __future__ import annotations

import pytest
import torch

from kernels import catalog
from kernels.device import interpreting
from kernels.kernel import Case, Kernel
from tests.kernels import budget

# The interpreter runs one program after the other in numpy: the smaller problems only.
LIMIT = {"codebook_lookup": 7, "gated_cross_attention": 4, "mask_attention": 10}

PROOFS = [
    pytest.param(kernel, case, id=f"{kernel.name}-{case.name}")
    for kernel in catalog.kernels()
    if any(implementation.name == "triton" for implementation in kernel.implementations)
    for case in [c for c in kernel.cases if not c.bench][: LIMIT.get(kernel.name)]
]


@pytest.mark.parametrize(("kernel", "case"), PROOFS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_triton_stays_within_the_error_budget(
    kernel: Kernel, case: Case, dtype: torch.dtype
) -> None:
    assert interpreting()
    budget.check(kernel, "triton", case, dtype)


def test_codebook_lookup_simvq_backward_equals_the_reference() -> None:
    from kernels import dispatch
    from kernels.codebook_lookup.api import simvq

    generator = torch.Generator().manual_seed(5)
    results = []
    for name in ("reference", "triton"):
        x = torch.randn(77, 8, generator=generator.manual_seed(5)).requires_grad_()
        weight = torch.randn(8, 8, generator=generator).requires_grad_()
        bias = torch.randn(8, generator=generator).requires_grad_()
        book = torch.randn(50, 8, generator=generator)
        with dispatch.force(codebook_lookup=name):
            quantised, _, loss = simvq(x, book, weight, bias, 0.3)
            total = (quantised * torch.arange(8.0)).sum() + 3.0 * loss
            results.append(torch.autograd.grad(total, [x, weight, bias]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


def test_mask_attention_sharp_rows_are_redone() -> None:
    kernel = catalog.kernel("mask_attention")
    case = next(c for c in kernel.cases if c.sizes["sharp"] > 1)
    budget.check(kernel, "triton", case, torch.float32)
