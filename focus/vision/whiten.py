"""Whitening: a projection that starts with all directions of its input equally strong.

Features of an encoder have a few strong directions and many weak ones; gradient descent reads the
weak ones last, however much they say. Full scale does not need this: its projections are warmed up
on millions of pairs.
"""

# N samples, C input channels, D output channels

from __future__ import annotations

import torch
from torch import Tensor, nn

from focus.errors import ShapeError

SHRINK = 0.02  # of the mean variance, added to every direction so that noise stays small


@torch.no_grad()
def whiten(linear: nn.Linear, samples: Tensor, generator: torch.Generator | None = None) -> None:
    """Set `linear` to a random rotation of the whitened input, whose mean becomes zero.

        W = Q (S + s tr(S) / C)^(-1/2),  b = -W mu,  Q [D, C] with orthonormal columns (or rows)

    samples: inputs [..., C], of which mu and S are mean and covariance.
    Raises `ShapeError` when there are fewer samples than channels.
    """
    flat = samples.flatten(0, -2).double()
    if len(flat) <= linear.in_features or flat.shape[1] != linear.in_features:
        raise ShapeError(
            f"more than {linear.in_features} samples of {linear.in_features} channels expected, "
            f"got {tuple(flat.shape)}"
        )
    mean = flat.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov(flat.T))
    scale = (values.clamp(min=0) + SHRINK * values.mean()).rsqrt()
    drawn = torch.randn(
        linear.out_features, linear.in_features, generator=generator, dtype=torch.float64
    )
    wide = linear.in_features > linear.out_features
    rotation = torch.linalg.qr(drawn.T if wide else drawn).Q
    weight = (rotation.T if wide else rotation) @ (vectors * scale) @ vectors.T
    linear.weight.copy_(weight.to(linear.weight))
    if linear.bias is not None:
        linear.bias.copy_(-(weight @ mean).to(linear.bias))
