"""Every public format: what a library saved and FOCUS imported computes the same numbers."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import ConvNextBackbone, ConvNextConfig

from focus import Focus
from focus.model import FocusModel
from focus.pretrained import load_weights, read_config
from focus.shards import Weights
from focus.weights.assemble import Report, Sources, assemble
from tests.focus import small_checkpoints as small

TOLERANCE = 1e-5


@dataclass
class Imported:
    theirs: dict[str, Any]
    sources: Sources
    out: Path
    report: Report
    focus: Focus

    @property
    def model(self) -> FocusModel:
        return self.focus.model


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Imported:
    home = tmp_path_factory.mktemp("public")
    torch.manual_seed(0)
    theirs: dict[str, Any] = {
        "llm": small.qwen2(home / "llm", shard="100KB"),
        "vit": small.qwen2_vl(home / "vit"),
        "hierarchical": small.convnext(home / "hierarchical"),
        "segment": small.mask2former(home / "segment"),
        "diffusion": small.sdxl(home / "diffusion"),
        "tokenizer": small.movq(home / "tokenizer"),
    }
    sources = Sources(**{name: str(home / name) for name in theirs})
    report = assemble(sources, home / "out", small.base(), max_shard_bytes=300_000)
    return Imported(theirs, sources, home / "out", report, Focus.from_pretrained(home / "out"))


def close(ours: Tensor, theirs: Tensor) -> None:
    scale = max(1.0, float(theirs.detach().abs().max()))
    assert float((ours - theirs).detach().abs().max()) <= TOLERANCE * scale


@torch.no_grad()
def test_language_model_equals_transformers(imported: Imported) -> None:
    size = imported.focus.vocabulary.text_size
    ids = torch.arange(40)[None] * 7 % size
    theirs = imported.theirs["llm"](ids)
    model = imported.model
    hidden = model.trunk(model.front.token_embedding(ids))
    close(model.logits(hidden, slice(0, size)), theirs.logits[..., :size])
    assert model.config.llm.rope_theta == 5e5 and model.config.llm.norm_eps == 1e-5


@torch.no_grad()
def test_vision_tower_equals_transformers(imported: Imported) -> None:
    images = torch.rand(1, 3, 28, 42)
    encoder = imported.model.front.vanilla
    flat = encoder.patches((images - encoder.mean) / encoder.std)[0]
    grid = torch.tensor([[1, 28 // 7, 42 // 7]])
    close(encoder(images)[0], imported.theirs["vit"].visual(flat, grid).pooler_output)


@torch.no_grad()
def test_windowed_tower_equals_transformers(tmp_path: Path) -> None:
    theirs = small.qwen2_5_vl(tmp_path / "vit")
    assemble(Sources(vit=str(tmp_path / "vit")), tmp_path / "out", small.base())
    config = read_config(tmp_path / "out")
    model = FocusModel(config).eval()
    load_weights(model, tmp_path / "out")
    encoder = model.front.vanilla
    for size in ((56, 70), (28, 28)):  # windows of 2 x 2 merged tokens, cut at the edge
        images = torch.rand(1, 3, *size)
        flat = encoder.patches((images - encoder.mean) / encoder.std)[0]
        grid = torch.tensor([[1, size[0] // 7, size[1] // 7]])
        close(encoder(images)[0], theirs(flat, grid).pooler_output)
    windows = encoder.windows(4, 5, torch.device("cpu"))
    assert windows is not None and int(windows.sum()) == 4 * (16**2) + 2 * (8**2)


@torch.no_grad()
def test_convnext_equals_transformers(imported: Imported) -> None:
    encoder = imported.model.front.hierarchical
    images = torch.rand(1, 3, 64, 96)
    theirs = imported.theirs["hierarchical"](
        (images - encoder.mean) / encoder.std, output_hidden_states=True
    )
    x = encoder.backbone.embeddings((images - encoder.mean) / encoder.std)
    for index, stage in enumerate(encoder.backbone.encoder.stages):
        x = stage(x)
        close(x, theirs.hidden_states[index + 1])


@torch.no_grad()
def test_mask_decoder_equals_transformers(imported: Imported) -> None:
    ours, theirs = deepcopy(imported.model.heads.segment), imported.theirs["segment"].model
    decoder = theirs.pixel_level_module.decoder
    for name, tensor in ours.pixel_decoder.state_dict().items():
        if name.startswith(("input_projections.", "adapter_")):
            decoder.get_parameter(name).data = tensor.clone()  # new: the backbones differ
    maps = [torch.randn(1, c, 16 >> i, 16 >> i) for i, c in enumerate(small.DIMS)]
    their_pixels = decoder(maps)
    close(ours.pixel_decoder(maps).mask_features, their_pixels.mask_features)
    ours.query_content.weight.data.zero_()
    ours.query_content.bias.data.zero_()
    transformer = theirs.transformer_module
    transformer.queries_features.weight.data.zero_()
    expected = transformer(their_pixels.multi_scale_features, their_pixels.mask_features)
    states = torch.zeros(1, 5, imported.model.config.llm.dim)
    predicted = ours(maps, states, states[:, :1], "text")
    close(predicted.masks, expected.masks_queries_logits[-1])


@torch.no_grad()
def test_unet_equals_diffusers_on_its_own_channels(imported: Imported) -> None:
    unet, vae = imported.theirs["diffusion"]
    decoder = imported.model.heads.diffusion
    noisy, step = torch.randn(2, 4, 8, 8), torch.tensor([3, 800])
    codes = torch.randn(2, imported.model.config.code_channels, 8, 8)  # weighed with zeros
    condition = {"text_embeds": torch.zeros(2, 40), "time_ids": torch.zeros(2, 6)}
    text = torch.zeros(2, 77, 64)
    theirs = unet(noisy, step, text, added_cond_kwargs=condition).sample
    close(decoder.predict(noisy, codes, step, None), theirs)
    _, context = decoder.conditions(codes, torch.rand(2, 1, 16, 16), (8, 8))
    close(decoder.predict(noisy, codes, step, context), theirs)  # the projection starts at zero
    picture = torch.rand(1, 3, 16, 16)
    latents = vae.encode(picture * 2 - 1).latent_dist.mode() * vae.config.scaling_factor
    close(decoder.vae.encode(picture), latents)
    close(decoder.vae.decode(latents), vae.decode(latents / 0.13025).sample / 2 + 0.5)


@torch.no_grad()
def test_pixel_branch_equals_diffusers_movq(imported: Imported) -> None:
    movq, tokenizer = imported.theirs["tokenizer"], imported.model.front.tokenizer
    picture = torch.rand(1, 3, 16, 16)
    latents = movq.encode(picture * 2 - 1).latents
    vectors = tokenizer.pre_quantise(tokenizer.pixel_encoder(picture))
    close(vectors, latents)
    quantised, _, (_, _, index) = movq.quantize(latents)
    found = tokenizer.pixel_codes.nearest(vectors.permute(0, 2, 3, 1))
    assert torch.equal(found.flatten(), index.flatten())
    merged = torch.cat([torch.randn_like(quantised), quantised], dim=1)  # any semantic codes
    close(tokenizer.pixel_decoder(merged), movq.decode(latents).sample / 2 + 0.5)


def test_import_save_load_is_bit_exact(imported: Imported, tmp_path: Path) -> None:
    imported.focus.save_pretrained(tmp_path / "again")
    again = Focus.from_pretrained(tmp_path / "again").model.state_dict()
    for name, tensor in Weights.open(imported.out).items():
        assert torch.equal(again[name], tensor), name
    llm = imported.theirs["llm"].state_dict()
    for name in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight"):
        assert torch.equal(again[name.replace("model.", "trunk.")], llm[name])


def test_report_says_what_is_loaded_new_and_skipped(imported: Imported) -> None:
    report = imported.report
    own = [n for n in imported.model.state_dict() if n != "heads.lm_head.weight"]
    loaded = sum(int(str(values["tensors"])) for values in report.loaded.values())
    assert loaded + len(report.new) == len(own) == report.tensors
    assert len(report.files) > 3
    assert "front.adapter.queries" in report.new and "heads.segment.background" in report.new
    assert "(16, 24, 1, 1)" not in report.new  # reasons, not shapes, are the values
    name = "heads.segment.pixel_decoder.input_projections.0.0.weight"
    assert "expected" in report.new[name]
    segment = report.skipped[str(imported.sources.segment)]
    assert "class_predictor.weight" in segment
    saved = json.loads((imported.out / "import.json").read_text())
    assert saved["new"] == report.new


def test_no_shard_is_larger_than_asked_for(imported: Imported) -> None:
    for name in imported.report.files:
        tensors = load_file(imported.out / name)
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        assert size <= 300_000 or len(tensors) == 1, name


def test_vocabulary_is_extended_in_the_published_order(imported: Imported) -> None:
    vocabulary, config = imported.focus.vocabulary, imported.model.config
    size = vocabulary.text_size
    assert vocabulary.structure["start_of_image"] == size
    assert vocabulary.semantic(0) == size + 7 + 32
    assert vocabulary.seg_id == size + 39 + 256 + 40
    assert config.llm.vocab_size == 640  # the base's rows suffice
    table = imported.model.front.token_embedding.weight
    theirs = imported.theirs["llm"].model.embed_tokens.weight
    assert torch.equal(table[:size], theirs[:size])
    assert not torch.equal(table[size : small.TABLE], theirs[size:])
    assert 0.01 < float(table[size:].detach().std()) < 0.03


def test_imported_model_runs_every_task(imported: Imported) -> None:
    import numpy as np

    from focus import Box

    picture = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)
    model = imported.focus
    assert model.segment(picture, "circle").masks[0].shape == (48, 64)
    assert model.segment(picture, regions=[Box(4, 4, 20, 20)]).labels == [0]
    assert isinstance(model.chat(picture, "what is it?"), str)
    edited = model.edit(picture, "make it red", steps=1)
    assert edited.image.size == (64, 48)


def test_convnext_backbone_checkpoint_brings_its_norms(tmp_path: Path) -> None:
    config = ConvNextConfig(
        depths=small.DEPTHS,
        hidden_sizes=small.DIMS,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    theirs = small.shake(ConvNextBackbone(config))
    theirs.save_pretrained(tmp_path / "backbone")
    sources = Sources(hierarchical=str(tmp_path / "backbone"))
    report = assemble(sources, tmp_path / "out", small.base())
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(written[f"front.hierarchical.backbone.{name}"], tensor)
    assert not any(name.startswith("front.hierarchical") for name in report.new)
