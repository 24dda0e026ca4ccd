"""Shipped launch settings: one JSON per operator and architecture, looked up by shape class.

A table is `kernels/<operator>/tuning/<architecture>.json`, from a shape class such as
"forward/C192/float16" to launch settings. Without a table or an entry the caller's heuristic is
used. Nothing is measured at import or at the first call; `python -m kernels.tune` measures.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent


def architecture(device: torch.device) -> str:
    """Return the name of a table: sm_90, ... or the device type."""
    if device.type != "cuda":
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def path(operator: str, arch: str) -> Path:
    """Return where an operator's table of an architecture lies."""
    return ROOT / operator / "tuning" / f"{arch}.json"


@lru_cache(maxsize=32)
def table(operator: str, arch: str) -> dict[str, dict[str, int]]:
    """Return a shipped table, empty when there is none."""
    at = path(operator, arch)
    if not at.is_file():
        return {}
    entries: dict[str, dict[str, int]] = json.loads(at.read_text())["entries"]
    return entries


def lookup(
    operator: str, key: str, device: torch.device, default: dict[str, int]
) -> dict[str, int]:
    """Return the tuned settings of a shape class, or the default; keys are those of the default."""
    found = table(operator, architecture(device)).get(key, {})
    return {name: int(found.get(name, value)) for name, value in default.items()}
