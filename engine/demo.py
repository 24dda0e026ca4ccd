"""`focus demo`: every task on the first unseen scenes, measured, a little training, one page."""

from __future__ import annotations

import io
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.demo_page import Curve, Example, Figure, Section, render
from engine.demo_sections import SECTIONS, SPLIT
from engine.pictures import write_bytes, write_json

if TYPE_CHECKING:
    from focus import Focus

ALIGN = 48  # scenes that projections are aligned on before the few steps
TRAIN_STEPS = 5

# Key in the evaluation, heading, explanation, goals on (test, test_unseen).
MEASURES = (
    ("referring_miou", "Referring", "mean IoU of masks named by a sentence", (0.85, 0.72)),
    ("interactive_iou.click", "Click", "IoU of the object under a click", (0.85, 0.80)),
    ("interactive_iou.scribble", "Scribble", "IoU of the object under a stroke", (0.85, 0.80)),
    ("interactive_iou.box", "Box", "IoU of the object in a box", (0.85, 0.80)),
    ("interactive_iou.mask", "Mask", "IoU of the object under a rough mask", (0.85, 0.80)),
    ("class_miou", "By class", "mean IoU over class names", (0.75, 0.60)),
    ("vqa_accuracy", "Answers", "exact match of the answer", (0.85, 0.70)),
    ("generation_score", "Drawing", "requested objects with right colour and shape", (0.55, 0.40)),
    ("editing_success", "Editing", "right inside the mask, untouched outside", (0.55, 0.40)),
    ("tokenizer_psnr", "Tokenizer", "reconstruction, dB", (24.0, 24.0)),
)
SPLITS = ("test", "test_unseen")

Say = Callable[[str], None]


def tell(line: str) -> None:
    """Print a line of progress."""
    print(line, file=sys.stderr, flush=True)


def run_demo(
    model: Focus,
    *,
    model_name: str,
    out: Path,
    seed: int = 0,
    num: int = 20,
    train: bool = True,
    say: Say = tell,
) -> dict[str, Any]:
    """Run everything; write `out/index.html` and `out/report.json`; return the report."""
    start = time.perf_counter()
    sections = []
    for number, make in enumerate(SECTIONS, 1):
        section = make(model, seed)
        sections.append(section)
        say(f"[{number}/{len(SECTIONS)}] {section.title}: {summary(section)}")
    measured = measure(model, seed, num, say)
    curves = list(train_a_little(out, say)) if train else []
    seconds = time.perf_counter() - start
    facts = [
        ("model", model_name),
        ("scenes", f"{SPLIT}, seed {seed}"),
        ("time", f"{seconds:.0f} s"),
    ]
    page = render(facts=facts, figures=figures(measured), sections=sections, curves=curves)
    write_bytes(page.encode(), out / "index.html")
    report = {
        "command": "demo",
        "model": model_name,
        "split": SPLIT,
        "seed": seed,
        "figures": measured,
        "examples": [describe(example) for section in sections for example in section.examples],
        "training": [
            {"run": curve.name, "losses": curve.losses, "seconds": round(curve.seconds, 2)}
            for curve in curves
        ],
        "seconds": round(seconds, 1),
        "page": str(out / "index.html"),
    }
    write_json(report, out / "report.json")
    return report


def describe(example: Example) -> dict[str, Any]:
    """Return an example without its pictures, for the report."""
    return {
        "task": example.task,
        "kind": example.kind,
        "instruction": example.instruction,
        **dict(example.words),
        **example.figures,
        "seconds": round(example.seconds, 3),
    }


def summary(section: Section) -> str:
    """Say how many examples of a section came out well."""
    judged = [example for example in section.examples if example.badge]
    good = sum(example.verdict == "good" for example in judged)
    return f"{good} of {len(judged)} good" if judged else f"{len(section.examples)} pictures"


def measure(model: Focus, seed: int, num: int, say: Say) -> dict[str, Any]:
    """Evaluate `num` samples of each task on both test splits."""
    from engine.evaluate.tasks import evaluate

    measured = {}
    for split in SPLITS:
        say(f"measuring {num} samples of each task of {split}")
        measured[split] = evaluate(model, split=split, seed=seed, num=num, say=lambda _line: None)
    return measured


def figures(measured: Mapping[str, Mapping[str, Any]]) -> list[Figure]:
    """Turn evaluations by split into the bars of the page."""
    found = []
    for key, name, told, goals in MEASURES:
        values = {split: look_up(measured[split], key) for split in measured}
        present = {split: value for split, value in values.items() if value is not None}
        if present:
            top, unit = (40.0, " dB") if key.endswith("psnr") else (1.0, "")
            goal = dict(zip(SPLITS, goals, strict=True))
            figure = Figure(name=name, told=told, values=present, goals=goal, top=top, unit=unit)
            found.append(figure)
    return found


def look_up(values: Mapping[str, Any], path: str) -> float | None:
    """Return the number at a dotted path, or None where there is none."""
    value: Any = values
    for key in path.split("."):
        if not isinstance(value, Mapping) or key not in value:
            return None
        value = value[key]
    return float(value) if isinstance(value, (int, float)) else None


def train_a_little(out: Path, say: Say, steps: int = TRAIN_STEPS) -> Iterator[Curve]:
    """Train each stage of the sequence `focus_tiny` for a few steps, from random weights.

    The runs lie in a folder of their own inside `out`, which is gone afterwards. Raises
    `KeyboardInterrupt` when a signal stops a run.
    """
    from engine.run import override
    from engine.runs import TINY_SEQUENCE
    from engine.train import train

    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix="training-") as name:
        folder = Path(name)
        for make in TINY_SEQUENCE:
            run = override(make(), "workers=0", "panel_every=0")
            if "align" in run.extra:  # so many scenes would take longer than the steps
                run = override(run, f"extra.align={ALIGN}")
            start = time.perf_counter()
            outcome = train(run, folder / run.name, until=steps, stream=io.StringIO())
            if outcome.stopped:  # by a signal, which training takes as a wish to save and return
                raise KeyboardInterrupt
            seconds = time.perf_counter() - start
            lines = (folder / run.name / "log.jsonl").read_text().splitlines()
            log = [json.loads(line) for line in lines]
            losses = tuple(float(line["loss"]) for line in log)
            later = log[1:] or log  # the first step warms up
            say(f"trained {run.name}: {len(log)} steps, loss {losses[0]:.3f} to {losses[-1]:.3f}")
            yield Curve(
                name=run.name,
                told=(make.__doc__ or "").strip().partition("\n")[0],
                losses=losses,
                samples_per_second=sum(line["samples_per_s"] for line in later) / len(later),
                seconds=seconds,
            )
