"""transformers' Qwen2 (and the language model inside Qwen2-VL): trunk and token table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from focus.config import FocusConfig
from focus.errors import CheckpointMismatch
from focus.shards import Weights
from focus.weights.plan import Fill, Plan, pick, prefix_before, read_json, rename

ROWS_STD = 0.02  # Qwen2's initializer_range: rows of new tokens start like its own did
PAD_ROWS = 128  # Megatron's: the table is a multiple of it
LAYER = (
    *(f"self_attn.{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
    *(f"self_attn.{name}.bias" for name in ("q_proj", "k_proj", "v_proj")),
    *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
)


def configure(base: FocusConfig, directory: Path, vocabulary_size: int) -> FocusConfig:
    """Return `base` with the sizes of a Qwen2 checkpoint and room for the extended vocabulary.

    The table keeps the base config's rows when they suffice, else the next multiple of 128.
    Raises `CheckpointMismatch` for another architecture.
    """
    path = directory / "config.json"
    values = read_json(path, "Qwen2")
    values = values.get("text_config") or values
    if not str(values.get("model_type", "")).startswith("qwen2"):
        raise CheckpointMismatch(
            f"{path}: a Qwen2 or Qwen2.5 language model expected, got {values.get('model_type')!r}"
        )
    dim, heads = pick(values, "hidden_size", path), pick(values, "num_attention_heads", path)
    rope: dict[str, Any] = values.get("rope_parameters") or {}
    rows = base.llm.vocab_size
    if rows < vocabulary_size:
        rows = -(-vocabulary_size // PAD_ROWS) * PAD_ROWS
    llm = replace(
        base.llm,
        num_layers=pick(values, "num_hidden_layers", path),
        dim=dim,
        num_heads=heads,
        num_kv_heads=pick(values, "num_key_value_heads", path),
        head_dim=values.get("head_dim") or dim // heads,
        ffn_dim=pick(values, "intermediate_size", path),
        rope_theta=float(values.get("rope_theta") or rope.get("rope_theta", 1e6)),
        norm_eps=pick(values, "rms_norm_eps", path),
        tie_embeddings=bool(values.get("tie_word_embeddings", False)),
        max_length=pick(values, "max_position_embeddings", path),
        vocab_size=rows,
    )
    return replace(base, llm=llm)


def plan(config: FocusConfig, source: str, weights: Weights, text_size: int, seed: int) -> Plan:
    """Recipes for trunk, token table and, where it is not tied, the head.

    Rows below `text_size` are the checkpoint's, all others new: Qwen's own padding rows included.
    """
    prefix = prefix_before(weights, "embed_tokens.weight", "a Qwen2 language model")
    names = {
        f"trunk.layers.{layer}.{name}": f"{prefix}layers.{layer}.{name}"
        for layer in range(config.llm.num_layers)
        for name in LAYER
    }
    fills = rename({**names, "trunk.norm.weight": f"{prefix}norm.weight"})

    def extend(rows: Tensor) -> Tensor:
        return extend_rows(rows, text_size, config.llm.vocab_size, seed)

    table = f"{prefix}embed_tokens.weight"
    fills["front.token_embedding.weight"] = Fill(names=(table,), make=extend)
    if not config.llm.tie_embeddings:
        head = "lm_head.weight" if "lm_head.weight" in weights else table
        fills["heads.lm_head.weight"] = Fill(names=(head,), make=extend)
    return Plan(source=source, format="Qwen2", weights=weights, fills=fills)


def extend_rows(rows: Tensor, text_size: int, total: int, seed: int) -> Tensor:
    """Keep the first `text_size` rows of a table [V, D] and draw the others from N(0, 0.02^2)."""
    if rows.shape[0] < text_size:
        raise CheckpointMismatch(
            f"a token table of at least {text_size} rows expected, got {rows.shape[0]}; "
            "the tokenizer is of another model"
        )
    generator = torch.Generator().manual_seed(seed)
    new = torch.randn(total - text_size, rows.shape[1], generator=generator) * ROWS_STD
    return torch.cat([rows[:text_size], new.to(rows.dtype)])
