"""`focus train RUN --dry-run`: what a run is and will ask of the machines, before anything starts.

Shapes, parameters and FLOPs are counted on the real modules without weights; memory and time come
from the model of `parallel.planner` and its assumed efficiencies.
"""

from __future__ import annotations

from typing import Any

from engine.run import Run, fit
from engine.workload import batch_of, per_step, workload_of
from parallel.layout import ParallelConfig, check_layout
from parallel.planner import (
    GIB,
    WORKSPACE,
    Gpu,
    assess,
    parameters_of_rank,
    rank_bytes,
)
from parallel.trace import Workload


def describe(run: Run, gpus: int, gpu: Gpu) -> dict[str, Any]:
    """Return the report as JSON values. Raises `MeshError`, `RunError`, `RateError`."""
    layout = run.parallel
    data = layout.data_size(gpus)
    run = fit(run, data)
    work = workload_of(run)
    check_layout(work.config.llm, layout)
    mixture = per_step(run)
    batch, micro = batch_of(run, data), max(size for _, size in mixture)
    plan = assess(work, gpu, layout, gpus, micro, batch, precision=run.precision)
    return {
        "run": run.name,
        "stage": run.stage,
        "model": run.model,
        "engine": "megatron-core" if layout.megatron else "whole model on every rank",
        "gpus": gpus,
        "gpu": gpu.name,
        "layout": plan.name,
        "steps": run.steps,
        "samples_per_step": batch,
        "micro_batches_per_rank": len(mixture),
        "micro_batch": micro,
        "tasks": sorted({task for task, _ in run.micro_batches}),
        "shapes": shapes(work),
        "parts": parts(work),
        "parked": list(run.parked),
        "ranks": ranks(work, layout, data, micro, len(mixture), run.precision),
        "flops_per_sample": work.step_flops,
        "flops_per_step": work.step_flops * batch,
        "model_says": {
            "step_seconds": plan.step,
            "samples_per_s": plan.samples_per_s,
            "bubble": plan.bubble,
            "communication_s": plan.communication,
            "mfu": plan.mfu,
            "days": plan.step * run.steps / 86_400,
            "fits": plan.memory <= 0.92 * gpu.memory,
        },
    }


def shapes(work: Workload) -> dict[str, list[int]]:
    """Shapes of one sample."""
    config = work.config
    height, width = (side * config.diffusion.upscale for side in config.pixel.image_size)
    found = {
        "vanilla": [3, *config.vanilla.image_size],
        "hierarchical": [3, *config.hierarchical.image_size],
        "pixel": [3, *config.pixel.image_size],
        "semantic codes": list(config.vanilla.grid),
        "pixel codes": list(config.pixel.grid),
    }
    if work.tokens:
        found["hidden"] = [work.tokens, config.llm.dim]
        found["labelled"] = [work.labelled]
    if "diffusion" in work.parts:
        found["drawn"] = [3, height, width]
    return found


def parts(work: Workload) -> list[dict[str, Any]]:
    """Parameters and FLOPs of every part, per sample."""
    return [
        {
            "part": name,
            "trainable": cost.trainable,
            "frozen": cost.frozen,
            "forward_flops": cost.flops,
            "step_flops": cost.step_flops,
        }
        for name, cost in work.parts.items()
    ]


def ranks(
    work: Workload, layout: ParallelConfig, data: int, micro: int, count: int, precision: str
) -> list[dict[str, Any]]:
    """Parameters and memory of one rank of every pipeline stage."""
    rows = []
    for rank in range(layout.pp):
        trainable, frozen = parameters_of_rank(work, layout, rank)
        weights, held = rank_bytes(work, layout, data, rank, micro, count, precision)
        rows.append(
            {
                "pipeline_rank": rank,
                "trainable": trainable,
                "frozen": frozen,
                "weights_gib": weights / GIB,
                "activations_gib": held / GIB,
                "total_gib": (weights + held + WORKSPACE) / GIB,
            }
        )
    return rows


def render(report: dict[str, Any]) -> list[str]:
    """Return the report as lines for people."""
    says = report["model_says"]
    lines = [
        f"{report['run']}: stage {report['stage']}, config {report['model']}, {report['steps']:,} "
        f"steps of {report['samples_per_step']} samples",
        f"  {report['gpus']} x {report['gpu']}, {report['layout']}, {report['engine']}; per rank "
        f"{report['micro_batches_per_rank']} micro-batches of {report['micro_batch']}",
        f"  tasks: {', '.join(report['tasks'])}",
        "  shapes of one sample: "
        + ", ".join(f"{k} {'x'.join(map(str, v))}" for k, v in report["shapes"].items()),
        f"  {'part':<14}{'trainable M':>13}{'frozen M':>11}{'forward GFLOP':>15}{'step GFLOP':>12}",
    ]
    for p in report["parts"]:
        lines.append(
            f"  {p['part']:<14}{p['trainable'] / 1e6:>13,.1f}{p['frozen'] / 1e6:>11,.1f}"
            f"{p['forward_flops'] / 1e9:>15,.1f}{p['step_flops'] / 1e9:>12,.1f}"
        )
    if report["parked"]:
        lines.append(f"  in host memory, not used: {', '.join(report['parked'])}")
    lines.append(f"  FLOPs per step {report['flops_per_step']:.3e}; a model, not measured:")
    for r in report["ranks"]:
        lines.append(
            f"  pipeline rank {r['pipeline_rank']}: {r['trainable'] / 1e6:,.0f} M trainable + "
            f"{r['frozen'] / 1e6:,.0f} M frozen; {r['weights_gib']:.1f} GiB weights and optimizer "
            f"+ {r['activations_gib']:.1f} activations = {r['total_gib']:.1f} GiB"
        )
    fits = "fits" if says["fits"] else "DOES NOT FIT; see `focus plan`"
    lines.append(
        f"  step {says['step_seconds']:.2f} s, {says['samples_per_s']:.0f} samples/s, bubble "
        f"{says['bubble']:.1%}, MFU {says['mfu']:.1%}, {says['days']:.1f} days in all; {fits}"
    )
    return lines
