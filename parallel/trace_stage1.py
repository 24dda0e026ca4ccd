"""What the stages before the language model cost: the tokenizer's step and the decoder's."""

# B batch, C channels

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from focus.config import FocusConfig
from focus.model import FocusModel
from parallel.optimizer import freeze
from parallel.trace import Tracer, Workload, diffuse, shape_batch


def trace_stage1(
    config: FocusConfig, rates: Mapping[str, float], kind: Literal["tokenizer", "diffusion"]
) -> Workload:
    """Trace one picture through the tokenizer's training step, or to codes and the decoder's.

    The perceptual distance runs the hierarchical encoder on picture and reconstruction; the
    discriminator, which no config sizes, is left out. Parts that a step does not use cost memory
    only: every process holds the whole model.
    """
    with torch.device("meta"):
        model = FocusModel(config).eval()  # transformers asks for values in training mode
    freeze(model, rates)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        model.to_empty(device="cpu")
        batch = shape_batch(config, 1, False)
    front, heads = model.front, model.heads
    pictures = batch.pictures
    assert pictures is not None
    tracer = Tracer(model)
    rest = nn.ModuleList([front.fusion, front.tokenizer])
    with fake:
        low = tracer.run("vanilla", front.vanilla, lambda: front.vanilla(pictures.vanilla))
        maps = tracer.run(
            "hierarchical", front.hierarchical, lambda: front.hierarchical(pictures.hierarchical)
        )
        fused = front.fusion(low, maps)
        if kind == "tokenizer":
            tracer.run(
                "front",
                rest,
                lambda: front.tokenizer.train_step(
                    front.fusion(low, maps).e_prime, low, pictures.pixel
                ),
            )
            _add_perceptual(tracer, model)
        else:
            with torch.no_grad():
                pixel = front.tokenizer.pixel_encoder(pictures.pixel)
                tracer.run("front", rest, lambda: front.tokenizer.encode(fused.e_prime, pixel))
            tracer.run("diffusion", heads.diffusion, lambda: diffuse(heads.diffusion, config))
    idle: dict[str, nn.Module] = {"trunk": model.trunk, "table": front.token_embedding}
    idle["segment"] = heads.segment
    if kind == "tokenizer":
        idle["diffusion"] = heads.diffusion
    for name, module in idle.items():
        tracer.add(name, module, (0.0, 0.0, False))
    return Workload(config=config, tokens=0, labelled=0, parts=tracer.found)


def _add_perceptual(tracer: Tracer, model: FocusModel) -> None:
    """Add the hierarchical encoder's two passes over pictures of the bucket's size."""
    config = model.config
    whole = tracer.found["hierarchical"]
    height, width = config.hierarchical.image_size
    area = config.pixel.image_size[0] * config.pixel.image_size[1] / (height * width)
    # Twice forward, and once backward to the reconstruction: three forwards.
    front = tracer.found["front"]
    flops = 3 * whole.flops * area / (1 + front.backward + (front.trainable > 0))
    tracer.found["front"] = dataclasses.replace(front, flops=front.flops + flops)
