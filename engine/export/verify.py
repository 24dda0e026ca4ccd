"""Proof that a bundle gives what its model gives: files, graphs, shapes, operators, numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from torch import Tensor

from engine.export.bundle import Bundle, BundlePart
from engine.export.errors import BundleError, ExportError
from engine.export.graph_check import check_external_data, check_nodes
from engine.export.mapped import map_model
from engine.export.onnx import in_precision
from engine.export.part import Part
from engine.export.parts import list_parts

TRIALS = 12  # of moved inputs, for a part that misses its limit
JUMP = 30.0  # times as far as its inputs: a decision, no slope
LIMITS = {"fp32": 1e-5, "fp16": 4e-3, "bf16": 4e-2}  # largest error over the largest value
CHEAP = {"length": 24, "slots": 64, "candidates": 4}  # sizes that prove as much as the optimum
Run = Callable[[str, Mapping[str, Tensor]], Mapping[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One part on one backend at one set of sizes; `error` is relative to the largest value.

    moved: how far the model's own answer moves when its inputs move by the precision's limit
    (`sensitivity`), measured where `error` exceeds that limit, else None; a jump raises the limit.
    """

    part: str
    backend: str
    sizes: Mapping[str, int]
    output: str
    error: float
    limit: float
    moved: float | None = None

    @property
    def passed(self) -> bool:
        """Whether the error is within the limit (a NaN is not)."""
        return self.error <= self.limit


def verify(
    folder: str | Path,
    *,
    backends: Sequence[str] | None = None,
    only: Sequence[str] | None = None,
    say: Callable[[Check], None] = lambda check: None,
) -> list[Check]:
    """Check a bundle whole: hashes, ONNX checker, dims, operators, and parity at three sizes.

    Every part of every backend that the bundle holds runs on the same inputs as the eager model
    over the bundle's mapped weights; memory is that of the largest part. backends: which of them
    (default: those of the manifest that can run here).

    Raises:
        BundleError, ExportError: files or graphs that are not what the manifest says.
        BackendUnavailable: a backend that was asked for cannot run here.
    """
    from engine.serve.backends import load

    bundle = Bundle.open(folder, whole=True)
    check_graphs(bundle)
    asked = backends or [b for b in bundle.manifest["backends"] if b != "tensorrt"]
    runtimes = {name: load(bundle, name) for name in asked}
    found = []
    for part in list_parts(map_model(bundle.folder)):
        if part.name not in bundle.parts or (only and part.name not in only):
            continue
        reference = in_precision(part, torch.float32)
        for name, runtime in runtimes.items():
            for check in compare(reference, runtime.run, name, bundle.precision):
                found.append(check)
                say(check)
            runtime.close(part.name)
    return found


def check_graphs(bundle: Bundle) -> None:
    """Check every ONNX graph: external data, ONNX's own checker, dims and operators."""
    for part in bundle.parts.values():
        if "onnx" not in part.files:
            continue
        path = bundle.file(part.name, "onnx")
        model = check_external_data(bundle, path)
        try:
            onnx.checker.check_model(str(path))
        except onnx.checker.ValidationError as error:
            raise BundleError(f"{path}: ONNX's checker refused it: {error}") from error
        check_manifest_dims(part, model, path)
        check_nodes(model, part.name)


def check_manifest_dims(part: BundlePart, model: onnx.ModelProto, path: Path) -> None:
    """Compare names and dims of a graph's inputs with the manifest; raises `BundleError`."""
    moving = {dim.name for dim in part.dims if dim.min != dim.max}
    fixed = {dim.name: dim.opt for dim in part.dims}
    expected = {
        spec.name: [
            str(axis) if isinstance(axis, str) and axis.split("*")[-1] in moving
            else str(spec.size(fixed)[number])
            for number, axis in enumerate(spec.shape)
        ]
        for spec in part.inputs
    }  # fmt: skip
    got = {
        value.name: [
            axis.dim_param.replace(" ", "") or str(axis.dim_value)
            for axis in value.type.tensor_type.shape.dim
        ]
        for value in model.graph.input
    }
    if got != expected:
        wrong = sorted(name for name in {*got, *expected} if got.get(name) != expected.get(name))
        raise BundleError(
            f"{path}: input {wrong[0]} {expected.get(wrong[0])} expected from the manifest, got "
            f"{got.get(wrong[0])}; export the model again"
        )


def test_sizes(part: Part) -> Iterator[dict[str, int]]:
    """Yield three sets of sizes: the smallest, an everyday one, and an odd one."""
    cheap = {d.name: min(max(CHEAP.get(d.name, d.opt), d.min), d.max) for d in part.dims}
    yield {**cheap, **{d.name: d.min for d in part.dims if d.name in ("batch", "candidates")}}
    yield {**cheap, **{d.name: min(2, d.max) for d in part.dims if d.name == "batch"}}
    odd = {"batch": 3, "length": 7, "slots": 33, "candidates": 5}
    moving = [d for d in part.dims if d.name not in odd]
    grids = {d.name: min(d.min + 1 + number, d.max) for number, d in enumerate(moving)}
    if any(d.min != d.max for d in moving):
        odd["batch"] = 1  # these are the large pictures
    named = {d.name: min(max(odd[d.name], d.min), d.max) for d in part.dims if d.name in odd}
    yield {**grids, **named}


def compare(part: Part, run: Run, backend: str, precision: str) -> Iterator[Check]:
    """Yield the worst output of a part at each of three sizes, against the model in fp32."""
    for seed, sizes in enumerate(test_sizes(part)):
        values = part.example_inputs(sizes, seed=seed)
        inputs = {spec.name: value for spec, value in zip(part.inputs, values, strict=True)}
        if precision != "fp32":
            inputs = {name: _rounded(value, precision) for name, value in inputs.items()}
        expected = part.run(inputs)
        got = run(part.name, {name: value.clone() for name, value in inputs.items()})
        errors = {name: relative_error(got[name], value) for name, value in expected.items()}
        worst = max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))
        limit, moved = LIMITS[precision], None
        if limit < errors[worst] < float("inf"):
            moved = sensitivity(part, inputs, expected[worst], worst, limit, errors[worst])
            limit = moved if moved > JUMP * limit else limit
        yield Check(
            part=part.name,
            backend=backend,
            sizes=dict(sizes),
            output=worst,
            error=errors[worst],
            limit=limit,
            moved=moved,
        )


def sensitivity(
    part: Part,
    inputs: Mapping[str, Tensor],
    expected: Tensor,
    output: str,
    noise: float,
    enough: float,
) -> float:
    """Return how far the model's own `output` moves when its inputs move by `noise`, relative.

    A part that decides (the segmentation predictor attends where a mask exceeds one half) may
    decide otherwise at the edge, where every backend's rounding may fall on the other side. What
    an error within the limit can do to a decision, moved inputs do too. The largest of `TRIALS`
    moves; stops once one reaches `enough`.
    """
    generator = torch.Generator().manual_seed(0)
    most = 0.0
    for _ in range(TRIALS):
        noisy = {
            name: value + noise * value * (2 * torch.rand(value.shape, generator=generator) - 1)
            if value.is_floating_point()
            else value
            for name, value in inputs.items()
        }
        most = max(most, relative_error(part.run(noisy)[output], expected))
        if most >= enough:
            break
    return most


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest value; for integers, the share that differs.

    Raises `ExportError` for another shape.
    """
    if got.shape != expected.shape:
        raise ExportError(f"shape {tuple(expected.shape)} expected, got {tuple(got.shape)}")
    if not expected.is_floating_point():
        return float((got != expected).double().mean())
    scale = expected.double().abs().max().clamp(min=1e-30)
    return float((got.double() - expected.double()).abs().max() / scale)


def _rounded(value: Tensor, precision: str) -> Tensor:
    """Round an input to what the part will see, so that only the part's own error counts."""
    if not value.is_floating_point():
        return value
    return value.to(torch.float16 if precision == "fp16" else torch.bfloat16).float()
