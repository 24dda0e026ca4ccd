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
    from engine.process import seed_everything
    from engine.run import derive_seed
    from engine.train import StepDataset, StepWork, build_engine
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
    whole, split = ParallelConfig(), ParallelConfig(**layout)
    saved: dict[str, dict[str, torch.Tensor]] = {}
    for name, ranks_, config, steps in (
        ("born", 1, whole, 0),
        ("split", size, split, 0),
        ("trained", 1, whole, 2),
        ("split_trained", size, split, 2),
    ):
        ranks.run(ranks_, export_after, config, steps, tmp_path / name)
        saved[name] = load_file(tmp_path / name)
    born, trained = saved["born"], saved["trained"]
    assert saved["split"].keys() == born.keys()
    assert all(torch.equal(saved["split"][name], born[name]) for name in born)
    # Adam blows up rounding where a gradient is zero but for rounding (biases before a norm), so
    # the trained weights are compared as a whole, against how far they moved.
    error = distance(saved["split_trained"], trained)
    assert error <= 0.01 * distance(born, trained)


def carried(rank: int, layout: ParallelConfig) -> float:
    """Bytes behind the tensors of a whole state over the bytes that they hold."""
    from engine.train import build_engine
    from parallel.export import whole_state
    from parallel.mesh import open_mesh

    run = small_run(3, parallel=layout)
    with open_mesh(layout) as mesh:
        engine = build_engine(run, SmallStage(3), mesh)
        state = whole_state(engine.chunks)  # type: ignore[attr-defined]
        stored = sum(t.untyped_storage().nbytes() for t in state.values())
        return stored / max(1, sum(t.nbytes for t in state.values()))


@pytest.mark.parametrize(("size", "layout"), [(1, {"trunk": "megatron"}), (2, {"pp": 2})])
def test_tensors_of_a_whole_state_carry_nothing_but_themselves(
    size: int, layout: dict[str, str | int]
) -> None:
    assert ranks.run(size, carried, ParallelConfig(**layout))[0] == 1  # type: ignore[arg-type]


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Euclidean distance of all weights."""
    squares = [float((one[n].double() - other[n].double()).square().sum()) for n in other]
    return sum(squares) ** 0.5
