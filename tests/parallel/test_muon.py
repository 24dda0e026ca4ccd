"""Matrices under Muon, the rest under AdamW: who owns what, what a step does, exact resumption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from focus.model import FocusModel
from focus.presets import focus_tiny
from parallel.engine import PlainEngine, build_optimizers
from parallel.layout import ParallelConfig
from parallel.mesh import MeshError, open_mesh
from parallel.optimizer import OptimizerConfig, RateError, freeze
from parallel.sections import Work
from parallel.split_engine import SplitEngine

RATES = {"*": 1e-2}
CONFIG = OptimizerConfig(rates=RATES, muon={"0.*": 0.05}, clip=0.0)


class Fit(Work):
    """Squared error of a small network; the batch is its input and target."""

    def seed(self, micro: int, section: str) -> None:
        """Nothing here is random."""

    def losses(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        """Return the one term."""
        return {"fit": F.mse_loss(model(batch[0]), batch[1])}


def network() -> nn.Module:
    """Return Linear, Tanh, Linear with the same weights each time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3))


def batch(number: int) -> tuple[Tensor, Tensor]:
    """Return the data of one step."""
    generator = torch.Generator().manual_seed(number)
    return torch.randn(16, 12, generator=generator), torch.randn(16, 3, generator=generator)


def engine(config: OptimizerConfig = CONFIG) -> PlainEngine:
    """Return the engine of one process."""
    with open_mesh(ParallelConfig()) as mesh:
        return PlainEngine(network(), config, mesh)


def test_every_parameter_has_one_owner_and_muon_only_matrices() -> None:
    model = network()
    rates = freeze(model, RATES)
    adam, muon = build_optimizers(dict(model.named_parameters()), rates, CONFIG)
    assert isinstance(adam, torch.optim.AdamW) and isinstance(muon, torch.optim.Muon)
    owned = [p for group in adam.param_groups for p in group["params"]]
    assert {id(p) for p in owned} == {id(p) for n, p in model.named_parameters() if n != "0.weight"}
    ((only,),) = [group["params"] for group in muon.param_groups]
    assert only is model[0].weight


def test_a_step_moves_the_matrix_evenly_in_all_directions() -> None:
    own = engine()
    before = own.model[0].weight.detach().clone()
    own.step(0, [batch(0)], Fit())
    moved = before - own.model[0].weight.detach()
    # Newton-Schulz in bfloat16 brings singular values near 1, in any case between .6 and 1.3.
    strengths = torch.linalg.svdvals(moved) / 0.05
    assert 0.6 < float(strengths.min()) and float(strengths.max()) < 1.3
    plain = engine(OptimizerConfig(rates=RATES, clip=0.0))
    plain.step(0, [batch(0)], Fit())
    torch.testing.assert_close(own.model[2].weight, plain.model[2].weight, rtol=0, atol=0)
    torch.testing.assert_close(own.model[0].bias, plain.model[0].bias, rtol=0, atol=0)
    assert not torch.allclose(own.model[0].weight, plain.model[0].weight)


def test_resuming_takes_the_same_steps(tmp_path: Path) -> None:
    uncut = engine()
    for number in range(6):
        uncut.step(number, [batch(number)], Fit())
        if number == 2:
            uncut.stage(tmp_path).write()
    again = engine()
    again.load(tmp_path)
    for number in range(3, 6):
        again.step(number, [batch(number)], Fit())
    for (name, a), b in zip(uncut.model.named_parameters(), again.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, msg=name)


def test_a_glob_without_matrix_and_a_split_model_are_refused() -> None:
    with pytest.raises(RateError, match=r"no matrix that learns: \['0.bias'\]"):
        engine(OptimizerConfig(rates=RATES, muon={"0.bias": 0.1}))
    with torch.device("meta"):
        whole = FocusModel(focus_tiny())
    config = OptimizerConfig(rates={"trunk.*": 1e-3}, muon={"trunk.*": 0.02})
    with open_mesh(ParallelConfig()) as mesh, pytest.raises(MeshError, match="Muon needs whole"):
        SplitEngine(whole, config, ParallelConfig(tp=2), mesh)
