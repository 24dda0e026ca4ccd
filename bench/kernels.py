"""Kernel benchmark: ours beside every installed peer, accuracy first.

    python -m bench kernels [--op NAME ...] [--device cpu|cuda] [--json FILE]

Every contender is checked against the fp64 reference before it is timed; one that fails gets no
speed. Contenders take turns. The CSV and the picture are written beside the JSON.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import report, timer
from bench.peers import peers
from kernels import catalog, dispatch
from kernels.kernel import Case, Kernel, KernelUnsupported

Inputs = dict[str, Any]
# A contender may be off by this much in the norm; an index must be right except in fp32 ties.
TOLERANCE = {torch.float32: 5e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}


def contenders(kernel: Kernel, device: str) -> dict[str, tuple[bool, Callable[[Inputs], Any]]]:
    """Return name -> (is a peer, function from inputs to a call)."""
    found: dict[str, tuple[bool, Callable[[Inputs], Any]]] = {}
    for implementation in kernel.implementations:
        found[f"ours {implementation.name}"] = (False, _ours(kernel, implementation.name))
    for name, peer in peers(kernel.name, device).items():
        found[name] = (True, peer)
    return found


def _ours(kernel: Kernel, name: str) -> Callable[[Inputs], Any]:
    def make(inputs: Inputs) -> Any:
        def call() -> Any:
            with dispatch.force(**{kernel.name: name}):
                outputs = kernel.function(**inputs)
            return outputs[0] if isinstance(outputs, tuple) else outputs

        return call

    return make


def _forced(kernel: Kernel, name: str, call: Callable[[], Any]) -> Callable[[], Any]:
    """Return the call with one implementation forced, in its backward too."""

    def forced() -> Any:
        with dispatch.force(**{kernel.name: name}):
            return call()

    return forced


def with_backward(kernel: Kernel, make: Callable[[Inputs], Any], inputs: Inputs) -> Any:
    """Return a call of forward and backward over the trainable inputs, features frozen."""
    leaves = {name: inputs[name].detach().clone().requires_grad_() for name in kernel.trained}
    forward = make({**inputs, **leaves})
    weights: list[Tensor] = []

    def call() -> list[Tensor]:
        out = forward()
        if not weights:
            generator = torch.Generator().manual_seed(0)
            weights.append(torch.randn(out.shape, generator=generator).to(out))
        return list(torch.autograd.grad(out, list(leaves.values()), weights[0]))

    return call


def oracle(kernel: Kernel, inputs: Inputs, rows: int = 256) -> Tensor:
    """Return the fp64 answer; of a lookup, that of the first `rows` tokens, by its definition."""
    if kernel.name != "codebook_lookup":
        wide = {
            k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
            for k, v in inputs.items()
        }
        with dispatch.force(**{kernel.name: kernel.oracle}), torch.no_grad():
            outputs = kernel.function(**wide)
        truth: Tensor = outputs[0] if isinstance(outputs, tuple) else outputs
        return truth
    x, codes = inputs["x"], inputs["codes"].double()
    found = []
    for chunk in x[:rows].double().split(32):
        found.append((chunk[:, None] - codes[None]).square().sum(-1).argmin(1))
    return torch.cat(found)


def accuracy(kernel: Kernel, got: Any, truth: Tensor, inputs: Inputs) -> tuple[float, bool]:
    """Return (error, exact enough).

    A lookup's error is its share of wrong indices; it is exact enough when every chosen code is
    within fp32 rounding of the nearest.
    """
    if not got.is_floating_point() and kernel.name != "codebook_lookup":
        return float((got != truth).double().mean()), torch.equal(got, truth)
    if got.is_floating_point():
        gap = float((got.double() - truth).norm() / truth.norm().clamp(min=1e-30))
        return gap, gap <= TOLERANCE[got.dtype]
    index = got[: truth.shape[0]].to(truth)
    x, codes = inputs["x"][: truth.shape[0]].double(), inputs["codes"].double()
    mine, best = ((x - codes[i]).square().sum(1) for i in (index, truth))
    wrong = float((index != truth).double().mean())
    return wrong, bool(((mine - best) <= 1e-5 * best).all())


def rate(device: str) -> float:
    """Return the multiply-add rate of this machine in FLOP/s, measured on one large product."""
    dtype = torch.float16 if device == "cuda" else torch.float32
    size = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    timing = timer.measure({"product": lambda: a @ b}, device=device, repeats=7)["product"]
    return 2.0 * size**3 / (timing.min_ms * 1e-3)


def run_case(
    kernel: Kernel, case: Case, direction: str, device: str, repeats: int, flops_per_s: float
) -> list[report.Row]:
    """Check and time every contender on one problem."""
    dtype = torch.float32 if device == "cpu" else torch.float16
    inputs = kernel.inputs(case, dtype, device)
    truth = oracle(kernel, inputs)
    checked: dict[str, tuple[bool, float, bool]] = {}
    calls: dict[str, Any] = {}
    for name, (is_peer, make) in contenders(kernel, device).items():
        try:
            with torch.no_grad():
                error, good = accuracy(kernel, make(inputs)(), truth, inputs)
        except KernelUnsupported:
            continue
        except Exception as failure:  # a peer that cannot run here is reported, not fatal
            print(f"  {name}: cannot run: {str(failure).splitlines()[0][:120]}")
            continue
        checked[name] = (is_peer, error, good)
        if good:
            backward = direction == "forward+backward"
            call = with_backward(kernel, make, inputs) if backward else make(inputs)
            calls[name] = call if is_peer else _forced(kernel, name.removeprefix("ours "), call)
    grad_mode = torch.enable_grad() if direction == "forward+backward" else torch.no_grad()
    with grad_mode:
        timings = timer.measure(calls, device=device, repeats=repeats)
    floor = 1e3 * kernel.flops(case, direction) / flops_per_s if kernel.flops else math.nan
    rows = []
    for name, (is_peer, error, good) in checked.items():
        timing = timings.get(name)
        rows.append(
            report.Row(
                op=kernel.name,
                case=case.name,
                direction=direction,
                implementation=name,
                is_peer=is_peer,
                median_ms=timing.median_ms if timing else math.nan,
                min_ms=timing.min_ms if timing else math.nan,
                min_cpu_ms=timing.min_cpu_ms if timing else math.nan,
                extra_mb=timing.extra_mb if timing else math.nan,
                max_error=error,
                exact_enough=good,
                floor_ms=floor,
                device=report.device_name(device),
            )
        )
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m bench kernels", description=__doc__)
    parser.add_argument("--op", nargs="+", help="operators, all by default")
    parser.add_argument("--case", nargs="+", help="only problems whose name contains one of these")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, help="processor threads of every contender")
    parser.add_argument("--json", type=Path, help="write rows here, CSV and picture beside it")
    chosen = parser.parse_args(arguments)
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    flops_per_s = rate(chosen.device)
    print(f"{report.device_name(chosen.device)}: {flops_per_s / 1e9:.0f} GFLOP/s in one product")
    started, rows = time.perf_counter(), []
    for kernel in catalog.kernels():
        if chosen.op and kernel.name not in chosen.op:
            continue
        for case in [c for c in kernel.cases if c.bench]:
            if chosen.case and not any(part in case.name for part in chosen.case):
                continue
            directions = ["forward"] + ["forward+backward"] * bool(kernel.trained)
            for direction in directions:
                found = run_case(
                    kernel, case, direction, chosen.device, chosen.repeats, flops_per_s
                )
                rows += found
                print(report.table(found), flush=True)
    print(f"\n{len(rows)} rows in {time.perf_counter() - started:.0f} s; * is ours")
    if chosen.json:
        report.write_json(rows, chosen.json)
        report.write_csv(rows, chosen.json.with_suffix(".csv"))
        report.draw(rows, chosen.json.with_suffix(".png"))
    return 0
