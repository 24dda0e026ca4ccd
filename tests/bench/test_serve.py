"""Rows of the serving benchmark, and the bounds of the latency model, on numbers known by hand."""

import json
import math

import pytest
import torch

from bench import latency
from bench.decoding import measure_ticks, recompute, text_contenders, trunk_calls
from bench.serve import Row, plain, rows_of, table
from bench.timer import Timing
from engine.serve.decode import Decoder
from focus.presets import focus_tiny
from tests.engine.serve.small import edits, small


def test_rows_compare_with_their_baseline() -> None:
    timings = {
        "slow": Timing(wall_ms=[8.0, 9.0, 10.0], cpu_ms=[6.0, 7.0, 8.0], extra_mb=3.0),
        "fast": Timing(wall_ms=[3.0, 2.0, 4.0], cpu_ms=[2.0, 2.5, 2.0], extra_mb=1.0),
    }
    slow, fast = rows_of("edit", "request", timings, "slow", {"fast": "a note"})
    assert (fast.median_ms, fast.baseline_ms, fast.ratio, fast.cpu_ratio) == (3.0, 9.0, 3.0, 3.0)
    assert slow.ratio == slow.cpu_ratio == 1.0
    values = json.loads(json.dumps(plain(fast)))
    wanted = ("task", "part", "backend", "median_ms", "peak_mb", "baseline_ms")
    assert [values[name] for name in wanted] == ["edit", "request", "fast", 3.0, 1.0, 9.0]
    text = table([slow, fast])
    assert text.count("edit: request") == 1
    assert "3.00" in text and "a note" in text


def test_figures_that_do_not_exist_are_null() -> None:
    nothing = math.nan
    row = Row(
        task="quality",
        part="edit",
        backend="int8",
        median_ms=nothing,
        min_cpu_ms=nothing,
        peak_mb=nothing,
        baseline_ms=nothing,
    )
    assert plain(row)["median_ms"] is None
    assert plain(row)["ratio"] is None
    assert "-" in table([row])


def test_contenders_write_the_same_words() -> None:
    """Without a cache, by transformers and by ours: the comparison is of equals."""
    focus = small()
    prompt = torch.randn(1, 9, focus.config.llm.dim, generator=torch.Generator().manual_seed(1))
    writers = text_contenders(focus, {"engine": Decoder(focus.model, focus.vocabulary)}, prompt)
    ticks: list[int] = []
    tick = lambda: ticks.append(1)  # noqa: E731
    first = writers["naive recompute"](5, tick)
    assert first == recompute(focus, prompt, 5, tick)
    assert writers["transformers generate"](5, tick) == first
    weights = focus.model.heads.lm_head.weight
    before = weights.clone()
    try:  # the engine may say text only: let nothing else be likely
        weights[focus.vocabulary.text_size :] = 0
        weights[sorted(focus.vocabulary.special_ids)] = 0
        assert writers["engine"](5, tick) == recompute(focus, prompt, 5, tick)
    finally:
        weights.copy_(before)
    timings = measure_ticks({"engine": writers["engine"]}, 4, repeats=2)
    assert len(timings["engine"].wall_ms) == 2 * 4  # the stop ticks too


def test_calls_of_the_trunk_are_counted() -> None:
    focus = small()
    decoder = Decoder(focus.model, focus.vocabulary)
    state = focus.pipeline().open(edits(1)).state
    stop = [focus.vocabulary.pad_id]
    assert trunk_calls(decoder, lambda: decoder.text(state, stop=stop, max_tokens=3)) == 4


def test_bounds_are_the_larger_of_arithmetic_and_traffic() -> None:
    card = latency.Card(name="x", peak=1e12, bandwidth=1e9)
    assert latency.Cost(part="a", operations=2e9, bytes=1e6).bound_ms(card) == pytest.approx(2.0)
    slow = latency.Cost(part="b", operations=2e9, bytes=5e6, times=3)
    assert slow.bound_ms(card) == pytest.approx(15.0)


def test_costs_of_a_config_add_up() -> None:
    config = focus_tiny()
    llm = config.llm
    found = {cost.part: cost for cost in latency.costs(config)}
    layer = llm.dim * (2 * llm.num_heads + 2 * llm.num_kv_heads) * llm.head_dim
    layer += (llm.num_heads + 2 * llm.num_kv_heads) * llm.head_dim  # biases
    layer += 3 * llm.dim * llm.ffn_dim + 2 * llm.dim
    weights = 2 * (llm.num_layers * layer + llm.dim)
    assert found["prefill"].bytes == weights
    head = 2 * config.pixel.codebook.num_codes * llm.dim
    seen = found["pixel token"].bytes - weights - head
    per_token = 2 * 2 * llm.num_layers * llm.num_kv_heads * llm.head_dim
    assert seen > 0
    assert seen % (2 * per_token) == 0  # two branches of guidance, whole tokens each
    tokens = found["semantic token"].times + found["pixel token"].times
    assert tokens == 8 * 8 + 8 * 8
    text = latency.table(config, list(found.values()))
    assert "H200: 989 TFLOP/s, 4.80 TB/s" in text
    assert "referring request" in text
