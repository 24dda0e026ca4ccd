"""A training step: our two engines against plain transformers + DDP, and where the time goes.

    python -m bench train [--stages 1a 1b 2 3 4] [--model focus_tiny] [--size 2] [--json FILE]

All contenders do the same optimizer step of a stage on the same batches in turns, in one process:
the whole model with transformers' Qwen2 as its trunk, in DDP with torch's AdamW; our single-device
engine; the Megatron road at tp = pp = 1. Stage 1 (1a the tokenizer, 1b the diffusion decoder) has
no trunk to exchange or to split: there the peer is the same model in DDP. Reported are the median
wall time, the least processor time, samples and tokens per second, and the parts of one extra step:
front, trunk and heads with their backward passes, communication, optimizer (all that follows the
last backward pass), and data (preparing the batches in this process; in training workers do it
ahead).
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
from torch import Tensor

from bench.report import device_name
from bench.timer import measure
from bench.train_peer import STAGE_1, PeerStep
from engine.data.words import TOKENIZER
from engine.process import seed_everything
from engine.run import Run, derive_seed
from engine.runs import find_run
from engine.sectioned import sectioned
from engine.stages.stage import Stage, find_stage
from engine.train import StepDataset, StepWork, build_engine, send
from engine.workload import workload_of
from focus.batch import Batch
from focus.model import FocusModel
from focus.presets import CONFIGS
from parallel.engine import Engine
from parallel.layout import ParallelConfig
from parallel.mesh import Mesh, open_mesh

PEER, PLAIN, MEGATRON = "transformers + DDP", "focus, one device", "focus, megatron tp1"
GOAL = 1.1
# The runs of each stage; the larger models' have phases, of which the first is taken.
STAGES = {
    "1a": ("stage1_tokenizer", "_256"),
    "1b": ("stage1_diffusion", "_512"),
    "2": ("stage2", ""),
    "3": ("stage3", "_256"),
    "4": ("stage4", ""),
}
# What runs after a call of these, until something else is called.
FOLLOWS = {"forward": "heads", "states": "heads", "backward": "optimizer"}
PARTS = ("front", "trunk", "heads", "communication", "optimizer", "data")


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


REDUCE = (dist, "all_reduce", "communication", "")


@dataclasses.dataclass
class Contender:
    """Something that can do a step: its function, and where its sections are."""

    name: str
    stage: str
    model: Any
    step: Callable[[int], Any]

    def targets(self) -> list[tuple[Any, str, str, str]]:
        """What to watch for the breakdown."""
        ends = [(torch.autograd, "backward", "heads", ""), REDUCE]
        if self.stage == "tokenizer":
            return [(torch.autograd, "backward", "front", ""), REDUCE]
        if self.stage == "diffusion":
            return [(self.model.heads.diffusion, "loss", "heads", ""), *ends]
        if isinstance(self.model, FocusModel):
            front, trunk, heads = self.model.front, self.model.trunk, self.model.heads
            run: tuple[Any, str] = (trunk, "forward")
        else:
            chunk = self.model[0]
            front, heads = chunk.front, chunk.heads
            run = (chunk.llm, "states")
        return [
            (front, "tokenize", "front", ""),
            (front, "encode", "front", ""),
            (front, "embed", "front", "front"),
            (*run, "trunk", "trunk"),
            (heads, "predict_masks", "heads", ""),
            *ends,
        ]


def contenders(run: Run, mesh: Mesh, batches: Sequence[Any]) -> list[Contender]:
    """Build all of them with equal weights."""
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

        found.append(Contender(name, run.stage, engine.model, step))

    add(PEER, sectioned(find_stage(run.stage)), ParallelConfig())
    add(PLAIN, sectioned(find_stage(run.stage)), ParallelConfig())
    if run.stage not in STAGE_1:
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
        batches = send(batches, mesh.device)
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
        own = MEGATRON if MEGATRON in by else PLAIN
        wall, cpu = (by[own][k] / by[PEER][k] for k in ("step_ms", "step_cpu_ms"))
        road = "megatron road" if own == MEGATRON else "our engine"
        lines.append(f"  {road} over the peer: {wall:.2f} wall, {cpu:.2f} cpu (goal {GOAL})")
    return lines


def plan_run(
    stage: str, model: str, size: int, tasks: int, precision: Literal["fp32", "bf16"] | None
) -> Run:
    """Return the stage's run with small micro-batches and nothing to load."""
    name, phase = STAGES[stage]
    run = find_run(f"{model}_{name}" + (phase if model != "focus_tiny" else ""))
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
    parser.add_argument("--stages", nargs="+", choices=tuple(STAGES), default=list(STAGES))
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
