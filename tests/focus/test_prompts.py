import dataclasses

import numpy as np
import pytest
import torch

from focus.batch import IGNORE, Batch, Source
from focus.buckets import BUCKETS, bucket_of
from focus.errors import ShapeError
from focus.presets import focus_3b, focus_tiny
from focus.prompts import (
    INSTRUCTIONS,
    RECONSTRUCT,
    Prompt,
    PromptError,
    build,
    prompt_only,
    training_texts,
)
from focus.sequence import Sequence, collate, fill_codes
from focus.tokenizer.dual import Codes
from focus.vocabulary import Vocabulary

CONFIG = focus_tiny()
TEXTS = [
    "the red circle left of the blue star",
    "what colour is the star",
    "make the heart green",
]
SAMPLES = {
    "class": Prompt(task="class", classes=("red circle", "blue star"), answer="blue star"),
    "referring": Prompt(task="referring", text="the red circle", answer="red circle"),
    "reasoning": Prompt(task="reasoning", text="what shines at night", answer="blue star"),
    "interactive": Prompt(task="interactive", num_regions=2, answer="red circle, blue star"),
    "generation": Prompt(task="generation", text="a red circle", image=False),
    "editing": Prompt(task="editing", text="make <region> green", num_regions=1, answer="heart"),
    "vqa": Prompt(task="vqa", text="what colour is the star", answer="blue"),
}


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary.train(TEXTS * 20 + training_texts(20), 512, 256, 1024)


def write(sequence: Sequence, vocabulary: Vocabulary) -> list[str]:
    """Spell a sequence out, runs of features and cells in short."""
    words: list[str] = []
    for index, source, cell in zip(
        sequence.input_ids.tolist(), sequence.source, sequence.grid.tolist(), strict=True
    ):
        if source != Source.TOKEN:
            word = Source(source).name
        elif cell[0] >= 0:
            word = f"CODE{cell[0]}"
        else:
            word = vocabulary.token(index)
        if words and words[-1].split("*")[0] == word and (source != Source.TOKEN or cell[0] >= 0):
            count = int(words[-1].partition("*")[2] or 1) + 1
            word, words = f"{word}*{count}", words[:-1]
        words.append(word)
    return words


def block(kinds: tuple[str, str]) -> list[str]:
    rows = [[f"{kinds[0]}*8", "<end_of_line>"] * 8, [f"{kinds[1]}*8", "<end_of_line>"] * 8]
    return [
        "<height_64>",
        "<width_64>",
        "<start_of_image>",
        *("<start_of_level0>", *rows[0], "<end_of_level0>"),
        *("<start_of_level1>", *rows[1], "<end_of_level1>"),
        "<end_of_image>",
    ]


def test_editing_is_laid_out_as_the_paper_orders_it(vocabulary):
    words = write(build(SAMPLES["editing"], vocabulary, CONFIG), vocabulary)
    instruction = [vocabulary.token(i) for i in vocabulary.encode(INSTRUCTIONS["editing"])]
    text = [vocabulary.token(i) for i in vocabulary.encode("make ")]
    after = [vocabulary.token(i) for i in vocabulary.encode(" green")]
    answer = [vocabulary.token(i) for i in vocabulary.encode("heart")]
    line = "Ċ"
    assert words == [
        *("<|im_start|>", "Ġuser", line),
        *block(("SEMANTIC", "PIXEL")),
        *(line, "ADAPTER*16", line),
        *instruction,
        line,
        *(*text, "REGION", *after, "[SEG]"),
        *("<|im_end|>", line, "<|im_start|>", "Ġassistant", line),
        *(*answer, "[SEG]", "MASK_QUERY*12"),
        *block(("CODE0", "CODE1")),
        "<|im_end|>",
    ]


def test_dialogues_learn_every_answer_and_nothing_else(vocabulary):
    turns = (("is it red?", "yes"), ("how many hearts?", "2"))
    dialogue = Prompt(task="vqa", text="what is it?", answer="heart", turns=turns)
    whole = build(dialogue, vocabulary, CONFIG)
    taught = whole.labels[whole.labels != IGNORE].tolist()
    answers = [[*vocabulary.encode(a), vocabulary.eos_id] for a in ("heart", "yes", "2")]
    assert taught == [token for answer in answers for token in answer]
    single = build(dataclasses.replace(dialogue, turns=()), vocabulary, CONFIG)
    np.testing.assert_array_equal(whole.input_ids[: len(single)], single.input_ids)
    asked = build(dialogue, vocabulary, CONFIG, until="answer")
    np.testing.assert_array_equal(whole.input_ids[: len(asked)], asked.input_ids)
    assert len(asked) == len(whole) - len(answers[-1])
    with pytest.raises(PromptError, match="turns of a dialogue are for task 'vqa'"):
        build(dataclasses.replace(SAMPLES["referring"], turns=turns), vocabulary, CONFIG)


def test_instructions_are_the_papers():
    assert INSTRUCTIONS["class"] == (
        "Please segment all the positive objects by the following candidate categories."
    )
    assert INSTRUCTIONS["referring"] == (
        "Please segment the target referred to by the language description."
    )
    assert INSTRUCTIONS["reasoning"] == (
        "Please segment the target referred to by the reasoning-based description."
    )
    assert INSTRUCTIONS["interactive"] == (
        "Please segment according to the given visual reference regions."
    )
    assert INSTRUCTIONS["generation"] == (
        "Please generate an image according to the following description."
    )
    assert INSTRUCTIONS["editing"] == (
        "Please edit the image according to the following instruction."
    )


@pytest.mark.parametrize("task", SAMPLES)
def test_prompt_only_is_a_prefix_of_the_training_sequence(vocabulary, task):
    full = build(SAMPLES[task], vocabulary, CONFIG)
    for part in (
        prompt_only(SAMPLES[task], vocabulary, CONFIG),
        build(SAMPLES[task], vocabulary, CONFIG, until="masks"),
    ):
        num = len(part)
        assert 0 < num < len(full)
        for name in ("input_ids", "source", "grid", "condition"):
            np.testing.assert_array_equal(getattr(part, name), getattr(full, name)[:num])
        assert (full.labels[: num - 1] == part.labels[: num - 1]).all()
    unknown = dataclasses.replace(SAMPLES[task], answer="")
    blind = prompt_only(unknown, vocabulary, CONFIG)
    np.testing.assert_array_equal(
        blind.input_ids, prompt_only(SAMPLES[task], vocabulary, CONFIG).input_ids
    )


@pytest.mark.parametrize("task", SAMPLES)
def test_labels_teach_what_follows_and_nothing_that_is_given(vocabulary, task):
    sample = SAMPLES[task]
    full = build(sample, vocabulary, CONFIG)
    start = len(prompt_only(sample, vocabulary, CONFIG))
    taught = np.flatnonzero(full.labels != IGNORE)
    assert taught[0] == start - 1
    np.testing.assert_array_equal(full.labels[taught], full.input_ids[taught + 1])
    assert full.labels[-1] == IGNORE
    assert full.labels[taught[-1]] == vocabulary.eos_id
    # everything that the assistant writes is taught, except mask queries, which are inputs
    follows = np.arange(start, len(full))
    queries = full.source[follows] == Source.MASK_QUERY
    np.testing.assert_array_equal(taught + 1, follows[~queries])
    expected = 0 if task in ("generation", "vqa") else CONFIG.segment.num_queries
    assert queries.sum() == expected


def test_conditions_number_the_candidates(vocabulary):
    full = build(SAMPLES["class"], vocabulary, CONFIG)
    for number, name in enumerate(SAMPLES["class"].classes):
        ids = full.input_ids[full.condition == number].tolist()
        assert ids == [*vocabulary.encode(name), vocabulary.seg_id]
    assert full.num_conditions == 2
    referring = build(SAMPLES["referring"], vocabulary, CONFIG)
    ids = referring.input_ids[referring.condition == 0].tolist()
    assert ids == [*vocabulary.encode("the red circle"), vocabulary.seg_id]
    assert referring.num_conditions == 1
    regions = build(SAMPLES["interactive"], vocabulary, CONFIG)
    assert regions.source[regions.condition >= 0].tolist() == [Source.REGION] * 2
    assert regions.condition[regions.source == Source.REGION].tolist() == [0, 1]
    edit = build(SAMPLES["editing"], vocabulary, CONFIG)
    assert (edit.source[edit.condition == 0] == Source.REGION).sum() == 1
    for task in ("generation", "vqa"):
        assert build(SAMPLES[task], vocabulary, CONFIG).num_conditions == 0


def test_system_message_follows_the_vocabulary_and_the_argument(vocabulary):
    plain = write(prompt_only(SAMPLES["vqa"], vocabulary, CONFIG), vocabulary)
    assert plain[:3] == ["<|im_start|>", "Ġuser", "Ċ"]
    sequence = prompt_only(SAMPLES["vqa"], vocabulary, CONFIG, system="Be brief.")
    begin = vocabulary.encode("system") + vocabulary.encode("\n") + vocabulary.encode("Be brief.")
    assert sequence.input_ids[1 : 1 + len(begin)].tolist() == begin
    assert sequence.input_ids[1 + len(begin)] == vocabulary.eos_id
    assert write(sequence, vocabulary)[-len(plain) :] == plain


@pytest.mark.parametrize("bucket", BUCKETS, ids=lambda b: f"{b.size[0]}x{b.size[1]}")
def test_every_bucket_has_the_block_of_the_papers_layout(vocabulary, bucket):
    lengths = {
        (256, 256): 368,
        (512, 512): 1404,
        (512, 384): 1014,
        (384, 512): 1002,
        (576, 384): 1140,
        (384, 576): 1122,
        (768, 384): 1570,
        (384, 768): 1533,
        (960, 320): 1662,
        (320, 960): 1600,
        (1024, 256): 1454,
        (256, 1024): 1379,
    }
    sample = SAMPLES["generation"]
    full = build(sample, vocabulary, focus_3b(), bucket_out=bucket)
    short = prompt_only(sample, vocabulary, focus_3b())
    assert len(full) - len(short) == 2 + lengths[bucket.size] + 1
    assert bucket.block_length == lengths[bucket.size]
    visual = full.grid[full.grid[:, 0] >= 0]
    assert len(visual) == bucket.num_visual
    for level, (rows, columns) in enumerate(bucket.grids):
        cells = visual[visual[:, 0] == level][:, 1:]
        expected = np.indices((rows, columns)).reshape(2, -1).T  # row-major
        np.testing.assert_array_equal(cells, expected)


def test_collate_pads_on_the_right(vocabulary):
    rows = [build(SAMPLES[t], vocabulary, CONFIG) for t in ("vqa", "editing", "class")]
    batch = Batch(task="vqa", **collate(rows, pad_id=vocabulary.pad_id, length=400))
    assert batch.input_ids.shape == (3, 400)
    assert batch.grid.shape == (3, 400, 3)
    assert batch.lengths.tolist() == [len(r) for r in rows]
    assert batch.num_conditions.tolist() == [0, 1, 2]
    assert batch.num_regions.tolist() == [0, 1, 0]
    for row, sequence in enumerate(rows):
        num = len(sequence)
        for name in ("input_ids", "labels", "source", "grid", "condition"):
            values = getattr(batch, name)
            np.testing.assert_array_equal(values[row, :num].numpy(), getattr(sequence, name))
        assert (batch.input_ids[row, num:] == vocabulary.pad_id).all()
        assert (batch.labels[row, num:] == IGNORE).all()
        assert (batch.grid[row, num:] == -1).all()
        assert (batch.condition[row, num:] == -1).all()
    with pytest.raises(ShapeError, match=r"at most 100 tokens expected, got \d+"):
        collate(rows, length=100)


def test_fill_codes_equals_building_with_codes(vocabulary):
    bucket = bucket_of(CONFIG)
    generator = torch.Generator().manual_seed(0)
    semantic = torch.randint(256, (2, *bucket.semantic_grid), generator=generator)
    pixel = torch.randint(1024, (2, *bucket.pixel_grid), generator=generator)
    tasks = ("editing", "generation")
    blank = Batch(task="editing", **collate([build(SAMPLES[t], vocabulary, CONFIG) for t in tasks]))
    known = [
        build(SAMPLES[t], vocabulary, CONFIG, codes=(s.numpy(), p.numpy()))
        for t, s, p in zip(tasks, semantic, pixel, strict=True)
    ]
    filled = fill_codes(blank, Codes(semantic=semantic, pixel=pixel), vocabulary)
    expected = collate(known)
    assert torch.equal(filled.input_ids, expected["input_ids"])
    assert torch.equal(filled.labels, expected["labels"])
    assert not torch.equal(filled.input_ids, blank.input_ids)
    with pytest.raises(ShapeError, match=r"level 0 codes \[2, 8, 8\] expected, got \(2, 7, 8\)"):
        fill_codes(blank, Codes(semantic=semantic[:, 1:], pixel=pixel), vocabulary)


def test_unconditional_prompts(vocabulary):
    drawn = SAMPLES["generation"].unconditional()
    assert drawn.text == ""
    edit = SAMPLES["editing"].unconditional()
    assert (edit.text, edit.num_regions, edit.answer) == (RECONSTRUCT, 0, "")
    build(edit, vocabulary, CONFIG)
    with pytest.raises(PromptError, match="guidance is for"):
        SAMPLES["vqa"].unconditional()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "dance"}, "a task of class, .* expected, got 'dance'"),
        ({"text": "make it green"}, "one <region> in the text for each of 1 regions expected"),
        ({"text": "<region> <region>"}, "got 2"),
        ({"classes": ("a",)}, "candidate classes are for task 'class'"),
        ({"image": False}, "editing needs an image, got none"),
        ({"task": "generation"}, "generation has no image, got one"),
        ({"task": "interactive"}, "no text that names them"),
        ({"task": "class", "text": "", "num_regions": 0}, "candidate classes"),
    ],
)
def test_samples_that_fit_no_prompt_are_refused(vocabulary, changes, message):
    with pytest.raises(PromptError, match=message):
        build(dataclasses.replace(SAMPLES["editing"], **changes), vocabulary, CONFIG)


def test_codes_of_the_wrong_picture_are_refused(vocabulary):
    semantic, pixel = np.zeros((8, 8), np.int64), np.full((8, 8), 1024)
    with pytest.raises(PromptError, match="level 1 codes below 1024 expected"):
        build(SAMPLES["generation"], vocabulary, CONFIG, codes=(semantic, pixel))
    with pytest.raises(PromptError, match=r"level 0 codes of \(8, 8\) expected, got \(7, 8\)"):
        build(SAMPLES["generation"], vocabulary, CONFIG, codes=(semantic[1:], pixel))
