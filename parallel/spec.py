"""Which layers the trunk is made of: one place that chooses between transformer-engine and ours."""

# T positions on this rank, B batch, H heads, K key/value heads, d head width

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from focus.config import LLMConfig
from parallel import cpu
from parallel.layout import MeshError, ParallelConfig, check_layout

cpu.install()

from megatron.core.distributed import finalize_model_grads  # noqa: E402  (after cpu.install)
from megatron.core.models.gpt.gpt_layer_specs import (  # noqa: E402
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.transformer_block import (  # noqa: E402
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight in fp32; the weight carries the sequence-parallel mark."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., D]; keeps the dtype."""
        normed = F.rms_norm(x.float(), self.weight.shape, None, self.eps)
        return self.weight * normed.to(x.dtype)


class Attention(nn.Module):
    """Causal attention by PyTorch's fused kernels; keys and values are gathered over `cp` ranks.

    Sequence chunks lie on the context-parallel ranks in zigzag order: rank r of n holds chunks r
    and 2n-1-r, so that every rank has the same share of the causal triangle.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__()
        self.group = pg_collection.cp if config.context_parallel_size > 1 else None
        self.scale = softmax_scale or 1 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Attend query [T, B, H, d] over key, value [T, B, K, d] -> [T, B, H d]."""
        if attention_mask is not None or attention_bias is not None or packed_seq_params:
            raise MeshError("the trunk's attention is plainly causal: no masks, biases or packing")
        num, batch = query.shape[:2]
        mask = None
        if self.group is not None:
            size, rank = self.group.size(), self.group.rank()
            order = zigzag(num * size, size)
            back = order.reshape(-1).argsort().to(key.device)
            key = _GatherSequence.apply(key, self.group)[back]  # type: ignore[no-untyped-call]
            value = _GatherSequence.apply(value, self.group)[back]  # type: ignore[no-untyped-call]
            mask = (order[rank][:, None] >= torch.arange(num * size)[None]).to(key.device)
        attended = F.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return attended.permute(2, 0, 1, 3).reshape(num, batch, -1)


class _GatherSequence(torch.autograd.Function):
    """Concatenate over the ranks of a group along axis 0; the gradient is summed and cut back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(x) for _ in range(group.size())]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total.chunk(ctx.group.size())[ctx.group.rank()].clone(), None


def zigzag(num: int, size: int) -> Tensor:
    """Return [size, num / size]: the positions that each context-parallel rank holds."""
    chunks = torch.arange(num).view(2 * size, num // (2 * size))
    return torch.stack([torch.cat([chunks[r], chunks[2 * size - 1 - r]]) for r in range(size)])


def provider() -> str:
    """Return "te" where transformer-engine works (it needs CUDA), else "native"."""
    if not torch.cuda.is_available():
        return "native"
    try:
        import transformer_engine.pytorch  # noqa: F401
    except ImportError:
        return "native"
    return "te"


FP8_ROWS = 16  # a matrix of an fp8 product has a multiple of these rows and columns


def fp8_problem() -> str | None:
    """Say why matrices cannot be multiplied in fp8 here, or None where they can."""
    if not torch.cuda.is_available():
        return "there is no CUDA"
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) < (8, 9):
        return f"the card's compute capability is {major}.{minor}, at least 8.9 expected"
    try:
        import transformer_engine.pytorch  # noqa: F401
    except Exception as error:  # what a broken build raises is not known beforehand
        return f"transformer-engine cannot be loaded ({type(error).__name__}: {error})"
    from megatron.core.utils import get_te_version, is_te_min_version

    if not is_te_min_version("2.2.0.dev0"):
        return f"transformer-engine is {get_te_version()}, at least 2.2 expected"
    return None


def fp8_options(llm: LLMConfig, layout: ParallelConfig) -> dict[str, Any]:
    """Return megatron's fields for fp8 products of the trunk's layers; raises `MeshError`.

    e4m3 forward, e5m2 for gradients, each tensor scaled by its own maximum, so that checkpoints
    carry no history of maxima. Weights stay bf16, main weights fp32; embedding, head and attention
    stay bf16. Not run here: no machine with such a card was at hand.
    """
    problem = fp8_problem()
    if problem is not None:
        raise MeshError(
            f"precision=fp8 needs transformer-engine on a card that multiplies fp8, but {problem}; "
            "use precision=bf16"
        )
    width = (llm.num_heads + 2 * llm.num_kv_heads) * llm.head_dim // layout.tp
    sides = {"llm.dim": llm.dim, "llm.ffn_dim / tp": llm.ffn_dim // layout.tp, "qkv / tp": width}
    odd = {name: side for name, side in sides.items() if side % FP8_ROWS}
    if odd:
        raise MeshError(f"precision=fp8 needs widths that {FP8_ROWS} divides, got {odd}; use bf16")
    return {"fp8": "hybrid", "fp8_recipe": "tensorwise"}


def length_multiple(config: TransformerConfig) -> int:
    """What the number of positions is padded to a multiple of."""
    found = config.tensor_model_parallel_size if config.sequence_parallel else 1
    if config.context_parallel_size > 1:
        found *= 2 * config.context_parallel_size
    return found * FP8_ROWS if config.fp8 else found


def layer_specs(config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    """Return the layers of this rank's part of the trunk.

    Both providers store the same checkpoint keys, so a run may change machines between them.
    """
    if provider() == "te":
        layer = get_gpt_layer_with_transformer_engine_spec()
        from megatron.core.extensions.transformer_engine import TENorm

        norm: Any = TENorm
    else:
        layer = get_gpt_layer_local_spec(normalization="RMSNorm")
        parts = layer.submodules
        parts.input_layernorm = parts.pre_mlp_layernorm = norm = RMSNorm
        parts.self_attention.submodules.core_attention = Attention
    count = get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=norm)


def transformer_config(
    llm: LLMConfig, layout: ParallelConfig, *, precision: str = "fp32"
) -> TransformerConfig:
    """Return megatron's config of our trunk; raises `MeshError` with the rule that is broken."""
    check_layout(llm, layout)
    bf16 = precision != "fp32"
    dtype = torch.bfloat16 if bf16 else torch.float32
    options: dict[str, Any] = fp8_options(llm, layout) if precision == "fp8" else {}
    if layout.recompute == "full":
        options.update(
            recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1
        )
    elif layout.recompute == "selective":
        options.update(recompute_granularity="selective")
    if layout.vpp > 1:
        # With two pipeline ranks both neighbours are one rank and batched messages cross; messages
        # about shapes always are batched, so the engine makes all micro-batches one shape.
        options.update(overlap_p2p_comm=False, batch_p2p_comm=False)
    return TransformerConfig(
        num_layers=llm.num_layers,
        hidden_size=llm.dim,
        ffn_hidden_size=llm.ffn_dim,
        num_attention_heads=llm.num_heads,
        num_query_groups=llm.num_kv_heads,
        kv_channels=llm.head_dim,
        layernorm_epsilon=llm.norm_eps,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        # Not perform_initialization=False: initialising is what marks weights as split over tp.
        use_cpu_initialization=not torch.cuda.is_available(),
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        bf16=bf16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        sequence_parallel=layout.sequence_parallel,
        variable_seq_lengths=layout.pp > 1 and layout.vpp == 1,
        moe_token_dispatcher_type="alltoall",
        finalize_model_grads_func=finalize_model_grads,
        **options,
    )
