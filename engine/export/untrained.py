"""Random weights for a config, drawn tensor by tensor into files: graphs before there is training.

The draws keep values of order one through any depth and leave nothing at zero, so that a comparison
of numbers sees every operator; they are no initialisation to train from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from engine.export.errors import ExportError
from engine.export.mapped import map_model, skeleton
from focus import settings
from focus.config import FocusConfig, to_json
from focus.model import FocusModel
from focus.pretrained import CONFIG
from focus.prompts import training_texts
from focus.shards import ShardWriter, narrow
from focus.vocabulary import Vocabulary

SHARD = 1 << 30  # bytes in memory at a time
TEXT_SIZE = 300  # tokens of a stand-in for the text vocabulary: the bytes and a few words


class Untrained:
    """Stands for a `Focus` in an export: its weights come to be when they are written."""

    def __init__(self, config: FocusConfig, seed: int = 0) -> None:
        self.config, self.seed = config, seed
        self._folder: Path | None = None

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """A vocabulary of bytes with the config's codes; the real text tokens are Qwen2.5's."""
        codes = self.config.semantic.codebook.num_codes, self.config.pixel.codebook.num_codes
        return Vocabulary.train(training_texts(), TEXT_SIZE, *codes)

    def save_pretrained(self, directory: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write a model folder of random weights; memory stays near one shard."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        model = skeleton(self.config, self.seed)
        generator = torch.Generator().manual_seed(self.seed)
        buffers = {name for name, _ in model.named_buffers()}
        tied = {"heads.lm_head.weight"} if self.config.llm.tie_embeddings else set()
        writer = ShardWriter(folder, max_bytes=SHARD)
        for name, tensor in model.state_dict().items():
            if name in buffers:
                writer.add(name, tensor)
            elif name not in tied:
                writer.add(name, narrow(draw(name, tensor.shape, generator), dtype))
        writer.finish()
        (folder / CONFIG).write_text(json.dumps(to_json(self.config), indent=2) + "\n")
        texts: Mapping[str, str] = self.vocabulary.files()
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        (folder / settings.FILE).write_text(settings.write(settings.Settings()))
        self._folder = folder

    @property
    def model(self) -> FocusModel:
        """The model over the files that were written. Raises `ExportError` before that."""
        if self._folder is None:
            raise ExportError("weights on disk expected, got none yet; call save_pretrained first")
        return map_model(self._folder)


def draw(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Return a tensor for a parameter: N(0, 1 / fan_in) for matrices, near 1 for scales."""
    values = torch.randn(shape, generator=generator)
    if len(shape) >= 2:
        return values.mul_((shape.numel() / shape[0]) ** -0.5)
    if name.endswith("weight") or not shape:
        return values.mul_(0.1).add_(1.0)
    return values.mul_(0.02)
