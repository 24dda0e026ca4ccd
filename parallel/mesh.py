"""The process group and this process's place in it; a group of one needs no launcher."""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, TCPStore

from parallel.layout import MeshError, ParallelConfig

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """This process among all; `data_rank` of `data_size` names the samples that it trains on."""

    rank: int
    size: int
    data_rank: int
    data_size: int
    device: torch.device

    @property
    def leader(self) -> bool:
        """Whether this process writes logs and publishes checkpoints."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for every process."""
        if self.size > 1:
            dist.barrier()

    def share(self, value: T) -> T:
        """Return the leader's value on every process."""
        if self.size == 1:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0)
        found: T = box[0]
        return found

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process; every process calls it."""
        if self.size == 1:
            return flag
        votes = torch.tensor([int(flag)], device=self.device)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        return bool(votes.item())


@contextmanager
def open_mesh(layout: ParallelConfig, *, timeout: float = 1800.0) -> Iterator[Mesh]:
    """Open the process group that the environment describes: torchrun's, else one process.

    NCCL where CUDA is present, else gloo. A group that is already open is used and left open.
    Raises `MeshError` when the layout does not fit the number of processes.
    """
    owned = not dist.is_initialized()
    size = int(os.environ.get("WORLD_SIZE", "1")) if owned else dist.get_world_size()
    data_size = layout.data_size(size)
    device = _device()
    if owned:
        _init(device, size, datetime.timedelta(seconds=timeout))
    rank = dist.get_rank()
    try:
        yield Mesh(
            rank=rank,
            size=size,
            data_rank=rank if layout.model_size == 1 else _data_rank(layout, rank),
            data_size=data_size,
            device=device,
        )
    finally:
        _close_megatron()
        if owned and dist.is_initialized():
            dist.destroy_process_group()


def _close_megatron() -> None:
    """Forget megatron-core's groups, if this process made any."""
    state = sys.modules.get("megatron.core.parallel_state")
    if state is not None and state.model_parallel_is_initialized():
        state.destroy_model_parallel()


def _data_rank(layout: ParallelConfig, rank: int) -> int:
    """Ranks are ordered tp fastest, then cp, dp, pp (Megatron's default order)."""
    per_stage = dist.get_world_size() // layout.pp
    return rank % per_stage // (layout.tp * layout.cp)


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def _init(device: torch.device, size: int, timeout: datetime.timedelta) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    if size == 1:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    missing = [k for k in ("RANK", "MASTER_ADDR", "MASTER_PORT") if k not in os.environ]
    if missing:
        raise MeshError(f"WORLD_SIZE is {size} but {missing} are not set; start with torchrun")
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        size,
        is_master=os.environ["RANK"] == "0"
        and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
        timeout=timeout,
    )
    # The agent's store outlives a killed attempt, so each attempt gets its own key space.
    dist.init_process_group(
        backend,
        store=PrefixStore(f"attempt{attempt}", store),
        rank=int(os.environ["RANK"]),
        world_size=size,
        timeout=timeout,
    )
