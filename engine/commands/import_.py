"""`focus import`: assemble a model from public checkpoints."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.commands import options

if TYPE_CHECKING:
    from focus.weights.assemble import Report

HELP = "assemble a model from public checkpoints: Qwen2.5, Qwen2-VL, ConvNeXt, Mask2Former, SDXL"
EXAMPLES = (
    "focus import --llm Qwen2.5-3B --vit Qwen2-VL-2B --hierarchical convnext-large "
    "--segment mask2former --diffusion sdxl --out out/model",
    "focus import --diffusion sdxl --llm Qwen2.5-3B --dtype bfloat16 --out out/model",
)
SOURCES = {
    "llm": "transformers Qwen2, with tokenizer.json",
    "vit": "transformers Qwen2-VL, or its vision tower",
    "hierarchical": "ConvNeXt of transformers, timm or OpenCLIP",
    "segment": "transformers Mask2Former",
    "diffusion": "diffusers SDXL: unet and vae",
    "tokenizer": "MoVQ (diffusers VQModel) for the pixel branch",
}
DTYPES = ("keep", "float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    for name, told in SOURCES.items():
        parser.add_argument(f"--{name}", metavar="DIR", help=f"{told} (a folder or a hub id)")
    parser.add_argument(
        "--config",
        default="focus_3b",
        metavar="NAME",
        help="sizes of everything that no source states: a config or a model folder (%(default)s)",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="keep", help="of the weights written")
    parser.add_argument(
        "--shard",
        type=options.whole(1, 1_000_000),
        default=5000,
        metavar="MB",
        help="largest file (%(default)s)",
    )
    options.add_output(parser, "out/model")
    options.add_seed(parser)


def run(args: argparse.Namespace) -> int:
    """Import, write the model directory and report what was loaded, new and skipped."""
    given = {name: getattr(args, name) for name in SOURCES}
    if not any(given.values()):
        raise options.UsageError(f"give at least one of --{', --'.join(SOURCES)}")
    import torch
    from transformers.utils import logging

    from engine.commands.info import find_config
    from focus.weights.assemble import Sources, assemble

    logging.set_verbosity_error()
    base = find_config(args.config)
    out: Path = args.out
    report = assemble(
        Sources(**given),
        out,
        base,
        dtype=None if args.dtype == "keep" else getattr(torch, args.dtype),
        seed=args.seed,
        max_shard_bytes=args.shard * 1_000_000,
    )
    values: dict[str, Any] = {
        "command": "import",
        "out": out,
        "has_tokenizer": args.llm is not None,
        **asdict(report),
    }
    return options.reply(values, _lines(report, out, args.llm is not None), args.json)


def _lines(report: Report, out: Path, has_tokenizer: bool) -> list[str]:
    lines = [
        f"{source} ({values['format']}): {values['tensors']} tensors loaded, "
        f"{len(report.skipped.get(source, []))} not used"
        for source, values in report.loaded.items()
    ]
    parts = sorted({".".join(name.split(".")[:3]) for name in report.new})
    if parts:
        lines.append(f"newly initialised: {len(report.new)} tensors of {', '.join(parts)}")
    lines.append(
        f"{out}: {report.parameters / 1e6:,.1f} M parameters in {len(report.files)} file(s); "
        "import.json lists every tensor that is new or not used"
    )
    if not has_tokenizer:
        lines.append(
            f"{out} has no tokenizer, so --model cannot load it; give --llm as well for a model "
            "that answers"
        )
    return lines
