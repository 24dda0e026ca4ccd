"""`python -m bench NAME [options]`: run one benchmark; a benchmark is a module with a `main`."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

NOT_BENCHMARKS = {"__init__", "__main__", "timer", "report", "peers", "decoding"}


def names() -> list[str]:
    """Return the benchmarks of this folder."""
    folder = Path(__file__).resolve().parent
    return sorted(path.stem for path in folder.glob("*.py") if path.stem not in NOT_BENCHMARKS)


def main(arguments: list[str]) -> int:
    """Run the benchmark that the first argument names."""
    if not arguments or arguments[0] not in names():
        print(f"usage: python -m bench {{{','.join(names())}}} [options]", file=sys.stderr)
        return 2
    result = importlib.import_module(f"bench.{arguments[0]}").main(arguments[1:])
    return int(result or 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
