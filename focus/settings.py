"""How a model decodes by default: generation_config.json beside the weights."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from focus.errors import CheckpointMismatch
from focus.sampling import Sampling
from focus.segment.refine import Refinement

FILE = "generation_config.json"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Decoding defaults of a model; a request may override each.

    words: longest answer in tokens. generation, editing: how visual tokens are drawn.
    steps, guidance, scheduler: the diffusion decoder's sampling (facts section 13: 50 steps, 2.0).
    object_score: score from which class-based segmentation reports an object (Mask2Former's 0.8).
    refinement: how segmented masks are fitted to the picture's edges (edits: never), None: not.
    decoder: "diffusion", or "pixel" for the tokenizer's own quick preview.
    keep_tokens: copy the source's visual tokens outside the edit mask instead of writing them.
    paste_outside: take every pixel outside the edit mask from the source picture. Neither is in the
    paper, nor is `refinement`; both keep what was not meant to change.
    """

    words: int = 64
    generation: Sampling = field(
        default_factory=lambda: Sampling(temperature=1.0, top_k=(2048, 6144), guidance=2.0)
    )
    editing: Sampling = field(
        default_factory=lambda: Sampling(
            temperature=0.7, top_k=(512, 1536), top_p=0.8, guidance=1.25
        )
    )
    steps: int = 50
    guidance: float = 2.0
    scheduler: str = "ddim"
    object_score: float = 0.8
    refinement: Refinement | None = None
    decoder: Literal["diffusion", "pixel"] = "diffusion"
    keep_tokens: bool = False
    paste_outside: bool = False


def write(settings: Settings) -> str:
    """Return the settings as the text of generation_config.json."""
    return json.dumps(dataclasses.asdict(settings), indent=2) + "\n"


def read(directory: Path) -> Settings:
    """Read the settings of a model directory; defaults when it has none.

    Raises `CheckpointMismatch` on an unknown or ill-formed field.
    """
    path = directory / FILE
    if not path.is_file():
        return Settings()
    try:
        values: dict[str, Any] = json.loads(path.read_text())
        for name in ("generation", "editing"):
            if name in values:
                sampling = dict(values[name])
                sampling["top_k"] = tuple(sampling.get("top_k", (None, None)))
                if isinstance(sampling.get("temperature"), list):
                    sampling["temperature"] = tuple(sampling["temperature"])
                values[name] = Sampling(**sampling)
        if "refinement" in values and values["refinement"] is not None:
            values["refinement"] = Refinement(**values["refinement"])
        return Settings(**values)
    except (OSError, TypeError, ValueError) as error:
        raise CheckpointMismatch(f"{path}: {error}") from error
