"""One pipeline chunk of the whole model: front on the first, heads on the last, trunk on all.

Between chunks goes one tensor [rows, B, D]: the hidden states and, below them, the multi-scale
features that the heads need, packed into further rows. Chunks in the middle hand the feature rows
on, so that gradients of the features flow back by the same road.
"""

# T padded positions, t positions on this rank, B batch, D LLM width

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from focus.batch import Batch
from focus.config import FocusConfig
from parallel import cpu
from parallel.sections import Handover, Work

cpu.install()

from megatron.core import parallel_state  # noqa: E402  (after cpu.install)
from megatron.core.tensor_parallel import (  # noqa: E402
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from parallel.language import SplitHead  # noqa: E402
from parallel.spec import length_multiple, zigzag  # noqa: E402
from parallel.trunk import Trunk  # noqa: E402


class TokenTable(nn.Module):
    """Stands for `Front.token_embedding`; its rows are the trunk's, split over tp ranks."""

    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self._table = (table,)  # in a tuple, so that its weight is registered once, in the trunk

    def forward(self, input_ids: Tensor) -> Tensor:
        """Embed [B, T] -> [B, T, D]."""
        embedded: Tensor = self._table[0](input_ids)
        return embedded


class SplitModel(MegatronModule):
    """A chunk with the shares of `whole` (a `FocusModel`) that belong to this rank.

    The front and heads modules of `whole` are taken over, not copied.
    """

    def __init__(
        self,
        whole: Any,
        config: TransformerConfig,
        *,
        vp_stage: int | None = None,
        autocast: bool = False,
    ) -> None:
        super().__init__(config=config)
        self.focus: FocusConfig = whole.config
        self.autocast = autocast
        self.llm = Trunk(whole.config.llm, config, vp_stage)
        self.llm.load_from(whole.state_dict())
        self.pre_process: bool = self.llm.pre_process
        self.post_process: bool = self.llm.post_process
        self.vp_stage = vp_stage
        self.model_type = self.llm.model_type
        self.share_embeddings_and_output_weights = self.llm.share_embeddings_and_output_weights
        if self.pre_process:
            self.front = whole.front
            self.front.token_embedding = TokenTable(self.llm.embedding.word_embeddings)
        if self.post_process:
            self.heads = whole.heads
            self.heads.lm_head = nn.Identity()
        for name, parameter in self.named_parameters():
            if not name.startswith("llm."):
                # Replicated over tp: averaging keeps copies equal where CUDA kernels are not exact.
                parameter.average_gradients_across_tp_domain = True
        self.least_length = self.least_rows = 0  # what every micro-batch is padded to, see below
        self._received: Tensor | None = None

    # The names that megatron-core's schedules and gradient finalisation look for.
    @property
    def decoder(self) -> nn.Module:
        """The trunk's layers."""
        layers: nn.Module = self.llm.decoder
        return layers

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """The tied token table on the chunks that hold it."""
        weight: Tensor | None = self.llm.shared_embedding_or_output_weight()
        return weight

    def set_input_tensor(self, received: Tensor | list[Tensor]) -> None:
        """Take what the previous chunk sent."""
        self._received = received[0] if isinstance(received, list) else received

    def forward(
        self, batch: Batch, extras: Mapping[str, Tensor], work: Work, micro: int
    ) -> Tensor | dict[str, Tensor]:
        """Return what goes to the next chunk, or the loss terms on the last."""
        maps: Sequence[Tensor] | None = None
        rows: Tensor | None = None
        states: Tensor | None = None
        if self.pre_process:
            work.seed(micro, "front")
            with self._autocast():
                features = None if batch.pictures is None else self.front.encode(batch.pictures)
                embeddings = self.front.embed(batch, features)
            maps = None if features is None else features.maps
            states = self._split_sequence(embeddings)
        else:
            states, rows = self._unpack(batch)
            self.llm.set_input_tensor(states)
            states = None
        hidden = self.llm.states(states)
        if not self.post_process:
            if self.pre_process:
                rows = self._pack(maps, batch)
            return hidden if rows is None else torch.cat([hidden, rows], 0)
        if maps is None and rows is not None and batch.pictures is not None:
            maps = self._restore_maps(rows, batch)
        whole_hidden = self._join_sequence(hidden, batch.input_ids.shape[1])
        work.seed(micro, "heads")
        state = Handover(
            batch=batch,
            hidden=whole_hidden,
            maps=maps,
            language=SplitHead(self._table()),
            extras=extras,
        )
        with self._autocast():
            return dict(work.head_losses(self.heads, state))

    def _table(self) -> Tensor:
        if self.share_embeddings_and_output_weights:
            table: Tensor = self.llm.shared_embedding_or_output_weight()
        else:
            table = self.llm.output_layer.weight
        return table

    def _autocast(self) -> AbstractContextManager[None]:
        if not self.autocast:
            return nullcontext()
        kind = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.autocast(kind, torch.bfloat16)

    def _split_sequence(self, embeddings: Tensor) -> Tensor:
        """Cut [B, T, D] into this rank's [t, B, D], padding T to what the layout needs."""
        cp = self.config.context_parallel_size
        multiple = length_multiple(self.config)
        states = embeddings.to(self.config.params_dtype).transpose(0, 1)
        length = max(self.least_length, states.shape[0])
        padding = -(-length // multiple) * multiple - states.shape[0]
        states = F.pad(states, (0, 0, 0, 0, 0, padding)).contiguous()
        if cp > 1:
            rank = parallel_state.get_context_parallel_rank()
            states = states[zigzag(states.shape[0], cp)[rank].to(states.device)]
        if self.config.sequence_parallel:
            states = scatter_to_sequence_parallel_region(states)
        return states

    def _join_sequence(self, hidden: Tensor, length: int) -> Tensor:
        """Undo `_split_sequence`: [t, B, D] -> [B, T, D], equal on every tp and cp rank."""
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        cp = self.config.context_parallel_size
        if cp > 1:
            group = parallel_state.get_context_parallel_group()
            joined: Tensor = _JoinOverContext.apply(hidden, group)  # type: ignore[no-untyped-call]
            hidden = joined[zigzag(joined.shape[0], cp).reshape(-1).argsort().to(joined.device)]
        return hidden[:length].transpose(0, 1)

    def _shapes(self, batch: Batch) -> list[tuple[int, int, int]]:
        assert batch.pictures is not None
        height, width = batch.pictures.hierarchical.shape[-2:]
        dims = self.focus.hierarchical.dims
        return [(dim, height // (4 << i), width // (4 << i)) for i, dim in enumerate(dims)]

    def num_rows(self, batch: Batch) -> int:
        """Rows of D numbers that one picture's features fill, a multiple of tp under SP."""
        rows = 0
        if batch.pictures is not None:
            rows = -(-sum(math.prod(s) for s in self._shapes(batch)) // self.focus.llm.dim)
        tp = self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1
        return -(-max(rows, self.least_rows) // tp) * tp

    def _pack(self, maps: Sequence[Tensor] | None, batch: Batch) -> Tensor | None:
        dim, rows = self.focus.llm.dim, self.num_rows(batch)
        if rows == 0:
            return None
        size = batch.input_ids.shape[0]
        flat = torch.zeros(size, 0, device=batch.input_ids.device)
        if maps is not None:
            flat = torch.cat([part.flatten(1) for part in maps], 1)
        flat = F.pad(flat.to(self.config.params_dtype), (0, rows * dim - flat.shape[1]))
        packed: Tensor = flat.view(size, rows, dim).transpose(0, 1).contiguous()
        if self.config.sequence_parallel:
            packed = scatter_to_sequence_parallel_region(packed)
        return packed

    def _unpack(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        assert self._received is not None
        rows = self.num_rows(batch)
        if self.config.sequence_parallel:
            rows //= self.config.tensor_model_parallel_size
        if rows == 0:
            return self._received, None
        return self._received[:-rows].contiguous(), self._received[-rows:]

    def _restore_maps(self, rows: Tensor, batch: Batch) -> list[Tensor]:
        if self.config.sequence_parallel:
            rows = gather_from_sequence_parallel_region(
                rows.contiguous(), tensor_parallel_output_grad=False
            )
        flat = rows.transpose(0, 1).flatten(1)
        maps, offset = [], 0
        for shape in self._shapes(batch):
            count = math.prod(shape)
            maps.append(flat[:, offset : offset + count].reshape(-1, *shape).float())
            offset += count
        return maps


class _JoinOverContext(torch.autograd.Function):
    """Concatenate [t, B, D] over context-parallel ranks for heads that every rank repeats.

    Each rank's gradient is already whole, so it is cut, not summed; the factor `size` undoes the
    mean that the data-parallel reduction takes over these ranks' disjoint shares.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(x) for _ in range(group.size())]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        size, rank = ctx.group.size(), ctx.group.rank()
        return gradient.chunk(size)[rank] * size, None
