"""The gated adapter against eq. 3-4 written out."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from focus.adapter import AdapterLayer, GatedAdapter, sincos_position
from focus.config import AdapterConfig, HierarchicalConfig
from focus.errors import ShapeError

HIERARCHICAL = HierarchicalConfig(dims=(8, 12, 16, 24))
CONFIG = AdapterConfig(num_queries=5, dim=16, num_heads=2)


def made(config: AdapterConfig = CONFIG, gates: float = 0.0) -> tuple[GatedAdapter, list[Tensor]]:
    torch.manual_seed(0)
    adapter = GatedAdapter(config, HIERARCHICAL, llm_dim=10)
    with torch.no_grad():
        for layer in adapter.layers:
            layer.feature.bias.normal_()
            layer.attention_gate.fill_(gates)
            layer.ffn_gate.fill_(-gates)
    maps = [torch.randn(2, c, 16 >> i, 24 >> i) for i, c in enumerate(HIERARCHICAL.dims)]
    return adapter, maps


def written_out(layer: AdapterLayer, h: Tensor, features: Tensor) -> Tensor:
    projected = features @ layer.feature.weight.T + layer.feature.bias
    normed = layer.norm(h)
    heads = []
    for rows in torch.arange(16).view(2, 8):
        query = normed @ layer.query.weight[rows].T
        key = projected @ layer.key.weight[rows].T
        value = projected @ layer.value.weight[rows].T
        heads.append((query @ key.transpose(1, 2) / 8**0.5).softmax(-1) @ value)
    h = h + layer.attention_gate.tanh() * (torch.cat(heads, -1) @ layer.out.weight.T)
    ffn = layer.down(F.gelu(layer.up(layer.ffn_norm(h))))
    return h + layer.ffn_gate.tanh() * ffn


def test_adapter_is_its_queries_while_the_gates_are_zero() -> None:
    adapter, maps = made()
    expected = adapter.project(adapter.norm(adapter.queries)).expand(2, -1, -1)
    torch.testing.assert_close(adapter(maps), expected, rtol=0, atol=1e-6)


def test_adapter_equals_equations_three_and_four() -> None:
    adapter, maps = made(gates=0.7)
    h = adapter.queries.expand(2, -1, -1)
    for index, layer in enumerate(adapter.layers, start=1):
        feature = maps[index]
        grid = (feature.shape[2], feature.shape[3])
        position = sincos_position(grid, feature.shape[1], 4 << index, feature.device)
        h = written_out(layer, h, feature.permute(0, 2, 3, 1).flatten(1, 2) + position)
    expected = adapter.project(adapter.norm(h))
    torch.testing.assert_close(adapter(maps), expected, rtol=1e-5, atol=1e-5)


def test_adapter_gates_learn_first() -> None:
    adapter, maps = made()
    adapter(maps).square().sum().backward()
    for layer in adapter.layers:
        assert layer.attention_gate.grad.abs() > 0
        assert layer.ffn_gate.grad.abs() > 0
        assert layer.query.weight.grad.abs().max() == 0
        assert layer.up.weight.grad.abs().max() == 0


def test_adapter_layer_reads_its_own_scale() -> None:
    adapter, maps = made()
    with torch.no_grad():
        adapter.layers[1].attention_gate.fill_(1.0)
        base = adapter(maps)
        for index in range(4):
            changed = [m + torch.randn_like(m) * (i == index) for i, m in enumerate(maps)]
            moved = (adapter(changed) - base).abs().max()
            assert (moved > 1e-4) == (index == 2), f"map res{index + 2}"


@pytest.mark.parametrize("position", [True, False])
def test_adapter_sees_places_only_with_positions(position: bool) -> None:
    adapter, maps = made(dataclasses.replace(CONFIG, position=position), gates=1.0)
    with torch.no_grad():
        moved = (adapter([m.flip(-1) for m in maps]) - adapter(maps)).abs().max()
    assert (moved > 1e-3) if position else (moved < 1e-5)


def test_adapter_takes_queries_from_outside() -> None:
    adapter, maps = made(gates=0.5)
    own = adapter.queries.expand(2, -1, -1)
    assert torch.equal(adapter(maps, own), adapter(maps))
    assert (adapter(maps, -own) - adapter(maps)).abs().max() > 1e-3
    with pytest.raises(ShapeError, match=r"queries must be \[B, Q, 16\], got \(2, 5, 15\)"):
        adapter(maps, own[..., :15])


def test_adapter_under_bf16_autocast_stays_close() -> None:
    adapter, maps = made(gates=0.5)
    exact = adapter(maps)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = adapter(maps)
        rounded.float().sum().backward()
    assert (exact - rounded.float()).norm() < 0.03 * exact.norm()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in adapter.parameters())


def test_adapter_positions_share_one_frame_across_scales() -> None:
    device = torch.device("cpu")
    fine = sincos_position((2, 2), 8, 8, device)  # centres at 0.5 and 1.5, in units of 8 pixels
    coarse = sincos_position((1, 1), 8, 16, device)  # one centre at 1.0
    assert fine[0, 0].item() == pytest.approx(torch.tensor(0.5).sin().item())
    assert fine[3, 4].item() == pytest.approx(torch.tensor(1.5).sin().item())
    assert coarse[0, [0, 2, 4, 6]].tolist() == pytest.approx(
        [torch.tensor(1.0).sin().item(), torch.tensor(1.0).cos().item()] * 2
    )


def test_adapter_refuses_heads_that_do_not_divide() -> None:
    with pytest.raises(ShapeError, match=r"adapter.dim \(16\) must be a multiple"):
        GatedAdapter(dataclasses.replace(CONFIG, num_heads=3), HIERARCHICAL, llm_dim=4)
