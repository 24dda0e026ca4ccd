"""The paper's layout end to end: its tokens, queries, strides, picture sizes, in narrow widths."""

from __future__ import annotations

import dataclasses
import resource
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from focus import Box, Focus
from focus.buckets import buckets_for
from focus.config import FocusConfig, VAEConfig
from focus.info import build_meta, fake_model, measure
from focus.inputs import collate
from focus.model import FocusModel
from focus.presets import focus_3b, focus_3b_shallow
from focus.pretrained import parameters_in
from focus.prompts import TASKS, training_texts
from focus.request import Request
from focus.sampling import Sampling
from focus.segment.infer import Thresholds
from focus.segment.tracker import bi_softmax
from focus.settings import Settings
from focus.tokenizer.dual import Codes
from focus.video import track_classes
from focus.vocabulary import QWEN_PIXEL, QWEN_SEMANTIC, Vocabulary

T = TypeVar("T")
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


def make(config: FocusConfig, dtype: torch.dtype | None = None) -> Focus:
    torch.manual_seed(0)
    quick = Sampling(temperature=1.0, top_k=(2048, 6144), guidance=1.0)
    settings = Settings(words=1, steps=1, generation=quick, editing=quick)
    with parameters_in(dtype):
        return Focus(FocusModel(config), words(), settings)


def words() -> Vocabulary:
    return Vocabulary.train(TEXTS, 300, QWEN_SEMANTIC, QWEN_PIXEL)


@pytest.fixture(scope="module")
def model() -> Focus:
    return make(narrow(focus_3b_shallow()))


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (120, 200, 3), np.uint8)


def run_every_task(model: Focus, photo: np.ndarray) -> dict[str, float]:
    """Run every task of `Focus`, pictures and clips; return the seconds of each."""
    seconds: dict[str, float] = {}

    def timed(task: str, run: Callable[[], T]) -> T:
        began = time.monotonic()
        result = run()
        seconds[task] = round(time.monotonic() - began, 1)
        return result

    regions = [Box(10, 10, 60, 60), Box(90, 10, 150, 100)]
    for task in ("referring", "reasoning"):
        found = timed(task, lambda task=task: model.segment(photo, "circle", task=task))  # type: ignore[misc]
        assert found.masks[0].shape == (120, 200) and np.isfinite(found.scores).all()
    named = timed("class", lambda: model.segment(photo, "circle, star, background", task="class"))
    assert named.labels is not None
    marked = timed("interactive", lambda: model.segment(photo, regions=regions))
    assert marked.labels == [0, 1]
    assert isinstance(timed("vqa", lambda: model.chat(photo, "what is it?")), str)
    edited = timed("editing", lambda: model.edit(photo, "make it red", region=regions[0]))
    assert edited.image.size == (200, 120) and edited.raw.size == (512, 512)
    assert edited.mask.shape == (120, 200)
    drawn = timed("generation", lambda: model.generate("a star"))
    assert drawn.size == (512, 512) and len(np.unique(np.asarray(drawn))) > 1
    run_clips(model, [photo, photo[:, ::-1].copy(), photo], regions, timed)
    return seconds


def run_clips(model: Focus, clip: list[np.ndarray], regions: list[Box], timed: Any) -> None:
    """Masks spread from the middle, words, classes by embedding, an edited clip."""
    spread = timed("propagation", lambda: model.track(clip, regions=regions, start=1))
    assert spread.start == 1 and [len(masks) for masks in spread.masks] == [3, 3]
    assert np.isfinite(spread.scores).all()
    told = timed("video by words", lambda: model.track(clip, "circle"))
    assert [mask.shape for mask in told.masks[0]] == [(120, 200)] * 3
    limits = Thresholds(object=0.0)  # random scores: all that is drawn is an object
    names = ["circle", "star"]
    tracks = timed("tracking", lambda: track_classes(model, clip[:2], names, thresholds=limits))
    assert set(tracks.names) <= set(names)
    edits = timed("video editing", lambda: model.edit_clip(clip[:1], "make it red"))
    assert edits[0].raw.size == (512, 512)


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
def test_every_task_runs_at_full_width(photo: np.ndarray) -> None:
    """focus_3b_shallow, weights in bf16: 6 GB of memory and some minutes."""
    began = time.monotonic()
    model = make(focus_3b_shallow(), torch.bfloat16)
    built = round(time.monotonic() - began, 1)
    weight = model.model.front.token_embedding.weight
    assert weight.dtype == torch.bfloat16 and weight.shape == (283_136, 2048)
    told = {"built": built, **run_every_task(model, photo)}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"seconds: {told}; peak memory {peak:.1f} GiB")


SEGMENTED = ("class", "referring", "reasoning", "interactive", "editing")


def requests_of(task: str, photo: np.ndarray) -> Request:
    mask = np.zeros(photo.shape[:2], np.bool_)
    mask[10:60, 10:60] = True
    image = None if task == "generation" else photo
    if task == "class":
        return Request(task=task, image=image, classes=("circle", "star"))
    if task == "interactive":
        return Request(task=task, image=image, regions=(mask, mask))
    if task == "editing":
        return Request(task=task, image=image, text="make <region> red", regions=(mask,))
    return Request(task=task, image=image, text="a star")


def to_fake(value: Any) -> Any:
    """The same batch of fake tensors; single numbers keep their value, as code reads them."""
    if isinstance(value, Tensor):
        if value.numel() == 1:
            return torch.tensor(value.tolist())
        return torch.empty(value.shape, dtype=value.dtype)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        return replace(value, **{name: to_fake(getattr(value, name)) for name in names})
    return value


@pytest.fixture(scope="module")
def paper() -> tuple[FakeTensorMode, FocusModel]:
    """focus_3b itself, of fake tensors: full depth and width, shapes without memory."""
    mode = FakeTensorMode()
    with mode, torch.no_grad():
        return mode, fake_model(focus_3b())


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_the_papers_shapes_at_full_size(
    paper: tuple[FakeTensorMode, FocusModel], photo: np.ndarray, task: str
) -> None:
    mode, model = paper
    config = model.config
    batch = collate([requests_of(task, photo)], config, words())
    with mode, torch.no_grad():
        fake = to_fake(batch)
        hidden, features = model(fake)
        tokens = batch.input_ids.shape[1]
        assert hidden.shape == (1, tokens, 2048)
        assert model.logits(hidden[:, -1:]).shape == (1, 1, 283_136)
        if features is not None:
            assert [tuple(m.shape[1:]) for m in features.maps] == [
                (192, 192, 192),
                (384, 96, 96),
                (768, 48, 48),
                (1536, 24, 24),
            ]
            assert features.adapter.shape == (1, 128, 2048)
        if task in SEGMENTED:
            assert features is not None
            found = model.heads.predict_masks(hidden, fake, features.maps)
            candidates = {"class": 3, "interactive": 2}.get(task, 1)
            assert found.masks.shape == (1, 100, 192, 192) and len(found.auxiliary) == 9
            assert found.scores.shape == (1, 100, candidates)
            assert found.embeddings.shape == (1, 100, 256)
        if task in ("editing", "generation"):
            paint(model, torch.empty(1, 1, 768, 768) if task == "editing" else None)


def paint(model: FocusModel, mask: Tensor | None) -> None:
    """Codes of the model's own bucket to a picture of twice its size."""
    tokenizer, diffusion = model.front.tokenizer, model.heads.diffusion
    codes = Codes(
        semantic=torch.zeros(1, 9, 9, dtype=torch.int64),
        pixel=torch.zeros(1, 16, 16, dtype=torch.int64),
    )
    assert tokenizer.decode(codes).shape == (1, 3, 256, 256)
    resized, context = diffusion.conditions(tokenizer.embed(codes), mask, (64, 64))
    noisy, step = torch.empty(1, 4, 64, 64), torch.zeros(1, dtype=torch.int64)
    latents = diffusion.predict(noisy, resized, step, context)
    assert diffusion.vae.decode(latents).shape == (1, 3, 512, 512)


def test_clips_have_the_papers_shapes_at_full_size(
    paper: tuple[FakeTensorMode, FocusModel], photo: np.ndarray
) -> None:
    """Propagation: vectors pooled from one frame stand for the regions of the next."""
    mode, model = paper
    batch = collate([requests_of("interactive", photo)], model.config, words(), until="answer")
    assert batch.pictures is not None and batch.region_points is not None
    with mode, torch.no_grad():
        fake = to_fake(batch)
        seen = model.front.encode(fake.pictures)
        vectors = model.front.pool_regions(seen, fake.region_points)
        assert vectors.shape == (1, 2, 2048)
        hidden, _ = model(replace(fake, region_vectors=vectors, region_points=None))
        assert hidden.shape == (1, batch.input_ids.shape[1], 2048)
        found = model.heads.segment(
            seen.maps, torch.empty(1, 100, 2048), torch.empty(1, 2, 2048), "region"
        )
        same = bi_softmax(found.embeddings[0], found.embeddings[0])
        assert found.scores.shape == (1, 100, 2) and same.shape == (100, 100)


@pytest.mark.slow
def test_full_model_counts_its_operations() -> None:
    steps = measure(focus_3b(), next(b for b in buckets_for(focus_3b()) if b.size == (768, 384)))
    assert steps.unet > 1e12
