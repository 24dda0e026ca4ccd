"""Cost model of gated cross-attention: absorbed or projected keys and values (README).

Estimates are microseconds on one core or one device; only their ratios choose.
"""

from __future__ import annotations

from kernels.device import interpreted_cost, refuse_triton
from kernels.kernel import Request

FLOPS_PER_US = 1e5


def refuse(request: Request) -> str | None:
    """Return why the tensor-core kernels cannot serve a request."""
    if request["channels"] > 512:
        return f"takes up to 512 channels, got {request['channels']}: tiles would not fit"
    return refuse_triton(request)


def absorbed_flops(request: Request) -> float:
    """FLOPs without keys and values: 4 Q H L C per row of the batch, and the folding 4 D^2 C.

    The backward adds 6 Q H L C, or 10 when the features need a gradient, and twice the folding.
    """
    loop = 2.0 * request["queries"] * request["heads"] * request["tokens"] * request["channels"]
    products = 2 if "backward" not in request.needs else 5
    products += 2 if "feature_gradient" in request.needs else 0
    folds = 3 if "backward" in request.needs else 1
    folding = folds * 4.0 * request["dim"] ** 2 * request["channels"]
    return request["batch"] * products * loop + folding


def explicit_flops(request: Request) -> float:
    """FLOPs with projected keys and values: 4 L C D + 4 Q L D per row, and the folding 4 D^2 C.

    The backward adds 4 L C D for the weights, as much for the features, and 10 Q L D.
    """
    unit = 4.0 * request["batch"] * request["tokens"] * request["dim"]
    backward = "backward" in request.needs
    projections = 1 + backward + ("feature_gradient" in request.needs)
    attention = request["queries"] * (3.5 if backward else 1.0)
    folding = (3 if backward else 1) * 4.0 * request["dim"] ** 2 * request["channels"]
    return unit * (projections * request["channels"] + attention) + folding


def literal_flops(request: Request) -> float:
    """FLOPs of the reference, which projects features first: 2 L C D + 4 L D^2 + 4 Q L D."""
    unit = 2.0 * request["batch"] * request["tokens"] * request["dim"]
    times = 3.0 if "backward" in request.needs else 1.0
    return times * unit * (request["channels"] + 2.0 * request["dim"] + 2.0 * request["queries"])


def literal_cost(request: Request) -> float:
    """Estimate the reference."""
    return 100.0 + literal_flops(request) / FLOPS_PER_US


def explicit_cost(request: Request) -> float:
    """Estimate projected keys and values."""
    return 100.0 + explicit_flops(request) / FLOPS_PER_US


def absorbed_cost(request: Request) -> float:
    """Estimate absorbed projections."""
    return 150.0 + absorbed_flops(request) / FLOPS_PER_US


def triton_cost(request: Request) -> float:
    """Estimate absorbed projections on tensor cores."""
    return interpreted_cost(request) + 50.0 + 0.3 * absorbed_flops(request) / FLOPS_PER_US
