"""Backends: what runs the parts of a bundle, behind one interface.

    runtime = load("out/bundle", backend="onnx")
    low = runtime.run("vanilla", {"images": images})["low"]
    model = load_model("out/bundle", backend="onnx")          # a `Focus`, every part on the backend

To add a backend: a file here with a `BACKEND`, and its line in `NAMES`.
"""

from __future__ import annotations

from engine.serve.backends.base import NAMES, Backend, Runtime, load
from engine.serve.backends.model import load_model

__all__ = ["NAMES", "Backend", "Runtime", "load", "load_model"]
