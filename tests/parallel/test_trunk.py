"""The trunk under megatron-core equals Qwen2 of transformers and ours, in both directions."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from focus.config import LLMConfig
from focus.llm import Qwen2Trunk
from focus.losses import expected_code_loss, language_loss
from parallel.layout import MeshError, ParallelConfig, check_layout
from parallel.mesh import open_mesh
from tests.parallel import ranks

LLM = LLMConfig(
    num_layers=4,
    dim=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    ffn_dim=96,
    vocab_size=128,
    rope_theta=1e6,
    max_length=64,
)


def ours(llm: LLMConfig) -> tuple[Qwen2Trunk, torch.Tensor, torch.Tensor]:
    """Our trunk with weights that all matter (norms and biases too), token table and head."""
    torch.manual_seed(0)
    trunk = Qwen2Trunk(llm)
    with torch.no_grad():
        for parameter in trunk.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    table = torch.randn(llm.vocab_size, llm.dim) * 0.2
    head = table if llm.tie_embeddings else torch.randn(llm.vocab_size, llm.dim) * 0.2
    return trunk, table, head


def focus_names(llm: LLMConfig) -> dict[str, torch.Tensor]:
    trunk, table, head = ours(llm)
    found = {f"trunk.{name}": tensor for name, tensor in trunk.state_dict().items()}
    return {**found, "front.token_embedding.weight": table, "heads.lm_head.weight": head}


def transformers_model(llm: LLMConfig) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=llm.vocab_size,
        hidden_size=llm.dim,
        intermediate_size=llm.ffn_dim,
        num_hidden_layers=llm.num_layers,
        num_attention_heads=llm.num_heads,
        num_key_value_heads=llm.num_kv_heads,
        max_position_embeddings=256,
        rms_norm_eps=llm.norm_eps,
        tie_word_embeddings=llm.tie_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": llm.rope_theta},
        initializer_range=0.2,
        attn_implementation="eager",
    )
    model = Qwen2ForCausalLM(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def build(llm: LLMConfig, layout: ParallelConfig) -> Any:
    from parallel.spec import transformer_config
    from parallel.split_engine import open_megatron
    from parallel.trunk import Trunk

    mesh = open_mesh(layout).__enter__()  # left open: the rank ends with the test
    open_megatron(layout, mesh, 1)
    return Trunk(llm, transformer_config(llm, layout))


def both_ways(rank: int, llm: LLMConfig, tp: int) -> tuple[float, float]:
    """Largest relative difference of logits from transformers; of the weights that come back."""
    from parallel.language import SplitHead
    from parallel.weight_map import TRANSFORMERS

    trunk = build(llm, ParallelConfig(tp=tp, trunk="megatron"))
    model = transformers_model(llm)
    weights = model.state_dict()
    trunk.load_from(weights, TRANSFORMERS)
    ids = torch.randint(0, llm.vocab_size, (2, 20), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        hidden = trunk.states(trunk.embedding.word_embeddings(ids).transpose(0, 1).contiguous())
        table = trunk.shared_embedding_or_output_weight()
        if not llm.tie_embeddings:
            table = trunk.output_layer.weight
        width = llm.vocab_size // tp
        own = SplitHead(table)._logits(hidden.transpose(0, 1), table)
    own_part = expected[..., rank * width : (rank + 1) * width]
    difference = float((own - own_part).abs().max() / own_part.abs().max())
    back = trunk.whole(TRANSFORMERS)
    assert set(back) >= {name for name in weights if name != "lm_head.weight"}
    return difference, max(float((back[n] - weights[n]).abs().max()) for n in back)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_transformers_and_weights_come_back(tp: int, tied: bool) -> None:
    llm = dataclasses.replace(LLM, tie_embeddings=tied)
    for difference, back in ranks.run(tp, both_ways, llm, tp):
        assert difference <= 1e-5
        assert back == 0


def hidden_states(rank: int, llm: LLMConfig) -> float:
    trunk = build(llm, ParallelConfig(trunk="megatron"))
    reference, _, _ = ours(llm)
    trunk.load_from(focus_names(llm))
    embeddings = torch.randn(3, 17, llm.dim, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        own = trunk.states(embeddings.transpose(0, 1).contiguous()).transpose(0, 1)
        return float((own - reference(embeddings)).abs().max())


def test_hidden_states_equal_our_trunk() -> None:
    assert ranks.run(1, hidden_states, LLM)[0] <= 1e-5


@pytest.mark.parametrize(
    "change", [{"norm_eps": 1e-2}, {"rope_theta": 1e4}, {"num_kv_heads": 4}], ids=str
)
def test_a_wrong_config_is_noticed(change: dict[str, Any]) -> None:
    wrong = dataclasses.replace(LLM, **change)
    if "num_kv_heads" in change:
        with pytest.raises(AssertionError, match="failed"):
            ranks.run(1, mismatch, wrong)
    else:
        assert ranks.run(1, mismatch, wrong)[0] > 1e-4


def mismatch(rank: int, wrong: LLMConfig) -> float:
    trunk = build(wrong, ParallelConfig(trunk="megatron"))
    reference, _, _ = ours(LLM)
    trunk.load_from(focus_names(LLM))
    embeddings = torch.randn(1, 17, LLM.dim, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        own = trunk.states(embeddings.transpose(0, 1).contiguous()).transpose(0, 1)
        return float((own - reference(embeddings)).abs().max())


def vocabulary_losses(rank: int, tp: int) -> list[tuple[float, ...]]:
    """(loss, d loss / d hidden, d loss / d table) differences of both losses, tp ranks vs one."""
    from parallel.language import SplitHead

    build(LLM, ParallelConfig(tp=tp, trunk="megatron"))
    draw = torch.Generator().manual_seed(4)
    hidden = torch.randn(2, 9, LLM.dim, generator=draw)
    table = torch.randn(LLM.vocab_size, LLM.dim, generator=draw) * 0.3
    labels = torch.randint(0, LLM.vocab_size, (2, 9), generator=draw)
    labels[0, :4] = -100
    weight = torch.rand(2, 9, generator=draw)
    ids, codes = slice(40, 100), torch.randn(60, 8, generator=draw)
    index = torch.randint(0, 60, (18,), generator=draw)
    width = LLM.vocab_size // tp
    rows = slice(rank * width, (rank + 1) * width)
    found = []
    for kind in ("loss", "code_loss"):
        whole_hidden, own_hidden = (hidden.clone().requires_grad_() for _ in range(2))
        whole_table, own_table = (t.clone().requires_grad_() for t in (table, table[rows]))
        head = SplitHead(own_table)
        if kind == "loss":
            expected = language_loss(whole_hidden, labels, whole_table, weight)
            own = head.loss(own_hidden, labels, weight)
        else:
            states = whole_hidden.flatten(0, 1)
            expected = expected_code_loss(states, index, whole_table[ids], codes)
            own = head.code_loss(own_hidden.flatten(0, 1), index, ids, codes)
        torch.autograd.backward([expected, own])
        pairs = [
            (expected, own),
            (whole_hidden.grad, own_hidden.grad),
            (whole_table.grad[rows], own_table.grad),
        ]
        found.append(tuple(float((a - b).abs().max() / a.abs().max()) for a, b in pairs))
    return found


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_vocabulary_losses_equal_the_whole_table(tp: int) -> None:
    for found in ranks.run(tp, vocabulary_losses, tp):
        for differences in found:
            assert max(differences) <= 2e-6


@pytest.mark.parametrize(
    ("layout", "rule"),
    [
        ({"tp": 3}, r"tp must divide llm.num_heads \(4\)"),
        ({"pp": 3}, r"pp x vpp must divide llm.num_layers \(4\)"),
        ({"pp": 2, "vpp": 4}, "pp x vpp must divide"),
        ({"vpp": 2}, "vpp above 1 needs pp above 1"),
        ({"sequence_parallel": True}, "sequence_parallel needs tp above 1"),
    ],
)
def test_a_layout_that_breaks_a_rule_is_refused(layout: dict[str, Any], rule: str) -> None:
    with pytest.raises(MeshError, match=rule):
        check_layout(LLM, ParallelConfig(**layout))


def test_processes_that_the_layout_does_not_divide_are_refused() -> None:
    with pytest.raises(MeshError, match=r"tp x pp x cp = 2 x 2 x 1 = 4 must divide .* got 6"):
        ParallelConfig(tp=2, pp=2).data_size(6)
