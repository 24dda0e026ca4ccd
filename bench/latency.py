"""What a request must cost at least on a GPU: bytes and operations per part over stated ceilings.

    python -m bench latency [--config focus_3b] [--json FILE]

    time >= max(operations / peak, bytes / bandwidth)

at batch 1 in bf16. Bytes are the weights that a part reads, and for the language model the keys
and values as well; activations are left out. The ceilings are NVIDIA's data sheet figures, the
peak dense (without sparsity): no kernel reaches them, so the column is a bound and not a forecast.
"""

# P prompt tokens, N visual tokens

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from focus import info
from focus.buckets import Bucket, bucket_of
from focus.config import FocusConfig
from focus.presets import CONFIGS

BF16 = 2  # bytes


@dataclass(frozen=True, kw_only=True)
class Card:
    """Ceilings of a GPU: dense bf16 operations and bytes per second."""

    name: str
    peak: float
    bandwidth: float


CARDS = (
    Card(name="H100", peak=989e12, bandwidth=3.35e12),  # SXM5, HBM3
    Card(name="H200", peak=989e12, bandwidth=4.8e12),
)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """One part of a request. `times`: how often a request runs it."""

    part: str
    operations: float
    bytes: float
    times: int = 1

    def bound_ms(self, card: Card) -> float:
        """Least time of all its runs."""
        once = max(self.operations / card.peak, self.bytes / card.bandwidth)
        return 1e3 * self.times * once


def costs(config: FocusConfig, bucket: Bucket | None = None, steps: int = 30) -> list[Cost]:
    """Return what an edit is made of at one bucket, guidance in one batch of two."""
    bucket = bucket or bucket_of(config)
    found = info.measure(config, bucket)
    weights = part_bytes(config)
    llm = config.llm
    block, queries = bucket.block_length + 2, config.segment.num_queries
    prompt = info.PROMPT + block + 2 + config.adapter.num_queries
    at = prompt + info.WORDS + queries + block // 2  # a token in the middle of the picture
    row = 2 * llm.num_layers * llm.num_kv_heads * llm.head_dim * BF16

    def head(rows: int) -> int:
        return rows * llm.dim * BF16

    def token(part: str, codes: int, start: int, times: int, branches: int) -> Cost:
        return Cost(
            part=part,
            operations=branches * (info.read_tokens(config, start, 1) + 2 * codes * llm.dim),
            bytes=weights["trunk"] + head(codes) + branches * start * row,
            times=times,
        )

    (rows, columns), (fine_rows, fine_columns) = bucket.grids
    semantic, pixel = config.semantic.codebook.num_codes, config.pixel.codebook.num_codes
    text = llm.vocab_size - semantic - pixel
    return [
        Cost(part="encode", operations=found.encode, bytes=weights["encode"]),
        Cost(
            part="prefill",
            operations=info.read_tokens(config, 0, prompt),
            bytes=weights["trunk"],
        ),
        token("word", text, prompt, info.WORDS, 1),
        Cost(
            part="mask queries",
            operations=info.read_tokens(config, prompt + info.WORDS, queries),
            bytes=weights["trunk"],
        ),
        Cost(part="segment", operations=found.segment, bytes=weights["segment"]),
        token("semantic token", semantic, at, rows * columns, 2),
        token("pixel token", pixel, at, fine_rows * fine_columns, 2),
        Cost(part="UNet step", operations=2 * found.unet, bytes=weights["unet"], times=steps),
        Cost(part="VAE decode", operations=found.vae, bytes=weights["vae"]),
    ]


def part_bytes(config: FocusConfig) -> dict[str, int]:
    """Bytes in bf16 that each part reads of its weights."""
    model = info.build_meta(config)

    def size(*modules: object) -> int:
        return BF16 * sum(
            parameter.numel()
            for module in modules
            for parameter in module.parameters()  # type: ignore[attr-defined]
        )

    front, heads = model.front, model.heads
    encoders = [front.vanilla, front.hierarchical, front.fusion, front.tokenizer.pixel_encoder]
    return {
        "encode": size(*encoders, *([] if front.adapter is None else [front.adapter])),
        "trunk": size(model.trunk),
        "segment": size(heads.segment),
        "unet": size(heads.diffusion.unet),
        "vae": size(heads.diffusion.vae.model) // 2,
    }


def table(config: FocusConfig, found: Sequence[Cost]) -> str:
    """Format the bounds; the last lines are the goals they bear on."""
    names = "".join(f"{card.name + ' ms':>12s}" for card in CARDS)
    lines = [f"{config.name}: least times in bf16 at batch 1, guidance as a batch of two"]
    lines += [
        f"  {card.name}: {card.peak / 1e12:.0f} TFLOP/s, {card.bandwidth / 1e12:.2f} TB/s"
        for card in CARDS
    ]
    lines.append(f"  {'part':16s}{'times':>7s}{'GFLOP':>10s}{'GB':>8s}{names}")
    for cost in found:
        times = "".join(f"{cost.bound_ms(card):12.2f}" for card in CARDS)
        lines.append(
            f"  {cost.part:16s}{cost.times:7d}{cost.operations / 1e9:10.1f}"
            f"{cost.bytes / 1e9:8.2f}{times}"
        )
    for name, parts in SUMS.items():
        sums = [sum(c.bound_ms(card) for c in found if c.part in parts) for card in CARDS]
        lines.append(f"  {name:41s}" + "".join(f"{value:12.2f}" for value in sums))
    return "\n".join(lines)


SUMS = {
    "referring request (mask)": ("encode", "prefill", "word", "mask queries", "segment"),
    "its repetition on the same picture": ("word", "mask queries", "segment"),
    "edit": (
        *("encode", "prefill", "word", "mask queries", "segment"),
        *("semantic token", "pixel token", "UNet step", "VAE decode"),
    ),
}


def main(arguments: list[str]) -> int:
    """Print the model, write it as JSON if asked to."""
    parser = argparse.ArgumentParser(prog="python -m bench latency")
    parser.add_argument("--config", default="focus_3b", choices=sorted(CONFIGS))
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(arguments)
    config = CONFIGS[args.config]()
    found = costs(config)
    print(table(config, found))
    if args.json:
        rows = [
            {**asdict(cost), **{f"{card.name}_ms": cost.bound_ms(card) for card in CARDS}}
            for cost in found
        ]
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(rows, indent=1))
    return 0
