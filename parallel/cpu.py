"""megatron-core without CUDA: the one place that bends PyTorch so that its code runs on gloo.

`install` is called before anything of megatron-core is imported. Where CUDA is present it only
hides a transformer-engine that is installed but cannot be loaded.
"""

from __future__ import annotations

import importlib
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_TOLD_A_DEVICE = frozenset({torch.Tensor.cuda, torch.Tensor.to, torch.Tensor.type})
_installed: list[TorchFunctionMode | None] = []


class CpuMode(TorchFunctionMode):
    """Reads "cuda" as "cpu" in every call of PyTorch on this thread."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Redirect devices; answer `Tensor.type()` with the CUDA name that Megatron compares."""
        if kwargs:
            if "device" in kwargs and _is_cuda(kwargs["device"]):
                kwargs = {**kwargs, "device": _CPU}
            if kwargs.get("pin_memory"):
                kwargs = {**kwargs, "pin_memory": False}
        if func in _TOLD_A_DEVICE:
            if func is torch.Tensor.cuda:
                return args[0]
            if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
                args = (args[0], _CPU, *args[2:])
            if func is torch.Tensor.type and len(args) == 1 and not kwargs:
                return func(*args).replace("torch.", "torch.cuda.")
        return func(*args, **kwargs) if kwargs else func(*args)


def _is_cuda(device: object) -> bool:
    if isinstance(device, int) and not isinstance(device, bool):
        return True  # a bare ordinal is a CUDA ordinal
    if isinstance(device, (str, torch.device)):
        return torch.device(device).type == "cuda"
    return False


def install() -> None:
    """Make megatron-core importable and runnable here; further calls do nothing."""
    if _installed:
        return
    # Megatron's own habits, which nobody here can change.
    for said in ("Please use DTensor", "The .grad attribute of a Tensor that is not a leaf"):
        warnings.filterwarnings("ignore", message=said)
    _hide_broken("transformer_engine", "transformer_engine.pytorch")
    if torch.cuda.is_available():
        _installed.append(None)
        return
    replacements: dict[str, Callable[..., Any]] = {
        "current_device": lambda: _CPU,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "manual_seed": lambda seed: torch.default_generator.manual_seed(seed),
        "synchronize": lambda *_args, **_kwargs: None,
        "empty_cache": lambda: None,
    }
    for name, function in replacements.items():
        setattr(torch.cuda, name, function)
    mode = CpuMode()
    mode.__enter__()  # type: ignore[no-untyped-call]
    _installed.append(mode)
    _patch_random_states()


def _hide_broken(package: str, module: str) -> None:
    """Make a package that raises on import count as absent: megatron expects ImportError."""
    try:
        importlib.import_module(module)
    except ImportError:
        return
    except Exception as error:
        logging.getLogger(__name__).warning("%s cannot be loaded: %s", package, error)
        sys.modules[package] = None  # type: ignore[assignment]


def _patch_random_states() -> None:
    from megatron.core.tensor_parallel import random as states

    def get_state(device: object = "cuda", clone: bool = False, graph_safe: bool = False) -> Any:
        return torch.get_rng_state()

    def set_state(state: Any, device: object = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(state)

    states._get_cuda_rng_state = get_state
    states._set_cuda_rng_state = set_state
    logging.getLogger(states.__name__).addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )
