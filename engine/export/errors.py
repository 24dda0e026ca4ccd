"""Errors of export and of the backends that run what was exported."""

from __future__ import annotations


class ExportError(ValueError):
    """A model, bundle or shape that cannot be exported or run; says expected, got, what to do."""


class BundleError(ExportError):
    """A bundle that is corrupt, incomplete, foreign or of another schema version."""


class BackendUnavailable(ValueError):
    """A backend that cannot run here; the message lists the reasons."""
