"""Draw `docs/focus-tiny.png`, the picture of README.md: `python docs/picture.py [--seed S]`.

The first unseen scenes of a seed, as the demo shows them. From above: what goes in, what is found,
and for regions the truth, for edits the edited picture; at the right, pictures from captions.
Prints what was asked.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

from engine.demo_page import Example
from engine.demo_sections import editing, generation, interactive
from engine.pictures import write_picture
from engine.show import PAPER
from focus import Focus

SIDE, GAP, ROWS = 192, 6, 3
KINDS = ("remove", "recolour", "replace", "background")


def columns(model: Focus, seed: int) -> list[tuple[list[Image.Image], str]]:
    """Return the columns of pictures, each with what was asked."""
    regions = interactive(model, seed).examples
    edits = {example.kind: example for example in editing(model, seed).examples}
    shown = [*regions, *(edits[kind] for kind in KINDS)]
    drawn = generation(model, seed).examples[:ROWS]
    told = "; ".join(example.instruction for example in drawn)
    return [(_frames(example), f"{example.kind}: {example.instruction}") for example in shown] + [
        ([_frames(example)[0] for example in drawn], told)
    ]


def _frames(example: Example) -> list[Image.Image]:
    return [shot.frames[0] for shot in example.shots[:ROWS]]


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="focus-tiny")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("focus-tiny.png"))
    args = parser.parse_args()
    found = columns(Focus.from_pretrained(args.model), args.seed)
    step = SIDE + GAP
    board = Image.new("RGB", (len(found) * step - GAP, ROWS * step - GAP), PAPER)
    for number, (pictures, told) in enumerate(found):
        print(told)
        for row, picture in enumerate(pictures):
            tile = picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            board.paste(tile, (number * step, row * step))
    write_picture(board, args.out)


if __name__ == "__main__":
    main()
