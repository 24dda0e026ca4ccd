"""What a training has drawn from its shards: counted, limited, kept in its checkpoints."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch.distributed as dist

from engine.data.feed import START, Drawn, open_feed, positions
from engine.data.manifest import Tally
from engine.data.scene_model import DataError
from engine.run import Run

if TYPE_CHECKING:
    from parallel.mesh import Mesh

T = TypeVar("T")
SKIPPED = "skipped.jsonl"


class Ledger:
    """Counts of one training, the same on every rank after `settle`; inert without shards.

    `extra["bad_share"]` (0.1) is the share of broken samples at which the training stops.
    Raises: DataError for shards that cannot be opened.
    """

    def __init__(self, run: Run, folder: Path, mesh: Mesh) -> None:
        self.run = run
        self.mesh = mesh
        self.path = folder / SKIPPED
        feed = open_feed(run)
        self.active = feed is not None
        self.fingerprint = "" if feed is None else feed.fingerprint(run)
        self.start: dict[str, Any] = {"step": 0, "before": {}}
        self._step = 0
        self.tally = Tally(share=float(run.extra.get("bad_share", 0.1)))
        self.replaced = 0
        self._pending = Drawn()

    def planned(self) -> Run:
        """The run as the data workers need it: with what was drawn before it goes on."""
        if not self.active:
            return self.run
        return dataclasses.replace(self.run, extra={**self.run.extra, START: self.start})

    def resume(self, state: Mapping[str, Any], step: int, data_size: int) -> None:
        """Go on after `step`, where a checkpoint of `data_size` ranks left `state`.

        A checkpoint without state was written before its run read shards: its order begins anew.

        Raises: DataError when the shards, sizes or seed would give another order of samples.
        """
        if not self.active:
            return
        told = state.get("fingerprint", self.fingerprint)
        if told != self.fingerprint:
            raise DataError(
                f"the data of this training ({told}) expected, got {self.fingerprint}: shards, "
                "micro_batches, augmentation or seed changed; resume with those, or start anew"
            )
        self._step = step
        self.start = dict(state.get("drawn", {"step": step, "before": {}}))
        self.tally.good = int(state.get("good", 0))
        self.tally.bad.update(state.get("bad", {}))
        self.replaced = int(state.get("replaced", 0))
        if self.mesh.leader and self.path.exists():
            lines = self.path.read_text().splitlines()
            kept = [line for line in lines if json.loads(line)["step"] <= step]
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text("".join(line + "\n" for line in kept))
            temporary.replace(self.path)

    def count(self, micros: T, drawn: Drawn) -> T:
        """Note what one step's micro-batches of this rank cost, and hand them on."""
        self._pending.add(drawn)
        return micros

    def settle(self, step: int) -> None:
        """Add up every rank's counts; every rank calls it at the same steps.

        Raises: DataError, on every rank, once too many samples are broken.
        """
        self._step = step
        if not self.active:
            return
        everyone: list[Any] = [(self.mesh.data_rank, self._pending)]
        if self.mesh.size > 1:
            everyone = [None] * self.mesh.size
            dist.all_gather_object(everyone, (self.mesh.data_rank, self._pending))
        self._pending = Drawn()
        for drawn in dict(everyone).values():
            self.replaced += drawn.replaced
            if self.mesh.leader and drawn.bad:
                with self.path.open("a", encoding="utf-8") as file:
                    for bad in drawn.bad:
                        line = {"step": step, "key": bad.key, "reason": bad.reason}
                        file.write(json.dumps({**line, "text": bad.text}) + "\n")
            self.tally.add(drawn.good, drawn.bad)
        self.tally.check()

    def facts(self) -> dict[str, float]:
        """Numbers for the log and TensorBoard: samples, and those left out by reason."""
        if not self.active:
            return {}
        return {**self.tally.facts(), "data/replaced": float(self.replaced)}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        if not self.active:
            return {}
        return {
            "fingerprint": self.fingerprint,
            "drawn": positions(self.planned(), self._step, self.mesh.data_size),
            "good": self.tally.good,
            "bad": dict(self.tally.bad),
            "replaced": self.replaced,
        }
