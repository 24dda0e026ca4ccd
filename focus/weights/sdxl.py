"""diffusers' SDXL: UNet and VAE, in the directories `unet` and `vae` of a pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from focus.config import DiffusionConfig, FocusConfig, VAEConfig
from focus.diffusion.unet import time_dim, widen_input
from focus.errors import CheckpointMismatch
from focus.shards import Weights
from focus.weights.plan import Fill, Plan, pick, read_json

OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
UNET, VAE = "heads.diffusion.unet.", "heads.diffusion.vae.model."
CONV_IN = UNET + "conv_in.weight"


def configure(base: FocusConfig, directory: Path) -> FocusConfig:
    """Return `base` with the sizes of an SDXL pipeline's UNet and VAE.

    Raises `CheckpointMismatch` for another kind of UNet.
    """
    path = directory / "unet" / "config.json"
    values = read_json(path, "SDXL's UNet")
    if values.get("addition_embed_type") != "text_time" or not values.get("use_linear_projection"):
        raise CheckpointMismatch(
            f"{path}: SDXL's UNet expected (text_time conditions, linear projections); "
            "Stable Diffusion 1 and 2 do not fit"
        )
    channels = tuple(pick(values, "block_out_channels", path))
    blocks = pick(values, "down_block_types", path)
    depths = _per_level(pick(values, "transformer_layers_per_block", path), len(channels))
    heads = _per_level(pick(values, "attention_head_dim", path), len(channels))
    depth = tuple(d if "CrossAttn" in block else 0 for d, block in zip(depths, blocks, strict=True))
    widths = {c // h for c, h, d in zip(channels, heads, depth, strict=True) if d}
    if len(widths) != 1:
        raise CheckpointMismatch(f"{path}: one head width on all levels expected, got {widths}")
    vae = _vae(base.diffusion.vae, directory / "vae" / "config.json")
    diffusion: DiffusionConfig = replace(
        base.diffusion,
        channels=channels,
        transformer_depth=depth,
        head_dim=widths.pop(),
        layers_per_block=pick(values, "layers_per_block", path),
        context_dim=pick(values, "cross_attention_dim", path),
        norm_groups=values.get("norm_num_groups", 32),
        prediction=_prediction(directory),
        vae=vae,
    )
    if values.get("addition_time_embed_dim") != time_dim(diffusion):
        raise CheckpointMismatch(
            f"{path}: addition_time_embed_dim {time_dim(diffusion)} expected (an eighth of "
            f"cross_attention_dim), got {values.get('addition_time_embed_dim')}"
        )
    return replace(base, diffusion=diffusion)


def _vae(base: VAEConfig, path: Path) -> VAEConfig:
    values = read_json(path, "SDXL's VAE")
    return replace(
        base,
        channels=tuple(pick(values, "block_out_channels", path)),
        layers_per_block=pick(values, "layers_per_block", path),
        latent_channels=pick(values, "latent_channels", path),
        norm_groups=values.get("norm_num_groups", 32),
        scaling_factor=float(pick(values, "scaling_factor", path)),
    )


def _prediction(directory: Path) -> Any:
    path = directory / "scheduler" / "scheduler_config.json"
    return (
        read_json(path, "scheduler").get("prediction_type", "epsilon")
        if path.is_file()
        else "epsilon"
    )


def _per_level(value: Any, count: int) -> tuple[int, ...]:
    if isinstance(value, Sequence):
        return tuple(int(entry) for entry in value)
    return (int(value),) * count


def plan_unet(config: FocusConfig, source: str, weights: Weights, own: list[str]) -> Plan:
    """Recipes for the UNet: same names; `conv_in` gets zero-initialised code channels."""
    channels = config.diffusion.vae.latent_channels + config.code_channels

    def widen(weight: Tensor) -> Tensor:
        return widen_input(weight, channels)

    fills = {
        name: Fill(names=(name.removeprefix(UNET),), make=widen if name == CONV_IN else None)
        for name in own
        if name.startswith(UNET)
    }
    return Plan(source=source, format="SDXL UNet", weights=weights, fills=fills)


def plan_vae(config: FocusConfig, source: str, weights: Weights, own: list[str]) -> Plan:
    """Recipes for the VAE; attentions may have their names of before diffusers 0.18."""
    fills = {}
    for name in own:
        if not name.startswith(VAE):
            continue
        theirs = name.removeprefix(VAE)
        if theirs not in weights:
            theirs = _old_name(theirs)
        matrix = ".attentions." in name and name.endswith("weight") and "group_norm" not in name
        fills[name] = Fill(names=(theirs,), make=_matrix if matrix else None)
    return Plan(source=source, format="SDXL VAE", weights=weights, fills=fills)


def _old_name(name: str) -> str:
    for new, old in OLD_ATTENTION.items():
        name = name.replace(f".{new}.", f".{old}.") if ".attentions." in name else name
    return name


def _matrix(weight: Tensor) -> Tensor:
    return weight.flatten(1)  # old checkpoints keep 1 x 1 convolutions
