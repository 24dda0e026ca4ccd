"""`focus edit`: change one object or the background as a text says."""

from __future__ import annotations

import argparse
import time

from engine.commands import options

HELP = "change a picture as a text says, at the object it names or a region points at"
EXAMPLES = (
    'focus edit photo.png "remove the red circle"',
    'focus edit photo.png "make <region> blue" --click 40,60',
    'focus edit photo.png "replace it with a green star" --box 20,30,60,80',
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("image", metavar="IMAGE", help="a picture file of any size")
    parser.add_argument("text", metavar="TEXT", help="the change; <region> stands for the region")
    parser.add_argument(
        "--steps",
        type=options.whole(1, 1000),
        metavar="N",
        help="denoising steps (the model's own)",
    )
    options.add_regions(parser, many=False)
    options.add_model(parser, "out/edit")


def run(args: argparse.Namespace) -> int:
    """Edit one picture; write result, mask, before/after and report."""
    from engine.pictures import read_picture, write_json, write_mask, write_picture

    text = options.check_text(args.text)
    if "<region>" in text and not args.regions:
        raise options.UsageError("TEXT says <region>: point at it with --click, --box, ...")
    picture = read_picture(args.image)
    regions = options.read_regions(args.regions, picture)
    model = options.load_model(args.model, args.backend)
    steps = {} if args.steps is None else {"steps": args.steps}
    start = time.perf_counter()
    result = model.edit(
        picture.image, text, region=regions[0] if regions else None, seed=args.seed, **steps
    )
    seconds = time.perf_counter() - start

    from engine.show import before_after

    name = options.stem(picture.path.stem)
    panel = before_after(picture.image, result.image, result.mask, text)
    report = {
        "command": "edit",
        "model": args.model,
        "image": picture.path,
        "size": picture.size,
        "notes": picture.notes,
        "text": text,
        "regions": options.region_report(args.regions),
        "seed": args.seed,
        "answer": result.text,
        "share": float(result.mask.mean()),
        "edited": write_picture(result.image, args.out / f"{name}.edited.png"),
        "mask": write_mask(result.mask, args.out / f"{name}.mask.png"),
        "before_after": write_picture(panel, args.out / f"{name}.before-after.png"),
        "seconds": round(seconds, 3),
    }
    path = write_json(report, args.out / f"{name}.json")
    lines = [f"note: {note}" for note in picture.notes]
    lines += [
        f"changed: {result.text or 'the picture'}, {100 * report['share']:.1f} % of it",
        f"{report['edited']}",
        f"{report['before_after']} ({seconds:.2f} s)",
    ]
    return options.reply({**report, "report": path}, lines, args.json)
