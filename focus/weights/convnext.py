"""ConvNeXt under the names of transformers, timm and OpenCLIP."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from focus.config import FocusConfig
from focus.errors import CheckpointMismatch
from focus.shards import Weights
from focus.weights.plan import Fill, Plan

STEM = {"transformers": "embeddings.patch_embeddings.weight", "timm": "stem.0.weight"}
BACKBONE = "front.hierarchical.backbone."
BLOCK = {  # ours -> timm's
    "dwconv": "conv_dw",
    "layernorm": "norm",
    "pwconv1": "mlp.fc1",
    "pwconv2": "mlp.fc2",
}
KINDS = ("weight", "bias")


def detect(weights: Weights) -> tuple[str, str]:
    """Return the naming ("transformers" or "timm") and the prefix before it.

    OpenCLIP keeps timm's model under "visual.trunk.". Raises `CheckpointMismatch`.
    """
    for naming, stem in STEM.items():
        found = [name for name in weights if name.endswith(stem)]
        if found:
            return naming, min(found, key=len)[: -len(stem)]
    raise CheckpointMismatch(
        f"{weights.path}: a ConvNeXt of transformers, timm or OpenCLIP expected, found neither "
        f"{' nor '.join(STEM.values())}; it holds {sorted(weights)[:3]}"
    )


def configure(base: FocusConfig, weights: Weights) -> FocusConfig:
    """Return `base` with the widths and depths that the tensors themselves have."""
    naming, prefix = detect(weights)
    stages = "encoder.stages" if naming == "transformers" else "stages"
    layers = "layers" if naming == "transformers" else "blocks"
    depthwise = "dwconv" if naming == "transformers" else "conv_dw"
    pattern = re.compile(
        re.escape(f"{prefix}{stages}.") + rf"(\d+)\.{layers}\.(\d+)\.{depthwise}\.weight"
    )
    found: dict[int, list[str]] = {}
    for name in weights:
        match = pattern.fullmatch(name)
        if match:
            found.setdefault(int(match[1]), []).append(name)
    if sorted(found) != [0, 1, 2, 3]:
        raise CheckpointMismatch(
            f"{weights.path}: a ConvNeXt of four stages expected, got stages {sorted(found)}"
        )
    depths = tuple(len(found[stage]) for stage in range(4))
    dims = tuple(weights.shape(found[stage][0])[0] for stage in range(4))
    hierarchical = replace(
        base.hierarchical,
        depths=(depths[0], depths[1], depths[2], depths[3]),
        dims=(dims[0], dims[1], dims[2], dims[3]),
    )
    return replace(base, hierarchical=hierarchical)


def plan(config: FocusConfig, source: str, weights: Weights) -> Plan:
    """Recipes for the hierarchical encoder.

    The norms after each stage exist only in checkpoints of `ConvNextBackbone`; otherwise they are
    new. The norm after pooling and the classifier are left out.
    """
    naming, prefix = detect(weights)
    pairs = _transformers(config) if naming == "transformers" else _timm(config)
    fills = {
        BACKBONE + ours: Fill(names=(prefix + theirs,), make=squeeze if ".pwconv" in ours else None)
        for ours, theirs in pairs.items()
    }
    for stage in range(1, 5):
        for kind in KINDS:
            name = f"hidden_states_norms.stage{stage}.{kind}"
            fills[BACKBONE + name] = Fill(names=(prefix + name,), optional=True)
    clip = naming == "timm" and prefix.endswith("trunk.")
    shown = "OpenCLIP" if clip else naming
    return Plan(source=source, format=f"{shown} ConvNeXt", weights=weights, fills=fills)


def _transformers(config: FocusConfig) -> Mapping[str, str]:
    """Every tensor of the encoder under its own name (they are transformers')."""
    names = [
        f"embeddings.{part}.{kind}" for part in ("patch_embeddings", "layernorm") for kind in KINDS
    ]
    for stage, depth in enumerate(config.hierarchical.depths):
        here = f"encoder.stages.{stage}"
        if stage:
            names += [f"{here}.downsampling_layer.{i}.{kind}" for i in (0, 1) for kind in KINDS]
        for layer in range(depth):
            names += [f"{here}.layers.{layer}.{part}.{kind}" for part in BLOCK for kind in KINDS]
            names.append(f"{here}.layers.{layer}.layer_scale_parameter")
    return {name: name for name in names}


def _timm(config: FocusConfig) -> Mapping[str, str]:
    pairs: dict[str, str] = {}
    for ours in _transformers(config):
        theirs = ours.replace("embeddings.patch_embeddings", "stem.0")
        theirs = theirs.replace("embeddings.layernorm", "stem.1")
        theirs = theirs.removeprefix("encoder.").replace("downsampling_layer", "downsample")
        theirs = theirs.replace(".layers.", ".blocks.").replace("layer_scale_parameter", "gamma")
        for part, name in BLOCK.items():
            theirs = theirs.replace(f".{part}.", f".{name}.") if ".blocks." in theirs else theirs
        pairs[ours] = theirs
    return pairs


def squeeze(weight: Tensor) -> Tensor:
    """A 1 x 1 convolution [O, I, 1, 1] as the weight of a Linear (timm's conv_mlp)."""
    return weight[:, :, 0, 0] if weight.dim() == 4 else weight
