"""The planner's memory against real steps, and what its tables must say."""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.train import StepDataset, StepWork, build_engine
from focus.presets import focus_3b
from parallel.layout import ParallelConfig
from parallel.mesh import open_mesh
from parallel.planner import GPUS, PlanError, activation_bytes, plan, render, weight_bytes
from parallel.trace import Workload, trace
from tests.parallel.small import CONFIG, RATES, SmallStage, small_run

H100 = GPUS["h100"]


@pytest.fixture(scope="module")
def stage3(loaded: Workload) -> Workload:
    """As the run has it: with the diffusion decoder in host memory."""
    parts = {name: cost for name, cost in loaded.parts.items() if name != "diffusion"}
    return dataclasses.replace(loaded, parts=parts)


@pytest.fixture(scope="module")
def loaded() -> Workload:
    rates = {
        "trunk.*": 2e-5,
        "front.vanilla.*": 2e-6,
        "front.hierarchical.*": 0.0,
        "front.tokenizer.*": 0.0,
        "front.*": 2e-5,
        "heads.segment.*": 2e-5,
    }
    return trace(focus_3b(), rates)


def test_trace_knows_the_full_model(stage3: Workload) -> None:
    """Parameters of the paper's parts, and FLOPs of ConvNeXt-L at 768 (0.81 T by its authors)."""
    parts = stage3.parts
    assert parts["trunk"].trainable == pytest.approx(2.775e9, rel=1e-3)
    assert parts["hierarchical"].frozen == pytest.approx(0.196e9, rel=5e-3)
    assert parts["hierarchical"].flops == pytest.approx(0.81e12, rel=0.02)
    assert parts["hierarchical"].saved == 0
    attention = 2 * 36 * 2 * stage3.tokens**2 * 2048
    matrices = 2 * parts["trunk"].trainable * stage3.tokens
    assert parts["trunk"].flops == pytest.approx(matrices + attention, rel=0.01)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that live, from their birth in some operator to their end."""

    def __init__(self, held: list[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, Any] = {}
        for tensor in held:
            self._note(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._note(leaf)
        return result

    def _note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def ended(_: Any) -> None:
            self.now -= size
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, ended)
        self.now += size
        self.peak = max(self.peak, self.now)


def measured_peak(stage: int, size: int) -> float:
    """Peak bytes of live tensors during one optimizer step of the real thing."""
    torch.manual_seed(0)
    run = small_run(stage, micro_batches=(("editing", size),))
    with open_mesh(ParallelConfig()) as mesh:
        engine = build_engine(run, SmallStage(stage), mesh)
        data = StepDataset(run, SmallStage(stage), 0, 1)
        engine.step(0, data[0], StepWork(run, SmallStage(stage), 0, mesh))
        states = engine.optimizers[0].state.values()  # type: ignore[attr-defined]
        held = [*engine.model.parameters(), *(t for state in states for t in state.values())]
        held += [p.grad for p in engine.model.parameters() if p.grad is not None]
        work = StepWork(run, SmallStage(stage), 1, mesh)
        batches = data[1]
        with LiveBytes(held) as live:
            engine.step(1, batches, work)
    return float(live.peak)


@pytest.mark.parametrize("size", [4, 16])
def test_planned_memory_is_within_15_percent_of_a_real_step(size: int) -> None:
    work = trace(CONFIG, RATES[3], text=20)
    layout = ParallelConfig()
    planned = weight_bytes(work, layout, 1, 0, "fp32")
    planned += activation_bytes(work, layout, 0, size, 1, "fp32")
    assert planned == pytest.approx(measured_peak(3, size), rel=0.15)


def test_eight_gpus_want_plain_data_parallelism(stage3: Workload) -> None:
    best = plan(stage3, H100, 8, 256)[0]
    assert (best.layout.tp, best.layout.pp, best.data) == (1, 1, 8)
    assert 0.2 < best.mfu < 0.5
    assert best.memory < 0.92 * H100.memory


def test_less_memory_asks_for_splitting_and_too_little_says_so(stage3: Workload) -> None:
    small = dataclasses.replace(H100, memory=40e9)
    best = plan(stage3, small, 8, 64)[0]
    assert best.layout.tp * best.layout.pp > 1
    with pytest.raises(PlanError, match=r"nothing fits h100 \(4 GiB\): the least is tp"):
        plan(stage3, dataclasses.replace(H100, memory=4e9), 8, 64)
    with pytest.raises(PlanError, match="no layout splits 1 samples over 64 GPUs"):
        plan(stage3, H100, 64, 1)


def test_splitting_divides_the_weights(stage3: Workload) -> None:
    one = ParallelConfig(trunk="megatron")
    whole = weight_bytes(stage3, one, 1, 0, "bf16")
    split = weight_bytes(stage3, ParallelConfig(tp=2, pp=2), 1, 0, "bf16")
    assert 0.2 * whole < split < 0.5 * whole
    sharded = weight_bytes(stage3, one, 8, 0, "bf16")
    trainable = stage3.parts["trunk"].trainable
    assert whole - sharded > trainable * 12 * 7 / 8


def test_a_stage_that_is_not_split_holds_everything_on_every_rank(loaded: Workload) -> None:
    """fp32 weights, gradients and both moments of what learns, and a bf16 copy under autocast."""
    huge = dataclasses.replace(H100, memory=1e12)
    plans = plan(loaded, huge, 8, 256, whole=True)
    assert {(p.layout.tp, p.layout.pp, p.layout.megatron) for p in plans} == {(1, 1, False)}
    learning = sum(part.trainable for part in loaded.parts.values())
    frozen = sum(part.frozen for part in loaded.parts.values())
    assert frozen > 2.5e9  # the diffusion decoder, which stage 3 holds and does not call
    assert plans[0].weights == pytest.approx(learning * 18 + frozen * 4)
    with pytest.raises(PlanError, match="nothing fits h100"):
        plan(loaded, H100, 8, 256, whole=True)


def test_table_is_labelled_as_a_model(stage3: Workload) -> None:
    text = render(plan(stage3, H100, 8, 256))
    assert text.startswith("model, not measured")
    assert "tp1 pp1 dp8" in text
