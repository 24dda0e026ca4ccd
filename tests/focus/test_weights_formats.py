"""Names of other libraries, refusals, shards: what surrounds the parity of `focus import`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine import cli
from engine.commands import import_
from focus.config import FocusConfig, to_json
from focus.errors import CheckpointMismatch, TargetError
from focus.model import FocusModel
from focus.presets import focus_3b
from focus.pretrained import load_weights
from focus.vocabulary import QWEN_PIXEL, QWEN_SEMANTIC, Vocabulary, VocabularyError
from focus.weights import convnext, fresh, movq, qwen2
from focus.weights.assemble import Report, Sources, assemble, read_vocabulary
from focus.weights.locate import locate
from tests.focus import small_checkpoints as small

BACKBONE = "front.hierarchical.backbone."


def imported(home: Path, **sources: Path) -> dict[str, Tensor]:
    """Import and return the tensors written."""
    given = {name: str(path) for name, path in sources.items()}
    assemble(Sources(**given), home / "out", small.base())
    return load_file(home / "out" / "model.safetensors")


def to_timm(name: str) -> str:
    """The name in timm's ConvNeXt, written out from its module tree."""
    table = {
        "embeddings.patch_embeddings": "stem.0",
        "embeddings.layernorm": "stem.1",
        "layernorm": "head.norm",
    }
    for ours, theirs in table.items():
        if name.startswith(ours + "."):
            return theirs + name[len(ours) :]
    _, stage, kind, rest = re.fullmatch(
        r"(encoder\.stages)\.(\d)\.(layers|downsampling_layer)\.(.*)", name
    ).groups()  # type: ignore[union-attr]
    if kind == "downsampling_layer":
        return f"stages.{stage}.downsample.{rest}"
    number, rest = rest.split(".", 1)
    inner = {
        "dwconv": "conv_dw",
        "layernorm": "norm",
        "pwconv1": "mlp.fc1",
        "pwconv2": "mlp.fc2",
        "layer_scale_parameter": "gamma",
    }
    part, dot, leaf = rest.partition(".")
    return f"stages.{stage}.blocks.{number}.{inner[part]}{dot}{leaf}"


@pytest.mark.parametrize("flavour", ["timm", "open_clip", "conv_mlp"])
def test_timm_and_open_clip_names_give_the_same_encoder(tmp_path: Path, flavour: str) -> None:
    state = small.convnext(tmp_path / "hf").state_dict()
    expected = imported(tmp_path, hierarchical=tmp_path / "hf")
    prefix = "visual.trunk." if flavour == "open_clip" else ""
    renamed = {prefix + to_timm(name): tensor.clone() for name, tensor in state.items()}
    if flavour == "conv_mlp":
        for name in [n for n in renamed if ".mlp." in n and n.endswith("weight")]:
            renamed[name] = renamed[name][:, :, None, None].contiguous()
    if flavour == "open_clip":
        renamed["text.token_embedding.weight"] = torch.zeros(4, 4)
    (tmp_path / "other").mkdir()
    save_file(renamed, tmp_path / "other" / "open_clip_model.safetensors")
    found = imported(tmp_path, hierarchical=tmp_path / "other")
    for name in expected:
        if name.startswith(BACKBONE):
            assert torch.equal(found[name], expected[name]), name
    assert convnext.configure(small.base(), convnext.Weights.open(tmp_path / "other")).hierarchical


def test_movqgan_names_give_the_same_pixel_branch(tmp_path: Path) -> None:
    state = small.movq(tmp_path / "hf").state_dict()
    expected = imported(tmp_path, tokenizer=tmp_path / "hf")

    def original(name: str) -> str:
        match = re.fullmatch(r"(encoder|decoder)\.(down|up)_blocks\.(\d)\.(.*)", name)
        if match:
            side, way, level, rest = match.groups()
            level = str(1 - int(level)) if way == "up" else level
            rest = rest.replace("resnets.", "block.").replace("attentions.", "attn.")
            name = f"{side}.{way}.{level}." + rest.replace("samplers.0.", "sample.")
        name = name.replace("mid_block.resnets.0", "mid.block_1")
        name = name.replace("mid_block.resnets.1", "mid.block_2")
        name = name.replace("mid_block.attentions.0", "mid.attn_1")
        if "attn" in name:
            name = name.replace("spatial_norm", "norm").replace("group_norm", "norm")
            name = name.replace("to_out.0", "proj_out")
            name = re.sub(r"to_([qkv])", r"\1", name)
        return name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")

    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        new = original(name)
        square = re.search(r"\.([qkv]|proj_out)\.weight$", new) and tensor.dim() == 2
        renamed[new] = (tensor[:, :, None, None] if square else tensor).clone().contiguous()
    assert "decoder.up.1.attn.0.norm.conv_y.weight" in renamed
    (tmp_path / "other").mkdir()
    save_file(renamed, tmp_path / "other" / "model.safetensors")
    (tmp_path / "other" / "config.json").write_text((tmp_path / "hf" / "config.json").read_text())
    found = imported(tmp_path, tokenizer=tmp_path / "other")
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def test_half_of_the_code_channels_is_zero() -> None:
    weight = torch.randn(3, 4, 1, 1)
    assert torch.equal(movq.right_half(weight, 6)[:, :2], torch.zeros(3, 2, 1, 1))
    assert torch.equal(movq.right_half(weight, 6)[:, 2:], weight)
    assert torch.equal(movq.right_half(weight, 4), weight)
    with pytest.raises(CheckpointMismatch, match="at most 3 code channels"):
        movq.right_half(weight, 3)


def test_untied_head_is_extended_too(tmp_path: Path) -> None:
    theirs = small.qwen2(tmp_path / "llm", tied=False)
    written = imported(tmp_path, llm=tmp_path / "llm")
    head = written["heads.lm_head.weight"]
    assert head.shape == (1664, 48)  # 39 + 256 + 1024 + 1 new ids, in multiples of 128
    assert torch.equal(head[:250], theirs.lm_head.weight[:250])


def test_extended_rows_are_repeatable_and_small() -> None:
    rows = torch.ones(10, 4)
    table = qwen2.extend_rows(rows, 8, 500, seed=3)
    assert torch.equal(table[:8], rows[:8])
    assert float(table[8:].abs().max()) < 0.2
    assert torch.equal(table, qwen2.extend_rows(rows, 8, 500, seed=3))
    with pytest.raises(CheckpointMismatch, match="at least 11 rows"):
        qwen2.extend_rows(rows, 11, 500, seed=3)


def test_full_scale_table_has_room_for_the_published_ids() -> None:
    config = focus_3b()
    assert config.llm.vocab_size == 283_136
    assert 151_665 + 39 + QWEN_SEMANTIC + QWEN_PIXEL == 282_776 < config.llm.vocab_size


def test_fresh_parts_have_the_models_names_and_shapes() -> None:
    config = small.base()
    with torch.device("meta"):
        own = FocusModel(config).state_dict()
    shapes = {n: tuple(t.shape) for n, t in own.items() if n != "heads.lm_head.weight"}
    made = dict(fresh.fresh(config, shapes, seed=1))
    assert {name: tuple(tensor.shape) for name, tensor in made.items()} == shapes
    part = {n: s for n, s in shapes.items() if n.startswith("front.adapter.")}
    alone = dict(fresh.fresh(config, part, seed=1))
    assert all(torch.equal(alone[name], made[name]) for name in part)


def test_pickles_are_refused_with_advice(tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointMismatch, match=r"a pickle, which can run code.*save_pretrained"):
        assemble(Sources(hierarchical=str(tmp_path / "hub")), tmp_path / "out", small.base())
    assert [path.name for path in tmp_path.iterdir()] == ["hub"]


def test_an_import_keeps_what_lies_in_its_folder(tmp_path: Path) -> None:
    small.convnext(tmp_path / "hf")
    sources, out = Sources(hierarchical=str(tmp_path / "hf")), tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(TargetError, match=r"a FOCUS model expected, got \['notes\.txt'\]"):
        assemble(sources, out, small.base())
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    (out / "notes.txt").unlink()
    assemble(sources, out, small.base())
    (out / "notes.txt").write_text("mine")
    (out / "tokenizer.json").write_text("of an earlier model")
    assemble(sources, out, small.base())
    assert (out / "notes.txt").read_text() == "mine"
    assert not (out / "tokenizer.json").exists()


def test_missing_and_mismatched_tensors_are_named(tmp_path: Path) -> None:
    small.convnext(tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    state = load_file(path)
    lost = "encoder.stages.2.layers.1.pwconv1.bias"
    save_file({n: t for n, t in state.items() if n != lost}, path)
    with pytest.raises(CheckpointMismatch, match=rf"1 tensors are missing, first \['{lost}'\]"):
        imported(tmp_path, hierarchical=tmp_path / "hf")
    save_file({**state, lost: torch.zeros(3)}, path)
    with pytest.raises(CheckpointMismatch, match=rf"{lost}: shape \(96,\) expected, got \(3,\)"):
        imported(tmp_path, hierarchical=tmp_path / "hf")


def test_wrong_architectures_are_refused(tmp_path: Path) -> None:
    small.convnext(tmp_path / "conv")
    with pytest.raises(CheckpointMismatch, match="a Mask2Former expected, got 'convnext'"):
        imported(tmp_path, segment=tmp_path / "conv")
    with pytest.raises(CheckpointMismatch, match="a Qwen2-VL vision tower expected"):
        imported(tmp_path, vit=tmp_path / "conv")
    with pytest.raises(CheckpointMismatch, match=r"tokenizer\.json: the tokenizer"):
        imported(tmp_path, llm=tmp_path / "conv")
    with pytest.raises(CheckpointMismatch, match="config of SDXL's UNet expected, found none"):
        imported(tmp_path, diffusion=tmp_path / "conv")


def test_sources_that_are_nowhere_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointMismatch, match="there is no such path"):
        locate("/nowhere/at/all")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointMismatch, match="the hub did not give it"):
        locate("nobody/nothing")


def test_command_writes_a_model_and_reports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small.convnext(tmp_path / "hf")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(to_json(small.base())))
    out = tmp_path / "made"
    arguments = ["import", "--hierarchical", str(tmp_path / "hf"), "--out", str(out)]
    assert cli.main([*arguments, "--config", str(tmp_path / "base"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["loaded"][str(tmp_path / "hf")]["format"] == "transformers ConvNeXt"
    assert report["has_tokenizer"] is False
    config = read(out)
    assert config.hierarchical.dims == tuple(small.DIMS)
    load_weights(FocusModel(config), out)
    assert cli.main(["import", "--out", str(out)]) == 2
    assert "give at least one of --llm" in capsys.readouterr().err


@pytest.mark.parametrize("has_tokenizer", [True, False])
def test_an_import_without_tokenizer_says_so(has_tokenizer: bool) -> None:
    lines = import_._lines(Report(files=["model.safetensors"]), Path("made"), has_tokenizer)
    assert ("made has no tokenizer, so --model cannot load it" in lines[-1]) is not has_tokenizer


def test_a_tokenizer_that_is_cut_off_is_named(tmp_path: Path) -> None:
    Vocabulary.train(["one two"], 300, 1, 1).save(tmp_path)
    text = (tmp_path / "tokenizer.json").read_text()
    assert read_vocabulary(tmp_path, small.base()).text_size > 256
    (tmp_path / "tokenizer.json").write_text(text[: len(text) // 2])
    with pytest.raises(VocabularyError, match=r"tokenizer\.json: a tokenizer expected, got"):
        read_vocabulary(tmp_path, small.base())


def read(directory: Path) -> FocusConfig:
    from focus.pretrained import read_config

    return read_config(directory)
