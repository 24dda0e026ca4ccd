"""Masks that follow the edges of the picture: a colour guided filter over their probabilities.

Masks are predicted at a quarter of the frame's sides, so their edges lie a pixel or two off. The
guided filter (He, Sun and Tang, "Guided Image Filtering", ECCV 2010) explains a mask p by the
colours I around each pixel,

    a_k = (cov_k(I, I) + eps 1)^-1 cov_k(I, p),   b_k = mean_k(p) - a_k . mean_k(I)
    q_i = mean_{k near i}(a_k) . I_i + mean_{k near i}(b_k)

with means over square windows k, and so moves an edge of p to the edge of I beside it. It is not in
the paper; where colours do not tell an object from what is behind it, it only smooths.
"""

# I masks, H W frame

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Refinement:
    """How masks are refined.

    radius: of the windows, as a share of the frame's shorter side. eps: variance of colours in
    [0, 1] below which a window counts as flat. rounds: how often the filter runs; between two runs
    probabilities move to the sides by p <- sigmoid(sharpness (p - 1/2)).
    """

    radius: float = 0.04
    eps: float = 1e-3
    rounds: int = 3
    sharpness: float = 8.0

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if not 0 < self.radius < 0.5 or self.eps <= 0 or self.rounds < 1 or self.sharpness <= 0:
            raise ValueError(
                "a radius between 0 and 0.5, positive eps and sharpness and at least one round "
                f"expected, got {self}"
            )


def _band(size: int, radius: int, like: Tensor) -> Tensor:
    """Matrix [size, size] that takes means over windows of 2 radius + 1, cut off at the ends."""
    place = torch.arange(size, device=like.device)
    near = ((place[:, None] - place).abs() <= radius).to(like)
    return near / near.sum(1, keepdim=True)


class GuidedFilter:
    """The filter of one picture [3, H, W] in [0, 1], windows of 2 radius + 1 pixels."""

    def __init__(self, picture: Tensor, radius: int, eps: float) -> None:
        self.picture = picture
        self.rows, self.columns = (_band(size, radius, picture) for size in picture.shape[1:])
        self.colour = self._mean(picture)
        products = self._mean(picture[:, None] * picture)
        spread = (products - self.colour[:, None] * self.colour).permute(2, 3, 0, 1)
        floor = eps * torch.eye(3, dtype=picture.dtype, device=picture.device)
        self.inverse = torch.linalg.inv(spread + floor).permute(2, 3, 0, 1).contiguous()

    def _mean(self, maps: Tensor) -> Tensor:
        """Mean of maps [..., H, W] over the windows; a product with a band each way is fastest."""
        return self.rows @ maps @ self.columns.T

    def __call__(self, maps: Tensor) -> Tensor:
        """Filter maps [I, H, W]."""
        means = self._mean(maps)
        shared = self._mean(self.picture[:, None] * maps) - self.colour[:, None] * means
        slope = torch.stack([(row[:, None] * shared).sum(0) for row in self.inverse])
        offset = means - (slope * self.colour[:, None]).sum(0)
        return (self._mean(slope) * self.picture[:, None]).sum(0) + self._mean(offset)


def refine(probabilities: Tensor, picture: Tensor, how: Refinement) -> Tensor:
    """Refine masks [I, H, W] of probabilities by the picture [3, H, W] in [0, 1] they lie in."""
    if not len(probabilities):
        return probabilities
    radius = max(1, round(how.radius * min(picture.shape[1:])))
    guided, found = GuidedFilter(picture.float(), radius, how.eps), probabilities.float()
    for number in range(how.rounds):
        if number:
            found = torch.sigmoid(how.sharpness * (found - 0.5))
        found = guided(found).clamp(0.0, 1.0)
    return found
