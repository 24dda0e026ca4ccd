"""The diffusion decoder: objective, dropped conditions, guidance, samplers, autoencoder."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from focus.config import DiffusionConfig, VAEConfig
from focus.diffusion.decoder import DiffusionDecoder, Drop, _drop
from focus.diffusion.sampler import (
    SCHEDULERS,
    Blend,
    Guidance,
    build_scheduler,
    sample_latents,
    training_scheduler,
)
from focus.diffusion.unet import DiffusionError
from focus.diffusion.vae import LatentAutoencoder, vae_losses

CONFIG = DiffusionConfig(
    channels=(16, 32),
    layers_per_block=1,
    transformer_depth=(0, 1),
    head_dim=8,
    context_dim=16,
    norm_groups=4,
    upscale=1,
    vae=VAEConfig(channels=(8, 16), layers_per_block=1, norm_groups=4, scaling_factor=0.5),
    num_sizes=3,
)
CODES = 6
KEEP = Drop(semantic=0.0, pixel=0.0, both=0.0, mask=0.0)


def made(config: DiffusionConfig = CONFIG, code_stride: int | None = 4) -> DiffusionDecoder:
    torch.manual_seed(0)
    decoder = DiffusionDecoder(config, CODES, code_stride=code_stride)
    torch.nn.init.normal_(decoder.mask_projection.weight)
    return decoder


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Codes, target pictures and masks."""
    torch.manual_seed(1)
    return torch.randn(2, CODES, 4, 4), torch.rand(2, 3, 16, 16), torch.rand(2, 1, 32, 32)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_loss_is_the_mse_of_noise_or_velocity(prediction: str) -> None:
    config = dataclasses.replace(CONFIG, prediction=prediction)
    decoder = made(config)
    codes, images, mask = inputs()
    found = decoder.loss(codes, images, mask, generator=torch.Generator().manual_seed(3), drop=KEEP)
    generator = torch.Generator().manual_seed(3)
    torch.rand(2, 4, generator=generator)  # the draw of what to drop
    times = torch.randint(1000, (2,), generator=generator)
    noise = torch.randn(2, 4, 8, 8, generator=generator)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    signal = (1 - betas).cumprod(0)[times].view(2, 1, 1, 1)
    latents = decoder.vae.encode(images)
    noisy = signal.sqrt() * latents + (1 - signal).sqrt() * noise
    spread, context = decoder.conditions(codes, mask, (8, 8))
    torch.testing.assert_close(spread, codes.repeat_interleave(2, 2).repeat_interleave(2, 3))
    output = decoder.predict(noisy, spread, times, context)
    target = noise
    if prediction == "v_prediction":
        target = signal.sqrt() * noise - (1 - signal).sqrt() * latents
    torch.testing.assert_close(found, F.mse_loss(output, target))


def test_gradients_reach_codes_and_mask_but_not_the_autoencoder() -> None:
    decoder = made()
    codes, images, mask = inputs()
    codes.requires_grad_()
    mask.requires_grad_()
    decoder.loss(codes, images, mask, drop=KEEP).backward()
    assert codes.grad is not None
    assert mask.grad is not None
    assert float(codes.grad.abs().amax()) > 0
    assert float(mask.grad.abs().amax()) > 0
    assert all(p.grad is None for p in decoder.vae.parameters())
    assert all(p.grad is not None for p in decoder.unet.parameters())


def test_precomputed_latents_give_the_same_loss() -> None:
    decoder = made()
    codes, images, mask = inputs()
    found = [
        decoder.loss(codes, i, mask > 0.5, generator=torch.Generator().manual_seed(5), latents=z)
        for i, z in ((images, None), (None, decoder.vae.encode(images).detach()))
    ]
    torch.testing.assert_close(found[0], found[1])


def test_projection_starts_at_zero_so_a_mask_changes_nothing() -> None:
    decoder = DiffusionDecoder(CONFIG, CODES)
    codes, images, mask = inputs()
    found = [
        decoder.loss(codes, images, m, generator=torch.Generator().manual_seed(5))
        for m in (mask, None)
    ]
    assert found[0].item() == found[1].item()


def test_conditions_are_dropped_at_their_rates() -> None:
    count = 20_000
    codes = torch.ones(count, 4, 1, 1)
    decoder = made()
    _, context = decoder.conditions(
        torch.ones(count, CODES, 1, 1), torch.ones(count, 1, 1, 1), (1, 1)
    )
    kept, masked = _drop(codes, context, Drop(), torch.Generator().manual_seed(0))
    pattern = kept[:, :, 0, 0]
    assert torch.equal(pattern[:, 0], pattern[:, 1])
    assert torch.equal(pattern[:, 2], pattern[:, 3])
    semantic, pixel = pattern[:, 0], pattern[:, 2]
    assert semantic.mean().item() == pytest.approx(0.9 * 0.95, abs=0.01)
    assert pixel.mean().item() == pytest.approx(0.9 * 0.95, abs=0.01)
    neither = ((semantic == 0) & (pixel == 0)).float().mean().item()
    assert neither == pytest.approx(0.05 + 0.95 * 0.01, abs=0.01)
    assert masked is not None
    assert masked.masks[0].mean().item() == pytest.approx(0.9, abs=0.01)
    assert torch.equal(masked.masks[0][:, 0, 0, 0] > 0, masked.masks[1][:, 0, 0, 0] > 0)


@pytest.mark.parametrize(
    ("guidance", "branches"),
    [(1.0, 1), (2.5, 2), (Guidance(tokens=1.0, mask=1.0), 3), (Guidance(tokens=2.0, mask=3.0), 3)],
)
def test_guidance_combines_one_batched_call(
    guidance: float | Guidance, branches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = made()
    codes, _, mask = inputs()
    calls: list[int] = []
    original = decoder.predict

    def counted(noisy: Tensor, *arguments: object) -> Tensor:
        calls.append(len(noisy))
        return original(noisy, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(decoder, "predict", counted)
    spread, context = decoder.conditions(codes, mask, (8, 8))
    scale = guidance if isinstance(guidance, Guidance) else Guidance(tokens=guidance)
    sizes = torch.tensor([1, 2])
    latents, time = torch.randn(2, 4, 8, 8), torch.tensor(500)
    with torch.no_grad():
        found = decoder._guided(spread, context, scale, sizes)(latents, time)
        assert calls == [2 * branches]
        both = original(latents, spread, time.expand(2), context, sizes)
        only_mask = original(latents, torch.zeros_like(spread), time.expand(2), context, sizes)
        neither = original(latents, torch.zeros_like(spread), time.expand(2), None, sizes)
    if scale.mask is None:
        expected = only_mask + scale.tokens * (both - only_mask)
    else:
        expected = neither + scale.mask * (only_mask - neither) + scale.tokens * (both - only_mask)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", [*sorted(SCHEDULERS), "DEISMultistepScheduler"])
def test_every_sampler_reaches_the_one_picture_that_a_perfect_model_knows(
    name: str, prediction: str
) -> None:
    config = dataclasses.replace(CONFIG, prediction=prediction)
    torch.manual_seed(0)
    clean = torch.randn(1, 4, 4, 4)
    signal = training_scheduler(config).alphas_cumprod

    def perfect(noisy: Tensor, timestep: Tensor) -> Tensor:
        # heun and lms sit between two training steps
        low, high = int(timestep.floor()), min(int(timestep.ceil()), 999)
        share = float(timestep) - low
        a = torch.lerp(signal[low], signal[high], share)
        noise = (noisy - a.sqrt() * clean) / (1 - a).sqrt()
        if prediction == "v_prediction":
            return a.sqrt() * noise - (1 - a).sqrt() * clean
        return noise

    steps: list[int] = []
    scheduler = build_scheduler(name, config)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 4, 4, 4, generator=generator)
    found = sample_latents(
        perfect,
        noise,
        scheduler,
        20,
        generator=generator,
        on_step=lambda index, _: steps.append(index),
    )
    assert float((found - clean).abs().mean()) < 0.05
    assert steps == list(range(len(scheduler.timesteps)))


def test_sampling_repeats_with_the_seed_and_follows_the_noise() -> None:
    decoder = made()
    codes, _, mask = inputs()

    def draw(seed: int, noise: Tensor | None = None) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return decoder.sample(codes, mask, 2, 1.5, generator, "euler_a", noise=noise)

    first = draw(0)
    assert first.shape == (2, 3, 16, 16)
    assert float(first.amin()) >= 0.0
    assert float(first.amax()) <= 1.0
    assert torch.equal(first, draw(0))
    assert not torch.equal(first, draw(1))
    shared = torch.randn(1, 4, 8, 8).expand(2, -1, -1, -1)
    same = decoder.sample(codes[:1].expand(2, -1, -1, -1), None, 2, noise=shared)
    torch.testing.assert_close(same[0], same[1])


def test_blending_keeps_the_source_outside_the_mask() -> None:
    decoder = made()
    codes, images, _ = inputs()
    mask = torch.zeros(2, 1, 16, 16)
    with torch.no_grad():
        kept = decoder.sample(codes, mask, 3, source=images)
        expected = decoder.vae.decode(decoder.vae.encode(images)).clamp(0, 1)
        torch.testing.assert_close(kept, expected, rtol=1e-4, atol=1e-4)
        free = [
            decoder.sample(codes, mask + 1, 3, source=s, generator=torch.Generator().manual_seed(0))
            for s in (images, None)
        ]
    torch.testing.assert_close(free[0], free[1])
    with pytest.raises(DiffusionError, match="a mask is expected with a source"):
        decoder.sample(codes, None, 3, source=images)


def test_blended_half_equals_the_noised_source_on_the_way() -> None:
    scheduler = build_scheduler("ddim", CONFIG)
    source, noise = torch.randn(1, 4, 4, 4), torch.randn(1, 4, 4, 4)
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., :2] = 1.0
    seen: list[Tensor] = []
    sample_latents(
        lambda latents, _: torch.zeros_like(latents),
        noise,
        scheduler,
        4,
        blend=Blend(latents=source, mask=mask),
        on_step=lambda _, latents: seen.append(latents),
    )
    for index, latents in enumerate(seen[:-1]):
        a = scheduler.alphas_cumprod[scheduler.timesteps[index + 1]]
        expected = a.sqrt() * source + (1 - a).sqrt() * noise
        torch.testing.assert_close(latents[..., 2:], expected[..., 2:])
    torch.testing.assert_close(seen[-1][..., 2:], source[..., 2:])


def test_wrong_inputs_are_named() -> None:
    decoder = made()
    codes, images, mask = inputs()
    with pytest.raises(
        DiffusionError, match=r"codes \[B, 6, hp, wp\] expected, got \(2, 5, 4, 4\)"
    ):
        decoder.loss(codes[:, :5], images, mask)
    with pytest.raises(DiffusionError, match=r"mask \[B, 1, H, W\] expected"):
        decoder.loss(codes, images, mask[:, 0])
    with pytest.raises(DiffusionError, match="got neither"):
        decoder.loss(codes, None, mask)
    with pytest.raises(DiffusionError, match="multiples of 2 pixels"):
        decoder.sample(codes, mask, 2, size=(15, 16))
    with pytest.raises(DiffusionError, match="at least one sampling step"):
        decoder.sample(codes, mask, 0)
    with pytest.raises(DiffusionError, match="the size of the picture is unknown"):
        made(code_stride=None).sample(codes, mask, 2)
    with pytest.raises(DiffusionError, match=r"a scheduler of \['ddim'.*got 'magic'"):
        decoder.sample(codes, mask, 2, scheduler="magic")


def test_schedule_survives_a_model_made_on_meta() -> None:
    with torch.device("meta"):
        decoder = DiffusionDecoder(CONFIG, CODES)
    assert decoder.noise_schedule.alphas_cumprod.device.type == "cpu"


def test_measured_latents_are_standard_and_decode_back() -> None:
    torch.manual_seed(0)
    vae = LatentAutoencoder(CONFIG.vae)
    images = torch.rand(4, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(
            vae.encode(images), vae.model.encode(images * 2 - 1).latent_dist.mode() * 0.5
        )
        before = vae.decode(vae.encode(images))
        vae.measure(images)
        latents = vae.encode(images)
        torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-4)
        torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(4), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(vae.decode(latents), before, rtol=1e-4, atol=1e-4)
    assert {"scale", "shift"} <= set(vae.state_dict())


def test_vae_losses_are_l1_kl_and_the_given_distance() -> None:
    torch.manual_seed(0)
    vae = LatentAutoencoder(CONFIG.vae)
    images = torch.rand(2, 3, 16, 16)
    found = vae_losses(
        vae,
        images,
        kl_weight=0.1,
        perceptual=lambda a, b: (a - b).square().mean(),
        perceptual_weight=2.0,
        generator=torch.Generator().manual_seed(1),
    )
    posterior = vae.model.encode(images * 2 - 1).latent_dist
    sampled = posterior.mean + posterior.std * torch.randn(
        posterior.mean.shape, generator=torch.Generator().manual_seed(1)
    )
    decoded = vae.model.decode(sampled).sample / 2 + 0.5
    torch.testing.assert_close(found["l1"], (decoded - images).abs().mean())
    torch.testing.assert_close(found["perceptual"], 2 * (decoded - images).square().mean())
    kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).sum()
    torch.testing.assert_close(found["kl"], 0.1 * kl / (2 * 16 * 16))


def test_vae_learns_a_picture() -> None:
    torch.manual_seed(0)
    vae = LatentAutoencoder(CONFIG.vae)
    images = F.interpolate(torch.rand(2, 3, 4, 4), size=(16, 16), mode="bilinear")
    optimizer = torch.optim.AdamW(vae.parameters(), lr=4e-3)
    history = []
    for _ in range(30):
        losses = vae_losses(vae, images)
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        history.append(losses["l1"].item())
    assert history[-1] < 0.5 * history[0]
