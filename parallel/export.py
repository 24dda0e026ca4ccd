"""From a split model back to the single-device one: whole tensors under our own names."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from parallel import cpu
from parallel.tensors import unique_tensors, write_tensors

cpu.install()

from megatron.core import parallel_state  # noqa: E402  (after cpu.install)

from parallel.model import SplitModel  # noqa: E402


def whole_state(chunks: Sequence[SplitModel]) -> dict[str, Tensor]:
    """Return the whole model's state on rank 0 and nothing elsewhere; every rank calls it.

    A tied head is left out: `FocusModel` shares it with the token table.
    """
    own: dict[str, Tensor] = {}
    for chunk in chunks:
        own.update(chunk.llm.whole())
        for part in ("front", "heads"):
            if hasattr(chunk, part):
                state = getattr(chunk, part).state_dict()
                # Copies: parameters are views of the optimizer's buffer, and what is sent of a view
                # is all that lies behind it.
                own.update({f"{part}.{name}": t.to("cpu", copy=True) for name, t in state.items()})
    group = parallel_state.get_pipeline_model_parallel_group()
    if group.size() == 1:
        return own if dist.get_rank() == 0 else {}
    first = parallel_state.get_pipeline_model_parallel_first_rank()
    collects = dist.get_rank() == first
    parts: list[dict[str, Tensor]] = [{} for _ in range(group.size())]
    dist.gather_object(own, parts if collects else None, dst=first, group=group)
    if dist.get_rank() != 0:
        return {}
    found: dict[str, Tensor] = {}
    for part_state in parts:
        found.update(part_state)
    return found


def export_model(chunks: Sequence[SplitModel], path: Path) -> None:
    """Write the whole model as one safetensors file that `load_initial` and inference read."""
    state = whole_state(chunks)
    if dist.get_rank() == 0:
        kept, aliases = unique_tensors(state)
        write_tensors(path, kept, {"aliases": json.dumps(aliases)})
    dist.barrier()
