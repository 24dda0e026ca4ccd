"""Our trunk's sizes as a config of transformers, whose Qwen2 is the peer of several measures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from focus.config import LLMConfig

if TYPE_CHECKING:
    from transformers import Qwen2Config


def qwen2_config(config: LLMConfig, **more: Any) -> Qwen2Config:
    """Return the config of a Qwen2 of the same sizes; `more` as transformers names it."""
    from transformers import Qwen2Config

    return Qwen2Config(
        **{
            "vocab_size": config.vocab_size,
            "hidden_size": config.dim,
            "intermediate_size": config.ffn_dim,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "max_position_embeddings": config.max_length,
            "rms_norm_eps": config.norm_eps,
            "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
            "tie_word_embeddings": config.tie_embeddings,
        }
        | more
    )
