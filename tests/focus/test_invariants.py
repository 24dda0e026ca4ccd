"""The invariants (a) to (l) that FOCUS stands on: each is proved by the tests named here."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from torch import Tensor

from focus.buckets import BUCKETS
from focus.vocabulary import NUM_SIZES, QWEN_PIXEL, QWEN_SEMANTIC, QWEN_TEXT_SIZE, STRUCTURE
from kernels.mask_attention.api import mask_attention

HERE = Path(__file__).resolve().parent
PROOFS: dict[str, tuple[str, ...]] = {
    "a: token block lengths": (
        "test_invariants.py::test_blocks_have_the_published_lengths",
        "test_info.py::test_buckets_have_the_tokens_of_the_table",
    ),
    "b: the grammar writes a block that parses, for all 12 sizes": (
        "test_grammar.py::test_random_choices_give_a_block_that_parses",
    ),
    "c: the adapter is its queries at zero gates": (
        "test_adapter.py::test_adapter_is_its_queries_while_the_gates_are_zero",
    ),
    "d: a mask of zeros is the unconditioned decoder": (
        "test_diffusion_unet.py::test_zero_mask_and_zero_projection_are_exactly_unconditioned",
    ),
    "e: positions let the mask say where": (
        "test_diffusion_unet.py::test_positions_let_the_mask_say_where",
        "test_invariants.py::test_only_positions_see_a_permutation_of_mask_cells",
    ),
    "f: rank-1 identity": ("test_invariants.py::test_a_scalar_mask_moves_the_output_on_one_line",),
    "g: the fused search is the nearest code": (
        "test_tokenizer_simvq.py::test_simvq_picks_the_nearest_code",
        "test_tokenizer_simvq.py::test_simvq_loss_and_gradients_follow_the_definition",
    ),
    "h: the codebook never moves, its map does": (
        "test_tokenizer_simvq.py::test_simvq_moves_the_map_and_never_the_codebook",
    ),
    "i: the matched loss does not depend on the order of queries": (
        "test_segment_loss.py::test_losses_do_not_depend_on_the_order_of_queries",
    ),
    "j: gradients reach exactly what a stage trains": (
        "../engine/test_stages.py::test_gradients_reach_exactly_what_the_run_trains",
    ),
    "k: split trunks and vocabularies agree with one process": (
        "../parallel/test_trunk.py::test_logits_equal_transformers_and_weights_come_back",
        "../parallel/test_trunk.py::test_vocabulary_losses_equal_the_whole_table",
    ),
    "l: ids": (
        "test_vocabulary.py::test_from_qwen_has_the_exact_ids",
        "test_invariants.py::test_ids_follow_the_published_order",
    ),
}


@pytest.mark.parametrize("invariant", PROOFS)
def test_every_invariant_has_its_tests(invariant: str) -> None:
    for proof in PROOFS[invariant]:
        file, name = proof.split("::")
        tree = ast.parse((HERE / file).read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_blocks_have_the_published_lengths() -> None:
    published = {
        (256, 256): 368,
        (512, 512): 1404,
        (512, 384): 1014,
        (384, 512): 1002,
        (576, 384): 1140,
        (384, 576): 1122,
        (768, 384): 1570,
        (384, 768): 1533,
        (960, 320): 1662,
        (320, 960): 1600,
        (1024, 256): 1454,
        (256, 1024): 1379,
    }
    assert {bucket.size: bucket.block_length for bucket in BUCKETS} == published


def test_ids_follow_the_published_order() -> None:
    first = QWEN_TEXT_SIZE + len(STRUCTURE) + 2 * NUM_SIZES
    assert first == 151_704
    assert first + QWEN_SEMANTIC == 184_472
    assert first + QWEN_SEMANTIC + QWEN_PIXEL - 1 == 282_775


def attend(query: Tensor, mask: Tensor, key: Tensor, value: Tensor, position: str) -> Tensor:
    grid = (mask.shape[-2], mask.shape[-1])
    return mask_attention(query, mask, key, value, grid, grid, position)  # type: ignore[arg-type]


def made() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    query = torch.randn(1, 2, 24, 8, dtype=torch.float64)
    mask = torch.rand(1, 1, 4, 6, dtype=torch.float64)
    key, value = torch.randn(2, 2, 1, 8, dtype=torch.float64)
    return query, mask, key, value


@pytest.mark.parametrize("position", ["rope", "none"])
def test_only_positions_see_a_permutation_of_mask_cells(position: str) -> None:
    query, mask, key, value = made()
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    moved = mask.flatten(2)[..., order].view_as(mask)
    change = attend(query, moved, key, value, position) - attend(query, mask, key, value, position)
    if position == "none":
        assert float(change.abs().max()) < 1e-12
    else:
        assert float(change.abs().max()) > 1e-2


def test_a_scalar_mask_moves_the_output_on_one_line() -> None:
    """out_q = s_q v per head, with s_q between the smallest and the largest mask value."""
    query, mask, key, value = made()
    out = attend(query, mask, key, value, "rope")
    direction = value / value.norm(dim=-1, keepdim=True)  # [H, 1, d]
    share = (out * direction).sum(-1)
    assert torch.allclose(out, share[..., None] * direction, atol=1e-12)
    mean = share / value.norm(dim=-1)
    assert float(mean.min()) >= float(mask.min()) - 1e-12
    assert float(mean.max()) <= float(mask.max()) + 1e-12
