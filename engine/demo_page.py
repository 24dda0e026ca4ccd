"""The page that `focus demo` writes: one HTML file with everything in it, light and dark."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib import resources
from typing import Any, Literal

from PIL import Image

Verdict = Literal["good", "fair", "poor"]


@dataclass(frozen=True, kw_only=True)
class Shot:
    """One picture of an example; several frames make it move."""

    caption: str
    frames: tuple[Image.Image, ...]
    milliseconds: int = 160


@dataclass(frozen=True, kw_only=True)
class Example:
    """One request to the model: what was asked, what came back, what is true."""

    task: str
    kind: str
    instruction: str
    shots: tuple[Shot, ...]
    badge: str = ""
    verdict: Verdict = "good"
    words: tuple[tuple[str, str], ...] = ()
    seconds: float = 0.0
    figures: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Section:
    """The examples of one task under one heading."""

    name: str
    title: str
    told: str
    examples: tuple[Example, ...]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The losses of a few training steps of one stage."""

    name: str
    told: str
    losses: tuple[float, ...]
    samples_per_second: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured number on seen and unseen kinds of objects; `goal` is what we aim at."""

    name: str
    told: str
    values: Mapping[str, float]
    goals: Mapping[str, float]
    top: float = 1.0  # the value that fills the bar
    unit: str = ""


def render(
    *,
    facts: Sequence[tuple[str, str]],
    figures: Sequence[Figure],
    sections: Sequence[Section],
    curves: Sequence[Curve],
) -> str:
    """Return the whole page as HTML."""
    links = [(section.name, section.name.capitalize()) for section in sections]
    if figures:
        links.insert(0, ("figures", "Measured"))
    if curves:
        links.append(("training", "Training"))
    body = [_head(facts, links)]
    if figures:
        body.append(_figures(figures))
    body += [_section(section) for section in sections]
    if curves:
        body.append(_curves(curves))
    page = resources.files("engine").joinpath("demo_page.html").read_text(encoding="utf-8")
    return page.replace("{{body}}", "\n".join(body))


def data_uri(frames: Sequence[Image.Image], milliseconds: int = 160) -> str:
    """Return a PNG, animated when there are several frames, as a data URI."""
    buffer = io.BytesIO()
    first, *rest = (frame.convert("RGB") for frame in frames)
    if rest:
        first.save(buffer, "PNG", save_all=True, append_images=rest, duration=milliseconds, loop=0)
    else:
        first.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _head(facts: Sequence[tuple[str, str]], links: Sequence[tuple[str, str]]) -> str:
    chips = "".join(
        f"<li><span>{escape(name)}</span> {escape(value)}</li>" for name, value in facts
    )
    nav = "".join(f'<a href="#{escape(name)}">{escape(title)}</a>' for name, title in links)
    return f"""<header>
<p class="mark">FOCUS</p>
<h1>See what you mean.<br>Change what you see.</h1>
<p class="lead">One model reads a picture, finds what you name or point at, answers questions about
it, draws, and edits exactly what it found. Every scene below holds kinds of objects that it never
saw in training, and nothing was selected: these are the first scenes of the split.</p>
<ul class="chips">{chips}</ul>
<nav>{nav}<button id="theme" type="button" aria-label="light or dark">&#9680;</button></nav>
</header>"""


def _figures(figures: Sequence[Figure]) -> str:
    tiles = []
    for figure in figures:
        bars = []
        for split, value in figure.values.items():
            width = 100 * max(0.0, min(1.0, value / figure.top))
            goal = figure.goals.get(split)
            tick = "" if goal is None else f'<i style="left:{100 * goal / figure.top:.1f}%"></i>'
            number = f"{value:.1f}" if figure.unit else f"{value:.2f}"
            bars.append(
                f'<div class="bar"><span>{escape(split)}</span><div class="track">'
                f'<b style="width:{width:.1f}%"></b>{tick}</div>'
                f"<em>{number}{escape(figure.unit)}</em></div>"
            )
        tiles.append(
            f'<div class="tile"><h3>{escape(figure.name)}</h3><p>{escape(figure.told)}</p>'
            f"{''.join(bars)}</div>"
        )
    return (
        '<section id="figures"><h2>Measured</h2><p class="told">Against exact ground truth, '
        "by rules on pixels and words: no learned judge. The mark on a bar is the goal. "
        "<code>focus evaluate</code> measures more samples.</p>"
        f'<div class="tiles">{"".join(tiles)}</div></section>'
    )


def _section(section: Section) -> str:
    cards = "".join(map(_card, section.examples))
    widest = max((len(example.shots) for example in section.examples), default=1)
    return (
        f'<section id="{escape(section.name)}"><h2>{escape(section.title)}</h2>'
        f'<p class="told">{escape(section.told)}</p>'
        f'<div class="cards w{min(widest, 3)}">{cards}</div></section>'
    )


def _card(example: Example) -> str:
    shots = "".join(
        f'<figure><img src="{data_uri(shot.frames, shot.milliseconds)}" '
        f'alt="{escape(shot.caption)}" loading="lazy">'
        f"<figcaption>{escape(shot.caption)}</figcaption></figure>"
        for shot in example.shots
    )
    words = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(_shorten(value)) or '&mdash;'}</dd>"
        for name, value in example.words
    )
    badge = f'<span class="badge {example.verdict}">{escape(example.badge)}</span>'
    return (
        f'<article><div class="top">'
        f'<span class="kind">{escape(example.kind)}</span>{badge if example.badge else ""}'
        f"</div><blockquote>{escape(example.instruction)}</blockquote>"
        f'<div class="shots">{shots}</div>{f"<dl>{words}</dl>" if words else ""}'
        f'<p class="time">{example.seconds:.2f} s</p></article>'
    )


def _shorten(text: str, limit: int = 120) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _curves(curves: Sequence[Curve]) -> str:
    cards = "".join(
        f'<article><div class="top"><span class="kind">{escape(curve.name)}</span></div>'
        f"<p>{escape(curve.told)}</p>{_sparkline(curve.losses)}"
        f"<dl><dt>loss</dt><dd>{curve.losses[0]:.3f} &rarr; {curve.losses[-1]:.3f}</dd>"
        f"<dt>speed</dt><dd>{curve.samples_per_second:.1f} samples/s</dd></dl>"
        f'<p class="time">{len(curve.losses)} steps, {curve.seconds:.1f} s</p></article>'
        for curve in curves
        if curve.losses
    )
    return (
        '<section id="training"><h2>Training</h2><p class="told">A few steps of every stage, from '
        "random weights, each going on from the one before. <code>make train-tiny</code> runs them "
        f'in full.</p><div class="cards small">{cards}</div></section>'
    )


def _sparkline(losses: Sequence[float]) -> str:
    low, high = min(losses), max(losses)
    span = (high - low) or 1.0
    step = 220 / max(1, len(losses) - 1)
    points = [(10 + i * step, 10 + 50 * (high - loss) / span) for i, loss in enumerate(losses)]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in points)
    return (
        '<svg viewBox="0 0 240 70" role="img" aria-label="losses">'
        f'<polyline points="{line}"/>{dots}</svg>'
    )
