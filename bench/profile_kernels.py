"""Where the time of an operator goes: its device kernels (or CPU operations), largest first.

    python -m bench profile_kernels [--op NAME ...] [--device cpu|cuda] [--json FILE] [--traces DIR]

Profiles the implementation that dispatch chooses on the benchmark's problems, forward and
forward+backward. A trace opens in Perfetto or chrome://tracing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench.kernels import with_backward
from kernels import catalog
from kernels.kernel import Case, Kernel

WARM, TURNS, SHOWN = 2, 3, 8


@dataclass(frozen=True, kw_only=True)
class Part:
    """One device kernel or operation: how often per call, and its own microseconds per call."""

    name: str
    calls: float
    us: float


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The parts of one operator on one problem, largest first."""

    op: str
    case: str
    direction: str
    device: str
    total_us: float
    parts: list[Part]


def call_of(kernel: Kernel, case: Case, direction: str, device: str) -> Callable[[], Any]:
    """Return the call to profile, as the benchmark times it."""
    dtype = torch.float32 if device == "cpu" else torch.float16
    inputs = kernel.inputs(case, dtype, device)
    if direction == "forward+backward":
        call: Callable[[], Any] = with_backward(kernel, _forward(kernel), inputs)
        return call

    def forward() -> Any:
        with torch.no_grad():
            return kernel.function(**inputs)

    return forward


def _forward(kernel: Kernel) -> Callable[[dict[str, Any]], Callable[[], Any]]:
    return lambda inputs: lambda: kernel.function(**inputs)


def measure(
    kernel: Kernel, case: Case, direction: str, device: str, trace: Path | None = None
) -> Profile:
    """Profile one problem."""
    call = call_of(kernel, case, direction, device)
    for _ in range(WARM):
        call()
    on_device = device == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_device
    with profile(activities=activities) as recorded:
        for _ in range(TURNS):
            call()
        if on_device:
            torch.cuda.synchronize()
    if trace is not None:
        trace.parent.mkdir(parents=True, exist_ok=True)
        recorded.export_chrome_trace(str(trace))
    field = "self_device_time_total" if on_device else "self_cpu_time_total"
    parts = [
        Part(name=str(e.key), calls=e.count / TURNS, us=float(getattr(e, field)) / TURNS)
        for e in recorded.key_averages()
    ]
    parts = sorted((p for p in parts if p.us > 0.0), key=lambda p: -p.us)
    return Profile(
        op=kernel.name,
        case=case.name,
        direction=direction,
        device=device,
        total_us=sum(p.us for p in parts),
        parts=parts,
    )


def show(found: Profile) -> str:
    """Format the largest parts of a profile."""
    head = f"\n{found.op}  {found.case}  {found.direction}  {found.total_us:.0f} us"
    lines = [f"  {p.us:10.1f} us {p.calls:6.1f}x  {p.name[:90]}" for p in found.parts[:SHOWN]]
    return "\n".join([head, *lines])


def main(arguments: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m bench profile_kernels", description=__doc__)
    parser.add_argument("--op", nargs="+", help="operators, all by default")
    parser.add_argument("--case", nargs="+", help="only problems whose name contains one of these")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, help="write every part here")
    parser.add_argument("--traces", type=Path, help="write one trace per problem here")
    chosen = parser.parse_args(arguments)
    found: list[Profile] = []
    for kernel in catalog.kernels():
        if chosen.op and kernel.name not in chosen.op:
            continue
        for case in [c for c in kernel.cases if c.bench]:
            if chosen.case and not any(part in case.name for part in chosen.case):
                continue
            for direction in ["forward"] + ["forward+backward"] * bool(kernel.trained):
                name = f"{kernel.name}-{case.name}-{direction}.json"
                trace = chosen.traces / name if chosen.traces else None
                found.append(measure(kernel, case, direction, chosen.device, trace))
                print(show(found[-1]), flush=True)
    if chosen.json:
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
        chosen.json.write_text(json.dumps([asdict(p) for p in found], indent=1))
    return 0
