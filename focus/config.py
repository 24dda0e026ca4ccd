"""Sizes of every part of FOCUS, as frozen keyword-only dataclasses.

A config says how large the parts are, never how they are trained (that is a run, `engine/runs.py`).
Each default is either the paper's figure or our reading of a gap in it; the docstrings say which.
The named configs are in `focus/presets.py`.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

FORMAT_VERSION = 2

Scale = Literal["res2", "res3", "res4", "res5"]
SCALES: tuple[Scale, ...] = ("res2", "res3", "res4", "res5")


class ConfigError(ValueError):
    """A config that contradicts itself, or a JSON that is not a config."""


@dataclass(frozen=True, kw_only=True)
class VanillaConfig:
    """Vanilla encoder: a Qwen2-VL vision tower (paper 3.1, "QwenViT").

    `family="qwen2_5_vl"` is its successor: RMS norms, gated feed-forward layers of `ffn_dim`, and
    attention inside windows of `window_size` pixels except in `full_blocks`.
    `image_size` is (height, width) of X_L; one merged token covers
    `patch_size * merge_size` pixels (28 in the paper) each way.
    """

    image_size: tuple[int, int] = (252, 252)
    patch_size: int = 14
    merge_size: int = 2
    temporal_patch_size: int = 2
    depth: int = 32
    dim: int = 1280
    num_heads: int = 16
    mlp_ratio: float = 4.0
    out_dim: int = 3584
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    family: Literal["qwen2_vl", "qwen2_5_vl"] = "qwen2_vl"
    ffn_dim: int = 3420
    window_size: int = 112
    full_blocks: tuple[int, ...] = (7, 15, 23, 31)

    @property
    def stride(self) -> int:
        """Pixels that one merged token covers each way."""
        return self.patch_size * self.merge_size

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of merged tokens."""
        return self.image_size[0] // self.stride, self.image_size[1] // self.stride


@dataclass(frozen=True, kw_only=True)
class HierarchicalConfig:
    """Hierarchical encoder: ConvNeXt, four scales at strides 4, 8, 16 and 32 (paper 3.1).

    `source="vanilla"` is the model without it: the four maps are resampled from the vanilla
    encoder's tokens through one linear map each, and nothing sees X_H.
    """

    source: Literal["convnext", "vanilla"] = "convnext"
    image_size: tuple[int, int] = (768, 768)
    depths: tuple[int, int, int, int] = (3, 3, 27, 3)
    dims: tuple[int, int, int, int] = (192, 384, 768, 1536)
    drop_path: float = 0.0

    def dim_of(self, scale: Scale) -> int:
        """Channels of one scale."""
        return self.dims[SCALES.index(scale)]

    def grid_of(self, scale: Scale) -> tuple[int, int]:
        """Rows and columns of one scale."""
        stride = 4 << SCALES.index(scale)
        return self.image_size[0] // stride, self.image_size[1] // stride


@dataclass(frozen=True, kw_only=True)
class FusionConfig:
    """Cross-attention of vanilla tokens onto hierarchical features (eq. 1-2).

    `residual=False` is eq. 2 to the letter. With the residual and a zero-initialised output
    projection the fused feature starts as the vanilla one, so the semantic target stays reachable.
    Without `scales` there is no attention: E' is the projected vanilla feature.
    """

    dim: int = 1280
    num_heads: int = 16
    scales: tuple[Scale, ...] = ("res5",)
    residual: bool = True
    mlp_ratio: float = 4.0
    rope_theta: float = 10_000.0


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Gated cross-attention adapter (eq. 3-4): learnable queries, layer l reads scale j = l.

    `num_queries=0` is the model without it.
    """

    num_queries: int = 128
    dim: int = 768
    num_heads: int = 12
    scales: tuple[Scale, ...] = ("res3", "res4", "res5")
    position: bool = True
    ffn_ratio: float = 4.0


@dataclass(frozen=True, kw_only=True)
class SimVQConfig:
    """Frozen Gaussian codebook times one learned linear map (SimVQ)."""

    num_codes: int = 32_768
    dim: int = 32
    bias: bool = False
    beta: float = 0.25


@dataclass(frozen=True, kw_only=True)
class SemanticConfig:
    """Semantic branch of the tokenizer: transformer blocks around a SimVQ codebook."""

    depth: int = 4
    dim: int = 1280
    num_heads: int = 16
    codebook: SimVQConfig = field(default_factory=lambda: SimVQConfig(num_codes=32_768))


@dataclass(frozen=True, kw_only=True)
class PixelConfig:
    """Pixel branch: MoVQ encoder and decoder around a SimVQ codebook.

    Stride is 2 ** (len(multipliers) - 1), 16 in the paper. `residual_sampling` adds the
    parameter-free pixel-(un)shuffle shortcuts of ILLUME+ to every down- and up-sampling.
    """

    image_size: tuple[int, int] = (256, 256)
    encoder_channels: int = 128
    decoder_channels: int = 384
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_blocks: int = 2
    attention_levels: tuple[int, ...] = (4,)
    norm_groups: int = 32
    residual_sampling: bool = True
    codebook: SimVQConfig = field(default_factory=lambda: SimVQConfig(num_codes=98_304))

    @property
    def stride(self) -> int:
        """Pixels that one pixel token covers each way."""
        return 1 << (len(self.multipliers) - 1)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of pixel tokens."""
        return self.image_size[0] // self.stride, self.image_size[1] // self.stride


@dataclass(frozen=True, kw_only=True)
class LLMConfig:
    """Qwen2 trunk. `vocab_size` counts rows of the embedding table, visual tokens included.

    `visual_position` adds a learned (row, column) embedding to visual tokens, going in and coming
    out. The paper has plain 1-D positions (False); from scratch on a laptop the model needs it to
    line up the source picture with the picture it writes. `visual_gain` ends every projection of
    visual features with an RMSNorm whose gain starts there (None: no norm, as in the paper, where
    pretrained encoders and a warm-up settle the scale).
    """

    num_layers: int = 36
    dim: int = 2048
    num_heads: int = 16
    num_kv_heads: int = 2
    head_dim: int = 128
    ffn_dim: int = 11_008
    vocab_size: int = 283_136
    rope_theta: float = 1e6
    norm_eps: float = 1e-6
    tie_embeddings: bool = True
    max_length: int = 32_768
    visual_position: bool = False
    visual_gain: float | None = None


@dataclass(frozen=True, kw_only=True)
class SegmentConfig:
    """Segmentation predictor (eq. 5): Mask2Former's pixel and masked decoder fed by LLM states.

    `place` adds where a cell lies to its mask feature (not in Mask2Former, whose deep encoder finds
    out by itself): a shallow one separates objects by colour alone.
    """

    dim: int = 256
    num_queries: int = 100
    num_heads: int = 8
    encoder_layers: int = 6
    encoder_ffn_dim: int = 1024
    decoder_layers: int = 9
    decoder_ffn_dim: int = 2048
    num_points: int = 12_544
    place: bool = False


@dataclass(frozen=True, kw_only=True)
class RegionConfig:
    """Pooling of clicks, scribbles, boxes and masks into one vector per region (facts, section 9).

    `hierarchical_scale` adds point-sampled features of that scale through a zero-initialised
    projection; `position` adds the mean Fourier position of the sampled points.
    """

    num_points: int = 256
    click_radius: float = 10 / 768
    scribble_radius: float = 5 / 768
    hierarchical_scale: Scale | None = "res4"
    position: bool = False


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """Latent autoencoder (SDXL's AutoencoderKL at full scale).

    `tile`: side in pixels of the tiles that larger pictures are coded in, one after the other,
    overlapping by a quarter and blended, which bounds memory; 0 codes every picture whole. Group
    norms then see a tile, so colours may shift slightly.
    """

    channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_groups: int = 32
    scaling_factor: float = 0.13025
    tile: int = 0

    @property
    def stride(self) -> int:
        """Pixels that one latent covers each way."""
        return 1 << (len(self.channels) - 1)


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """Diffusion decoder: SDXL's UNet with code channels and mask attention (eq. 6).

    `upscale` is output size over bucket size (the paper's super-resolution, 2).
    `mask_grid="pooled"` pools keys to each level's own grid; "full" keeps every latent.
    `condition="queries"` attends to the hidden states of the mask tokens instead of the masks (the
    alternative that the paper rejects). `mask_gradient=False` stops the decoder's loss at the mask:
    segmentation and editing are then not trained jointly.
    """

    channels: tuple[int, ...] = (320, 640, 1280)
    layers_per_block: int = 2
    transformer_depth: tuple[int, ...] = (0, 2, 10)
    head_dim: int = 64
    context_dim: int = 2048
    num_masks: int = 1
    mask_position: Literal["rope", "none"] = "rope"
    mask_grid: Literal["pooled", "full"] = "pooled"
    norm_groups: int = 32
    condition: Literal["mask", "queries"] = "mask"
    mask_gradient: bool = True
    upscale: int = 2
    vae: VAEConfig = field(default_factory=VAEConfig)
    prediction: Literal["epsilon", "v_prediction"] = "epsilon"
    num_sizes: int = 12


@dataclass(frozen=True, kw_only=True)
class FocusConfig:
    """The whole model; the only object that `model.py` needs.

    `inputs="quantised"`: the language model reads the codes of pictures, not continuous features.
    """

    name: str
    inputs: Literal["continuous", "quantised"] = "continuous"
    vanilla: VanillaConfig = field(default_factory=VanillaConfig)
    hierarchical: HierarchicalConfig = field(default_factory=HierarchicalConfig)
    fusion: FusionConfig = field(default_factory=FusionConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    semantic: SemanticConfig = field(default_factory=SemanticConfig)
    pixel: PixelConfig = field(default_factory=PixelConfig)
    llm: LLMConfig = field(default_factory=LLMConfig)
    segment: SegmentConfig = field(default_factory=SegmentConfig)
    region: RegionConfig = field(default_factory=RegionConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)

    def __post_init__(self) -> None:
        for part, size, stride in (
            ("vanilla", self.vanilla.image_size, self.vanilla.stride),
            ("hierarchical", self.hierarchical.image_size, 32),
            ("pixel", self.pixel.image_size, self.pixel.stride),
        ):
            if size[0] % stride or size[1] % stride:
                raise ConfigError(
                    f"{part}.image_size must be a multiple of {stride} pixels, got {size}; "
                    f"use {tuple(max(1, s // stride) * stride for s in size)}"
                )
        if self.semantic.codebook.dim != self.pixel.codebook.dim:
            raise ConfigError(
                "semantic and pixel codes are concatenated, so both codebooks need one dim: got "
                f"{self.semantic.codebook.dim} and {self.pixel.codebook.dim}"
            )
        if self.llm.num_heads % self.llm.num_kv_heads:
            raise ConfigError(
                f"llm.num_heads ({self.llm.num_heads}) must be a multiple of "
                f"llm.num_kv_heads ({self.llm.num_kv_heads})"
            )
        if not self.fusion.scales and not self.fusion.residual:
            raise ConfigError("fusion without scales needs residual=True: nothing else is left")

    @property
    def code_channels(self) -> int:
        """Channels of the merged semantic and pixel codes."""
        return self.semantic.codebook.dim + self.pixel.codebook.dim


C = TypeVar("C")


def to_json(config: FocusConfig) -> dict[str, Any]:
    """Return the config as plain JSON values, with the format version beside it."""
    return {"format_version": FORMAT_VERSION, **dataclasses.asdict(config)}


def from_json(values: dict[str, Any]) -> FocusConfig:
    """Rebuild a config from `to_json`; unknown or missing keys raise `ConfigError`."""
    values = dict(values)
    version = values.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise ConfigError(
            f"config format version {FORMAT_VERSION} expected, got {version!r}; "
            "this file was written by another release of focus-vl"
        )
    return _build(FocusConfig, values, "config")


def _build(cls: type[C], values: Any, path: str) -> C:
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: an object expected, got {type(values).__name__}")
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ConfigError(f"{path}: unknown keys {unknown}; known are {sorted(hints)}")
    built: dict[str, Any] = {}
    for name, value in values.items():
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            built[name] = _build(typing.cast(type[Any], hint), value, f"{path}.{name}")
        elif not _fits(hint, value):
            told = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
            raise ConfigError(f"{path}.{name}: {told} expected, got {value!r}")
        else:
            built[name] = tuple(value) if isinstance(value, list) else value
    try:
        return cls(**built)
    except (TypeError, ZeroDivisionError) as error:
        raise ConfigError(f"{path}: {error}") from error


def _fits(hint: Any, value: Any) -> bool:
    """Whether a JSON value may stand in a field of this type; lists stand for tuples."""
    inside = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return value in inside
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_fits(choice, value) for choice in inside)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, (list, tuple)):
            return False
        kinds = inside[:1] * len(value) if inside[-1] is Ellipsis else inside
        return len(kinds) == len(value) and all(map(_fits, kinds, value))
    if isinstance(value, bool):  # an int to Python
        return hint is bool
    if hint is float:
        return isinstance(value, (int, float)) and math.isfinite(value)
    return isinstance(value, hint)
