"""The error budget of an operator: how far an implementation may be from fp64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels import dispatch
from kernels.kernel import Case, Kernel

ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def error(got: Tensor, exact: Tensor) -> float:
    """Relative error in the Euclidean norm; absolute where the exact value (nearly) vanishes."""
    gap = (got.double() - exact.double()).norm()
    return float(gap / exact.double().norm().clamp(min=0.5))


def cast(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {
        name: value.detach().to(dtype)
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in inputs.items()
    }


def run(kernel: Kernel, name: str, inputs: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the outputs and the gradients of a fixed projection of the floating outputs."""
    leaves = {key: inputs[key].clone().requires_grad_() for key in kernel.differentiable}
    with dispatch.force(**{kernel.name: name}):
        produced = kernel.function(**{**inputs, **leaves})
        outputs = list(produced) if isinstance(produced, tuple) else [produced]
        generator = torch.Generator().manual_seed(7)
        loss = torch.zeros((), dtype=torch.float64, device=outputs[0].device)
        for output in outputs:
            if output.is_floating_point():
                weight = torch.randn(output.shape, generator=generator, dtype=torch.float64)
                loss = loss + (weight.to(output) * output).double().sum()
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    present = [g if g is not None else torch.zeros(()) for g in grads]
    return [o.detach() for o in outputs], present


def check(
    kernel: Kernel,
    name: str,
    case: Case,
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    apart: frozenset[str] = frozenset(),
) -> None:
    """Assert err(implementation) <= 2 (err(reference in the same dtype) + one rounding).

    apart: inputs whose gradients have a test of their own.
    """
    inputs = cast(kernel.inputs(case, dtype, device), dtype)
    exact, exact_grads = run(kernel, "reference", cast(inputs, torch.float64))
    plain, plain_grads = run(kernel, "reference", inputs)
    ours, our_grads = run(kernel, name, inputs)
    labels = [f"output {i}" for i in range(len(ours))]
    labels += [f"gradient of {key}" for key in kernel.differentiable]
    rows = zip(labels, exact + exact_grads, plain + plain_grads, ours + our_grads, strict=True)
    for label, truth, reference, got in rows:
        if label.removeprefix("gradient of ") in apart:
            continue
        if not got.is_floating_point():
            assert torch.equal(got, truth), f"{case.name}: {label} of {name} is not exact"
            continue
        allowed = 2.0 * (error(reference, truth) + ROUNDING[dtype] * SLACK)
        found = error(got, truth)
        assert found <= allowed, (
            f"{case.name}: {label} of {name} is off by {found:.1e}, allowed {allowed:.1e}"
        )


# One rounding of each of the few dozen products a result passes through.
SLACK = 8.0
