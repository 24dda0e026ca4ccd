"""The two encoders against transformers, and the properties that make them exportable."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from transformers import Qwen2VLImageProcessor
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from focus.config import HierarchicalConfig, VanillaConfig
from focus.errors import CheckpointMismatch, ShapeError
from focus.presets import focus_3b, focus_tiny
from focus.vision.encoder import (
    HierarchicalEncoder,
    VanillaEncoder,
    from_qwen2_vl,
    qwen2_vl_names,
)
from focus.vision.rope2d import axial_table, grid_positions, rotate

VANILLA = VanillaConfig(image_size=(28, 42), patch_size=7, depth=3, dim=48, num_heads=3, out_dim=40)
HIERARCHICAL = HierarchicalConfig(image_size=(64, 64), depths=(1, 1, 2, 1), dims=(8, 16, 24, 32))


def tower(config: VanillaConfig) -> Qwen2VisionTransformerPretrainedModel:
    torch.manual_seed(1)
    model = Qwen2VisionTransformerPretrainedModel(
        Qwen2VLVisionConfig(
            depth=config.depth,
            embed_dim=config.dim,
            hidden_size=config.out_dim,
            num_heads=config.num_heads,
            patch_size=config.patch_size,
            spatial_merge_size=config.merge_size,
            temporal_patch_size=config.temporal_patch_size,
        )
    ).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn_like(value) * 0.1)
    return model


def run_tower(model: Qwen2VisionTransformerPretrainedModel, images: Tensor) -> Tensor:
    processor = Qwen2VLImageProcessor(
        patch_size=VANILLA.patch_size,
        merge_size=VANILLA.merge_size,
        temporal_patch_size=VANILLA.temporal_patch_size,
        do_resize=False,
        do_rescale=False,
        do_convert_rgb=False,
    )
    made = processor(images=list(images), return_tensors="pt")
    with torch.no_grad():
        merged = model(made["pixel_values"], grid_thw=made["image_grid_thw"]).pooler_output
    return merged.view(images.shape[0], -1, VANILLA.out_dim)


@pytest.mark.parametrize("size", [(28, 42), (70, 14)])
def test_vanilla_equals_transformers_tower(size: tuple[int, int]) -> None:
    theirs = tower(VANILLA)
    ours = VanillaEncoder(VANILLA)
    ours.load_state_dict(from_qwen2_vl(VANILLA, theirs.state_dict()))
    images = torch.rand(2, 3, *size)
    expected = run_tower(theirs, images)
    with torch.no_grad():
        got = ours(images)
    assert (got - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max().item())


def test_vanilla_tokens_are_row_major() -> None:
    encoder = VanillaEncoder(dataclasses.replace(VANILLA, depth=0))
    images = torch.rand(1, 3, 28, 42)
    changed = images.clone()
    changed[:, :, 14:28, 28:42] += 0.5  # merged cell (1, 2) of a 2 x 3 grid
    with torch.no_grad():
        moved = (encoder(images) - encoder(changed)).abs().amax(-1)[0]
    assert moved.nonzero().flatten().tolist() == [1 * 3 + 2]


def test_vanilla_names_cover_both_state_dicts() -> None:
    names = qwen2_vl_names(VANILLA)
    assert set(names) == set(VanillaEncoder(VANILLA).state_dict())
    assert set(names.values()) == set(tower(VANILLA).state_dict())


def test_vanilla_reads_the_tower_out_of_a_whole_checkpoint() -> None:
    state = tower(VANILLA).state_dict()
    whole = {f"model.visual.{name}": value for name, value in state.items()}
    whole["model.embed_tokens.weight"] = torch.zeros(3)
    alone, inside = from_qwen2_vl(VANILLA, state), from_qwen2_vl(VANILLA, whole)
    assert alone.keys() == inside.keys()
    assert all(torch.equal(alone[name], inside[name]) for name in alone)


def test_vanilla_refuses_checkpoints_that_do_not_fit() -> None:
    state = tower(VANILLA).state_dict()
    with pytest.raises(CheckpointMismatch, match=r"depth 4 expected, 12 tensors are missing"):
        from_qwen2_vl(dataclasses.replace(VANILLA, depth=4), state)
    with pytest.raises(CheckpointMismatch, match=r"merger.mlp.2.weight: shape \(41, 192\)"):
        from_qwen2_vl(dataclasses.replace(VANILLA, out_dim=41), state)
    with pytest.raises(CheckpointMismatch, match="one tensor named"):
        from_qwen2_vl(VANILLA, {})


def test_vanilla_names_a_size_that_fits() -> None:
    with pytest.raises(ShapeError, match="multiples of 14 pixels, got 30 x 42; resize to 28 x 42"):
        VanillaEncoder(VANILLA)(torch.rand(1, 3, 30, 42))


def test_encoders_have_the_published_sizes() -> None:
    config = focus_3b()
    with torch.device("meta"):
        vanilla = VanillaEncoder(config.vanilla)
        hierarchical = HierarchicalEncoder(config.hierarchical)
    assert round(sum(p.numel() for p in vanilla.parameters()) / 1e6, 1) == 675.8
    assert round(sum(p.numel() for p in vanilla.merger.parameters()) / 1e6, 1) == 44.6
    assert round(sum(p.numel() for p in hierarchical.parameters()) / 1e6, 1) == 196.2


def test_hierarchical_equals_transformers_backbone() -> None:
    encoder = HierarchicalEncoder(HIERARCHICAL).eval()
    with torch.no_grad():
        for value in encoder.parameters():
            value.add_(torch.randn_like(value) * 0.1)
        images = torch.rand(2, 3, 64, 96)
        mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
        std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
        expected = encoder.backbone((images - mean) / std).feature_maps
        got = encoder(images)
    assert [tuple(m.shape[1:]) for m in got] == [(8, 16, 24), (16, 8, 12), (24, 4, 6), (32, 2, 3)]
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_hierarchical_maps_are_normalised_over_channels() -> None:
    encoder = HierarchicalEncoder(HIERARCHICAL)
    with torch.no_grad():
        for feature in encoder(torch.rand(1, 3, 64, 64)):
            assert feature.mean(1).abs().max() < 1e-5
            assert torch.allclose(feature.var(1, unbiased=False), torch.ones(()), atol=1e-2)


def test_hierarchical_refuses_sizes_off_the_stride() -> None:
    with pytest.raises(ShapeError, match="multiples of 32 pixels, got 64 x 48"):
        HierarchicalEncoder(HIERARCHICAL)(torch.rand(1, 3, 64, 48))


@pytest.mark.parametrize("name", ["vanilla", "hierarchical"])
def test_encoders_export_to_one_graph(name: str) -> None:
    torch.manual_seed(0)
    module, size = {
        "vanilla": (VanillaEncoder(VANILLA), VANILLA.image_size),
        "hierarchical": (HierarchicalEncoder(HIERARCHICAL), HIERARCHICAL.image_size),
    }[name]
    images = torch.rand(2, 3, *size)
    program = torch.export.export(
        module.eval(), (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=8)},)
    )
    other = torch.rand(3, 3, *size)
    got, expected = program.module()(other), module(other)
    for one, two in zip([*got], [*expected], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["vanilla", "hierarchical"])
def test_encoders_under_bf16_autocast_stay_close(name: str) -> None:
    torch.manual_seed(0)
    config = focus_tiny()
    module, size = {
        "vanilla": (VanillaEncoder(config.vanilla), config.vanilla.image_size),
        "hierarchical": (HierarchicalEncoder(config.hierarchical), config.hierarchical.image_size),
    }[name]
    images = torch.rand(1, 3, *size)
    with torch.no_grad():
        exact = list(module(images))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = list(module(images))
    for one, two in zip(exact, rounded, strict=True):
        assert (one - two.float()).norm() < 0.03 * one.norm()


def test_rope_products_depend_on_the_offset_alone() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def product(at: tuple[float, float], other: tuple[float, float]) -> float:
        tables = [axial_table(torch.tensor([y]), torch.tensor([x]), 16) for y, x in (at, other)]
        return float((rotate(q, tables[0]) * rotate(k, tables[1])).sum())

    assert product((1.0, 5.0), (3.0, 2.0)) == pytest.approx(product((4.5, 7), (6.5, 4)), abs=1e-5)
    assert product((1.0, 5.0), (3.0, 2.0)) != pytest.approx(product((1, 5), (2, 3)), abs=1e-3)


def test_rope_grids_share_one_frame() -> None:
    rows, columns = grid_positions((2, 3), torch.device("cpu"), (4.0, 6.0))
    assert rows.tolist() == [1, 1, 1, 3, 3, 3]
    assert columns.tolist() == [1, 3, 5, 1, 3, 5]
    fine, _ = grid_positions((4, 1), torch.device("cpu"), (4.0, 6.0))
    assert fine.view(2, 2).mean(1).tolist() == [1, 3]


def test_rope_refuses_head_widths_it_cannot_split() -> None:
    with pytest.raises(ShapeError, match="multiple of 4, got 6"):
        axial_table(torch.zeros(1), torch.zeros(1), 6)
