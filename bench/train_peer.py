"""The peer of `bench train`: the same model as a script of transformers and DDP would train it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bench.qwen2_config import qwen2_config
from engine.run import Run
from engine.train import StepWork
from focus.config import LLMConfig
from focus.model import FocusModel
from parallel.engine import sum_terms
from parallel.mesh import Mesh
from parallel.optimizer import freeze

STAGE_1 = ("tokenizer", "diffusion")  # no trunk takes part in these


class TransformersTrunk(nn.Module):
    """transformers' Qwen2 with the interface and the weights of our trunk."""

    def __init__(self, config: LLMConfig, weights: dict[str, Tensor]) -> None:
        super().__init__()
        from transformers import Qwen2Model

        self.inner = Qwen2Model(qwen2_config(config, vocab_size=1, attn_implementation="sdpa"))
        del self.inner.embed_tokens
        self.inner.load_state_dict(weights, strict=True)

    def forward(self, embeddings: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        """Return the final-normed hidden states [B, T, D]."""
        states: Tensor = self.inner(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        return states


class Losses(nn.Module):
    """What DDP wraps: a batch in, the sum of the stage's terms out."""

    def __init__(self, model: nn.Module, work: StepWork) -> None:
        super().__init__()
        self.model = model
        self.work = [work]  # in a list: it is no module

    def forward(self, batch: Any) -> Tensor:
        """Return the micro-batch's loss."""
        return sum_terms(self.work[0].losses(self.model, batch))


class PeerStep:
    """One optimizer step as a script of transformers and DDP would write it."""

    def __init__(self, run: Run, model: FocusModel, mesh: Mesh) -> None:
        if run.stage not in STAGE_1:
            trunk: Any = TransformersTrunk(model.config.llm, model.trunk.state_dict())
            model.trunk = trunk
        self.run, self.model = run, model.to(mesh.device)
        rates = freeze(model, run.rates)
        named = dict(model.named_parameters())
        groups = [{"params": [named[name]], "lr": rate} for name, rate in rates.items()]
        self.optimizer = torch.optim.AdamW(groups, betas=run.betas, weight_decay=run.weight_decay)
        self.learning = [named[name] for name in rates]
        self.mesh = mesh
        self.wrapped: Any = None

    def step(self, number: int, batches: Sequence[Any], work: StepWork) -> float:
        """Accumulate over the micro-batches and step; return the loss."""
        if self.wrapped is None:
            self.wrapped = nn.parallel.DistributedDataParallel(
                Losses(self.model, work), find_unused_parameters=True
            )
        self.wrapped.module.work[0] = work
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for micro, batch in enumerate(batches):
            work.seed(micro, "front")
            with torch.autocast(
                self.mesh.device.type, torch.bfloat16, enabled=self.run.precision == "bf16"
            ):
                loss = self.wrapped(batch)
            torch.autograd.backward(loss / len(batches))
            total += float(loss.detach()) / len(batches)
        nn.utils.clip_grad_norm_(self.learning, self.run.clip)
        self.optimizer.step()
        return total
