"""Repairs of megatron-core 0.16.1. Each looks whether the installed version still needs it."""

from __future__ import annotations

import inspect
import queue
from typing import Any

from parallel.adam import GroupAdam


def repair() -> None:
    """Apply every repair once."""
    use_group_adam()
    repair_reshardable_padding()
    use_local_queue()


def use_group_adam() -> None:
    """Give the distributed optimizer an AdamW that it can resume where neither TE nor apex is."""
    import megatron.core.optimizer as optimizers
    from megatron.core.optimizer import distrib_optimizer

    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    optimizers.Adam = GroupAdam
    optimizers.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.Adam = GroupAdam
    distrib_optimizer.HAVE_APEX_OR_TE = True
    distrib_optimizer.USING_APEX_OPTIMIZER = True


def repair_reshardable_padding() -> None:
    """Stop the "fully_reshardable" format from shifting state past the padding of inner buckets.

    It strips each bucket's padding from the saved state but goes on using indices that count it, so
    every bucket after the first is silently misread (fixed upstream after 0.16.1, PR 5077).
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    name = "sharded_param_state_fully_reshardable"
    original = getattr(DistributedOptimizer, name)
    if getattr(original, "repaired", False) or "padding_adjustment" in inspect.getsource(original):
        return

    def repaired(self: Any, *args: Any, **kwargs: Any) -> Any:
        kept = []
        for buffer in self.buffers:
            shifts, total = [], 0
            for bucket in buffer.buckets:
                shifts.append(total)
                total += bucket.grad_data.numel() - bucket.numel_unpadded
            kept.append(buffer.param_index_map)
            buffer.param_index_map = {
                p: (start - shifts[bucket], end - shifts[bucket], bucket)
                for p, (start, end, bucket) in buffer.param_index_map.items()
            }
        try:
            return original(self, *args, **kwargs)
        finally:
            for buffer, index_map in zip(self.buffers, kept, strict=True):
                buffer.param_index_map = index_map

    repaired.repaired = True  # type: ignore[attr-defined]
    setattr(DistributedOptimizer, name, repaired)


def use_local_queue() -> None:
    """Let a save report its results in this process, where our threads write its files.

    megatron-core starts a manager process for it, which imports the main script anew (seconds, a
    hang without a `__main__` guard) and outlives a killed rank; its own forked writers need it.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if hasattr(filesystem_async, "_results_queue") and filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()
