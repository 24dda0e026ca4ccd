"""How a public checkpoint fills a part of FOCUS: for each of our tensors, a recipe.

A format (one file each in this folder) reads the sizes that the checkpoint states into a config and
returns a `Plan`; `focus.weights.assemble` carries plans out and knows nothing of names.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from focus.errors import CheckpointMismatch
from focus.shards import Weights


@dataclass(frozen=True, kw_only=True)
class Fill:
    """One of our tensors from `names` of the checkpoint; `make` joins or reshapes them.

    optional: it may be missing. loose: it may have another shape, because it meets a part that the
    checkpoint does not bring. In both cases it is newly initialised and the report says so.
    """

    names: tuple[str, ...]
    make: Callable[..., Tensor] | None = None
    optional: bool = False
    loose: bool = False

    def read(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Read the tensors and make ours."""
        tensors = [weights[name] for name in self.names]
        return tensors[0] if self.make is None else self.make(*tensors)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Recipes of one source. `known`: prefixes of tensors that FOCUS has no use for."""

    source: str  # what the user gave, for messages
    format: str  # "Qwen2", "timm ConvNeXt", ...
    weights: Weights
    fills: Mapping[str, Fill] = field(default_factory=dict)

    def check(self, own: Mapping[str, Tensor]) -> None:
        """Raise `CheckpointMismatch` if tensors are missing that must be there."""
        unknown = sorted(set(self.fills) - set(own))
        assert not unknown, f"recipes for tensors the model does not have: {unknown[:3]}"
        missing = sorted(
            name
            for fill in self.fills.values()
            if not fill.optional
            for name in fill.names
            if name not in self.weights
        )
        if missing:
            raise CheckpointMismatch(
                f"{self.source}: a whole {self.format} checkpoint expected, {len(missing)} tensors "
                f"are missing, first {missing[:3]}; is it another model, or one shard of several?"
            )

    def skipped(self) -> list[str]:
        """Tensors of the checkpoint that FOCUS does not use."""
        used = {name for fill in self.fills.values() for name in fill.names}
        return sorted(set(self.weights) - used)


def rename(pairs: Mapping[str, str], **options: Any) -> dict[str, Fill]:
    """Recipes that only rename: ours -> theirs."""
    return {ours: Fill(names=(theirs,), **options) for ours, theirs in pairs.items()}


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON object; raises `CheckpointMismatch`."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointMismatch(f"{path}: the config of {what} expected, found none") from error
    except (OSError, ValueError) as error:
        raise CheckpointMismatch(f"{path}: JSON expected: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointMismatch(f"{path}: an object expected, got {type(values).__name__}")
    return values


def pick(values: Mapping[str, Any], key: str, path: Path) -> Any:
    """One value of a config; raises `CheckpointMismatch` when it is not there."""
    if values.get(key) is None:
        raise CheckpointMismatch(f"{path}: no {key!r} in the config; is it of another model?")
    return values[key]


def prefix_before(names: Weights, suffix: str, what: str) -> str:
    """The prefix under which a checkpoint keeps a model, found by a tensor that it must have."""
    found = sorted({name[: -len(suffix)] for name in names if name.endswith(suffix)}, key=len)
    if not found:
        raise CheckpointMismatch(
            f"{names.path}: {what} expected, found no tensor named *{suffix}; "
            f"it holds {sorted(names)[:3]}"
        )
    return found[0]
