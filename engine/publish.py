"""From a run's checkpoint to a model that others load: narrow weights, vocabulary, model card."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.data.words import tiny_vocabulary
from engine.run import RunError
from engine.stages.stage import find_weights, load_initial
from focus.api import Focus
from focus.model import FocusModel
from focus.presets import CONFIGS
from focus.sampling import Sampling
from focus.segment.refine import Refinement
from focus.settings import Settings

CARD = "README.md"
FIGURES = "figures.json"
TINY_SETTINGS = Settings(
    words=48,
    # Where things lie is drawn nearly as likely as it is: the likeliest code of a cell is backdrop
    # for as long as an object may as well begin in the next one. What they look like is not.
    generation=Sampling(temperature=(0.7, 0.0), top_k=(64, 64), guidance=2.0),
    editing=Sampling(temperature=(0.6, 0.0), top_k=(64, 64)),
    steps=12,
    guidance=1.0,
    scheduler="dpm++",
    object_score=0.6,  # the best of 0.2 to 0.7 on four seeds of validation (0.4: .014 less)
    refinement=Refinement(),
    decoder="pixel",  # the better of the two until the diffusion decoder has seen more steps
    keep_tokens=True,
    paste_outside=True,
)
MEASURES = (
    ("referring_miou", "referring mIoU"),
    ("reasoning_miou", "reasoning mIoU"),
    ("interactive_iou.click", "interactive IoU, click"),
    ("interactive_iou.scribble", "interactive IoU, scribble"),
    ("interactive_iou.box", "interactive IoU, box"),
    ("interactive_iou.mask", "interactive IoU, mask"),
    ("class_miou", "class-based mIoU"),
    ("vqa_accuracy", "question answering, exact match"),
    ("generation_score", "generation, objects present"),
    ("editing_success", "editing, success"),
    ("editing_success_unpasted", "editing, success of the decoder's own picture"),
    ("editing_mask_miou", "editing, mIoU of the predicted region"),
    ("tokenizer_psnr", "tokenizer PSNR (dB)"),
    ("diffusion_psnr", "diffusion decoder PSNR (dB)"),
)


def publish(checkpoint: str, out: Path) -> Focus:
    """Write the weights of a checkpoint (fp16), its vocabulary and decoding defaults to `out`.

    checkpoint: what `find_weights` takes: a run folder, a checkpoint or a safetensors file, whose
    config is then focus_tiny. The averaged weights are taken where the run kept them. Models other
    than focus_tiny get the paper's decoding defaults.
    Raises `RunError`, `CheckpointMismatch`.
    """
    weights = find_weights(checkpoint, Path("runs"))
    sizes = CONFIGS[_config_name(weights)]()
    model = FocusModel(sizes)
    load_initial(model, weights)
    settings = TINY_SETTINGS if sizes.name == "focus_tiny" else Settings()
    focus = Focus(model, tiny_vocabulary(sizes), settings)
    focus.save_pretrained(out, dtype=torch.float16)
    return focus


def _config_name(weights: Path) -> str:
    """Return the model of the run that wrote a checkpoint's weights."""
    state = weights.with_name("state.json")
    if not state.is_file():
        return "focus_tiny"
    return str(json.loads(state.read_text())["run"]["model"])


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a run's newest checkpoint says of its training: steps done and samples per step."""

    name: str
    steps: int
    micro_batches: tuple[tuple[str, int], ...]
    tasks_per_step: int  # so many of the micro-batches a step, in turn
    ranks: int = 1  # processes that each drew as many

    @property
    def samples(self) -> int:
        """Samples seen in all."""
        cycle, count = self.micro_batches, self.steps * self.tasks_per_step
        return self.ranks * sum(cycle[i % len(cycle)][1] for i in range(count))


def read_trained(folder: Path) -> Trained:
    """Read the newest checkpoint of a run's folder; raises `RunError` when there is none."""
    checkpoints = folder / "checkpoints"
    if not (checkpoints / "latest").is_file():
        raise RunError(f"a run's folder with checkpoints expected, got {folder}")
    newest = checkpoints / (checkpoints / "latest").read_text().strip()
    state = json.loads((newest / "state.json").read_text())
    run = state["run"]
    mixture = tuple((str(task), int(size)) for task, size in run["micro_batches"])
    return Trained(
        name=str(run["name"]),
        steps=int(state["step"]),
        micro_batches=mixture,
        tasks_per_step=int(run["extra"].get("tasks_per_step", len(mixture))),
        ranks=int(state.get("data_size", 1)),
    )


def card(figures: Sequence[Mapping[str, Any]], trained: Sequence[Trained], parameters: int) -> str:
    """Return the model card: what it is, how it was trained, what it was measured to do."""
    head = "| measure | " + " | ".join(f"{f['split']} (seed {f['seed']})" for f in figures) + " |"
    lines = [head, "|---|" + "---|" * len(figures)]
    for key, told in MEASURES:
        cells = [_cell(f, key) for f in figures]
        lines.append(f"| {told} | " + " | ".join(cells) + " |")
    rows = [
        f"| `{run.name}` | {run.steps} | {run.samples:,} | "
        + ", ".join(f"{task} {size}" for task, size in run.micro_batches)
        + " |"
        for run in trained
    ]
    commands = [
        f"focus evaluate focus-tiny --split {f['split']} --seed {f['seed']} --num {f['num']}"
        for f in figures
    ]
    return TEMPLATE.format(
        parameters=f"{parameters / 1e6:.1f} M",
        trained="\n".join(rows),
        figures="\n".join(lines),
        commands="\n".join(commands),
    )


def _cell(figures: Mapping[str, Any], key: str) -> str:
    value: Any = figures
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if value is None:
        return "-"
    return f"{value:.1f}" if key.endswith("psnr") else f"{value:.3f}"


def read_figures(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Read what `focus evaluate --json` wrote."""
    return [json.loads(path.read_text()) for path in paths]


TEMPLATE = """# focus-tiny

Every part of FOCUS in {parameters} parameters, trained from nothing on two CPU cores with pictures
of the built-in world: coloured shapes on quiet backgrounds. It shows that the whole system works;
it knows no photographs.

## Training

What these weights saw, in this order, from the checkpoints of the runs (`make train-tiny` runs the
same stages from nothing). A run that stands here twice was continued from the weights before it,
with new rates or another mixture; runs that train disjoint parts ran side by side.

| run | steps | samples | mixture (task and samples, in turn) |
|---|---|---|---|
{trained}

Stage 0 stands in for the public checkpoints that the full-scale model starts from. Everything else
follows the paper's stages; losses, freezing and our readings are in `engine/stages/` and
`engine/runs.py`. `test_unseen` holds colour-shape pairs that never occur in training.

## Figures

Measured on scenes with exact ground truth, no learned judge:

{figures}

```
{commands}
```

Editing success: mean absolute error inside the true region below 30/255 and PSNR outside at least
22 dB. Two decoding defaults are not in the paper and help it: visual tokens outside the predicted
region are copied from the source (`keep_tokens`), and pixels outside come from the source
(`paste_outside`); the row "decoder's own picture" is without the second.

Pictures come from the tokenizer's pixel decoder by default (`decoder` in `generation_config.json`);
the diffusion decoder is there too and is the weaker of the two at this amount of training.

Weights are stored in half precision and widened on loading. Licence: Apache-2.0.
"""
