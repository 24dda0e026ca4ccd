"""Re-tune launch settings on the GPU at hand and write the shipped tables.

    python -m kernels.tune [--op NAME ...] [--write]

Each operator's `tuner.py` lists shape classes, the settings to try and a call to time. Without
`--write` the winners are printed only.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from kernels import catalog, tuning

Settings = dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One shape class: its key in the table, what to try, and the call to time."""

    key: str
    settings: tuple[Settings, ...]
    call: Callable[[], object]


def measure(call: Callable[[], object], repeats: int = 20) -> float:
    """Return the median microseconds of a call, launches included."""
    make_event = torch.cuda.Event
    times = []
    for turn in range(repeats + 3):
        start, end = (make_event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        if turn >= 3:
            times.append(1e3 * float(start.elapsed_time(end)))
    return sorted(times)[len(times) // 2]


def tune(operator: str, trials: Iterator[Trial], arch: str) -> dict[str, Settings]:
    """Return the fastest settings per shape class; settings that cannot launch are skipped."""
    best: dict[str, Settings] = {}
    live = tuning.table(operator, arch)  # the remembered table that lookups read
    for trial in trials:
        fastest = float("inf")
        before = live.get(trial.key)
        for settings in trial.settings:
            live[trial.key] = settings
            try:
                elapsed = measure(trial.call)
            except Exception as error:  # out of shared memory, for one
                print(f"  {trial.key} {settings}: {str(error).splitlines()[0][:80]}")
                continue
            print(f"  {trial.key} {settings}: {elapsed:.1f} us")
            if elapsed < fastest:
                fastest, best[trial.key] = elapsed, settings
        if before is not None:
            live[trial.key] = before
        elif trial.key in live:
            del live[trial.key]
    return best


def write(operator: str, arch: str, entries: dict[str, Settings]) -> None:
    """Merge entries into the shipped table of an architecture."""
    path = tuning.path(operator, arch)
    path.parent.mkdir(exist_ok=True)
    merged = {**tuning.table(operator, arch), **entries}
    table = {"device": torch.cuda.get_device_name(), "entries": dict(sorted(merged.items()))}
    path.write_text(json.dumps(table, indent=1) + "\n")
    tuning.table.cache_clear()


def main(arguments: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m kernels.tune", description=__doc__)
    parser.add_argument("--op", nargs="+", help="operators, all by default")
    parser.add_argument("--write", action="store_true", help="write the shipped tables")
    chosen = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("tuning measures a GPU and finds none; heuristics stay in use", file=sys.stderr)
        return 2
    arch = tuning.architecture(torch.device("cuda"))
    for operator, module in catalog.optional("tuner").items():
        if chosen.op and operator not in chosen.op:
            continue
        best = tune(operator, module.trials(), arch)
        print(json.dumps({operator: best}, indent=1))
        if chosen.write:
            write(operator, arch, best)
    return 0


if __name__ == "__main__":
    sys.exit(main())
