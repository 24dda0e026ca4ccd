"""Fair timing: contenders take turns, so that a busy machine slows all of them alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

Function = Callable[[], Any]
SLOW_S = 3.0
ONCE_S = 15.0


@dataclass(kw_only=True)
class Timing:
    """Milliseconds of one contender, and the memory that a call adds on top of its inputs."""

    wall_ms: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    extra_mb: float = 0.0

    @property
    def median_ms(self) -> float:
        """Median wall time."""
        return statistics.median(self.wall_ms)

    @property
    def min_ms(self) -> float:
        """Least wall time."""
        return min(self.wall_ms)

    @property
    def min_cpu_ms(self) -> float:
        """Least processor time: what remains comparable on a machine with other work."""
        return min(self.cpu_ms)


def measure(
    functions: dict[str, Function], *, device: str, repeats: int, budget_s: float = 120.0
) -> dict[str, Timing]:
    """Time functions in turns: warm every one, then `repeats` rounds or until the budget is spent.

    At least two rounds are timed, whatever the budget. A second call gives the peak memory, of
    steady state; a call of more than `SLOW_S` seconds gives it while it warms, and one of more
    than `ONCE_S` seconds is not repeated at all: its warm call is its timing.
    """
    timings = {name: Timing() for name in functions}
    repeated = dict(functions)
    for name, function in functions.items():
        spent: list[tuple[float, float]] = []

        def timed(function: Function = function, spent: list[tuple[float, float]] = spent) -> None:
            spent.append(_once(function, device))

        timings[name].extra_mb = extra_memory(timed, device)
        if spent[0][0] < 1e3 * SLOW_S:
            timings[name].extra_mb = extra_memory(function, device)
        elif spent[0][0] > 1e3 * ONCE_S:
            timings[name].wall_ms.append(spent[0][0])
            timings[name].cpu_ms.append(spent[0][1])
            del repeated[name]
    started = time.perf_counter()
    for turn in range(repeats):
        if turn >= 2 and time.perf_counter() - started > budget_s:
            break
        for name, function in repeated.items():
            wall, cpu = _once(function, device)
            timings[name].wall_ms.append(wall)
            timings[name].cpu_ms.append(cpu)
    return timings


def _once(function: Function, device: str) -> tuple[float, float]:
    if device == "cuda":
        event: Any = torch.cuda.Event
        begin, end = (event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        function()
        end.record()
        torch.cuda.synchronize()
        elapsed = float(begin.elapsed_time(end))
        return elapsed, elapsed
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return 1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)


def extra_memory(function: Function, device: str) -> float:
    """Return the megabytes that a call needs at its peak beyond what was there before.

    On the processor the kernel's high-water mark is reset first (Linux); NaN where it cannot be.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return float(torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _high_water()
        function()
        return (_high_water() - before) / 1024
    except OSError:
        return float("nan")


def _high_water() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1])
    raise OSError("no VmHWM in /proc/self/status")


def graph(function: Function) -> Function:
    """Return the replay of a CUDA graph of `function`: what a server pays, without launches."""
    make: Any = torch.cuda.Stream
    stream = make()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        function()
    return captured.replay
