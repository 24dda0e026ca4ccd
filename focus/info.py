"""What a config is made of: parameters, memory, tokens and operations, without allocating a weight.

Parameters are counted on the meta device. Operations are those of matrix products, convolutions and
attentions (one multiply-add = 2), counted by running every part on fake tensors.
"""

# B batch, T sequence, H heads, N queries, L keys, d head width

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils.flop_counter import FlopCounterMode

from focus.batch import Pictures
from focus.buckets import BUCKETS, Bucket, bucket_of, buckets_for
from focus.config import FocusConfig
from focus.diffusion.unet import mask_attentions
from focus.model import FocusModel

WORDS = 16  # tokens of an answer that names objects
ANSWER = 64  # tokens of an answer to a question
PROMPT = 60  # tokens of ChatML, instruction and condition around the picture
STEPS = 50  # denoising steps

# Part -> prefixes of its parameters, longest match first; dtype it is meant to run in.
PARTS: dict[str, tuple[str, ...]] = {
    "vanilla": ("front.vanilla.",),
    "hierarchical": ("front.hierarchical.",),
    "fusion": ("front.fusion.",),
    "adapter": ("front.adapter.",),
    "semantic_encoder": tuple(
        f"front.tokenizer.semantic.{name}." for name in ("input", "encoder", "to_code")
    ),
    "semantic_decoder": tuple(
        f"front.tokenizer.semantic.{name}." for name in ("from_code", "decoder", "out", "norm")
    ),
    "pixel_encoder": ("front.tokenizer.pixel_encoder.", "front.tokenizer.pre_quantise."),
    "pixel_decoder": ("front.tokenizer.pixel_decoder.",),
    "simvq": ("front.tokenizer.semantic_codes.", "front.tokenizer.pixel_codes."),
    "projectors": (
        "front.pixel_project.",
        "front.region_pooler.",
        "front.position.",
        "front.next_position.",
        "front.mask_queries",
        "front.semantic_project.",
    ),
    "llm": ("trunk.", "front.token_embedding.", "heads.lm_head."),
    "mask_decoder": ("heads.segment.",),
    "unet": ("heads.diffusion.unet.",),
    "mask_projection": ("heads.diffusion.mask_projection.", "heads.diffusion.query_projection."),
    "vae": ("heads.diffusion.vae.",),
}
DTYPES = {"simvq": "float32", "vae": "float32"}  # the search and SDXL's decoder need the range
WIDTH = {"float32": 4, "bfloat16": 2}


def build_meta(config: FocusConfig) -> FocusModel:
    """Build the model on the meta device: shapes without memory."""
    with torch.device("meta"):
        return FocusModel(config)


def part_of(name: str) -> str:
    """Return the part that a parameter or buffer belongs to."""
    for part, prefixes in PARTS.items():
        if name.startswith(prefixes):
            return part
    raise ValueError(f"{name} belongs to no part; add its prefix to focus.info.PARTS")


def count(config: FocusConfig, model: FocusModel | None = None) -> dict[str, dict[str, Any]]:
    """Return, for each part: params, buffers (frozen values), dtype and bytes in that dtype."""
    model = model or build_meta(config)
    parts: dict[str, dict[str, Any]] = {
        part: {"params": 0, "buffers": 0, "dtype": DTYPES.get(part, "bfloat16"), "bytes": 0}
        for part in PARTS
    }
    kinds: tuple[tuple[str, Any], ...] = (
        ("params", model.named_parameters()),  # tied tensors come once
        ("buffers", ((n, b) for n, b in model.named_buffers() if n in model.state_dict())),
    )
    saved = set(model.state_dict())
    for kind, tensors in kinds:
        for name, tensor in tensors:
            if name in saved:
                parts[part_of(name)][kind] += tensor.numel()
    for values in parts.values():
        values["bytes"] = (values["params"] + values["buffers"]) * WIDTH[str(values["dtype"])]
    return parts


def count_mask_attention(model: FocusModel) -> dict[str, int]:
    """Number of mask attentions in the UNet and their parameters: what stage 4 trains of it."""
    found = mask_attentions(model.heads.diffusion.unet)
    params = sum(p.numel() for module in found for p in module.parameters())
    return {"modules": len(found), "params": params}


def describe_buckets(config: FocusConfig) -> list[dict[str, Any]]:
    """Tokens, output size and latent size of each bucket; pairs are (height, width)."""
    up, stride = config.diffusion.upscale, config.diffusion.vae.stride
    return [
        {
            "size": bucket.size,
            "vit": bucket.vit_size,
            "semantic": bucket.semantic_grid,
            "pixel": bucket.pixel_grid,
            "block_tokens": bucket.block_length,
            "tokens": bucket.block_length + 2,
            "output": tuple(side * up for side in bucket.size),
            "latent": tuple(side * up // stride for side in bucket.size),
        }
        for bucket in buckets_for(config)
    ]


@dataclass(frozen=True, kw_only=True)
class Operations:
    """Operations of the steps that tasks are made of, at one bucket and batch 1."""

    encode: int  # both encoders, fusion, adapter, pixel encoder
    tokenize: int  # semantic branch and both codebook searches
    segment: int  # predictor with one candidate
    preview: int  # pixel decoder
    unet: int  # one call with a mask
    vae: int  # latents to picture


def measure(config: FocusConfig, bucket: Bucket) -> Operations:
    """Count the operations of every step by running it on fake tensors."""
    return measure_all(config, [bucket])[0]


def measure_all(
    config: FocusConfig, buckets: Sequence[Bucket], model: FocusModel | None = None
) -> list[Operations]:
    """The same at several buckets, with one model: that of `build_meta`, which is used up."""
    with FakeTensorMode(), torch.no_grad():
        fake = fake_model(config, model)
        return [_measure(fake, bucket) for bucket in buckets]


def _measure(fake: FocusModel, bucket: Bucket) -> Operations:
    """Run every step on fake tensors, inside their mode."""
    config = fake.config
    up, stride = config.diffusion.upscale, config.diffusion.vae.stride
    latent = (bucket.size[0] * up // stride, bucket.size[1] * up // stride)
    front, heads = fake.front, fake.heads
    pictures = Pictures(
        vanilla=torch.empty(1, 3, *bucket.vit_size),
        hierarchical=torch.empty(1, 3, *config.hierarchical.image_size),
        pixel=torch.empty(1, 3, *bucket.size),
    )
    encode, features = counted(lambda: front.encode(pictures))
    codes = torch.empty(1, config.code_channels, *bucket.pixel_grid)
    states = torch.empty(1, config.segment.num_queries, config.llm.dim)
    grid = bucket.semantic_grid

    def paint() -> Tensor:
        mask = torch.empty(1, config.diffusion.num_masks, *latent)
        resized, context = heads.diffusion.conditions(codes, mask, latent)
        noisy = torch.empty(1, config.diffusion.vae.latent_channels, *latent)
        step = torch.zeros(1, dtype=torch.int64)
        return heads.diffusion.predict(noisy, resized, step, context)

    return Operations(
        encode=encode,
        tokenize=counted(
            lambda: front.tokenizer.encode(features.fused.e_prime, features.pixel, grid)
        )[0],
        segment=counted(lambda: heads.segment(features.maps, states, states[:, :1], "text"))[0],
        preview=counted(lambda: front.tokenizer.pixel_decoder(codes))[0],
        unet=counted(paint)[0],
        vae=counted(
            lambda: heads.diffusion.vae.decode(
                torch.empty(1, config.diffusion.vae.latent_channels, *latent)
            )
        )[0],
    )


def read_tokens(config: FocusConfig, start: int, num: int) -> int:
    """Operations of the trunk for `num` tokens on top of `start` that the cache holds.

    sum_layers 2 N_weights num + 4 H d sum_{t} t,   t = start + 1 ... start + num
    """
    llm = config.llm
    heads = llm.num_heads * llm.head_dim
    weights = llm.dim * (2 * heads + 2 * llm.num_kv_heads * llm.head_dim + 3 * llm.ffn_dim)
    seen = num * start + num * (num + 1) // 2
    return llm.num_layers * (2 * weights * num + 4 * heads * seen)


def per_task(config: FocusConfig, bucket: Bucket, steps: Operations) -> dict[str, int]:
    """Operations of one request of every task at one bucket, with guidance where it is the default.

    Prompts are counted as 60 tokens around the picture, answers as 16 tokens that name objects or
    64 that answer a question; drawing is 50 steps, two branches each.
    """
    block, queries = bucket.block_length + 2, config.segment.num_queries
    picture = PROMPT + block + 2 + config.adapter.num_queries
    head = 2 * config.llm.dim

    def say(start: int, num: int) -> int:
        return read_tokens(config, start, num) + num * head * config.llm.vocab_size

    def draw(start: int) -> int:
        per_code = (config.semantic.codebook.num_codes, config.pixel.codebook.num_codes)
        grids = bucket.grids
        codes = sum(r * c * n for (r, c), n in zip(grids, per_code, strict=True))
        return 2 * (read_tokens(config, start, block) + head * codes)

    paint = 2 * STEPS * steps.unet + steps.vae
    seen = steps.encode + read_tokens(config, 0, picture)
    masks = say(picture, WORDS) + read_tokens(config, picture + WORDS, queries) + steps.segment
    segment = seen + masks
    told = picture + WORDS + queries
    return {
        "class": segment,
        "referring": segment,
        "reasoning": segment,
        "interactive": segment,
        "vqa": seen + say(picture, ANSWER),
        "generation": 2 * read_tokens(config, 0, PROMPT) + draw(PROMPT) + paint,
        "editing": segment + read_tokens(config, 0, told) + draw(told) + paint,
    }


def describe(config: FocusConfig, *, flops: bool = True) -> dict[str, Any]:
    """Return the whole report as JSON values; see `focus info`."""
    model = build_meta(config).requires_grad_(False)
    parts = count(config, model)
    llm = config.llm
    report: dict[str, Any] = {
        "parts": parts,
        "total": {
            key: sum(part[key] for part in parts.values()) for key in ("params", "buffers", "bytes")
        },
        "mask_attention": count_mask_attention(model),
        "cache_bytes_per_token": 4 * llm.num_layers * llm.num_kv_heads * llm.head_dim,
        "buckets": describe_buckets(config),
    }
    if flops:
        report["flops"] = {}
        sizes = [bucket_of(config)]
        if sizes[0].size != (512, 512) and len(report["buckets"]) > 1:
            sizes.append(next(b for b in BUCKETS if b.size == (512, 512)))
        for bucket, steps in zip(sizes, measure_all(config, sizes, model), strict=True):
            report["flops"]["{}x{}".format(*bucket.size)] = {
                "steps": vars(steps),
                "tasks": per_task(config, bucket, steps),
            }
    return report


def fake_model(config: FocusConfig, model: FocusModel | None = None) -> FocusModel:
    """Return a model of fake CPU tensors, made of `model` if given; call it in a FakeTensorMode."""
    with unset_fake_temporarily():
        model = (model or build_meta(config)).requires_grad_(False)
    model._apply(  # type: ignore[no-untyped-call]
        lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype)
    )
    return model.eval()


def counted(run: Any) -> tuple[int, Any]:
    """Operations of one call, and what it returned."""
    formulas = {
        torch.ops.focus.gated_cross_attention: _gated_cross_attention,
        torch.ops.focus.mask_attention: _mask_attention,
        torch.ops.focus.codebook_lookup: _codebook_lookup,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    }
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        result = run()
    return int(counter.get_total_flops()), result


def _gated_cross_attention(*shapes: Any, **_: Any) -> int:
    """Projections of Q queries and L features, then attention: all of eq. 3."""
    (batch, queries, dim), (_, keys, channels) = shapes[1], shapes[2]
    project = 2 * batch * (2 * queries * dim * dim + keys * dim * (channels + 2 * dim))
    return int(project + 4 * batch * queries * keys * dim)


def _mask_attention(*shapes: Any, **_: Any) -> int:
    """Dense attention over all keys; the structured implementations need far less."""
    batch, heads, queries, width = shapes[0]
    return int(4 * batch * heads * queries * width * shapes[1][-2] * shapes[1][-1])


def _codebook_lookup(*shapes: Any, **_: Any) -> int:
    (num, width), (codes, _width) = shapes[0], shapes[1]
    return int(2 * num * width * codes)


def _attention(*shapes: Any, **_: Any) -> int:
    """Attention as PyTorch runs it on a CPU, which its own counter leaves out."""
    (batch, heads, queries, width), (_b, _h, keys, _d) = shapes[0], shapes[1]
    return int(2 * batch * heads * queries * keys * (width + shapes[2][-1]))
