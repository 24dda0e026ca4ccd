"""`focus.info`: the published sizes, the buckets' tokens, operations against formulas."""

from __future__ import annotations

import pytest
import torch

from focus.buckets import Bucket, bucket_of, buckets_for
from focus.config import FocusConfig
from focus.info import (
    PARTS,
    build_meta,
    count,
    count_mask_attention,
    counted,
    describe,
    measure,
    part_of,
    per_task,
    read_tokens,
)
from focus.llm import Qwen2Trunk
from focus.presets import focus_3b, focus_tiny
from focus.prompts import TASKS

M = 1e6
PUBLISHED = {  # facts of the public parts, in millions
    "vanilla": 675.8,
    "hierarchical": 196.2,
    "semantic_encoder": 78.8,
    "semantic_decoder": 83.4,
    "pixel_encoder": 27.2,
    "pixel_decoder": 476.4,
    "llm": 3354.6,
    "unet": 2567.6,
    "vae": 83.7,
}


@pytest.fixture(scope="module")
def paper() -> FocusConfig:
    return focus_3b()


def test_focus_3b_has_the_published_sizes(paper: FocusConfig) -> None:
    model = build_meta(paper)
    parts = count(paper, model)
    for name, millions in PUBLISHED.items():
        assert parts[name]["params"] / M == pytest.approx(millions, abs=0.06), name
    assert parts["simvq"]["params"] == 2 * 32 * 32
    assert parts["simvq"]["buffers"] == (32_768 + 98_304) * 32
    assert parts["unet"]["params"] - 2_567_463_684 == 64 * 320 * 9  # SDXL's own, 64 more channels
    assert count_mask_attention(model) == {"modules": 70, "params": 545_670_400}
    total = sum(part["params"] for part in parts.values())
    assert total == sum(p.numel() for p in model.parameters())


def test_every_parameter_belongs_to_one_part() -> None:
    for name in build_meta(focus_tiny()).state_dict():
        assert sum(name.startswith(prefixes) for prefixes in PARTS.values()) == 1, name
    with pytest.raises(ValueError, match="belongs to no part"):
        part_of("scratch.weight")


def test_buckets_have_the_tokens_of_the_table(paper: FocusConfig) -> None:
    lengths = [368, 1404, 1014, 1002, 1140, 1122, 1570, 1533, 1662, 1600, 1454, 1379]
    report = describe(paper, flops=False)["buckets"]
    assert [b["block_tokens"] for b in report] == lengths
    assert report[6]["output"] == (1536, 768) and report[6]["latent"] == (192, 96)
    assert buckets_for(focus_tiny()) == (bucket_of(focus_tiny()),)


def test_trunk_operations_equal_the_counter() -> None:
    config = focus_tiny()
    trunk = Qwen2Trunk(config.llm).eval()
    with torch.no_grad():
        total, _ = counted(lambda: trunk(torch.zeros(1, 32, config.llm.dim)))
    causal = read_tokens(config, 0, 32)
    heads = config.llm.num_heads * config.llm.head_dim
    full = causal + config.llm.num_layers * 4 * heads * (32 * 32 - 32 * 33 // 2)
    assert total == full  # the counter charges the masked half as well
    assert read_tokens(config, 0, 32) == read_tokens(config, 0, 20) + read_tokens(config, 20, 12)


def test_tasks_cost_what_their_steps_cost() -> None:
    config = focus_tiny()
    bucket = bucket_of(config)
    steps = measure(config, bucket)
    assert min(vars(steps).values()) > 0
    tasks = per_task(config, bucket, steps)
    assert tasks["editing"] > tasks["referring"] + 100 * steps.unet + steps.vae
    assert tasks["referring"] - steps.encode - steps.segment > 0
    assert set(tasks) == set(TASKS)


def test_operations_of_non_square_pictures_follow_their_pixels() -> None:
    config = focus_tiny()
    wide = Bucket(size=(64, 128), vit_size=(112, 224), semantic_grid=(8, 16), pixel_grid=(8, 16))
    square, double = measure(config, bucket_of(config)), measure(config, wide)
    assert 2.0 <= double.vae / square.vae < 2.1  # attention in the middle grows faster
    assert double.tokenize > 2 * square.tokenize * 0.99
    assert double.segment == square.segment  # X_H keeps its size
