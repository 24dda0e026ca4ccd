"""Runs a function on several gloo ranks: a fork server imports megatron-core once for all tests."""

from __future__ import annotations

import multiprocessing
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


def run(size: int, work: Callable[..., Any], *arguments: Any, seconds: float = 120.0) -> list[Any]:
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
        results.put((rank, None, answer))
    except BaseException:
        results.put((rank, traceback.format_exc(), None))


def collect(
    size: int, results: Any, processes: list[ForkServerProcess], seconds: float
) -> list[Any]:
    answers: dict[int, Any] = {}
    end = time.monotonic() + seconds
    while len(answers) < size:
        try:
            rank, error, answer = results.get(timeout=0.2)
        except queue.Empty:
            dead = [i for i, p in enumerate(processes) if p.exitcode not in (None, 0)]
            if dead or time.monotonic() > end:
                raise AssertionError(f"ranks {dead} died or {seconds} s passed") from None
            continue
        if error is not None:
            raise AssertionError(f"rank {rank} failed:\n{error}")
        answers[rank] = answer
    return [answers[rank] for rank in range(size)]
