"""Models on disk: config.json, model.safetensors, the vocabulary and the generation defaults.

Pickles are refused: a checkpoint is data and must not be able to run code.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from focus.config import ConfigError, FocusConfig, from_json, to_json
from focus.errors import CheckpointMismatch

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
ASSETS = Path(__file__).resolve().parents[1] / "assets"  # of a checkout


def find_model(name: str | Path) -> Path:
    """Return the directory that `name` means: a directory, or a model that ships with FOCUS.

    Raises `CheckpointMismatch` when there is none, or when it holds pickles only.
    """
    for path in (Path(name), ASSETS / str(name), *_installed(str(name))):
        if (path / CONFIG).is_file():
            return path
    if Path(name).is_dir():
        pickled = sorted(p.name for p in Path(name).iterdir() if p.suffix in PICKLES)
        advice = f"; {pickled[0]} is a pickle: convert it to safetensors" if pickled else ""
        raise CheckpointMismatch(f"{name}: expected {CONFIG} and {WEIGHTS}, found neither{advice}")
    raise CheckpointMismatch(
        f"no model {str(name)!r}: expected a directory with {CONFIG} and {WEIGHTS}, or focus-tiny"
    )


def _installed(name: str) -> list[Path]:
    """Where a wheel puts the shipped models."""
    try:
        import focus_assets
    except ImportError:
        return []
    return [Path(root) / name for root in focus_assets.__path__]


def read_config(directory: Path) -> FocusConfig:
    """Read the config of a model directory; raises `CheckpointMismatch`."""
    try:
        return from_json(json.loads((directory / CONFIG).read_text()))
    except (OSError, json.JSONDecodeError, ConfigError) as error:
        raise CheckpointMismatch(f"{directory / CONFIG}: {error}") from error


def load_weights(model: nn.Module, path: Path) -> None:
    """Copy a safetensors file into `model`; every tensor must be there and fit.

    Weights stored in half precision are widened. Raises `CheckpointMismatch`, before anything is
    copied.
    """
    own = model.state_dict()
    try:
        with safe_open(path, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            _compare(path, {n: tuple(t.shape) for n, t in own.items()}, shapes, _ties(own))
            for name in shapes:
                with torch.no_grad():
                    own[name].copy_(file.get_tensor(name))
    except (OSError, SafetensorError) as error:
        raise CheckpointMismatch(
            f"{path}: a whole safetensors file expected, got {error}; copy or download it again"
        ) from error


def _ties(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Return, for every tensor that shares memory with an earlier one, the earlier one's name."""
    first: dict[int, str] = {}
    ties: dict[str, str] = {}
    for name, tensor in state.items():
        if tensor.numel():
            owner = first.setdefault(tensor.data_ptr(), name)
            if owner != name:
                ties[name] = owner
    return ties


def _compare(
    path: Path, own: dict[str, Any], saved: dict[str, Any], ties: Mapping[str, str]
) -> None:
    missing = sorted(set(own) - set(saved) - {n for n, o in ties.items() if o in saved})
    unknown = sorted(set(saved) - set(own))
    wrong = [f"{n} {saved[n]} for {own[n]}" for n in own if n in saved and saved[n] != own[n]]
    if missing or unknown or wrong:
        raise CheckpointMismatch(
            f"{path} is not of this config: missing {missing[:3]}, unknown {unknown[:3]}, "
            f"other shapes {wrong[:3]}; use the config.json that lies beside the weights"
        )


def save_model(
    directory: str | Path,
    model: nn.Module,
    config: FocusConfig,
    *,
    dtype: torch.dtype | None = None,
    extra: Mapping[str, str] | None = None,
) -> None:
    """Write config and weights (and `extra` text files by name) atomically.

    Everything is written to a temporary directory beside, then renamed; a model that was there
    before is replaced only at the end. `dtype` narrows floating parameters, not buffers.
    """
    directory = Path(directory)
    temporary = directory.with_name(directory.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        if directory.is_dir():
            for file in directory.iterdir():
                if file.is_file():
                    shutil.copy2(file, temporary)
        state = model.state_dict()
        ties = _ties(state)
        buffers = {name for name, _ in model.named_buffers()}
        kept = {
            name: _narrow(tensor, None if name in buffers else dtype)
            for name, tensor in state.items()
            if name not in ties
        }
        save_file(kept, temporary / WEIGHTS, metadata={"format": "pt"})
        (temporary / CONFIG).write_text(json.dumps(to_json(config), indent=2) + "\n")
        for name, text in (extra or {}).items():
            (temporary / name).write_text(text)
        previous = directory.with_name(directory.name + ".old")
        shutil.rmtree(previous, ignore_errors=True)
        if directory.exists():
            os.rename(directory, previous)
        os.rename(temporary, directory)
        shutil.rmtree(previous, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _narrow(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    narrowed = tensor.detach().cpu()
    if dtype is not None and narrowed.is_floating_point():
        narrowed = narrowed.to(dtype)
    return narrowed.contiguous()
