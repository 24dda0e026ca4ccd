"""How a run is split over processes: the numbers, and the rules that they must keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from focus.config import LLMConfig


class MeshError(ValueError):
    """A layout that cannot be built on the processes or the model at hand."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Sizes of the mesh axes; whatever processes remain are data parallel.

    `tp` splits every linear layer of the trunk, `pp` its layers, `vpp` gives each pipeline rank
    that many separate chunks (interleaved schedule), `cp` splits the sequence inside attention,
    `sequence_parallel` splits the sequence outside it (over the `tp` ranks).
    `trunk="megatron"` uses megatron-core even on one process, "auto" only where it is needed.
    """

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = True
    recompute: Literal["none", "selective", "full"] = "none"
    trunk: Literal["auto", "megatron", "plain"] = "auto"

    @property
    def model_size(self) -> int:
        """Processes that hold one copy of the model together."""
        return self.tp * self.pp * self.cp

    @property
    def megatron(self) -> bool:
        """Whether this layout needs megatron-core."""
        if self.trunk == "auto":
            return self.model_size > 1 or self.vpp > 1
        return self.trunk == "megatron"

    def data_size(self, world_size: int) -> int:
        """Return the data-parallel size on `world_size` processes; raises `MeshError`."""
        for name in ("tp", "pp", "vpp", "cp"):
            if getattr(self, name) < 1:
                raise MeshError(f"parallel.{name} must be at least 1, got {getattr(self, name)}")
        if world_size % self.model_size:
            raise MeshError(
                f"tp x pp x cp = {self.tp} x {self.pp} x {self.cp} = {self.model_size} must divide "
                f"the number of processes, got {world_size}; start a multiple of {self.model_size}"
            )
        return world_size // self.model_size


def check_layout(llm: LLMConfig, layout: ParallelConfig) -> None:
    """Raise `MeshError` naming the rule that a layout breaks for this language model."""
    rules = [
        (llm.num_heads % layout.tp == 0, f"tp must divide llm.num_heads ({llm.num_heads})"),
        (llm.ffn_dim % layout.tp == 0, f"tp must divide llm.ffn_dim ({llm.ffn_dim})"),
        (llm.vocab_size % layout.tp == 0, f"tp must divide llm.vocab_size ({llm.vocab_size})"),
        (
            llm.num_kv_heads % layout.tp == 0 or layout.tp % llm.num_kv_heads == 0,
            f"tp must divide llm.num_kv_heads ({llm.num_kv_heads}) or be a multiple of it",
        ),
        (
            llm.num_layers % (layout.pp * layout.vpp) == 0,
            f"pp x vpp must divide llm.num_layers ({llm.num_layers})",
        ),
        (layout.vpp == 1 or layout.pp > 1, "vpp above 1 needs pp above 1"),
        (not layout.sequence_parallel or layout.tp > 1, "sequence_parallel needs tp above 1"),
    ]
    for kept, rule in rules:
        if not kept:
            raise MeshError(f"{rule}; got {layout}")
