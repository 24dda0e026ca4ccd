"""The language model under megatron-core: `GPTModel` as a trunk, weights mapped to ours."""

# T positions on this rank, B batch, D width

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from focus.config import LLMConfig
from parallel import cpu
from parallel.weight_map import FOCUS, Entry, Names, entry, shard, unshard

cpu.install()

from megatron.core import parallel_state  # noqa: E402  (after cpu.install)
from megatron.core.models.gpt.gpt_model import GPTModel  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from parallel.repair import repair  # noqa: E402
from parallel.spec import layer_specs  # noqa: E402

repair()


class Trunk(GPTModel):
    """One pipeline chunk of the language model; it returns hidden states, never logits.

    The first chunk owns the token table (`embedding.word_embeddings`), the last the final norm and
    `output_layer` (a copy of the table on another rank when they are tied).
    """

    def __init__(
        self, llm: LLMConfig, config: TransformerConfig, vp_stage: int | None = None
    ) -> None:
        ends: dict[str, Any] = {} if vp_stage is None else {"ignore_virtual": False}
        if vp_stage is not None:
            ends["vp_stage"] = vp_stage
        super().__init__(
            config,
            layer_specs(config, vp_stage),
            vocab_size=llm.vocab_size,
            max_sequence_length=llm.max_length,
            pre_process=parallel_state.is_pipeline_first_stage(**ends),
            post_process=parallel_state.is_pipeline_last_stage(**ends),
            position_embedding_type="rope",
            rotary_base=int(llm.rope_theta),
            share_embeddings_and_output_weights=llm.tie_embeddings,
            scatter_embedding_sequence_parallel=False,
            vp_stage=vp_stage,
        )
        self.llm = llm

    def states(self, embeddings: Tensor | None) -> Tensor:
        """Run this chunk's layers over embeddings [T, B, D], or over what the schedule received."""
        found: Tensor = self(None, None, None, decoder_input=embeddings)
        return found

    def _postprocess(self, hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        return hidden_states

    def entries(self, names: Names = FOCUS) -> Iterator[tuple[str, nn.Parameter, Entry]]:
        """Yield (local name, parameter, what it is made of) of every parameter of this chunk."""
        for name, parameter in self.named_parameters():
            yield name, parameter, entry(self._global_name(name), self.llm, names)

    def _global_name(self, name: str) -> str:
        if not name.startswith("decoder.layers."):
            return name
        head, number, tail = name.split(".", 3)[1:]
        return f"decoder.{head}.{self.decoder.layers[int(number)].layer_number - 1}.{tail}"

    @torch.no_grad()
    def load_from(self, tensors: Mapping[str, Tensor], names: Names = FOCUS) -> None:
        """Copy this rank's share of whole weights under `names`."""
        rank = parallel_state.get_tensor_model_parallel_rank()
        size = parallel_state.get_tensor_model_parallel_world_size()
        for _, parameter, found in self.entries(names):
            parameter.copy_(shard(found, tensors, self.llm, rank, size))

    @torch.no_grad()
    def whole(self, names: Names = FOCUS) -> dict[str, Tensor]:
        """Return this chunk's weights whole, under `names`, on the CPU; all tp ranks call it."""
        group = parallel_state.get_tensor_model_parallel_group()
        found: dict[str, Tensor] = {}
        for _, parameter, made_of in self.entries(names):
            own = parameter.detach().contiguous()
            parts = [own]
            if made_of.kind != "copy" and group.size() > 1:
                parts = [torch.empty_like(own) for _ in range(group.size())]
                dist.all_gather(parts, own, group=group)
            found.update(unshard(made_of, [part.cpu() for part in parts], self.llm))
        return {name: tensor.clone() for name, tensor in found.items()}
