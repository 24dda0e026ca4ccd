"""Qwen2 weights between our trunk (transformers' names) and megatron-core's `GPTModel`.

linear_qkv rows, per key/value group: its query heads, its key, its value (weights and biases)
linear_fc1 rows on each tensor-parallel rank: its slice of gate, then its slice of up
linear_proj, linear_fc2: split along the input
"""

# G key/value groups, r query heads per group, d head width

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from focus.config import LLMConfig

Kind = Literal["copy", "rows", "columns", "qkv", "pair"]


@dataclass(frozen=True)
class Entry:
    """One megatron parameter: the names that it is made of here, and how they are joined."""

    names: tuple[str, ...]
    kind: Kind


_LAYER: dict[str, Entry] = {
    "input_layernorm.weight": Entry(("input_layernorm.weight",), "copy"),
    "pre_mlp_layernorm.weight": Entry(("post_attention_layernorm.weight",), "copy"),
    # transformer-engine fuses the norms into the linear layers that follow
    "self_attention.linear_qkv.layer_norm_weight": Entry(("input_layernorm.weight",), "copy"),
    "mlp.linear_fc1.layer_norm_weight": Entry(("post_attention_layernorm.weight",), "copy"),
    "self_attention.linear_qkv.weight": Entry(
        tuple(f"self_attn.{x}_proj.weight" for x in "qkv"), "qkv"
    ),
    "self_attention.linear_qkv.bias": Entry(
        tuple(f"self_attn.{x}_proj.bias" for x in "qkv"), "qkv"
    ),
    "self_attention.linear_proj.weight": Entry(("self_attn.o_proj.weight",), "columns"),
    "mlp.linear_fc1.weight": Entry(("mlp.gate_proj.weight", "mlp.up_proj.weight"), "pair"),
    "mlp.linear_fc2.weight": Entry(("mlp.down_proj.weight",), "columns"),
}


@dataclass(frozen=True)
class Names:
    """How one library calls what surrounds the layers."""

    trunk: str  # prefix of `layers.0...` and `norm.weight`
    table: str
    head: str


FOCUS = Names("trunk.", "front.token_embedding.weight", "heads.lm_head.weight")
TRANSFORMERS = Names("model.", "model.embed_tokens.weight", "lm_head.weight")


def entry(name: str, llm: LLMConfig, names: Names = FOCUS) -> Entry:
    """Return what the megatron parameter `name` (with global layer numbers) is made of."""
    if name == "embedding.word_embeddings.weight":
        return Entry((names.table,), "rows")
    if name == "output_layer.weight":
        return Entry((names.table if llm.tie_embeddings else names.head,), "rows")
    if name == "decoder.final_layernorm.weight":
        return Entry((f"{names.trunk}norm.weight",), "copy")
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
    if match is None or match[2] not in _LAYER:
        raise KeyError(f"no map for the megatron parameter {name!r}")
    found = _LAYER[match[2]]
    prefix = f"{names.trunk}layers.{match[1]}."
    return Entry(tuple(prefix + part for part in found.names), found.kind)


def shard(
    found: Entry, tensors: Mapping[str, Tensor], llm: LLMConfig, rank: int, size: int
) -> Tensor:
    """Join the parts of one parameter and cut out the share of one tensor-parallel rank."""
    parts = [tensors[name] for name in found.names]
    if found.kind == "copy":
        return parts[0]
    if found.kind == "pair":
        return torch.cat([part.chunk(size, 0)[rank] for part in parts], 0)
    if found.kind == "qkv":
        return pack_qkv(parts[0], parts[1], parts[2], llm).chunk(size, 0)[rank]
    return parts[0].chunk(size, 0 if found.kind == "rows" else 1)[rank]


def unshard(found: Entry, shards: list[Tensor], llm: LLMConfig) -> dict[str, Tensor]:
    """Return the parts that all ranks' shards of one parameter are made of."""
    if found.kind == "copy":
        return {found.names[0]: shards[0]}
    if found.kind == "pair":
        halves = [part.chunk(2, 0) for part in shards]
        joined = [torch.cat([half[i] for half in halves], 0) for i in range(2)]
        return dict(zip(found.names, joined, strict=True))
    if found.kind == "qkv":
        return dict(zip(found.names, unpack_qkv(torch.cat(shards, 0), llm), strict=True))
    return {found.names[0]: torch.cat(shards, 0 if found.kind == "rows" else 1)}


def pack_qkv(query: Tensor, key: Tensor, value: Tensor, llm: LLMConfig) -> Tensor:
    """Interleave [G r d, ...], [G d, ...], [G d, ...] per group into [G (r + 2) d, ...]."""
    groups = llm.num_kv_heads
    split = [part.reshape(groups, -1, *part.shape[1:]) for part in (query, key, value)]
    return torch.cat(split, 1).flatten(0, 1)


def unpack_qkv(packed: Tensor, llm: LLMConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Undo `pack_qkv`."""
    width = llm.head_dim
    per_group = llm.num_heads // llm.num_kv_heads * width
    grouped = packed.reshape(llm.num_kv_heads, -1, *packed.shape[1:])
    query, key, value = torch.split(grouped, [per_group, width, width], 1)
    return query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1)
