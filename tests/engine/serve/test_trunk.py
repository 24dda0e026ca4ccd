"""The fused trunk against the model's own: same states, same weights, same refusals."""

import dataclasses

import pytest
import torch

from engine.serve.trunk import FusedTrunk, quantise, quantised
from focus.config import LLMConfig
from focus.errors import ShapeError
from focus.llm import KVCache, Qwen2Trunk
from focus.presets import focus_tiny

CONFIG = dataclasses.replace(
    focus_tiny().llm, num_layers=2, dim=48, num_heads=6, num_kv_heads=2, head_dim=8, ffn_dim=64
)


def trunk(config: LLMConfig = CONFIG) -> Qwen2Trunk:
    torch.manual_seed(0)
    made = Qwen2Trunk(config).requires_grad_(False)
    for layer in made.layers:
        for name in ("q_proj", "k_proj", "v_proj"):
            torch.nn.init.normal_(getattr(layer.self_attn, name).bias)
    return made


# chunks of T tokens and the valid ones of each of two rows (None: all)
READINGS = {
    "prompt, then one by one": [(5, None), (1, None), (1, None)],
    "uneven prompts": [(6, (6, 3)), (1, None), (1, (1, 1))],
    "chunks behind a prompt": [(4, None), (3, None), (2, None)],
    "rows that pause": [(4, (4, 2)), (3, (0, 3)), (1, (1, 0)), (1, None)],
}


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("name", READINGS)
def test_states_and_cache_are_those_of_the_plain_trunk(name: str, whole: bool) -> None:
    plain = trunk()
    caches = [KVCache(CONFIG, 2, 20, whole=whole) for _ in range(2)]
    expected = [
        plain(embeddings, lengths=lengths, cache=caches[0])
        for embeddings, lengths in chunks(READINGS[name])
    ]
    fused = FusedTrunk(plain)
    for number, (embeddings, lengths) in enumerate(chunks(READINGS[name])):
        states = fused(embeddings, lengths=lengths, cache=caches[1])
        for row in range(2):
            valid = embeddings.shape[1] if lengths is None else int(lengths[row])
            torch.testing.assert_close(
                states[row, :valid], expected[number][row, :valid], rtol=1e-5, atol=2e-5
            )
    assert torch.equal(caches[0].lengths, caches[1].lengths)
    for row, num in enumerate(caches[0].lengths.tolist()):
        both = (cache.read(row, 0, num) for cache in caches)
        for first, second in zip(*both, strict=True):
            torch.testing.assert_close(first, second, rtol=1e-5, atol=2e-5)


def chunks(reading):
    torch.manual_seed(1)
    for num, lengths in reading:
        yield torch.randn(2, num, 48), None if lengths is None else torch.tensor(lengths)


def test_the_weights_stay_the_models_own() -> None:
    plain = trunk()
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    fused = FusedTrunk(plain)
    assert not list(fused.parameters())
    after = plain.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    # the fused product reads the modules' memory: a change to one shows in the other
    x = torch.randn(1, 1, 48)
    first = fused(x, cache=KVCache(CONFIG, 1, 4))
    plain.layers[0].mlp.up_proj.weight.mul_(2)
    second = fused(x, cache=KVCache(CONFIG, 1, 4))
    torch.testing.assert_close(second, plain(x), rtol=1e-5, atol=2e-5)
    assert not torch.allclose(first, second)


def test_int8_rounds_every_weight_by_at_most_half_a_step() -> None:
    torch.manual_seed(0)
    weight, bias, x = torch.randn(64, 48), torch.randn(64), torch.randn(3, 2, 48)
    numbers, scale = quantise(weight)
    assert numbers.dtype == torch.int8
    assert ((numbers * scale[:, None] - weight).abs() <= scale[:, None] * 0.5001).all()
    expected = x @ (numbers.float() * scale[:, None]).T + bias
    torch.testing.assert_close(quantised(weight, bias)(x), expected, rtol=1e-4, atol=1e-4)


def test_int8_trunk_stays_near_the_plain_one() -> None:
    plain = trunk()
    x = torch.randn(2, 7, 48)
    expected = plain(x)
    states = FusedTrunk(plain, int8=True)(x, cache=KVCache(CONFIG, 2, 8))
    error = (states - expected).norm() / expected.norm()
    assert 0 < error < 0.03


def test_wrong_shapes_are_refused() -> None:
    fused = FusedTrunk(trunk())
    with pytest.raises(ShapeError, match=r"embeddings \[B, T, 48\] expected, got \(1, 2, 9\)"):
        fused(torch.zeros(1, 2, 9), cache=KVCache(CONFIG, 1, 4))
    with pytest.raises(ShapeError, match="cache of 3 rows expected, got 2"):
        fused(torch.zeros(3, 1, 48), cache=KVCache(CONFIG, 2, 4))
    with pytest.raises(ShapeError, match="at most 4 tokens"):
        fused(torch.zeros(1, 5, 48), cache=KVCache(CONFIG, 1, 4))


def test_a_view_counts_by_itself_and_settles() -> None:
    plain, cache = trunk(), KVCache(CONFIG, 3, 8)
    plain(torch.randn(3, 2, 48), cache=cache)
    view = cache.view(slice(0, 2))
    plain(torch.randn(2, 3, 48), cache=view)
    assert cache.lengths.tolist() == [2, 2, 2]
    assert view.lengths.tolist() == [5, 5]
    cache.settle(slice(0, 2), view)
    assert cache.lengths.tolist() == [5, 5, 2]
    keys, values = cache.read(1, 1, 5)
    cache.write(2, keys, values)
    assert cache.lengths.tolist() == [5, 5, 4]
    assert torch.equal(cache.read(2, 0, 4)[0], keys)
    with pytest.raises(ShapeError, match="at most 8 tokens"):
        cache.write(0, keys, values, start=5)
