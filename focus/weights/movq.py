"""MoVQ (diffusers' VQModel with spatial norms, or MoVQGAN's own names): the pixel branch.

A MoVQ has one codebook, FOCUS's decoder reads two: the weights that read codes get zeros for the
semantic half, so that the imported decoder gives exactly the MoVQ's picture whatever the semantic
codes are. A decoder that already reads both halves is taken as it is. The codebook becomes SimVQ's
frozen one under the identity map: every vector keeps its code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from focus.config import FocusConfig
from focus.errors import CheckpointMismatch
from focus.shards import Weights
from focus.weights.plan import Fill, Plan, pick, read_json

HOME = "front.tokenizer."


def configure(base: FocusConfig, directory: Path) -> FocusConfig:
    """Return `base` with the sizes of a VQModel; the semantic codes take its code width.

    Raises `CheckpointMismatch` for a VQModel without spatial norms (a VQGAN, not a MoVQ).
    """
    path = directory / "config.json"
    values = read_json(path, "MoVQ (diffusers' VQModel)")
    if values.get("_class_name", "VQModel") != "VQModel" or values.get("norm_type") != "spatial":
        raise CheckpointMismatch(
            f"{path}: a VQModel with norm_type 'spatial' expected, got "
            f"{values.get('_class_name')!r} with {values.get('norm_type')!r}"
        )
    channels = tuple(pick(values, "block_out_channels", path))
    if any(width % channels[0] for width in channels):
        raise CheckpointMismatch(f"{path}: widths in multiples of the first expected: {channels}")
    dim = values.get("vq_embed_dim") or pick(values, "latent_channels", path)
    attention = tuple(
        i for i, b in enumerate(pick(values, "down_block_types", path)) if "Attn" in b
    )
    pixel = replace(
        base.pixel,
        encoder_channels=channels[0],
        decoder_channels=channels[0],
        multipliers=tuple(width // channels[0] for width in channels),
        num_blocks=pick(values, "layers_per_block", path),
        attention_levels=attention,
        norm_groups=values.get("norm_num_groups", 32),
        residual_sampling=False,
        codebook=replace(
            base.pixel.codebook,
            num_codes=pick(values, "num_vq_embeddings", path),
            dim=dim,
            bias=False,
        ),
    )
    semantic = replace(base.semantic, codebook=replace(base.semantic.codebook, dim=dim))
    return replace(base, pixel=pixel, semantic=semantic)


def plan(config: FocusConfig, source: str, weights: Weights, own: list[str]) -> Plan:
    """Recipes for pixel encoder, decoder and codebook; `own`: names of our model."""
    names = {diffusers_name(name, weights): name for name in weights}
    codes = config.code_channels
    fills: dict[str, Fill] = {}
    for name in own:
        part = name.removeprefix(HOME)
        if part.startswith(("pixel_encoder.", "pre_quantise.", "pixel_decoder.")):
            theirs = _theirs(part, len(config.pixel.multipliers))
            fill = Fill(names=tuple(names.get(t, t) for t in theirs), make=_make(part, codes))
            fills[name] = fill
    fills[f"{HOME}pixel_codes.codebook"] = Fill(
        names=(names.get("quantize.embedding.weight", "quantize.embedding.weight"),)
    )
    fills[f"{HOME}pixel_codes.project.weight"] = Fill(
        names=fills[f"{HOME}pixel_codes.codebook"].names, make=_identity
    )
    return Plan(source=source, format="MoVQ", weights=weights, fills=fills)


def _make(part: str, codes: int) -> Any:
    """How the tensors of diffusers become ours."""

    def joined(*tensors: Tensor) -> Tensor:
        weight = torch.cat(tensors)
        if (".qkv." in part or ".project." in part) and weight.dim() == 2:
            return weight[:, :, None, None]
        if ".modulate.weight" in part or part == "pixel_decoder.input.weight":
            return right_half(weight, codes)
        if part == "pixel_decoder.post_quantise.weight":
            return right_half(right_half(weight, codes).transpose(0, 1), codes).transpose(0, 1)
        if part == "pixel_decoder.post_quantise.bias":
            return torch.cat([weight.new_zeros(codes - len(weight)), weight])
        return weight

    return joined


def right_half(weight: Tensor, channels: int) -> Tensor:
    """Put zeros before the input channels [O, I, ...] of a weight until there are `channels`."""
    missing = channels - weight.shape[1]
    if missing < 0:
        raise CheckpointMismatch(
            f"a MoVQ decoder of at most {channels} code channels expected, got {weight.shape[1]}"
        )
    zeros = weight.new_zeros(weight.shape[0], missing, *weight.shape[2:])
    return torch.cat([zeros, weight], dim=1)


def _identity(codebook: Tensor) -> Tensor:
    return torch.eye(codebook.shape[1], dtype=codebook.dtype)


def _theirs(part: str, levels: int) -> tuple[str, ...]:
    """Names in diffusers' VQModel of the tensors that make one of ours."""
    module, kind = part.rsplit(".", 1)
    if module == "pre_quantise":
        return (f"quant_conv.{kind}",)
    side, rest = module.split(".", 1)
    decoder = side == "pixel_decoder"
    if rest == "post_quantise":
        return (f"post_quant_conv.{kind}",)
    base = "decoder" if decoder else "encoder"
    blocks = "up_blocks" if decoder else "down_blocks"
    rest = re.sub(r"^levels\.(\d+)\.blocks\.", rf"{blocks}.\1.resnets.", rest)
    rest = re.sub(r"^levels\.(\d+)\.attentions\.", rf"{blocks}.\1.attentions.", rest)
    rest = re.sub(r"^(?:ups|downs)\.(\d+)\.conv$", _resample(blocks, levels), rest)
    rest = re.sub(r"^middle\.block([12])", lambda m: f"mid_block.resnets.{int(m[1]) - 1}", rest)
    rest = rest.replace("middle.attention", "mid_block.attentions.0")
    rest = {"input": "conv_in", "out": "conv_out"}.get(rest, rest)
    rest = re.sub(r"\.shortcut$", ".conv_shortcut", rest)
    return tuple(f"{base}.{name}.{kind}" for name in _inner(rest, decoder))


def _resample(blocks: str, levels: int) -> str:
    sampler = "upsamplers" if blocks == "up_blocks" else "downsamplers"
    return rf"{blocks}.\1.{sampler}.0.conv"


def _inner(rest: str, decoder: bool) -> tuple[str, ...]:
    """Norms and attentions, whose insides are named otherwise."""
    if rest.endswith(".qkv"):
        return tuple(rest.removesuffix("qkv") + name for name in ("to_q", "to_k", "to_v"))
    if rest.endswith(".project"):
        return (rest.removesuffix("project") + "to_out.0",)
    modulate = rest.endswith(".modulate")
    if not modulate and not rest.endswith(".norm"):
        return (rest,)
    outer = rest.rsplit(".", 1)[0]
    if outer == "norm":
        outer = "conv_norm_out"
    elif ".attentions." in outer:
        outer = outer.removesuffix("norm") + ("spatial_norm" if decoder else "group_norm")
    if modulate:
        return f"{outer}.conv_y", f"{outer}.conv_b"
    return (f"{outer}.norm_layer" if decoder else outer,)


def diffusers_name(name: str, weights: Mapping[str, Tensor]) -> str:
    """Translate a tensor name of MoVQGAN to diffusers'; diffusers' own pass unchanged."""
    match = re.match(r"(encoder|decoder)\.(down|up|mid)\.(.*)", name)
    if match:
        side, kind, rest = match.groups()
        if kind == "mid":
            rest = re.sub(r"^block_([12])", lambda m: f"resnets.{int(m[1]) - 1}", rest)
            return f"{side}.mid_block." + _old_inner(rest.replace("attn_1", "attentions.0"), side)
        level, rest = rest.split(".", 1)
        if kind == "up":
            level = str(_num_levels(weights) - 1 - int(level))
        rest = rest.replace("block.", "resnets.", 1) if rest.startswith("block.") else rest
        rest = re.sub(r"^attn\.", "attentions.", rest)
        rest = re.sub(r"^(up|down)sample\.conv", r"\1samplers.0.conv", rest)
        return f"{side}.{kind}_blocks.{level}." + _old_inner(rest, side)
    return name.replace("norm_out", "conv_norm_out") if ".norm_out" in name else name


def _old_inner(rest: str, side: str) -> str:
    rest = rest.replace("nin_shortcut", "conv_shortcut")
    if rest.startswith("attentions."):
        number, rest = rest.removeprefix("attentions.").split(".", 1)
        norm = "spatial_norm" if side == "decoder" else "group_norm"
        rest = re.sub(r"^norm\b", norm, rest)
        rest = re.sub(r"^([qkv])\.", r"to_\1.", rest)
        return f"attentions.{number}." + rest.replace("proj_out.", "to_out.0.")
    return rest


def _num_levels(weights: Mapping[str, Tensor]) -> int:
    return 1 + max(int(m[1]) for n in weights if (m := re.match(r"decoder\.up\.(\d+)\.", n)))
