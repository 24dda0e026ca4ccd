"""Perceptual distance and the one-backward GAN against their textbook forms."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from focus.tokenizer.adversary import (
    Adversary,
    Discriminator,
    PerceptualLoss,
    hinge_discriminator,
    hinge_generator,
)


def pictures() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.rand(2, 3, 32, 32, requires_grad=True), torch.rand(2, 3, 32, 32)


def test_discriminator_has_the_published_size() -> None:
    # 3-64, 64-128, 128-256, 256-512, 512-1, kernels of 4; norms of the three inner ones.
    convolutions = 16 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 512) + 64 + 1
    got = sum(p.numel() for p in Discriminator().parameters())
    assert got == convolutions + 2 * (128 + 256 + 512)
    assert Discriminator(8, norm="batch")(torch.rand(2, 3, 64, 64)).shape == (2, 1, 6, 6)


def test_hinge_losses_equal_their_formulas() -> None:
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-2.0, 1.0])
    assert hinge_generator(fake).item() == pytest.approx(0.5)
    assert hinge_discriminator(real, fake).item() == pytest.approx(0.5 * (0.25 + 1.0))


def test_one_backward_equals_two_phases() -> None:
    fake, real = pictures()
    judge = Discriminator(8)
    terms = Adversary(judge, weight=0.5, discriminator_weight=0.5, start=0)(fake, real, step=20_000)
    assert terms is not None
    (terms.generator + terms.discriminator).backward()
    for_generator = torch.autograd.grad(-0.5 * judge(fake).mean(), fake)[0]
    torch.testing.assert_close(fake.grad, for_generator)
    separate = 0.25 * (F.relu(1 - judge(real)).mean() + F.relu(1 + judge(fake.detach())).mean())
    wanted = torch.autograd.grad(separate, list(judge.parameters()))
    for parameter, gradient in zip(judge.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_adversary_follows_its_schedule() -> None:
    fake, real = pictures()
    adversary = Adversary(Discriminator(8), start=10, discriminator_start=5)
    assert adversary(fake, real, 4) is None
    early, late = adversary(fake, real, 5), adversary(fake, real, 10)
    assert early is not None
    assert early.generator.item() == 0
    assert early.discriminator.item() > 0
    assert late is not None
    assert late.generator.item() != 0
    assert late.fake.item() == pytest.approx(-2 * late.generator.item())


class Features(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3, stride=2)

    def forward(self, images: Tensor) -> list[Tensor]:
        first = F.relu(self.one(images))
        return [first, self.two(first)]


def test_perceptual_loss_is_the_distance_of_unit_features() -> None:
    one, two = pictures()
    features = Features()
    weights = [torch.rand(4), torch.rand(6)]
    expected = torch.zeros(())
    for f, g, w in zip(features(one), features(two), weights, strict=True):
        square = (F.normalize(f, dim=1) - F.normalize(g, dim=1)).square()
        expected = expected + (square * w.view(-1, 1, 1)).sum(1).mean()
    got = PerceptualLoss(features, weights)(one, two)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert PerceptualLoss(features)(two, two).item() == 0


def test_perceptual_loss_trains_the_picture_alone() -> None:
    one, two = pictures()
    features = Features()
    PerceptualLoss(features)(one, two).backward()
    assert one.grad is not None
    assert one.grad.abs().max() > 0
    assert all(p.grad is None for p in features.parameters())
