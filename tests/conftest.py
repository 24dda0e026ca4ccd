"""One thread per test process, a cache of its own, no network, and no gpu test without a GPU."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

import pytest

for name, value in (
    ("OMP_NUM_THREADS", "1"),
    ("HF_HUB_OFFLINE", "1"),
    ("TOKENIZERS_PARALLELISM", "false"),
):
    os.environ.setdefault(name, value)

if "FOCUS_CACHE" not in os.environ:
    _cache = tempfile.mkdtemp(prefix="focus-cache-")
    os.environ["FOCUS_CACHE"] = _cache
    _owner = os.getpid()  # children run the exit handlers as well

    @atexit.register
    def _forget() -> None:
        if os.getpid() == _owner:
            shutil.rmtree(_cache, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
