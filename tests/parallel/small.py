"""A narrow FOCUS, random batches of three tasks, and a stage with every kind of loss."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.run import Run
from engine.stages.stage import Micro, SectionStage
from focus.batch import IGNORE, Batch, Pictures, Source
from focus.config import (
    AdapterConfig,
    DiffusionConfig,
    FocusConfig,
    FusionConfig,
    HierarchicalConfig,
    LLMConfig,
    PixelConfig,
    RegionConfig,
    SegmentConfig,
    SemanticConfig,
    SimVQConfig,
    VAEConfig,
    VanillaConfig,
)
from focus.model import CONDITION_KINDS, FocusModel
from focus.segment.loss import segmentation_losses
from parallel.optimizer import freeze_rows
from parallel.sections import Handover

CONFIG = FocusConfig(
    name="small",
    vanilla=VanillaConfig(
        image_size=(28, 28), patch_size=7, depth=1, dim=32, num_heads=2, out_dim=32
    ),
    hierarchical=HierarchicalConfig(image_size=(64, 64), depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)),
    fusion=FusionConfig(dim=32, num_heads=2, scales=("res4",)),
    adapter=AdapterConfig(num_queries=4, dim=32, num_heads=2),
    semantic=SemanticConfig(
        depth=1, dim=32, num_heads=2, codebook=SimVQConfig(num_codes=16, dim=4)
    ),
    pixel=PixelConfig(
        image_size=(32, 32),
        encoder_channels=8,
        decoder_channels=8,
        multipliers=(1, 1, 2, 2),
        num_blocks=1,
        attention_levels=(3,),
        norm_groups=4,
        codebook=SimVQConfig(num_codes=64, dim=4),
    ),
    llm=LLMConfig(
        num_layers=4,
        dim=48,
        num_heads=4,
        num_kv_heads=2,
        head_dim=12,
        ffn_dim=96,
        vocab_size=256,
        rope_theta=1e4,
        max_length=128,
        visual_position=True,
    ),
    segment=SegmentConfig(
        dim=32,
        num_queries=4,
        num_heads=2,
        encoder_layers=1,
        encoder_ffn_dim=32,
        decoder_layers=1,
        decoder_ffn_dim=32,
        num_points=64,
    ),
    region=RegionConfig(num_points=16, hierarchical_scale="res3", position=True),
    diffusion=DiffusionConfig(
        channels=(16, 32),
        layers_per_block=1,
        transformer_depth=(0, 1),
        head_dim=8,
        context_dim=16,
        norm_groups=4,
        upscale=1,
        vae=VAEConfig(channels=(8, 16, 16), layers_per_block=1, norm_groups=4, scaling_factor=1.0),
        num_sizes=1,
    ),
)
SEMANTIC, PIXEL = slice(160, 176), slice(176, 240)  # token ids of the two codebooks

TEXT_ROWS = 150  # of the token table, which stage 2 leaves alone

# Learning parts and rates of the stages of Table 6; large, so that twenty steps move every loss.
RATES: dict[int, dict[str, float]] = {
    2: {
        "front.adapter.*": 1e-3,
        "front.fusion.project.*": 1e-3,
        "front.pixel_project.*": 1e-3,
        "front.mask_queries": 1e-3,
        "front.token_embedding.weight": 1e-3,
    },
    3: {
        "trunk.*": 5e-4,
        "front.token_embedding.weight": 5e-4,
        "front.vanilla.*": 2e-4,
        "front.hierarchical.*": 2e-4,
        "front.adapter.*": 5e-4,
        "front.fusion.*": 5e-4,
        "front.region_pooler.*": 5e-4,
        "front.mask_queries": 5e-4,
        "front.*position.*": 5e-4,
        "heads.segment.*": 1e-3,
    },
    4: {
        "trunk.*": 5e-4,
        "front.token_embedding.weight": 5e-4,
        "heads.segment.*": 2e-4,
        "heads.diffusion.vae.*": 0.0,
        "heads.diffusion.*": 2e-4,
    },
}

# Two micro-batches of two tasks each step, twice; two data ranks take half of each pair.
_EDITING, _REGION, _TEXT = ("editing", 1), ("interactive", 1), ("vqa", 3)
TASKS: dict[int, tuple[tuple[str, int], ...]] = {
    2: (_EDITING, _EDITING, _TEXT, _TEXT),
    3: (_EDITING, _EDITING, _REGION, _REGION),
    4: (_EDITING, _EDITING, _TEXT, _TEXT),
}


def small_run(stage: int, **changes: Any) -> Run:
    base: dict[str, Any] = {
        "name": f"small{stage}",
        "stage": "small",
        "model": "small",
        "steps": 20,
        "rates": RATES[stage],
        "micro_batches": TASKS[stage],
        "warmup": 2,
        "workers": 0,
        "panel_every": 0,
        "extra": {"stage": stage},
    }
    return Run(**{**base, **changes})


class SmallStage(SectionStage):
    """Language, expected-code, segmentation and, in stage 4, diffusion losses."""

    def __init__(self, stage: int = 3, bad: tuple[int, int] | None = None) -> None:
        self.stage = stage
        self.bad = bad  # (step, rank of the world) whose loss is NaN

    def build(self, run: Run) -> nn.Module:
        config = CONFIG
        if not run.extra.get("tied", True):
            config = dataclasses.replace(
                CONFIG, llm=dataclasses.replace(CONFIG.llm, tie_embeddings=False)
            )
        model = FocusModel(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "gate" in name or name.endswith("mask_projection.weight"):
                    parameter.fill_(0.3)  # zero at birth, which would hide what lies behind
        if self.stage == 2:
            freeze_rows(model.front.token_embedding.weight, TEXT_ROWS)
        return model

    def batches(self, run: Run, step: int, micro: Micro) -> Batch:
        draw = torch.Generator().manual_seed(micro.seed(run, step))
        return random_batch(micro.task, micro.size, draw)

    def prepare(self, front: Any, batch: Batch, step: int) -> tuple[Batch, dict[str, Tensor]]:
        if batch.target is None:
            return batch, {}
        codes = front.tokenize(batch.target)
        ids, labels = batch.input_ids.clone(), batch.labels.clone()
        where = batch.grid[..., 0] == 1
        ids[where] = codes.pixel.flatten() + PIXEL.start
        labels[:, :-1] = torch.where(where[:, 1:], ids[:, 1:], labels[:, :-1])
        table = torch.arange(PIXEL.stop - PIXEL.start)
        return dataclasses.replace(batch, input_ids=ids, labels=labels), {
            "merged": front.tokenizer.embed(codes),
            "vectors": front.tokenizer.pixel_codes.lookup(table),
        }

    def head_losses(self, heads: Any, state: Handover, step: int) -> dict[str, Tensor]:
        batch = state.batch
        terms = {"words": state.language.loss(state.hidden, batch.labels)}
        if batch.target is not None:
            where = (batch.labels >= PIXEL.start) & (batch.labels < PIXEL.stop)
            index = batch.labels[where] - PIXEL.start
            terms["code"] = state.language.code_loss(
                state.hidden[where], index, PIXEL, state.extras["vectors"]
            )
        if self.stage == 2 or batch.task not in CONDITION_KINDS:
            return self._spoil(terms, step)
        assert state.maps is not None
        prediction = heads.predict_masks(state.hidden, batch, state.maps)
        assert batch.masks is not None
        assert batch.mask_labels is not None
        assert batch.num_conditions is not None
        terms.update(
            segmentation_losses(
                prediction,
                batch.masks,
                batch.mask_labels,
                batch.num_conditions,
                CONDITION_KINDS[batch.task],
                num_points=64,
            )
        )
        if self.stage == 4 and batch.target is not None:
            mask = F.interpolate(prediction.masks[:, :1].sigmoid(), (32, 32), mode="bilinear")
            terms["epsilon"] = heads.diffusion.loss(
                state.extras["merged"], batch.target.pixel, mask
            )
        return self._spoil({f"{batch.task}/{n}": t for n, t in terms.items()}, step)

    def _spoil(self, terms: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        import torch.distributed as dist

        if self.bad == (step, dist.get_rank()):
            name = next(iter(terms))
            terms[name] = terms[name] * float("nan")
        return terms


def random_batch(task: str, size: int, draw: torch.Generator) -> Batch:
    """Text, picture tokens, adapter, text with candidates, mask queries, picture out."""
    text = [int(Source.TOKEN)]
    source = text * 5
    if task != "vqa":
        source += [Source.SEMANTIC] * 4 + [Source.PIXEL] * 16 + [Source.ADAPTER] * 4
    conditions_at = len(source)
    source += text * 4
    if task == "interactive":
        source[conditions_at] = source[conditions_at + 2] = Source.REGION
    if task != "vqa":
        source += [Source.MASK_QUERY] * 4
    out_at = len(source)
    source += text * (16 + 2 if task == "editing" else 3)
    length = len(source)
    ids = torch.randint(0, 160, (size, length), generator=draw)
    labels = torch.full((size, length), IGNORE)
    labels[:, out_at:-1] = ids[:, out_at + 1 :]
    grid = torch.full((size, length, 3), -1, dtype=torch.int16)
    if task == "editing":
        cells = torch.arange(16)
        grid[:, out_at + 1 : out_at + 17, 0] = 1
        grid[:, out_at + 1 : out_at + 17, 1] = (cells // 4).to(torch.int16)
        grid[:, out_at + 1 : out_at + 17, 2] = (cells % 4).to(torch.int16)
    condition = torch.full((size, length), -1, dtype=torch.int16)
    condition[:, conditions_at : conditions_at + 2] = 0
    condition[:, conditions_at + 2 : conditions_at + 4] = 1
    common = Batch(
        task=task,
        input_ids=ids,
        labels=labels,
        source=torch.tensor([int(s) for s in source], dtype=torch.uint8).expand(size, -1).clone(),
        grid=grid,
        condition=condition,
        lengths=torch.full((size,), length),
    )
    if task == "vqa":
        return common
    masks = torch.rand(size, 2, 64, 64, generator=draw) > 0.6
    return dataclasses.replace(
        common,
        pictures=random_pictures(size, draw),
        region_points=(
            torch.rand(size, 2, 16, 2, generator=draw) if task == "interactive" else None
        ),
        num_regions=torch.full((size,), 2) if task == "interactive" else None,
        masks=masks,
        mask_labels=torch.tensor([[0, 1]]).expand(size, -1).clone(),
        num_conditions=torch.full((size,), 2),
        target=random_pictures(size, draw) if task == "editing" else None,
        edit_mask=masks[:, 0] if task == "editing" else None,
    )


def random_pictures(size: int, draw: torch.Generator) -> Pictures:
    return Pictures(
        vanilla=torch.rand(size, 3, 28, 28, generator=draw),
        hierarchical=torch.rand(size, 3, 64, 64, generator=draw),
        pixel=torch.rand(size, 3, 32, 32, generator=draw),
    )
