"""Errors that floor 2 raises. Every message says what was expected, what came, and what to do."""

from __future__ import annotations


class ShapeError(ValueError):
    """A tensor whose shape does not fit the module it was given to."""


class CheckpointMismatch(ValueError):
    """A state dict whose names or shapes do not fit the module it was read for."""


class TargetError(ValueError):
    """A folder that a model cannot be written to without losing what somebody else put there."""
