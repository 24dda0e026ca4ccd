"""The paper's layout end to end: its tokens, queries, strides, picture sizes, in narrow widths."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from focus import Box, Focus
from focus.buckets import buckets_for
from focus.config import (
    FocusConfig,
    VAEConfig,
)
from focus.info import build_meta, measure
from focus.model import FocusModel
from focus.presets import focus_3b, focus_3b_shallow
from focus.prompts import training_texts
from focus.sampling import Sampling
from focus.settings import Settings
from focus.tokenizer.dual import Codes
from focus.vocabulary import QWEN_PIXEL, QWEN_SEMANTIC, Vocabulary

TEXTS = [*training_texts(), "make it red", "circle, star, background", "what is it?"]


def narrow(config: FocusConfig) -> FocusConfig:
    """Every width about a thirtieth; every count of tokens and queries as it is."""
    return replace(
        config,
        name="narrow",
        vanilla=replace(config.vanilla, dim=64, num_heads=2, out_dim=96),
        hierarchical=replace(config.hierarchical, depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)),
        fusion=replace(config.fusion, dim=64, num_heads=2),
        adapter=replace(config.adapter, dim=32, num_heads=2),
        semantic=replace(config.semantic, depth=1, dim=64, num_heads=2),
        pixel=replace(config.pixel, encoder_channels=32, decoder_channels=32, norm_groups=8),
        llm=replace(config.llm, dim=64, num_heads=4, head_dim=16, ffn_dim=128, vocab_size=131_584),
        segment=replace(
            config.segment, dim=32, num_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32
        ),
        diffusion=replace(
            config.diffusion,
            channels=(16, 32, 64),
            transformer_depth=(0, 1, 1),
            head_dim=16,
            context_dim=64,
            norm_groups=8,
            vae=VAEConfig(channels=(8, 8, 16, 16), layers_per_block=1, norm_groups=4),
        ),
    )


def make(config: FocusConfig) -> Focus:
    torch.manual_seed(0)
    vocabulary = Vocabulary.train(TEXTS, 300, QWEN_SEMANTIC, QWEN_PIXEL)
    quick = Sampling(temperature=1.0, top_k=(2048, 6144), guidance=1.0)
    settings = Settings(words=1, steps=1, generation=quick)
    return Focus(FocusModel(config), vocabulary, settings)


@pytest.fixture(scope="module")
def model() -> Focus:
    return make(narrow(focus_3b_shallow()))


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (120, 200, 3), np.uint8)


def run_every_task(model: Focus, photo: np.ndarray) -> None:
    found = model.segment(photo, "circle")
    assert found.masks[0].shape == (120, 200)
    assert model.segment(photo, "circle, star, background", task="class").labels is not None
    regions = [Box(10, 10, 60, 60), Box(90, 10, 150, 100)]
    assert model.segment(photo, regions=regions).labels == [0, 1]
    assert isinstance(model.chat(photo, "what is it?"), str)
    edited = model.edit(photo, "make it red", region=regions[0])
    assert edited.image.size == (200, 120) and edited.raw.size == (512, 512)
    assert edited.mask.shape == (120, 200)


def test_every_task_runs_in_the_papers_layout(model: Focus, photo: np.ndarray) -> None:
    config = model.config
    assert (config.adapter.num_queries, config.segment.num_queries) == (128, 100)
    assert model.vocabulary.size <= config.llm.vocab_size
    run_every_task(model, photo)


def test_pictures_come_in_the_bucket_that_was_wished_for(model: Focus) -> None:
    drawn = model.generate("a star", size=(300, 400))
    assert drawn.size == (1024, 768)  # bucket 384 x 512, enlarged twice
    assert {bucket.size for bucket in buckets_for(model.config)} >= {(384, 512), (1024, 256)}


def test_a_painted_picture_does_not_depend_on_its_batch(model: Focus) -> None:
    codes = Codes(
        semantic=torch.zeros(2, 9, 9, dtype=torch.int64),
        pixel=torch.zeros(2, 16, 16, dtype=torch.int64),
    )
    pipeline = model.pipeline()
    both = pipeline.paint(codes, None, [3, 4])
    one = pipeline.paint(Codes(codes.semantic[1:], codes.pixel[1:]), None, [4])
    assert both.shape == (2, 3, 512, 512)
    alike = float((both[1:] - one).abs().max())  # one step from noise multiplies rounding
    apart = float((both[1:] - both[:1]).abs().max())
    assert alike < 1e-3 < 0.1 < apart


def test_shallow_model_has_full_widths() -> None:
    shallow, full = build_meta(focus_3b_shallow()), build_meta(focus_3b())
    wide = {name: p.shape for name, p in full.named_parameters()}
    different = {
        name
        for name, parameter in shallow.named_parameters()
        if name in wide and wide[name] != parameter.shape
    }
    # one block fewer per level moves where the pixel branch and the UNet change width
    assert all(name.startswith("front.tokenizer.pixel_") for name in different), different
    assert sum(p.numel() for p in shallow.parameters()) < 2.6e9


@pytest.mark.slow
def test_full_model_runs_on_fake_tensors() -> None:
    steps = measure(focus_3b(), next(b for b in buckets_for(focus_3b()) if b.size == (768, 384)))
    assert steps.unet > 1e12


@pytest.mark.slow
def test_every_task_runs_at_full_width(photo: np.ndarray) -> None:
    """Needs 12 GB of memory and some minutes."""
    run_every_task(make(focus_3b_shallow()), photo)
