"""A pointer alone, fitted to the states that a model kept of one batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from engine.stages.pointing import Pointer, ReadingModel


def fitted_loss(
    model: ReadingModel, pointer: Pointer, loss_of: Callable[[], Tensor | None]
) -> float:
    """Return the loss in the last of 60 steps of the pointer; the states stay as they are."""
    model.states = {layer: states.detach() for layer, states in model.states.items()}
    optimizer = torch.optim.AdamW(pointer.parameters(), lr=3e-3)
    for _ in range(60):
        loss = loss_of()
        assert loss is not None
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())
