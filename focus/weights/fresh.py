"""Initial values of the parts that no checkpoint brings, built one part at a time."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from focus.adapter import GatedAdapter
from focus.config import FocusConfig
from focus.diffusion.unet import build_unet
from focus.diffusion.vae import LatentAutoencoder
from focus.llm import Qwen2Trunk
from focus.model import VisualPosition
from focus.regions import RegionPooler
from focus.segment.predictor import SegmentationPredictor
from focus.tokenizer.pixel import PixelDecoder, PixelEncoder
from focus.tokenizer.semantic import SemanticBranch
from focus.tokenizer.simvq import SimVQ
from focus.vision.block import output_norm
from focus.vision.encoder import HierarchicalEncoder, VanillaEncoder
from focus.vision.fusion import Fusion
from focus.vision.pyramid import VanillaPyramid

Builder = Callable[[FocusConfig], nn.Module]

# Prefix -> how the module there is built; `focus.model` is the place these must agree with, and a
# test compares names and shapes of all of them with the model's.
BUILDERS: dict[str, Builder] = {
    "front.vanilla.": lambda c: VanillaEncoder(c.vanilla),
    "front.hierarchical.": lambda c: (
        HierarchicalEncoder(c.hierarchical)
        if c.hierarchical.source == "convnext"
        else VanillaPyramid(c.hierarchical, c.vanilla.out_dim)
    ),
    "front.fusion.": lambda c: Fusion(
        c.fusion, c.vanilla, c.hierarchical, c.llm.dim, c.llm.visual_gain
    ),
    "front.adapter.": lambda c: GatedAdapter(
        c.adapter, c.hierarchical, c.llm.dim, c.llm.visual_gain
    ),
    "front.tokenizer.semantic.": lambda c: SemanticBranch(
        c.semantic, c.fusion.dim, c.vanilla.out_dim
    ),
    "front.tokenizer.semantic_codes.": lambda c: SimVQ(c.semantic.codebook),
    "front.tokenizer.pixel_codes.": lambda c: SimVQ(c.pixel.codebook),
    "front.tokenizer.pixel_encoder.": lambda c: PixelEncoder(c.pixel),
    "front.tokenizer.pre_quantise.": lambda c: nn.Conv2d(
        c.pixel.codebook.dim, c.pixel.codebook.dim, kernel_size=1
    ),
    "front.tokenizer.pixel_decoder.": lambda c: PixelDecoder(c.pixel, c.code_channels),
    "front.pixel_project.": lambda c: nn.Sequential(
        nn.Linear(c.pixel.codebook.dim, c.llm.dim),
        nn.GELU(),
        nn.Linear(c.llm.dim, c.llm.dim),
        output_norm(c.llm.dim, c.llm.visual_gain),
    ),
    "front.semantic_project.": lambda c: nn.Sequential(
        nn.Linear(c.semantic.codebook.dim, c.llm.dim),
        nn.GELU(),
        nn.Linear(c.llm.dim, c.llm.dim),
        output_norm(c.llm.dim, c.llm.visual_gain),
    ),
    "front.region_pooler.": lambda c: RegionPooler(c.region, c.hierarchical, c.llm.dim),
    "front.position.": lambda c: VisualPosition(c.llm.dim),
    "front.next_position.": lambda c: VisualPosition(c.llm.dim),
    "trunk.": lambda c: Qwen2Trunk(c.llm),
    "heads.segment.": lambda c: SegmentationPredictor(c.segment, c.hierarchical, c.llm.dim),
    "heads.diffusion.unet.": lambda c: build_unet(c.diffusion, c.code_channels),
    "heads.diffusion.vae.": lambda c: LatentAutoencoder(c.diffusion.vae),
}
NORMAL = (  # drawn from N(0, 0.02^2)
    "front.mask_queries",
    "front.token_embedding.weight",
    "heads.lm_head.weight",
)
ZEROS = ("heads.diffusion.mask_projection.weight", "heads.diffusion.query_projection.weight")


def fresh(
    config: FocusConfig, expected: dict[str, tuple[int, ...]], seed: int
) -> Iterator[tuple[str, Tensor]]:
    """Yield initial values of the named tensors, part by part.

    expected: names and shapes. Values depend on the seed and the part only, never on what else is
    loaded. Peak memory is one part.
    """
    left = dict(expected)
    for prefix, build in BUILDERS.items():
        wanted = [name for name in left if name.startswith(prefix)]
        if not wanted:
            continue
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + zlib.crc32(prefix.encode()))
            state = build(config).state_dict()
        for name in wanted:
            yield name, state[name.removeprefix(prefix)]
            del left[name]
    for name, shape in left.items():
        if name in ZEROS:
            yield name, torch.zeros(shape)
        elif name in NORMAL:
            generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
            yield name, torch.randn(shape, generator=generator) * 0.02
        else:
            raise ValueError(f"{name} has no initial value; add it to focus.weights.fresh")
