"""Models whose weights stay in the files of their folder: read when touched, never copied.

What is exported or compared part by part then needs the memory of one part, not of the model.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from focus.config import FocusConfig
from focus.errors import CheckpointMismatch
from focus.model import FocusModel
from focus.pretrained import SkipRandom, read_config
from focus.shards import Weights


def skeleton(config: FocusConfig, seed: int = 0) -> FocusModel:
    """Build a model whose weights nobody has filled: address space, hardly any memory.

    Buffers (codebooks, means) have their values; `seed` draws the codebooks.
    """
    with torch.random.fork_rng(devices=[]), SkipRandom():
        torch.manual_seed(seed)
        return FocusModel(config).eval().requires_grad_(False)


def map_model(folder: str | Path) -> FocusModel:
    """Return the model of a folder over its mapped files, in the precision of the files.

    For folders of today's format (`Focus.from_pretrained` migrates older ones, and copies).
    Raises `CheckpointMismatch`: a tensor is missing or of another shape.
    """
    folder = Path(folder)
    config = read_config(folder)
    model, weights = skeleton(config), Weights.open(folder)
    state: dict[str, Tensor] = {}
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in weights:  # in the order of the files: each is mapped once
        if expected.get(name) != weights.shape(name):
            raise CheckpointMismatch(
                f"{folder}: {name} {expected.get(name)} expected, got {weights.shape(name)}; use "
                "the config.json that lies beside the weights"
            )
        state[name] = weights[name]
    tied = {"heads.lm_head.weight"} if config.llm.tie_embeddings else set()
    missing = sorted(set(expected) - set(state) - tied)
    if missing:
        raise CheckpointMismatch(
            f"{folder}: {missing[0]} expected, but it is not there; export or save the model again"
        )
    model.load_state_dict(state, strict=False, assign=True)
    if config.llm.tie_embeddings:
        model.heads.lm_head.weight = model.front.token_embedding.weight
    return model.requires_grad_(False)
