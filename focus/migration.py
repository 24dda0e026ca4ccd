"""How models written by earlier releases are read: one step per format version.

A step may rewrite the config and rename tensors. To change the format: raise
`focus.config.FORMAT_VERSION` and add the step from the version before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from focus.config import FORMAT_VERSION, ConfigError

Values = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Step:
    """From one format version to the next: the config's JSON values and the name of a tensor."""

    config: Callable[[Values], Values]
    name: Callable[[str], str]


def _plural(name: str) -> str:
    """Version 1 may call the predictor's modules by their kind; `class` broke torch.export."""
    for part in ("condition", "score"):
        for kind, plural in (("class", "classes"), ("text", "texts"), ("region", "regions")):
            old = f"heads.segment.{part}.{kind}."
            if name.startswith(old):
                return f"heads.segment.{part}.{plural}." + name[len(old) :]
    return name


STEPS: dict[int, Step] = {1: Step(config=lambda values: values, name=_plural)}


def version_of(values: Any) -> int:
    """Return the format version of a config's JSON values; raises `ConfigError`."""
    if not isinstance(values, dict):
        raise ConfigError(f"a config's JSON object expected, got {type(values).__name__}")
    version = values.get("format_version")
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:  # True is an int
        raise ConfigError(
            f"config format version 1 to {FORMAT_VERSION} expected, got {version!r}; "
            "a newer release of focus-vl may have written this file"
        )
    return version


def migrate_config(values: Values) -> Values:
    """Bring a config's JSON values to the current version; raises `ConfigError`."""
    for version in range(version_of(values), FORMAT_VERSION):
        values = {**STEPS[version].config(values), "format_version": version + 1}
    return values


def migrate_name(name: str, version: int) -> str:
    """Return today's name of a tensor that was written at `version`."""
    for step in range(version, FORMAT_VERSION):
        name = STEPS[step].name(name)
    return name
