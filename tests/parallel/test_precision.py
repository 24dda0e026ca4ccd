"""fp8: refused with the reason where it cannot run, else megatron-core's fields and paddings."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from engine.run import RunError
from engine.train import build_engine
from parallel import spec
from parallel.layout import MeshError, ParallelConfig
from parallel.mesh import open_mesh
from parallel.spec import length_multiple, transformer_config
from tests.parallel import ranks
from tests.parallel.small import CONFIG, SmallStage, small_run

LLM = CONFIG.llm


def test_fp8_without_a_card_for_it_is_refused_with_the_reason() -> None:
    if spec.fp8_problem() is None:
        pytest.skip("fp8 runs here")
    with pytest.raises(MeshError, match=r"precision=fp8 needs transformer-engine .* use precision"):
        transformer_config(LLM, ParallelConfig(), precision="fp8")


@pytest.mark.parametrize(
    ("capability", "reason"), [((8, 0), r"capability is 8\.0, at least 8\.9"), ((9, 0), "loaded")]
)
def test_the_reason_is_the_card_or_the_package(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], reason: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setitem(__import__("sys").modules, "transformer_engine.pytorch", None)
    with pytest.raises(MeshError, match=reason):
        transformer_config(LLM, ParallelConfig(), precision="fp8")


def test_fp8_sets_the_fields_of_megatron_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fields are checked by megatron-core's own dataclass; nothing is multiplied here."""
    monkeypatch.setattr(spec, "fp8_problem", lambda: None)
    found = transformer_config(LLM, ParallelConfig(), precision="fp8")
    assert (found.fp8, found.fp8_recipe, found.fp8_param) == ("hybrid", "tensorwise", False)
    assert found.bf16
    assert found.params_dtype == torch.bfloat16
    plain = transformer_config(LLM, ParallelConfig(), precision="bf16")
    assert plain.fp8 is None
    assert (length_multiple(plain), length_multiple(found)) == (1, 16)
    split = ParallelConfig(tp=2, cp=2, sequence_parallel=True)
    assert length_multiple(transformer_config(LLM, split, precision="fp8")) == 2 * 4 * 16
    odd = dataclasses.replace(LLM, ffn_dim=88)
    with pytest.raises(MeshError, match=r"widths that 16 divides, got {'llm.ffn_dim / tp': 88}"):
        transformer_config(odd, ParallelConfig(), precision="fp8")


def test_fp8_of_a_whole_model_is_refused() -> None:
    run = small_run(3, precision="fp8")
    with (
        open_mesh(ParallelConfig()) as mesh,
        pytest.raises(RunError, match=r"set parallel\.trunk=megatron, or precision=bf16"),
    ):
        build_engine(run, SmallStage(3), mesh)


def first_step(rank: int, precision: str) -> tuple[dict[str, float], list[int]]:
    """Terms of the first step, and the lengths that the first layer saw on this rank."""
    from engine.process import seed_everything
    from engine.run import derive_seed
    from engine.train import StepDataset, StepWork

    spec.fp8_problem = lambda: None
    layout = ParallelConfig(tp=2, sequence_parallel=True)
    run = small_run(3, parallel=layout, precision=precision)
    stage = SmallStage(3)
    lengths: list[int] = []
    with open_mesh(layout) as mesh:
        seed_everything(derive_seed(run.seed, "build"))
        engine: Any = build_engine(run, stage, mesh)
        engine.chunks[0].decoder.layers[0].register_forward_pre_hook(
            lambda _, args, options: lengths.append(options["hidden_states"].shape[0]),
            with_kwargs=True,
        )
        data = StepDataset(run, stage, mesh.data_rank, mesh.data_size)
        report = engine.step(0, data[0], StepWork(run, stage, 0, mesh))
    return dict(report.terms), lengths


@pytest.mark.distributed
def test_lengths_that_fp8_asks_for_change_no_loss() -> None:
    """Without transformer-engine megatron-core multiplies in bf16, so only the padding differs."""
    expected, short = ranks.run(2, first_step, "bf16")[0]
    found, padded = ranks.run(2, first_step, "fp8")[0]
    assert all(length % 16 == 0 for length in padded)
    assert any(length % 16 for length in short)
    assert found == pytest.approx(expected, rel=5e-3)
