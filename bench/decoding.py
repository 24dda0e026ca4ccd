"""Contenders of `bench serve` for decoding: one step of the language model, several ways.

Each contender writes `num` tokens behind the same prompt; what is reported is the time of one more
token: the time of many less the time of one, shared out. So the prompt costs nobody anything.
"""

# B rows, T positions, D width

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from engine.serve.decode import Decoder
from focus.api import Focus
from focus.buckets import bucket_of
from focus.generate import State, decode_picture, prefill
from focus.grammar import NOWHERE
from focus.pipeline import Session
from focus.sampling import Sampling

Write = Callable[[int], Any]


def text_contenders(model: Focus, decoders: dict[str, Decoder], prompt: Tensor) -> dict[str, Write]:
    """Words behind a prompt [1, T, D]: recomputed, transformers' `generate`, ours."""
    theirs = transformers_twin(model)

    def naive(num: int) -> list[int]:
        return recompute(model, prompt, num)

    def generate(num: int) -> list[int]:
        found = theirs.generate(
            inputs_embeds=prompt, max_new_tokens=num, min_new_tokens=num, do_sample=False
        )
        return [int(token) for token in found[0]]

    def ours(decoder: Decoder) -> Write:
        def write(num: int) -> list[int]:
            state = prefill(decoder.model, prompt, room=num + 2)
            stop = [model.vocabulary.pad_id]  # nobody was taught to say it
            return decoder.text(state, stop=stop, max_tokens=num)[0].ids

        return write

    return {
        "naive recompute": naive,
        "transformers generate": generate,
        **{name: ours(decoder) for name, decoder in decoders.items()},
    }


@torch.no_grad()
def recompute(model: Focus, prompt: Tensor, num: int) -> list[int]:
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
    return written


def transformers_twin(model: Focus) -> Any:
    """Return transformers' Qwen2ForCausalLM with copies of our weights."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config, network = model.config.llm, model.model
    theirs = Qwen2ForCausalLM(
        Qwen2Config(
            hidden_size=config.dim,
            intermediate_size=config.ffn_dim,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            vocab_size=config.vocab_size,
            max_position_embeddings=config.max_length,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            rms_norm_eps=config.norm_eps,
            tie_word_embeddings=config.tie_embeddings,
            use_sliding_window=False,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )
    ).eval()
    weights = {f"model.{name}": tensor for name, tensor in network.trunk.state_dict().items()}
    weights["model.embed_tokens.weight"] = network.front.token_embedding.weight
    weights["lm_head.weight"] = network.heads.lm_head.weight
    theirs.load_state_dict(weights, strict=True)
    return theirs


def picture_contenders(
    model: Focus,
    decoders: dict[str, Decoder],
    session: Session,
    sampling: Sampling,
    drafts: Sequence[Any] | None = None,
) -> dict[str, Callable[[], Any]]:
    """A whole picture behind a session that is ready to draw, from copies of its state."""
    bucket = bucket_of(model.config)

    def state() -> State:
        return session.state.select([0])

    def plain() -> Any:
        network = model.model
        return decode_picture(network, state(), model.vocabulary, [bucket], sampling=sampling)

    def ours(decoder: Decoder) -> Callable[[], Any]:
        return lambda: decoder.picture(state(), [bucket], sampling=sampling, drafts=drafts)

    return {"focus": plain, **{name: ours(decoder) for name, decoder in decoders.items()}}
