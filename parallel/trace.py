"""What each part of the model costs, found by running the real modules without data.

The model is run once per part with fake tensors (shapes without memory): a FLOP counter sees every
matrix product and convolution, and autograd's hooks see every tensor that the backward pass would
keep. Both are linear in the batch size, so one sample tells all. Matching and loss functions depend
on values and are not traced; they are small.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from focus.batch import Batch, Pictures, Source
from focus.config import FocusConfig
from focus.model import FocusModel
from parallel.optimizer import freeze

BYTES = {"fp32": 4, "bf16": 2, "fp8": 2}  # fp8 is for products alone; tensors stay bf16


def _attention_flops(
    query: torch.Size,
    key: torch.Size,
    value: torch.Size,
    *args: Any,
    out_shape: Any = None,
    **kwargs: Any,
) -> int:
    """FLOPs of attention on a CPU, which torch's counter passes over."""
    count: Any = sdpa_flop_count
    flops: int = count(query, (*query[:-2], *key[-2:]), (*query[:-2], *value[-2:]))
    return flops


CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


@dataclass(frozen=True, kw_only=True)
class Cost:
    """One part, per sample: forward FLOPs, bytes kept for the backward pass, parameters."""

    flops: float
    saved: float
    trainable: int
    frozen: int
    backward: bool  # whether a gradient passes through it

    @property
    def step_flops(self) -> float:
        """FLOPs of both passes: gradients of inputs and of weights cost one forward each."""
        return self.flops * (1 + self.backward + (self.trainable > 0))


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The parts of a training step, by name, for one sample of `tokens` positions."""

    config: FocusConfig
    tokens: int
    labelled: int
    parts: Mapping[str, Cost]

    @property
    def step_flops(self) -> float:
        """FLOPs of one sample, forward and backward."""
        return sum(part.step_flops for part in self.parts.values())


def trace(
    config: FocusConfig,
    rates: Mapping[str, float],
    *,
    text: int = 150,
    draws: bool = True,
    segments: bool = True,
    diffuses: bool = False,
) -> Workload:
    """Trace one sample: a picture in, `text` words, masks, and a picture out when it `draws`."""
    with torch.device("meta"):
        model = FocusModel(config).eval()  # transformers asks for values in training mode
    freeze(model, rates)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        model.to_empty(device="cpu")
        batch = shape_batch(config, text, draws)
    tokens = batch.input_ids.shape[1]
    labelled = int((text // 3) + (_cells(config) if draws else 0))
    tracer = Tracer(model)
    front, heads = model.front, model.heads
    pictures = batch.pictures
    assert pictures is not None
    with fake:
        tracer.run("vanilla", front.vanilla, lambda: front.vanilla(pictures.vanilla))
        tracer.run(
            "hierarchical", front.hierarchical, lambda: front.hierarchical(pictures.hierarchical)
        )
        features = tracer.run("front", _rest(front), lambda: front.encode(pictures))
        tracer.subtract("front", ("vanilla", "hierarchical"))
        embeddings = tracer.run("embed", nn.Module(), lambda: front.embed(batch, features))
        hidden = tracer.run("trunk", model.trunk, lambda: model.trunk(embeddings))
        tracer.add("table", front.token_embedding, _table_cost(config, labelled, tracer.width))
        if segments:
            states = hidden[:, : config.segment.num_queries]
            conditions = hidden[:, :1]
            tracer.run(
                "segment",
                heads.segment,
                lambda: heads.segment(features.maps, states, conditions, "text"),
            )
        if diffuses:
            tracer.run("diffusion", heads.diffusion, lambda: diffuse(heads.diffusion, config))
    idle = {"segment": heads.segment, "diffusion": heads.diffusion}
    for name in idle.keys() - tracer.found.keys():
        tracer.add(name, idle[name], (0.0, 0.0, False))  # present, unused
    return Workload(config=config, tokens=tokens, labelled=labelled, parts=tracer.found)


class Tracer:
    """Runs parts of a model and notes what each costs."""

    def __init__(self, model: nn.Module) -> None:
        self.found: dict[str, Cost] = {}
        self.width = 4
        self._own = {p.untyped_storage()._cdata for p in model.parameters()}
        self._kept: dict[int, Any] = {}  # storages seen, kept alive so that addresses stay unique

    def run(self, name: str, module: nn.Module, work: Callable[[], Any]) -> Any:
        """Run one part and note its cost."""
        saved = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal saved
            storage = tensor.untyped_storage()
            if storage._cdata not in self._own and storage._cdata not in self._kept:
                self._kept[storage._cdata] = storage
                saved += storage.nbytes()
            return tensor

        counter = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), counter:
            result = work()
        self.add(name, module, (float(counter.get_total_flops()), float(saved), saved > 0))
        return result

    def subtract(self, name: str, parts: tuple[str, ...]) -> None:
        """Take out of one part what it repeated of others."""
        whole = self.found[name]
        self.found[name] = dataclasses.replace(
            whole,
            flops=whole.flops - sum(self.found[part].flops for part in parts),
            saved=whole.saved - sum(self.found[part].saved for part in parts),
        )

    def add(self, name: str, module: nn.Module, cost: tuple[float, float, bool]) -> None:
        """Note (forward FLOPs, bytes kept, whether a gradient passes) beside the parameters."""
        flops, saved, backward = cost
        parameters = list(module.parameters())
        trainable = sum(p.numel() for p in parameters if p.requires_grad)
        self.found[name] = Cost(
            flops=flops,
            saved=saved,
            trainable=trainable,
            frozen=sum(p.numel() for p in parameters) - trainable,
            backward=backward,
        )


def _rest(front: nn.Module) -> nn.Module:
    """The front without what is traced by itself."""
    apart = ("vanilla", "hierarchical", "token_embedding")
    rest = nn.ModuleDict({n: m for n, m in front.named_children() if n not in apart})
    for name, parameter in front.named_parameters(recurse=False):
        rest.register_parameter(name, parameter)
    return rest


def _table_cost(config: FocusConfig, labelled: int, width: int) -> tuple[float, float, bool]:
    """Logits of labelled positions: 2 n D V FLOPs; logits, their softmax and fp32 copy are kept."""
    rows = config.llm.vocab_size
    return 2.0 * labelled * config.llm.dim * rows, 2.0 * width * labelled * rows, True


def diffuse(diffusion: Any, config: FocusConfig) -> Tensor:
    """Run one denoising step of one picture [1, latents, h, w] under a mask."""
    height, width = (side * config.diffusion.upscale for side in config.pixel.image_size)
    codes = torch.empty(1, config.code_channels, *config.pixel.grid)
    mask = torch.empty(1, config.diffusion.num_masks, height, width, requires_grad=True)
    stride = config.diffusion.vae.stride
    size = (height // stride, width // stride)
    resized, context = diffusion.conditions(codes, mask, size)
    noisy = torch.empty(1, config.diffusion.vae.latent_channels, *size)
    drawn: Tensor = diffusion.predict(noisy, resized, torch.zeros(1, dtype=torch.long), context)
    return drawn


def _cells(config: FocusConfig) -> int:
    (sh, sw), (ph, pw) = config.vanilla.grid, config.pixel.grid
    return sh * sw + ph * pw


def shape_batch(config: FocusConfig, text: int, draws: bool) -> Batch:
    """Return one referring sample without content."""
    seen = _cells(config) + config.adapter.num_queries + config.segment.num_queries
    length = text + seen + (_cells(config) if draws else 0)
    return Batch(
        task="referring",
        input_ids=torch.zeros(1, length, dtype=torch.int64),
        labels=torch.zeros(1, length, dtype=torch.int64),
        source=torch.full((1, length), int(Source.TOKEN), dtype=torch.uint8),
        grid=torch.zeros(1, length, 3, dtype=torch.int16),
        condition=torch.zeros(1, length, dtype=torch.int16),
        lengths=torch.zeros(1, dtype=torch.int64),
        pictures=Pictures(
            vanilla=torch.zeros(1, 3, *config.vanilla.image_size),
            hierarchical=torch.zeros(1, 3, *config.hierarchical.image_size),
            pixel=torch.zeros(1, 3, *config.pixel.image_size),
        ),
    )
