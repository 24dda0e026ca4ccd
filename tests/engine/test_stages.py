"""Every stage of the tiny sequence: which parameters learn, which terms appear, what is frozen."""

import dataclasses
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from torch import nn

from engine.data.source import config_of
from engine.data.words import tiny_vocabulary
from engine.run import Run
from engine.runs import TINY_SEQUENCE, find_run
from engine.stages.multimodal import MultimodalStage, best_mask, forward, token_weight
from engine.stages.stage import Micro, find_stage, load_initial
from focus.batch import IGNORE, Batch
from focus.model import FocusModel
from focus.segment.predictor import Prediction
from parallel.checkpoint import CheckpointMismatch
from parallel.optimizer import freeze
from parallel.tensors import write_tensors


def small(name: str) -> Run:
    """The run with two samples per micro-batch, every task in one step, nothing loaded."""
    run = find_run(name)
    tasks = tuple((task, 2) for task in dict.fromkeys(task for task, _ in run.micro_batches))
    extra = {**run.extra, "tasks_per_step": len(tasks), "gan_start": 0, "gan_warm": 0}
    extra["measure_latents"] = False
    return dataclasses.replace(run, micro_batches=tasks, init_from=None, extra=extra)


def gradients(run: Run) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Run one step's losses and backward; return the model and all terms."""
    torch.manual_seed(0)
    stage = find_stage(run.stage)
    model = stage.build(run)
    freeze(model, run.rates)
    model.train()
    terms: dict[str, torch.Tensor] = {}
    for number, (task, size) in enumerate(stage.micro_batches(run, 0)):
        batch = stage.batches(run, 0, Micro(number=number, task=task, size=size))
        found = stage.losses(model, batch, 0)
        torch.stack(list(found.values())).sum().backward()
        terms.update(found)
    return model, terms


@pytest.mark.parametrize("name", [make.__name__ for make in TINY_SEQUENCE])
def test_gradients_reach_exactly_what_the_run_trains(name: str) -> None:
    run = small(name)
    model, terms = gradients(run)
    assert all(torch.isfinite(value) for value in terms.values())
    unreached = []
    for parameter_name, parameter in model.named_parameters():
        trained = any(fnmatchcase(parameter_name, glob) for glob in run.rates)
        assert parameter.requires_grad == trained, parameter_name
        if not trained:
            assert parameter.grad is None, parameter_name
        elif parameter.grad is None:
            unreached.append(parameter_name)
    # Stage 2 has neither masks nor regions; without a mask the decoder's attn2 is a constant.
    quiet = (
        "front.mask_queries",
        "front.region_pooler.*",
        "heads.segment.embedding.*",
        "*.attn2.*",
        "*.norm2.*",
    )
    quiet += ("front.tokenizer.semantic_codes.*",) if name.endswith("tokenizer") else ()
    left = [n for n in unreached if not any(fnmatchcase(n, glob) for glob in quiet)]
    assert not left


def test_warm_up_leaves_text_rows_alone() -> None:
    run = small("focus_tiny_stage2")
    model, _ = gradients(run)
    assert isinstance(model, FocusModel)
    gradient = model.front.token_embedding.weight.grad
    assert gradient is not None
    first = min(tiny_vocabulary(config_of(run)).structure.values())
    assert gradient[:first].abs().max() == 0
    assert gradient[first:].abs().max() > 0


def test_instruction_tuning_joins_mask_and_picture() -> None:
    """The noise error flows through the predicted mask into predictor and trunk (eq. 6)."""
    run = small("focus_tiny_stage4")
    run = dataclasses.replace(
        run, micro_batches=(("editing", 2),), extra={**run.extra, "true_mask": 0.0}
    )
    torch.manual_seed(0)
    stage = find_stage(run.stage)
    model = stage.build(run)
    assert isinstance(model, FocusModel)
    nn.init.normal_(model.heads.diffusion.mask_projection.weight, std=0.1)
    batch = stage.batches(run, 0, Micro(number=0, task="editing", size=2))
    terms = stage.losses(model, batch, run.steps)  # by then only predicted masks are fed
    parts = [model.heads.segment.query_content.weight, model.trunk.layers[0].mlp.up_proj.weight]
    found = torch.autograd.grad(terms["editing/epsilon"], parts)
    assert all(gradient.abs().max() > 0 for gradient in found)


def test_the_tokenizer_learns_with_the_noise_that_its_run_asks_for() -> None:
    assert find_run("focus_3b_stage1_tokenizer_256").extra["code_noise"] == 0.1
    assert "code_noise" not in find_run("focus_3b_stage1_tokenizer_512").extra
    run = small("focus_tiny_stage1_tokenizer")
    found = []
    for rate in (0.0, 1.0):
        noisy = dataclasses.replace(run, extra={**run.extra, "code_noise": rate})
        found.append(float(gradients(noisy)[1]["l1"].detach()))
    assert found[0] != found[1]


def test_tasks_take_turns() -> None:
    run = find_run("focus_tiny_stage3")
    stage = find_stage(run.stage)
    per_step = run.extra["tasks_per_step"]
    turns = [
        t for s in range(len(run.micro_batches) // per_step) for t in stage.micro_batches(run, s)
    ]
    assert tuple(turns) == run.micro_batches


def test_batches_are_pure_functions_of_the_step() -> None:
    run = small("focus_tiny_stage3")
    stage = find_stage(run.stage)
    micro = Micro(number=1, task="referring", size=2)
    one, two, other = (stage.batches(run, step, micro) for step in (3, 3, 4))
    assert torch.equal(one.input_ids, two.input_ids)
    assert one.pictures is not None and two.pictures is not None and other.pictures is not None
    assert torch.equal(one.pictures.hierarchical, two.pictures.hierarchical)
    assert not torch.equal(one.pictures.hierarchical, other.pictures.hierarchical)


def edit_batch() -> tuple[Run, MultimodalStage, Batch]:
    run = small("focus_tiny_stage3")
    stage = find_stage(run.stage)
    assert isinstance(stage, MultimodalStage)
    return run, stage, stage.batches(run, 0, Micro(number=0, task="editing", size=2))


def test_token_weight_marks_the_cells_under_the_mask() -> None:
    run, _, batch = edit_batch()
    assert batch.edit_mask is not None
    mask = torch.zeros_like(batch.edit_mask)
    mask[:, :16, 16:32] = True  # cell (0, 1) of 8 x 8 on both levels
    weight = token_weight(dataclasses.replace(batch, edit_mask=mask), 3.0)
    following = torch.nn.functional.pad(batch.grid[:, 1:], (0, 0, 0, 1), value=-1)
    labelled = batch.labels != IGNORE
    for level, cell in ((0, (0, 1)), (1, (0, 1))):
        here = (following == torch.tensor([level, *cell])).all(-1) & labelled
        assert here.any() and (weight[here] == 3).all()
        elsewhere = (following[..., 0] == level) & ~(following == torch.tensor([level, *cell])).all(
            -1
        )
        assert (weight[elsewhere] == 1).all()
    assert config_of(run).pixel.grid == (8, 8)


def test_targets_become_labels() -> None:
    run, stage, batch = edit_batch()
    model = stage.build(run)
    assert isinstance(model, FocusModel)
    with torch.no_grad():
        done = forward(model.eval(), batch, segment=True)
    assert done.codes is not None
    vocabulary = tiny_vocabulary(model.config)
    pixel = vocabulary.pixel_ids
    labels = done.batch.labels
    found = labels[(labels >= pixel.start) & (labels < pixel.stop)] - pixel.start
    assert torch.equal(found, done.codes.pixel.flatten())


def test_best_mask_takes_the_best_score() -> None:
    masks = torch.randn(1, 3, 4, 4)
    scores = torch.tensor([[[0.0], [2.0], [1.0]]])
    prediction = Prediction(masks=masks, scores=scores, embeddings=torch.zeros(1, 3, 2))
    assert torch.equal(best_mask(prediction), masks[:, 1].sigmoid())


def test_the_sequence_is_one_chain() -> None:
    runs = [make() for make in TINY_SEQUENCE]
    assert [run.init_from for run in runs] == [None, *(run.name for run in runs[:-1])]


@pytest.mark.parametrize("broken", ["model", "ema"])
def test_weights_that_are_cut_off_are_named(tmp_path: Path, broken: str) -> None:
    model = nn.Linear(8, 8)
    for name in ("model", "ema"):
        write_tensors(tmp_path / f"{name}.safetensors", model.state_dict())
    load_initial(model, tmp_path / "model.safetensors")
    path = tmp_path / f"{broken}.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointMismatch, match=rf"{broken}\.safetensors: a whole safetensors"):
        load_initial(model, tmp_path / "model.safetensors")
