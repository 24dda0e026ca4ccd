"""The engine beside what it replaces: decoding, parts and whole requests, on this machine.

    python -m bench serve [--model focus-tiny] [--bundle DIR] [--json FILE]

Decoding is compared with a loop that recomputes the whole sequence and with transformers'
`generate` on copied weights; parts and requests with the eager model, and for every backend that a
bundle holds. Contenders take turns (`bench.timer`). A row's baseline is the eager (or slowest
honest) way to do the same; `ratio` is baseline over median. With --gpu-model the bounds of `bench
latency` come at the end.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.decoding import (
    measure_ticks,
    picture_contenders,
    text_contenders,
    trunk_calls,
)
from bench.timer import Timing, measure
from engine.data.scenes import sample
from engine.serve.decode import Decoder
from engine.serve.engine import Engine
from focus.api import Focus
from focus.grammar import Drawing
from focus.request import Pixels, Request
from focus.sampling import GREEDY, Sampling

SPECULATE = 8


@dataclass(frozen=True, kw_only=True)
class Row:
    """One contender. Times in ms; `peak_mb` is what a call needs beyond what was there."""

    task: str
    part: str
    backend: str
    median_ms: float
    min_cpu_ms: float
    peak_mb: float
    baseline_ms: float
    baseline_cpu_ms: float = math.nan
    note: str = ""

    @property
    def ratio(self) -> float:
        """How many times faster than the baseline."""
        return self.baseline_ms / self.median_ms if self.median_ms else math.nan

    @property
    def cpu_ratio(self) -> float:
        """The same of the least processor times: what a busy machine hardly changes."""
        return self.baseline_cpu_ms / self.min_cpu_ms if self.min_cpu_ms else math.nan


def rows_of(
    task: str,
    part: str,
    timings: dict[str, Timing],
    baseline: str,
    notes: dict[str, str] | None = None,
) -> list[Row]:
    """Turn the timings of one comparison into rows."""
    return [
        Row(
            task=task,
            part=part,
            backend=name,
            median_ms=timing.median_ms,
            min_cpu_ms=timing.min_cpu_ms,
            peak_mb=timing.extra_mb,
            baseline_ms=timings[baseline].median_ms,
            baseline_cpu_ms=timings[baseline].min_cpu_ms,
            note=(notes or {}).get(name, ""),
        )
        for name, timing in timings.items()
    ]


def decoding(model: Focus, image: Pixels, num: int, repeats: int) -> list[Row]:
    """Words and visual tokens, per token."""
    decoders = {
        "engine": Decoder(model.model, model.vocabulary),
        "engine int8": Decoder(model.model, model.vocabulary, int8=True),
    }
    session = ready(model, image)
    prompt = torch.randn(1, 143, model.config.llm.dim, generator=torch.Generator().manual_seed(0))
    writers = text_contenders(model, decoders, prompt)
    words = measure_ticks(writers, num, repeats)
    rows = rows_of("decode", "words, per token", words, "naive recompute")
    drawn = picture_contenders(model, decoders, session, GREEDY)
    pictures = measure_ticks(drawn, num, max(1, repeats // 3))
    rows += rows_of("decode", "picture, per visual token", pictures, "focus")
    return rows + guessing(model, session, decoders["engine"], repeats)


def guessing(model: Focus, session: Any, plain: Decoder, repeats: int) -> list[Row]:
    """A whole picture, one token at a time and by guesses from the source picture."""
    draft, tokens = source_of(model, session), drawn_tokens(model)
    decoders = {"engine": plain}
    for width in (SPECULATE // 2, SPECULATE):
        decoders[f"engine, {width} guesses"] = Decoder(
            model.model, model.vocabulary, speculate=width
        )
    functions: dict[str, Callable[[], Any]] = {
        name: partial(draw_from, decoder, session, draft if decoder.speculate > 1 else None, GREEDY)
        for name, decoder in decoders.items()
    }
    notes = {
        name: f"{trunk_calls(decoder, functions[name])} calls for {tokens} tokens"
        for name, decoder in decoders.items()
    }
    timings = measure(functions, device="cpu", repeats=max(1, repeats // 3))
    return rows_of("decode", "picture, whole", timings, "engine", notes)


def draw_from(decoder: Decoder, session: Any, draft: Drawing | None, sampling: Sampling) -> Any:
    """Draw a picture from a copy of a session's state."""
    state = session.state.select([0])
    drafts = None if draft is None else [draft]
    return decoder.picture(state, [session.bucket], sampling=sampling, drafts=drafts)


def drawn_tokens(model: Focus) -> int:
    """Visual tokens of a picture of the model's own size."""
    from focus.buckets import bucket_of

    return bucket_of(model.config).num_visual


def ready(model: Focus, image: Pixels) -> Any:
    """A session that has said its words and read its mask queries: a picture comes next."""
    pipeline = model.pipeline()
    session = pipeline.open([Request(task="editing", text="remove the red circle", image=image)])
    pipeline.say(session)
    pipeline.segment(session)
    return session


def source_of(model: Focus, session: Any) -> Drawing:
    """The source picture as codes: the draft of an edit."""
    codes = model.pipeline().codes(session)
    return Drawing(
        bucket=session.bucket, semantic=codes.semantic[0].numpy(), pixel=codes.pixel[0].numpy()
    )


def requests(models: dict[str, Focus], image: Pixels, repeats: int) -> list[Row]:
    """Whole requests of every task; the engine forgets its pictures before each."""
    found: list[Row] = []
    tasks: dict[str, Callable[[Focus], Any]] = {
        "segment": lambda model: model.segment(image, "the red circle"),
        "edit": lambda model: model.edit(image, "remove the red circle"),
        "generate": lambda model: model.generate("a red circle above a blue square"),
    }
    for task, run in tasks.items():

        def timed(model: Focus, run: Callable[[Focus], Any] = run) -> Callable[[], Any]:
            def call() -> Any:
                if isinstance(model, Engine):
                    model.memory.clear()
                return run(model)

            return call

        functions: dict[str, Callable[[], Any]] = {
            name: timed(model) for name, model in models.items()
        }
        found += rows_of(
            task, "request", measure(functions, device="cpu", repeats=repeats), "eager"
        )
    return found


def keeping(model: Focus, image: Pixels, repeats: int) -> list[Row]:
    """Beyond the paper: write only the tokens under the edit mask."""
    functions: dict[str, Callable[[], Any]] = {}
    for name, keep in (("all tokens", False), ("under the mask", True)):
        settings = dataclasses.replace(model.settings, keep_tokens=keep)
        engine = Engine(Focus(model.model, model.vocabulary, settings))
        functions[name] = partial(engine.edit, image, "remove the red circle")
    return rows_of(
        "edit", "keep_tokens", measure(functions, device="cpu", repeats=repeats), "all tokens"
    )


def again(model: Focus, image: Pixels, repeats: int) -> list[Row]:
    """The first and the second edit of one picture: reading (encoders, prompt), and all of it."""
    engine = Engine(model)
    texts = ("remove the red circle", "make the blue square green")

    def read(text: str, fresh: bool) -> Callable[[], Any]:
        def call() -> Any:
            if fresh:
                engine.memory.clear()
            request = Request(task="editing", text=text, image=image)
            pipeline = engine.pipeline()
            return pipeline.say(pipeline.open([request]))

        return call

    def whole(text: str, fresh: bool) -> Callable[[], Any]:
        def call() -> Any:
            if fresh:
                engine.memory.clear()
            return engine.edit(image, text)

        return call

    found: list[Row] = []
    for part, make in (("encode, prompt and words", read), ("whole edit", whole)):
        functions: dict[str, Callable[[], Any]] = {
            "first": make(texts[0], True),
            "second": make(texts[1], False),
        }
        timings = measure(functions, device="cpu", repeats=repeats)
        found += rows_of("session", part, timings, "first")
    return found


def parts(bundle: Path, model: Focus, backends: Sequence[str], repeats: int) -> list[Row]:
    """Every exported part on every backend of a bundle, beside the eager module."""
    from engine.export.parts import list_parts

    found: list[Row] = []
    loaded = {name: load_backend(bundle, name) for name in backends}
    for part in list_parts(model.model):
        sizes = {dim.name: min(dim.opt, 256) for dim in part.dims}
        inputs = dict(zip((s.name for s in part.inputs), part.example_inputs(sizes), strict=True))
        functions: dict[str, Callable[[], Any]] = {"eager": partial(part.run, inputs)}
        for name, runner in loaded.items():
            functions[name] = partial(runner, part.name, inputs)
        timings = measure(functions, device="cpu", repeats=repeats)
        found += rows_of("part", part.name, timings, "eager")
    return found


def load_backend(bundle: Path, backend: str) -> Callable[[str, Any], Any]:
    """Return what runs a part of a bundle by name."""
    from engine.serve import backends

    return backends.load(bundle, backend=backend).run


def quality(model: Focus, num: int) -> list[Row]:
    """What int8 changes on the built-in world: masks (mean IoU with fp32's) and picture codes."""
    exact, rounded = Engine(model), Engine(model, int8=True)
    overlap, same = [], []
    for index in range(num):
        record = sample("editing", "test", 0, index, model.config.hierarchical.image_size)
        assert record.image is not None
        results = [
            engine.edit(record.image, record.text, seed=index) for engine in (exact, rounded)
        ]
        first, second = (result.mask for result in results)
        union = (first | second).sum()
        overlap.append(float((first & second).sum() / union) if union else 1.0)
        pictures = [np.asarray(result.raw).astype(int) for result in results]
        same.append(float((abs(pictures[0] - pictures[1]).max(-1) < 8).mean()))
    note = (
        f"mask IoU with fp32 {np.mean(overlap):.3f}, pixels alike {np.mean(same):.3f}, {num} edits"
    )
    nothing = float("nan")
    return [
        Row(
            task="quality",
            part="edit",
            backend="engine int8",
            median_ms=nothing,
            min_cpu_ms=nothing,
            peak_mb=nothing,
            baseline_ms=nothing,
            note=note,
        )
    ]


def starting(name: str) -> list[Row]:
    """Time from nothing to a model that can be asked."""
    found = []
    loaders = (Focus, Engine)
    for part, load in ((f"{c.__name__}.from_pretrained", c.from_pretrained) for c in loaders):
        begun, cpu = time.perf_counter(), time.process_time()
        load(name)
        wall = 1e3 * (time.perf_counter() - begun)
        found.append(
            Row(
                task="start",
                part=part,
                backend="engine" if "Engine" in part else "eager",
                median_ms=wall,
                min_cpu_ms=1e3 * (time.process_time() - cpu),
                peak_mb=float("nan"),
                baseline_ms=2000.0,
                note="baseline: the 2 s allowed",
            )
        )
    return found


def table(rows: Iterable[Row]) -> str:
    """Format rows grouped by what was done."""
    lines, last = [], None
    for row in rows:
        if (row.task, row.part) != last:
            last = (row.task, row.part)
            lines.append(f"\n{row.task}: {row.part}")
            heads = ("median ms", "min cpu ms", "peak MB", "ratio", "cpu ratio")
            lines.append(f"  {'':26s}" + "".join(f"{head:>12s}" for head in heads))
        cells = (row.median_ms, row.min_cpu_ms, row.peak_mb, row.ratio, row.cpu_ratio)
        shown = "".join(f"{'-' if math.isnan(c) else f'{c:.2f}':>12s}" for c in cells)
        lines.append(f"  {row.backend:26s}{shown}  {row.note}".rstrip())
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m bench serve")
    parser.add_argument("--model", default="focus-tiny", metavar="NAME")
    parser.add_argument("--bundle", type=Path, metavar="DIR", help="measure its parts too")
    parser.add_argument("--backends", nargs="+", default=["onnx"], metavar="NAME")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=24, help="words that decoding writes")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--gpu-model", action="store_true", help="bounds of focus_3b on H100, H200")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    rows: list[Row] = []

    def add(found: list[Row]) -> None:
        rows.extend(found)
        print(table(found), flush=True)

    if "start" in args.only:
        add(starting(args.model))
    model = Focus.from_pretrained(args.model)
    size = model.config.hierarchical.image_size
    image = sample("editing", "test", 0, 0, size).image
    assert image is not None
    if "decode" in args.only:
        add(decoding(model, image, args.tokens, args.repeats))
    if "requests" in args.only:
        models = {"eager": model, "engine": Engine(model)}
        models["engine speculate"] = Engine(model, speculate=SPECULATE)
        for backend in args.backends if args.bundle else ():
            models[backend] = load_bundle(args.bundle, backend)
        add(requests(models, image, args.repeats))
    if "session" in args.only:
        add(again(model, image, args.repeats))
        add(keeping(model, image, args.repeats))
    if "quality" in args.only:
        add(quality(model, 8))
    if args.bundle and "parts" in args.only:
        add(parts(args.bundle, model, args.backends, args.repeats))
    if args.gpu_model:
        from bench import latency

        latency.main([])
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps([plain(row) for row in rows], indent=1))
    return 0


SECTIONS = ("start", "decode", "requests", "session", "quality", "parts")


def load_bundle(bundle: Path, backend: str) -> Focus:
    """Return the model of a bundle on one of its backends."""
    from engine.serve import backends

    loaded: Focus = backends.load_model(bundle, backend=backend)
    return loaded


def plain(row: Row) -> dict[str, Any]:
    """Return a row as JSON values; figures that do not exist become null."""
    values = {**asdict(row), "ratio": row.ratio, "cpu_ratio": row.cpu_ratio}
    return {
        name: None if isinstance(value, float) and math.isnan(value) else value
        for name, value in values.items()
    }
