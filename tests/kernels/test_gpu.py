"""Triton kernels on a GPU: accuracy, exactness, CUDA graphs, poisoned scratch memory."""

from __future__ import annotations

import pytest
import torch

from kernels import catalog, dispatch
from kernels.codebook_lookup.api import codebook_lookup
from kernels.kernel import Case, Kernel
from tests.kernels import budget

pytestmark = pytest.mark.gpu

PROOFS = [
    pytest.param(kernel, case, id=f"{kernel.name}-{case.name}")
    for kernel in catalog.kernels()
    for case in kernel.cases
    if not case.bench
]


@pytest.mark.parametrize(("kernel", "case"), PROOFS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_triton_stays_within_the_error_budget_on_the_gpu(
    kernel: Kernel, case: Case, dtype: torch.dtype
) -> None:
    poison = torch.full((64 << 20,), float("nan"), device="cuda")
    del poison  # later scratch memory starts as NaN
    budget.check(kernel, "triton", case, dtype, "cuda")


def test_lookup_of_many_tokens_equals_the_fp64_argmin_on_the_gpu() -> None:
    generator = torch.Generator().manual_seed(11)
    codes = torch.randn(98_304, 32, generator=generator).cuda()
    x = torch.randn(20_000, 32, generator=generator).cuda()
    index, distance = codebook_lookup(x, codes)
    with dispatch.force(codebook_lookup="reference"):
        truth, length = codebook_lookup(x[:2000], codes)
    assert torch.equal(index[:2000], truth)
    torch.testing.assert_close(distance[:2000], length)
    gathered = (x.double() - codes.double()[index]).square().sum(1)
    torch.testing.assert_close(distance.double(), gathered, rtol=1e-6, atol=0)
