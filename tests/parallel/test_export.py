"""A model that was split, trained and put together again equals the one trained whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from parallel.layout import ParallelConfig
from tests.parallel import ranks
from tests.parallel.small import SmallStage, small_run


def export_after(rank: int, layout: ParallelConfig, steps: int, path: Path) -> None:
    """Train a little, then write the whole model to `path`."""
    from engine.run import derive_seed
    from engine.train import StepDataset, StepWork, build_engine, seed_everything
    from parallel.export import export_model
    from parallel.mesh import open_mesh
    from parallel.tensors import unique_tensors, write_tensors

    run = small_run(3, parallel=layout)
    with open_mesh(layout) as mesh:
        seed_everything(derive_seed(run.seed, "build"))
        engine = build_engine(run, SmallStage(3), mesh)
        data = StepDataset(run, SmallStage(3), mesh.data_rank, mesh.data_size)
        for step in range(steps):
            engine.step(step, data[step], StepWork(run, SmallStage(3), step, mesh))
        if layout.megatron:
            export_model(engine.chunks, path)  # type: ignore[attr-defined]
        else:
            write_tensors(path, unique_tensors(engine.model.state_dict())[0])


@pytest.mark.parametrize(
    ("size", "layout"),
    [(2, {"tp": 2}), (2, {"pp": 2, "vpp": 2})],
    ids=["tp2", "pp2vpp2"],
)
def test_exported_weights_equal_those_of_one_process(
    tmp_path: Path, size: int, layout: dict[str, int]
) -> None:
    # Sums in another order reach the weights through Adam, which divides by small numbers.
    for steps, tolerance in ((0, 0.0), (2, 5e-5)):
        one, many = tmp_path / f"one{steps}", tmp_path / f"many{steps}"
        ranks.run(1, export_after, ParallelConfig(), steps, one)
        ranks.run(size, export_after, ParallelConfig(**layout), steps, many)
        expected, found = load_file(one), load_file(many)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            difference = float((found[name].double() - tensor.double()).abs().max())
            assert difference <= tolerance, name
        assert any(t.dtype == torch.float32 for t in found.values())
