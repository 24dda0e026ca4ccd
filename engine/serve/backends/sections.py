"""Stand-ins for the model's modules: the same calls, answered by a part of a bundle."""

# B batch, T positions, D width, S slots of the cache, N mask queries, K candidates

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from engine.export.errors import ExportError
from engine.serve.backends.base import Runtime
from focus.config import SCALES, FocusConfig
from focus.diffusion.attention import MaskContext
from focus.llm import KVCache
from focus.segment.predictor import Kind, Prediction
from focus.tokenizer.dual import Codes
from focus.vision.fusion import Fused

Grid = tuple[int, int]


class Section(nn.Module):
    """A module that owns nothing but a runtime."""

    def __init__(self, runtime: Runtime) -> None:
        super().__init__()
        self.run = runtime.run


class RunVanilla(Section):
    """Stands for `VanillaEncoder`."""

    def forward(self, images: Tensor) -> Tensor:
        """X_L -> X'_L."""
        return self.run("vanilla", {"images": images})["low"]


class RunMaps(Section):
    """Stands for `HierarchicalEncoder`."""

    def forward(self, images: Tensor) -> list[Tensor]:
        """X_H -> four maps."""
        found = self.run("hierarchical", {"images": images})
        return [found[scale] for scale in SCALES]


class RunFusion(Section):
    """Stands for `Fusion`."""

    def __init__(self, runtime: Runtime, config: FocusConfig) -> None:
        super().__init__(runtime)
        self.scales = config.fusion.scales

    def forward(self, low: Tensor, maps: Sequence[Tensor], grid: Grid | None = None) -> Fused:
        """X'_L and maps -> E', E_img, projected; the grid is the bundle's own."""
        del grid
        inputs: dict[str, Tensor] = {scale: maps[SCALES.index(scale)] for scale in self.scales}
        found = self.run("fusion", {"low": low, **inputs})
        return Fused(found["e_prime"], found["e_img"], found["projected"])


class RunAdapter(Section):
    """Stands for `GatedAdapter`."""

    def __init__(self, runtime: Runtime, config: FocusConfig) -> None:
        super().__init__(runtime)
        self.scales = config.adapter.scales

    def forward(self, maps: Sequence[Tensor], queries: Tensor | None = None) -> Tensor:
        """Maps -> h_Adapter, from the learned queries."""
        if queries is not None:
            raise ExportError("a bundle starts from the learned queries; use the eager model")
        inputs: dict[str, Tensor] = {scale: maps[SCALES.index(scale)] for scale in self.scales}
        return self.run("adapter", inputs)["adapter"]


class RunPixelEncoder(Section):
    """Stands for `PixelEncoder`."""

    def forward(self, images: Tensor) -> Tensor:
        """Picture -> X_T."""
        return self.run("pixel_encoder", {"images": images})["pixel"]


class RunPixelDecoder(Section):
    """Stands for `PixelDecoder`."""

    def forward(self, codes: Tensor) -> Tensor:
        """Merged code map -> picture."""
        return self.run("token_decoder", {"codes": codes})["images"]


class RunTokenizer(Section):
    """Stands for `DualTokenizer`, as far as inference calls it."""

    def __init__(self, runtime: Runtime) -> None:
        super().__init__(runtime)
        self.pixel_encoder = RunPixelEncoder(runtime)
        self.pixel_decoder = RunPixelDecoder(runtime)

    def encode(self, e_prime: Tensor, pixel: Tensor, grid: Grid | None = None) -> Codes:
        """E' and X_T -> codes; the grid is the bundle's own."""
        del grid
        found = self.run("tokenize", {"e_prime": e_prime, "pixel": pixel})
        return Codes(found["semantic_codes"], found["pixel_codes"])

    def embed(self, codes: Codes) -> Tensor:
        """Codes -> merged code map."""
        inputs = {"semantic_codes": codes.semantic, "pixel_codes": codes.pixel}
        return self.run("codes_condition", inputs)["codes"]

    def decode(self, codes: Codes) -> Tensor:
        """Codes -> picture."""
        picture: Tensor = self.pixel_decoder(self.embed(codes))
        return picture


class RunTrunk(Section):
    """Stands for `Qwen2Trunk`: prompts through `llm_prefill`, single tokens through `llm_decode`.

    The parts write straight into the cache. A row that pauses in a step of one token writes into
    the spare slot.
    """

    def __init__(self, runtime: Runtime, config: FocusConfig) -> None:
        super().__init__(runtime)
        self.config = config.llm

    def forward(
        self,
        embeddings: Tensor,
        *,
        positions: Tensor | None = None,
        lengths: Tensor | None = None,
        segments: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Embeddings [B, T, D] -> hidden states; appends to the cache."""
        if positions is not None or segments is not None:
            raise ExportError("a bundle counts positions itself; use the eager model for packing")
        batch, num = embeddings.shape[:2]
        if cache is None:
            cache = KVCache(self.config, batch, num, embeddings.dtype, embeddings.device)
        cache.reserve(num, lengths)
        start, inputs = cache.lengths, {"embeddings": embeddings}
        name = "llm_decode" if num == 1 else "llm_prefill"
        if num > 1:
            inputs["lengths"] = (
                torch.full((batch,), num, device=embeddings.device) if lengths is None else lengths
            )
        elif lengths is not None:
            start = torch.where(lengths > 0, start, cache.max_length)
        inputs["start"] = start
        into = {}
        for layer, (key, value) in enumerate(zip(cache.keys, cache.values, strict=True)):
            inputs[f"key_{layer}"], inputs[f"value_{layer}"] = key, value
            into[f"new_key_{layer}"], into[f"new_value_{layer}"] = key, value
        hidden = self.run(name, inputs, into)["hidden"]
        cache.advance(lengths, num)
        return hidden


class RunSegmenter(Section):
    """Stands for `SegmentationPredictor`."""

    def forward(
        self,
        features: Sequence[Tensor],
        mask_states: Tensor,
        condition_states: Tensor,
        kind: Kind,
    ) -> Prediction:
        """Maps and states -> masks, scores of one kind, embeddings; no auxiliary predictions."""
        inputs: dict[str, Tensor] = dict(zip(SCALES, features, strict=True))
        inputs.update(mask_states=mask_states, condition_states=condition_states)
        found = self.run("segment", inputs)
        return Prediction(
            masks=found["masks"],
            scores=found[f"{kind}_scores"],
            embeddings=found["embeddings"],
        )


class RunDenoiser(Section):
    """Stands for diffusers' UNet, called as `run_unet` calls it."""

    def __init__(self, runtime: Runtime, config: FocusConfig) -> None:
        super().__init__(runtime)
        self.config = config.diffusion

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: MaskContext | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        """Latents and codes side by side -> (prediction,)."""
        del return_dict
        latents = self.config.vae.latent_channels
        inputs: dict[str, Any] = {
            "latents": sample[:, :latents],
            "codes": sample[:, latents:],
            "timestep": timestep.to(torch.int64).expand(len(sample)),
            "size_index": (added_cond_kwargs or {})["time_ids"][:, -1].round().to(torch.int64),
        }
        for level, mask in enumerate(self._masks(sample, encoder_hidden_states)):
            inputs[f"mask_{level}"] = mask
        return (self.run("unet", inputs)["prediction"],)

    def _masks(self, sample: Tensor, context: MaskContext | None) -> Sequence[Tensor]:
        """The masks of every level; zeros where there is no context, which is the same thing."""
        if context is not None:
            return context.masks
        height, width = sample.shape[-2:]
        count = range(len(self.config.channels))
        strides = [1 << level if self.config.mask_grid == "pooled" else 1 for level in count]
        return [
            sample.new_zeros(len(sample), self.config.num_masks, -(-height // s), -(-width // s))
            for s in strides
        ]


class RunAutoencoder(Section):
    """Stands for `LatentAutoencoder`."""

    def encode(
        self, images: Tensor, *, sample: bool = False, generator: torch.Generator | None = None
    ) -> Tensor:
        """Picture -> latents, the posterior's mean."""
        if sample:
            raise ExportError("a bundle gives the posterior's mean; use the eager model to sample")
        del generator
        return self.run("vae_encode", {"images": images})["latents"]

    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> picture, not clamped."""
        return self.run("vae_decode", {"latents": latents})["images"]
