"""Dual tokenizer: semantic and pixel codes of a picture, and the picture back from them."""

# B batch, S semantic tokens, hs ws semantic grid, hp wp pixel grid, d code width

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from focus.config import FocusConfig
from focus.errors import ShapeError
from focus.tokenizer.adversary import Adversary, PerceptualLoss
from focus.tokenizer.pixel import PixelDecoder, PixelEncoder
from focus.tokenizer.resize import resize_bicubic
from focus.tokenizer.semantic import SemanticBranch, semantic_loss
from focus.tokenizer.simvq import SimVQ

Grid = tuple[int, int]


class Codes(NamedTuple):
    """A batch of pictures as integers."""

    semantic: Tensor  # [B, hs, ws] int64
    pixel: Tensor  # [B, hp, wp] int64


@dataclass(frozen=True, kw_only=True)
class CodeNoise:
    """In `sample_rate` of the pictures, `token_rate` of the pixel codes come from a neighbour."""

    sample_rate: float = 0.1
    token_rate: float = 0.1


@dataclass(frozen=True, kw_only=True)
class TokenizerWeights:
    """Weights of the losses of `train_step`; those of the GAN are the `Adversary`'s."""

    l1: float = 1.0
    perceptual: float = 1.0
    semantic: float = 1.0
    vq_semantic: float = 1.0
    vq_pixel: float = 1.0


class TokenizerStep(TypedDict):
    """What one training step gives: the loss is the sum of `losses`."""

    recon: Tensor  # [B, 3, H, W] on the [0, 1] scale
    codes: Codes
    losses: dict[str, Tensor]  # weighted
    metrics: dict[str, Tensor]  # detached


class DualTokenizer(nn.Module):
    """Both branches and their codebooks.

    Semantic: E' -> blocks -> SimVQ -> blocks -> X'_L. Pixel: picture -> MoVQ encoder -> 1x1
    convolution -> SimVQ. The semantic codes, resized bicubically to the pixel grid, and the pixel
    codes side by side are the merged codes, which the pixel decoder turns into the picture.
    """

    def __init__(self, config: FocusConfig) -> None:
        super().__init__()
        self.config = config
        width = config.pixel.codebook.dim
        self.semantic = SemanticBranch(config.semantic, config.fusion.dim, config.vanilla.out_dim)
        self.semantic_codes = SimVQ(config.semantic.codebook)
        self.pixel_encoder = PixelEncoder(config.pixel)
        self.pre_quantise = nn.Conv2d(width, width, kernel_size=1)
        self.pixel_codes = SimVQ(config.pixel.codebook)
        self.pixel_decoder = PixelDecoder(config.pixel, config.code_channels)

    @torch.no_grad()
    def encode(self, e_prime: Tensor, pixel_features: Tensor, grid: Grid | None = None) -> Codes:
        """E' [B, S, dim] and X_T [B, d, hp, wp] -> `Codes`, without gradient.

        `grid` is (hs, ws) when the picture is not of the config's size.
        Raises ShapeError when the grid does not hold S cells.
        """
        rows, columns = self._grid(e_prime, grid)
        vectors = self.semantic.encode(e_prime, (rows, columns))
        semantic = self.semantic_codes.nearest(vectors).view(-1, rows, columns)
        return Codes(semantic, self.pixel_codes.nearest(self._pixel_vectors(pixel_features)))

    def embed(self, codes: Codes) -> Tensor:
        """Codes -> merged code map [B, 2d, hp, wp] in fp32."""
        return self.merge(
            self.semantic_codes.lookup(codes.semantic), self.pixel_codes.lookup(codes.pixel)
        )

    def merge(self, semantic: Tensor, pixel: Tensor) -> Tensor:
        """Vectors [B, hs, ws, d] and [B, hp, wp, d] -> merged code map [B, 2d, hp, wp]."""
        fine = pixel.permute(0, 3, 1, 2)
        coarse = resize_bicubic(semantic.permute(0, 3, 1, 2), (fine.shape[2], fine.shape[3]))
        return torch.cat([coarse.to(fine.dtype), fine], dim=1)

    def decode(self, codes: Codes) -> Tensor:
        """Codes -> picture [B, 3, H, W] on the [0, 1] scale, not clamped."""
        dtype = self.pre_quantise.weight.dtype
        picture: Tensor = self.pixel_decoder(self.embed(codes).to(dtype))
        return picture

    def train_step(
        self,
        e_prime: Tensor,
        x_low: Tensor,
        images: Tensor,
        *,
        step: int = 0,
        perceptual: PerceptualLoss | None = None,
        adversary: Adversary | None = None,
        noise: CodeNoise | None = None,
        weights: TokenizerWeights | None = None,
        grid: Grid | None = None,
    ) -> TokenizerStep:
        """Reconstruct the picture and the vanilla feature; return every loss as a named term.

        loss = |x^ - x| + LPIPS(x^, x) + 0.5 (-D(x^)) + VQ_pixel + (1 - cos) + VQ_semantic, plus the
        discriminator's own term, which shares no parameter with the rest: one backward serves both.
        e_prime [B, S, dim], x_low [B, S, out_dim] target, images [B, 3, H, W] in [0, 1].
        Raises ShapeError when the grid does not hold S cells.
        """
        scale = weights or TokenizerWeights()
        rows, columns = self._grid(e_prime, grid)
        semantic = self.semantic_codes(self.semantic.encode(e_prime, (rows, columns)))
        decoded = self.semantic.decode(semantic.codes, (rows, columns))
        pixel = self.pixel_codes(self._pixel_vectors(self.pixel_encoder(images)))
        pixel_map = swap_codes(pixel.codes, noise) if noise and self.training else pixel.codes
        semantic_map = semantic.codes.view(-1, rows, columns, semantic.codes.shape[-1])
        recon = self.pixel_decoder(self.merge(semantic_map, pixel_map))
        losses = {
            "l1": scale.l1 * F.l1_loss(recon.float(), images.float()),
            "semantic": scale.semantic * semantic_loss(decoded, x_low),
            "vq_semantic": scale.vq_semantic * semantic.loss,
            "vq_pixel": scale.vq_pixel * pixel.loss,
        }
        metrics: dict[str, Tensor] = {}
        if perceptual is not None:
            losses["perceptual"] = scale.perceptual * perceptual(recon, images)
        terms = adversary(recon, images, step) if adversary is not None else None
        if terms is not None:
            losses["adversarial"] = terms.generator
            losses["discriminator"] = terms.discriminator
            metrics = {"logit_real": terms.real, "logit_fake": terms.fake}
        codes = Codes(semantic.index.view(-1, rows, columns), pixel.index)
        return TokenizerStep(recon=recon, codes=codes, losses=losses, metrics=metrics)

    def _pixel_vectors(self, features: Tensor) -> Tensor:
        vectors: Tensor = self.pre_quantise(features).permute(0, 2, 3, 1)
        return vectors

    def _grid(self, e_prime: Tensor, grid: Grid | None) -> Grid:
        rows, columns = grid if grid is not None else self.config.vanilla.grid
        if rows * columns != e_prime.shape[1]:
            raise ShapeError(
                f"{rows} x {columns} semantic tokens expected, got {e_prime.shape[1]}; "
                "pass grid=(rows, columns) of the picture"
            )
        return rows, columns


def swap_codes(codes: Tensor, noise: CodeNoise) -> Tensor:
    """Replace some codes [B, h, w, d] by the previous picture's at the same place, detached."""
    batch, rows, columns, _ = codes.shape
    sample = torch.rand(batch, 1, 1, 1, device=codes.device) < noise.sample_rate
    token = torch.rand(batch, rows, columns, 1, device=codes.device) < noise.token_rate
    return torch.where(sample & token, codes.detach().roll(1, dims=0), codes)
