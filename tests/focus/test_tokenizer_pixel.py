"""The pixel branch: sizes, norms and sampling against their definitions."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from focus.config import PixelConfig, SimVQConfig
from focus.errors import ShapeError
from focus.presets import focus_3b
from focus.tokenizer.pixel import AttentionBlock, CodeNorm, Down, PixelDecoder, PixelEncoder, Up

CONFIG = PixelConfig(
    image_size=(32, 32),
    encoder_channels=16,
    decoder_channels=16,
    multipliers=(1, 2, 2),
    num_blocks=1,
    attention_levels=(2,),
    norm_groups=4,
    codebook=SimVQConfig(num_codes=32, dim=4),
)


def test_pixel_branch_has_the_published_sizes() -> None:
    config = focus_3b()
    with torch.device("meta"):
        encoder = PixelEncoder(config.pixel)
        decoder = PixelDecoder(config.pixel, config.code_channels)
    assert round(sum(p.numel() for p in encoder.parameters()) / 1e6, 1) == 27.2
    assert round(sum(p.numel() for p in decoder.parameters()) / 1e6, 1) == 476.4
    assert config.pixel.stride == 16


def test_spatial_norm_modulates_after_nearest_resizing() -> None:
    torch.manual_seed(0)
    norm = CodeNorm(8, 2, 6)
    x, codes = torch.randn(2, 8, 12, 8), torch.randn(2, 6, 3, 2)
    enlarged = F.interpolate(codes, size=(12, 8), mode="nearest")
    scale, shift = norm.modulate(enlarged).chunk(2, dim=1)
    expected = F.group_norm(x, 2, eps=1e-6) * scale + shift
    torch.testing.assert_close(norm(x, codes), expected)


def test_spatial_norm_starts_as_group_norm_where_codes_are_zero() -> None:
    norm = CodeNorm(8, 2, 6)
    x = torch.randn(2, 8, 4, 4)
    assert torch.allclose(norm(x, torch.zeros(2, 6, 2, 2)), F.group_norm(x, 2, eps=1e-6))


def test_down_shortcut_is_the_group_mean_of_a_pixel_unshuffle() -> None:
    down = Down(8, residual=True)
    x = torch.randn(2, 8, 6, 4)
    shortcut = F.pixel_unshuffle(x, 2).unflatten(1, (8, 4)).mean(2)
    torch.testing.assert_close(down(x), F.pixel_unshuffle(down.conv(x), 2) + shortcut)


def test_up_shortcut_is_the_pixel_shuffle_of_repeated_channels() -> None:
    up = Up(8, residual=True)
    x = torch.randn(2, 8, 3, 2)
    shortcut = F.pixel_shuffle(x.repeat_interleave(4, dim=1), 2)
    torch.testing.assert_close(up(x), F.pixel_shuffle(up.conv(x), 2) + shortcut)


def test_attention_block_equals_single_head_attention() -> None:
    block = AttentionBlock(8, 2, None)
    x = torch.randn(2, 8, 3, 4)
    q, k, v = block.qkv(F.group_norm(x, 2, eps=1e-6)).flatten(2).chunk(3, dim=1)
    weight = (q.transpose(1, 2) @ k / 8**0.5).softmax(-1)
    expected = x + block.project((v @ weight.transpose(1, 2)).view_as(x))
    torch.testing.assert_close(block(x, None), expected)


@pytest.mark.parametrize("residual", [True, False])
def test_pixel_branch_goes_to_the_grid_and_back(residual: bool) -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIG, residual_sampling=residual)
    encoder, decoder = PixelEncoder(config), PixelDecoder(config, 8)
    images = torch.rand(2, 3, 32, 48)
    features = encoder(images)
    assert features.shape == (2, 4, 8, 12)
    picture = decoder(torch.randn(2, 8, 8, 12))
    assert picture.shape == images.shape
    assert 0.2 < picture.mean() < 0.8  # centred on the [0, 1] scale


def test_pixel_shortcuts_carry_the_signal_when_convolutions_are_silent() -> None:
    config = dataclasses.replace(CONFIG, attention_levels=())
    encoder = PixelEncoder(config)
    with torch.no_grad():
        encoder.out.weight.zero_()
        encoder.out.bias.zero_()
    seen: list[torch.Tensor] = []
    encoder.norm.register_forward_hook(lambda _module, _inputs, out: seen.append(out))
    features = encoder(torch.rand(1, 3, 32, 32))
    expected = F.silu(seen[0]).unflatten(1, (4, 8)).mean(2)
    torch.testing.assert_close(features, expected)


def test_pixel_decoder_depends_on_the_codes_at_every_norm() -> None:
    torch.manual_seed(0)
    decoder = PixelDecoder(CONFIG, 8)
    norms = [m for m in decoder.modules() if isinstance(m, CodeNorm)]
    assert len(norms) == 2 * (2 + 3 * 2) + (1 + 2) + 1
    decoder(torch.randn(1, 8, 4, 4)).square().sum().backward()
    for norm in norms:
        assert norm.modulate.weight.grad.abs().max() > 0


def test_pixel_branch_names_what_does_not_fit() -> None:
    with pytest.raises(ShapeError, match="multiples of 4 pixels, got 30 x 32"):
        PixelEncoder(CONFIG)(torch.rand(1, 3, 30, 32))
    with pytest.raises(ShapeError, match=r"codes must be \[B, 8, h, w\], got \(1, 7, 4, 4\)"):
        PixelDecoder(CONFIG, 8)(torch.rand(1, 7, 4, 4))
    with pytest.raises(ShapeError, match="32 channels at the lowest level must be a multiple of 5"):
        PixelEncoder(
            dataclasses.replace(CONFIG, codebook=dataclasses.replace(CONFIG.codebook, dim=5))
        )


def test_pixel_branch_exports_and_runs_in_bf16() -> None:
    torch.manual_seed(0)
    decoder = PixelDecoder(CONFIG, 8).eval()
    codes = torch.randn(2, 8, 8, 8)
    batch = torch.export.Dim("batch", min=1, max=8)
    program = torch.export.export(decoder, (codes,), dynamic_shapes=({0: batch},))
    other = torch.randn(3, 8, 8, 8)
    with torch.no_grad():
        exact = decoder(other)
        torch.testing.assert_close(program.module()(other), exact, rtol=1e-4, atol=1e-5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = decoder(other)
    assert (rounded.float() - exact).norm() < 0.05 * exact.norm()
