"""How fast a training goes: tokens, samples, FLOPs, memory, waiting, on every rank."""

from __future__ import annotations

import faulthandler
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch

from focus.batch import Batch
from parallel.planner import GIB, GPUS

if TYPE_CHECKING:
    from engine.run import Run
    from parallel.mesh import Mesh


class Meter:
    """Turns seconds into rates; `skipped` counts steps passed over, restarts included.

    With `run.measure_flops` the model is traced once on the leader; MFU is given where the card's
    peak is known (`parallel.planner.GPUS`, dense bf16).
    """

    def __init__(self, run: Run, mesh: Mesh, folder: Path) -> None:
        self.mesh = mesh
        self.skipped = 0
        self.flops_per_sample = 0.0
        if run.measure_flops and mesh.leader:
            from engine.workload import workload_of

            self.flops_per_sample = workload_of(run).step_flops
        self.peak = peak_flops(mesh.device)
        self._log: TextIO | None = None
        if mesh.size > 1:
            path = folder / "ranks" / f"rank-{mesh.rank:05d}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            self._log = path.open("a")

    def facts(
        self, step: int, micros: Sequence[Any], samples: int, seconds: float, waited: float
    ) -> dict[str, float]:
        """Return what the leader logs of one step, and log this rank's own share of it.

        `samples` counts all ranks'; tokens are this rank's times the data-parallel ranks.
        """
        tokens = sum(int(batch.lengths.sum()) for batch in micros if isinstance(batch, Batch))
        found = {
            "samples_per_s": samples / seconds,
            "seconds": seconds,
            "data_wait": waited,
            "memory_gib": memory(self.mesh.device) / GIB,
        }
        if tokens:
            found["tokens_per_s"] = tokens * self.mesh.data_size / seconds
        if self.flops_per_sample:
            per_rank = self.flops_per_sample * samples / seconds / self.mesh.size
            found["tflops_per_rank"] = per_rank / 1e12
            if self.peak:
                found["mfu"] = per_rank / self.peak
        if self.skipped:
            found["skipped"] = float(self.skipped)
        if self._log is not None:
            kept = ("seconds", "data_wait", "memory_gib")
            line = {"step": step, **{name: round(found[name], 4) for name in kept}}
            self._log.write(json.dumps(line) + "\n")
            self._log.flush()
        return found

    def close(self) -> None:
        """Close this rank's log."""
        if self._log is not None:
            self._log.close()
            self._log = None


def peak_flops(device: torch.device) -> float:
    """Dense bf16 FLOP/s of the card, 0 where it is not known."""
    if device.type != "cuda":
        return 0.0
    name = torch.cuda.get_device_name(device).lower()
    return next((gpu.flops for key, gpu in GPUS.items() if key in name), 0.0)


def memory(device: torch.device) -> float:
    """Most bytes that tensors held on the card so far; on a CPU what the process holds now."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    import psutil

    return float(psutil.Process().memory_info().rss)


@contextmanager
def watched(seconds: float) -> Iterator[Callable[[], None]]:
    """End the process, with every thread's stack on stderr, when nothing was done for `seconds`.

    Yields the function that says that something was done; 0 seconds watch nothing. A hang is not a
    death: torchrun and Slurm see only the latter. Other ranks end by the group's own timeout.
    """
    stream = next((s for s in (sys.stderr, sys.__stderr__) if _has_file(s)), None)

    def alive() -> None:
        if seconds and stream is not None:
            faulthandler.dump_traceback_later(seconds, exit=True, file=stream)

    try:
        yield alive
    finally:
        faulthandler.cancel_dump_traceback_later()


def _has_file(stream: Any) -> bool:
    """Whether a stream has a descriptor, which a dump from outside Python needs."""
    try:
        return bool(stream.fileno() >= 0)
    except (AttributeError, OSError, ValueError):
        return False


@contextmanager
def profiled(run: Run, folder: Path, step: int) -> Iterator[Any]:
    """Trace the steps that `run.profile` names, into FOLDER/profile/rank-N for chrome://tracing.

    Yields the profiler, whose `step()` follows every training step, or None.
    """
    if run.profile is None or step > run.profile[1]:
        yield None
        return
    from torch import profiler

    first, last = run.profile
    kinds = [profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        kinds.append(profiler.ProfilerActivity.CUDA)
    target = folder / "profile"
    with profiler.profile(
        activities=kinds,
        schedule=profiler.schedule(
            wait=max(0, first - 1 - step), warmup=0, active=last - max(first - 1, step), repeat=1
        ),
        on_trace_ready=profiler.tensorboard_trace_handler(str(target)),
        profile_memory=True,
    ) as tracer:
        yield tracer
