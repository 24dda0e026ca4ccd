"""`focus chat`: a question about a picture."""

from __future__ import annotations

import argparse
import time

from engine.commands import options

HELP = "answer a question about a picture"
EXAMPLES = ('focus chat photo.png "How many stars are there?"',)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("image", metavar="IMAGE", help="a picture file of any size")
    parser.add_argument("text", metavar="TEXT", help="the question")
    options.add_model(parser, "out/chat")


def run(args: argparse.Namespace) -> int:
    """Answer one question; print the answer, write the report."""
    from engine.pictures import read_picture, write_json

    text = options.check_text(args.text)
    picture = read_picture(args.image)
    model = options.load_model(args.model, args.backend)
    start = time.perf_counter()
    answer = model.chat(picture.image, text, seed=args.seed)
    seconds = time.perf_counter() - start
    report = {
        "command": "chat",
        "model": args.model,
        "image": picture.path,
        "size": picture.size,
        "notes": picture.notes,
        "text": text,
        "answer": answer,
        "seed": args.seed,
        "seconds": round(seconds, 3),
    }
    path = write_json(report, args.out / f"{options.stem(picture.path.stem)}.json")
    lines = [*(f"note: {note}" for note in picture.notes), answer]
    return options.reply({**report, "report": path}, lines, args.json)
