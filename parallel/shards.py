"""Sharded checkpoints by megatron-core's `dist_checkpointing`, loadable at another layout."""

from __future__ import annotations

import inspect
import queue
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from parallel import cpu
from parallel.checkpoint import CheckpointMismatch, Staged, nothing

cpu.install()

from megatron.core import dist_checkpointing, parallel_state  # noqa: E402  (after cpu.install)
from megatron.core.dist_checkpointing.core import CheckpointingException  # noqa: E402
from megatron.core.dist_checkpointing.strategies.filesystem_async import (  # noqa: E402
    FileSystemWriterAsync,
)

from parallel.model import SplitModel  # noqa: E402

# "fully_reshardable": any tp, pp and dp may change; the default format of 0.16.1 cannot be saved.
FORMAT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}


def stage_shards(
    folder: Path, chunks: Sequence[SplitModel], optimizer: Any | None, *, copy: bool = False
) -> Staged:
    """Return what writes every rank's shards into a new folder; every rank calls it.

    megatron-core's asynchronous request, carried out by whichever thread calls `write`; its own
    callers fork processes, which would go on writing after their rank was killed.
    """
    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    state = _sharded(chunks, optimizer, loading=False)
    request = dist_checkpointing.save(
        state, str(folder), content_metadata=dict(FORMAT), async_sharded_save=True
    )

    def finish() -> None:
        for function in request.finalize_fns:
            function()

    return Staged(write=_writer(request, copy), finish=finish)


def _writer(request: Any, copy: bool) -> Callable[[], None]:
    """Return what writes this rank's files; raises what writing raised."""
    if request.async_fn is None:
        return nothing  # other ranks write all that this one has
    transforms = request.async_fn.args[0]
    results = request.async_fn_args[2]
    while not results.empty():
        results.get_nowait()  # of a save that failed before it was finished
    buckets = request.preload_fn()
    if copy and not torch.cuda.is_available():
        # Tensors of a GPU were copied just now; those of a CPU are the parameters themselves.
        buckets = [
            (path, key, (data, [(item, tensor.clone()) for item, tensor in tensors]))
            for path, key, (data, tensors) in buckets
        ]
    # Without its decorator, which switches the garbage collector of all threads off.
    write_one = inspect.unwrap(FileSystemWriterAsync.write_preloaded_data)

    def write_bucket(number: int) -> Any:
        count: queue.Queue[int] = queue.Queue()
        answers: queue.Queue[tuple[int, Any]] = queue.Queue()
        count.put(number)
        write_one(transforms, number, buckets[number], answers, count, True)
        found = answers.get_nowait()[1]
        if isinstance(found, Exception):
            raise found
        return found

    def write() -> None:
        with ThreadPoolExecutor(len(buckets)) as pool:
            results.put(dict(enumerate(pool.map(write_bucket, range(len(buckets))))))

    return write


def load_shards(folder: Path, chunks: Sequence[SplitModel], optimizer: Any | None) -> None:
    """Load weights, and optimizer state unless None, into chunks of any layout."""
    state = _sharded(chunks, optimizer, loading=True)
    try:
        loaded = dist_checkpointing.load(state, str(folder))
    except (CheckpointingException, KeyError, RuntimeError) as error:
        raise CheckpointMismatch(
            f"{folder} does not fit this model and optimizer: {error}; use the run's own config "
            "and rates, or start from its weights (init_from)"
        ) from error
    for i, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[_name(chunks, i)], strict=True)
    if optimizer is not None:
        with torch.no_grad():
            optimizer.load_state_dict(loaded["optimizer"])


def _sharded(
    chunks: Sequence[SplitModel], optimizer: Any | None, *, loading: bool
) -> dict[str, Any]:
    metadata = {
        **FORMAT,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    state: dict[str, Any] = {
        _name(chunks, i): chunk.sharded_state_dict(metadata=metadata)
        for i, chunk in enumerate(chunks)
    }
    if optimizer is not None:
        model_state = state if len(chunks) > 1 else state["model"]
        state["optimizer"] = optimizer.sharded_state_dict(
            model_state, is_loading=loading, metadata=metadata
        )
    return state


def _name(chunks: Sequence[SplitModel], number: int) -> str:
    return "model" if len(chunks) == 1 else f"model{number}"
