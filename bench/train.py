"""A training step: our two engines against plain transformers + DDP, and where the time goes.

    python -m bench train [--stages 2 3 4] [--model focus_tiny] [--size 2] [--json FILE]

All contenders do the same optimizer step of a stage on the same batches in turns, in one process:
the whole model with transformers' Qwen2 as its trunk, in DDP with torch's AdamW; our single-device
engine; the Megatron road at tp = pp = 1. Reported are the median wall time, the least processor
time, samples and tokens per second, and the parts of one extra step: front, trunk and heads with
their backward passes, communication, optimizer (all that follows the last backward pass), and data
(preparing the batches in this process; in training workers do it ahead).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bench.report import device_name
from bench.timer import measure
from engine.data.words import TOKENIZER
from engine.process import seed_everything
from engine.run import Run, derive_seed
from engine.runs import find_run
from engine.sectioned import sectioned
from engine.stages.stage import Stage, find_stage
from engine.train import StepDataset, StepWork, build_engine
from engine.workload import workload_of
from focus.batch import Batch
from focus.config import LLMConfig
from focus.model import FocusModel
from focus.presets import CONFIGS
from parallel.engine import Engine, sum_terms
from parallel.layout import ParallelConfig
from parallel.mesh import Mesh, open_mesh
from parallel.optimizer import freeze

PEER, PLAIN, MEGATRON = "transformers + DDP", "focus, one device", "focus, megatron tp1"
GOAL = 1.1
# What runs after a call of these, until something else is called.
FOLLOWS = {"forward": "heads", "states": "heads", "backward": "optimizer"}
PARTS = ("front", "trunk", "heads", "communication", "optimizer", "data")


class TransformersTrunk(nn.Module):
    """transformers' Qwen2 with the interface and the weights of our trunk."""

    def __init__(self, config: LLMConfig, weights: dict[str, Tensor]) -> None:
        super().__init__()
        from transformers import Qwen2Config, Qwen2Model

        self.inner = Qwen2Model(
            Qwen2Config(
                vocab_size=1,
                hidden_size=config.dim,
                intermediate_size=config.ffn_dim,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                num_key_value_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                max_position_embeddings=config.max_length,
                rms_norm_eps=config.norm_eps,
                rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
                attn_implementation="sdpa",
            )
        )
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


class Spans:
    """Seconds of named parts of a step; `mark` waits for the device first."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.last = 0.0
        self.open = "front"

    def now(self) -> float:
        """Seconds, with the device idle."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def mark(self, following: str) -> None:
        """End the part that runs and begin `following`."""
        moment = self.now()
        self.seconds[self.open] += moment - self.last
        self.last, self.open = moment, following


@contextmanager
def watch(spans: Spans, targets: Sequence[tuple[Any, str, str, str]]) -> Iterator[None]:
    """Mark the parts of a step: targets are (object, method, part, part of its output's gradient).

    A call of a target begins its part; the gradient of its result, when it comes, begins the part
    whose backward pass follows. Whatever lies between two marks belongs to the former.
    """
    before: list[tuple[Any, str, bool, Any]] = []

    def wrap(owner: Any, name: str, part: str, backward: str) -> None:
        original = getattr(owner, name)
        before.append((owner, name, name in vars(owner), original))

        def timed(*arguments: Any, **options: Any) -> Any:
            outer = spans.open
            spans.mark(part)
            result = original(*arguments, **options)
            if backward and isinstance(result, Tensor) and result.requires_grad:
                hook: Any = result.register_hook
                hook(lambda _gradient: spans.mark(backward))
            spans.mark(outer if part == "communication" else FOLLOWS.get(name, part))
            return result

        setattr(owner, name, timed)

    for target in targets:
        wrap(*target)
    try:
        yield
    finally:
        for owner, name, own, original in reversed(before):
            setattr(owner, name, original) if own else delattr(owner, name)


@dataclasses.dataclass
class Contender:
    """Something that can do a step: its function, and where its sections are."""

    name: str
    model: Any
    step: Callable[[int], Any]

    def targets(self) -> list[tuple[Any, str, str, str]]:
        """What to watch for the breakdown."""
        if isinstance(self.model, FocusModel):
            front, trunk, heads = self.model.front, self.model.trunk, self.model.heads
            run: tuple[Any, str] = (trunk, "forward")
        else:
            chunk = self.model[0]
            front, heads = chunk.front, chunk.heads
            run = (chunk.llm, "states")
        found = [
            (front, "tokenize", "front", ""),
            (front, "encode", "front", ""),
            (front, "embed", "front", "front"),
            (*run, "trunk", "trunk"),
            (heads, "predict_masks", "heads", ""),
        ]
        found.append((torch.autograd, "backward", "heads", ""))
        return [*found, (dist, "all_reduce", "communication", "")]


def contenders(run: Run, mesh: Mesh, batches: Sequence[Any]) -> list[Contender]:
    """Build all three with equal weights."""
    found: list[Contender] = []

    def add(name: str, stage: Stage, layout: ParallelConfig) -> None:
        planned = dataclasses.replace(run, parallel=layout)
        seed_everything(derive_seed(run.seed, "build"))
        engine: Engine | PeerStep
        if name == PEER:
            model = stage.build(planned)
            assert isinstance(model, FocusModel)
            engine = PeerStep(planned, model, mesh)
        else:
            engine = build_engine(planned, stage, mesh)
        engine.model.train()

        def step(number: int) -> Any:
            # The mode that lets megatron-core run without CUDA must not slow the others.
            with nullcontext() if layout.megatron else torch._C.DisableTorchFunction():
                return engine.step(number, batches, StepWork(planned, stage, number, mesh))

        found.append(Contender(name, engine.model, step))

    add(PEER, sectioned(find_stage(run.stage)), ParallelConfig())
    add(PLAIN, sectioned(find_stage(run.stage)), ParallelConfig())
    add(MEGATRON, sectioned(find_stage(run.stage)), ParallelConfig(trunk="megatron"))
    return found


def compare(run: Run, repeats: int, budget: float) -> list[dict[str, Any]]:
    """Measure one stage; rows of contenders."""
    rows = []
    with open_mesh(ParallelConfig()) as mesh:
        stage = find_stage(run.stage)
        began = time.perf_counter()
        batches = StepDataset(run, stage, 0, 1)[0]
        data = time.perf_counter() - began
        batches = [batch.to(mesh.device) for batch in batches]
        samples = sum(size for _, size in stage.micro_batches(run, 0))
        tokens = sum(int(b.lengths.sum()) for b in batches if isinstance(b, Batch))
        racing = contenders(run, mesh, batches)
        functions: dict[str, Callable[[], Any]] = {c.name: partial(c.step, 0) for c in racing}
        timings = measure(functions, device=mesh.device.type, repeats=repeats, budget_s=budget)
        flops = workload_of(run).step_flops * samples if mesh.device.type == "cuda" else None
        for contender in racing:
            timing = timings[contender.name]
            seconds = timing.median_ms / 1e3
            rows.append(
                {
                    "stage": run.name,
                    "contender": contender.name,
                    "is_peer": contender.name == PEER,
                    "device": device_name(mesh.device.type),
                    "precision": run.precision,
                    "samples": samples,
                    "tokens": tokens,
                    "step_ms": timing.median_ms,
                    "step_cpu_ms": timing.min_cpu_ms,
                    "samples_per_s": samples / seconds,
                    "tokens_per_s": tokens / seconds,
                    "tflops": None if flops is None else flops / seconds / 1e12,
                    "shares": breakdown(contender, mesh.device, data),
                }
            )
    return rows


def breakdown(contender: Contender, device: torch.device, data: float) -> dict[str, float]:
    """Milliseconds of each part of one more step."""
    spans = Spans(device)
    with watch(spans, contender.targets()):
        spans.last = spans.now()
        contender.step(0)
        spans.mark("data")
    spans.seconds["data"] = data
    return {name: 1e3 * seconds for name, seconds in spans.seconds.items()}


def report(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the table and, per stage, the Megatron road over the peer."""
    lines = []
    for name in dict.fromkeys(row["stage"] for row in rows):
        chosen = [row for row in rows if row["stage"] == name]
        first = chosen[0]
        lines.append(
            f"{name}: {first['samples']} samples, {first['tokens']} tokens, {first['precision']} "
            f"[{first['device']}]"
        )
        lines.append(
            f"  {'contender':<22}{'step ms':>10}{'cpu ms':>10}{'samples/s':>11}{'tokens/s':>10}  "
            + "".join(f"{part[:9]:>11}" for part in PARTS)
        )
        for row in chosen:
            lines.append(
                f"  {row['contender']:<22}{row['step_ms']:>10.1f}{row['step_cpu_ms']:>10.1f}"
                f"{row['samples_per_s']:>11.2f}{row['tokens_per_s']:>10.0f}  "
                + "".join(f"{row['shares'][part]:>11.1f}" for part in PARTS)
            )
        by = {row["contender"]: row for row in chosen}
        wall, cpu = (by[MEGATRON][k] / by[PEER][k] for k in ("step_ms", "step_cpu_ms"))
        lines.append(f"  megatron road over the peer: {wall:.2f} wall, {cpu:.2f} cpu (goal {GOAL})")
    return lines


def plan_run(
    stage: str, model: str, size: int, tasks: int, precision: Literal["fp32", "bf16"] | None
) -> Run:
    """Return the stage's run with small micro-batches and nothing to load."""
    name = f"{model}_stage{stage}"
    run = find_run(name if model == "focus_tiny" or stage != "3" else f"{name}_256")
    kinds = list(dict.fromkeys(task for task, _ in run.micro_batches))
    kinds.sort(key=lambda task: task != "editing")  # the task with every loss comes first
    mixture = tuple((task, size) for task in kinds[:tasks])
    return dataclasses.replace(
        run,
        init_from=None,
        batch=None,
        warmup=0,
        micro_batches=mixture,
        precision=precision or run.precision,
        extra={**run.extra, "tasks_per_step": len(mixture), "true_mask": 0.5},
    )


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m bench train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--stages", nargs="+", choices=("2", "3", "4"), default=["2", "3", "4"])
    parser.add_argument(
        "--model",
        choices=[name for name in CONFIGS if name in ("focus_tiny", "focus_300m", "focus_3b")],
        default="focus_tiny",
        help=f"focus_3b needs {TOKENIZER}",
    )
    parser.add_argument("--size", type=int, default=2, metavar="N", help="samples per micro-batch")
    parser.add_argument("--tasks", type=int, default=2, metavar="N", help="micro-batches per step")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="the run's own")
    parser.add_argument("--repeats", type=int, default=5, metavar="N")
    parser.add_argument("--budget", type=float, default=300.0, metavar="S", help="per stage")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows as JSON")
    args = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    for stage in args.stages:
        run = plan_run(stage, args.model, args.size, args.tasks, args.precision)
        rows += compare(run, args.repeats, args.budget)
    print("\n".join(report(rows)))
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
