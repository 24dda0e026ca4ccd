"""Words of a run: the built-in world's vocabulary, and text packed for language modelling."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from engine.data.scenes import texts
from focus.batch import IGNORE, Batch, Source
from focus.config import FocusConfig
from focus.prompts import training_texts
from focus.vocabulary import QWEN_TEXT_SIZE, Vocabulary, VocabularyError

TOKENIZER = "FOCUS_TOKENIZER"  # names the folder of Qwen2.5's tokenizer
TEXT_SIZE = 700  # rows of the built-in world's BPE; its language has some four hundred words
CORPUS = 12_000
PROMPTS = 300  # times that the fixed strings of prompts join the corpus, so each word is one token


@lru_cache(maxsize=4)
def tiny_vocabulary(config: FocusConfig) -> Vocabulary:
    """Return the vocabulary of a config.

    A table with room for Qwen2.5's text takes Qwen2.5's tokenizer, from the folder that the
    environment's FOCUS_TOKENIZER names. A smaller one takes the built-in world's, a small BPE: the
    shipped one when its code counts are the config's, otherwise trained from the world's texts.
    Raises `VocabularyError` when Qwen2.5's is needed and not named.
    """
    counts = config.semantic.codebook.num_codes, config.pixel.codebook.num_codes
    if config.llm.vocab_size > QWEN_TEXT_SIZE:
        source = os.environ.get(TOKENIZER)
        if source is None:
            raise VocabularyError(
                f"{config.name} reads Qwen2.5's text; set {TOKENIZER} to the folder of its "
                "tokenizer.json (`focus import` writes one beside its weights)"
            )
        if (Path(source) / "vocabulary.json").is_file():
            return Vocabulary.load(source)
        return Vocabulary.from_qwen(source, num_semantic=counts[0], num_pixel=counts[1])
    shipped = Path(__file__).resolve().parents[2] / "assets" / "focus-tiny"
    if (shipped / "tokenizer.json").is_file():
        found = Vocabulary.load(shipped)
        if (found.num_semantic, found.num_pixel) == counts:
            return found
    return Vocabulary.train(
        [*texts("train", 0, CORPUS), *training_texts(PROMPTS)],
        TEXT_SIZE,
        *counts,
    )


def text_rows(vocabulary: Vocabulary) -> int:
    """Number of rows of the table before those of pictures."""
    return min(vocabulary.structure.values())


def pack_texts(lines: Iterable[str], vocabulary: Vocabulary) -> Batch:
    """Return one text-only batch, a line a row, each closed by the end-of-text id."""
    encoded = [[*vocabulary.encode(line), vocabulary.eos_id] for line in lines]
    longest = max(map(len, encoded))
    ids = np.full((len(encoded), longest), vocabulary.pad_id, np.int64)
    labels = np.full((len(encoded), longest), IGNORE, np.int64)
    for row, line in enumerate(encoded):
        ids[row, : len(line)] = line
        labels[row, : len(line) - 1] = line[1:]
    shape = ids.shape
    return Batch(
        task="text",
        input_ids=torch.from_numpy(ids),
        labels=torch.from_numpy(labels),
        source=torch.full(shape, int(Source.TOKEN), dtype=torch.uint8),
        grid=torch.full((*shape, 3), -1, dtype=torch.int16),
        condition=torch.full(shape, -1, dtype=torch.int16),
        lengths=torch.tensor([len(line) for line in encoded]),
    )
