"""Segmentation predictor: language-model states become masks, scores and track embeddings (eq. 5).

The pixel decoder (multi-scale deformable attention) and the masked-attention decoder are
transformers' Mask2Former; what the queries start from and what the scores compare with is FOCUS's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from transformers import Mask2FormerConfig
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerMaskedAttentionDecoder,
    Mask2FormerPixelDecoder,
    Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention,
    Mask2FormerSinePositionEmbedding,
)

from focus.config import HierarchicalConfig, SegmentConfig
from focus.regions import NUM_FREQUENCIES, fourier

# B batch, N mask queries, K candidates, C channels, h w grid at stride 4, D dim of the decoder

Kind = Literal["class", "text", "region"]
KINDS: tuple[Kind, ...] = ("class", "text", "region")
# A module called "class" would break torch.export, which writes Python attribute names.
MODULE_NAMES: dict[Kind, str] = {"class": "classes", "text": "texts", "region": "regions"}
NUM_LEVELS = 3  # the masked decoder reads strides 32, 16 and 8 in turn


class SegmentError(ValueError):
    """Inputs that the predictor, its losses or its decoding rules cannot take."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What eq. 5 predicts for every query: (m_j, z_j, e_j).

    masks: [B, N, h, w] logits at stride 4. scores: [B, N, K] raw dot products, for kind "class"
    [B, N, K + 1] with the background last. embeddings: [B, N, D] for tracking. auxiliary: the same
    (masks, scores) from the undecoded queries and from every layer but the last.
    """

    masks: Tensor
    scores: Tensor
    embeddings: Tensor
    auxiliary: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class Place(nn.Module):
    """P(f) + W_2 gelu(W_1 fourier(cell)): mask features that know their place; W_2 starts at 0."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.inner = nn.Linear(4 * NUM_FREQUENCIES, dim)
        self.outer = nn.Linear(dim, dim)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Add its place to every cell of [B, dim, h, w]."""
        height, width = features.shape[-2:]
        y = (torch.arange(height, device=features.device) + 0.5) / height
        x = (torch.arange(width, device=features.device) + 0.5) / width
        cells = torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=-1)
        told = self.outer(F.gelu(self.inner(fourier(cells).to(self.inner.weight.dtype))))
        moved: Tensor = features + told.permute(2, 0, 1).to(features.dtype)
        return moved


class SegmentationPredictor(nn.Module):
    """Masks, scores and embeddings of N queries against K candidates.

        q_j = Linear(E_Q)_j,  m_j = MLP(q_j) . P(f),  z_jk = MLP_kind(q_j) . Linear_kind(E_P)_k,
        e_j = MLP(q_j)                                                                      (eq. 5)

    with q_j after the masked decoder and P the pixel decoder. Scores are raw dot products: no
    temperature, no square root of the dimension. Each kind of candidate has its own projections.
    The background candidate of kind "class" is a learned vector (the paper's z_j has no null class;
    without one, queries cannot stay silent).
    """

    def __init__(
        self, config: SegmentConfig, hierarchical: HierarchicalConfig, llm_dim: int
    ) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        settings = _settings(config)
        self.pixel_decoder = Mask2FormerPixelDecoder(settings, list(hierarchical.dims))
        self.decoder = Mask2FormerMaskedAttentionDecoder(settings)
        self.position = Mask2FormerSinePositionEmbedding(dim // 2, normalize=True)
        self.level_embedding = nn.Embedding(NUM_LEVELS, dim)
        self.query_content = nn.Linear(llm_dim, dim)
        self.query_position = nn.Embedding(config.num_queries, dim)
        names = MODULE_NAMES.values()
        self.condition = nn.ModuleDict({name: nn.Linear(llm_dim, dim) for name in names})
        self.score = nn.ModuleDict({name: _mlp(dim, 2) for name in names})
        self.background = nn.Parameter(torch.empty(dim))
        self.embedding = _mlp(dim, 3)
        self.place = Place(dim) if config.place else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise what transformers leaves to its model class, as Mask2Former does."""
        nn.init.normal_(self.background, std=self.config.dim**-0.5)
        nn.init.normal_(self.pixel_decoder.level_embed)
        for part in (self.pixel_decoder.encoder, self.decoder.layers):
            for parameter in part.parameters():
                if parameter.dim() > 1:
                    nn.init.xavier_uniform_(parameter)
        for layer in self.decoder.layers:
            nn.init.zeros_(layer.cross_attn.in_proj_bias)
        for module in self.pixel_decoder.modules():
            if isinstance(module, Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention):
                _reset_deformable(module)

    def forward(
        self,
        features: Sequence[Tensor],
        mask_states: Tensor,
        condition_states: Tensor,
        kind: Kind,
    ) -> Prediction:
        """Predict one mask, one row of scores and one embedding per query.

        features: res2..res5, [B, C_i, H / s, W / s]. mask_states: [B, N, llm_dim], hidden states at
        the mask-token positions. condition_states: [B, K, llm_dim], pooled hidden states of the
        candidates. Differentiable in all of them. The pixel decoder runs in at least fp32, outside
        autocast and whatever its weights (deformable sampling in half precision loses too much, and
        overflows at the paper's size on a CPU).
        Raises `SegmentError` on a wrong number of scales or queries or an unknown kind.
        """
        self._check(features, mask_states, condition_states, kind)
        masks, states = self.decode(features, mask_states)
        scores = self.scores(states, condition_states, kind)
        predictions = list(zip(masks, scores, strict=True))
        return Prediction(
            masks=predictions[-1][0],
            scores=predictions[-1][1],
            embeddings=self.embedding(states[-1]),
            auxiliary=predictions[:-1],
        )

    def decode(
        self, features: Sequence[Tensor], mask_states: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return mask logits [B, N, h, w] and query states [B, N, D] of every prediction set."""
        mask_features, levels = self._decode_pixels(features)
        if self.place is not None:
            mask_features = self.place(mask_features)
        batch = mask_states.shape[0]
        memory, positions = self._memory(levels)
        queries = self.query_content(mask_states).transpose(0, 1)
        query_positions = self.query_position.weight[:, None].expand(-1, batch, -1)
        decoded = self.decoder(
            inputs_embeds=queries,
            multi_stage_positional_embeddings=positions,
            pixel_embeddings=mask_features,
            encoder_hidden_states=memory,
            query_position_embeddings=query_positions,
            feature_size_list=[level.shape[-2:] for level in levels],
            output_hidden_states=False,
            output_attentions=False,
            return_dict=True,
        )
        states = [state.transpose(0, 1) for state in decoded.intermediate_hidden_states]
        return list(decoded.masks_queries_logits), states

    def scores(
        self, states: Sequence[Tensor], condition_states: Tensor, kind: Kind
    ) -> list[Tensor]:
        """Score the queries of each set against the candidates: [B, N, K] (class: K + 1)."""
        candidates = self._candidates(condition_states, kind)
        score = self.score[MODULE_NAMES[kind]]
        return [score(state) @ candidates.transpose(1, 2) for state in states]

    def _decode_pixels(self, features: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        dtype = self.pixel_decoder.level_embed.dtype
        wide = torch.promote_types(dtype, torch.float32)
        arguments = {
            "output_attentions": False,
            "output_hidden_states": False,
            "return_dict": True,
        }
        with torch.autocast(features[0].device.type, enabled=False):
            given = [feature.to(wide) for feature in features]
            if dtype == wide:
                pixels = self.pixel_decoder(given, **arguments)
            else:
                state = (
                    *self.pixel_decoder.named_parameters(),
                    *self.pixel_decoder.named_buffers(),
                )
                widened = {n: t.to(wide) if t.is_floating_point() else t for n, t in state}
                pixels = functional_call(self.pixel_decoder, widened, (given,), arguments)
        levels = [level.to(dtype) for level in pixels.multi_scale_features]
        return pixels.mask_features.to(dtype), levels

    def _memory(self, levels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        memory, positions = [], []
        for level, embedding in zip(levels, self.level_embedding.weight, strict=True):
            position = self.position(level[:1].shape, level.device, level.dtype)
            positions.append(position.flatten(2).permute(2, 0, 1))
            memory.append(level.flatten(2).permute(2, 0, 1) + embedding)
        return memory, positions

    def _candidates(self, condition_states: Tensor, kind: Kind) -> Tensor:
        candidates: Tensor = self.condition[MODULE_NAMES[kind]](condition_states)
        if kind == "class":
            background = self.background.to(candidates.dtype).expand(candidates.shape[0], 1, -1)
            candidates = torch.cat([candidates, background], dim=1)
        return candidates

    def _check(
        self, features: Sequence[Tensor], mask_states: Tensor, conditions: Tensor, kind: Kind
    ) -> None:
        if len(features) != 4:
            raise SegmentError(
                f"four feature maps (res2 to res5) expected, got {len(features)}; "
                "pass the hierarchical encoder's output unchanged"
            )
        if mask_states.dim() != 3 or mask_states.shape[1] != self.config.num_queries:
            raise SegmentError(
                f"mask_states [B, {self.config.num_queries}, llm_dim] expected, got "
                f"{tuple(mask_states.shape)}; append exactly segment.num_queries mask queries"
            )
        if conditions.dim() != 3 or conditions.shape[0] != mask_states.shape[0]:
            raise SegmentError(
                f"condition_states [{mask_states.shape[0]}, K, llm_dim] expected, got "
                f"{tuple(conditions.shape)}; pool the hidden states of each candidate"
            )
        if kind not in KINDS:
            raise SegmentError(f"kind must be one of {KINDS}, got {kind!r}")


def _mlp(dim: int, num_layers: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for index in range(num_layers):
        layers.append(nn.Linear(dim, dim))
        if index < num_layers - 1:
            layers.append(nn.ReLU())
    return nn.Sequential(*layers)


def _settings(config: SegmentConfig) -> Mask2FormerConfig:
    """Transformers' config; its `decoder_layers` counts prediction sets, one more than layers."""
    return Mask2FormerConfig(
        feature_size=config.dim,
        mask_feature_size=config.dim,
        hidden_dim=config.dim,
        num_queries=config.num_queries,
        num_attention_heads=config.num_heads,
        encoder_layers=config.encoder_layers,
        encoder_feedforward_dim=config.encoder_ffn_dim,
        decoder_layers=config.decoder_layers + 1,
        dim_feedforward=config.decoder_ffn_dim,
        dropout=0.0,
    )


def _reset_deformable(module: Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention) -> None:
    """Start the sampling offsets as a star around the reference point, one ray per head."""
    angles = torch.arange(module.n_heads).float() * (2.0 * math.pi / module.n_heads)
    rays = torch.stack([angles.cos(), angles.sin()], dim=-1)
    rays = rays / rays.abs().amax(dim=-1, keepdim=True)
    steps = torch.arange(1, module.n_points + 1).float()
    offsets = rays[:, None, None, :] * steps[None, None, :, None]
    offsets = offsets.expand(-1, module.n_levels, -1, -1)
    with torch.no_grad():
        module.sampling_offsets.bias.copy_(offsets.reshape(-1))
        nn.init.zeros_(module.sampling_offsets.weight)
        for layer in (module.attention_weights, module.value_proj, module.output_proj):
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(module.attention_weights.weight)
