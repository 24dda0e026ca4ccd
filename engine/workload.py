"""What one sample of a run costs, traced from the real modules; no weights are made."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from engine.run import Mixture, Run, RunError
from focus.config import FocusConfig
from focus.presets import CONFIGS
from parallel.trace import Workload, trace
from parallel.trace_stage1 import trace_stage1

TEXT = 150  # words and structure of a sample beside its pictures
SEGMENTS = frozenset({"class", "referring", "reasoning", "interactive", "editing"})
DRAWS = frozenset({"generation", "editing"})
STAGE1 = {"tokenizer": "tokenizer", "diffusion": "diffusion"}
WHOLE = ("warmup", "pretrain", "instruct")
# The module of each part that a run may leave in host memory.
MODULES = {
    "trunk": "trunk",
    "table": "front.token_embedding",
    "segment": "heads.segment",
    "diffusion": "heads.diffusion",
}


def workload_of(run: Run) -> Workload:
    """Trace the largest sample of the run's mixture; raises `RunError` for stage 0.

    Parts that the run leaves in host memory are left out. FLOPs are the mixture's mean, memory is
    the largest sample's: a micro-batch has one task.
    """
    found = _trace(run)
    parts = {n: cost for n, cost in found.parts.items() if MODULES.get(n) not in run.parked}
    return dataclasses.replace(found, parts=parts)


def _trace(run: Run) -> Workload:
    config = CONFIGS[run.model]()
    rates = {glob: rate for glob, rate in run.rates.items() if not glob.startswith("scratch.")}
    if run.stage == "tokenizer":
        return trace_stage1(config, rates, "tokenizer")
    if run.stage == "diffusion":
        return trace_stage1(config, rates, "diffusion")
    if run.stage not in WHOLE:
        raise RunError(
            f"a run of the stages {', '.join((*STAGE1, *WHOLE))} can be planned, got {run.name} "
            f"of stage {run.stage!r}"
        )
    tasks = [task for task, _ in run.micro_batches]
    segments = bool(run.extra.get("segmentation", True)) and any(t in SEGMENTS for t in tasks)
    largest = trace(
        config,
        rates,
        text=TEXT,
        draws=any(task in DRAWS for task in tasks),
        segments=segments,
        diffuses=run.stage == "instruct" and "editing" in tasks,
    )
    return mean_flops(largest, tasks)


def mean_flops(largest: Workload, tasks: Sequence[str]) -> Workload:
    """Scale the FLOPs of the largest sample to the mean over `tasks`; its memory stays.

    The trunk is scaled by tokens, which neglects that attention is quadratic in them.
    """
    drawing = [task in DRAWS for task in tasks]
    seen = _drawn_tokens(largest.config)
    drawn = sum(drawing) / len(tasks)
    tokens = 1 - (1 - drawn) * seen / largest.tokens if any(drawing) else 1.0
    words = largest.labelled - (seen if any(drawing) else 0)
    labelled = (words + drawn * seen) / largest.labelled
    scale = {
        "embed": tokens,
        "trunk": tokens,
        "table": labelled,
        "segment": sum(task in SEGMENTS for task in tasks) / len(tasks),
        "diffusion": sum(task == "editing" for task in tasks) / len(tasks),
    }
    parts = {
        name: dataclasses.replace(cost, flops=cost.flops * scale.get(name, 1.0))
        for name, cost in largest.parts.items()
    }
    return dataclasses.replace(largest, parts=parts)


def _drawn_tokens(config: FocusConfig) -> int:
    (sh, sw), (ph, pw) = config.vanilla.grid, config.pixel.grid
    return sh * sw + ph * pw


def batch_of(run: Run, data_size: int) -> int:
    """Samples of one step over all ranks."""
    if run.batch is not None:
        return run.batch
    return data_size * sum(size for _, size in per_step(run))


def per_step(run: Run) -> Mixture:
    """The micro-batches of one rank and step, in the mixture's order."""
    count = int(run.extra.get("tasks_per_step", len(run.micro_batches)))
    return tuple(run.micro_batches[i % len(run.micro_batches)] for i in range(count))
