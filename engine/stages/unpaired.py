"""Words that the softmax of an answer leaves out: pairs that training never shows.

No training picture holds a red triangle (see `HELD_OUT`), so cross-entropy teaches that what is red
is no triangle, and the model stops to read the shape of red things. That a pair is absent says
nothing of how it looks: where one word of a pair is known, the word that training never pairs with
it is left out of the softmax of the other. This is logit adjustment (arXiv:2007.07314) for classes
of prior zero.
"""

# B batch, T sequence

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from engine.data.records import Record
from engine.data.scene_model import COLOURS, SHAPES, UNSEEN_PAIRS
from engine.data.scene_tasks import pairs_asked
from engine.stages.answers import answer_starts
from focus.batch import Batch
from focus.vocabulary import Vocabulary

_SHAPE_NEVER = dict(UNSEEN_PAIRS)  # colour -> the shape that it never has; each occurs once
_COLOUR_NEVER = {shape: colour for colour, shape in UNSEEN_PAIRS}


def unpaired(batch: Batch, records: Sequence[Record], vocabulary: Vocabulary) -> Tensor:
    """Return the id [B, T] that the softmax at each label leaves out, -1 where none.

    Names ("red circle") say both words of their pair; of an answer of one word the other is that
    of the object in question.
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
        for t, pairs in zip(starts[row], pairs_asked(record.id), strict=False):
            if t < 0 or len(pairs) != 1 or found[row, t] >= 0:
                continue
            colour, shape = pairs[0]
            if labels[t] == ids[colour]:
                found[row, t] = ids[_COLOUR_NEVER[shape]]
            elif labels[t] == ids[shape]:
                found[row, t] = ids[_SHAPE_NEVER[colour]]
    return found
