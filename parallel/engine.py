"""One optimizer step over any layout: the interface, and the engine that splits no model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.checkpoint import CheckpointMismatch, Staged
from parallel.mesh import Mesh
from parallel.optimizer import (
    OptimizerConfig,
    RateError,
    check_parked,
    freeze,
    frozen_rows,
    rate_of,
)
from parallel.sections import Work
from parallel.tensors import copy_to_host, read_tensors, to_device, unique_tensors, write_tensors


class NonFiniteLoss(ArithmeticError):
    """A loss or gradient that is not a number; the parameters were not touched."""


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one step measured.

    `terms` are means over the micro-batches (of every data rank) in which a term occurs; `loss` is
    the sum that was minimised.
    """

    loss: float
    terms: Mapping[str, float]
    grad_norm: float


class Engine(Protocol):
    """Owns the model and its optimizer on one layout."""

    model: nn.Module

    def step(self, number: int, batches: Sequence[Any], work: Work) -> StepReport:
        """Accumulate gradients over the micro-batches and step; raises `NonFiniteLoss`."""
        ...

    def stage(self, folder: Path, *, copy: bool = False) -> Staged:
        """Return what writes model and optimizer into an existing folder; every rank calls it.

        With `copy` it holds a copy in host memory, so that training may go on meanwhile.
        """
        ...

    def load(self, folder: Path) -> None:
        """Restore what `stage` gave to write; raises `CheckpointMismatch`."""
        ...

    def export(self, path: Path) -> None:
        """Write the whole model as one safetensors file; every rank calls it."""
        ...


class PlainEngine:
    """The whole model on every process, gradients averaged over the data-parallel ranks.

    The minimised loss is the mean over micro-batches and ranks of the sum of a micro-batch's terms,
    so two ranks with one micro-batch each equal one rank with both. Modules named in `parked`,
    which the steps never call, stay in host memory.
    """

    def __init__(
        self,
        model: nn.Module,
        config: OptimizerConfig,
        mesh: Mesh,
        *,
        precision: str = "fp32",
        ema: float | None = None,
        parked: Sequence[str] = (),
    ) -> None:
        self.model = to_device(model, mesh.device, parked)
        self.config = config
        self.mesh = mesh
        self.precision = precision
        self.ema = ema
        rates = freeze(self.model, config.rates)
        check_parked(rates, parked)
        parameters = dict(self.model.named_parameters())
        self.learning = {name: parameters[name] for name in rates}
        self.optimizers = build_optimizers(self.learning, rates, config)
        self._rates = [[group["lr"] for group in each.param_groups] for each in self.optimizers]
        self.average = (
            {name: p.detach().clone() for name, p in self.learning.items()} if ema else {}
        )

    def step(self, number: int, batches: Sequence[Any], work: Work) -> StepReport:
        """Accumulate gradients over the micro-batches and step; raises `NonFiniteLoss`."""
        self._clear()
        weight = 1.0 / len(batches)
        collected: list[dict[str, Tensor]] = []
        for micro, batch in enumerate(batches):
            work.seed(micro, "front")
            with self._autocast():
                terms = dict(work.losses(self.model, batch))
            total = sum_terms(terms)
            if total.requires_grad:
                torch.autograd.backward(total * weight)
            collected.append({name: term.detach() for name, term in terms.items()})
        if self.mesh.data_size > 1:
            average_gradients(list(self.learning.values()), self.mesh.data_size)
        for p in self.learning.values():
            if p.grad is not None and frozen_rows(p):
                p.grad[: frozen_rows(p)] = 0
        gradients = [p.grad for p in self.learning.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())
        report = _report(collected, norm, self.mesh)
        self._refuse(number, report, collected)
        if self.config.clip > 0:
            torch.nn.utils.clip_grads_with_norm_(
                self.learning.values(), self.config.clip, norm.to(self.mesh.device)
            )
        scale = self.config.scale(number)
        for optimizer, rates in zip(self.optimizers, self._rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * scale
            optimizer.step()
        self._follow()
        return report

    def _clear(self) -> None:
        for parameter in self.learning.values():
            parameter.grad = None

    def _state(self, name: str) -> MutableMapping[Any, Any]:
        """Return the state of whichever optimizer owns a parameter, by its parameters."""
        parameter = self.learning[name]
        for optimizer in self.optimizers:
            if any(p is parameter for group in optimizer.param_groups for p in group["params"]):
                return optimizer.state
        raise KeyError(name)

    def _autocast(self) -> AbstractContextManager[None]:
        if self.precision == "bf16":
            return torch.autocast(self.mesh.device.type, torch.bfloat16)
        return nullcontext()

    def _refuse(
        self, number: int, report: StepReport, collected: Sequence[Mapping[str, Tensor]]
    ) -> None:
        if math.isfinite(report.loss) and math.isfinite(report.grad_norm):
            return
        self._clear()
        bad = [name for name, value in report.terms.items() if not math.isfinite(value)]
        if bad:
            where = [
                i for i, terms in enumerate(collected) for t in terms.values() if not t.isfinite()
            ]
            raise NonFiniteLoss(
                f"step {number}: loss {', '.join(bad)} is not finite (micro-batches {where} of "
                "this rank); nothing was saved; lower the rate or look at these samples"
            )
        raise NonFiniteLoss(
            f"step {number}: the gradient norm is {report.grad_norm} while every loss is finite "
            f"({dict(report.terms)}); nothing was saved; lower the rate or use precision fp32"
        )

    @torch.no_grad()
    def _follow(self) -> None:
        if self.ema:
            targets = list(self.average.values())
            torch._foreach_lerp_(
                targets, [p.detach() for p in self.learning.values()], 1 - self.ema
            )

    def stage(self, folder: Path, *, copy: bool = False) -> Staged:
        """Return what writes model, optimizer and, when averaged, ema.safetensors on the leader."""
        if not self.mesh.leader:
            return Staged()
        tensors, aliases = unique_tensors(self.model.state_dict())
        moments: dict[str, Tensor] = {}
        for name, parameter in self.learning.items():
            for key, value in self._state(name)[parameter].items():
                moments[f"{key}/{name}"] = value
        files = {"model": tensors, "optimizer": moments}
        if self.average:
            files["ema"] = self.average
        if copy:
            files = {name: copy_to_host(part) for name, part in files.items()}
        metadata = {"model": {"aliases": json.dumps(aliases)}}

        def write() -> None:
            for name, part in files.items():
                write_tensors(folder / f"{name}.safetensors", part, metadata.get(name))

        return Staged(write=write)

    def export(self, path: Path) -> None:
        """Write the whole model as one safetensors file, unless a save did so already."""
        if self.mesh.leader and not path.exists():
            tensors, aliases = unique_tensors(self.model.state_dict())
            write_tensors(path, tensors, {"aliases": json.dumps(aliases)})

    def load(self, folder: Path) -> None:
        """Restore what `stage` gave to write, tensor by tensor; raises `CheckpointMismatch`."""
        load_exactly(self.model, read_tensors(folder / "model.safetensors"), folder)
        state: dict[str, dict[str, Tensor]] = {}
        for key, value in read_tensors(folder / "optimizer.safetensors").items():
            kind, name = key.split("/", 1)
            state.setdefault(name, {})[kind] = value
        unknown = sorted(set(state) - set(self.learning))
        if unknown:
            raise CheckpointMismatch(
                f"{folder}: optimizer state for parameters that do not learn in this run: "
                f"{unknown[:5]}; resume with the same rates or start from its weights (init_from)"
            )
        for optimizer in self.optimizers:
            optimizer.state.clear()
        for name, values in state.items():
            device = self.learning[name].device
            self._state(name)[self.learning[name]] = {
                kind: v if kind == "step" else v.to(device) for kind, v in values.items()
            }
        if self.average and (folder / "ema.safetensors").is_file():
            saved = read_tensors(folder / "ema.safetensors")
            self.average = {n: saved[n].to(t.device) for n, t in self.average.items()}


def build_optimizers(
    learning: Mapping[str, nn.Parameter], rates: Mapping[str, float], config: OptimizerConfig
) -> list[torch.optim.Optimizer]:
    """Return AdamW over what learns at `rates`, and Muon over the matrices that config.muon names.

    Raises `RateError` when a glob of config.muon matches no learning matrix.
    """
    chosen = {n: rate_of(n, config.muon) for n, p in learning.items() if p.ndim == 2}
    chosen = {name: rate for name, rate in chosen.items() if rate > 0}
    unused = [g for g in config.muon if not any(fnmatchcase(name, g) for name in chosen)]
    if unused:
        raise RateError(f"muon's rates match no matrix that learns: {unused}")

    def grouped(of: Mapping[str, float]) -> list[dict[str, Any]]:
        groups: dict[float, list[nn.Parameter]] = {}
        for name, rate in of.items():
            groups.setdefault(rate, []).append(learning[name])
        return [{"params": p, "lr": rate} for rate, p in groups.items()]

    rest = {name: rate for name, rate in rates.items() if name not in chosen}
    built: list[torch.optim.Optimizer] = []
    if rest:
        built.append(
            torch.optim.AdamW(
                grouped(rest),
                betas=config.betas,
                eps=config.eps,
                weight_decay=config.weight_decay,
            )
        )
    if chosen:
        built.append(torch.optim.Muon(grouped(chosen), weight_decay=config.weight_decay))
    return built


def sum_terms(terms: Mapping[str, Tensor]) -> Tensor:
    """Sum the scalar terms of one micro-batch; raises ValueError on none or on a non-scalar."""
    if not terms:
        raise ValueError("a stage's losses(...) must return at least one term, got none")
    for name, term in terms.items():
        if term.numel() != 1:
            raise ValueError(f"loss {name!r} must be a scalar, got shape {tuple(term.shape)}")
    return torch.stack([term.float().reshape(()) for term in terms.values()]).sum()


def average_gradients(parameters: Sequence[nn.Parameter], size: int) -> None:
    """Average gradients over all processes in place; a rank without one counts as zero."""
    present = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8)
    present = present.to(parameters[0].device)
    dist.all_reduce(present, op=dist.ReduceOp.MAX)
    chosen = [p for p, used in zip(parameters, present.tolist(), strict=True) if used]
    for p in chosen:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    flat = torch.cat([p.grad.reshape(-1).float() for p in chosen if p.grad is not None])
    dist.all_reduce(flat)
    flat /= size
    offset = 0
    for p in chosen:
        assert p.grad is not None
        p.grad.copy_(flat[offset : offset + p.numel()].view_as(p))
        offset += p.numel()


def _report(collected: Sequence[Mapping[str, Tensor]], norm: Tensor, mesh: Mesh) -> StepReport:
    """Bring every number to the host in one transfer and average it over the data ranks."""
    names = sorted({name for terms in collected for name in terms})
    if mesh.data_size > 1:
        everyone: list[list[str]] = [[] for _ in range(mesh.size)]
        dist.all_gather_object(everyone, names)
        names = sorted({name for part in everyone for name in part})
    device = mesh.device
    zero = torch.zeros((), device=device)
    sums = [
        sum((t[name].float().reshape(()) for t in collected if name in t), zero) for name in names
    ]
    counts = [float(sum(name in t for t in collected)) for name in names]
    values = torch.stack(sums).double()
    table = torch.stack([values, torch.tensor(counts, device=device, dtype=torch.float64)])
    if mesh.data_size > 1:
        dist.all_reduce(table)
    sums_, counts_ = table.tolist()
    micro = len(collected) * mesh.data_size
    return StepReport(
        loss=sum(sums_) / micro,
        terms={n: s / c for n, s, c in zip(names, sums_, counts_, strict=True)},
        grad_norm=float(norm),
    )


def load_exactly(model: nn.Module, saved: Mapping[str, Tensor], source: Path) -> None:
    """Copy `saved` into every tensor of the model; raises `CheckpointMismatch`."""
    own, aliases = unique_tensors(model.state_dict())
    missing = sorted(set(own) - set(saved))
    unknown = sorted(set(saved) - set(own) - set(aliases))
    wrong = [n for n in own if n in saved and own[n].shape != saved[n].shape]
    if missing or unknown or wrong:
        shapes = [f"{n} {tuple(saved[n].shape)} into {tuple(own[n].shape)}" for n in wrong[:3]]
        raise CheckpointMismatch(
            f"{source} holds another model: missing {missing[:3]}, unknown {unknown[:3]}, "
            f"shapes {shapes}; use the config that it was trained with"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(saved[name])
