"""`focus info`: what a model is made of, and what this machine offers it."""

from __future__ import annotations

import argparse
import importlib.util
import platform
from importlib import metadata
from typing import TYPE_CHECKING, Any

from engine.commands import options

if TYPE_CHECKING:
    from focus.config import FocusConfig

HELP = "show the parts and sizes of a config, and what this machine offers"
EXAMPLES = ("focus info", "focus info focus_3b --json")
PACKAGES = ("torch", "transformers", "diffusers", "megatron-core", "numpy", "pillow")
OPTIONAL = (
    "triton",
    "flash_attn",
    "xformers",
    "transformer_engine",
    "apex",
    "onnxruntime",
    "tensorrt",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument(
        "config",
        metavar="CONFIG",
        nargs="?",
        default="focus_tiny",
        help="focus_tiny, focus_3b, or a folder of weights (%(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the config's sizes and the machine."""
    from focus.config import to_json

    config = find_config(args.config)
    parts = count_parameters(config)
    machine = describe_machine()
    report = {
        "command": "info",
        "config": to_json(config),
        "parameters": {**parts, "total": sum(parts.values())},
        "machine": machine,
    }
    lines = [f"{config.name}: {sum(parts.values()) / 1e6:,.1f} M parameters"]
    lines += [f"  {name:<24} {number / 1e6:10,.2f} M" for name, number in parts.items()]
    lines += ["machine"]
    lines += [f"  {name:<24} {_say(value)}" for name, value in machine.items()]
    return options.reply(report, lines, args.json)


def find_config(name: str) -> FocusConfig:
    """Return a config by name, or the one of a model directory or a shipped model."""
    from focus.config import CONFIGS
    from focus.pretrained import find_model, read_config

    return CONFIGS[name]() if name in CONFIGS else read_config(find_model(name))


def count_parameters(config: FocusConfig) -> dict[str, int]:
    """Parameters of each part, built on the meta device so that no memory is needed."""
    import torch

    from focus.model import FocusModel

    with torch.device("meta"):
        model = FocusModel(config)
    found: dict[str, int] = {}
    seen: set[int] = set()
    for name, parameter in model.named_parameters():
        if id(parameter) not in seen:
            seen.add(id(parameter))
            part = ".".join(name.split(".")[:2])
            found[part] = found.get(part, 0) + parameter.numel()
    return found


def describe_machine() -> dict[str, Any]:
    """Versions, devices and optional packages of this machine."""
    import os

    import torch

    from engine.cli import version

    return {
        "focus-vl": version(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in PACKAGES},
        "cores": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "optional": [name for name in OPTIONAL if importlib.util.find_spec(name)],
    }


def _say(value: object) -> str:
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
