"""Steps of stages 2, 3 and 4 at every layout equal one process."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from engine.run import Run
from parallel.layout import ParallelConfig
from tests.parallel import ranks
from tests.parallel.small import TASKS, TEXT_ROWS, SmallStage, small_run

STEPS = 3  # in every run of the tests; the slow ones do twenty
# At the rates of `small` a matching of masks flips after a dozen steps, on rounding alone.
GENTLE = 0.1
Curve = list[tuple[dict[str, float], float]]


def curves(
    rank: int, layout: ParallelConfig, stages: tuple[int, ...], steps: int, changes: dict[str, Any]
) -> dict[int, Curve]:
    """(terms, gradient norm) of every step of each stage."""
    from engine.process import seed_everything
    from engine.run import derive_seed
    from engine.train import StepDataset, StepWork, build_engine
    from parallel.mesh import open_mesh

    found: dict[int, Curve] = {}
    for number in stages:
        data = 1 if layout.data_size(ranks.world()) == 1 else 2
        tasks = changes.get("micro_batches", TASKS[number])[::data]
        run = small_run(number, **{**changes, "parallel": layout, "micro_batches": tasks})
        if steps == 20:
            run = gentle(run)
        stage = SmallStage(number)
        with open_mesh(layout) as mesh:
            seed_everything(derive_seed(run.seed, "build"))
            engine = build_engine(run, stage, mesh)
            data_set = StepDataset(run, stage, mesh.data_rank, mesh.data_size)
            found[number] = []
            for step in range(steps):
                report = engine.step(step, data_set[step], StepWork(run, stage, step, mesh))
                found[number].append((dict(report.terms), report.grad_norm))
    return found


def gentle(run: Run) -> Run:
    """The run at a tenth of its rates."""
    return dataclasses.replace(run, rates={g: GENTLE * rate for g, rate in run.rates.items()})


def run(
    size: int,
    layout: ParallelConfig,
    stages: tuple[int, ...] = (2, 3, 4),
    steps: int = STEPS,
    **changes: Any,
) -> dict[int, Curve]:
    answers = ranks.run(size, curves, layout, stages, steps, changes)
    assert all(answer == answers[0] for answer in answers), "ranks report different numbers"
    found: dict[int, Curve] = answers[0]
    return found


@pytest.fixture(scope="module")
def single() -> dict[int, Curve]:
    return run(1, ParallelConfig())


def worst(found: Curve, expected: Curve) -> float:
    """Largest relative difference of any loss term or gradient norm over all steps."""
    largest = 0.0
    for (terms, norm), (true_terms, true_norm) in zip(found, expected, strict=True):
        assert terms.keys() == true_terms.keys()
        for name, value in terms.items():
            largest = max(largest, abs(value - true_terms[name]) / abs(true_terms[name]))
        largest = max(largest, abs(norm - true_norm) / true_norm)
    return largest


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "megatron": (1, {"trunk": "megatron"}),
    "tp2": (2, {"tp": 2}),
    "tp2sp": (2, {"tp": 2, "sequence_parallel": True}),
    "pp2": (2, {"pp": 2}),
    "tp2pp2": (4, {"tp": 2, "pp": 2}),
    "tp2pp2sp": (4, {"tp": 2, "pp": 2, "sequence_parallel": True}),
    "dp2": (2, {"trunk": "megatron"}),
    "dp2plain": (2, {}),
    "dp2tp2": (4, {"tp": 2}),
    "dp2pp2": (4, {"pp": 2}),
    "cp2": (2, {"cp": 2}),
    "cp2pp2": (4, {"cp": 2, "pp": 2}),
    "recompute": (1, {"trunk": "megatron", "recompute": "full"}),
}


QUICK = ("tp2sp", "pp2", "dp2", "dp2plain", "cp2")


@pytest.mark.parametrize("name", QUICK)
def test_a_few_steps_equal_one_process(name: str, single: dict[int, Curve]) -> None:
    size, layout = LAYOUTS[name]
    found = run(size, ParallelConfig(**layout))
    for stage, curve in found.items():
        assert worst(curve, single[stage]) <= 1e-4, f"stage {stage}"


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_twenty_steps_equal_one_process(name: str, whole: dict[int, Curve]) -> None:
    first, last = whole[3][0][0], whole[3][-1][0]
    assert abs(last["editing/bce"] - first["editing/bce"]) > 1  # the losses move
    size, layout = LAYOUTS[name]
    found = run(size, ParallelConfig(**layout), steps=20)
    for stage, curve in found.items():
        assert worst(curve, whole[stage]) <= 1e-4, f"stage {stage}"


@pytest.fixture(scope="module")
def whole() -> dict[int, Curve]:
    return run(1, ParallelConfig(), steps=20)


# One micro-batch has no picture, and lengths differ: the interleaved schedule pads both.
ONE_SIZE = (("editing", 1), ("vqa", 1), ("interactive", 1), ("editing", 1))


def test_interleaved_pipeline_and_four_ranks_equal_one_process() -> None:
    expected = run(1, ParallelConfig(), (3,), micro_batches=ONE_SIZE)[3]
    for size, layout in ((2, ParallelConfig(pp=2, vpp=2)), (4, ParallelConfig(tp=2, pp=2))):
        found = run(size, layout, (3,), micro_batches=ONE_SIZE)[3]
        assert worst(found, expected) <= 1e-4, layout


@pytest.mark.slow
def test_twenty_steps_of_an_interleaved_pipeline_equal_one_process() -> None:
    expected = run(1, ParallelConfig(), steps=20, micro_batches=ONE_SIZE)
    found = run(2, ParallelConfig(pp=2, vpp=2), steps=20, micro_batches=ONE_SIZE)
    for stage, curve in found.items():
        assert worst(curve, expected[stage]) <= 1e-4, f"stage {stage}"


def test_untied_tables_equal_one_process() -> None:
    changes: dict[str, Any] = {"extra": {"stage": 3, "tied": False}}
    changes["rates"] = {**small_run(3).rates, "heads.lm_head.weight": 5e-4}
    expected = run(1, ParallelConfig(), (3,), 3, **changes)[3]
    found = run(2, ParallelConfig(pp=2), (3,), 3, **changes)[3]
    assert worst(found, expected) <= 1e-4


def test_interleaving_refuses_micro_batches_of_several_sizes() -> None:
    with pytest.raises(AssertionError, match=r"vpp above 1 needs micro-batches of one size"):
        run(2, ParallelConfig(pp=2, vpp=2), (4,), 1)


def table_after(rank: int, layout: ParallelConfig) -> list[float]:
    """How far each row of this rank's shard of the token table moves in a step of stage 2."""
    from engine.process import seed_everything
    from engine.run import derive_seed
    from engine.train import StepDataset, StepWork, build_engine
    from parallel.mesh import open_mesh

    run = small_run(2, parallel=layout)
    with open_mesh(layout) as mesh:
        seed_everything(derive_seed(run.seed, "build"))
        engine = build_engine(run, SmallStage(2), mesh)
        before = [p.detach().clone() for n, p in engine.model.named_parameters() if is_table(n)]
        data = StepDataset(run, SmallStage(2), mesh.data_rank, mesh.data_size)
        engine.step(0, data[0], StepWork(run, SmallStage(2), 0, mesh))
        after = [p.detach() for n, p in engine.model.named_parameters() if is_table(n)]
    moved: list[float] = (after[0] - before[0]).abs().amax(1).tolist()
    return moved


def is_table(name: str) -> bool:
    return name.endswith(("word_embeddings.weight", "token_embedding.weight"))


@pytest.mark.parametrize("tp", [1, 2])
def test_frozen_rows_of_the_token_table_stay(tp: int) -> None:
    layout = ParallelConfig(tp=tp, trunk="auto" if tp == 1 else "megatron")
    moved = [row for shard in ranks.run(tp, table_after, layout) for row in shard]
    assert max(moved[:TEXT_ROWS]) == 0
    assert max(moved[TEXT_ROWS:]) > 0


def gradients(rank: int, layout: ParallelConfig) -> dict[str, Any]:
    """Gradient of every learning parameter of this rank in step 0 of stage 3, by our names.

    As arrays, which outlive their process.
    """
    from engine.process import seed_everything
    from engine.run import derive_seed
    from engine.train import StepDataset, StepWork, build_engine
    from parallel.mesh import open_mesh
    from parallel.weight_map import unshard

    run = small_run(3, parallel=layout)
    found: dict[str, torch.Tensor] = {}
    with open_mesh(layout) as mesh:
        seed_everything(derive_seed(run.seed, "build"))
        engine: Any = build_engine(run, SmallStage(3), mesh)
        data = StepDataset(run, SmallStage(3), mesh.data_rank, mesh.data_size)
        # Clipping scales gradients in place; with the largest of limits it leaves them alone.
        engine.config = dataclasses.replace(engine.config, clip=1e9)
        engine.step(0, data[0], StepWork(run, SmallStage(3), 0, mesh))
        if not layout.megatron:
            return {n: p.grad.numpy() for n, p in engine.learning.items() if p.grad is not None}
        for chunk in engine.chunks:
            for name, parameter in chunk.named_parameters():
                if parameter.requires_grad and not name.startswith("llm."):
                    found[name] = parameter.main_grad.clone()
            for _, parameter, made_of in chunk.llm.entries():
                if parameter.requires_grad:
                    found.update(unshard(made_of, [parameter.main_grad.clone()], chunk.llm.llm))
    return {name: tensor.numpy() for name, tensor in found.items()}


def test_gradients_of_front_trunk_and_heads_equal_one_process() -> None:
    expected = ranks.run(1, gradients, ParallelConfig())[0]
    parts: dict[str, Any] = {}
    for answer in ranks.run(2, gradients, ParallelConfig(pp=2)):
        parts.update(answer)
    assert parts.keys() >= expected.keys()
    for section in ("front.", "trunk.", "heads."):
        names = [name for name in expected if name.startswith(section)]
        largest = max(float(abs(expected[name]).max()) for name in names)
        assert largest > 0
        for name in names:
            error = float(abs(parts[name] - expected[name]).max())
            # Biases before a norm have a gradient of rounding alone, hence the second bound.
            scale = float(abs(expected[name]).max())
            assert error <= max(1e-4 * scale, 1e-7 * largest), name
