"""The UNet against diffusers' own, and mask attention inside it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from focus.config import DiffusionConfig, VAEConfig
from focus.diffusion.attention import MaskAttention, mask_context, repeat_context, resize_area
from focus.diffusion.unet import (
    DiffusionError,
    build_unet,
    mask_attentions,
    run_unet,
    size_condition,
    widen_input,
)
from focus.presets import focus_3b

CONFIG = DiffusionConfig(
    channels=(16, 32),
    layers_per_block=1,
    transformer_depth=(0, 1),
    head_dim=8,
    context_dim=16,
    norm_groups=4,
    upscale=1,
    vae=VAEConfig(channels=(8, 16), layers_per_block=1, norm_groups=4, scaling_factor=1.0),
    num_sizes=3,
)
CODES = 6


def inputs(batch: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents, codes, timesteps and size numbers."""
    torch.manual_seed(0)
    latents, codes = torch.randn(batch, 4, 8, 12), torch.randn(batch, CODES, 8, 12)
    return latents, codes, torch.arange(batch) * 400, torch.zeros(batch, dtype=torch.int64)


def context(mask: Tensor, weight: Tensor, config: DiffusionConfig = CONFIG):  # type: ignore[no-untyped-def]
    return mask_context(mask, weight, (8, 12), len(config.channels), config.mask_grid)


def test_full_scale_unet_has_sdxls_size() -> None:
    config = focus_3b()
    with torch.device("meta"):
        unet = build_unet(config.diffusion, config.code_channels)
    assert unet.conv_in.weight.shape == (320, 68, 3, 3)
    # SDXL's 2,567,463,684 and 64 input channels more
    assert sum(p.numel() for p in unet.parameters()) == 2_567_463_684 + 320 * 64 * 9
    attentions = mask_attentions(unet)
    assert len(attentions) == 70
    assert sum(p.numel() for m in attentions for p in m.parameters()) == 545_670_400
    levels = [m.level for m in attentions]
    assert (levels.count(0), levels.count(1), levels.count(2)) == (0, 10, 60)
    assert {m.num_heads for m in attentions if m.level == 2} == {20}


def test_sdxl_weights_load_and_give_diffusers_output_for_zero_text() -> None:
    unet = build_unet(CONFIG, CODES)
    theirs = UNet2DConditionModel.from_config(unet.config)
    assert {k: v.shape for k, v in unet.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }
    unet.load_state_dict(theirs.state_dict())
    latents, codes, times, sizes = inputs()
    with torch.no_grad():
        expected = theirs(
            torch.cat([latents, codes], dim=1),
            times,
            encoder_hidden_states=torch.zeros(2, 77, CONFIG.context_dim),
            added_cond_kwargs=size_condition(sizes, CONFIG, torch.float32),
        ).sample
        ours = run_unet(unet, latents, codes, times, None, sizes, CONFIG)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("grid", ["pooled", "full"])
def test_zero_mask_and_zero_projection_are_exactly_unconditioned(grid: str) -> None:
    config = dataclasses.replace(CONFIG, mask_grid=grid)
    unet = build_unet(config, CODES)
    latents, codes, times, sizes = inputs()
    weight, mask = torch.randn(CONFIG.context_dim, 1), torch.rand(2, 1, 16, 24)
    with torch.no_grad():
        none = run_unet(unet, latents, codes, times, None, sizes, config)
        for m, w in ((torch.zeros_like(mask), weight), (mask, torch.zeros_like(weight))):
            found = run_unet(unet, latents, codes, times, context(m, w, config), sizes, config)
            assert torch.equal(found, none)
        masked = run_unet(unet, latents, codes, times, context(mask, weight, config), sizes, config)
    assert float((masked - none).abs().amax()) > 1e-4


@pytest.mark.parametrize("position", ["rope", "none"])
def test_positions_let_the_mask_say_where(position: str) -> None:
    config = dataclasses.replace(CONFIG, mask_position=position)
    unet = build_unet(config, CODES)
    latents, codes, times, sizes = inputs(1)
    weight = torch.randn(CONFIG.context_dim, 1) * 3
    left = torch.zeros(1, 1, 8, 12)
    left[..., :6] = 1.0
    with torch.no_grad():
        found = [
            run_unet(unet, latents, codes, times, context(m, weight), sizes, config)
            for m in (left, left.flip(-1))
        ]
    difference = float((found[0] - found[1]).abs().amax())
    assert difference > 1e-3 if position == "rope" else difference < 1e-5


def test_mask_attention_is_attention_over_the_rotated_mask_sequence() -> None:
    torch.manual_seed(0)
    layer = MaskAttention(
        6, context_dim=5, num_heads=2, head_dim=4, level=1, position="none"
    ).double()
    hidden = torch.randn(1, 24, 6, dtype=torch.float64)
    mask, weight = torch.rand(1, 3, 8, 12).double(), torch.randn(5, 3).double()
    made = context(mask, weight)
    sequence = made.masks[1].flatten(2).transpose(1, 2) @ weight.T  # [1, 24, 5]: f_m = w m

    def heads(x: Tensor) -> Tensor:
        return x.view(1, -1, 2, 4).transpose(1, 2)

    query = heads(hidden @ layer.to_q.weight.T)
    key, value = (heads(sequence @ w.weight.T) for w in (layer.to_k, layer.to_v))
    out = (query @ key.transpose(2, 3) / 2).softmax(-1) @ value
    expected = layer.to_out(out.transpose(1, 2).reshape(1, 24, 8))
    torch.testing.assert_close(layer(hidden, made), expected)


def test_gradient_reaches_mask_and_projection() -> None:
    unet = build_unet(CONFIG, CODES)
    latents, codes, times, sizes = inputs()
    mask = torch.rand(2, 1, 16, 24, requires_grad=True)
    weight = torch.randn(CONFIG.context_dim, 1, requires_grad=True)
    run_unet(
        unet, latents, codes, times, context(mask, weight), sizes, CONFIG
    ).square().sum().backward()
    assert mask.grad is not None
    assert weight.grad is not None
    assert float(mask.grad.abs().amax()) > 0
    assert float(weight.grad.abs().amax()) > 0


def test_zero_projection_still_learns() -> None:
    unet = build_unet(CONFIG, CODES)
    latents, codes, times, sizes = inputs()
    weight = torch.zeros(CONFIG.context_dim, 1, requires_grad=True)
    made = context(torch.rand(2, 1, 8, 12), weight)
    run_unet(unet, latents, codes, times, made, sizes, CONFIG).square().sum().backward()
    assert weight.grad is not None
    assert float(weight.grad.abs().amax()) > 0


def test_context_pools_by_area_per_level() -> None:
    mask = torch.zeros(1, 1, 16, 24)
    mask[..., :3, :] = 1.0
    weight = torch.zeros(4, 1)
    pooled = mask_context(mask, weight, (8, 12), 2, "pooled")
    assert [m.shape[-2:] for m in pooled.masks] == [(8, 12), (4, 6)]
    assert pooled.masks[0][0, 0, :3, 0].tolist() == [1.0, 0.5, 0.0]
    assert pooled.masks[1][0, 0, :2, 0].tolist() == [0.75, 0.0]
    full = mask_context(mask, weight, (8, 12), 2, "full")
    assert full.masks[1] is full.masks[0]
    odd = mask_context(mask, weight, (7, 5), 3, "pooled")
    assert [m.shape[-2:] for m in odd.masks] == [(7, 5), (4, 3), (2, 2)]
    assert resize_area(torch.ones(1, 1, 2, 2), (4, 6)).eq(1).all()


def test_repeated_context_blanks_the_branch_without_mask() -> None:
    made = context(torch.rand(2, 1, 8, 12), torch.zeros(4, 1))
    stacked = repeat_context(made, [True, False])
    assert stacked is not None
    assert torch.equal(stacked.masks[1][:2], made.masks[1])
    assert stacked.masks[1][2:].eq(0).all()
    assert repeat_context(None, [True]) is None


def test_size_number_is_the_last_time_id_and_changes_the_output() -> None:
    found = size_condition(torch.tensor([2, 0]), CONFIG, torch.float32)
    assert found["time_ids"].tolist() == [[0, 0, 0, 0, 0, 2], [0, 0, 0, 0, 0, 0]]
    assert found["text_embeds"].shape == (2, 10)
    assert not found["text_embeds"].any()
    unet = build_unet(CONFIG, CODES)
    latents, codes, times, sizes = inputs()
    with torch.no_grad():
        first = run_unet(unet, latents, codes, times, None, sizes, CONFIG)
        other = run_unet(unet, latents, codes, times, None, sizes + 2, CONFIG)
    assert float((first - other).abs().amax()) > 1e-4


def test_new_input_channels_start_at_zero() -> None:
    weight = torch.randn(16, 4, 3, 3)
    wide = widen_input(weight, 4 + CODES)
    assert torch.equal(wide[:, :4], weight)
    assert wide[:, 4:].eq(0).all()
    with pytest.raises(DiffusionError, match="at most 3 input channels expected, got 4"):
        widen_input(weight, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transformer_depth": (1,)}, "one transformer depth per level"),
        ({"transformer_depth": (1, 0)}, "deepest level needs a transformer"),
        ({"head_dim": 5}, "multiples of head_dim 5"),
    ],
)
def test_contradictory_configs_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(DiffusionError, match=message):
        build_unet(dataclasses.replace(CONFIG, **change), CODES)  # type: ignore[arg-type]
