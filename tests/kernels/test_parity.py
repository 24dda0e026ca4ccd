"""Every implementation of every operator in the catalog against fp64: outputs and gradients."""

from __future__ import annotations

import pytest
import torch

from kernels import catalog
from kernels.kernel import Case, Kernel
from tests.kernels import budget

PROOFS = [
    pytest.param(kernel, implementation.name, case, id=f"{implementation.name}-{case.name}")
    for kernel in catalog.kernels()
    for implementation in kernel.implementations
    if implementation.name not in ("reference", "triton")
    for case in kernel.cases
    if not case.bench
]


@pytest.mark.parametrize(("kernel", "name", "case"), PROOFS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_implementation_stays_within_the_error_budget(
    kernel: Kernel, name: str, case: Case, dtype: torch.dtype, native_library: None
) -> None:
    budget.check(kernel, name, case, dtype)


SMALL = [
    pytest.param(kernel, case, id=f"{kernel.name}-{case.name}")
    for kernel in catalog.kernels()
    for case in [c for c in kernel.cases if not c.bench][1:3]
]


@pytest.mark.parametrize(("kernel", "case"), SMALL)
def test_a_strided_view_gives_what_its_copy_gives(kernel: Kernel, case: Case) -> None:
    inputs = kernel.inputs(case, torch.float32, "cpu")
    strided = {
        name: torch.stack((value, value), -1)[..., 0]
        if isinstance(value, torch.Tensor) and value.dim() > 0
        else value
        for name, value in inputs.items()
    }
    plain, views = kernel.function(**inputs), kernel.function(**strided)
    for a, b in zip(
        plain if isinstance(plain, tuple) else (plain,),
        views if isinstance(views, tuple) else (views,),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("kernel", "case"), SMALL)
def test_the_same_call_gives_the_same_bits(kernel: Kernel, case: Case) -> None:
    inputs = kernel.inputs(case, torch.float32, "cpu")
    for name in [i.name for i in kernel.implementations if i.name != "triton"]:
        first, second = (budget.run(kernel, name, inputs) for _ in range(2))
        for a, b in zip(first[0] + first[1], second[0] + second[1], strict=True):
            assert torch.equal(a, b), name
