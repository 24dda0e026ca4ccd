"""transformers' Mask2Former: pixel decoder, masked decoder and the positions of its queries."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from focus.config import FocusConfig
from focus.errors import CheckpointMismatch
from focus.shards import Weights
from focus.weights.plan import Fill, Plan, pick, prefix_before, read_json

ANCHOR = "pixel_level_module.decoder.mask_projection.weight"


def configure(base: FocusConfig, directory: Path) -> FocusConfig:
    """Return `base` with the sizes of a Mask2Former.

    Raises `CheckpointMismatch` for another architecture, or one whose mask features have another
    width than its queries.
    """
    path = directory / "config.json"
    values = read_json(path, "Mask2Former")
    if values.get("model_type") != "mask2former":
        raise CheckpointMismatch(
            f"{path}: a Mask2Former expected, got {values.get('model_type')!r}"
        )
    dim = pick(values, "hidden_dim", path)
    for key in ("mask_feature_size", "feature_size"):
        if values.get(key, dim) != dim:
            raise CheckpointMismatch(f"{path}: {key} equal to hidden_dim {dim} expected")
    segment = replace(
        base.segment,
        dim=dim,
        num_queries=pick(values, "num_queries", path),
        num_heads=pick(values, "num_attention_heads", path),
        encoder_layers=pick(values, "encoder_layers", path),
        encoder_ffn_dim=pick(values, "encoder_feedforward_dim", path),
        decoder_layers=pick(values, "decoder_layers", path) - 1,  # theirs counts prediction sets
        decoder_ffn_dim=pick(values, "dim_feedforward", path),
    )
    return replace(base, segment=segment)


def plan(config: FocusConfig, source: str, weights: Weights, own: list[str]) -> Plan:
    """Recipes for both decoders; `own`: names of our model.

    Convolutions that read the backbone are new when the checkpoint's backbone has other widths than
    ours. Left out: its backbone, its query contents (ours come from the language model) and its
    classifier (ours compares with prompts).
    """
    prefix = prefix_before(weights, ANCHOR, "a Mask2Former")
    fills: dict[str, Fill] = {}
    for part, theirs in (
        ("pixel_decoder.", "pixel_level_module.decoder."),
        ("decoder.", "transformer_module.decoder."),
    ):
        ours = f"heads.segment.{part}"
        for name in own:
            if name.startswith(ours):
                rest = name[len(ours) :]
                loose = rest.startswith(("input_projections.", "adapter_"))
                fills[name] = Fill(names=(prefix + theirs + rest,), loose=loose)
    for name, other in (
        ("query_position.weight", "queries_embedder.weight"),
        ("level_embedding.weight", "level_embed.weight"),
    ):
        fills[f"heads.segment.{name}"] = Fill(names=(f"{prefix}transformer_module.{other}",))
    return Plan(source=source, format="Mask2Former", weights=weights, fills=fills)
