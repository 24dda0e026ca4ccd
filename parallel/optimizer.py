"""Which parameters learn, at which rate, and by which rule."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

from torch import nn

Schedule = Literal["constant", "cosine"]


class RateError(ValueError):
    """Learning rates that do not fit the model's parameter names."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule. `rates` maps globs over parameter names to learning rates.

    The first glob that matches a name decides; a name that matches none, or whose rate is 0, is
    frozen. `warmup` counts steps; `floor` is the last rate of "cosine" as a fraction of the first.
    `muon` maps globs to rates in the same way: learning matrices that match follow Muon
    (`torch.optim.Muon`: momentum .95, orthogonalised) at that rate instead of AdamW.
    """

    rates: Mapping[str, float]
    muon: Mapping[str, float] = field(default_factory=dict)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0
    schedule: Schedule = "constant"
    warmup: int = 0
    steps: int = 1
    floor: float = 0.0

    def scale(self, step: int) -> float:
        """Factor on every rate at `step` (0 is the first)."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.schedule == "constant":
            return 1.0
        done = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * done))


def rate_of(name: str, rates: Mapping[str, float]) -> float:
    """Learning rate of one parameter name; 0 means frozen."""
    for glob, rate in rates.items():
        if fnmatchcase(name, glob):
            return rate
    return 0.0


def freeze(model: nn.Module, rates: Mapping[str, float]) -> dict[str, float]:
    """Set `requires_grad` from `rates`; return {name: rate} of what learns.

    Raises `RateError` when a glob matches no parameter or nothing learns.
    """
    names = [name for name, _ in model.named_parameters()]
    unused = [g for g in rates if not any(fnmatchcase(name, g) for name in names)]
    if unused:
        heads = sorted({name.split(".")[0] for name in names})
        raise RateError(f"rates match no parameter: {unused}; names begin with {heads}")
    learning: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        rate = rate_of(name, rates)
        parameter.requires_grad_(rate > 0 and parameter.is_floating_point())
        if parameter.requires_grad:
            learning[name] = rate
    if not learning:
        raise RateError(f"nothing learns: no rate above 0 in {dict(rates)}")
    return learning


def check_parked(learning: Iterable[str], parked: Sequence[str]) -> None:
    """Raise `RateError` when a parameter of a module that stays in host memory learns."""
    both = [n for n in learning if any(n.startswith(f"{path}.") for path in parked)]
    if both:
        raise RateError(f"parked modules {list(parked)} cannot learn, got rates for {both[:3]}")


def freeze_rows(parameter: nn.Parameter, count: int) -> None:
    """Let the first `count` rows of a learning table stay as they are, on every engine.

    Engines set the gradient of these rows to zero; use it instead of a gradient hook, which a split
    table would not have.
    """
    parameter.frozen_rows = count  # type: ignore[attr-defined]


def frozen_rows(parameter: nn.Parameter) -> int:
    """Return what `freeze_rows` was told, or 0."""
    return int(getattr(parameter, "frozen_rows", 0))
