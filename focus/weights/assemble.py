"""Assemble a FOCUS checkpoint from public ones, tensor by tensor and shard by shard."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from focus.config import FocusConfig, to_json
from focus.errors import CheckpointMismatch
from focus.folder import fresh_folder
from focus.model import FocusModel
from focus.pretrained import CONFIG, carry_over, check_target
from focus.settings import FILE as SETTINGS
from focus.settings import Settings, write
from focus.shards import MAX_SHARD, ShardWriter, Weights, narrow
from focus.vocabulary import (
    QWEN_PIXEL,
    QWEN_SEMANTIC,
    QWEN_TEXT_SIZE,
    TOKENIZER,
    VOCABULARY,
    Vocabulary,
    read_tokenizer,
)
from focus.weights import convnext, mask2former, movq, qwen2, qwen2_vl, sdxl
from focus.weights.fresh import fresh
from focus.weights.locate import locate
from focus.weights.plan import Plan

REPORT = "import.json"
OWN = (CONFIG, SETTINGS, REPORT, TOKENIZER, VOCABULARY)  # an earlier model's would not fit


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Local directories (or hub ids) of the public checkpoints; None: the part starts new.

    llm: transformers Qwen2, with its tokenizer.json. vit: transformers Qwen2-VL. hierarchical:
    ConvNeXt of transformers, timm or OpenCLIP. segment: transformers Mask2Former. diffusion: a
    diffusers SDXL pipeline (`unet`, `vae`). tokenizer: a MoVQ (diffusers VQModel) for the pixel
    branch.
    """

    llm: str | None = None
    vit: str | None = None
    hierarchical: str | None = None
    segment: str | None = None
    diffusion: str | None = None
    tokenizer: str | None = None


@dataclass(kw_only=True)
class Report:
    """What an import did. loaded: per source, format and numbers. new: why each tensor is new.

    skipped: per source, tensors that FOCUS has no use for.
    """

    loaded: dict[str, dict[str, object]] = field(default_factory=dict)
    new: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, list[str]] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    tensors: int = 0
    parameters: int = 0


def assemble(
    sources: Sources,
    out: str | Path,
    base: FocusConfig,
    *,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    max_shard_bytes: int = MAX_SHARD,
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Write a model directory from public checkpoints; returns what was loaded, new and skipped.

    The sizes of each part are those of its checkpoint, everything else is `base`. dtype: of the
    floating tensors; None keeps each checkpoint's own, new ones are fp32. The directory is replaced
    only when everything is written. Raises `CheckpointMismatch`, `TargetError`, `VocabularyError`,
    `OSError`.
    """
    out = check_target(out)
    places = {name: locate(source) for name, source in asdict(sources).items() if source}
    if not places:
        raise CheckpointMismatch("at least one source to import expected, got none")
    config, vocabulary = configure(base, places)
    with torch.device("meta"):
        meta = FocusModel(config)
    own = {name: tensor for name, tensor in meta.state_dict().items() if not _tied(name, config)}
    plans = make_plans(config, places, sources, vocabulary, list(own), seed)
    for plan in plans:
        plan.check(own)
    with fresh_folder(out) as temporary:
        carry_over(out, temporary, without=OWN)
        buffers = {name for name, _ in meta.named_buffers()}
        writer = ShardWriter(temporary, max_bytes=max_shard_bytes)
        report = Report(tensors=len(own), parameters=sum(p.numel() for p in meta.parameters()))

        def add(name: str, tensor: Tensor) -> None:
            writer.add(name, narrow(tensor, None if name in buffers else dtype))

        _load(plans, own, report, add, progress)
        shapes = {name: tuple(own[name].shape) for name in _unfilled(own, report, plans)}
        for name in shapes:
            report.new.setdefault(name, "no source brings it")
        for name, tensor in fresh(config, shapes, seed):
            add(name, tensor)
        report.files = [path.name for path in writer.finish()]
        (temporary / CONFIG).write_text(json.dumps(to_json(config), indent=2) + "\n")
        (temporary / SETTINGS).write_text(write(Settings()))
        (temporary / REPORT).write_text(json.dumps(asdict(report), indent=2) + "\n")
        if vocabulary is not None:
            vocabulary.save(temporary)
    return report


def configure(base: FocusConfig, places: dict[str, Path]) -> tuple[FocusConfig, Vocabulary | None]:
    """Return the config with every source's sizes, and the vocabulary if there is a tokenizer."""
    config = base
    if "tokenizer" in places:
        config = movq.configure(config, places["tokenizer"])
    if "vit" in places:
        config = qwen2_vl.configure(config, places["vit"])
    if "hierarchical" in places:
        config = convnext.configure(config, Weights.open(places["hierarchical"]))
    if "segment" in places:
        config = mask2former.configure(config, places["segment"])
    if "diffusion" in places:
        config = sdxl.configure(config, places["diffusion"])
    vocabulary = None
    if "llm" in places:
        vocabulary = read_vocabulary(places["llm"], config)
        config = qwen2.configure(config, places["llm"], vocabulary.size)
    return config, vocabulary


def read_vocabulary(directory: Path, config: FocusConfig) -> Vocabulary:
    """Extend the tokenizer of a language model by the config's visual codes.

    Qwen2.5's own with the published codebooks gets the published ids. Raises `VocabularyError`
    (a file that is cut off, too), `CheckpointMismatch`.
    """
    path = directory / TOKENIZER
    if not path.is_file():
        raise CheckpointMismatch(
            f"{path}: the tokenizer of the language model expected, found none; save it there with "
            "transformers' AutoTokenizer.save_pretrained"
        )
    tokenizer = read_tokenizer(path)
    codes = (config.semantic.codebook.num_codes, config.pixel.codebook.num_codes)
    if codes == (QWEN_SEMANTIC, QWEN_PIXEL) or tokenizer.get_vocab_size() == QWEN_TEXT_SIZE:
        return Vocabulary.from_qwen(tokenizer, num_semantic=codes[0], num_pixel=codes[1])
    return Vocabulary(tokenizer, *codes)


def make_plans(
    config: FocusConfig,
    places: dict[str, Path],
    sources: Sources,
    vocabulary: Vocabulary | None,
    own: list[str],
    seed: int,
) -> list[Plan]:
    """Return the recipes of every source, in the order of the model's own tensors."""
    given = asdict(sources)
    plans = []
    if "vit" in places:
        plans.append(qwen2_vl.plan(config, given["vit"], Weights.open(places["vit"])))
    if "hierarchical" in places:
        weights = Weights.open(places["hierarchical"])
        plans.append(convnext.plan(config, given["hierarchical"], weights))
    if "tokenizer" in places:
        plans.append(movq.plan(config, given["tokenizer"], Weights.open(places["tokenizer"]), own))
    if "llm" in places:
        assert vocabulary is not None
        weights = Weights.open(places["llm"])
        plans.append(qwen2.plan(config, given["llm"], weights, vocabulary.text_size, seed))
    if "segment" in places:
        plans.append(
            mask2former.plan(config, given["segment"], Weights.open(places["segment"]), own)
        )
    if "diffusion" in places:
        source, home = given["diffusion"], places["diffusion"]
        plans.append(sdxl.plan_unet(config, f"{source}/unet", Weights.open(home / "unet"), own))
        plans.append(sdxl.plan_vae(config, f"{source}/vae", Weights.open(home / "vae"), own))
    return plans


def _load(
    plans: list[Plan],
    own: dict[str, Tensor],
    report: Report,
    add: Callable[[str, Tensor], None],
    progress: Callable[[str], None] | None,
) -> None:
    for plan in plans:
        if progress is not None:
            progress(f"{plan.source} ({plan.format})")
        count = parameters = 0
        for name, fill in plan.fills.items():
            if any(theirs not in plan.weights for theirs in fill.names):
                report.new[name] = f"{plan.source} has no {fill.names[0]}"
                continue
            tensor = fill.read(plan.weights)
            if tensor.shape != own[name].shape:
                what = f"{tuple(own[name].shape)} expected, got {tuple(tensor.shape)}"
                if not fill.loose:
                    raise CheckpointMismatch(
                        f"{plan.source}: {fill.names[0]}: shape {what}; its config.json and its "
                        "tensors disagree, or another source has other sizes"
                    )
                report.new[name] = f"{plan.source}: {fill.names[0]}: {what}"
                continue
            add(name, tensor)
            count, parameters = count + 1, parameters + tensor.numel()
        report.loaded[plan.source] = {
            "format": plan.format,
            "tensors": count,
            "parameters": parameters,
        }
        skipped = plan.skipped()
        if skipped:
            report.skipped[plan.source] = skipped


def _unfilled(own: dict[str, Tensor], report: Report, plans: list[Plan]) -> list[str]:
    filled = {name for plan in plans for name in plan.fills if name not in report.new}
    return [name for name in own if name not in filled]


def _tied(name: str, config: FocusConfig) -> bool:
    return name == "heads.lm_head.weight" and config.llm.tie_embeddings
