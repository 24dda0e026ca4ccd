"""Every branch can be turned off or replaced by config; the defaults are the paper's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.data.scenes import sample
from engine.data.words import tiny_vocabulary
from focus import Focus
from focus.batch import Pictures
from focus.config import ConfigError, FocusConfig, from_json, to_json
from focus.inputs import collate
from focus.model import FocusModel
from focus.presets import focus_tiny
from focus.settings import Settings
from tests.focus import small_checkpoints as small

replace = dataclasses.replace


def config(**parts: dict[str, Any] | str) -> FocusConfig:
    """A small config with fields of its parts replaced."""
    made = small.base()
    made = replace(
        made,
        llm=replace(focus_tiny().llm, num_layers=2, dim=48, num_heads=4, head_dim=16, ffn_dim=64),
        hierarchical=replace(made.hierarchical, depths=(1, 1, 1, 1), dims=(16, 24, 32, 48)),
    )
    for name, values in parts.items():
        part = replace(getattr(made, name), **values) if isinstance(values, dict) else values
        made = replace(made, **{name: part})
    return made


SWITCHES: dict[str, Callable[[], FocusConfig]] = {
    "no hierarchical encoder": lambda: config(
        hierarchical={"source": "vanilla"}, fusion={"scales": ()}, adapter={"num_queries": 0}
    ),
    "no fusion": lambda: config(fusion={"scales": ()}),
    "no adapter": lambda: config(adapter={"num_queries": 0}),
    "quantised inputs": lambda: config(inputs="quantised"),
    "mask tokens condition": lambda: config(diffusion={"condition": "queries"}),
    "no joint gradient": lambda: config(diffusion={"mask_gradient": False}),
}


def build(made: FocusConfig) -> FocusModel:
    torch.manual_seed(0)
    return FocusModel(made).eval()


def pictures(made: FocusConfig, seed: int = 0) -> Pictures:
    generator = torch.Generator().manual_seed(seed)
    sizes = (made.vanilla.image_size, made.hierarchical.image_size, made.pixel.image_size)
    low, high, pixel = (torch.rand(1, 3, *size, generator=generator) for size in sizes)
    return Pictures(vanilla=low, hierarchical=high, pixel=pixel)


@pytest.mark.parametrize("name", SWITCHES)
def test_every_switch_edits_a_picture_and_survives_json(name: str) -> None:
    made = SWITCHES[name]()
    assert made != config() and from_json(to_json(made)) == made
    model = Focus(build(made), tiny_vocabulary(made), Settings(words=1, steps=1))
    image = np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)
    assert model.edit(image, "make it red").image.size == (40, 40)


@torch.no_grad()
def test_without_hierarchical_encoder_nothing_sees_the_large_picture() -> None:
    made = SWITCHES["no hierarchical encoder"]()
    model = build(made)
    gone = ("front.hierarchical.backbone.", "front.adapter.", "front.fusion.attention.query.")
    assert not any(name.startswith(gone) for name in model.state_dict())
    seen = pictures(made)
    other = replace(seen, hierarchical=1 - seen.hierarchical)
    found, again = model.front.encode(seen), model.front.encode(other)
    assert torch.equal(found.fused.e_prime, again.fused.e_prime)
    for mine, theirs, dim, stride in zip(
        found.maps, again.maps, made.hierarchical.dims, (4, 8, 16, 32), strict=True
    ):
        assert torch.equal(mine, theirs)
        assert mine.shape == (1, dim, 128 // stride, 128 // stride)
    default = build(config())
    changed = default.front.encode(other).maps[0] - default.front.encode(seen).maps[0]
    assert float(changed.abs().max()) > 1e-3


def test_without_adapter_the_sequence_is_shorter_by_its_queries() -> None:
    record = sample("referring", "train", 0, 0, (128, 128))
    lengths = [
        int(collate([record], made, tiny_vocabulary(made)).lengths[0])
        for made in (config(), SWITCHES["no adapter"]())
    ]
    assert lengths[0] - lengths[1] == config().adapter.num_queries


@torch.no_grad()
def test_quantised_inputs_are_code_vectors() -> None:
    made = SWITCHES["quantised inputs"]()
    model = build(made)
    found = model.front.encode(pictures(made))
    vectors = found.pixel.permute(0, 2, 3, 1).flatten(0, 2)
    table = model.front.tokenizer.pixel_codes.table()
    distance = torch.cdist(vectors, table, compute_mode="donot_use_mm_for_euclid_dist")
    assert float(distance.min(dim=1).values.max()) < 1e-6
    codes = model.front.tokenize(pictures(made))
    rows = model.front.tokenizer.semantic_codes.lookup(codes.semantic).flatten(1, 2)
    assert model.front.semantic_project is not None
    assert torch.allclose(found.fused.projected, model.front.semantic_project(rows), atol=1e-6)


@torch.no_grad()
def test_mask_tokens_condition_instead_of_masks() -> None:
    made = SWITCHES["mask tokens condition"]()
    decoder = build(made).heads.diffusion
    assert decoder.query_projection is not None
    codes = torch.randn(1, made.code_channels, 8, 8)
    noisy, step = torch.randn(1, 4, 16, 16), torch.tensor([5])
    masks = [torch.zeros(1, 1, 32, 32), torch.ones(1, 1, 32, 32)]
    states = torch.randn(1, made.segment.num_queries, made.llm.dim)

    def run(mask: Tensor, given: Tensor | None) -> Tensor:
        resized, context = decoder.conditions(codes, mask, (16, 16), given)
        return decoder.predict(noisy, resized, step, context)

    none = run(masks[0], None)
    assert torch.equal(run(masks[0], states), none)  # the projection starts at zero
    decoder.query_projection.weight.normal_()
    assert float((run(masks[0], states) - none).abs().max()) > 1e-3
    assert torch.equal(run(masks[0], states), run(masks[1], states))


@pytest.mark.parametrize("joint", [True, False])
def test_mask_gradient_can_be_cut(joint: bool) -> None:
    decoder = build(config(diffusion={"mask_gradient": joint})).heads.diffusion
    torch.nn.init.normal_(decoder.mask_projection.weight)
    mask = torch.rand(1, 1, 16, 16, requires_grad=True)
    codes = torch.randn(1, config().code_channels, 8, 8)
    latents = torch.randn(1, 4, 16, 16)
    torch.manual_seed(1)
    decoder.loss(codes, None, mask, latents=latents).backward()
    if joint:
        assert mask.grad is not None and float(mask.grad.abs().max()) > 0
    else:
        assert mask.grad is None
    assert decoder.mask_projection.weight.grad is not None


def test_eq_2_to_the_letter_needs_scales() -> None:
    with pytest.raises(ConfigError, match="needs residual=True"):
        config(fusion={"scales": (), "residual": False})
