"""Cost model of mask attention: dense or separable (README).

Estimates are microseconds; the fixed part is what many small operations cost.
"""

from __future__ import annotations

from kernels.device import interpreted_cost, refuse_triton
from kernels.kernel import Request

FLOPS_PER_US = 1e5


def refuse(request: Request) -> str | None:
    """Return why the tensor-core kernels cannot serve a request."""
    if max(request["rows"], request["columns"]) > 128:
        return f"takes key grids up to 128 x 128, got {request['rows']} x {request['columns']}"
    if request["dim"] % 2:
        return f"takes even head widths, got {request['dim']}"
    return refuse_triton(request)


def dense_flops(request: Request) -> float:
    """FLOPs of dense attention, 4 N L D per head; the backward has 2.5 times as many more."""
    tokens = request["rows"] * request["columns"]
    pairs = request["batch"] * request["heads"] * request["queries"] * tokens
    return pairs * 4.0 * request["dim"] * (3.5 if "backward" in request.needs else 1.0)


def separable_flops(request: Request) -> float:
    """FLOPs of tables, one indicator product and exponentials (16 each) for two classes."""
    rows, columns, dim = request["rows"], request["columns"], request["dim"]
    lines = request["batch"] * request["heads"] * request["queries"]
    per_class = dim * (rows + columns) + 2.0 * rows * columns + 24.0 * (rows + columns)
    times = 3.0 if "backward" in request.needs else 1.0
    times += 2.0 * request["masks"] if "mask_gradient" in request.needs else 0.0
    return 2.0 * lines * per_class * times


def dense_cost(request: Request) -> float:
    """Estimate dense attention."""
    return 200.0 + dense_flops(request) / FLOPS_PER_US


def separable_cost(request: Request) -> float:
    """Estimate separable tables in plain PyTorch."""
    return 1500.0 + separable_flops(request) / FLOPS_PER_US


def triton_cost(request: Request) -> float:
    """Estimate separable tables on tensor cores."""
    return interpreted_cost(request) + 400.0 + 0.1 * separable_flops(request) / FLOPS_PER_US
