"""The dual tokenizer: codes, merging, every loss term, and that it learns."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from focus.config import FocusConfig, PixelConfig, SemanticConfig, SimVQConfig
from focus.errors import ShapeError
from focus.presets import focus_tiny
from focus.tokenizer.adversary import Adversary, Discriminator, PerceptualLoss
from focus.tokenizer.dual import CodeNoise, Codes, DualTokenizer, TokenizerWeights, swap_codes
from focus.tokenizer.semantic import SemanticBranch, semantic_loss

CONFIG = dataclasses.replace(
    focus_tiny(),
    vanilla=dataclasses.replace(focus_tiny().vanilla, image_size=(56, 56)),
    semantic=SemanticConfig(
        depth=1, dim=32, num_heads=2, codebook=SimVQConfig(num_codes=64, dim=8)
    ),
    pixel=PixelConfig(
        image_size=(32, 32),
        encoder_channels=16,
        decoder_channels=16,
        multipliers=(1, 1, 2),
        num_blocks=1,
        attention_levels=(2,),
        norm_groups=4,
        codebook=SimVQConfig(num_codes=128, dim=8),
    ),
)


def made(config: FocusConfig = CONFIG) -> tuple[DualTokenizer, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    tokenizer = DualTokenizer(config)
    tokens = config.vanilla.grid[0] * config.vanilla.grid[1]
    e_prime = torch.randn(3, tokens, config.fusion.dim)
    x_low = torch.randn(3, tokens, config.vanilla.out_dim)
    return tokenizer, e_prime, x_low, torch.rand(3, 3, *config.pixel.image_size)


def test_codes_decode_to_the_reconstruction_of_training() -> None:
    tokenizer, e_prime, x_low, images = made()
    tokenizer.eval()
    with torch.no_grad():
        out = tokenizer.train_step(e_prime, x_low, images)
        codes = tokenizer.encode(e_prime, tokenizer.pixel_encoder(images))
        assert torch.equal(codes.semantic, out["codes"].semantic)
        assert torch.equal(codes.pixel, out["codes"].pixel)
        torch.testing.assert_close(tokenizer.decode(codes), out["recon"], rtol=1e-4, atol=1e-5)
    assert codes.semantic.shape == (3, 4, 4)
    assert codes.pixel.shape == (3, 8, 8)
    assert codes.semantic.dtype == codes.pixel.dtype == torch.int64


def test_merged_codes_are_semantic_then_pixel_channels() -> None:
    tokenizer, *_ = made()
    codes = Codes(torch.randint(64, (2, 4, 4)), torch.randint(128, (2, 8, 8)))
    merged = tokenizer.embed(codes)
    coarse = tokenizer.semantic_codes.lookup(codes.semantic).permute(0, 3, 1, 2)
    fine = tokenizer.pixel_codes.lookup(codes.pixel).permute(0, 3, 1, 2)
    resized = F.interpolate(coarse, size=(8, 8), mode="bicubic", align_corners=False)
    assert merged.shape == (2, CONFIG.code_channels, 8, 8)
    assert torch.equal(merged[:, 8:], fine)
    torch.testing.assert_close(merged[:, :8], resized)


def test_train_step_names_every_loss() -> None:
    tokenizer, e_prime, x_low, images = made()
    out = tokenizer.train_step(
        e_prime,
        x_low,
        images,
        step=20_000,
        perceptual=PerceptualLoss(lambda x: [x]),
        adversary=Adversary(Discriminator(8)),
    )
    losses, recon = out["losses"], out["recon"]
    assert set(losses) == {
        *("l1", "perceptual", "adversarial", "discriminator"),
        *("semantic", "vq_semantic", "vq_pixel"),
    }
    torch.testing.assert_close(losses["l1"], (recon - images).abs().mean())
    assert losses["adversarial"].item() == pytest.approx(-0.5 * out["metrics"]["logit_fake"].item())
    assert all(value.isfinite() and value.dtype == torch.float32 for value in losses.values())


def test_train_step_without_judges_gives_four_terms() -> None:
    tokenizer, *inputs = made()
    early = tokenizer.train_step(*inputs, step=0, adversary=Adversary(Discriminator(8)))
    assert set(early["losses"]) == {"l1", "semantic", "vq_semantic", "vq_pixel"}
    assert early["metrics"] == {}


def test_train_step_weights_scale_their_terms() -> None:
    tokenizer, *inputs = made()
    tokenizer.eval()
    one = tokenizer.train_step(*inputs)["losses"]
    weights = TokenizerWeights(l1=2, semantic=3, vq_semantic=4, vq_pixel=5)
    many = tokenizer.train_step(*inputs, weights=weights)["losses"]
    ratio = {name: round((many[name] / one[name]).item(), 4) for name in one}
    assert ratio == {"l1": 2, "semantic": 3, "vq_semantic": 4, "vq_pixel": 5}


def test_train_step_reaches_every_parameter_and_the_fused_feature() -> None:
    tokenizer, e_prime, x_low, images = made()
    e_prime.requires_grad_()
    x_low.requires_grad_()
    out = tokenizer.train_step(e_prime, x_low, images)
    torch.stack(list(out["losses"].values())).sum().backward()
    silent = [n for n, p in tokenizer.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []
    assert e_prime.grad is not None
    assert e_prime.grad.any()
    assert x_low.grad is None


def test_tokenizer_takes_another_size_when_told() -> None:
    tokenizer, *_ = made()
    e_prime, features = torch.randn(1, 6, CONFIG.fusion.dim), torch.randn(1, 8, 4, 6)
    with pytest.raises(ShapeError, match="4 x 4 semantic tokens expected, got 6"):
        tokenizer.encode(e_prime, features)
    codes = tokenizer.encode(e_prime, features, grid=(2, 3))
    assert codes.semantic.shape == (1, 2, 3)
    assert tokenizer.decode(codes).shape == (1, 3, 16, 24)


def test_tokenizer_under_bf16_autocast_keeps_codes_in_fp32() -> None:
    tokenizer, *inputs = made()
    exact = tokenizer.train_step(*inputs)["losses"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = tokenizer.train_step(*inputs)
    for name, value in out["losses"].items():
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(exact[name].item(), rel=0.1)
    torch.stack(list(out["losses"].values())).sum().backward()
    assert all(p.grad.isfinite().all() for p in tokenizer.parameters() if p.grad is not None)


def test_code_noise_swaps_in_the_neighbour_without_gradient() -> None:
    codes = torch.randn(4, 8, 8, 2, requires_grad=True)
    every = swap_codes(codes, CodeNoise(sample_rate=1.0, token_rate=1.0))
    assert torch.equal(every, codes.detach().roll(1, 0))
    assert not every.requires_grad or torch.autograd.grad(every.sum(), codes)[0].abs().max() == 0
    assert torch.equal(swap_codes(codes, CodeNoise(sample_rate=0.0)), codes)
    torch.manual_seed(0)
    many = torch.arange(2000.0).view(-1, 1, 1, 1).expand(-1, 10, 1, 1)
    swapped = (swap_codes(many, CodeNoise(sample_rate=0.3, token_rate=0.2)) != many).float()
    assert swapped.mean().item() == pytest.approx(0.06, rel=0.2)
    assert swapped.amax((1, 2, 3)).mean().item() == pytest.approx(0.3 * (1 - 0.8**10), rel=0.15)


def test_code_noise_applies_in_training_alone() -> None:
    tokenizer, *inputs = made()
    noise = CodeNoise(sample_rate=1.0, token_rate=1.0)
    clean = tokenizer.eval().train_step(*inputs)["recon"]
    torch.testing.assert_close(tokenizer.train_step(*inputs, noise=noise)["recon"], clean)
    noisy = tokenizer.train().train_step(*inputs, noise=noise)["recon"]
    assert (noisy - clean).abs().max() > 1e-3


def test_semantic_loss_is_zero_for_the_normalised_target() -> None:
    target = torch.randn(2, 5, 16) * 3 + 1
    assert semantic_loss(target - target.mean(-1, keepdim=True), target).abs() < 1e-6
    normalised = F.layer_norm(target, (16,), eps=1e-6)
    assert semantic_loss(-normalised, target).item() == pytest.approx(2.0)


def test_semantic_branch_knows_where_its_tokens_lie() -> None:
    torch.manual_seed(0)
    branch = SemanticBranch(CONFIG.semantic, 20, 12)
    x = torch.randn(1, 6, 20)
    order = torch.tensor([1, 0, 2, 3, 4, 5])
    with torch.no_grad():
        straight, swapped = branch.encode(x, (2, 3)), branch.encode(x[:, order], (2, 3))
    assert (straight - swapped[:, order]).abs().max() > 1e-3
    with pytest.raises(ShapeError, match="2 x 2 semantic tokens expected, got 6"):
        branch.encode(x, (2, 2))


def test_tokenizer_learns_to_reconstruct() -> None:
    tokenizer, e_prime, x_low, _ = made()
    torch.manual_seed(1)
    images = F.interpolate(torch.rand(3, 3, 4, 4), size=(32, 32), mode="nearest")
    optimizer = torch.optim.Adam(tokenizer.parameters(), lr=2e-3)
    history: list[dict[str, float]] = []
    for _ in range(40):
        losses = tokenizer.train_step(e_prime, x_low, images)["losses"]
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        history.append({name: value.item() for name, value in losses.items()})
    assert history[-1]["l1"] < 0.4 * history[0]["l1"]
    assert history[-1]["semantic"] < 0.6 * history[0]["semantic"]
