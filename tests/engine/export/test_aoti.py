"""torch.export and AOTInductor: graphs keep the dims, packages run and take new weights."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from engine.export import aoti
from engine.export.aoti import Package, Replay, check_inputs, compile_part, trace
from engine.export.build import export_bundle
from engine.export.errors import BackendUnavailable, BundleError, ExportError
from engine.export.part import Dim, Part, tensor
from engine.export.parts import list_parts, llm_decode
from engine.export.untrained import Untrained
from engine.serve.backends.aoti_backend import place
from tests.engine.serve.small import small, small_config


class Square(nn.Module):
    """x W^T, squared where positive."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).relu().square()


def square() -> Part:
    torch.manual_seed(0)
    return Part(
        name="square",
        module=Square().requires_grad_(False),
        inputs=(tensor("x", "batch", 6),),
        outputs=(tensor("y", "batch", 4),),
        dims=(Dim(name="batch", min=1, opt=1, max=8),),
    )


class Branching(Square):
    def forward(self, x: Tensor) -> Tensor:
        return x if bool(x.sum() > 0) else -x


def test_a_traced_part_keeps_its_dims() -> None:
    part = square()
    program = trace(part)
    for batch in (1, 3, 8):
        (x,) = part.example_inputs({"batch": batch})
        torch.testing.assert_close(program.module()(x), part.module(x))


def test_a_decode_step_is_one_graph_that_writes_into_its_cache() -> None:
    part = llm_decode(small().model, in_place=True)
    program = trace(llm_decode(small().model))  # even where the part would return copies
    sizes = {"batch": 3, "slots": 9}
    expected, found = part.example_inputs(sizes), part.example_inputs(sizes)
    torch.testing.assert_close(
        program.module()(*found), part.module(*expected), rtol=1e-4, atol=1e-4
    )
    for first, second in zip(expected[2:], found[2:], strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)
    assert len(program.graph_signature.user_outputs) == 1  # the cache does not come back as copies


def test_our_operators_stay_single_nodes() -> None:
    parts = {part.name: part for part in list_parts(small().model)}
    for name, operator in (("adapter", "gated_cross_attention"), ("tokenize", "codebook_lookup")):
        graph = trace(parts[name]).graph
        calls = [node for node in graph.nodes if f"focus.{operator}" in str(node.target)]
        assert calls, name


def test_lower_precision_leaves_the_model_as_it_is() -> None:
    part = square()
    program = trace(part, dtype=torch.bfloat16)
    assert part.module.linear.weight.dtype == torch.float32
    (x,) = part.example_inputs({"batch": 2}, torch.bfloat16)
    assert program.module()(x).dtype == torch.bfloat16


def test_what_does_not_trace_is_named() -> None:
    part = square()
    broken = Part(
        name="branching",
        module=Branching(),
        inputs=part.inputs,
        outputs=part.outputs,
        dims=part.dims,
    )
    with pytest.raises(ExportError, match=r"branching: torch\.export could not trace it"):
        trace(broken)


def test_inputs_outside_the_profile_are_refused() -> None:
    part = square()
    with pytest.raises(ExportError, match=r"\['x'\] expected, x is missing"):
        check_inputs(part, {})
    with pytest.raises(ExportError, match="batch of 1 to 8 expected, got 9"):
        check_inputs(part, {"x": torch.zeros(9, 6)})
    with pytest.raises(ExportError, match=r"x of shape \('batch', 6\) expected, got \(2, 5\)"):
        check_inputs(part, {"x": torch.zeros(2, 5)})


def test_a_missing_library_or_file_is_said(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(BundleError, match="there is no such file"):
        Package(tmp_path / "square.pt2", square())
    (tmp_path / "square.pt2").write_bytes(b"not a package")
    with pytest.raises(BundleError, match="an AOTInductor package for cpu"):
        Package(tmp_path / "square.pt2", square())
    if not torch.cuda.is_available():
        with pytest.raises(BackendUnavailable, match="no GPU was found"):
            compile_part(square(), tmp_path / "x.pt2", device="cuda")
    monkeypatch.setattr(aoti.shutil, "which", lambda name: None)
    with pytest.raises(BackendUnavailable, match=r"no C\+\+ compiler was found"):
        compile_part(square(), tmp_path / "x.pt2")
    assert not (tmp_path / "x.pt2").exists()


def test_a_replay_reads_and_writes_the_callers_buffers(monkeypatch) -> None:
    """Two parts chained through one buffer; capture is replaced by a plain call."""

    def capture(function):
        output = function()

        def replay() -> None:
            for name, value in function().items():
                output[name].copy_(value)

        return output, replay

    monkeypatch.setattr("engine.serve.graph.capture", capture)
    part, buffer = square(), torch.zeros(2, 6)
    first = Replay(part.run, {"x": buffer})
    second = Replay(lambda inputs: {"z": inputs["y"] + 1}, {"y": first.outputs["y"]})
    for seed in range(2):
        x = torch.randn(2, 6, generator=torch.Generator().manual_seed(seed))
        buffer.copy_(x)
        first()
        torch.testing.assert_close(second()["z"], part.module(x) + 1)


@pytest.mark.slow
def test_a_package_runs_and_takes_new_weights(tmp_path: Path) -> None:
    part = square()
    path = compile_part(part, tmp_path / "deep" / "square.pt2")
    assert [entry.name for entry in path.parent.iterdir()] == ["square.pt2"]
    package = Package(path, part)
    for batch in (1, 5):
        (x,) = part.example_inputs({"batch": batch})
        torch.testing.assert_close(package.run({"x": x})["y"], part.module(x))
    assert sorted(package.constants) == ["linear.bias", "linear.weight"]
    part.module.linear.weight.mul_(-2)
    package.update(part.module.state_dict())
    torch.testing.assert_close(package.run({"x": x})["y"], part.module(x))
    with pytest.raises(ExportError, match="weights for 2 constants expected, 1 are missing"):
        package.update({"linear.bias": part.module.linear.bias})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["codes_condition", "llm_decode"])
def test_a_bundle_of_packages_verifies(name: str, tmp_path: Path) -> None:
    """A gather with a resize, and the decode step with its caches, compiled and compared."""
    bundle = export_bundle(
        Untrained(small_config()), tmp_path / "b", only=[name], backends=["aoti"]
    )
    from engine.export.verify import verify

    checks = verify(bundle, backends=["aoti"])
    assert len(checks) == 3
    assert all(check.passed for check in checks), checks
    assert (bundle / f"{name}.pt2").is_file()


def test_what_lies_in_place_is_not_copied() -> None:
    cache = torch.zeros(2, 3)
    assert place(cache, cache.view(2, 3)).data_ptr() == cache.data_ptr()
    target = torch.ones(2, 3)
    assert place(cache, target) is target
    assert not target.any()
    assert place(cache, None) is cache
