"""Runs a function on several gloo ranks: a fork server imports megatron-core once for all tests."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import queue
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def context() -> ForkServerContext:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # megatron's fusions by torch.compile cost more here
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(
        ["parallel.split_engine", "parallel.shards", "focus.model", "engine.train"]
    )
    return found


def run(size: int, work: Callable[..., Any], *arguments: Any, seconds: float = 1800.0) -> list[Any]:
    """Return what `work(rank, *arguments)` returns on each of `size` ranks; raise if one fails."""
    found = context()
    results: Any = found.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        shared = (store, results, work, arguments)
        processes = [start(found, rank, size, *shared) for rank in range(size)]
        try:
            return collect(size, results, processes, seconds)
        finally:
            for process in processes:
                process.join(5)
                if process.is_alive():
                    process.kill()
                    process.join()


def world() -> int:
    return dist.get_world_size()


def start(
    found: ForkServerContext,
    rank: int,
    size: int,
    store: str,
    results: Any,
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> ForkServerProcess:
    process = found.Process(target=enter, args=(rank, size, store, results, work, arguments))
    process.start()
    return process


def enter(
    rank: int,
    size: int,
    store: str,
    results: Any,
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
        answer = work(rank, *arguments)
        dist.barrier()
        dist.destroy_process_group()
        if results is not None:
            results.put((rank, None, answer))
    except BaseException:
        if results is None:
            raise
        results.put((rank, traceback.format_exc(), None))


def launch(
    size: int, folder: Path, work: Callable[..., Any], *arguments: Any
) -> list[ForkServerProcess]:
    """Start ranks that may be killed: nothing is shared with them but a store in `folder`."""
    store = str(folder / f"store-{time.monotonic_ns()}")
    return [start(context(), rank, size, store, None, work, arguments) for rank in range(size)]


def codes(
    processes: list[ForkServerProcess], seconds: float = 60.0, alive: float = 600.0
) -> list[int | None]:
    """Return the exit codes. Once a rank has ended the others get `seconds`; a hang is an error."""
    multiprocessing.connection.wait([process.sentinel for process in processes], alive)
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.1, end - time.monotonic()))
    hanging = [i for i, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    assert not hanging, f"ranks {hanging} still ran {seconds} s after another had ended"
    return [process.exitcode for process in processes]


def collect(
    size: int, results: Any, processes: list[ForkServerProcess], seconds: float
) -> list[Any]:
    answers: dict[int, Any] = {}
    end = time.monotonic() + seconds
    while len(answers) < size:
        try:
            rank, error, answer = results.get(timeout=0.2)
        except queue.Empty:
            dead = {i: p.exitcode for i, p in enumerate(processes) if p.exitcode not in (None, 0)}
            if dead or time.monotonic() > end:
                raise AssertionError(
                    f"ranks died with codes {dead}, or {seconds} s passed"
                ) from None
            continue
        if error is not None:
            raise AssertionError(f"rank {rank} failed:\n{error}")
        answers[rank] = answer
    return [answers[rank] for rank in range(size)]
