"""The runs of Table 6: figures, freeze maps, batches on any number of GPUs, and their plans."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from fnmatch import fnmatchcase

import pytest
import torch

from engine.cli import main
from engine.data.feed import START, index_of, positions
from engine.dry_run import describe, render
from engine.run import Run, RunError, fit, from_json, override, to_json
from engine.runs import RUNS, find_run
from engine.runs_cluster import CLUSTER_RUNS, FOCUS_3B, SEQUENCES
from engine.stages.stage import Micro
from engine.workload import DRAWS, per_step, workload_of
from focus.model import FocusModel
from focus.presets import CONFIGS, focus_3b, focus_3b_512, focus_300m
from parallel.optimizer import freeze, rate_of
from parallel.planner import GPUS


@pytest.fixture(scope="module")
def model() -> FocusModel:
    with torch.device("meta"):
        return FocusModel(focus_300m())


def test_every_run_is_registered_under_its_name() -> None:
    for name, make in CLUSTER_RUNS.items():
        run = make()
        assert run.name == name
        assert RUNS[name] is make
        assert run.model in CONFIGS
        assert from_json(json.loads(json.dumps(to_json(run)))) == run


def test_every_run_starts_from_the_one_before_it() -> None:
    for scale in ("focus_3b", "focus_300m"):
        runs = [make() for make in SEQUENCES[scale]]
        assert [run.init_from for run in runs[1:]] == [run.name for run in runs[:-1]]


# Table 6, and appendix D where it is named: batch size, steps, rates, picture size.
TABLE_6: dict[str, tuple[int, int, set[float], int]] = {
    "focus_3b_stage1_tokenizer_256": (256, 136_000, {1e-4}, 256),
    "focus_3b_stage1_tokenizer_512": (256, 28_000, {1e-4}, 512),
    "focus_3b_stage1_diffusion_512": (128, 110_000, {2e-5}, 256),
    "focus_3b_stage1_diffusion_1024": (128, 110_000, {2e-5}, 512),
    "focus_3b_stage2": (512, 58_594, {1e-3}, 256),
    "focus_3b_stage3_256": (256, 167_969, {2e-5, 1e-3}, 256),
    "focus_3b_stage3_512": (128, 671_875, {2e-5, 1e-3}, 512),
    "focus_3b_stage4": (256, 37_110, {2e-5, 2e-6}, 512),
}


def test_figures_are_those_of_table_6() -> None:
    assert [make.__name__ for make in FOCUS_3B] == list(TABLE_6)
    for name, (batch, steps, rates, size) in TABLE_6.items():
        run = find_run(name)
        assert (run.batch, run.steps, set(run.rates.values())) == (batch, steps, rates)
        assert CONFIGS[run.model]().pixel.image_size == (size, size)
        assert (run.schedule, run.weight_decay, run.precision) == ("constant", 0.0, "bf16")


FROZEN = {
    "stage1_tokenizer_256": ("front.vanilla.*", "front.hierarchical.*", "trunk.*", "heads.*"),
    "stage1_diffusion_512": ("front.*", "trunk.*", "heads.segment.*", "heads.diffusion.vae.*"),
    "stage2": (
        "front.vanilla.*",
        "front.hierarchical.*",
        "front.tokenizer.*",
        "trunk.*",
        "heads.*",
    ),
    "stage3_256": ("front.vanilla.*", "front.hierarchical.*", "front.tokenizer.*", "*diffusion*"),
    "stage4": ("front.vanilla.*", "front.hierarchical.*", "front.tokenizer.*", "*.attn1.*"),
}


@pytest.mark.parametrize("stage", FROZEN)
def test_what_table_6_freezes_does_not_learn(model: FocusModel, stage: str) -> None:
    run = find_run(f"focus_300m_{stage}")
    rates = {glob: rate for glob, rate in run.rates.items() if not glob.startswith("scratch.")}
    learning = freeze(model, rates)  # raises when a glob matches nothing
    assert learning
    for name in learning:
        # the head is tied to the table, and learns with it
        assert not any(fnmatchcase(name, glob) for glob in FROZEN[stage]), name
    assert rates == {g: r for g, r in find_run(f"focus_3b_{stage}").rates.items() if g in rates}


def test_stage_4_trains_the_mask_attention_and_no_other_part_of_the_decoder(
    model: FocusModel,
) -> None:
    run = find_run("focus_300m_stage4")
    names = [name for name, _ in model.named_parameters() if "diffusion" in name]
    learning = {name for name in names if rate_of(name, run.rates) > 0}
    assert learning
    assert all(".attn2." in name or "mask_projection" in name for name in learning)


def test_three_hundred_million_parameters(model: FocusModel) -> None:
    count = sum(parameter.numel() for parameter in model.parameters())
    assert 270e6 < count < 340e6


def test_a_phase_changes_pictures_and_no_parameter() -> None:
    one, two = focus_3b(), focus_3b_512()
    assert two.vanilla.image_size == (504, 504)
    assert two.pixel.grid == (32, 32)
    assert dataclasses.replace(two, name=one.name, vanilla=one.vanilla, pixel=one.pixel) == one


@pytest.mark.parametrize("ranks", [1, 8, 32, 64])
def test_a_step_has_the_same_samples_on_any_number_of_ranks(ranks: int) -> None:
    for name, (batch, *_) in TABLE_6.items():
        run = fit(find_run(name), ranks)
        mixture = per_step(run)
        assert sum(size for _, size in mixture) * ranks == batch
        if len({task for task, _ in find_run(name).micro_batches}) > 1:
            assert [task for task, _ in run.micro_batches][:3] == [
                task for task, _ in find_run(name).micro_batches
            ][:3]


def test_a_batch_that_ranks_do_not_divide_is_refused() -> None:
    with pytest.raises(RunError, match=r"batch 256 needs micro-batches of one size, got \[4\]"):
        fit(find_run("focus_3b_stage3_256"), 48)
    mixed = dataclasses.replace(
        find_run("focus_3b_stage3_256"), micro_batches=(("vqa", 2), ("editing", 4))
    )
    with pytest.raises(RunError, match=r"got \[2, 4\]"):
        fit(mixed, 8)


def test_dry_run_counts_what_the_model_has() -> None:
    run = override(find_run("focus_tiny_stage3"), "parallel.tp=2", "parallel.pp=2")
    report = describe(run, 8, GPUS["h100"])
    with torch.device("meta"):
        whole = FocusModel(CONFIGS[run.model]())
    learning = freeze(whole, run.rates)
    named = dict(whole.named_parameters())
    trainable = sum(part["trainable"] for part in report["parts"])
    assert trainable == sum(named[name].numel() for name in learning)
    assert (report["layout"], report["engine"]) == ("tp2 pp2 dp2", "megatron-core")
    assert len(report["ranks"]) == 2
    trunk = next(part for part in report["parts"] if part["part"] == "trunk")
    for rank in report["ranks"]:
        assert 0.25 * trunk["trainable"] <= rank["trainable"] < trainable
        assert rank["total_gib"] > rank["weights_gib"] + rank["activations_gib"]
    per_sample = sum(part["step_flops"] for part in report["parts"])
    assert report["flops_per_step"] == pytest.approx(per_sample * report["samples_per_step"])
    text = "\n".join(render(report))
    assert "a model, not measured" in text
    assert "tp2 pp2 dp2" in text


@pytest.mark.slow
@pytest.mark.parametrize("make", FOCUS_3B, ids=lambda make: make.__name__)
def test_every_run_of_focus_3b_fits_eight_gpus(make: Callable[[], Run]) -> None:
    report = describe(make(), 8, GPUS["h100"])
    assert report["model_says"]["fits"]
    assert all(10 < rank["total_gib"] < 0.92 * 80e9 / 2**30 for rank in report["ranks"])


def test_what_a_run_parks_is_neither_trained_nor_counted(model: FocusModel) -> None:
    for make in CLUSTER_RUNS.values():
        run = make()
        for path in run.parked:
            model.get_submodule(path)
            assert not any(
                rate_of(name, run.rates)
                for name, _ in model.named_parameters()
                if name.startswith(f"{path}.")
            )
    run = find_run("focus_300m_stage1_diffusion_512")
    kept, all_parts = (workload_of(r).parts for r in (run, override(run, "parked=()")))
    assert all_parts.keys() - kept.keys() == {"trunk", "table", "segment"}


def test_plan_of_a_stage_that_is_not_split_offers_whole_models_alone(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["plan", "focus_300m_stage1_diffusion_512", "--gpus", "8"]) == 0
    text = capsys.readouterr().out
    assert "this stage is not split" in text
    assert "tp1 pp1 dp8" in text
    assert "tp2" not in text


def test_plan_command_ranks_layouts_and_names_what_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["plan", "focus_tiny_stage4", "--gpus", "8", "--batch", "64", "--json"]
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)["runs"][0]
    assert found["kind"] == "model, not measured"
    rates = [plan["samples_per_s"] for plan in found["plans"]]
    assert rates == sorted(rates, reverse=True)
    assert found["data"]["samples_per_s"] >= rates[0] * 0.99
    assert any(
        text.startswith("tp4 pp1: tp must divide llm.num_heads (6)") for text in found["refused"]
    )


def test_mixtures_hold_the_tasks_of_table_5() -> None:
    for name in ("focus_3b_stage3_256", "focus_3b_stage4"):
        tasks = [task for task, _ in find_run(name).micro_batches]
        assert DRAWS & set(tasks)
        assert "referring" in tasks
    assert [t for t, _ in find_run("focus_3b_stage2").micro_batches] == ["vqa"]


def test_a_stage_with_phases_is_a_sequence() -> None:
    from engine.commands.train import find_runs

    assert [run.name for run in find_runs("focus_3b_stage3")] == [
        "focus_3b_stage3_256",
        "focus_3b_stage3_512",
    ]
    assert len(find_runs("focus_300m")) == 11


@pytest.mark.parametrize("name", ["focus_3b_stage3_256", "focus_3b_stage2"])
def test_no_sample_is_lost_or_repeated_when_the_number_of_ranks_changes(name: str) -> None:
    """8 ranks for 5 steps, then 64 for 7, then 16 for 3: every row is read without a gap."""
    seen: dict[tuple[str, int], list[int]] = {}
    start: dict[str, object] = {}
    for first, last, ranks in ((0, 5, 8), (5, 12, 64), (12, 15, 16)):
        run = fit(find_run(name), ranks)
        run = dataclasses.replace(run, extra={**run.extra, START: start})
        mixture = run.micro_batches
        count = int(run.extra.get("tasks_per_step", len(mixture)))
        for step in range(first, last):
            for number in range(count):
                task, size = mixture[(step * count + number) % len(mixture)]
                for rank in range(ranks):
                    micro = Micro(number=number, task=task, size=size, rank=rank, ranks=ranks)
                    seen.setdefault((task, size), []).append(index_of(run, step, micro))
        start = positions(run, last, ranks)
    assert sum(size * len(rows) for (_, size), rows in seen.items()) == 15 * (run.batch or 0)
    for rows in seen.values():
        assert sorted(rows) == list(range(len(rows)))
