"""Dispatch: reasons, forcing, the catalog, and adding an operator."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from kernels import catalog, dispatch
from kernels.gated_cross_attention.cost import absorbed_flops, explicit_flops
from kernels.kernel import KernelUnsupported, Request
from kernels.mask_attention.api import KERNEL as MASK
from tests.kernels import budget


def request(**changes: object) -> Request:
    sizes = {
        "batch": 1, "heads": 10, "queries": 4096, "dim": 64, "masks": 1, "rows": 64, "columns": 64
    }  # fmt: skip
    sizes.update({k: v for k, v in changes.items() if k in sizes})  # type: ignore[misc]
    dtype = changes.get("dtype", torch.float32)
    return Request(device="cpu", dtype=dtype, sizes=tuple(sizes.items()))  # type: ignore[arg-type]


def test_the_cheapest_implementation_is_chosen() -> None:
    assert dispatch.choose(MASK, request()).name == "structured"
    assert dispatch.choose(MASK, request(queries=4, rows=4, columns=4)).name == "reference"


def test_the_environment_forces_an_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.ENVIRONMENT, "mask_attention=reference")
    assert dispatch.choose(MASK, request()).name == "reference"
    monkeypatch.setenv(dispatch.ENVIRONMENT, "structured")
    assert dispatch.choose(MASK, request()).name == "structured"
    monkeypatch.setenv(dispatch.ENVIRONMENT, "mask_attention=magic")
    with pytest.raises(KernelUnsupported, match="no implementation 'magic'"):
        dispatch.choose(MASK, request())


def test_a_forced_implementation_that_refuses_is_an_error_with_its_reason() -> None:
    with (
        dispatch.force(mask_attention="triton"),
        pytest.raises(KernelUnsupported, match=r"triton.*refuses.*cpu"),
    ):
        dispatch.choose(MASK, request())


def test_explanation_lists_every_candidate() -> None:
    lines = {c.name: str(c) for c in dispatch.explain(MASK, request(rows=200))}
    assert "refused" in lines["triton"] and "us estimated" in lines["structured"]


def test_nobody_willing_lists_all_reasons() -> None:
    import dataclasses

    alone = dataclasses.replace(
        MASK, implementations=tuple(i for i in MASK.implementations if i.name == "triton")
    )
    with pytest.raises(KernelUnsupported, match=r"no implementation takes(.|\n)*triton: "):
        dispatch.choose(alone, request())


@pytest.mark.parametrize(
    ("queries", "channels", "absorbed"),
    [(64, 192, True), (64, 384, True), (256, 192, True), (512, 192, False), (256, 384, False)],
)
def test_cost_model_crosses_where_the_derivation_says(
    queries: int, channels: int, absorbed: bool
) -> None:
    # absorbed wins on FLOPs when Q < d C / (C - d): 384 for C = 192, 192 for C = 384, d = 128
    sizes = {
        "batch": 1, "queries": queries, "tokens": 36864, "channels": channels, "dim": 2048,
        "heads": 16,
    }  # fmt: skip
    wanted = Request(device="cpu", dtype=torch.float32, sizes=tuple(sizes.items()))
    assert (absorbed_flops(wanted) < explicit_flops(wanted)) is absorbed


DUMMY = """
import torch
from kernels import dispatch
from kernels.kernel import Case, Implementation, Kernel, Request

def double(x):
    request = Request(device=x.device.type, dtype=x.dtype, sizes=(("n", x.numel()),))
    return dispatch.load(dispatch.choose(KERNEL, request).module).double(x)

KERNEL = Kernel(
    name="dummy",
    function=double,
    implementations=(
        Implementation(name="reference", module="kernels.dummy.reference", cost=lambda r: 2.0),
        Implementation(name="shifted", module="kernels.dummy.shifted", cost=lambda r: 1.0),
    ),
    inputs=lambda case, dtype, device: {"x": torch.arange(1.0, 1.0 + case.sizes["n"]).to(dtype)},
    differentiable=("x",),
    cases=(Case(name="seven", sizes={"n": 7}),),
)
"""


def test_a_folder_and_a_line_add_an_operator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "kernels" / "dummy"
    folder.mkdir(parents=True)
    (folder / "api.py").write_text(DUMMY)
    (folder / "reference.py").write_text("def double(x):\n    return x + x\n")
    (folder / "shifted.py").write_text("def double(x):\n    return 2 * x\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(catalog, "OPERATORS", [*catalog.OPERATORS, "kernels.dummy.api"])
    try:
        kernel = catalog.kernel("dummy")
        assert torch.equal(kernel.function(torch.ones(3)), torch.full((3,), 2.0))
        budget.check(kernel, "shifted", kernel.cases[0], torch.float32)
        (folder / "shifted.py").write_text("def double(x):\n    return 2 * x + 1\n")
        dispatch.load.cache_clear()
        for name in [n for n in sys.modules if n.startswith("kernels.dummy.")]:
            del sys.modules[name]
        with pytest.raises(AssertionError, match="output 0 of shifted is off by"):
            budget.check(catalog.kernel("dummy"), "shifted", kernel.cases[0], torch.float32)
    finally:
        for name in [n for n in sys.modules if n.startswith("kernels.dummy")]:
            del sys.modules[name]
        dispatch.load.cache_clear()


def test_importing_the_operators_imports_neither_triton_nor_a_peer() -> None:
    import subprocess

    code = (
        "import sys; from kernels import catalog; catalog.kernels();"
        "print([m for m in ('triton', 'faiss', 'sklearn', 'transformers') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
