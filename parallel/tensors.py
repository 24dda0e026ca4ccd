"""Tensors of a training in safetensors files; the writer is `focus.shards.write_tensors`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from focus.shards import write_tensors

__all__ = ["copy_to_host", "read_tensors", "to_device", "unique_tensors", "write_tensors"]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file onto the CPU."""
    return load_file(path)


def copy_to_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors into host memory of their own, wherever they are."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def to_device(model: nn.Module, device: torch.device, parked: Sequence[str] = ()) -> nn.Module:
    """Move a model in place and return it; the modules named in `parked` stay where they are.

    Raises ValueError when the model has no such module.
    """
    kept: dict[str, nn.Module] = {}
    for path in parked:
        try:
            kept[path] = model.get_submodule(path)
        except AttributeError as error:
            names = [name for name, _ in model.named_children()]
            raise ValueError(f"parked: no module {path!r}; modules begin with {names}") from error
    try:
        for path in kept:
            model.set_submodule(path, nn.Identity())
        model.to(device)
    finally:
        for path, module in kept.items():
            model.set_submodule(path, module)
    return model


def unique_tensors(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Split a state dict into tensors without repetition and the aliases {name: kept name}."""
    kept: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[object, ...], str] = {}
    for name, tensor in tensors.items():
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and key in seen:
            aliases[name] = seen[key]
        else:
            seen[key] = name
            kept[name] = tensor
    return kept, aliases
