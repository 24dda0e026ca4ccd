"""The sections of a model that are exported, one `Part` each.

To add a part: a thin module in `sections.py` that calls the model's forward, and a `Part` here.
Token table, positions, region pooling and vocabulary heads stay outside: they are gathers and
single products on the weights that lie beside the parts.
"""

# B batch, S semantic tokens, T positions, D LLM width, N mask queries, K candidates, L layers

from __future__ import annotations

from collections.abc import Callable

import torch

from engine.export import drawing, sections
from engine.export.errors import ExportError
from engine.export.part import Axis, Dim, Part, Sizes, TensorSpec, numbers, picture, tensor
from focus.adapter import GatedAdapter
from focus.config import SCALES, FocusConfig
from focus.model import FocusModel
from focus.vision.hierarchical import HierarchicalEncoder

__all__ = ["Axis", "Dim", "Part", "TensorSpec", "list_parts", "part_names"]

VISION, LANGUAGE = 23, 24  # ONNX opsets: native attention and norms; native cache update
BATCH = Dim(name="batch", min=1, opt=1, max=8)
CANDIDATES = Dim(name="candidates", min=1, opt=2, max=256)
CACHE_BATCH = Dim(name="batch", min=1, opt=2, max=64)


def list_parts(model: FocusModel) -> list[Part]:
    """Return the parts of a model, in the order of a request; the model goes to evaluation mode.

    Raises `ExportError` for the ablations that change what flows between the sections.
    """
    config = model.config
    _check(config)
    model.eval()
    return [maker(model) for maker in _makers(config)]


def part_names(config: FocusConfig) -> list[str]:
    """Return the names of a config's parts; needs no weights."""
    with torch.device("meta"):
        return [part.name for part in list_parts(FocusModel(config))]


def _makers(config: FocusConfig) -> list[Callable[[FocusModel], Part]]:
    makers = [vanilla, hierarchical, fusion]
    if config.adapter.num_queries:
        makers.append(adapter)
    return [
        *makers,
        pixel_encoder,
        tokenize,
        llm_prefill,
        llm_decode,
        segment,
        drawing.codes_condition,
        drawing.unet,
        drawing.vae_encode,
        drawing.vae_decode,
        drawing.token_decoder,
    ]


def _check(config: FocusConfig) -> None:
    wrong = [
        f"{name}={got!r}"
        for name, got, taken in (
            ("inputs", config.inputs, "continuous"),
            ("hierarchical.source", config.hierarchical.source, "convnext"),
            ("diffusion.condition", config.diffusion.condition, "mask"),
        )
        if got != taken
    ]
    if wrong:
        raise ExportError(
            "a config with continuous inputs, a ConvNeXt and a mask condition expected, got "
            f"{', '.join(wrong)}; these ablations run from a checkpoint only"
        )


def _map(config: FocusConfig, scale: str) -> TensorSpec:
    index = SCALES.index(scale)
    rows, columns = config.hierarchical.grid_of(SCALES[index])
    return tensor(scale, "batch", config.hierarchical.dims[index], rows, columns)


def vanilla(model: FocusModel) -> Part:
    """X_L -> X'_L."""
    config = model.config.vanilla
    tokens = config.grid[0] * config.grid[1]
    return Part(
        name="vanilla",
        module=model.front.vanilla,
        inputs=(picture("images", config.image_size),),
        outputs=(tensor("low", "batch", tokens, config.out_dim),),
        dims=(BATCH,),
        opset=VISION,
    )


def hierarchical(model: FocusModel) -> Part:
    """X_H -> res2, res3, res4, res5."""
    config = model.config
    assert isinstance(model.front.hierarchical, HierarchicalEncoder)
    return Part(
        name="hierarchical",
        module=sections.Maps(model.front.hierarchical),
        inputs=(picture("images", config.hierarchical.image_size),),
        outputs=tuple(_map(config, scale) for scale in SCALES),
        dims=(BATCH,),
        opset=VISION,
    )


def fusion(model: FocusModel) -> Part:
    """X'_L and the scales that fusion reads -> E', E_img, E_img projected."""
    config = model.config
    tokens = config.vanilla.grid[0] * config.vanilla.grid[1]
    return Part(
        name="fusion",
        module=sections.FusionSection(model.front.fusion),
        inputs=(
            tensor("low", "batch", tokens, config.vanilla.out_dim),
            *(_map(config, scale) for scale in config.fusion.scales),
        ),
        outputs=(
            tensor("e_prime", "batch", tokens, config.fusion.dim),
            tensor("e_img", "batch", tokens, config.fusion.dim),
            tensor("projected", "batch", tokens, config.llm.dim),
        ),
        dims=(BATCH,),
        opset=VISION,
    )


def adapter(model: FocusModel) -> Part:
    """The scales that the adapter reads -> h_Adapter."""
    config = model.config
    assert isinstance(model.front.adapter, GatedAdapter)
    return Part(
        name="adapter",
        module=sections.AdapterSection(model.front.adapter, config.adapter.scales),
        inputs=tuple(_map(config, scale) for scale in config.adapter.scales),
        outputs=(tensor("adapter", "batch", config.adapter.num_queries, config.llm.dim),),
        dims=(BATCH,),
        opset=VISION,
    )


def pixel_encoder(model: FocusModel) -> Part:
    """The pixel branch's copy of a picture -> X_T."""
    config = model.config.pixel
    return Part(
        name="pixel_encoder",
        module=model.front.tokenizer.pixel_encoder,
        inputs=(picture("images", config.image_size),),
        outputs=(tensor("pixel", "batch", config.codebook.dim, *config.grid),),
        dims=(BATCH,),
        opset=VISION,
    )


def tokenize(model: FocusModel) -> Part:
    """E' and X_T -> semantic and pixel codes."""
    config = model.config
    rows, columns = config.vanilla.grid
    semantic, pixel = config.semantic.codebook, config.pixel.codebook
    return Part(
        name="tokenize",
        module=sections.TokenizeSection(model.front.tokenizer),
        inputs=(
            tensor("e_prime", "batch", rows * columns, config.fusion.dim),
            tensor("pixel", "batch", pixel.dim, *config.pixel.grid),
        ),
        outputs=(
            numbers("semantic_codes", "batch", rows, columns, high=semantic.num_codes),
            numbers("pixel_codes", "batch", *config.pixel.grid, high=pixel.num_codes),
        ),
        dims=(BATCH,),
        opset=VISION,
    )


def llm_prefill(model: FocusModel, *, in_place: bool = False) -> Part:
    """Positions of any number onto a static cache: prompts, mask queries, forced tokens."""
    longest = model.config.llm.max_length
    length = Dim(name="length", min=1, opt=min(256, longest // 2), max=longest)
    return _trunk(model, "llm_prefill", length, in_place)


def llm_decode(model: FocusModel, *, in_place: bool = False) -> Part:
    """One position of every row onto a static cache."""
    return _trunk(model, "llm_decode", None, in_place)


def _trunk(model: FocusModel, name: str, length: Dim | None, in_place: bool) -> Part:
    config = model.config.llm
    single = length is None
    most = config.max_length + 1
    slots = Dim(name="slots", min=3, opt=min(1024, most), max=most)
    positions: Axis = 1 if single else "length"
    taken: Callable[[Sizes], int] = lambda sizes: sizes.get("length", 1)  # noqa: E731
    start = numbers("start", "batch", high=lambda sizes: sizes["slots"] - taken(sizes))
    valid = numbers("lengths", "batch", low=1, high=lambda sizes: taken(sizes) + 1)
    buffers = [
        tensor(f"{kind}_{layer}", "batch", config.num_kv_heads, "slots", config.head_dim)
        for layer in range(config.num_layers)
        for kind in ("key", "value")
    ]
    written = [tensor(f"new_{spec.name}", *spec.shape) for spec in buffers]
    return Part(
        name=name,
        module=sections.TrunkSection(model.trunk, single=single, in_place=in_place),
        inputs=(
            tensor("embeddings", "batch", positions, config.dim),
            start,
            *(() if single else (valid,)),
            *buffers,
        ),
        outputs=(
            tensor("hidden", "batch", positions, config.dim),
            *(() if in_place else written),
        ),
        dims=(CACHE_BATCH, slots, *(() if length is None else (length,))),
        opset=LANGUAGE,
        notes="slots counts the spare one at the end; bind new_* to the memory of the inputs",
    )


def segment(model: FocusModel) -> Part:
    """Maps and states of the language model -> masks, embeddings, scores of each kind."""
    config = model.config
    queries, dim = config.segment.num_queries, config.llm.dim
    rows, columns = config.hierarchical.grid_of("res2")
    return Part(
        name="segment",
        module=sections.SegmentSection(model.heads.segment),
        inputs=(
            *(_map(config, scale) for scale in SCALES),
            tensor("mask_states", "batch", queries, dim),
            tensor("condition_states", "batch", "candidates", dim),
        ),
        outputs=(
            tensor("masks", "batch", queries, rows, columns),
            tensor("embeddings", "batch", queries, config.segment.dim),
            tensor("class_scores", "batch", queries, "candidates+1"),
            tensor("text_scores", "batch", queries, "candidates"),
            tensor("region_scores", "batch", queries, "candidates"),
        ),
        dims=(BATCH, CANDIDATES),
        opset=VISION,
    )
