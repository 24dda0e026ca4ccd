"""A run: everything that decides what a training does, in one frozen record."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Union

from parallel.layout import ParallelConfig
from parallel.optimizer import OptimizerConfig, Schedule

Mixture = tuple[tuple[str, int], ...]  # (task, batch size) pairs


class RunError(ValueError):
    """A run that contradicts itself, or an override that names nothing."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run.

    `stage` is a module of `engine/stages`, `model` a name in `focus.presets.CONFIGS`.
    `micro_batches` lists the (task, batch size) pairs of every step, per data-parallel rank; a
    stage may replace it by its own schedule. `rates` maps globs over parameter names to learning
    rates: the first match decides, no match means frozen. `muon` maps globs to rates of matrices
    that follow Muon instead of AdamW (models that are not split only). `init_from` is the name of a
    run beside this run's folder, a run folder, a checkpoint folder or a safetensors file. `ema` is
    a decay per step. `skips` is how many steps with a non-finite loss or gradient are passed over,
    without touching parameters, before the run stops with an error.
    `batch` is the number of samples per step over all ranks; `fit` turns it into a number of
    micro-batches per rank. `timeout` seconds without a finished step end the process with all its
    stacks printed (0: never). `async_save` lets a thread write checkpoints, from a copy in host
    memory; a run's last is waited for. `profile` names the steps (first, last) that torch's
    profiler traces.
    `measure_flops` traces the model at the start, for TFLOP/s and MFU in the log. `wandb` is the
    Weights & Biases project to log to.
    `precision` "bf16" keeps fp32 weights; "fp8" also multiplies the trunk's matrices in fp8, which
    needs megatron-core and transformer-engine. `parked` names modules that the stage never calls;
    they stay in host memory. `extra` holds what only the stage understands.
    """

    name: str
    stage: str
    model: str
    steps: int
    rates: Mapping[str, float]
    muon: Mapping[str, float] = field(default_factory=dict)
    micro_batches: tuple[tuple[str, int], ...] = (("default", 8),)
    schedule: Schedule = "constant"
    warmup: int = 0
    floor: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    clip: float = 1.0
    seed: int = 0
    init_from: str | None = None
    save_every: int = 500
    keep: int = 2
    async_save: bool = False
    panel_every: int = 500
    log_every: int = 10
    precision: Literal["fp32", "bf16", "fp8"] = "fp32"
    ema: float | None = None
    skips: int = 0
    workers: int = 1
    batch: int | None = None
    timeout: float = 1800.0
    profile: tuple[int, int] | None = None
    measure_flops: bool = False
    wandb: str | None = None
    parked: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        limits = {"steps": 1, "save_every": 1, "keep": 0, "workers": 0, "skips": 0}
        for name, least in limits.items():
            if getattr(self, name) < least:
                raise RunError(f"{self.name}: {name} must be at least {least}, got {self!r}")
        if any(size < 1 for _, size in self.micro_batches) or not self.micro_batches:
            raise RunError(
                f"{self.name}: micro_batches must be pairs (task, batch size >= 1), "
                f"got {self.micro_batches}"
            )
        if self.batch is not None and self.batch < 1:
            raise RunError(f"{self.name}: batch must be at least 1, got {self.batch}")
        if self.timeout < 0:
            raise RunError(f"{self.name}: timeout must be 0 (never) or more, got {self.timeout}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise RunError(f"{self.name}: ema must lie between 0 and 1, got {self.ema}")

    def optimizer(self) -> OptimizerConfig:
        """The optimizer's share of this run."""
        return OptimizerConfig(
            rates=self.rates,
            muon=self.muon,
            betas=self.betas,
            weight_decay=self.weight_decay,
            clip=self.clip,
            schedule=self.schedule,
            warmup=self.warmup,
            steps=self.steps,
            floor=self.floor,
        )


def fit(run: Run, data_size: int) -> Run:
    """Return the run with as many micro-batches per rank as its `batch` asks of `data_size` ranks.

    The size of micro-batches is the run's own, or the next smaller one that divides a rank's share.
    A mixture keeps its order and is read `extra["tasks_per_step"]` micro-batches at a time.
    Raises `RunError` when the ranks do not divide the batch or the run's sizes differ.
    """
    if run.batch is None:
        return run
    sizes = sorted({size for _, size in run.micro_batches})
    share, rest = divmod(run.batch, data_size)
    if len(sizes) > 1 or rest or not share:
        raise RunError(
            f"{run.name}: batch {run.batch} needs micro-batches of one size, got {sizes}, and a "
            f"number of data-parallel ranks that divides it, got {data_size}; set batch=none"
        )
    size = next(s for s in range(min(sizes[0], share), 0, -1) if share % s == 0)
    count = share // size
    mixture = tuple((task, size) for task, _ in run.micro_batches)
    repeated = mixture * -(-count // len(mixture))
    if len(mixture) == 1:
        return dataclasses.replace(run, micro_batches=repeated)
    extra = {**run.extra, "tasks_per_step": count}
    return dataclasses.replace(run, micro_batches=repeated, extra=extra)


def to_json(run: Run) -> dict[str, Any]:
    """Return the run as plain JSON values."""
    return dataclasses.asdict(run)


def from_json(values: Mapping[str, Any]) -> Run:
    """Rebuild a run from `to_json`; fields of other releases raise `RunError`."""
    known = {field.name for field in dataclasses.fields(Run)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise RunError(f"a run of this release expected, got unknown fields {unknown}")
    built = dict(values)
    built["parallel"] = ParallelConfig(**values.get("parallel", {}))
    built["micro_batches"] = tuple((str(t), int(n)) for t, n in values["micro_batches"])
    for name in ("betas", "profile", "parked"):
        if built.get(name) is not None:
            built[name] = tuple(built[name])
    return Run(**built)


def derive_seed(*parts: object) -> int:
    """Mix parts into a 63-bit seed; equal parts give equal seeds on every machine."""
    text = "\x1f".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def override(run: Run, *assignments: str) -> Run:
    """Return `run` with typed `path.to.field=value` assignments applied; raises `RunError`.

    In `rates` and `extra` the rest of the path is the key: `rates.llm.*=1e-4`, `extra.lpips=0.5`.
    Tuples are written as Python does: `micro_batches=(("edit", 4), ("vqa", 8))`.
    """
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals or not path:
            raise RunError(f"an override is path.to.field=value, got {assignment!r}")
        run = _assign(run, path.strip(), text.strip(), path.strip())
    return run


def _assign(record: Any, path: str, text: str, whole: str) -> Any:
    name, _, rest = path.partition(".")
    hints = typing.get_type_hints(type(record))
    if name not in hints:
        raise RunError(f"{whole}: no field {name!r} here; fields are {', '.join(sorted(hints))}")
    value = getattr(record, name)
    if rest and dataclasses.is_dataclass(value):
        changed = _assign(value, rest, text, whole)
    elif rest and isinstance(value, Mapping):
        hint = float if name in ("rates", "muon") else Any
        changed = {**value, rest: _parse(text, hint, whole)}
    elif rest:
        raise RunError(f"{whole}: {name!r} has no fields of its own")
    else:
        changed = _parse(text, hints[name], whole)
    try:
        return dataclasses.replace(record, **{name: changed})
    except ValueError as error:
        raise RunError(f"{whole}={text}: {error}") from error


def _parse(text: str, hint: Any, path: str) -> Any:
    """Read `text` as a value of type `hint`."""
    try:
        return _convert(_literal(text, hint), hint)
    except (TypeError, ValueError, SyntaxError) as error:
        raise RunError(f"{path}: {_say(hint)} expected, got {text!r}") from error


def _literal(text: str, hint: Any) -> Any:
    if hint is str or typing.get_origin(hint) is Literal:
        return text
    if typing.get_origin(hint) in (Union, types.UnionType) and str in typing.get_args(hint):
        return None if text.lower() in ("none", "null") else text
    lowered = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in lowered:
        return lowered[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _convert(value: Any, hint: Any) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin is Literal:
        if value not in arguments:
            raise ValueError(value)
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _convert(value, next(a for a in arguments if a is not type(None)))
    if origin is tuple:
        if not isinstance(value, (tuple, list)):
            raise TypeError(value)
        inner = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        return tuple(_convert(v, h) for v, h in zip(value, inner, strict=True))
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if origin is not None and isinstance(value, dict):
        return {str(k): _convert(v, arguments[1]) for k, v in value.items()}
    if type(value) is not hint:
        raise TypeError(value)
    return value


def _say(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return " or ".join(map(repr, typing.get_args(hint)))
    return getattr(hint, "__name__", None) or str(hint).replace("typing.", "")
