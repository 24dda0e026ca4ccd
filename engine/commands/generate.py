"""`focus generate`: a picture from a text."""

from __future__ import annotations

import argparse
import time

from engine.commands import options

HELP = "draw a picture from a text"
EXAMPLES = ('focus generate "a large yellow star above a small blue square" --seed 3',)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("text", metavar="TEXT", help="what the picture shows")
    options.add_model(parser, "out/generate")


def run(args: argparse.Namespace) -> int:
    """Draw one picture; write it and the report."""
    from engine.pictures import write_json, write_picture

    text = options.check_text(args.text)
    model = options.load_model(args.model, args.backend)
    start = time.perf_counter()
    image = model.generate(text, seed=args.seed)
    seconds = time.perf_counter() - start
    name = f"{options.stem(text)}.seed-{args.seed}"
    path = write_picture(image, args.out / f"{name}.png")
    report = {
        "command": "generate",
        "model": args.model,
        "text": text,
        "seed": args.seed,
        "image": path,
        "size": image.size,
        "seconds": round(seconds, 3),
    }
    report["report"] = write_json(report, args.out / f"{name}.json")
    return options.reply(report, [f"{path} ({seconds:.2f} s)"], args.json)
