"""The optimizer of a split model: a rate per part, through megatron-core's parameter groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from parallel import cpu
from parallel.layout import ParallelConfig
from parallel.optimizer import OptimizerConfig, RateError, rate_of

cpu.install()

from megatron.core.optimizer import OptimizerConfig as AdamConfig  # noqa: E402
from megatron.core.optimizer import get_megatron_optimizer  # noqa: E402
from megatron.core.optimizer.optimizer_config import (  # noqa: E402
    ParamKey,
    ParamWithNamePredicate,
)

from parallel.model import SplitModel  # noqa: E402


def learning_rates(
    chunks: Sequence[SplitModel], config: OptimizerConfig
) -> dict[nn.Parameter, float]:
    """Freeze this rank's parameters and return the rates of the others."""
    rates: dict[nn.Parameter, float] = {}
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if not name.startswith("llm."):
                rates[parameter] = rate_of(name, config.rates)
        for name, parameter, made_of in chunk.llm.entries():
            found = {rate_of(part, config.rates) for part in made_of.names}
            if len(found) > 1:
                raise RateError(
                    f"{made_of.names} are one tensor under megatron ({name}), so they need one "
                    f"rate, got {sorted(found)}"
                )
            rates[parameter] = found.pop()
    for parameter, rate in rates.items():
        parameter.requires_grad_(rate > 0 and parameter.is_floating_point())
    return {parameter: rate for parameter, rate in rates.items() if parameter.requires_grad}


def build_optimizer(
    wrapped: Sequence[nn.Module],
    rates: Mapping[nn.Parameter, float],
    config: OptimizerConfig,
    layout: ParallelConfig,
    dtype: torch.dtype,
) -> tuple[Any, dict[float, float]]:
    """Return megatron's optimizer and {mark: rate}.

    Groups are told apart on load by `lr_mult` alone, which the rate does not set here, so it serves
    as a mark: one per rate and dtype (a group must not mix dtypes, or its state is permuted).
    """
    everyone: list[Any] = [None] * dist.get_world_size()
    own = sorted({(rate, str(p.dtype)) for p, rate in rates.items()})
    dist.all_gather_object(everyone, own)
    kinds = sorted({kind for part in everyone for kind in part})
    overrides, marks = {}, {}
    for number, kind in enumerate(kinds):
        members = {id(p) for p, rate in rates.items() if (rate, str(p.dtype)) == kind}
        mark = 1.0 + number
        marks[mark] = kind[0]

        def belongs(parameter: nn.Parameter, _: str, members: set[int] = members) -> bool:
            return id(parameter) in members

        key = ParamKey(with_name_predicate=ParamWithNamePredicate(name=str(kind), fn=belongs))
        overrides[key] = {"max_lr": kind[0], "min_lr": kind[0], "lr_mult": mark}
    base = kinds[-1][0]
    adam = AdamConfig(
        optimizer="adam",
        lr=base,
        min_lr=0.0,
        weight_decay=config.weight_decay,
        adam_beta1=config.betas[0],
        adam_beta2=config.betas[1],
        adam_eps=config.eps,
        clip_grad=config.clip,
        use_distributed_optimizer=layout.distributed_optimizer,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
    )
    return get_megatron_optimizer(adam, list(wrapped), config_overrides=overrides), marks
