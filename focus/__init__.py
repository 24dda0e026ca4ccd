"""FOCUS: one vision-language model that answers, segments, draws and edits.

Heavy imports happen on first use: `from focus import Focus`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from focus.api import Focus as Focus
    from focus.regions import Box as Box
    from focus.regions import Click as Click
    from focus.regions import MaskRegion as MaskRegion
    from focus.regions import Scribble as Scribble

_HOMES = {
    "Focus": "focus.api",
    "Box": "focus.regions",
    "Click": "focus.regions",
    "MaskRegion": "focus.regions",
    "Scribble": "focus.regions",
}
__all__ = ["Box", "Click", "Focus", "MaskRegion", "Scribble"]


def __getattr__(name: str) -> Any:
    """Import a public name from the module that defines it."""
    if name not in _HOMES:
        raise AttributeError(f"module 'focus' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
