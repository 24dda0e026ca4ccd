"""Rows of measurement: a table to read, JSON and CSV to compare, a picture to show."""

from __future__ import annotations

import csv
import json
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch


@dataclass(frozen=True, kw_only=True)
class Row:
    """One contender on one problem.

    `max_error` is relative to fp64 (for a lookup: the share of wrong indices). Times are NaN when
    the accuracy check failed: a wrong answer has no speed. `floor_ms` is the time that the
    operator's arithmetic or bytes need at the machine's measured rate.
    """

    op: str
    case: str
    direction: str
    implementation: str
    is_peer: bool
    median_ms: float
    min_ms: float
    min_cpu_ms: float
    extra_mb: float
    max_error: float
    exact_enough: bool
    floor_ms: float
    device: str
    torch_version: str = torch.__version__


def device_name(device: str) -> str:
    """Return the name of the device that was measured."""
    if device == "cuda":
        return str(torch.cuda.get_device_name())
    return f"{platform.machine()} x{torch.get_num_threads()}"


def best_peer(rows: Sequence[Row], row: Row) -> Row | None:
    """Return the fastest exact enough peer of a row's problem."""
    peers = [
        other
        for other in rows
        if other.is_peer
        and other.exact_enough
        and (other.op, other.case, other.direction) == (row.op, row.case, row.direction)
    ]
    return min(peers, key=lambda peer: peer.median_ms, default=None)


def table(rows: Sequence[Row]) -> str:
    """Format rows grouped by problem; the ratio is best peer over this row."""
    lines = []
    seen: set[tuple[str, str, str]] = set()
    for row in rows:
        key = (row.op, row.case, row.direction)
        if key not in seen:
            seen.add(key)
            lines.append(f"\n{row.op}  {row.case}  {row.direction}  [{row.device}]")
            lines.append(
                f"  {'implementation':34s} {'median ms':>10s} {'min ms':>9s} {'cpu ms':>9s} "
                f"{'ratio':>7s} {'cpu ratio':>9s} {'extra MB':>9s} {'floor':>6s} {'error':>8s}"
            )
        lines.append(_line(rows, row))
    return "\n".join(lines)


def _line(rows: Sequence[Row], row: Row) -> str:
    name = row.implementation if row.is_peer else f"* {row.implementation}"
    if not row.exact_enough:
        return f"  {name:34s} no speed: error {row.max_error:.1e} is beyond the budget"
    peer = best_peer(rows, row)
    ratio = f"{peer.median_ms / row.median_ms:6.1f}x" if peer else "-"
    cpu = f"{peer.min_cpu_ms / row.min_cpu_ms:8.1f}x" if peer else "-"
    share = "-" if math.isnan(row.floor_ms) else f"{100 * row.floor_ms / row.median_ms:.0f}%"
    return (
        f"  {name:34s} {row.median_ms:10.2f} {row.min_ms:9.2f} {row.min_cpu_ms:9.2f} {ratio:>7s} "
        f"{cpu:>9s} {row.extra_mb:9.1f} {share:>6s} {row.max_error:8.1e}"
    )


def write_json(rows: Sequence[Row], path: Path) -> None:
    """Write the rows as a JSON list; times that do not exist become null."""
    values = [
        {k: (None if isinstance(v, float) and v != v else v) for k, v in asdict(row).items()}
        for row in rows
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=1))


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Write the rows as CSV."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def draw(rows: Sequence[Row], path: Path) -> bool:
    """Draw median times per problem; returns whether matplotlib was there to do it."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    problems = list(dict.fromkeys((r.op, r.case, r.direction) for r in rows))
    figure, axes = plt.subplots(
        len(problems), 1, figsize=(8, 2.2 * len(problems)), squeeze=False, layout="constrained"
    )
    for axis, problem in zip(axes[:, 0], problems, strict=True):
        shown = [r for r in rows if (r.op, r.case, r.direction) == problem and r.exact_enough]
        shown.sort(key=lambda r: r.median_ms)
        colours = ["#bbbbbb" if r.is_peer else "#c8553d" for r in shown]
        axis.barh([r.implementation for r in shown], [r.median_ms for r in shown], color=colours)
        axis.invert_yaxis()
        axis.set_xscale("log")
        axis.set_title(" ".join(problem), fontsize=9, loc="left")
        axis.tick_params(labelsize=7)
    axes[-1, 0].set_xlabel("median ms")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True
