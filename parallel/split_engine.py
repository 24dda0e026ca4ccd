"""The engine for models that no single process holds: megatron-core's schedules and optimizer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from focus.batch import Batch
from parallel import cpu
from parallel.checkpoint import Staged
from parallel.engine import NonFiniteLoss, StepReport, sum_terms
from parallel.layout import MeshError, ParallelConfig
from parallel.mesh import Mesh
from parallel.optimizer import OptimizerConfig, check_parked, freeze, frozen_rows
from parallel.sections import Work
from parallel.tensors import to_device
from parallel.weight_map import FOCUS

cpu.install()

from megatron.core import parallel_state  # noqa: E402  (after cpu.install)
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
)
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402

from parallel.model import SplitModel  # noqa: E402
from parallel.spec import length_multiple, transformer_config  # noqa: E402
from parallel.split_optimizer import build_optimizer, learning_rates  # noqa: E402

WEIGHTS_ONLY = "weights-only"  # marks a checkpoint without optimizer state


def open_megatron(layout: ParallelConfig, mesh: Mesh, seed: int) -> None:
    """Create megatron-core's process groups over the open process group."""
    if parallel_state.model_parallel_is_initialized():
        return
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
    )
    model_parallel_cuda_manual_seed(seed % 2**31)
    assert parallel_state.get_data_parallel_rank() == mesh.data_rank


class SplitEngine:
    """Tensor, pipeline, sequence, context and data parallel training of a `FocusModel`.

    `whole` is the single-device model with its weights loaded; every rank keeps its shares of it.
    Learning rates are given by the single-device parameter names. Modules of the front or the heads
    named in `parked`, which the steps never call, stay in host memory.
    """

    def __init__(
        self,
        whole: nn.Module,
        config: OptimizerConfig,
        layout: ParallelConfig,
        mesh: Mesh,
        *,
        precision: str = "fp32",
        seed: int = 0,
        parked: Sequence[str] = (),
    ) -> None:
        if not all(hasattr(whole, part) for part in ("front", "trunk", "heads", "config")):
            raise MeshError(
                f"tp, pp, cp and vpp split a model of front, trunk and heads, got "
                f"{type(whole).__name__}; set them to 1 for this stage"
            )
        if config.muon:
            raise MeshError(
                "Muon needs whole matrices, which tp, pp, cp and vpp split; set them to 1, or "
                "muon={} for AdamW"
            )
        self.config = config
        self.layout = layout
        self.mesh = mesh
        self.frozen_rows = _frozen_table_rows(whole)
        llm: Any = whole.config.llm  # type: ignore[union-attr]
        self.megatron = transformer_config(llm, layout, precision=precision)
        open_megatron(layout, mesh, seed)
        to_device(whole, mesh.device, parked)
        check_parked(freeze(whole, config.rates), parked)
        stages: list[int | None] = list(range(layout.vpp)) if layout.vpp > 1 else [None]
        self.chunks = [
            SplitModel(whole, self.megatron, vp_stage=stage, autocast=self.megatron.bf16)
            for stage in stages
        ]
        for chunk in self.chunks:
            own = {name for name, _ in chunk.named_modules()}
            to_device(chunk, mesh.device, [path for path in parked if path in own])
        self.model: nn.Module = nn.ModuleList(self.chunks)
        self.rates = learning_rates(self.chunks, config)
        # The distributed optimizer needs its gradient buffers; without data parallelism it is the
        # same arithmetic, and one code path is tested.
        buffers = DistributedDataParallelConfig(
            use_distributed_optimizer=layout.distributed_optimizer, grad_reduce_in_fp32=True
        )
        self.wrapped = [
            DistributedDataParallel(self.megatron, buffers, chunk, disable_bucketing=i > 0)
            for i, chunk in enumerate(self.chunks)
        ]
        self.optimizer, self.rate_of_mark = build_optimizer(
            self.wrapped, self.rates, config, layout, self.megatron.params_dtype
        )

    def step(self, number: int, batches: Sequence[Any], work: Work) -> StepReport:
        """Accumulate gradients over the micro-batches and step; raises `NonFiniteLoss`."""
        self._check_micro_batches(len(batches))
        for chunk in self.wrapped:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        items = [self._prepare(micro, batch, work) for micro, batch in enumerate(batches)]
        cp = self.layout.cp

        def forward(data: Iterator[Any], chunk: nn.Module) -> tuple[Any, Any]:
            micro, batch, extras = next(data)
            output = chunk(batch, extras, work, micro)

            def loss(terms: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
                # The schedule multiplies by cp and divides by the number of micro-batches.
                kept = {name: term.detach() for name, term in terms.items()}
                return sum_terms(terms) / cp, kept

            return output, loss

        many = len(self.wrapped) > 1
        collected = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=[iter(items) for _ in self.wrapped] if many else iter(items),
            model=self.wrapped if many else self.wrapped[0],
            num_microbatches=len(items),
            seq_length=self._message_length([batch for _, batch, _ in items]),
            micro_batch_size=items[0][1].input_ids.shape[0],
            forward_only=False,
        )
        self._zero_frozen_rows()
        return self._update(number, self._terms(collected, len(items)))

    def _zero_frozen_rows(self) -> None:
        """Keep the first rows of the token table, wherever copies of their shards lie."""
        for chunk in self.chunks if self.frozen_rows else ():
            for _, parameter, made_of in chunk.llm.entries():
                if made_of.names == (FOCUS.table,) and parameter.requires_grad:
                    first = parallel_state.get_tensor_model_parallel_rank() * len(parameter)
                    held: Any = parameter
                    held.main_grad[: max(0, self.frozen_rows - first)] = 0

    def _update(self, number: int, found: tuple[float, dict[str, float]]) -> StepReport:
        loss, terms = found
        broken = bool(self.optimizer.prepare_grads())
        norm = float(self.optimizer.get_grad_norm() or 0.0)
        report = StepReport(loss=loss, terms=terms, grad_norm=norm)
        if broken or not math.isfinite(norm) or not math.isfinite(loss):
            bad = [name for name, value in terms.items() if not math.isfinite(value)]
            what = f"loss {', '.join(bad)} is not finite" if bad else f"the gradient norm is {norm}"
            raise NonFiniteLoss(f"step {number}: {what} on some rank; nothing was updated or saved")
        scale = self.config.scale(number)
        for part in self._parts():
            for group in part.param_groups:
                group["lr"] = self.rate_of_mark[group["lr_mult"]] * scale
            parameters = part.get_parameters()
            if parameters and self.config.clip > 0:
                clip_grad_by_total_norm_fp32(parameters, self.config.clip, norm)
        self.optimizer.step_with_ready_grads()
        return report

    def _parts(self) -> list[Any]:
        parts = getattr(self.optimizer, "chained_optimizers", [self.optimizer])
        return [part for part in parts if not getattr(part, "is_stub_optimizer", False)]

    def _message_length(self, batches: Sequence[Batch]) -> int:
        """Length that the schedule sizes its buffers by; interleaving needs one for all."""
        longest = max(batch.input_ids.shape[1] for batch in batches)
        if self.layout.vpp == 1:
            return longest  # ignored: shapes are sent along
        sizes = sorted({batch.input_ids.shape[0] for batch in batches})
        if len(sizes) > 1:
            raise MeshError(
                f"vpp above 1 needs micro-batches of one size, got {sizes}; change micro_batches "
                "or set parallel.vpp=1"
            )
        multiple = length_multiple(self.megatron)
        length = -(-longest // multiple) * multiple
        for chunk in self.chunks:
            chunk.least_rows = 0
        rows: int = max(self.chunks[0].num_rows(batch) for batch in batches)
        for chunk in self.chunks:
            chunk.least_length, chunk.least_rows = length, rows
        return length + rows * self.layout.cp

    def _check_micro_batches(self, count: int) -> None:
        if self.layout.vpp > 1 and count % self.layout.pp:
            raise MeshError(
                f"vpp above 1 needs a number of micro-batches that pp ({self.layout.pp}) divides, "
                f"got {count}; change micro_batches or set parallel.vpp=1"
            )

    @torch.no_grad()
    def _prepare(self, micro: int, batch: Any, work: Work) -> tuple[int, Batch, dict[str, Tensor]]:
        """Let the rank with the front compute what needs no gradient; send it down the pipeline."""
        if not isinstance(batch, Batch):
            raise MeshError(
                f"a pipeline carries focus.batch.Batch, got {type(batch).__name__}; "
                "set parallel.tp, pp, cp and vpp to 1 for this stage"
            )
        prepared: Batch = batch
        extras: dict[str, Tensor] = {}
        if self.chunks[0].pre_process:
            work.seed(micro, "front")
            prepared, extras = work.prepare(self.chunks[0].front, batch)
        if self.layout.pp > 1:
            prepared, extras = _share(batch, prepared, extras, self.mesh.device)
        return micro, prepared, extras

    def _terms(
        self, collected: Sequence[Mapping[str, Tensor]], count: int
    ) -> tuple[float, dict[str, float]]:
        """Average the terms over micro-batches and data ranks, and tell every rank."""
        everyone: list[list[str]] = [[] for _ in range(self.mesh.size)]
        dist.all_gather_object(everyone, sorted({n for terms in collected for n in terms}))
        names = sorted({name for part in everyone for name in part})
        table = torch.zeros(2, len(names), dtype=torch.float64, device=self.mesh.device)
        speaks = (
            parallel_state.get_tensor_model_parallel_rank() == 0
            and parallel_state.get_context_parallel_rank() == 0
        )
        for terms in collected if speaks else ():
            for i, name in enumerate(names):
                if name in terms:
                    table[0, i] += terms[name].double().reshape(())
                    table[1, i] += 1
        dist.all_reduce(table)
        sums, counts = table.tolist()
        means = {n: s / c for n, s, c in zip(names, sums, counts, strict=True)}
        return sum(sums) / (count * self.mesh.data_size), means

    def stage(self, folder: Path, *, copy: bool = False) -> Staged:
        """Return what writes model and optimizer shards; every rank calls it."""
        from parallel.shards import stage_shards

        return stage_shards(folder / "shards", self.chunks, self.optimizer, copy=copy)

    def load(self, folder: Path) -> None:
        """Restore what was saved at this or any other layout; raises `CheckpointMismatch`.

        Where a folder holds weights alone, the optimizer starts afresh from them.
        """
        from parallel.shards import load_shards

        if (folder / WEIGHTS_ONLY).exists():
            self.load_weights(folder)
            return
        load_shards(folder / "shards", self.chunks, self.optimizer)

    def save_weights(self, folder: Path) -> None:
        """Write the model alone; every rank calls it."""
        from parallel.shards import stage_shards

        staged = stage_shards(folder / "shards", self.chunks, None)
        staged.write()
        staged.finish()
        if self.mesh.leader:
            (folder / WEIGHTS_ONLY).touch()

    def load_weights(self, folder: Path) -> None:
        """Load the model of a checkpoint and bring the optimizer's fp32 copies in line with it."""
        from parallel.shards import load_shards

        load_shards(folder / "shards", self.chunks, None)
        self.optimizer.reload_model_params()

    def export(self, path: Path) -> None:
        """Write the whole model as one safetensors file; every rank calls it."""
        from parallel.export import export_model

        export_model(self.chunks, path)


def _frozen_table_rows(whole: Any) -> int:
    """Return how many rows of the token table stay; raises `MeshError` on gradient hooks."""
    hooked = [name for name, p in whole.named_parameters() if p._backward_hooks]
    if hooked:
        raise MeshError(
            f"a split model keeps no gradient hooks, got some on {hooked}; to keep rows of a table "
            "use parallel.optimizer.freeze_rows"
        )
    return frozen_rows(whole.front.token_embedding.weight)


def _share(
    batch: Batch, prepared: Batch, extras: dict[str, Tensor], device: torch.device
) -> tuple[Batch, dict[str, Tensor]]:
    """Broadcast the tensors that `prepare` made from the first pipeline rank to the others."""
    group = parallel_state.get_pipeline_model_parallel_group()
    source = parallel_state.get_pipeline_model_parallel_first_rank()
    first = dist.get_rank() == source
    made: dict[str, Tensor] = {}
    if first:
        for field in dataclasses.fields(Batch):
            value = getattr(prepared, field.name)
            if value is not getattr(batch, field.name):
                made[f"batch.{field.name}"] = value
        made.update({f"extra.{name}": tensor for name, tensor in extras.items()})
    shapes: list[Any] = [{name: (tuple(t.shape), t.dtype) for name, t in made.items()}]
    dist.broadcast_object_list(shapes, src=source, group=group)
    found: dict[str, Tensor] = {}
    for name, (shape, dtype) in shapes[0].items():
        tensor = (
            made[name].contiguous() if first else torch.empty(shape, dtype=dtype, device=device)
        )
        wire = tensor.to(torch.uint8) if dtype == torch.bool else tensor
        dist.broadcast(wire, src=source, group=group)
        found[name] = wire.to(dtype)
    changed: dict[str, Any] = {
        name.removeprefix("batch."): t for name, t in found.items() if name.startswith("batch.")
    }
    return dataclasses.replace(batch, **changed), {
        name.removeprefix("extra."): t for name, t in found.items() if name.startswith("extra.")
    }
