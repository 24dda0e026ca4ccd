"""FOCUS in three sections that every runner can cut: front, trunk, heads.

front   pictures, prompts, regions -> input embeddings and multi-scale features
trunk   embeddings -> final-normed hidden states (the language model)
heads   hidden states, features -> logits, masks, pictures

Single-device training, pipeline stages, export and serving all reuse these three unchanged; the
interfaces between them are plain tensors.
"""

# B batch, T sequence, D LLM width, S semantic tokens, R regions, N mask queries, K candidates

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from focus.adapter import GatedAdapter
from focus.batch import Batch, Pictures, Source, move
from focus.config import FocusConfig
from focus.diffusion.decoder import DiffusionDecoder
from focus.llm import Qwen2Trunk
from focus.packing import run_packed
from focus.regions import RegionPooler
from focus.segment.predictor import Prediction, SegmentationPredictor
from focus.tokenizer.dual import Codes, DualTokenizer
from focus.vision.block import output_norm
from focus.vision.encoder import HierarchicalEncoder, VanillaEncoder
from focus.vision.fusion import Fused, Fusion
from focus.vision.pyramid import VanillaPyramid

MAX_GRID = 64  # rows or columns of the largest bucket's pixel grid (256 x 1024)

ConditionKind = Literal["class", "text", "region"]
CONDITION_KINDS: dict[str, ConditionKind] = {
    "class": "class",
    "referring": "text",
    "reasoning": "text",
    "editing": "text",
    "interactive": "region",
}


@dataclass(frozen=True, kw_only=True)
class Features:
    """What the front computes from a picture, once; several requests may share it."""

    maps: Sequence[Tensor]  # res2..res5, [B, C, H / stride, W / stride]
    low: Tensor  # X'_L, vanilla tokens [B, S, out_dim] (eq. 1)
    fused: Fused  # E'_img and E_img (eq. 2)
    pixel: Tensor  # X_T, continuous pixel features [B, d, h, w]
    adapter: Tensor  # h_Adapter [B, Nq, D] (eq. 4)
    grid: tuple[int, int] | None = None  # of the S semantic tokens; None: the config's


class VisualPosition(nn.Module):
    """Learned (row, column) embedding of visual tokens, see `LLMConfig.visual_position`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.row = nn.Parameter(torch.randn(2, MAX_GRID, dim) * 0.05)
        self.column = nn.Parameter(torch.randn(2, MAX_GRID, dim) * 0.05)

    def forward(self, grid: Tensor) -> Tensor:
        """Embed grid cells [B, T, 3] (level, row, column); zero where the level is -1."""
        cell = grid.long()
        level, row, column = cell.clamp(min=0).unbind(-1)
        embedded = self.row[level, row] + self.column[level, column]
        return embedded * (cell[..., :1] >= 0)


class Front(nn.Module):
    """Section 1: pictures, prompts and regions to input embeddings."""

    def __init__(self, config: FocusConfig) -> None:
        super().__init__()
        dim = config.llm.dim
        self.config = config
        self.vanilla = VanillaEncoder(config.vanilla)
        self.hierarchical: nn.Module = (
            HierarchicalEncoder(config.hierarchical)
            if config.hierarchical.source == "convnext"
            else VanillaPyramid(config.hierarchical, config.vanilla.out_dim)
        )
        self.fusion = Fusion(
            config.fusion, config.vanilla, config.hierarchical, dim, config.llm.visual_gain
        )
        self.tokenizer = DualTokenizer(config)
        self.adapter = (
            GatedAdapter(config.adapter, config.hierarchical, dim, config.llm.visual_gain)
            if config.adapter.num_queries
            else None
        )
        self.pixel_project = nn.Sequential(
            nn.Linear(config.pixel.codebook.dim, dim),
            nn.GELU(),
            nn.Linear(dim, dim),
            output_norm(dim, config.llm.visual_gain),
        )
        self.semantic_project: nn.Module | None = None
        if config.inputs == "quantised":
            self.semantic_project = nn.Sequential(
                nn.Linear(config.semantic.codebook.dim, dim),
                nn.GELU(),
                nn.Linear(dim, dim),
                output_norm(dim, config.llm.visual_gain),
            )
        self.region_pooler = RegionPooler(config.region, config.hierarchical, dim)
        self.token_embedding = nn.Embedding(config.llm.vocab_size, dim)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        self.mask_queries = nn.Parameter(torch.randn(config.segment.num_queries, dim) * 0.02)
        self.position = VisualPosition(dim) if config.llm.visual_position else None
        self.next_position = VisualPosition(dim) if config.llm.visual_position else None

    def encode(self, pictures: Pictures) -> Features:
        """Run both encoders, the fusion (eq. 1-2), the pixel encoder and the adapter (eq. 3-4)."""
        pictures = self._fit(pictures)
        low = self.vanilla(pictures.vanilla)
        grid = self.grid_of(pictures)
        maps = self.maps_of(pictures, low)
        fused = self.fusion(low, maps, grid)
        pixel = self.tokenizer.pixel_encoder(pictures.pixel)
        if self.semantic_project is not None:
            fused, pixel = self._quantise(fused, pixel, grid)
        none = low.new_zeros(low.shape[0], 0, self.config.llm.dim)
        adapter = none if self.adapter is None else self.adapter(maps)
        return Features(maps=maps, low=low, fused=fused, pixel=pixel, adapter=adapter, grid=grid)

    def _fit(self, pictures: Pictures) -> Pictures:
        """Bring pictures to the precision of the weights."""
        dtype = self.mask_queries.dtype
        if pictures.pixel.dtype == dtype:
            return pictures
        return move(pictures, pictures.pixel.device, dtype)

    def maps_of(self, pictures: Pictures, low: Tensor) -> Sequence[Tensor]:
        """Four scales of pictures: of X_H, or without hierarchical encoder of X'_L."""
        if isinstance(self.hierarchical, VanillaPyramid):
            found: Sequence[Tensor] = self.hierarchical(low, self.grid_of(pictures))
        else:
            found = self.hierarchical(pictures.hierarchical)
        return found

    @torch.no_grad()
    def _codes(self, fused: Fused, pixel: Tensor, grid: tuple[int, int]) -> Codes:
        return self.tokenizer.encode(fused.e_prime, pixel, grid)

    def _quantise(self, fused: Fused, pixel: Tensor, grid: tuple[int, int]) -> tuple[Fused, Tensor]:
        """Put the vectors of the codes in place of the continuous features."""
        assert self.semantic_project is not None
        codes = self._codes(fused, pixel, grid)
        semantic = self.tokenizer.semantic_codes.lookup(codes.semantic).flatten(1, 2)
        projected = self.semantic_project(semantic.to(fused.projected.dtype))
        vectors = self.tokenizer.pixel_codes.lookup(codes.pixel).permute(0, 3, 1, 2)
        return fused._replace(projected=projected), vectors.to(pixel.dtype)

    def grid_of(self, pictures: Pictures) -> tuple[int, int]:
        """Rows and columns of semantic tokens of pictures, which may be of any bucket."""
        height, width = pictures.vanilla.shape[-2:]
        stride = self.config.vanilla.stride
        return height // stride, width // stride

    @torch.no_grad()
    def tokenize(self, pictures: Pictures) -> Codes:
        """Return the discrete semantic and pixel codes of pictures (frozen stage-1 tokenizer)."""
        pictures = self._fit(pictures)
        grid = self.grid_of(pictures)
        low = self.vanilla(pictures.vanilla)
        fused = self.fusion(low, self.maps_of(pictures, low), grid)
        pixel = self.tokenizer.pixel_encoder(pictures.pixel)
        return self.tokenizer.encode(fused.e_prime, pixel, grid)

    def embed_tokens(self, input_ids: Tensor, grid: Tensor, next_grid: Tensor) -> Tensor:
        """Embed ids [B, T] with the cells they lie in and the cells they are about to write."""
        embedded: Tensor = self.token_embedding(input_ids)
        return embedded + self._embed_cells(grid, next_grid)

    def embed(self, batch: Batch, features: Features | None) -> Tensor:
        """Return the input embeddings [B, T, D] of a batch."""
        next_grid = F.pad(batch.grid[:, 1:], (0, 0, 0, 1), value=-1)
        embedded = self.token_embedding(batch.input_ids)
        for source, values in self.sources(batch, features):
            embedded = place(embedded, batch.source == source, values)
        placed: Tensor = embedded + self._embed_cells(batch.grid, next_grid)
        return placed

    def sources(self, batch: Batch, features: Features | None) -> list[tuple[Source, Tensor]]:
        """Return, for every source but the token table, its vectors [B, n, D] in reading order."""
        queries = self.mask_queries.expand(batch.input_ids.shape[0], -1, -1)
        found = [(Source.MASK_QUERY, queries)]
        if features is not None:
            pixel = features.pixel.flatten(2).transpose(1, 2)
            found += [
                (Source.SEMANTIC, features.fused.projected),
                (Source.PIXEL, self.pixel_project(pixel)),
            ]
            if self.adapter is not None:
                found.append((Source.ADAPTER, features.adapter))
            if batch.region_vectors is not None:
                found.append((Source.REGION, batch.region_vectors))
            elif batch.region_points is not None:
                found.append((Source.REGION, self.pool_regions(features, batch.region_points)))
        return found

    def pool_regions(self, features: Features, points: Tensor) -> Tensor:
        """Pool one vector per region from sampled points [B, R, P, 2] -> [B, R, D]."""
        projected = features.fused.projected
        grid = features.grid or self.config.vanilla.grid
        image_map = projected.transpose(1, 2).reshape(len(projected), -1, *grid)
        pooled: Tensor = self.region_pooler(image_map, features.maps, points)
        return pooled

    def _embed_cells(self, grid: Tensor, next_grid: Tensor) -> Tensor | float:
        if self.position is None or self.next_position is None:
            return 0.0
        cells: Tensor = self.position(grid) + self.next_position(next_grid)
        return cells


class Heads(nn.Module):
    """Section 3: language-model head, segmentation predictor (eq. 5), diffusion decoder (eq. 6)."""

    def __init__(self, config: FocusConfig) -> None:
        super().__init__()
        self.config = config
        self.lm_head = nn.Linear(config.llm.dim, config.llm.vocab_size, bias=False)
        self.segment = SegmentationPredictor(config.segment, config.hierarchical, config.llm.dim)
        self.diffusion = DiffusionDecoder(
            config.diffusion, config.code_channels, llm_dim=config.llm.dim
        )

    def logits(self, hidden: Tensor, ids: slice | None = None) -> Tensor:
        """Return logits over the whole vocabulary, or only over the rows of `ids`."""
        return F.linear(hidden, self.lm_head.weight if ids is None else self.lm_head.weight[ids])

    def predict_masks(self, hidden: Tensor, batch: Batch, maps: Sequence[Tensor]) -> Prediction:
        """Predict masks, scores and embeddings (eq. 5) from the hidden states of a sequence."""
        if batch.num_conditions is None:
            raise ValueError("predict_masks expects a batch with num_conditions, got None")
        num_conditions = int(batch.num_conditions.max())
        prediction: Prediction = self.segment(
            maps,
            gather(hidden, batch.source == Source.MASK_QUERY, self.config.segment.num_queries),
            pool_conditions(hidden, batch.condition, num_conditions),
            CONDITION_KINDS[batch.task],
        )
        return prediction


class FocusModel(nn.Module):
    """The whole network; `focus.Focus` wraps it with vocabulary, prompts and decoding."""

    def __init__(self, config: FocusConfig) -> None:
        super().__init__()
        self.config = config
        self.front = Front(config)
        self.trunk = Qwen2Trunk(config.llm)
        self.heads = Heads(config)
        if config.llm.tie_embeddings:
            self.heads.lm_head.weight = self.front.token_embedding.weight

    def forward(self, batch: Batch) -> tuple[Tensor, Features | None]:
        """Return the final hidden states [B, T, D] and the picture features they came from."""
        features = None if batch.pictures is None else self.front.encode(batch.pictures)
        embeddings = self.front.embed(batch, features)
        if batch.places is not None:
            return run_packed(self.trunk, embeddings, batch.places, batch.lengths), features
        return self.trunk(embeddings, lengths=batch.lengths), features

    def embed_tokens(self, input_ids: Tensor, grid: Tensor, next_grid: Tensor) -> Tensor:
        """See `Front.embed_tokens`."""
        return self.front.embed_tokens(input_ids, grid, next_grid)

    def logits(self, hidden: Tensor, ids: slice | None = None) -> Tensor:
        """See `Heads.logits`."""
        return self.heads.logits(hidden, ids)


def place(embedded: Tensor, where: Tensor, values: Tensor) -> Tensor:
    """Put the i-th of `values` [B, n, D] at each row's i-th True position of `where` [B, T]."""
    order = (where.long().cumsum(1) - 1).clamp(0, values.shape[1] - 1)
    spread = values.gather(1, order[..., None].expand(-1, -1, values.shape[2]))
    return torch.where(where[..., None], spread.to(embedded.dtype), embedded)


def gather(hidden: Tensor, where: Tensor, count: int) -> Tensor:
    """Collect the states of the `count` True positions of each row: [B, T, D] -> [B, count, D]."""
    position = where.int().argsort(dim=1, descending=True, stable=True)[:, :count]
    return hidden.gather(1, position[..., None].expand(-1, -1, hidden.shape[2]))


def pool_conditions(hidden: Tensor, condition: Tensor, num_conditions: int) -> Tensor:
    """Average the states of each candidate's tokens (E_P): [B, T, D] -> [B, K, D]."""
    number = torch.arange(num_conditions, device=hidden.device)
    member = (condition[:, None, :] == number[:, None]).to(hidden.dtype)  # [B, K, T]
    return member @ hidden / member.sum(-1, keepdim=True).clamp(min=1)
