"""The training loop. There is one: a laptop's two cores and a cluster run these lines."""

from __future__ import annotations

import dataclasses
import math
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from engine.data.feed import Drawn, take_drawn
from engine.data.ledger import Ledger
from engine.meter import Meter, profiled, watched
from engine.monitor import Monitor
from engine.process import ignore_signals, own_folder, seed_everything, stop_signals
from engine.run import Run, RunError, derive_seed, fit
from engine.saving import Saver, restore
from engine.sectioned import sectioned
from engine.stages.stage import Micro, SectionStage, Stage, find_stage, find_weights
from focus.batch import Batch, move
from parallel.checkpoint import CheckpointFolder
from parallel.engine import Engine, NonFiniteLoss, PlainEngine, StepReport
from parallel.mesh import Mesh, open_mesh
from parallel.sections import Handover

if TYPE_CHECKING:
    from focus.model import Front, Heads

__all__ = ["NonFiniteLoss", "Outcome", "train"]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a training ended: steps done, whether a signal ended it early, the newest checkpoint.

    `requeue` says that the signal was the scheduler's (SIGTERM, SIGUSR1), not a person's (SIGINT).
    """

    step: int
    stopped: bool
    checkpoint: Path
    requeue: bool = False


@dataclass(frozen=True, kw_only=True)
class Training:
    """What one training holds while it runs."""

    run: Run
    stage: Stage
    engine: Engine
    folder: CheckpointFolder
    mesh: Mesh
    ledger: Ledger
    meter: Meter


def train(
    run: Run,
    out_dir: str | Path,
    *,
    resume: bool = True,
    stage: Stage | None = None,
    until: int | None = None,
    stream: TextIO | None = None,
) -> Outcome:
    """Train `run` in `out_dir`, going on from its newest sound checkpoint.

    `until` ends after that many steps in all (a checkpoint is written), for demonstrations.
    SIGTERM, SIGINT and SIGUSR1 finish the step, save and return. Raises `NonFiniteLoss` (the
    parameters and all checkpoints stay as they were), `RunError`, `CheckpointError`.
    """
    out_dir = Path(out_dir)
    stage = stage or find_stage(run.stage)
    if run.parallel.megatron:
        stage = sectioned(stage)
    if run.init_from is not None:
        weights = find_weights(run.init_from, out_dir.parent)
        run = dataclasses.replace(run, init_from=str(weights))
    patience = run.timeout or 1800.0
    with (
        open_mesh(run.parallel, timeout=patience) as mesh,
        own_folder(out_dir, mesh),
        stop_signals() as stop,
    ):
        run = fit(run, mesh.data_size)
        seed_everything(derive_seed(run.seed, "build"))
        training = Training(
            run=run,
            stage=stage,
            engine=build_engine(run, stage, mesh),
            folder=CheckpointFolder(out_dir / "checkpoints", run.keep),
            mesh=mesh,
            ledger=Ledger(run, out_dir, mesh),
            meter=Meter(run, mesh, out_dir),
        )
        messages: list[str] = []
        start = restore(training, resume, messages.append)
        last = min(run.steps, until or run.steps)
        monitor = Monitor(
            out_dir,
            name=run.name,
            steps=last,
            start=start,
            log_every=run.log_every,
            leader=mesh.leader,
            stream=stream,
            project=run.wandb,
        )
        try:
            for message in messages:
                monitor.say(message)
            step = _loop(training, monitor, start, last, stop)
        except BaseException as error:
            # Frees the data loader now: its workers ignore signals and would outlive the error.
            traceback.clear_frames(error.__traceback__)
            raise
        finally:
            monitor.close()
            training.meter.close()
        stopped = step < last
        requeue = stopped and not mesh.any(stop.interrupted)
        checkpoint = training.folder.path(step)
        return Outcome(step=step, stopped=stopped, checkpoint=checkpoint, requeue=requeue)


def build_engine(run: Run, stage: Stage, mesh: Mesh) -> Engine:
    """Return the engine that `run.parallel` asks for, around the stage's model."""
    model = stage.build(run)
    if run.parallel.megatron:
        from parallel.split_engine import SplitEngine

        if run.ema is not None:
            raise RunError("a split model keeps no averaged copy; set ema=none")
        return SplitEngine(
            model,
            run.optimizer(),
            run.parallel,
            mesh,
            precision=run.precision,
            seed=derive_seed(run.seed, "megatron"),
            parked=run.parked,
        )
    if run.precision == "fp8":
        raise RunError(
            "precision=fp8 is megatron-core's trunk by transformer-engine; set "
            "parallel.trunk=megatron, or precision=bf16"
        )
    return PlainEngine(
        model, run.optimizer(), mesh, precision=run.precision, ema=run.ema, parked=run.parked
    )


def _loop(
    training: Training, monitor: Monitor, start: int, last: int, stop: Callable[[], bool]
) -> int:
    """Do steps start..last-1; return how many are done in all."""
    run, mesh, folder = training.run, training.mesh, training.folder
    training.engine.model.train()
    batches = step_batches(training.ledger.planned(), training.stage, mesh, start, last)
    step = start
    with (
        watched(run.timeout) as alive,
        profiled(run, monitor.folder, start) as profiler,
        Saver(training, start if folder.steps() else -1) as saver,
    ):
        while step < last and not mesh.any(stop()):
            alive()
            report, facts = _step(training, monitor, step, batches)
            step += 1
            if mesh.size == 1 or step % run.log_every == 0 or step == last:
                training.ledger.settle(step)
            facts |= training.ledger.facts()
            known = {name: value for name, value in facts.items() if math.isfinite(value)}
            monitor.step(step, report.terms, known)
            if profiler is not None:
                profiler.step()
            saver.poll()
            if step % run.save_every == 0 and step < last:
                alive()
                saver.save(step)
            if run.panel_every and (step % run.panel_every == 0 or step == last) and mesh.leader:
                _panel(training.stage, training.engine.model, monitor, step)
        alive()
        if step:  # before the first step the optimizer has no state to save
            saver.finish(step)
    if step < last:
        kept = f"saved {folder.path(step)}" if step else "nothing to save yet"
        monitor.say(f"stopped by a signal after step {step}; {kept}")
    return step


def _step(
    training: Training, monitor: Monitor, step: int, batches: Iterator[tuple[Sequence[Any], Drawn]]
) -> tuple[StepReport, dict[str, float]]:
    """Do one step; return its report and what the log says beside the loss terms.

    Every rank raises or skips alike: engines agree on whether a loss or gradient is finite.
    """
    run, stage, mesh, meter = training.run, training.stage, training.mesh, training.meter
    began = time.monotonic()
    micros = send(training.ledger.count(*next(batches)), mesh.device)
    waited = time.monotonic() - began
    try:
        report = training.engine.step(step, micros, StepWork(run, stage, step, mesh))
    except NonFiniteLoss as error:
        meter.skipped += 1
        if meter.skipped > run.skips:
            raise
        monitor.say(f"{error}; skipped ({meter.skipped} of {run.skips} allowed)")
        report = StepReport(loss=math.nan, terms={}, grad_norm=math.nan)
    samples = sum(size for _, size in stage.micro_batches(run, step)) * mesh.data_size
    facts = {
        "loss": report.loss,
        "grad_norm": report.grad_norm,
        "rate": run.optimizer().scale(step),
        **meter.facts(step + 1, micros, samples, time.monotonic() - began, waited),
    }
    return report, facts


class StepWork:
    """The stage's share of one step, as engines see it (`parallel.sections.Work`)."""

    def __init__(self, run: Run, stage: Stage, step: int, mesh: Mesh) -> None:
        self.run = run
        self.stage = stage
        self.number = step
        self.mesh = mesh

    def seed(self, micro: int, section: str) -> None:
        """Seed by global micro-batch number, so that layouts draw the same numbers."""
        index = micro * self.mesh.data_size + self.mesh.data_rank
        seed = derive_seed(self.run.seed, "step", self.number, index)
        seed_everything(seed if section == "front" else derive_seed(seed, section))

    def losses(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        """See `Stage.losses`."""
        return self.stage.losses(model, batch, self.number)

    def prepare(self, front: Front, batch: Batch) -> tuple[Batch, dict[str, Tensor]]:
        """See `SectionStage.prepare`."""
        return self._sections().prepare(front, batch, self.number)

    def head_losses(self, heads: Heads, state: Handover) -> dict[str, Tensor]:
        """See `SectionStage.head_losses`."""
        return self._sections().head_losses(heads, state, self.number)

    def _sections(self) -> SectionStage:
        if not isinstance(self.stage, SectionStage):
            raise RunError(
                f"stage {self.run.stage!r} is not written along the model's sections, so only its "
                "data can be split; set parallel.tp, pp, cp and vpp to 1"
            )
        return self.stage


def _panel(stage: Stage, model: nn.Module, monitor: Monitor, step: int) -> None:
    """Let the stage draw with the model in evaluation mode; restore every module's mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    with torch.no_grad():
        picture = stage.panel(model, step)
    for module, mode in modes:
        module.training = mode
    if picture is not None:
        monitor.panel(step, picture)


class StepDataset(Dataset[list[Any]]):
    """Item n is the list of micro-batches of step n for one data-parallel rank."""

    def __init__(self, run: Run, stage: Stage, rank: int, ranks: int) -> None:
        self.run = run
        self.stage = stage
        self.rank = rank
        self.ranks = ranks

    def __getitem__(self, step: int) -> list[Any]:
        found = []
        for number, (task, size) in enumerate(self.stage.micro_batches(self.run, step)):
            micro = Micro(number=number, task=task, size=size, rank=self.rank, ranks=self.ranks)
            seed_everything(micro.seed(self.run, step))
            found.append(self.stage.batches(self.run, step, micro))
        return found


class CountedDataset(StepDataset):
    """The same, with the samples that were read and left out."""

    def __getitem__(self, step: int) -> Any:
        take_drawn(self.run)  # read before, outside of any step
        return super().__getitem__(step), take_drawn(self.run)


def step_batches(
    run: Run, stage: Stage, mesh: Mesh, start: int, last: int
) -> Iterator[tuple[Sequence[Any], Drawn]]:
    """Yield the micro-batches of steps start..last-1, prepared ahead in worker processes.

    For a GPU a thread copies them to pinned memory.
    """
    loader: DataLoader[Any] = DataLoader(
        CountedDataset(run, stage, mesh.data_rank, mesh.data_size),
        batch_size=None,
        sampler=range(start, last),
        num_workers=run.workers,
        prefetch_factor=2 if run.workers else None,
        worker_init_fn=ignore_signals,
        collate_fn=_same,
        pin_memory=mesh.device.type == "cuda",
    )
    return iter(loader)


def _same(item: Any) -> Any:
    return item


def send(batch: Any, device: torch.device) -> Any:
    """Return a batch with all its tensors on the device, whatever it is made of."""
    if device.type == "cpu" or batch is None:
        return batch
    if isinstance(batch, dict):
        return {key: send(value, device) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch)(send(value, device) for value in batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return move(batch, device)
    return batch.to(device) if hasattr(batch, "to") else batch
