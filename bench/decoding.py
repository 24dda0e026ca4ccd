"""Contenders of `bench serve` for decoding: one step of the language model, several ways.

Each contender writes `num` tokens behind the same prompt and ticks at every token; what is reported
are the times between ticks. So the prompt costs nobody anything, and the least of many short times
is what a token costs while nobody else has the core.
"""

# B rows, T positions, D width

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from bench.qwen2_config import qwen2_config
from bench.timer import Timing, extra_memory
from engine.serve.decode import Decoder
from focus.api import Focus
from focus.buckets import bucket_of
from focus.generate import State, decode_picture, prefill
from focus.grammar import NOWHERE
from focus.pipeline import Session
from focus.sampling import Sampling

Tick = Callable[[], None]
Write = Callable[[int, Tick], Any]


def text_contenders(model: Focus, decoders: dict[str, Decoder], prompt: Tensor) -> dict[str, Write]:
    """Words behind a prompt [1, T, D]: recomputed, transformers' `generate`, ours."""
    theirs = transformers_twin(model)

    def naive(num: int, tick: Tick) -> list[int]:
        return recompute(model, prompt, num, tick)

    def generate(num: int, tick: Tick) -> list[int]:
        found = theirs.generate(
            inputs_embeds=prompt,
            max_new_tokens=num,
            min_new_tokens=num,
            do_sample=False,
            streamer=Streamer(tick),
        )
        return [int(token) for token in found[0]]

    def ours(decoder: Decoder) -> Write:
        def write(num: int, tick: Tick) -> list[int]:
            state = prefill(decoder.model, prompt, room=num + 2)
            stop = [model.vocabulary.pad_id]  # nobody was taught to say it
            said = decoder.text(state, stop=stop, max_tokens=num, callback=lambda *_: tick())
            return said[0].ids

        return write

    return {
        "naive recompute": naive,
        "transformers generate": generate,
        **{name: ours(decoder) for name, decoder in decoders.items()},
    }


class Streamer:
    """What transformers calls at every token."""

    def __init__(self, tick: Tick) -> None:
        self._tick = tick

    def put(self, value: Any) -> None:
        """Take note of a token."""
        self._tick()

    def end(self) -> None:
        """Nothing is left to do."""


def measure_ticks(writers: dict[str, Write], num: int, repeats: int) -> dict[str, Timing]:
    """Time between tokens; contenders take turns. Memory is that of the first turn."""
    timings = {name: Timing() for name in writers}
    for turn in range(repeats + 1):
        for name, write in writers.items():
            marks: list[tuple[float, float]] = []

            def tick(marks: list[tuple[float, float]] = marks) -> None:
                marks.append((time.perf_counter(), time.process_time()))

            if not turn:  # it also warms
                timings[name].extra_mb = extra_memory(partial(write, num, tick), "cpu")
                continue
            write(num, tick)
            for (wall, cpu), (next_wall, next_cpu) in pairwise(marks):
                timings[name].wall_ms.append(1e3 * (next_wall - wall))
                timings[name].cpu_ms.append(1e3 * (next_cpu - cpu))
    return timings


@torch.no_grad()
def recompute(model: Focus, prompt: Tensor, num: int, tick: Tick) -> list[int]:
    """Write greedily without a cache: every token reads the whole sequence again."""
    network, embeddings = model.model, prompt
    nowhere = torch.tensor([[NOWHERE]])
    written: list[int] = []
    for _ in range(num):
        hidden = network.trunk(embeddings)[:, -1]
        token = network.logits(hidden).argmax(-1)
        written.append(int(token))
        new = network.embed_tokens(token[:, None], nowhere, nowhere)
        embeddings = torch.cat([embeddings, new], 1)
        tick()
    return written


def transformers_twin(model: Focus) -> Any:
    """Return transformers' Qwen2ForCausalLM with copies of our weights."""
    from transformers import Qwen2ForCausalLM

    network = model.model
    config = qwen2_config(
        model.config.llm,
        use_sliding_window=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    theirs = Qwen2ForCausalLM(config).eval()
    weights = {f"model.{name}": tensor for name, tensor in network.trunk.state_dict().items()}
    weights["model.embed_tokens.weight"] = network.front.token_embedding.weight
    weights["lm_head.weight"] = network.heads.lm_head.weight
    theirs.load_state_dict(weights, strict=True)
    return theirs


def picture_contenders(
    model: Focus, decoders: dict[str, Decoder], session: Session, sampling: Sampling
) -> dict[str, Write]:
    """A whole picture behind a session that is ready to draw, from copies of its state."""
    bucket = bucket_of(model.config)

    def state() -> State:
        return session.state.select([0])

    def plain(num: int, tick: Tick) -> Any:
        return decode_picture(
            model.model,
            state(),
            model.vocabulary,
            [bucket],
            sampling=sampling,
            callback=lambda _: tick(),
        )

    def ours(decoder: Decoder) -> Write:
        return lambda num, tick: decoder.picture(
            state(), [bucket], sampling=sampling, callback=lambda _: tick()
        )

    return {"focus": plain, **{name: ours(decoder) for name, decoder in decoders.items()}}


def trunk_calls(decoder: Decoder, run: Callable[[], Any]) -> int:
    """Count the calls of the trunk in a run."""
    calls: list[int] = []
    handle = decoder.model.trunk.register_forward_hook(lambda *_: calls.append(1))
    run()
    handle.remove()
    return len(calls)
