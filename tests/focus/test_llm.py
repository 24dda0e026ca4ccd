import dataclasses

import pytest
import torch
from transformers import Qwen2Config, Qwen2Model

from focus.config import LLMConfig
from focus.errors import ShapeError
from focus.llm import KVCache, Qwen2Trunk

CONFIG = LLMConfig(
    num_layers=3,
    dim=48,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    ffn_dim=80,
    vocab_size=64,
    rope_theta=1e4,
    max_length=64,
)
TOLERANCE = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(scope="module")
def pair() -> tuple[Qwen2Trunk, Qwen2Model]:
    torch.manual_seed(0)
    theirs = Qwen2Model(
        Qwen2Config(
            hidden_size=CONFIG.dim,
            intermediate_size=CONFIG.ffn_dim,
            num_hidden_layers=CONFIG.num_layers,
            num_attention_heads=CONFIG.num_heads,
            num_key_value_heads=CONFIG.num_kv_heads,
            vocab_size=CONFIG.vocab_size,
            max_position_embeddings=CONFIG.max_length,
            rope_parameters={"rope_type": "default", "rope_theta": CONFIG.rope_theta},
            rms_norm_eps=CONFIG.norm_eps,
            initializer_range=0.2,
            use_sliding_window=False,
            pad_token_id=None,
        )
    ).eval()
    for name, parameter in theirs.named_parameters():
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    ours = Qwen2Trunk(CONFIG)
    state = {k: v for k, v in theirs.state_dict().items() if not k.startswith("embed_tokens")}
    ours.load_state_dict(state, strict=True)
    return ours, theirs


def reference(theirs: Qwen2Model, embeddings: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return theirs(inputs_embeds=embeddings, use_cache=False).last_hidden_state


@torch.no_grad()
def test_full_forward_equals_transformers(pair):
    ours, theirs = pair
    embeddings = torch.randn(2, 21, CONFIG.dim)
    torch.testing.assert_close(ours(embeddings), reference(theirs, embeddings), **TOLERANCE)


@torch.no_grad()
def test_right_padding_does_not_change_valid_states(pair):
    ours, theirs = pair
    embeddings = torch.randn(2, 20, CONFIG.dim)
    lengths = torch.tensor([20, 13])
    embeddings[1, 13:] = 1e3
    hidden = ours(embeddings, lengths=lengths)
    expected = reference(theirs, embeddings[1:, :13])
    torch.testing.assert_close(hidden[1:, :13], expected, **TOLERANCE)


@torch.no_grad()
def test_packed_segments_equal_separate_documents(pair):
    ours, theirs = pair
    embeddings = torch.randn(1, 24, CONFIG.dim)
    sizes = [7, 1, 16]
    segments = torch.tensor([[0] * 7 + [1] + [2] * 16])
    hidden = ours(embeddings, segments=segments)
    parts = [reference(theirs, part) for part in embeddings.split(sizes, 1)]
    torch.testing.assert_close(hidden, torch.cat(parts, 1), **TOLERANCE)


@pytest.mark.parametrize("whole", [False, True])
@torch.no_grad()
def test_prefill_and_decode_of_uneven_rows_equal_full_forward(pair, whole):
    ours, theirs = pair
    embeddings = torch.randn(3, 25, CONFIG.dim)
    full = reference(theirs, embeddings)
    cache = KVCache(CONFIG, 3, 25, whole=whole)
    done = torch.zeros(3, dtype=torch.int64)
    # chunks of uneven valid lengths, empty ones included, up to the last slot of the cache
    for chunk in ([9, 4, 12], [3, 5, 0], [1, 1, 1], [0, 8, 2], [12, 7, 10]):
        lengths = torch.tensor(chunk)
        part = torch.full((3, max(chunk), CONFIG.dim), 50.0)
        for row, size in enumerate(chunk):
            part[row, :size] = embeddings[row, done[row] : done[row] + size]
        hidden = ours(part, lengths=lengths, cache=cache)
        for row, size in enumerate(chunk):
            expected = full[row, done[row] : done[row] + size]
            torch.testing.assert_close(hidden[row, :size], expected, **TOLERANCE)
        done += lengths
    assert cache.lengths.tolist() == [25, 25, 25]


@torch.no_grad()
def test_cache_truncate_select_and_join_keep_rows_apart(pair):
    ours, theirs = pair
    embeddings = torch.randn(2, 12, CONFIG.dim)
    cache = KVCache(CONFIG, 2, 16)
    ours(embeddings[:, :9], cache=cache)
    cache.truncate(torch.tensor([6, 9]))
    roomier = KVCache(CONFIG, 1, 20)
    ours(embeddings[:1, :6], cache=roomier)
    swapped = KVCache.join([cache.select(torch.tensor([1])), roomier])
    new = torch.randn(2, 3, CONFIG.dim)
    hidden = ours(new, cache=swapped)
    kept = ours(new.flip(0), cache=cache)
    first = reference(theirs, torch.cat([embeddings[1:, :9], new[:1]], 1))[:, -3:]
    second = reference(theirs, torch.cat([embeddings[:1, :6], new[1:]], 1))[:, -3:]
    torch.testing.assert_close(hidden, torch.cat([first, second]), **TOLERANCE)
    torch.testing.assert_close(kept, torch.cat([second, first]), **TOLERANCE)
    assert swapped.max_length == 20
    assert cache.lengths.tolist() == [9, 12]


@torch.no_grad()
def test_given_positions_replace_counted_ones(pair):
    ours, theirs = pair
    embeddings = torch.randn(1, 8, CONFIG.dim)
    positions = torch.tensor([[0, 1, 2, 7, 8, 9, 20, 21]])
    expected = theirs(inputs_embeds=embeddings, position_ids=positions).last_hidden_state
    hidden = ours(embeddings, positions=positions)
    torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(hidden, ours(embeddings), atol=1e-2)


def test_gradients_equal_transformers(pair):
    ours, theirs = pair
    embeddings = torch.randn(2, 9, CONFIG.dim)
    weight = torch.randn(2, 9, CONFIG.dim)
    (ours(embeddings) * weight).sum().backward()
    (theirs(inputs_embeds=embeddings).last_hidden_state * weight).sum().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-4)
    ours.zero_grad()
    theirs.zero_grad()


@torch.no_grad()
def test_overfull_cache_is_refused_and_says_what_to_do(pair):
    ours, _ = pair
    cache = KVCache(CONFIG, 1, 10)
    ours(torch.randn(1, 8, CONFIG.dim), cache=cache)
    with pytest.raises(ShapeError, match=r"at most 10 tokens .* expected, got 11"):
        ours(torch.randn(1, 3, CONFIG.dim), cache=cache)
    with pytest.raises(ShapeError, match=r"cache of 2 rows expected, got 1"):
        ours(torch.randn(2, 1, CONFIG.dim), cache=cache)
    with pytest.raises(ShapeError, match=r"\[B, T, 48\] expected, got \(1, 3, 47\)"):
        ours(torch.randn(1, 3, 47))


def test_build_on_meta_counts_the_papers_trunk():
    with torch.device("meta"):
        trunk = Qwen2Trunk(LLMConfig())
    table = LLMConfig().vocab_size * LLMConfig().dim
    total = sum(p.numel() for p in trunk.parameters()) + table
    assert total / 1e9 == pytest.approx(3.354, abs=1e-3)


def test_residual_writers_start_smaller():
    trunk = Qwen2Trunk(dataclasses.replace(CONFIG, dim=96, num_layers=8))
    attention = trunk.layers[0].self_attn
    ratio = attention.o_proj.weight.detach().std() / attention.q_proj.weight.detach().std()
    expected = (96 / 48) ** 0.5 / 4  # fan-in 48 against 96, (2 * 8) ** -0.5
    assert float(ratio) == pytest.approx(expected, rel=0.1)
