"""Thin modules that call the model's own forward with flat tensors in and out.

Nothing is computed here: each wrapper holds the model's modules under `own`-named attributes and
hands tensors through, so that an exported graph is the model's graph.
"""

# B batch, T positions, S slots of the cache, D width, L layers

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from focus.config import SCALES, Scale
from focus.diffusion.attention import MaskContext
from focus.diffusion.decoder import DiffusionDecoder
from focus.diffusion.unet import run_unet
from focus.diffusion.vae import LatentAutoencoder
from focus.llm import KVCache, Qwen2Trunk
from focus.segment.predictor import KINDS, SegmentationPredictor
from focus.tokenizer.dual import Codes, DualTokenizer
from focus.vision.fusion import Fusion


class Maps(nn.Module):
    """A hierarchical encoder: X_H -> res2, res3, res4, res5."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """See `HierarchicalEncoder`."""
        return tuple(self.encoder(images))


class ScaledMaps(nn.Module):
    """A reader of some of the four scales: puts the maps it gets at their places."""

    def __init__(self, scales: Sequence[Scale]) -> None:
        super().__init__()
        self.scales = tuple(scales)

    def place(self, maps: Sequence[Tensor]) -> list[Any]:
        """Return the four maps; those that nobody reads are None."""
        given = dict(zip(self.scales, maps, strict=True))
        return [given.get(scale) for scale in SCALES]


class FusionSection(ScaledMaps):
    """(X'_L, the maps that fusion reads) -> E', E_img, E_img projected (eq. 1-2)."""

    def __init__(self, fusion: Fusion) -> None:
        super().__init__(fusion.config.scales)
        self.fusion = fusion

    def forward(self, low: Tensor, *maps: Tensor) -> tuple[Tensor, ...]:
        """See `Fusion`."""
        return tuple(self.fusion(low, self.place(maps)))


class AdapterSection(ScaledMaps):
    """The maps that the adapter reads -> h_Adapter (eq. 3-4)."""

    def __init__(self, adapter: nn.Module, scales: Sequence[Scale]) -> None:
        super().__init__(scales)
        self.adapter = adapter

    def forward(self, *maps: Tensor) -> Tensor:
        """See `GatedAdapter`; it asks the first map for the batch alone."""
        placed = self.place(maps)
        placed[0] = maps[0] if placed[0] is None else placed[0]
        adapted: Tensor = self.adapter(placed)
        return adapted


class TokenizeSection(nn.Module):
    """(E', X_T) -> codes of a picture (nearest code of every token)."""

    def __init__(self, tokenizer: DualTokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, e_prime: Tensor, pixel: Tensor) -> tuple[Tensor, Tensor]:
        """See `DualTokenizer.encode`."""
        codes = self.tokenizer.encode(e_prime, pixel)
        return codes.semantic, codes.pixel


class CodesSection(nn.Module):
    """Codes -> merged code map, what both decoders are conditioned on."""

    def __init__(self, tokenizer: DualTokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, semantic: Tensor, pixel: Tensor) -> Tensor:
        """See `DualTokenizer.embed`."""
        return self.tokenizer.embed(Codes(semantic, pixel))


class BoundCache(KVCache):
    """A static cache over buffers that somebody else owns: one [B, K, S, d] per layer.

    Every call attends over all slots but the spare one, so shapes never change. A call writes into
    the buffers; who called counts the positions.
    """

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor], lengths: Tensor) -> None:
        buffers: Any = (list(keys), list(values))
        self.keys, self.values = buffers
        self.lengths = lengths
        self.max_length = keys[0].shape[2] - 1
        self.whole = True
        self._bound = 0

    @property
    def batch(self) -> int:
        """Number of rows."""
        return self.keys[0].shape[0]

    def reserve(self, num: int, lengths: Tensor | None = None) -> int:
        """Return the slots to attend over: all but the spare one."""
        del num, lengths
        return self.max_length

    def advance(self, lengths: Tensor | None, num: int) -> None:
        """Count nothing: positions are an input of the part."""


class TrunkSection(nn.Module):
    """One call of the language model on a static cache: hidden states and the cache after it.

    forward(embeddings [B, T, D], start [B], lengths [B], key_0, value_0, key_1, ...) ->
    (hidden [B, T, D], key_0, value_0, ...). `single` is the decode step: T = 1, no `lengths`.
    `in_place` writes into the given buffers and returns the hidden states alone.
    """

    def __init__(self, trunk: Qwen2Trunk, *, single: bool = False, in_place: bool = False) -> None:
        super().__init__()
        self.trunk = trunk
        self.single, self.in_place = single, in_place

    def forward(self, embeddings: Tensor, start: Tensor, *rest: Tensor) -> Any:
        """See the class."""
        lengths, buffers = (None, rest) if self.single else (rest[0], rest[1:])
        if not self.in_place:
            buffers = tuple(buffer.clone() for buffer in buffers)
        cache = BoundCache(buffers[0::2], buffers[1::2], start)
        hidden = self.trunk(embeddings, lengths=lengths, cache=cache)
        return hidden if self.in_place else (hidden, *buffers)


class SegmentSection(nn.Module):
    """(res2..res5, E_Q, E_P) -> mask logits, track embeddings, scores of each kind (eq. 5)."""

    def __init__(self, predictor: SegmentationPredictor) -> None:
        super().__init__()
        self.predictor = predictor

    def forward(
        self,
        res2: Tensor,
        res3: Tensor,
        res4: Tensor,
        res5: Tensor,
        mask_states: Tensor,
        condition_states: Tensor,
    ) -> tuple[Tensor, ...]:
        """See `SegmentationPredictor`; the kinds differ in two small projections only."""
        masks, states = self.predictor.decode((res2, res3, res4, res5), mask_states)
        last = states[-1:]
        scores = [self.predictor.scores(last, condition_states, kind)[0] for kind in KINDS]
        return masks[-1], self.predictor.embedding(last[0]), *scores


class DenoiseSection(nn.Module):
    """One UNet call: (latents, codes, timestep, size_index, mask of every level) -> prediction.

    Codes and masks are on the latent grid, as `DiffusionDecoder.conditions` prepares them once per
    picture. Masks of zeros are the unconditioned decoder.
    """

    def __init__(self, decoder: DiffusionDecoder) -> None:
        super().__init__()
        self.config = decoder.config
        self.unet = decoder.unet
        self.mask_projection = decoder.mask_projection

    def forward(
        self, latents: Tensor, codes: Tensor, timestep: Tensor, size_index: Tensor, *masks: Tensor
    ) -> Tensor:
        """See `focus.diffusion.unet.run_unet`."""
        height, width = latents.shape[-2:]
        context = MaskContext(tuple(masks), self.mask_projection.weight, height, width)
        return run_unet(self.unet, latents, codes, timestep, context, size_index, self.config)


class LatentEncode(nn.Module):
    """Picture -> standardised latents."""

    def __init__(self, vae: LatentAutoencoder) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, images: Tensor) -> Tensor:
        """See `LatentAutoencoder.encode`."""
        return self.vae.encode(images)


class LatentDecode(nn.Module):
    """Standardised latents -> picture, not clamped."""

    def __init__(self, vae: LatentAutoencoder) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        """See `LatentAutoencoder.decode`."""
        return self.vae.decode(latents)
