"""Large pictures pass the autoencoder in tiles when memory is short."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from focus.config import VAEConfig
from focus.diffusion.vae import LatentAutoencoder

SMALL = VAEConfig(channels=(8, 16, 16), layers_per_block=1, norm_groups=2, scaling_factor=1.0)


def coded(vae: LatentAutoencoder, images: Tensor) -> tuple[Tensor, list[int]]:
    """Encode and decode; the longest side that each part of the network was given."""
    seen: list[int] = []
    hooks = [
        part.register_forward_pre_hook(
            lambda _, args, k=k: seen.append(k * max(args[0].shape[-2:]))
        )
        for part, k in ((vae.model.encoder, 1), (vae.model.decoder, 4))
    ]
    with torch.no_grad():
        found = vae.decode(vae.encode(images))
    for hook in hooks:
        hook.remove()
    return found, seen


def test_tiles_bound_what_the_network_sees() -> None:
    torch.manual_seed(0)
    vae = LatentAutoencoder(SMALL).eval()
    images = torch.rand(1, 3, 96, 64)
    whole, seen = coded(vae, images)
    assert seen == [96, 96]
    vae.tile(32)
    tiled, seen = coded(vae, images)
    assert max(seen) == 32 and len(seen) > 8
    assert tiled.shape == whole.shape and tiled.isfinite().all()
    assert (tiled - whole).abs().mean() < 0.5 * whole.std() + 0.1
    vae.tile(0)
    assert torch.equal(coded(vae, images)[0], whole)


def test_tiles_come_from_the_config() -> None:
    torch.manual_seed(0)
    plain = LatentAutoencoder(SMALL).eval()
    tiled = LatentAutoencoder(dataclasses.replace(SMALL, tile=32)).eval()
    tiled.load_state_dict(plain.state_dict())
    small = torch.rand(1, 3, 32, 32)
    assert torch.equal(coded(plain, small)[0], coded(tiled, small)[0])
    assert max(coded(tiled, torch.rand(1, 3, 64, 64))[1]) == 32
    with pytest.raises(ValueError, match="a multiple of 4 expected"):
        tiled.tile(30)
