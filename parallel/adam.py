"""AdamW that counts steps per parameter group, as the fused optimizers of apex and TE do.

megatron-core's distributed optimizer cannot resume from `torch.optim.Adam`, whose step counters
belong to parameters. With this class it takes the same path as on a GPU with apex.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class GroupAdam(torch.optim.Optimizer):
    """AdamW with bias correction.

    m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2
    p <- (1 - lr wd) p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        bias_correction: bool = True,
    ) -> None:
        if not (adam_w_mode and bias_correction):
            raise ValueError("GroupAdam has decoupled weight decay and bias correction only")
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "bias_correction": bias_correction,
            },
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            group["step"] = count = int(group.get("step", 0)) + 1
            for p in parameters:
                if not self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
                    self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
            first = [self.state[p]["exp_avg"] for p in parameters]
            second = [self.state[p]["exp_avg_sq"] for p in parameters]
            gradients = [p.grad for p in parameters]
            beta1, beta2 = group["betas"]
            if group["weight_decay"]:
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_lerp_(first, gradients, 1 - beta1)
            torch._foreach_mul_(second, beta2)
            torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
            scale = torch._foreach_sqrt(second)
            torch._foreach_div_(scale, (1 - beta2**count) ** 0.5)
            torch._foreach_add_(scale, group["eps"])
            torch._foreach_addcdiv_(parameters, first, scale, -group["lr"] / (1 - beta1**count))
