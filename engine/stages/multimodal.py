"""What stages 2 to 4 share: sequences of every task, their language and segmentation losses."""

# B batch, T sequence, N mask queries, K candidates

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.data.clips import VIDEO
from engine.data.records import Record
from engine.data.source import config_of, draw_records
from engine.data.words import text_rows, tiny_vocabulary
from engine.run import Run
from engine.stages.panel import tile, tint
from engine.stages.stage import Micro, Stage, load_initial
from focus.batch import IGNORE, Batch
from focus.inputs import collate
from focus.losses import expected_code_loss, language_loss
from focus.model import CONDITION_KINDS, Features, FocusModel
from focus.prompts import DRAWING, Prompt
from focus.segment.loss import segmentation_losses, tracking_loss
from focus.segment.predictor import Prediction
from focus.sequence import fill_codes, written_codes
from focus.tokenizer.dual import Codes

NAMING = ("referring", "reasoning", "interactive")  # names, then masks, and nothing drawn


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one forward pass gives."""

    batch: Batch
    codes: Codes | None
    hidden: Tensor
    features: Features | None
    prediction: Prediction | None


class MultimodalStage(Stage):
    """Base of warm-up, pretraining and instruction tuning.

    `extra`: segmentation (bool), segment_weight, visual_weight, edit_token_weight, code_weight,
    target_repeats (see `repeat_targets`), drop_text (see `drop_texts`), swap_names (see
    `swap_names`), blank_codes (see `blank_codes`), and tasks_per_step: so many of the run's
    micro-batches a step, in turn (default: all of them); pack: length of the trunk's packed rows
    (0: a row per sequence); track_weight: of the object embeddings' contrast between the frames of
    clips (0: none), which micro-batches of the task "video" show in pairs.
    """

    def __init__(self) -> None:
        self.run: Run | None = None
        self.shown: dict[str, Step] = {}

    def build(self, run: Run) -> nn.Module:
        """Return the model with the previous stage's weights."""
        self.run = run
        model = FocusModel(config_of(run))
        load_initial(model, run.init_from)
        return model

    def micro_batches(self, run: Run, step: int) -> tuple[tuple[str, int], ...]:
        """Return the step's share of the mixture."""
        count = int(run.extra.get("tasks_per_step", len(run.micro_batches)))
        mixture = run.micro_batches
        return tuple(mixture[(step * count + i) % len(mixture)] for i in range(count))

    def batches(self, run: Run, step: int, micro: Micro) -> Batch:
        """Draw one task-homogeneous micro-batch."""
        return self.draw(run, step, micro)[0]

    def draw(self, run: Run, step: int, micro: Micro) -> tuple[Batch, list[Record], list[Record]]:
        """Return a micro-batch, its records as drawn, and those with some texts dropped."""
        config = config_of(run)
        drawn = draw_records(run, step, micro)
        seed = micro.seed(run, step)
        kept = drop_texts(drawn, float(run.extra.get("drop_text", 0.0)), seed)
        records, wrong = swap_names(kept, float(run.extra.get("swap_names", 0.0)), seed)
        pack = int(run.extra.get("pack", 0))
        batch = collate(records, config, tiny_vocabulary(config), seed=seed, pack=pack)
        chance = float(run.extra.get("blank_codes", 0.0))
        if chance and batch.target is not None:
            batch = replace(batch, blank=blank_codes(batch, chance, seed))
        return hush(batch, wrong), drawn, kept

    def losses(self, model: nn.Module, batch: Batch, step: int) -> dict[str, Tensor]:
        """Return language and, when the run asks for it, segmentation terms."""
        assert isinstance(model, FocusModel) and self.run is not None
        done = forward(model, batch, segment=bool(self.run.extra.get("segmentation", True)))
        self.shown[batch.task] = done
        terms = self.language_terms(model, done)
        if done.prediction is not None:
            weight = float(self.run.extra.get("segment_weight", 1.0))
            found = self.mask_terms(model, done)
            terms.update({name: weight * value for name, value in found.items()})
            track = float(self.run.extra.get("track_weight", 0.0))
            if track and done.batch.mask_objects is not None:
                terms["track"] = track * tracking_term(model, done)
        kind = batch.task if batch.mask_objects is None else VIDEO
        return {f"{kind}/{name}": value for name, value in terms.items()}

    def language_terms(self, model: FocusModel, done: Step) -> dict[str, Tensor]:
        """Next-token cross-entropy, words and visual tokens apart, and the expected-code loss.

        A picture has eighty tokens and an answer five: one mean over both would drown the words.
        """
        assert self.run is not None
        extra, batch = self.run.extra, done.batch
        table = model.heads.lm_head.weight
        next_level = F.pad(batch.grid[:, 1:, 0], (0, 1), value=-1)
        labelled = batch.labels != IGNORE
        visual = labelled & (next_level >= 0)
        words = labelled & ~visual & ~self._structural(batch.labels)
        terms = {}
        if bool(words.any()):
            terms["words"] = self.words_term(model, done.hidden, batch.labels.where(words, IGNORE))
        if done.codes is None or not bool(visual.any()):
            return terms
        weight = token_weight(batch, float(extra.get("edit_token_weight", 1.0)))
        for level, name in enumerate(("semantic", "pixel")):
            here = visual & (next_level == level)
            terms[name] = float(extra.get("visual_weight", 1.0)) * language_loss(
                done.hidden, batch.labels.where(here, IGNORE), table, weight
            )
        code_weight = float(extra.get("code_weight", 0.1))
        if code_weight:
            terms["code"] = code_weight * self._code_loss(model, done, visual & (next_level == 1))
        return terms

    def mask_terms(self, model: FocusModel, done: Step) -> dict[str, Tensor]:
        """Segmentation terms, see `segmentation_terms`."""
        assert self.run is not None
        repeats = int(self.run.extra.get("target_repeats", 1))
        return segmentation_terms(model, done, repeats)

    def words_term(self, model: FocusModel, hidden: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of the words of answers."""
        return language_loss(hidden, labels, model.heads.lm_head.weight)

    def _structural(self, labels: Tensor) -> Tensor:
        """Return which labels are picture structure: the grammar forces them in decoding."""
        assert self.run is not None
        vocabulary = tiny_vocabulary(config_of(self.run))
        first, last = text_rows(vocabulary), vocabulary.semantic_ids.start
        inside: Tensor = (labels >= first) & (labels < last)
        return inside

    def _code_loss(self, model: FocusModel, done: Step, where: Tensor) -> Tensor:
        assert self.run is not None
        vocabulary = tiny_vocabulary(model.config)
        rows = vocabulary.pixel_ids
        quantiser = model.front.tokenizer.pixel_codes
        count = torch.arange(rows.stop - rows.start, device=where.device)
        return expected_code_loss(
            done.hidden[where],
            done.batch.labels[where] - rows.start,
            model.heads.lm_head.weight[rows],
            quantiser.lookup(count).detach(),
        )

    def panel(self, model: nn.Module, step: int) -> npt.NDArray[np.uint8] | None:
        """Draw pictures, true masks and predicted masks of each segmentation task."""
        rows = []
        for done in self.shown.values():
            pictures, masks = done.batch.pictures, done.batch.masks
            if done.prediction is None or pictures is None or masks is None:
                continue
            shown = pictures.hierarchical[:6]
            truth = masks.any(1)[:6]
            guess = best_mask(done.prediction)[:6]
            rows += [tint(shown, truth), tint(shown, resize_masks(guess, shown.shape[-2:]))]
        return tile(rows) if rows else None


def drop_texts(records: list[Record], chance: float, seed: int) -> list[Record]:
    """Turn some pictures to draw into the other branch of guidance (`Prompt.unconditional`).

    A description becomes empty; an edit becomes "reconstruct the image", whose target is its
    source and which changes no region.
    """
    lots = np.random.default_rng(seed).random(len(records))
    return [
        _unconditional(record) if lot < chance else record
        for record, lot in zip(records, lots, strict=True)
    ]


def swap_names(records: list[Record], chance: float, seed: int) -> tuple[list[Record], list[bool]]:
    """Let some records to segment say what another of the batch should: (records, which).

    Masks that follow the names alone go wrong with them; what the prompt asks for still counts. The
    first record keeps its own: every micro-batch, on every rank, has the same terms.
    """
    lots = np.random.default_rng((seed, 1)).random(len(records))
    swapped = [
        number > 0 and lot < chance and record.task in NAMING
        for number, (record, lot) in enumerate(zip(records, lots, strict=True))
    ]
    others = [*records[1:], *records[:1]]
    found = [
        replace(record, answer=other.answer) if wrong else record
        for record, other, wrong in zip(records, others, swapped, strict=True)
    ]
    return found, swapped


def hush(batch: Batch, rows: list[bool]) -> Batch:
    """Take the loss off what these rows say."""
    if not any(rows):
        return batch
    silent = torch.tensor(rows)[:, None]
    return replace(batch, labels=batch.labels.masked_fill(silent, IGNORE))


def _unconditional(record: Record) -> Record:
    if record.task not in DRAWING:
        return record
    other = Prompt.of(record).unconditional()
    return replace(
        record,
        text=other.text,
        answer=other.answer,
        regions=(),
        region_kinds=(),
        masks=(),
        labels=(),
        target=record.target if record.image is None else record.image,
    )


def blank_codes(batch: Batch, chance: float, seed: int) -> Tensor:
    """Choose codes [B, T] bool of the pictures being written that what follows shall not see.

    A row is chosen with `chance`; each of its levels then loses a share of its codes between none
    and all. Next to true neighbours a code is soon guessed without a look at the text, and a
    picture that is written alone, where neighbours are guesses, then says nothing of the text.
    """
    draw = torch.Generator().manual_seed(seed)
    rows = len(batch.input_ids)
    chosen = written_codes(batch) & (torch.rand(rows, 1, generator=draw) < chance)
    hidden = torch.zeros_like(chosen)
    for level in (0, 1):
        share = 1.2 * torch.rand(rows, 1, generator=draw)  # a sixth of them: all
        lots = torch.rand(chosen.shape, generator=draw)
        hidden |= chosen & (batch.grid[..., 0] == level) & (lots < share)
    return hidden


def forward(model: FocusModel, batch: Batch, *, segment: bool) -> Step:
    """Run front and trunk, fill in the target's codes, and predict masks where there are any."""
    codes = None
    if batch.target is not None:
        codes = model.front.tokenize(batch.target)
        batch = fill_codes(batch, codes, tiny_vocabulary(model.config))
    hidden, features = model(batch)
    prediction = None
    if segment and batch.task in CONDITION_KINDS and batch.masks is not None:
        assert features is not None
        prediction = model.heads.predict_masks(hidden, batch, features.maps)
    return Step(batch=batch, codes=codes, hidden=hidden, features=features, prediction=prediction)


def repeat_targets(masks: Tensor, labels: Tensor, times: int) -> tuple[Tensor, Tensor]:
    """Repeat targets [B, N, H, W] and labels [B, N] of a row, so that several queries match each.

    One-to-many matching (H-DETR, arXiv:2207.13080). Where an expression has one target, matching a
    single query rewards hedging: some query on each object, and only the score to tell them apart.
    """
    return masks.repeat(1, times, 1, 1), labels.repeat(1, times)


def segmentation_terms(
    model: FocusModel, done: Step, repeats: int = 1, left_out: Tensor | None = None
) -> dict[str, Tensor]:
    """Return the weighted score, BCE and Dice terms (facts section 8).

    repeats: how many queries may match one target of an expression or a region; class-based
    segmentation has to keep its instances apart and always matches one. left_out: of class-based
    segmentation, see `segmentation_losses`.
    """
    batch = done.batch
    assert done.prediction is not None
    assert batch.masks is not None and batch.mask_labels is not None
    assert batch.num_conditions is not None
    kind = CONDITION_KINDS[batch.task]
    fit = model.config.segment.num_queries // batch.mask_labels.shape[1]
    times = 1 if kind == "class" else max(1, min(repeats, fit))
    masks, labels = repeat_targets(batch.masks, batch.mask_labels, times)
    return segmentation_losses(
        done.prediction,
        masks,
        labels,
        batch.num_conditions,
        kind,
        num_points=model.config.segment.num_points,
        left_out=left_out if kind == "class" else None,
    )


def tracking_term(model: FocusModel, done: Step) -> Tensor:
    """Return the contrast of object embeddings between frames, see `tracking_loss`."""
    batch = done.batch
    assert done.prediction is not None and batch.num_conditions is not None
    assert batch.masks is not None and batch.mask_labels is not None
    assert batch.mask_objects is not None
    return tracking_loss(
        done.prediction,
        batch.masks,
        batch.mask_labels,
        batch.mask_objects,
        batch.num_conditions,
        CONDITION_KINDS[batch.task],
        num_points=model.config.segment.num_points,
    )


def token_weight(batch: Batch, inside: float) -> Tensor:
    """Weight [B, T] of each label: `inside` for visual tokens under the edit mask, 1 elsewhere."""
    weight = torch.ones(batch.labels.shape, device=batch.labels.device)
    if batch.edit_mask is None or inside == 1.0:
        return weight
    following = F.pad(batch.grid[:, 1:], (0, 0, 0, 1), value=-1).long()
    for level in (0, 1):
        here = following[..., 0] == level
        rows, columns = (int(following[..., axis][here].max()) + 1 for axis in (1, 2))
        under = F.adaptive_max_pool2d(batch.edit_mask[:, None].float(), (rows, columns))[:, 0]
        cell = (following[..., 1] * columns + following[..., 2]).clamp(0, rows * columns - 1)
        share = under.flatten(1).gather(1, cell)
        weight = torch.where(here, 1 + (inside - 1) * share, weight)
    return weight


def best_mask(prediction: Prediction) -> Tensor:
    """Return the probability mask [B, h, w] of the query with the best score of candidate 0."""
    best = prediction.scores[..., 0].argmax(1)
    return prediction.masks[torch.arange(len(best)), best].sigmoid()


def resize_masks(masks: Tensor, size: Any) -> Tensor:
    """Resample probability masks [B, h, w] bilinearly to `size`."""
    return F.interpolate(masks[:, None].float(), tuple(size), mode="bilinear")[:, 0]
