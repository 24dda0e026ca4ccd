"""Words and candidates that a softmax leaves out: pairs that training never shows.

No training picture holds a red triangle (see `HELD_OUT`), so cross-entropy teaches that what is red
is no triangle, and the model stops to read the shape of red things. That a pair is absent says
nothing of how it looks: where one word of a pair is known, the word that training never pairs with
it is left out of the softmax of the other. This is logit adjustment (arXiv:2007.07314) for classes
of prior zero. So do the scores of mask queries against a list of mere shapes, where neither the
candidate nor its absence from the picture says a colour.
"""

# B batch, T sequence, N masks, K candidates

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.data.records import Record
from engine.data.scene_model import COLOURS, SHAPES, UNSEEN_PAIRS
from engine.data.scene_tasks import pairs_asked, pairs_segmented, scene_of
from engine.stages.answers import answer_starts
from focus.batch import Batch
from focus.segment.predictor import Prediction
from focus.vocabulary import Vocabulary

_SHAPE_NEVER = dict(UNSEEN_PAIRS)  # colour -> the shape that it never has; each occurs once
_COLOUR_NEVER = {shape: colour for colour, shape in UNSEEN_PAIRS}


def unpaired(batch: Batch, records: Sequence[Record], vocabulary: Vocabulary) -> Tensor:
    """Return the id [B, T] that the softmax at each label leaves out, -1 where none.

    Names ("red circle") say both words of their pair; of an answer of one word the other is that
    of the object in question. Of a list of shapes, see `_never`: one after the other in turn.
    """
    ids = {word: vocabulary.encode(word)[0] for word in (*COLOURS, *SHAPES)}
    colours, shapes = ({ids[w]: w for w in words} for words in (COLOURS, SHAPES))
    found = torch.full_like(batch.labels, -1)
    num = max((1 + len(record.turns) for record in records), default=1)
    starts = answer_starts(batch, num).tolist()
    for row, record in enumerate(records):
        labels = batch.labels[row].tolist()
        for t, (first, second) in enumerate(pairwise(labels)):
            if first in colours and second in shapes:
                found[row, t] = ids[_COLOUR_NEVER[shapes[second]]]
                found[row, t + 1] = ids[_SHAPE_NEVER[colours[first]]]
        absent = _never(record)
        for number, t in enumerate(t for t in range(len(labels)) if absent and labels[t] in shapes):
            if found[row, t] < 0:
                found[row, t] = ids[absent[number % len(absent)]]
        for t, pairs in zip(starts[row], pairs_asked(record.id), strict=False):
            if t < 0 or len(pairs) != 1 or found[row, t] >= 0:
                continue
            colour, shape = pairs[0]
            if labels[t] == ids[colour]:
                found[row, t] = ids[_COLOUR_NEVER[shape]]
            elif labels[t] == ids[shape]:
                found[row, t] = ids[_SHAPE_NEVER[colour]]
    return found


def _of_shapes(record: Record) -> bool:
    return record.task == "class" and set(record.classes) <= set(SHAPES)


def _never(record: Record) -> list[str]:
    """Listed shapes that are absent and that training never shows in some colour of the picture."""
    if not _of_shapes(record):
        return []
    pairs = [thing.pair for thing in scene_of(record.id).objects]
    colours, shapes = {colour for colour, _ in pairs}, {shape for _, shape in pairs}
    return [s for s in record.classes if s not in shapes and _COLOUR_NEVER.get(s) in colours]


def unpaired_classes(records: Sequence[Record]) -> Tensor | None:
    """Which candidates [B, K] the softmax of mask queries leaves out; None without classes.

    Of lists of mere shapes those that `unpaired` leaves out of the names.
    """
    most = max((len(record.classes) for record in records), default=0)
    if not most:
        return None
    found = torch.zeros(len(records), most, dtype=torch.bool)
    for row, record in enumerate(records):
        for shape in _never(record):
            found[row, record.classes.index(shape)] = True
    return found


def unpaired_masks(records: Sequence[Record]) -> Tensor | None:
    """The candidate [B, N] that the query of each mask leaves out, -1 none; None without masks.

    Of lists of mere shapes the one that training never shows in the colour of the mask's object.
    """
    most = max((len(record.masks) for record in records), default=0)
    if not most:
        return None
    found = torch.full((len(records), most), -1)
    for row, record in enumerate(records):
        if not _of_shapes(record):
            continue
        for number, (colour, _) in enumerate(pairs_segmented(record.id)):
            never = _SHAPE_NEVER.get(colour)
            if never in record.classes:
                found[row, number] = record.classes.index(never)
    return found


def without(prediction: Prediction, candidates: Tensor) -> Prediction:
    """The prediction with the scores [B, N, K + 1] of some candidates [B, K] at the lowest."""
    hidden = F.pad(candidates, (0, 1))[:, None]  # the background stays

    def hide(scores: Tensor) -> Tensor:
        return scores.masked_fill(hidden, torch.finfo(scores.dtype).min)

    auxiliary = [(masks, hide(scores)) for masks, scores in prediction.auxiliary]
    return replace(prediction, scores=hide(prediction.scores), auxiliary=auxiliary)
