"""`focus info`: what a model is made of and costs, and what this machine offers it."""

from __future__ import annotations

import argparse
import importlib.util
import platform
from importlib import metadata
from typing import TYPE_CHECKING, Any

from engine.commands import options

if TYPE_CHECKING:
    from focus.config import FocusConfig

HELP = "show parts, memory, tokens and operations of a config, and what this machine offers"
EXAMPLES = ("focus info", "focus info focus_3b --json sizes.json", "focus info focus_3b --no-flops")
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
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="write the report as JSON to FILE, or print it",
    )
    parser.add_argument("--no-flops", action="store_true", help="do not count operations (quicker)")


def run(args: argparse.Namespace) -> int:
    """Print the config's sizes and the machine."""
    from focus.config import to_json
    from focus.info import describe

    config = find_config(args.config)
    sizes = describe(config, flops=not args.no_flops)
    params = {name: part["params"] for name, part in sizes["parts"].items()}
    machine = describe_machine()
    report = {
        "command": "info",
        "config": to_json(config),
        "parameters": {**params, "total": sizes["total"]["params"]},
        **sizes,
        "machine": machine,
    }
    lines = [*_size_lines(config.name, sizes), "machine"]
    lines += [f"  {name:<18} {_say(value)}" for name, value in machine.items()]
    code = options.reply(report, lines, args.json == "-")
    if args.json not in (None, "-"):
        from engine.pictures import write_json

        write_json(report, args.json)
    return code


def _size_lines(name: str, sizes: dict[str, Any]) -> list[str]:
    """Tables of parts, buckets and operations."""
    total = sizes["total"]
    lines = [f"{name}: {total['params'] / 1e6:,.1f} M parameters, {_bytes(total['bytes'])}"]
    for part, values in sizes["parts"].items():
        frozen = f" + {values['buffers'] / 1e6:.2f} M frozen" if values["buffers"] >= 1e4 else ""
        lines.append(
            f"  {part:<18} {values['params'] / 1e6:10,.2f} M  {values['dtype']:<9}"
            f"{_bytes(values['bytes']):>10}{frozen}"
        )
    attention = sizes["mask_attention"]
    millions = attention["params"] / 1e6
    lines.append(f"  (of the UNet, {attention['modules']} mask attentions: {millions:,.2f} M)")
    lines.append(f"key/value cache: {sizes['cache_bytes_per_token'] / 1e3:.1f} kB per token (bf16)")
    lines.append("sizes (height x width): semantic + pixel tokens, with structure; output")
    lines += [_bucket_line(bucket) for bucket in sizes["buckets"]]
    for size, counted in sizes.get("flops", {}).items():
        tasks = ", ".join(f"{task} {ops / 1e12:,.2f}" for task, ops in counted["tasks"].items())
        lines.append(f"TFLOP per request at {size}: {tasks}")
    return lines


def _bucket_line(bucket: dict[str, Any]) -> str:
    size, semantic, pixel, output = (
        "x".join(map(str, bucket[key])) for key in ("size", "semantic", "pixel", "output")
    )
    return f"  {size:<10} {semantic:>6} + {pixel:<6} {bucket['tokens']:>5} tokens  -> {output}"


def _bytes(number: int) -> str:
    return f"{number / 1e9:,.2f} GB" if number >= 1e9 else f"{number / 1e6:,.1f} MB"


def find_config(name: str) -> FocusConfig:
    """Return a config by name, or the one of a model directory or a shipped model."""
    from focus.presets import CONFIGS
    from focus.pretrained import find_model, read_config

    return CONFIGS[name]() if name in CONFIGS else read_config(find_model(name))


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
