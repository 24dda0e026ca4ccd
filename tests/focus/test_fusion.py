"""Fusion against eq. 1-2 written out with complex rotations."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from focus.config import FusionConfig, HierarchicalConfig, VanillaConfig
from focus.errors import ShapeError
from focus.presets import focus_3b
from focus.tokenizer.semantic import SemanticBranch
from focus.vision.fusion import Fusion
from focus.vision.whiten import whiten

VANILLA = VanillaConfig(image_size=(28, 42), patch_size=7, out_dim=20)
HIERARCHICAL = HierarchicalConfig(dims=(8, 12, 16, 24))
CONFIG = FusionConfig(dim=24, num_heads=3, scales=("res4", "res5"))


def made(config: FusionConfig = CONFIG) -> tuple[Fusion, Tensor, list[Tensor]]:
    torch.manual_seed(0)
    fusion = Fusion(config, VANILLA, HIERARCHICAL, llm_dim=10)
    maps = [torch.randn(2, c, 16 >> i, 24 >> i) for i, c in enumerate(HIERARCHICAL.dims)]
    return fusion, torch.randn(2, 6, 20), maps


def randomise(fusion: Fusion) -> None:
    with torch.no_grad():
        for value in fusion.parameters():
            value.add_(torch.randn_like(value) * 0.2)


def turn(x: Tensor, grid: tuple[int, int], extent: tuple[int, int]) -> Tensor:
    """Rotate x [B, S, H, D] by complex numbers: pair (i, i + D/2), first rows then columns."""
    width = x.shape[-1]
    frequency = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = []
    for row in range(grid[0]):
        for column in range(grid[1]):
            y = (row + 0.5) * extent[0] / grid[0]
            z = (column + 0.5) * extent[1] / grid[1]
            angles.append(torch.cat([y * frequency, z * frequency]))
    angle = torch.stack(angles)
    pair = torch.complex(x[..., : width // 2], x[..., width // 2 :])
    pair = pair * torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.cat([pair.real, pair.imag], dim=-1)


def written_out(fusion: Fusion, x_low: Tensor, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
    part = fusion.attention
    batch, tokens, _ = x_low.shape
    entry = part.input(F.layer_norm(x_low, x_low.shape[-1:], eps=1e-6))
    query = turn(part.query(part.norm(entry)).view(batch, tokens, 3, 8), (2, 3), (2, 3))
    keys, values = [], []
    for scale, feature in (("res4", maps[2]), ("res5", maps[3])):
        layer = part.key_value[scale]
        flat = feature.permute(0, 2, 3, 1).reshape(batch, -1, feature.shape[1])
        key = F.linear(flat, layer.weight[:24], layer.bias[:24]).view(batch, -1, 3, 8)
        keys.append(turn(key, tuple(feature.shape[2:]), (2, 3)))
        values.append(F.linear(flat, layer.weight[24:], layer.bias[24:]).view(batch, -1, 3, 8))
    key, value = torch.cat(keys, 1), torch.cat(values, 1)
    weight = torch.einsum("bqhd,bkhd->bhqk", query, key).div(8**0.5).softmax(-1)
    attended = part.out(torch.einsum("bhqk,bkhd->bqhd", weight, value).reshape(batch, tokens, 24))
    e_prime = entry + attended if fusion.config.residual else attended
    return e_prime, fusion.mlp.down(F.gelu(fusion.mlp.up(e_prime))) + e_prime


@pytest.mark.parametrize("residual", [True, False])
def test_fusion_equals_equations_one_and_two(residual: bool) -> None:
    fusion, x_low, maps = made(dataclasses.replace(CONFIG, residual=residual))
    randomise(fusion)
    fusion, x_low, maps = fusion.double(), x_low.double(), [m.double() for m in maps]
    with torch.no_grad():
        got = fusion(x_low, maps)
        e_prime, e_img = written_out(fusion, x_low, maps)
    # The rotary table of the module is fp32, that of the test fp64.
    torch.testing.assert_close(got.e_prime, e_prime, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.e_img, e_img, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.projected, fusion.project(got.e_img))


def test_fusion_starts_as_the_projected_vanilla_feature() -> None:
    fusion, x_low, maps = made()
    got = fusion(x_low, maps)
    entry = fusion.attention.input(F.layer_norm(x_low, (20,), eps=1e-6))
    assert torch.equal(got.e_prime, entry)
    got.e_prime.square().sum().backward()
    assert fusion.attention.out.weight.grad is not None
    assert fusion.attention.out.weight.grad.abs().max() > 0
    query = fusion.attention.query.weight.grad
    assert query is not None
    assert query.abs().max() == 0


def test_fusion_to_the_letter_has_no_residual() -> None:
    fusion, x_low, maps = made(dataclasses.replace(CONFIG, residual=False))
    with torch.no_grad():
        fusion.attention.out.weight.zero_()
        fusion.attention.out.bias.zero_()
        assert fusion(x_low, maps).e_prime.abs().max() == 0


def test_fusion_reads_only_its_scales_and_knows_where_they_lie() -> None:
    fusion, x_low, maps = made()
    randomise(fusion)
    with torch.no_grad():
        base = fusion(x_low, maps).e_prime
        unread = [maps[0] + 1, maps[1] + 1, *maps[2:]]
        assert torch.equal(fusion(x_low, unread).e_prime, base)
        moved = [*maps[:3], maps[3].flip(-1)]
        assert (fusion(x_low, moved).e_prime - base).abs().max() > 1e-3


def test_fusion_takes_another_grid_when_told() -> None:
    fusion, _, maps = made()
    x_low = torch.randn(2, 8, 20)
    with pytest.raises(ShapeError, match=r"2 x 3 vanilla tokens expected, got 8; pass grid="):
        fusion(x_low, maps)
    randomise(fusion)
    tall, wide = fusion(x_low, maps, grid=(4, 2)), fusion(x_low, maps, grid=(2, 4))
    assert (tall.e_prime - wide.e_prime).abs().max() > 1e-4


def test_fusion_wants_four_maps() -> None:
    fusion, x_low, maps = made()
    with pytest.raises(ShapeError, match="the four maps"):
        fusion(x_low, maps[:3])


def test_fusion_and_semantic_branch_have_the_published_sizes() -> None:
    config = focus_3b()
    with torch.device("meta"):
        fusion = Fusion(config.fusion, config.vanilla, config.hierarchical, config.llm.dim)
        branch = SemanticBranch(config.semantic, config.fusion.dim, config.vanilla.out_dim)
    size = {
        name: sum(p.numel() for p in part.parameters()) / 1e6
        for name, part in (
            ("entry", fusion.attention.input),
            ("encoder", branch.encoder),
            ("to_code", branch.to_code),
            ("decoder", branch.decoder),
            ("from_code", branch.from_code),
            ("out", branch.out),
        )
    }
    assert round(size["entry"] + size["encoder"] + size["to_code"]) == 83
    assert round(size["from_code"] + size["decoder"] + size["out"]) == 83


def test_a_whitened_projection_gives_every_direction_the_same_strength() -> None:
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(6, 6, generator=generator) @ torch.diag(torch.logspace(0, 2, 6))
    samples = torch.randn(40, 100, 6, generator=generator) @ mixed + 50.0
    linear = torch.nn.Linear(6, 9)
    whiten(linear, samples, generator)
    out = linear(samples).flatten(0, 1).double()
    assert out.mean(0).abs().max() < 1e-2
    strengths = torch.linalg.eigvalsh(torch.cov(out.T))[-6:]
    before = torch.linalg.eigvalsh(torch.cov(samples.flatten(0, 1).T.double()))
    expected = (before / (before + 0.02 * before.mean())).sort().values
    torch.testing.assert_close(strengths, expected, rtol=1e-3, atol=1e-4)
    with pytest.raises(ShapeError, match="more than 6 samples of 6 channels expected"):
        whiten(linear, samples[0, :6])
