"""Where a source lies: a local directory or file, or a hub id that is fetched once."""

from __future__ import annotations

import re
from pathlib import Path

from focus.errors import CheckpointMismatch

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
WANTED = ["*.safetensors", "*.json", "*/*.safetensors", "*/*.json", "merges.txt"]


def locate(source: str | Path) -> Path:
    """Return a local path of `source`; a hub id ("Qwen/Qwen2.5-3B") is downloaded or found cached.

    Only safetensors and JSON are fetched, never pickles. Raises `CheckpointMismatch`.
    """
    path = Path(source)
    if path.exists():
        return path
    if not HUB_ID.fullmatch(str(source)) or path.is_absolute():
        raise CheckpointMismatch(
            f"{source}: a directory, a safetensors file or a hub id (owner/name) expected, "
            "but there is no such path"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), allow_patterns=WANTED))
    except Exception as error:  # many kinds: offline, not found, no permission
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointMismatch(
            f"{source}: no such directory, and the hub did not give it ({first}); download it and "
            "give the directory"
        ) from error
