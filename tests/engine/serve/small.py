"""A FOCUS of every part, small enough that a test takes moments."""

from __future__ import annotations

import dataclasses
from functools import cache

import numpy as np
import torch

from focus.api import Focus
from focus.buckets import bucket_of
from focus.config import FocusConfig
from focus.generate import State
from focus.inputs import collate
from focus.model import FocusModel
from focus.presets import focus_tiny
from focus.request import Request
from focus.sampling import Sampling
from focus.settings import Settings
from focus.vocabulary import Vocabulary

DRAW = Sampling(temperature=1.0, top_k=(60, 80), top_p=0.95)
GUIDED = Sampling(temperature=1.0, top_k=(60, None), guidance=2.0)
SETTINGS = Settings(
    words=6, generation=GUIDED, editing=DRAW, steps=2, decoder="pixel", keep_tokens=False
)


def small_config() -> FocusConfig:
    tiny = focus_tiny()
    change = dataclasses.replace
    return change(
        tiny,
        name="small",
        vanilla=change(tiny.vanilla, image_size=(56, 56), depth=1, dim=32, num_heads=2, out_dim=32),
        hierarchical=change(
            tiny.hierarchical, image_size=(64, 64), depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)
        ),
        fusion=change(tiny.fusion, dim=32, num_heads=2),
        adapter=change(tiny.adapter, num_queries=4, dim=32, num_heads=2),
        semantic=change(tiny.semantic, depth=1, dim=32, num_heads=2),
        pixel=change(
            tiny.pixel,
            encoder_channels=8,
            decoder_channels=8,
            multipliers=(1, 1, 1, 2, 2),
            attention_levels=(4,),
        ),
        llm=change(
            tiny.llm,
            num_layers=2,
            dim=48,
            num_heads=6,
            num_kv_heads=2,
            head_dim=8,
            ffn_dim=64,
            max_length=320,
            tie_embeddings=False,
        ),
        segment=change(
            tiny.segment, dim=32, num_queries=5, num_heads=2, decoder_layers=1, encoder_ffn_dim=32
        ),
    )


@cache
def small() -> Focus:
    """The model, untrained; its tables are large, so that tokens matter and choices are clear."""
    torch.manual_seed(4)
    model = FocusModel(small_config()).requires_grad_(False)
    torch.nn.init.normal_(model.front.token_embedding.weight)
    torch.nn.init.normal_(model.heads.lm_head.weight, std=0.6)
    for name, table in model.front.named_parameters():
        if name.startswith(("position.", "next_position.")):
            table.mul_(25)
    return Focus(model, Vocabulary.load("assets/focus-tiny"), SETTINGS)


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (48, 64, 3), dtype=np.uint8)


def edits(num: int) -> list[Request]:
    texts = (
        "remove the red circle",
        "make it blue, now",
        "add one",
        "paint all of it in green, please",
    )
    return [
        Request(task="editing", text=texts[row % 4], image=picture(row), seed=40 + row)
        for row in range(num)
    ]


def read(focus: Focus, requests: list[Request]) -> State:
    """The state after the prompts, read at once by the plain trunk."""
    return focus.pipeline().open(requests).state


def unconditional(focus: Focus, requests: list[Request]) -> State:
    return read(focus, [dataclasses.replace(request, text="") for request in requests])


def num_positions(focus: Focus, requests: list[Request]) -> list[int]:
    batch = collate(requests, focus.config, focus.vocabulary, until="answer")
    return [int(length) for length in batch.lengths]


BUCKET = bucket_of(small_config())
