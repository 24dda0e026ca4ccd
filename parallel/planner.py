"""Memory and time of a run on every layout that some GPUs allow: a model, not a measurement.

Memory of one rank = its weights, gradients and optimizer state + what autograd keeps of the
micro-batches in flight + working space. Time of a step = FLOPs / (peak x assumed efficiency) of the
slowest pipeline rank x (1 + bubble) + communication that nothing hides. Costs of the parts are
traced from the real modules (`parallel.trace`); efficiencies are assumptions, named below.
"""

# P parameters, S sequence, B micro-batch, D width

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from focus.config import SCALES
from parallel.layout import MeshError, ParallelConfig, check_layout
from parallel.trace import BYTES, Workload

GIB = float(2**30)


class PlanError(ValueError):
    """A question that the planner cannot answer."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One accelerator and its surroundings; bandwidths in bytes/s and direction."""

    name: str
    memory: float
    flops: float  # dense bf16
    link: float  # to the other GPUs of its machine
    network: float  # to other machines, its share
    per_node: int = 8


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(name="a100", memory=80e9, flops=312e12, link=300e9, network=25e9),
        Gpu(name="h100", memory=80e9, flops=989e12, link=450e9, network=50e9),
        Gpu(name="h200", memory=141e9, flops=989e12, link=450e9, network=50e9),
        Gpu(name="b200", memory=180e9, flops=2250e12, link=900e9, network=50e9),
    )
}

# Share of peak that each part reaches: assumptions from published runs of like models.
EFFICIENCY: Mapping[str, float] = {
    "vanilla": 0.35,
    "hierarchical": 0.15,
    "front": 0.25,
    "embed": 0.10,
    "trunk": 0.40,
    "table": 0.40,
    "segment": 0.15,
    "diffusion": 0.35,
}
FRONT, HEADS = ("vanilla", "hierarchical", "front", "embed"), ("segment", "diffusion")
WORKSPACE = 1.5e9  # CUDA context, NCCL buffers, fragmentation
# Of fp32's bytes, kept by fp32 modules under autocast: in a chain of norm, activation and product
# the first two keep their inputs in fp32, the product its own in bf16: (4 + 4 + 2) / 12.
AUTOCAST = 10 / 12


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One layout and what the model says of it; bytes, seconds and samples per second."""

    layout: ParallelConfig
    data: int
    micro_batch: int
    num_micro: int
    weights: float  # weights, gradients, optimizer state of the fullest rank
    activations: float
    memory: float
    compute: float
    bubble: float  # share of the step in which a pipeline rank waits
    communication: float
    step: float
    samples_per_s: float
    mfu: float

    @property
    def name(self) -> str:
        """The layout in a few letters."""
        found = f"tp{self.layout.tp} pp{self.layout.pp} dp{self.data}"
        found += f" vpp{self.layout.vpp}" if self.layout.vpp > 1 else ""
        found += " sp" if self.layout.sequence_parallel else ""
        return found + (" recompute" if self.layout.recompute == "full" else "")


def plan(
    work: Workload,
    gpu: Gpu,
    num_gpus: int,
    batch: int,
    *,
    precision: str = "bf16",
    whole: bool = False,
) -> list[Plan]:
    """Return every legal layout for `batch` samples per step that fits in memory, fastest first.

    `whole` asks for the stages that are not split, with the whole model on every rank. Raises
    `PlanError` when none fits, naming the nearest.
    """
    found = [
        assess(work, gpu, layout, num_gpus, micro, batch, precision=precision)
        for layout, micro in candidates(work, gpu, num_gpus, batch, whole)
    ]
    if not found:
        raise PlanError(
            f"no layout splits {batch} samples over {num_gpus} GPUs; use a batch that the number "
            "of GPUs divides, or fewer GPUs"
        )
    fitting = [p for p in found if p.memory <= 0.92 * gpu.memory]
    if not fitting:
        least = min(found, key=lambda p: p.memory)
        raise PlanError(
            f"nothing fits {gpu.name} ({gpu.memory / GIB:.0f} GiB): the least is {least.name} with "
            f"micro-batch {least.micro_batch}, {least.memory / GIB:.0f} GiB; take more GPUs"
        )
    return sorted(fitting, key=lambda p: (-p.samples_per_s, p.memory))


def candidates(
    work: Workload, gpu: Gpu, num_gpus: int, batch: int, whole: bool = False
) -> Iterator[tuple[ParallelConfig, int]]:
    """Yield the legal (layout, micro-batch size) pairs; tp stays within a machine."""
    if whole:
        yield from _with_micro(work, ParallelConfig(trunk="plain"), num_gpus, batch)
        return
    powers = [1, 2, 4, 8]
    for tp in (t for t in powers if t <= min(gpu.per_node, num_gpus)):
        for pp in powers:
            for vpp in (1, 2):
                for recompute in ("none", "full"):
                    layout = ParallelConfig(
                        tp=tp,
                        pp=pp,
                        vpp=vpp,
                        sequence_parallel=tp > 1,
                        recompute=recompute,
                        trunk="megatron",
                    )
                    yield from _with_micro(work, layout, num_gpus, batch)


def _with_micro(
    work: Workload, layout: ParallelConfig, num_gpus: int, batch: int
) -> Iterator[tuple[ParallelConfig, int]]:
    try:
        check_layout(work.config.llm, layout)
        data = layout.data_size(num_gpus)
    except MeshError:
        return
    for micro in (1, 2, 4, 8, 16, 32):
        count, rest = divmod(batch, data * micro)
        if rest == 0 and count and not (layout.vpp > 1 and count % layout.pp):
            yield layout, micro


def assess(
    work: Workload,
    gpu: Gpu,
    layout: ParallelConfig,
    num_gpus: int,
    micro: int,
    batch: int,
    *,
    precision: str = "bf16",
) -> Plan:
    """Return what the model says of one layout."""
    data = layout.data_size(num_gpus)
    count = batch // (data * micro)
    memories = [
        rank_bytes(work, layout, data, rank, micro, count, precision) for rank in range(layout.pp)
    ]
    weights, activations = max(memories, key=sum)
    compute = max(_seconds(work, gpu, layout, rank, micro) for rank in range(layout.pp)) * count
    bubble = (layout.pp - 1) / (count * layout.vpp)
    communication = _communication(work, gpu, layout, num_gpus, micro, count)
    step = compute * (1 + bubble) + communication
    return Plan(
        layout=layout,
        data=data,
        micro_batch=micro,
        num_micro=count,
        weights=weights,
        activations=activations,
        memory=weights + activations + WORKSPACE,
        compute=compute,
        bubble=bubble / (1 + bubble),
        communication=communication,
        step=step,
        samples_per_s=batch / step,
        mfu=work.step_flops * batch / (step * num_gpus * gpu.flops),
    )


def rank_bytes(
    work: Workload,
    layout: ParallelConfig,
    data: int,
    rank: int,
    micro: int,
    count: int,
    precision: str,
) -> tuple[float, float]:
    """Bytes on one pipeline rank: what stays, and what comes and goes within a step.

    Without megatron-core the ranks average one flat copy of all gradients, and torch's AdamW makes
    as much again, when no activations are left.
    """
    held = activation_bytes(work, layout, rank, micro, count, precision)
    if not layout.megatron:
        held = max(held, 4.0 * parameters_of_rank(work, layout, rank)[0])
    return weight_bytes(work, layout, data, rank, precision), held


def weight_bytes(
    work: Workload, layout: ParallelConfig, data: int, rank: int, precision: str
) -> float:
    """Bytes of weights, fp32 gradients and Adam state on one pipeline rank.

    Under bf16 megatron-core's trunk and token table are bf16 with fp32 main weights; all else stays
    fp32, of whose learning weights autocast keeps a bf16 copy until the backward pass. megatron's
    distributed optimizer divides main weights and moments by the data ranks.
    """
    divided = layout.megatron and layout.distributed_optimizer
    shards = data * layout.cp if divided else 1
    total = 0.0
    for name, share in _shares(work, layout, rank).items():
        cost = work.parts[name]
        low, main, cast = 4, 8, 0 if precision == "fp32" else 2
        if layout.megatron and precision != "fp32" and name in ("trunk", "table"):
            low, main, cast = BYTES[precision], 12, 0
        total += share * (cost.trainable * (low + cast + 4 + main / shards) + cost.frozen * low)
    return total


def _shares(work: Workload, layout: ParallelConfig, rank: int) -> dict[str, float]:
    """Share of each part's parameters that one pipeline rank holds."""
    first, last = rank == 0, rank == layout.pp - 1
    shares = {"trunk": 1 / (layout.tp * layout.pp)} if "trunk" in work.parts else {}
    if (first or last) and "table" in work.parts:
        shares["table"] = 1 / layout.tp
    for name in work.parts:
        if (name in FRONT and first) or (name in HEADS and last):
            shares[name] = 1.0
    return shares


def parameters_of_rank(work: Workload, layout: ParallelConfig, rank: int) -> tuple[int, int]:
    """(trainable, frozen) parameters on one pipeline rank, from the parts' shares."""
    shares = _shares(work, layout, rank)
    trainable = sum(share * work.parts[name].trainable for name, share in shares.items())
    frozen = sum(share * work.parts[name].frozen for name, share in shares.items())
    return round(trainable), round(frozen)


def activation_bytes(
    work: Workload, layout: ParallelConfig, rank: int, micro: int, count: int, precision: str
) -> float:
    """Bytes that autograd keeps on one pipeline rank while its micro-batches are in flight.

    A 1F1B rank r of p holds p - r micro-batches; interleaving holds 1 + (p - 1) / (p v) times that.
    Traced bytes are fp32; bf16 halves the trunk's, autocast the front's and heads' less (see
    `AUTOCAST`), and logits stay.
    """
    scale, cast = BYTES[precision] / 4, 1.0 if precision == "fp32" else AUTOCAST
    sequence = layout.tp if layout.sequence_parallel else 1
    kept = {name: part.saved for name, part in work.parts.items()}
    trunk = kept.get("trunk", 0.0) * scale / (layout.cp * layout.pp)
    if layout.recompute == "full":
        llm = work.config.llm
        edges = llm.num_layers * work.tokens * llm.dim * BYTES[precision]
        inside = trunk * layout.pp / llm.num_layers  # one layer at a time is whole
        trunk = edges / (layout.cp * layout.pp * sequence) + inside / layout.tp
    else:
        trunk /= sequence if layout.sequence_parallel else _unsplit(layout.tp)
    flight = float(min(count, layout.pp - rank))
    if layout.vpp > 1:
        flight = min(count, layout.pp) * (1 + (layout.pp - 1) / (layout.pp * layout.vpp))
    held = trunk
    if rank == 0:
        held += sum(kept.get(name, 0.0) * cast for name in FRONT)
    held *= flight
    if rank == layout.pp - 1:
        held += sum(kept.get(name, 0.0) * cast for name in HEADS)
        held += kept.get("table", 0.0) / layout.tp
    return held * micro


def _unsplit(tp: int) -> float:
    """Without sequence parallelism norms and residuals, about a third, are kept on every rank."""
    return 1 / (1 / 3 + 2 / 3 / tp)


def _seconds(work: Workload, gpu: Gpu, layout: ParallelConfig, rank: int, micro: int) -> float:
    """Computing time of one micro-batch, forward and backward, on one pipeline rank."""
    total = 0.0
    for name, share in _shares(work, layout, rank).items():
        cost = work.parts[name]
        if name == "table" and rank != layout.pp - 1:
            continue
        if name == "trunk":
            share /= layout.cp
        flops = cost.step_flops
        if name == "trunk" and layout.recompute == "full":
            flops += cost.flops
        total += share * flops / (gpu.flops * EFFICIENCY[name])
    return total * micro


def _communication(
    work: Workload, gpu: Gpu, layout: ParallelConfig, num_gpus: int, micro: int, count: int
) -> float:
    """Seconds per step of tensor-parallel, pipeline and data-parallel messages, none hidden."""
    llm = work.config.llm
    states = work.tokens * micro * llm.dim * 2.0
    tensor = 0.0
    if layout.tp > 1:  # an all-reduce (or gather and scatter) after attention and MLP, both ways
        per_layer = 4 * 2 * states * (layout.tp - 1) / layout.tp / gpu.link
        tensor = per_layer * llm.num_layers / layout.pp * count
    pipeline = 0.0
    if layout.pp > 1:
        sizes = work.config.hierarchical
        features = sum(
            dim * sizes.grid_of(scale)[0] * sizes.grid_of(scale)[1]
            for dim, scale in zip(sizes.dims, SCALES, strict=True)
        )
        message = states + features * micro * 2.0
        road = gpu.link if num_gpus <= gpu.per_node else gpu.network
        pipeline = 2 * layout.vpp * count * message / road
    data = layout.data_size(num_gpus)
    reduce = 0.0
    if data > 1:
        own = max(
            sum(share * work.parts[n].trainable for n, share in _shares(work, layout, r).items())
            for r in range(layout.pp)
        )
        road = gpu.link if num_gpus <= gpu.per_node else gpu.network
        bytes_each = 4 + 2 if layout.megatron else 4 + 4  # gradients out, weights (or both) back
        reduce = own * bytes_each * (data - 1) / data / road
    return tensor + pipeline + reduce


# CPU time of reading one sample, from `python -m bench data` on two cores of a server; an estimate.
CPU_SECONDS = 0.045


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What a layout asks of the data pipeline, per machine of `per_node` GPUs."""

    samples_per_s: float
    cores: float


def data_demand(found: Plan, gpu: Gpu, num_gpus: int) -> Demand:
    """Samples per second and CPU cores that feed one machine; ranks that share data read it too."""
    nodes = max(1, num_gpus / gpu.per_node)
    copies = found.layout.tp * found.layout.pp * found.layout.cp
    rate = found.samples_per_s * copies / nodes
    return Demand(samples_per_s=rate, cores=rate * CPU_SECONDS)


def refusals(work: Workload, gpu: Gpu, num_gpus: int) -> list[str]:
    """Name the rule that every plain tp x pp breaks that is not among the candidates."""
    said = []
    for tp in (t for t in (1, 2, 4, 8, 16) if t <= num_gpus):
        for pp in (p for p in (1, 2, 4, 8, 16) if tp * p <= num_gpus):
            if tp > gpu.per_node:
                said.append(f"tp{tp} pp{pp}: tp leaves the machine of {gpu.per_node} GPUs")
                continue
            try:
                layout = ParallelConfig(tp=tp, pp=pp)
                check_layout(work.config.llm, layout)
                layout.data_size(num_gpus)
            except MeshError as error:
                said.append(f"tp{tp} pp{pp}: {str(error).partition('; got')[0]}")
    return said


def render(plans: list[Plan], *, limit: int = 12) -> str:
    """Return the best plans as a table for people."""
    head = f"{'layout':<28}{'micro':>6}{'x':>4}{'GiB':>7}{'step s':>9}{'bubble':>8}{'comm':>7}"
    lines = ["model, not measured", head + f"{'samples/s':>11}{'MFU':>7}"]
    for p in plans[:limit]:
        lines.append(
            f"{p.name:<28}{p.micro_batch:>6}{p.num_micro:>4}{p.memory / GIB:>7.1f}{p.step:>9.3f}"
            f"{p.bubble:>8.1%}{p.communication / p.step:>7.1%}{p.samples_per_s:>11.1f}{p.mfu:>7.1%}"
        )
    return "\n".join(lines)
