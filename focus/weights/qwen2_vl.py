"""transformers' Qwen2-VL and Qwen2.5-VL: the vision tower, alone or out of a whole checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from focus.config import FocusConfig
from focus.errors import CheckpointMismatch
from focus.shards import Weights
from focus.vision.vanilla import qwen2_vl_names
from focus.weights.plan import Fill, Plan, pick, prefix_before, read_json


def configure(base: FocusConfig, directory: Path) -> FocusConfig:
    """Return `base` with the sizes of a Qwen2-VL vision tower.

    Raises `CheckpointMismatch` for another architecture.
    """
    path = directory / "config.json"
    whole = read_json(path, "Qwen2-VL")
    values = whole.get("vision_config") or whole
    kind = str(whole.get("model_type") or values.get("model_type"))
    if kind.startswith("qwen2_5_vl"):
        return _configure_2_5(base, values, path)
    if not kind.startswith("qwen2_vl"):
        raise CheckpointMismatch(
            f"{path}: a Qwen2-VL vision tower expected, or Qwen2.5-VL's, got {kind!r}"
        )
    if values.get("hidden_act", "quick_gelu") != "quick_gelu":
        raise CheckpointMismatch(
            f"{path}: the activation quick_gelu expected, got {values['hidden_act']!r}"
        )
    vanilla = replace(
        base.vanilla,
        family="qwen2_vl",
        depth=pick(values, "depth", path),
        dim=pick(values, "embed_dim", path),
        num_heads=pick(values, "num_heads", path),
        mlp_ratio=float(pick(values, "mlp_ratio", path)),
        out_dim=pick(values, "hidden_size", path),
        patch_size=pick(values, "patch_size", path),
        merge_size=pick(values, "spatial_merge_size", path),
        temporal_patch_size=pick(values, "temporal_patch_size", path),
    )
    return replace(base, vanilla=vanilla)


def _configure_2_5(base: FocusConfig, values: dict[str, Any], path: Path) -> FocusConfig:
    if values.get("hidden_act", "silu") != "silu":
        raise CheckpointMismatch(f"{path}: activation silu expected, got {values['hidden_act']!r}")
    vanilla = replace(
        base.vanilla,
        family="qwen2_5_vl",
        depth=pick(values, "depth", path),
        dim=pick(values, "hidden_size", path),
        num_heads=pick(values, "num_heads", path),
        ffn_dim=pick(values, "intermediate_size", path),
        out_dim=pick(values, "out_hidden_size", path),
        patch_size=pick(values, "patch_size", path),
        merge_size=pick(values, "spatial_merge_size", path),
        temporal_patch_size=pick(values, "temporal_patch_size", path),
        window_size=pick(values, "window_size", path),
        full_blocks=tuple(pick(values, "fullatt_block_indexes", path)),
    )
    return replace(base, vanilla=vanilla)


def plan(config: FocusConfig, source: str, weights: Weights) -> Plan:
    """Recipes for the vanilla encoder; the Conv3d kernel becomes the weight of a Linear."""
    prefix = prefix_before(weights, "patch_embed.proj.weight", "a Qwen2-VL vision tower")
    fills = {
        f"front.vanilla.{ours}": Fill(names=(prefix + theirs,))
        for ours, theirs in qwen2_vl_names(config.vanilla).items()
    }
    name = prefix + "patch_embed.proj.weight"
    fills["front.vanilla.patch.weight"] = Fill(names=(name,), make=flatten)
    family = "Qwen2.5-VL" if config.vanilla.family == "qwen2_5_vl" else "Qwen2-VL"
    return Plan(source=source, format=family, weights=weights, fills=fills)


def flatten(kernel: Tensor) -> Tensor:
    """Conv3d kernel [C, 3, frames, P, P] to the weight of a Linear over flat patches."""
    return kernel.reshape(kernel.shape[0], -1)
