"""Runs for clusters: the four stages of Table 6 for focus_3b and, ten times smaller, focus_300m.

Rates, batch sizes, steps and picture sizes are Table 6's and appendix D's; where the two disagree
the docstring of the run says which is taken. A phase with another picture size is a run of its own
(`focus_3b_stage3_512`); the name of the stage means both, in order (`SEQUENCES`).

focus_3b starts from public checkpoints (`focus import --out runs/focus_3b_import`) and reads Qwen's
tokenizer from the folder that FOCUS_TOKENIZER names. focus_300m starts from nothing, in the
built-in world, as focus_tiny does; both read shards when `extra.shards` names a folder.
`batch` is the number of samples per step over all ranks, so a step is the same on 8 GPUs and on 64;
micro-batches are small enough that 64 ranks fill them, so the order of samples stays the same too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from engine.run import Mixture, Run
from parallel.layout import ParallelConfig

# Which parameters each stage trains; anything else is frozen (Table 6, "Frozen Modules").
TOKENIZER = ("front.fusion.attention.*", "front.tokenizer.*", "scratch.*")
DECODER = ("heads.diffusion.unet.*",)
PROJECTORS = (
    "front.fusion.mlp.*",
    "front.fusion.project.*",
    "front.pixel_project.*",
    "front.adapter.*",
    "front.region_pooler.*",
    "front.mask_queries",
)
LANGUAGE = ("trunk.*", "front.token_embedding.*")  # the head is tied to the table
MASK_DECODER = ("heads.segment.*",)
MASK_ATTENTION = ("*.attn2.*", "heads.diffusion.mask_projection.*")

# What a stage never calls, and leaves in host memory.
LANGUAGE_PARTS = ("trunk", "front.token_embedding", "heads.lm_head", "heads.segment")

# Stages 2 to 4 run on megatron-core with its distributed optimizer even where nothing is split.
MEGATRON = ParallelConfig(trunk="megatron")

# Samples of an epoch: the sums of Table 5's lines.
WARMUP, PRETRAIN, INSTRUCT = 30_000_000, 43_000_000, 9_500_000


def _rates(rate: float, *groups: tuple[str, ...]) -> dict[str, float]:
    return {glob: rate for group in groups for glob in group}


def _mixture(size: int, **turns: int) -> Mixture:
    """Task-homogeneous micro-batches of one size, each task as often as told, spread evenly."""
    total = sum(turns.values())
    places = [
        ((turn + 0.5) * total / count, task)
        for task, count in turns.items()
        for turn in range(count)
    ]
    return tuple((task, size) for _, task in sorted(places))


def _run(
    name: str,
    stage: str,
    model: str,
    after: str,
    *,
    samples: int = 0,
    steps: int = 0,
    batch: int,
    extra: Mapping[str, Any] | None = None,
    **fields: Any,
) -> Run:
    """A run that goes on for weeks: constant rate, bf16, no panels, a few skips allowed.

    Checkpoints are written while training goes on.
    """
    return Run(
        name=name,
        stage=stage,
        model=model,
        init_from=after,
        steps=steps or -(-samples // batch),
        batch=batch,
        precision="bf16",
        warmup=200,
        save_every=500,
        keep=3,
        async_save=True,
        skips=20,
        workers=8,
        panel_every=0,
        measure_flops=True,
        extra=dict(extra or {}),
        **fields,
    )


def _tokenizer(scale: str, size: int, steps: int, micro: int, after: str) -> Run:
    extra: dict[str, Any] = {"gan_start": 20_000, "gan_warm": 20_000, "code_noise": 0.1}
    if size == 512:
        extra = {"gan_start": 0, "gan_warm": 0}  # the discriminator goes on from the first phase
    return _run(
        f"{scale}_stage1_tokenizer_{size}",
        "tokenizer",
        scale if size == 256 else f"{scale}_512",
        after,
        steps=steps,
        batch=256,
        micro_batches=(("vqa", micro),),
        rates=_rates(1e-4, TOKENIZER),
        parked=(*LANGUAGE_PARTS, "heads.diffusion"),
        extra=extra,
    )


def _diffusion(scale: str, size: int, steps: int, micro: int, after: str) -> Run:
    return _run(
        f"{scale}_stage1_diffusion_{size}",
        "diffusion",
        scale if size == 512 else f"{scale}_512",
        after,
        steps=steps,
        batch=128,
        micro_batches=(("vqa", micro),),
        rates=_rates(2e-5, DECODER),
        parked=LANGUAGE_PARTS,
    )


def _stage2(scale: str, micro: int, after: str) -> Run:
    return _run(
        f"{scale}_stage2",
        "warmup",
        scale,
        after,
        samples=WARMUP,
        batch=512,
        micro_batches=_mixture(micro, vqa=1),
        parallel=MEGATRON,
        rates=_rates(1e-3, PROJECTORS, ("front.token_embedding.*",)),
        parked=("heads.segment", "heads.diffusion"),
        extra={"segmentation": False},
    )


def _stage3(scale: str, size: int, micro: int, after: str) -> Run:
    batch, epochs = (256, 1) if size == 256 else (128, 2)
    return _run(
        f"{scale}_stage3_{size}",
        "pretrain",
        scale if size == 256 else f"{scale}_512",
        after,
        samples=epochs * PRETRAIN,
        batch=batch,
        micro_batches=_mixture(micro, editing=12, generation=2, vqa=4, referring=1, **{"class": 1}),
        parallel=MEGATRON,
        rates=_rates(2e-5, LANGUAGE, PROJECTORS) | _rates(1e-3, MASK_DECODER),
        parked=("heads.diffusion",),
    )


def _stage4(scale: str, micro: int, after: str, layout: ParallelConfig = MEGATRON) -> Run:
    return _run(
        f"{scale}_stage4",
        "instruct",
        f"{scale}_512",
        after,
        samples=INSTRUCT,
        batch=256,
        micro_batches=_mixture(micro, editing=7, vqa=7, reasoning=2, referring=2, interactive=1),
        parallel=layout,
        rates=_rates(2e-5, LANGUAGE) | _rates(2e-6, MASK_DECODER, MASK_ATTENTION),
    )


def focus_3b_stage1_tokenizer_256() -> Run:
    """Dual tokenizer at 256 pixels, 136k steps; one rate, 1e-4 (appendix D, not Table 6)."""
    return _tokenizer("focus_3b", 256, 136_000, 4, "focus_3b_import")


def focus_3b_stage1_tokenizer_512() -> Run:
    """Dual tokenizer at 512 pixels, 28k steps (appendix D)."""
    return _tokenizer("focus_3b", 512, 28_000, 2, "focus_3b_stage1_tokenizer_256")


def focus_3b_stage1_diffusion_512() -> Run:
    """Diffusion decoder to 512 pixels from 256-pixel codes; half of Table 6's 220k steps."""
    return _diffusion("focus_3b", 512, 110_000, 2, "focus_3b_stage1_tokenizer_512")


def focus_3b_stage1_diffusion_1024() -> Run:
    """Diffusion decoder to 1024 pixels from 512-pixel codes; the other half."""
    return _diffusion("focus_3b", 1024, 110_000, 1, "focus_3b_stage1_diffusion_512")


def focus_3b_stage2() -> Run:
    """Projector warm-up at 256 pixels, one epoch of 30M; new rows of the token table learn too."""
    return _stage2("focus_3b", 8, "focus_3b_stage1_diffusion_1024")


def focus_3b_stage3_256() -> Run:
    """Pretraining at 256 pixels, one epoch of 43M at batch 256 (appendix D).

    Both encoders stay frozen (section 3.5 and appendix B): the tokenizer reads the same vanilla
    encoder, so its codes would drift. Table 6's reading is `--set "rates.front.vanilla.*=2e-5"`.
    """
    return _stage3("focus_3b", 256, 4, "focus_3b_stage2")


def focus_3b_stage3_512() -> Run:
    """Pretraining at 512 pixels, two epochs at batch 128 (appendix D)."""
    return _stage3("focus_3b", 512, 2, "focus_3b_stage3_256")


def focus_3b_stage4() -> Run:
    """Instruction tuning: trunk, mask decoder, mask attention; codes of 512, drawn at 1024.

    One sample at a time and the trunk's activations computed again, or it would not fit 80 GB.
    """
    layout = ParallelConfig(trunk="megatron", recompute="full")
    return _stage4("focus_3b", 1, "focus_3b_stage3_512", layout)


def _world(number: str, task: str, size: int, after: str | None, rates: dict[str, float]) -> Run:
    """A part of stage 0, which stands in for public checkpoints."""
    return Run(
        name=f"focus_300m_stage0_{number}",
        stage="foundation",
        model="focus_300m",
        steps=20_000,
        micro_batches=((task, size),),
        rates=rates,
        schedule="cosine",
        warmup=500,
        floor=0.02,
        precision="bf16",
        init_from=after,
        save_every=1000,
        skips=20,
        workers=8,
        panel_every=0,
    )


def focus_300m_stage0_vision() -> Run:
    """Both encoders from nothing in the built-in world."""
    rates = {"scratch.*": 1e-3, "front.vanilla.*": 5e-4, "front.hierarchical.*": 1e-3}
    return _world("vision", "dense", 32, None, rates)


def focus_300m_stage0_latent() -> Run:
    """The VAE from nothing."""
    rates = {"heads.diffusion.vae.*": 5e-4}
    return _world("latent", "latent", 32, "focus_300m_stage0_vision", rates)


def focus_300m_stage0_language() -> Run:
    """Trunk and token table on the world's text."""
    return _world("language", "text", 128, "focus_300m_stage0_latent", _rates(5e-4, LANGUAGE))


def focus_300m_stage1_tokenizer_256() -> Run:
    """As focus_3b's."""
    return _tokenizer("focus_300m", 256, 136_000, 4, "focus_300m_stage0_language")


def focus_300m_stage1_tokenizer_512() -> Run:
    """As focus_3b's."""
    return _tokenizer("focus_300m", 512, 28_000, 4, "focus_300m_stage1_tokenizer_256")


def focus_300m_stage1_diffusion_512() -> Run:
    """As focus_3b's."""
    return _diffusion("focus_300m", 512, 110_000, 2, "focus_300m_stage1_tokenizer_512")


def focus_300m_stage1_diffusion_1024() -> Run:
    """As focus_3b's."""
    return _diffusion("focus_300m", 1024, 110_000, 2, "focus_300m_stage1_diffusion_512")


def focus_300m_stage2() -> Run:
    """As focus_3b's."""
    return _stage2("focus_300m", 8, "focus_300m_stage1_diffusion_1024")


def focus_300m_stage3_256() -> Run:
    """As focus_3b's."""
    return _stage3("focus_300m", 256, 4, "focus_300m_stage2")


def focus_300m_stage3_512() -> Run:
    """As focus_3b's."""
    return _stage3("focus_300m", 512, 2, "focus_300m_stage3_256")


def focus_300m_stage4() -> Run:
    """As focus_3b's."""
    return _stage4("focus_300m", 2, "focus_300m_stage3_512")


Make = Callable[[], Run]
FOCUS_3B: tuple[Make, ...] = (
    focus_3b_stage1_tokenizer_256,
    focus_3b_stage1_tokenizer_512,
    focus_3b_stage1_diffusion_512,
    focus_3b_stage1_diffusion_1024,
    focus_3b_stage2,
    focus_3b_stage3_256,
    focus_3b_stage3_512,
    focus_3b_stage4,
)
FOCUS_300M: tuple[Make, ...] = (
    focus_300m_stage0_vision,
    focus_300m_stage0_latent,
    focus_300m_stage0_language,
    focus_300m_stage1_tokenizer_256,
    focus_300m_stage1_tokenizer_512,
    focus_300m_stage1_diffusion_512,
    focus_300m_stage1_diffusion_1024,
    focus_300m_stage2,
    focus_300m_stage3_256,
    focus_300m_stage3_512,
    focus_300m_stage4,
)
CLUSTER_RUNS: dict[str, Make] = {run.__name__: run for run in (*FOCUS_300M, *FOCUS_3B)}


def _sequences() -> dict[str, tuple[Make, ...]]:
    """Every scale as a whole, and every stage that has phases."""
    found: dict[str, tuple[Make, ...]] = {}
    for scale, runs in (("focus_300m", FOCUS_300M), ("focus_3b", FOCUS_3B)):
        found[scale] = runs
        for stage in ("stage0", "stage1", "stage1_tokenizer", "stage1_diffusion", "stage3"):
            chosen = tuple(r for r in runs if r.__name__.startswith(f"{scale}_{stage}_"))
            if chosen:
                found[f"{scale}_{stage}"] = chosen
    return found


SEQUENCES = _sequences()
