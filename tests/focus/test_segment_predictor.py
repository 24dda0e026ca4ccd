"""The predictor against transformers' Mask2Former and eq. 5 written out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers.models.mask2former.modeling_mask2former import Mask2FormerTransformerModule

from focus.config import HierarchicalConfig, SegmentConfig
from focus.segment.loss import segmentation_losses
from focus.segment.predictor import (
    KINDS,
    MODULE_NAMES,
    Kind,
    SegmentationPredictor,
    SegmentError,
    _settings,
)

HIERARCHICAL = HierarchicalConfig(dims=(8, 12, 16, 24))
CONFIG = SegmentConfig(
    dim=32,
    num_queries=6,
    num_heads=2,
    encoder_layers=1,
    encoder_ffn_dim=32,
    decoder_layers=3,
    decoder_ffn_dim=48,
    num_points=64,
)
LLM_DIM = 20


def made(batch: int = 2) -> tuple[SegmentationPredictor, list[Tensor], Tensor, Tensor]:
    torch.manual_seed(0)
    predictor = SegmentationPredictor(CONFIG, HIERARCHICAL, LLM_DIM)
    maps = [torch.randn(batch, c, 16 >> i, 24 >> i) for i, c in enumerate(HIERARCHICAL.dims)]
    return predictor, maps, torch.randn(batch, 6, LLM_DIM), torch.randn(batch, 3, LLM_DIM)


def test_masks_equal_transformers_decoder_started_from_the_same_queries() -> None:
    predictor, maps, states, conditions = made(batch=1)
    theirs = Mask2FormerTransformerModule(CONFIG.dim, _settings(CONFIG))
    theirs.decoder.load_state_dict(predictor.decoder.state_dict())
    theirs.level_embed.load_state_dict(predictor.level_embedding.state_dict())
    theirs.queries_embedder.load_state_dict(predictor.query_position.state_dict())
    with torch.no_grad():
        theirs.queries_features.weight.copy_(predictor.query_content(states[0]))
        pixels = predictor.pixel_decoder(maps)
        expected = theirs(pixels.multi_scale_features, pixels.mask_features)
        ours = predictor(maps, states, conditions, "text")
    masks = [mask for mask, _ in ours.auxiliary] + [ours.masks]
    assert len(masks) == len(expected.masks_queries_logits) == CONFIG.decoder_layers + 1
    for mask, reference in zip(masks, expected.masks_queries_logits, strict=True):
        assert mask.shape == (1, 6, 16, 24)
        torch.testing.assert_close(mask, reference)
    last = expected.intermediate_hidden_states[-1].transpose(0, 1)
    torch.testing.assert_close(ours.embeddings, predictor.embedding(last))


def test_place_tells_cells_of_one_colour_apart() -> None:
    torch.manual_seed(0)
    predictor = SegmentationPredictor(replace(CONFIG, place=True), HIERARCHICAL, LLM_DIM)
    plain, maps, states, conditions = made()
    plain.load_state_dict(predictor.state_dict(), strict=False)
    with torch.no_grad():
        before = predictor(maps, states, conditions, "text")
        torch.testing.assert_close(before.masks, plain(maps, states, conditions, "text").masks)
    assert predictor.place is not None
    blank = torch.zeros(1, CONFIG.dim, 16, 24)
    query, wanted = torch.randn(CONFIG.dim), torch.zeros(16, 24)
    wanted[3:8, 4:9] = 1.0  # nothing but its place tells this patch from the rest
    optimizer = torch.optim.Adam(predictor.place.parameters(), lr=1e-2)
    for _ in range(400):
        logits = torch.einsum("d,bdhw->hw", query, predictor.place(blank))
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert ((logits > 0) == (wanted > 0.5)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_dot_products_with_the_kinds_own_projections(kind: Kind) -> None:
    predictor, maps, states, conditions = made()
    caught: list[Tensor] = []
    predictor.embedding.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    with torch.no_grad():
        scores = predictor(maps, states, conditions, kind).scores
        candidates = predictor.condition[MODULE_NAMES[kind]](conditions)
        query = predictor.score[MODULE_NAMES[kind]](caught[0])
        expected = query @ candidates.transpose(1, 2)
        if kind == "class":
            background = query @ predictor.background
            expected = torch.cat([expected, background[..., None]], dim=-1)
    torch.testing.assert_close(scores, expected)


def test_permuted_candidates_permute_the_scores() -> None:
    predictor, maps, states, conditions = made()
    order = torch.tensor([2, 0, 1])
    with torch.no_grad():
        scores = predictor(maps, states, conditions, "class").scores
        permuted = predictor(maps, states, conditions[:, order], "class").scores
    torch.testing.assert_close(permuted[..., :3], scores[..., order])
    torch.testing.assert_close(permuted[..., 3], scores[..., 3])


def test_gradients_reach_states_conditions_and_every_scale() -> None:
    predictor, maps, states, conditions = made()
    inputs = [*maps, states, conditions]
    for tensor in inputs:
        tensor.requires_grad_()
    prediction = predictor(maps, states, conditions, "region")
    (prediction.masks.square().mean() + prediction.scores.square().mean()).backward()
    for tensor in inputs:
        assert tensor.grad is not None
        assert float(tensor.grad.abs().amax()) > 0


def test_autocast_keeps_the_pixel_decoder_in_fp32() -> None:
    predictor, maps, states, conditions = made()
    seen: list[torch.dtype] = []
    predictor.pixel_decoder.register_forward_hook(
        lambda _, args, out: seen.append(out.mask_features.dtype)
    )
    with torch.no_grad():
        exact = predictor(maps, states, conditions, "text")
        with torch.autocast("cpu", torch.bfloat16):
            low = predictor([m.bfloat16() for m in maps], states, conditions, "text")
    assert seen == [torch.float32, torch.float32]
    assert low.masks.dtype == torch.bfloat16
    error = (low.masks.float() - exact.masks).abs().mean() / exact.masks.abs().mean()
    assert float(error) < 0.05


@pytest.mark.slow
def test_exported_program_equals_the_module() -> None:
    predictor, maps, states, conditions = made()

    class Flat(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.predictor = predictor.eval()

        def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
            prediction = self.predictor(inputs[:4], inputs[4], inputs[5], "class")
            return prediction.masks, prediction.scores

    inputs = (*maps, states, conditions)
    with torch.no_grad():
        exported = torch.export.export(Flat(), inputs).module()
        for ours, theirs in zip(Flat()(*inputs), exported(*inputs), strict=True):
            torch.testing.assert_close(theirs, ours)


def test_it_learns_two_squares_in_a_few_steps() -> None:
    predictor, maps, states, conditions = made()
    masks = torch.zeros(2, 2, 64, 96, dtype=torch.bool)
    masks[:, 0, 8:32, 8:32] = True
    masks[:, 1, 40:60, 50:90] = True
    labels, counts = torch.tensor([[0, 1], [1, -1]]), torch.tensor([3, 3])
    optimizer = torch.optim.AdamW(predictor.parameters(), lr=4e-3)
    totals = []
    for _ in range(25):
        prediction = predictor(maps, states, conditions, "class")
        losses = segmentation_losses(prediction, masks, labels, counts, "class", num_points=64)
        total = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert totals[-1] < 0.3 * totals[0]


def test_wrong_inputs_are_named() -> None:
    predictor, maps, states, conditions = made()
    with pytest.raises(SegmentError, match="four feature maps"):
        predictor(maps[:3], states, conditions, "text")
    with pytest.raises(SegmentError, match=r"mask_states \[B, 6, llm_dim\] expected"):
        predictor(maps, states[:, :5], conditions, "text")
    with pytest.raises(SegmentError, match=r"condition_states \[2, K, llm_dim\] expected"):
        predictor(maps, states, conditions[:1], "text")
    with pytest.raises(SegmentError, match="kind must be one of"):
        predictor(maps, states, conditions, "video")
