"""What a person sees of a training: a bar or lines, log.jsonl, TensorBoard, W&B, panels."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt
from PIL import Image


class Monitor:
    """Writes into one run folder; a follower rank (`leader=False`) writes nothing.

    `project` is a Weights & Biases project to log to as well, where that package is installed.
    """

    def __init__(
        self,
        folder: Path,
        *,
        name: str,
        steps: int,
        start: int,
        log_every: int,
        leader: bool = True,
        stream: TextIO | None = None,
        seconds: float = 15.0,
        project: str | None = None,
    ) -> None:
        self.folder = folder
        self.name = name
        self.steps = steps
        self.start = start
        self.log_every = log_every
        self.leader = leader
        self.stream = stream or sys.stderr
        self.seconds = seconds
        self._began = self._spoke = time.monotonic()
        self._bar: Any = None
        self._board: Any = None
        self._remote: Any = None
        self._log: TextIO | None = None
        if leader:
            folder.mkdir(parents=True, exist_ok=True)
            self._log = _open_log(folder / "log.jsonl", start)
            self._board = _open_board(folder / "tensorboard", start)
            if project is not None:
                self._remote = self._open_remote(project)
            if self.stream.isatty():
                self._bar = _open_bar(name, steps, start, self.stream)

    def _open_remote(self, project: str) -> Any:
        try:
            import wandb
        except ImportError:
            self.say("wandb is not installed; logging without it (pip install wandb)")
            return None
        return wandb.init(
            project=project, name=self.name, id=self.name, resume="allow", dir=str(self.folder)
        )

    def say(self, text: str) -> None:
        """Print one line without breaking the bar."""
        if not self.leader:
            return
        if self._bar is not None:
            self._bar.write(text, file=self.stream)
        else:
            print(f"{self.name}: {text}", file=self.stream, flush=True)

    def step(self, step: int, terms: Mapping[str, float], facts: Mapping[str, float]) -> None:
        """Record one finished step (`step` of them are done): loss terms and other numbers."""
        if self._log is None:
            return
        line = {"step": step, "terms": dict(terms), **facts}
        self._log.write(json.dumps(line) + "\n")
        self._log.flush()
        if self._board is not None and step % self.log_every == 0:
            for key, value in terms.items():
                self._board.add_scalar(f"loss/{key}", value, step)
            for key, value in facts.items():
                self._board.add_scalar(f"run/{key}", value, step)
        if self._remote is not None and step % self.log_every == 0:
            named = {f"loss/{key}": value for key, value in terms.items()}
            self._remote.log({**named, **{f"run/{k}": v for k, v in facts.items()}}, step=step)
        if self._bar is not None:
            self._bar.set_postfix_str(_summary(terms, facts), refresh=False)
            self._bar.update(1)
        elif time.monotonic() - self._spoke >= self.seconds or step in (self.start + 1, self.steps):
            self._spoke = time.monotonic()
            left = (self._spoke - self._began) / (step - self.start) * (self.steps - step)
            self.say(f"{step}/{self.steps}  {_summary(terms, facts)}  {clock(left)} left")

    def panel(self, step: int, picture: npt.NDArray[np.uint8]) -> None:
        """Keep a picture [H, W, 3] as PNG and in TensorBoard."""
        if not self.leader:
            return
        folder = self.folder / "panels"
        folder.mkdir(exist_ok=True)
        Image.fromarray(picture).save(folder / f"step-{step:07d}.png")
        if self._board is not None:
            self._board.add_image("panel", picture, step, dataformats="HWC")

    def close(self) -> None:
        """Flush and close everything."""
        for part in (self._bar, self._board, self._log):
            if part is not None:
                part.close()
        if self._remote is not None:
            self._remote.finish()
            self._remote = None
        self._bar = self._board = self._log = None


def clock(seconds: float) -> str:
    """Write a duration as 1:02:03 or 2:03."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _summary(terms: Mapping[str, float], facts: Mapping[str, float]) -> str:
    parts = [f"{name} {value:.4g}" for name, value in terms.items()]
    parts.append(f"{facts.get('samples_per_s', 0.0):.3g} samples/s")
    if "mfu" in facts:
        parts.append(f"MFU {facts['mfu']:.1%}")
    return "  ".join(parts)


def _open_log(path: Path, start: int) -> TextIO:
    """Open the log for appending, without the steps that will be done again."""
    kept = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= start:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                continue  # the last line of a killed run may be cut off
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(line + "\n" for line in kept))
    temporary.replace(path)
    return path.open("a")


def _open_board(folder: Path, start: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=start + 1 if start else None)


def _open_bar(name: str, steps: int, start: int, stream: TextIO) -> Any:
    from tqdm import tqdm

    return tqdm(total=steps, initial=start, desc=name, file=stream, smoothing=0.1, unit="step")
