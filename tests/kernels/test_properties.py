"""Random problems, values that are not finite, gradients against autograd, mixed precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import catalog, dispatch
from kernels.codebook_lookup.api import codebook_lookup
from kernels.gated_cross_attention.api import gated_cross_attention
from kernels.kernel import Case
from kernels.mask_attention.api import mask_attention
from tests.kernels import budget

MASK = catalog.kernel("mask_attention")
GATED = catalog.kernel("gated_cross_attention")
# Where there is one token, the exact gradients of these are zero.
CANCELLING = frozenset({"query", "w_q", "w_k"})
FEW = settings(max_examples=12, deadline=None, derandomize=True)
sides = st.sampled_from([1, 2, 5, 8, 13])


@FEW
@given(
    seed=st.integers(1, 200),
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    grid=st.tuples(sides, sides),
    dim=st.sampled_from([4, 8, 20]),
    masks=st.integers(1, 3),
    rows=sides,
    columns=sides,
    kind=st.sampled_from(["hard", "soft", "grey", "empty", "full"]),
    position=st.sampled_from(["rope", "none"]),
)
def test_structured_mask_attention_stays_within_budget_on_random_problems(
    seed: int, **sizes: Any
) -> None:
    case = Case(name="." * seed, sizes={**sizes, "sharp": 1.0})  # the length seeds the values
    budget.check(MASK, "structured", case, torch.float32)


@FEW
@given(
    seed=st.integers(1, 200),
    batch=st.integers(1, 3),
    queries=st.sampled_from([1, 3, 8]),
    tokens=st.sampled_from([1, 2, 63, 100]),
    channels=st.sampled_from([1, 4, 31]),
    heads=st.sampled_from([1, 2, 4]),
    head=st.sampled_from([1, 4, 6]),
    padding=st.booleans(),
    name=st.sampled_from(["absorbed", "explicit"]),
)
def test_gated_cross_attention_stays_within_budget_on_random_problems(
    seed: int, heads: int, head: int, name: str, **sizes: Any
) -> None:
    case = Case(name="." * seed, sizes={**sizes, "heads": heads, "dim": heads * head})
    apart = CANCELLING if sizes["tokens"] == 1 else frozenset()
    budget.check(GATED, name, case, torch.float32, apart=apart)


@pytest.mark.parametrize("name", ["absorbed", "explicit"])
def test_one_token_leaves_nothing_to_choose(name: str) -> None:
    """Its gradients of queries and keys are differences that cancel: zero but for rounding."""
    for seed in range(1, 41):
        sizes = {"batch": 1, "queries": 8, "tokens": 1, "channels": 31, "heads": 1, "dim": 1}
        inputs = GATED.inputs(Case(name="." * seed, sizes=sizes), torch.float32, "cpu")
        _, grads = budget.run(GATED, name, inputs)
        for key, grad in zip(GATED.differentiable, grads, strict=True):
            if key in CANCELLING:
                assert float(grad.norm()) < 5e-6


@pytest.mark.parametrize("name", ["reference", "native"])
def test_gradient_of_the_distance_is_that_of_the_formula(native_library: None, name: str) -> None:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(30, 8, generator=generator).requires_grad_()
    codes = torch.randn(50, 8, generator=generator).requires_grad_()
    weight = torch.randn(30, generator=generator)
    with dispatch.force(codebook_lookup=name):
        index, distance = codebook_lookup(x, codes)
    ours = torch.autograd.grad((weight * distance).sum(), [x, codes])
    written = (weight * (x - codes[index]).square().sum(1)).sum()
    torch.testing.assert_close(ours, torch.autograd.grad(written, [x, codes]))


def gated_inputs() -> dict[str, Any]:
    sizes = {"batch": 2, "queries": 3, "tokens": 70, "channels": 8, "dim": 16, "heads": 2}
    return GATED.inputs(Case(name="finite", sizes=sizes), torch.float32, "cpu")


@pytest.mark.parametrize("name", ["reference", "explicit", "absorbed"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_feature_that_is_not_finite_reaches_its_row_of_the_batch_and_no_other(
    name: str, value: float
) -> None:
    inputs = gated_inputs()
    inputs["features"][1, 5, 2] = value
    with dispatch.force(gated_cross_attention=name):
        out = gated_cross_attention(**inputs)
    assert not out[1].isfinite().any() and out[0].isfinite().all()


@pytest.mark.parametrize("name", ["reference", "explicit", "absorbed"])
def test_a_query_that_is_not_finite_stays_in_its_row(name: str) -> None:
    inputs = gated_inputs()
    inputs["query"][0, 1, 0] = float("nan")
    with dispatch.force(gated_cross_attention=name):
        out = gated_cross_attention(**inputs)
    assert out[0, 1].isnan().all()
    assert out[0, [0, 2]].isfinite().all() and out[1].isfinite().all()


@pytest.mark.parametrize("name", ["reference", "structured"])
def test_a_mask_that_is_not_finite_reaches_its_row_of_the_batch_and_no_other(name: str) -> None:
    sizes = dict(next(c for c in MASK.cases if not c.bench and c.sizes["batch"] == 2).sizes)
    inputs = MASK.inputs(Case(name="finite", sizes=sizes), torch.float32, "cpu")
    inputs["mask"][1, 0, 2, 3] = float("nan")
    with dispatch.force(mask_attention=name):
        out = mask_attention(**inputs)
    assert out[1].isnan().all() and out[0].isfinite().all()


def test_autocast_gives_mask_attention_its_dtype_and_exact_tables() -> None:
    case = next(c for c in MASK.cases if not c.bench and c.sizes["kind"] == "soft")
    inputs = MASK.inputs(case, torch.float32, "cpu")
    leaves: dict[str, Tensor] = {n: inputs[n].requires_grad_() for n in MASK.differentiable}
    exact = mask_attention(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        out = mask_attention(**inputs)
    assert out.dtype is torch.bfloat16
    assert 0.0 < budget.error(out, exact) < 2.0**-6
    grads = torch.autograd.grad(out.float().sum(), list(leaves.values()))
    assert all(g.dtype is torch.float32 and bool(g.isfinite().all()) for g in grads)


@pytest.mark.parametrize("kernel", catalog.kernels(), ids=lambda kernel: kernel.name)
def test_a_strided_view_gives_the_gradients_of_its_copy(kernel: Any) -> None:
    case = next(c for c in kernel.cases[1:] if not c.bench)
    inputs = kernel.inputs(case, torch.float32, "cpu")
    found = []
    for strided in (False, True):
        leaves = {}
        for name in kernel.differentiable:
            value = inputs[name].clone()
            if strided and value.dim() > 1:  # a transposed buffer, the last axis is not dense
                value = value.transpose(0, -1).contiguous().transpose(0, -1)
            leaves[name] = value.requires_grad_()
        out = kernel.function(**{**inputs, **leaves})
        out = out[1] if isinstance(out, tuple) else out
        found.append(torch.autograd.grad(out.square().sum(), list(leaves.values())))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
