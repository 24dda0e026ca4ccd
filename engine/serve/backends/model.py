"""A `Focus` whose sections run on a backend: the pipeline, prompts and decoding stay the same."""

# B batch, T positions, D width, S slots of the cache

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.export.bundle import Bundle
from engine.serve.backends.base import Runtime, load
from engine.serve.backends.sections import (
    RunAdapter,
    RunAutoencoder,
    RunDenoiser,
    RunFusion,
    RunMaps,
    RunSegmenter,
    RunTokenizer,
    RunTrunk,
    RunVanilla,
)
from focus import settings
from focus.api import Focus
from focus.config import FocusConfig
from focus.errors import CheckpointMismatch
from focus.model import FocusModel
from focus.pretrained import read_config
from focus.shards import Weights
from focus.vocabulary import Vocabulary


def load_model(bundle: str | Path | Bundle, backend: str = "eager") -> Focus:
    """Return the model of a bundle; all its parts run on the backend.

    The weights that stay outside the parts (token table, positions, region pooling) are read from
    the bundle; those inside are never read by PyTorch. Raises as `load` does.
    """
    if backend == "eager":
        opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        return Focus.from_pretrained(opened.folder)
    runtime = load(bundle, backend)
    folder = runtime.bundle.folder
    config = read_config(folder)
    model = assemble(runtime, config)
    return Focus(model, Vocabulary.load(folder), settings.read(folder))


def assemble(runtime: Runtime, config: FocusConfig) -> FocusModel:
    """Build the model without weights, put the parts in their places, read what is left."""
    with torch.device("meta"):
        model = FocusModel(config)
    front, heads = model.front, model.heads
    replaced: Sequence[tuple[nn.Module, str, nn.Module]] = (
        (front, "vanilla", RunVanilla(runtime)),
        (front, "hierarchical", RunMaps(runtime)),
        (front, "fusion", RunFusion(runtime, config)),
        (front, "tokenizer", RunTokenizer(runtime)),
        (model, "trunk", RunTrunk(runtime, config)),
        (heads, "segment", RunSegmenter(runtime)),
        (heads.diffusion, "unet", RunDenoiser(runtime, config)),
        (heads.diffusion, "vae", RunAutoencoder(runtime)),
    )
    for owner, name, module in replaced:
        setattr(owner, name, module)
    if front.adapter is not None:
        replacement: Any = RunAdapter(runtime, config)
        front.adapter = replacement
    _read_rest(model, Weights.open(runtime.bundle.folder))
    return model.eval().requires_grad_(False)


def _read_rest(model: FocusModel, weights: Weights) -> None:
    """Give the modules that no part replaced their weights; raises `CheckpointMismatch`."""
    tied = model.config.llm.tie_embeddings
    state: dict[str, Tensor] = {}
    for name in model.state_dict():
        if name == "heads.lm_head.weight" and tied:
            continue
        if name not in weights:
            raise CheckpointMismatch(
                f"{weights.path}: {name} expected, but it is not there; export the model again"
            )
        state[name] = weights[name].float()
    model.load_state_dict(state, strict=False, assign=True)
    if tied:
        model.heads.lm_head.weight = model.front.token_embedding.weight
