"""Every named run: one function each, returned by name. Numbers of training live here only.

`focus_tiny_*` train the shipped model from nothing on two CPU cores, in the order of
`TINY_SEQUENCE`. Stage 0 stands in for the public checkpoints that full scale imports. Rates are
larger and steps fewer than the paper's, which start from pretrained parts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from engine.run import Run, RunError
from engine.runs_cluster import CLUSTER_RUNS

Mixture = tuple[tuple[str, int], ...]

# Which parameters each stage trains (Table 6); anything else is frozen.
PROJECTORS = (
    "front.fusion.mlp.*",
    "front.fusion.project.*",
    "front.fusion.out_norm.*",
    "front.pixel_project.*",
    "front.adapter.*",
    "front.region_pooler.*",
    "front.position.*",
    "front.next_position.*",
    "front.mask_queries",
)
GATES = ("front.adapter.*_gate",)  # from zero, they would take the whole run to open
LANGUAGE = ("trunk.*", "front.token_embedding.*")  # the head is tied to the table
MASK_DECODER = ("heads.segment.*",)
MASK_ATTENTION = ("*.attn2.*", "heads.diffusion.mask_projection.*")
# The fusion's cross-attention would train here too: it has learnt in stage 0 what reconstruction
# does not ask for, and keeps it.
TOKENIZER = ("front.tokenizer.*", "scratch.*")

# What every run of all tasks together weighs and drops alike.
JOINT = {
    "tasks_per_step": 2,
    "segment_weight": 0.1,
    "target_repeats": 6,
    "swap_names": 0.4,
    "edit_token_weight": 3.0,
    "drop_text": 0.1,
    "blank_codes": 0.7,
}


def _rates(rate: float, *groups: tuple[str, ...]) -> dict[str, float]:
    return {glob: rate for group in groups for glob in group}


def focus_tiny_stage0_vision() -> Run:
    """Both encoders and their fusion from nothing, standing in for public checkpoints."""
    return Run(
        name="focus_tiny_stage0_vision",
        stage="foundation",
        model="focus_tiny",
        steps=1500,
        micro_batches=(("dense", 16),),
        rates={
            "scratch.*": 2e-3,
            "front.vanilla.*": 1e-3,
            "front.hierarchical.*": 2e-3,
            "front.fusion.attention.*": 2e-3,
            "front.fusion.mlp.*": 2e-3,
        },
        schedule="cosine",
        warmup=100,
        floor=0.02,
        precision="bf16",
        save_every=250,
        panel_every=0,
        extra={"here": True},
    )


def focus_tiny_stage0_latent() -> Run:
    """The VAE from nothing, standing in for SDXL's."""
    return Run(
        name="focus_tiny_stage0_latent",
        stage="foundation",
        model="focus_tiny",
        steps=3000,
        micro_batches=(("latent", 8),),
        rates={"heads.diffusion.vae.*": 1e-3},
        schedule="cosine",
        warmup=50,
        floor=0.02,
        precision="bf16",
        init_from="focus_tiny_stage0_vision",
        save_every=250,
        panel_every=0,
    )


def focus_tiny_stage0_language() -> Run:
    """Trunk and token table on the world's text, standing in for a public language model."""
    return Run(
        name="focus_tiny_stage0_language",
        stage="foundation",
        model="focus_tiny",
        steps=200,
        micro_batches=(("text", 64),),
        rates=_rates(1e-3, LANGUAGE),
        schedule="cosine",
        warmup=30,
        floor=0.1,
        precision="bf16",
        init_from="focus_tiny_stage0_latent",
        save_every=100,
        panel_every=0,
    )


def focus_tiny_stage1_tokenizer() -> Run:
    """Dual tokenizer (stage 1a)."""
    return Run(
        name="focus_tiny_stage1_tokenizer",
        stage="tokenizer",
        model="focus_tiny",
        steps=1300,
        micro_batches=(("vqa", 12),),
        rates=_rates(1e-3, TOKENIZER),
        schedule="cosine",
        warmup=100,
        floor=0.02,
        precision="bf16",
        init_from="focus_tiny_stage0_language",
        save_every=250,
        extra={
            "gan_channels": 16,
            "gan_weight": 0.005,  # the paper's 0.5 wrecks a decoder of 1 M parameters
            "gan_start": 1000,
            "gan_warm": 900,
            "perceptual": 0.1,
        },
    )


def focus_tiny_stage1_diffusion() -> Run:
    """Diffusion decoder on frozen codes (stage 1b)."""
    return Run(
        name="focus_tiny_stage1_diffusion",
        stage="diffusion",
        model="focus_tiny",
        steps=1500,
        micro_batches=(("vqa", 16),),
        rates={"heads.diffusion.unet.*": 1e-3},
        schedule="cosine",
        warmup=100,
        floor=0.05,
        precision="bf16",
        init_from="focus_tiny_stage1_tokenizer",
        save_every=250,
        extra={"measure_latents": True},
    )


def focus_tiny_stage2() -> Run:
    """Projector warm-up: image to text, everything but projections, adapter and new rows frozen."""
    return Run(
        name="focus_tiny_stage2",
        stage="warmup",
        model="focus_tiny",
        steps=100,
        micro_batches=(("vqa", 32),),
        rates=_rates(1e-2, GATES) | _rates(1e-3, PROJECTORS, ("front.token_embedding.*",)),
        warmup=20,
        precision="bf16",
        init_from="focus_tiny_stage1_diffusion",
        save_every=100,
        panel_every=0,
        extra={"segmentation": False, "whiten": 256},
    )


def focus_tiny_reading() -> Run:
    """A fresh trunk learns to look up what a question names, in pictures spelled out in words."""
    return Run(
        name="focus_tiny_reading",
        stage="reading",
        model="focus_tiny",
        steps=1200,
        micro_batches=(("vqa", 14),),
        rates=_rates(3e-4, ("front.token_embedding.*",))
        | _rates(1e-3, ("trunk.*", "front.position.*", "front.next_position.*", "pointer.*")),
        muon={"trunk.*": 0.02},
        schedule="cosine",
        floor=0.1,
        warmup=30,
        precision="bf16",
        init_from="focus_tiny_stage2",
        save_every=100,
        panel_every=0,
        extra={
            "segmentation": False,
            "spelled": True,
            "direct": True,
            "afresh": True,
            "nearby": True,
            "spread": 0.0,
        },
    )


def focus_tiny_asking() -> Run:
    """Questions of every kind about pictures spelled out: relations, places, descriptions."""
    first = focus_tiny_reading()
    return replace(
        first,
        name="focus_tiny_asking",
        steps=400,
        muon={"trunk.*": 0.01},
        warmup=10,
        init_from="focus_tiny_reading",
        extra={"segmentation": False, "spelled": True, "spread": 0.0},
    )


def focus_tiny_seeing() -> Run:
    """The same lookup in pictures, their tokens aligned with words; and the other tasks begin."""
    return Run(
        name="focus_tiny_seeing",
        stage="reading",
        model="focus_tiny",
        steps=1700,
        micro_batches=(
            ("generation", 20),
            ("vqa", 14),
            ("editing", 12),
            ("referring", 14),
            ("generation", 20),
            ("interactive", 12),
            ("editing", 12),
            ("vqa", 14),
            ("referring", 14),
            ("class", 10),
            ("editing", 12),
            ("referring", 14),
            ("vqa", 14),
            ("reasoning", 10),
        ),
        rates=_rates(3e-4, ("front.token_embedding.*", "front.position.*", "front.adapter.*"))
        | _rates(3e-4, ("front.pixel_project.*", "front.fusion.mlp.*", "front.fusion.project.*"))
        | _rates(5e-4, ("trunk.*", "front.next_position.*"))
        | _rates(1e-3, MASK_DECODER, ("front.mask_queries", "*pointer.*"))
        | _rates(2e-4, ("front.region_pooler.*",)),
        muon={"trunk.*": 0.006, "heads.segment.*": 0.004},
        # Muon moves every direction of a matrix alike. Without decay those that nothing asks for
        # grow until they drown the rest: singular values of 6 in the median, and no word learnt.
        weight_decay=0.5,
        schedule="cosine",
        floor=0.02,
        warmup=20,
        precision="bf16",
        init_from="focus_tiny_asking",
        save_every=100,
        panel_every=0,
        extra={
            **JOINT,
            "segment_weight": 0.08,  # of four mask terms, beside one of words
            "point_weight": 0.4,
            "spread": 0.0,
            "align": 768,
            "align_share": 2.0,
            "mask_layer": 4,
            "draw_layer": 2,
            "class_layer": 2,
            "unpaired": True,
        },
    )


def focus_tiny_stage3() -> Run:
    """Multimodal pretraining with segmentation: trunk, adapters and mask decoder."""
    return Run(
        name="focus_tiny_stage3",
        stage="pretrain",
        model="focus_tiny",
        steps=2000,
        micro_batches=(
            ("vqa", 14),
            ("referring", 14),
            ("class", 8),
            ("generation", 12),
            ("vqa", 14),
            ("interactive", 12),
            ("editing", 10),
            ("referring", 14),
        ),
        rates=_rates(1e-2, GATES) | _rates(1e-3, LANGUAGE, PROJECTORS, MASK_DECODER),
        warmup=100,
        precision="bf16",
        init_from="focus_tiny_seeing",
        save_every=100,
        panel_every=300,
        extra=JOINT,
    )


def focus_tiny_stage4() -> Run:
    """Instruction tuning for region-controlled editing: plus the decoder's mask attention."""
    return Run(
        name="focus_tiny_stage4",
        stage="instruct",
        model="focus_tiny",
        steps=1000,
        micro_batches=(
            ("vqa", 14),
            ("editing", 10),
            ("referring", 14),
            ("generation", 12),
            ("class", 8),
            ("editing", 10),
            ("interactive", 12),
            ("vqa", 14),
            ("reasoning", 10),
            ("editing", 10),
            ("referring", 14),
            ("generation", 12),
        ),
        rates=_rates(7e-4, LANGUAGE, MASK_DECODER) | _rates(5e-4, PROJECTORS, MASK_ATTENTION),
        schedule="cosine",
        warmup=20,
        floor=0.02,
        precision="bf16",
        init_from="focus_tiny_stage3",
        save_every=100,
        panel_every=250,
        extra={
            **JOINT,
            "true_mask": 0.5,
        },
    )


TINY_SEQUENCE: tuple[Callable[[], Run], ...] = (
    focus_tiny_stage0_vision,
    focus_tiny_stage0_latent,
    focus_tiny_stage0_language,
    focus_tiny_stage1_tokenizer,
    focus_tiny_stage1_diffusion,
    focus_tiny_stage2,
    focus_tiny_reading,
    focus_tiny_asking,
    focus_tiny_seeing,
    focus_tiny_stage3,
    focus_tiny_stage4,
)
RUNS: dict[str, Callable[[], Run]] = {run.__name__: run for run in TINY_SEQUENCE} | CLUSTER_RUNS


def find_run(name: str) -> Run:
    """Return the run of that name; raises `RunError` that lists the known ones."""
    if name not in RUNS:
        raise RunError(f"a run of {', '.join(RUNS)} expected, got {name!r}")
    return RUNS[name]()
