"""Sharded checkpoints by megatron-core's `dist_checkpointing`, loadable at another layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from parallel import cpu
from parallel.checkpoint import CheckpointMismatch

cpu.install()

from megatron.core import dist_checkpointing, parallel_state  # noqa: E402  (after cpu.install)
from megatron.core.dist_checkpointing.core import CheckpointingException  # noqa: E402

from parallel.model import SplitModel  # noqa: E402

# "fully_reshardable": any tp, pp and dp may change; the default format of 0.16.1 cannot be saved.
FORMAT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}


def save_shards(folder: Path, chunks: Sequence[SplitModel], optimizer: Any) -> None:
    """Write every rank's shards into a new folder; raises `OSError` and what the writer raises."""
    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    state = _sharded(chunks, optimizer, loading=False)
    dist_checkpointing.save(state, str(folder), content_metadata=dict(FORMAT))


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
