"""The operators as PyTorch sees them: opcheck, gradcheck, compile, export, autocast, checkpoint."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels import catalog
from kernels.codebook_lookup.api import codebook_lookup, simvq
from kernels.gated_cross_attention.api import gated_cross_attention, gated_ffn
from kernels.kernel import Case, Kernel, ShapeError
from kernels.mask_attention.api import mask_attention

GATED = Case(
    name="tiny",
    sizes={"batch": 1, "queries": 2, "tokens": 5, "channels": 3, "dim": 4, "heads": 2},
)
MASKED = Case(
    name="tiny",
    sizes={
        "batch": 1,
        "heads": 1,
        "grid": (2, 2),
        "dim": 4,
        "masks": 2,
        "rows": 3,
        "columns": 2,
        "kind": "soft",
        "position": "rope",
        "sharp": 1.0,
    },
)
LOOKUP = Case(name="tiny", sizes={"tokens": 5, "codes": 7, "dim": 3})
TINY = {"codebook_lookup": LOOKUP, "gated_cross_attention": GATED, "mask_attention": MASKED}


def tiny(name: str, dtype: torch.dtype = torch.float64) -> tuple[Kernel, dict[str, Any]]:
    kernel = catalog.kernel(name)
    return kernel, kernel.inputs(TINY[name], dtype, "cpu")


def leaves(kernel: Kernel, inputs: dict[str, Any]) -> list[Tensor]:
    return [inputs[name].clone().requires_grad_() for name in kernel.differentiable]


def only_floating(outputs: Any) -> Any:
    return outputs[1] if isinstance(outputs, tuple) else outputs


@pytest.mark.parametrize("implementation", ["reference", "explicit", "absorbed"])
@pytest.mark.parametrize("training", [True, False])
def test_gated_cross_attention_passes_gradcheck(implementation: str, training: bool) -> None:
    from kernels import dispatch

    kernel, inputs = tiny("gated_cross_attention")
    args = leaves(kernel, inputs)

    def function(*tensors: Tensor) -> Tensor:
        if training:
            return gated_cross_attention(*tensors, inputs["num_heads"])
        return torch.ops.focus.gated_cross_attention(*tensors, inputs["num_heads"], None)

    with dispatch.force(gated_cross_attention=implementation):
        assert torch.autograd.gradcheck(function, args, fast_mode=True)


@pytest.mark.parametrize("implementation", ["reference", "structured"])
@pytest.mark.parametrize("position", ["rope", "none"])
def test_mask_attention_passes_gradcheck(implementation: str, position: str) -> None:
    from kernels import dispatch

    kernel, inputs = tiny("mask_attention")
    inputs["position"] = position
    rest = {k: v for k, v in inputs.items() if k not in kernel.differentiable}
    with dispatch.force(mask_attention=implementation):
        assert torch.autograd.gradcheck(
            lambda *tensors: mask_attention(*tensors, **rest), leaves(kernel, inputs),
            fast_mode=True,
        )  # fmt: skip


@pytest.mark.parametrize("with_bias", [True, False])
def test_simvq_gradients_equal_the_written_out_loss(with_bias: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(7, 3, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    codebook = torch.randn(20, 8, generator=generator, dtype=torch.float64)
    weight = torch.randn(8, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(8, generator=generator, dtype=torch.float64, requires_grad=True)
    shift = bias if with_bias else None
    outer = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    inputs = [x, weight] + ([bias] if with_bias else [])
    quantised, index, loss = simvq(x, codebook, weight, shift, 0.3)
    ours = torch.autograd.grad((quantised * outer).sum() + 2 * loss, inputs)
    codes = codebook @ weight.T + (bias if with_bias else 0.0)
    nearest = torch.cdist(x.flatten(0, 1), codes).argmin(-1).reshape(7, 3)
    q = codes[nearest]
    expected = (q - x.detach()).square().mean() + 0.3 * (x - q.detach()).square().mean()
    straight = x + (q - x).detach()
    theirs = torch.autograd.grad((straight * outer).sum() + 2 * expected, inputs)
    assert torch.equal(index, nearest)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(quantised, straight)
    torch.testing.assert_close(ours, theirs)


def operator_calls() -> list[Any]:
    calls = []
    for name in TINY:
        kernel, inputs = tiny(name, torch.float32)
        args: list[Any] = leaves(kernel, inputs)
        if name == "mask_attention":
            args += [list(inputs["query_grid"]), list(inputs["extent"]), True, 1e4]
        elif name == "gated_cross_attention":
            args += [inputs["num_heads"], None]
            calls.append(
                pytest.param(f"{name}_training", [*args, "absorbed"], id=f"{name}_training")
            )
        calls.append(pytest.param(name, args, id=name))
    x = torch.randn(5, 4, requires_grad=True)
    weight = torch.eye(4).requires_grad_()
    calls.append(
        pytest.param("simvq", [x, torch.randn(6, 4), weight, torch.zeros(4), 0.25], id="simvq")
    )
    return calls


@pytest.mark.parametrize(("name", "args"), operator_calls())
def test_operator_passes_opcheck(name: str, args: list[Any]) -> None:
    operator = getattr(torch.ops.focus, name).default
    results = torch.library.opcheck(operator, tuple(args))
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", TINY)
def test_compiled_operator_equals_eager_forward_and_backward(name: str) -> None:
    kernel, inputs = tiny(name, torch.float32)

    def function(*tensors: Tensor) -> Tensor:
        named = dict(zip(kernel.differentiable, tensors, strict=True))
        return only_floating(kernel.function(**{**inputs, **named})) * 2.0

    args = leaves(kernel, inputs)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    eager, fast = function(*args), compiled(*args)
    torch.testing.assert_close(eager, fast)
    for a, b in zip(
        torch.autograd.grad(eager.sum(), args), torch.autograd.grad(fast.sum(), args), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", TINY)
def test_exported_graph_holds_one_node_of_the_operator(name: str) -> None:
    kernel, inputs = tiny(name, torch.float32)
    tensors = tuple(inputs[key] for key in kernel.differentiable)

    class Module(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Any:
            named = dict(zip(kernel.differentiable, tensors, strict=True))
            return kernel.function(**{**inputs, **named})

    program = torch.export.export(Module(), tensors)
    nodes = [n for n in program.graph.nodes if f"focus.{name}" in str(n.target)]
    assert len(nodes) == 1 and str(nodes[0].target) == f"focus.{name}.default"
    torch.testing.assert_close(program.module()(*tensors), Module()(*tensors))


@pytest.mark.parametrize("name", TINY)
def test_checkpointed_operator_has_the_same_gradients(name: str) -> None:
    kernel, inputs = tiny(name, torch.float32)
    args = leaves(kernel, inputs)

    def function(*tensors: Tensor) -> Tensor:
        named = dict(zip(kernel.differentiable, tensors, strict=True))
        return only_floating(kernel.function(**{**inputs, **named}))

    plain = torch.autograd.grad(function(*args).sum(), args)
    redone = torch.autograd.grad(checkpoint(function, *args, use_reentrant=False).sum(), args)
    torch.testing.assert_close(plain, redone)


def test_autocast_runs_products_low_and_keeps_the_residual_dtype() -> None:
    kernel, inputs = tiny("gated_cross_attention", torch.float32)
    args = leaves(kernel, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        out = gated_cross_attention(*args, inputs["num_heads"])
    assert out.dtype is torch.float32
    exact = gated_cross_attention(*args, inputs["num_heads"])
    assert 0 < (out - exact).abs().max() < 0.1
    grads = torch.autograd.grad(out.sum(), args)
    assert all(g.dtype is torch.float32 and g.isfinite().all() for g in grads)


def test_autocast_leaves_simvq_in_fp32() -> None:
    x, codebook, weight = torch.randn(9, 8), torch.randn(30, 8), torch.randn(8, 8)
    plain = simvq(x, codebook, weight, None, 0.25)
    with torch.autocast("cpu", torch.bfloat16):
        cast = simvq(x, codebook, weight, None, 0.25)
    torch.testing.assert_close(plain, cast, rtol=0, atol=0)


def test_empty_batches_pass_through() -> None:
    assert codebook_lookup(torch.zeros(0, 4), torch.zeros(3, 4))[0].shape == (0,)
    quantised, index, loss = simvq(torch.zeros(0, 4), torch.ones(3, 4), torch.eye(4))
    assert quantised.shape == (0, 4) and index.shape == (0,) and loss == 0.0
    _, inputs = tiny("mask_attention", torch.float32)
    empty = {k: v[:0] if k in ("query", "mask") else v for k, v in inputs.items()}
    assert mask_attention(**empty).shape == (0, *inputs["query"].shape[1:])
    _, inputs = tiny("gated_cross_attention", torch.float32)
    none = {k: v[:0] if k in ("query", "residual", "features") else v for k, v in inputs.items()}
    assert gated_cross_attention(**none).shape == (0, *inputs["query"].shape[1:])
    weights = [inputs[k].requires_grad_() for k in ("w_q", "w_o")]
    nothing = {**inputs, "features": inputs["features"][:, :0]}
    out = gated_cross_attention(**nothing)
    assert torch.equal(out, inputs["residual"])
    grads = torch.autograd.grad(out.sum(), weights, allow_unused=True)
    assert all(g is None or bool(g.eq(0).all()) for g in grads)


def test_gated_ffn_equals_its_formula() -> None:
    h, normed = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    w1, b1, w2, b2 = torch.randn(8, 4), torch.randn(8), torch.randn(4, 8), torch.randn(4)
    gate = torch.tensor(0.7)
    inner = torch.nn.functional.gelu(normed @ w1.T + b1) @ w2.T + b2
    torch.testing.assert_close(
        gated_ffn(h, normed, w1, b1, w2, b2, gate), h + torch.tanh(gate) * inner
    )


def test_gate_at_zero_returns_the_residual_and_moves_only_the_gate() -> None:
    kernel, inputs = tiny("gated_cross_attention", torch.float32)
    inputs["gate"] = torch.zeros(())
    args = leaves(kernel, inputs)
    out = gated_cross_attention(*args, inputs["num_heads"])
    assert torch.equal(out, inputs["residual"])
    grads = dict(zip(kernel.differentiable, torch.autograd.grad(out.sum(), args), strict=True))
    assert grads["gate"].abs() > 0
    assert all(grads[n].eq(0).all() for n in ("query", "features", "w_q", "w_v", "w_o"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 3}, "cannot be split into 3 heads"),
        ({"gate": torch.zeros(2)}, "gate must be one number"),
        ({"padding_mask": torch.zeros(1, 4, dtype=torch.bool)}, "padding_mask must be bool"),
        ({"w_k": torch.zeros(4, 3)}, "shapes"),
    ],
)
def test_gated_cross_attention_names_the_contradiction(
    change: dict[str, Any], message: str
) -> None:
    _, inputs = tiny("gated_cross_attention", torch.float32)
    with pytest.raises(ShapeError, match=message):
        gated_cross_attention(**{**inputs, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query_grid": (3, 2)}, "holds 6 cells, but there are 4 queries"),
        ({"position": "sine"}, "position must be"),
        ({"mask": torch.zeros(2, 2, 3, 2)}, "expand the mask"),
        ({"key_vectors": torch.zeros(1, 1, 4)}, "key and value vectors"),
    ],
)
def test_mask_attention_names_the_contradiction(change: dict[str, Any], message: str) -> None:
    _, inputs = tiny("mask_attention", torch.float32)
    with pytest.raises(ShapeError, match=message):
        mask_attention(**{**inputs, **change})
