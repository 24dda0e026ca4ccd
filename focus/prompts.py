"""Prompts: what each task looks like as one sequence, for training and inference alike.

user:      [picture tags and block] "\\n" [h_Adapter] "\\n" S_I "\\n" S_C
assistant: names [SEG] mask queries  and/or  tags and block of the picture to write, <|im_end|>

S_I is the instruction of the paper's Table 10, S_C the condition. The picture's block wraps
continuous features when it is read and discrete codes when it is written, in the same structural
tokens. Inference builds the same pieces and stops earlier (`until`), so both agree token by token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sized
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from focus.batch import Source
from focus.buckets import Bucket, bucket_of
from focus.config import FocusConfig
from focus.sequence import Ints, Piece, Sequence, assemble, picture_block
from focus.vocabulary import Vocabulary

INSTRUCTIONS: dict[str, str] = {
    "class": ("Please segment all the positive objects by the following candidate categories."),
    "referring": "Please segment the target referred to by the language description.",
    "reasoning": "Please segment the target referred to by the reasoning-based description.",
    "interactive": "Please segment according to the given visual reference regions.",
    "generation": "Please generate an image according to the following description.",
    "editing": "Please edit the image according to the following instruction.",
}
CANDIDATES = "This is all the candidate categories:"
REGIONS = "This is all regions:"
RECONSTRUCT = "Reconstruct the image according to the given image."
REGION = "<region>"

SEGMENTING = ("class", "referring", "reasoning", "interactive", "editing")
DRAWING = ("generation", "editing")
TASKS = (*INSTRUCTIONS, "vqa")

Until = Literal["answer", "masks", "end"]
OWN = ""  # build(system=OWN): the vocabulary's own system message


class PromptError(ValueError):
    """A sample that cannot be written as a prompt."""


class RecordLike(Protocol):
    """The fields of a data record that a prompt is made of."""

    @property
    def task(self) -> str: ...  # noqa: D102
    @property
    def text(self) -> str: ...  # noqa: D102
    @property
    def answer(self) -> str: ...  # noqa: D102
    @property
    def classes(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def regions(self) -> Sized: ...  # noqa: D102
    @property
    def image(self) -> object | None: ...  # noqa: D102
    @property
    def turns(self) -> tuple[tuple[str, str], ...]: ...  # noqa: D102


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Everything about a sample that its sequence depends on."""

    task: str
    text: str = ""
    answer: str = ""
    classes: tuple[str, ...] = ()
    num_regions: int = 0
    image: bool = True
    turns: tuple[tuple[str, str], ...] = ()  # further (question, answer) pairs of a dialogue

    @classmethod
    def of(cls, record: RecordLike) -> Prompt:
        """Take the fields of a record."""
        return cls(
            task=record.task,
            text=record.text,
            answer=record.answer,
            classes=tuple(record.classes),
            num_regions=len(record.regions),
            image=record.image is not None,
            turns=record.turns,
        )

    def unconditional(self) -> Prompt:
        """Return the prompt of the other branch of classifier-free guidance.

        Generation: the same instruction with an empty description. Editing: "reconstruct the image"
        (in training its target is the source picture).
        """
        if self.task == "generation":
            return replace(self, text="", answer="")
        if self.task == "editing":
            return replace(self, text=RECONSTRUCT, answer="", num_regions=0)
        raise PromptError(f"guidance is for {' and '.join(DRAWING)}, got {self.task!r}")


def build(
    sample: Prompt | RecordLike,
    vocabulary: Vocabulary,
    config: FocusConfig,
    *,
    bucket_in: Bucket | None = None,
    bucket_out: Bucket | None = None,
    codes: tuple[Ints, Ints] | None = None,
    system: str | None = OWN,
    until: Until = "end",
) -> Sequence:
    """Write a sample as one sequence.

    bucket_in, bucket_out: picture sizes read and written; default: the config's own.
    codes: semantic and pixel codes of the picture to write, row-major grids; without them the
        positions hold code 0 until `focus.sequence.fill_codes`.
    system: the system message, None for none; default: the vocabulary's.
    until: where to stop. "answer": before the assistant's first word (of the last turn of a
        dialogue). "masks": after its words and mask queries, where a picture to write begins.
        "end": nothing is left out.

    Raises:
        PromptError: an unknown task, or text, classes and regions that do not fit the task.
    """
    prompt = sample if isinstance(sample, Prompt) else Prompt.of(sample)
    _check(prompt)
    bucket_in, bucket_out = bucket_in or bucket_of(config), bucket_out or bucket_of(config)
    pieces = list(_user(prompt, vocabulary, config, bucket_in, system))
    if prompt.turns:
        pieces += _dialogue(prompt, vocabulary, until)
    elif until != "answer":
        pieces += _answer(prompt, vocabulary, config)
    if until == "end":
        if prompt.task in DRAWING:
            pieces += _picture_out(vocabulary, bucket_out, codes)
        pieces.append(Piece.of([vocabulary.eos_id], learn=True))
    return assemble(pieces, prompt.num_regions)


def prompt_only(
    sample: Prompt | RecordLike,
    vocabulary: Vocabulary,
    config: FocusConfig,
    *,
    bucket_in: Bucket | None = None,
    system: str | None = OWN,
) -> Sequence:
    """Write only what the model is given: `build` until the assistant's first word."""
    return build(sample, vocabulary, config, bucket_in=bucket_in, system=system, until="answer")


def training_texts(repeat: int = 1) -> list[str]:
    """Return all that prompts write around their texts, for `Vocabulary.train`."""
    texts = [*INSTRUCTIONS.values(), CANDIDATES, REGIONS, RECONSTRUCT, "user", "assistant"]
    return texts * repeat


def _dialogue(prompt: Prompt, vocabulary: Vocabulary, until: Until) -> Iterator[Piece]:
    """Every answer, each but the first after its question; all of them are learnt."""
    break_ = vocabulary.encode("\n")
    start, end = [vocabulary.im_start], [vocabulary.eos_id]
    answers = [prompt.answer, *(answer for _, answer in prompt.turns)]
    for number, answer in enumerate(answers):
        if number:
            asked = vocabulary.encode(prompt.turns[number - 1][0])
            user, assistant = (
                start + vocabulary.encode(role) + break_ for role in ("user", "assistant")
            )
            yield Piece.of(break_ + user + asked + end + break_ + assistant)
        if until == "answer" and number == len(prompt.turns):
            return
        yield Piece.of(vocabulary.encode(answer), learn=True)
        if number < len(prompt.turns):
            yield Piece.of(end, learn=True)


def _check(prompt: Prompt) -> None:
    task = prompt.task
    if prompt.turns and task != "vqa":
        raise PromptError(f"turns of a dialogue are for task 'vqa', got task {task!r}")
    if task not in TASKS:
        raise PromptError(f"a task of {', '.join(TASKS)} expected, got {task!r}")
    if prompt.image == (task == "generation") and task != "vqa":
        got = "one" if prompt.image else "none"
        raise PromptError(f"{task} {'has no' if prompt.image else 'needs an'} image, got {got}")
    if (task == "class") != bool(prompt.classes):
        raise PromptError(f"candidate classes are for task 'class', got {prompt.classes} ({task})")
    mentioned = prompt.text.count(REGION)
    if task == "interactive":
        if not prompt.num_regions or mentioned:
            raise PromptError("interactive segmentation needs regions and no text that names them")
    elif mentioned != prompt.num_regions:
        raise PromptError(
            f"one {REGION} in the text for each of {prompt.num_regions} regions expected, "
            f"got {mentioned}"
        )
    if mentioned and not prompt.image:
        raise PromptError(f"{REGION} points at a picture, but the prompt has none")


def _user(
    prompt: Prompt,
    vocabulary: Vocabulary,
    config: FocusConfig,
    bucket: Bucket,
    system: str | None,
) -> Iterator[Piece]:
    break_ = vocabulary.encode("\n")
    system = vocabulary.system if system == OWN else system
    start, end = [vocabulary.im_start], [vocabulary.eos_id]
    if system is not None:
        header = vocabulary.encode("system") + break_ + vocabulary.encode(system)
        yield Piece.of(start + header + end + break_)
    yield Piece.of(start + vocabulary.encode("user") + break_)
    if prompt.image:
        yield picture_block(vocabulary, bucket, read=True)
        yield Piece.of(break_)
        queries = [vocabulary.pad_id] * config.adapter.num_queries
        yield Piece.of(queries, Source.ADAPTER)
        yield Piece.of(break_)
    if prompt.task in INSTRUCTIONS:
        yield Piece.of(vocabulary.encode(INSTRUCTIONS[prompt.task]) + break_)
    yield from _condition(prompt, vocabulary)
    yield Piece.of(end + break_ + start + vocabulary.encode("assistant") + break_)


def _condition(prompt: Prompt, vocabulary: Vocabulary) -> Iterator[Piece]:
    """S_C; every candidate's tokens carry its number."""
    seg = [vocabulary.seg_id]
    if prompt.task == "class":
        yield Piece.of(vocabulary.encode(CANDIDATES))
        for number, name in enumerate(prompt.classes):
            if number:
                yield Piece.of(vocabulary.encode(","))
            yield Piece.of(vocabulary.encode(f" {name}") + seg, condition=number)
        yield Piece.of(vocabulary.encode("."))
    elif prompt.task == "interactive":
        yield Piece.of(vocabulary.encode(REGIONS))
        for number in range(prompt.num_regions):
            if number:
                yield Piece.of(vocabulary.encode(","))
            yield Piece.of([vocabulary.pad_id], Source.REGION, condition=number)
        yield Piece.of(vocabulary.encode("."))
    elif prompt.task in SEGMENTING:
        yield from _text(prompt.text, vocabulary, condition=0)
        yield Piece.of(seg, condition=0)
    else:
        yield from _text(prompt.text, vocabulary, condition=-1)


def _text(text: str, vocabulary: Vocabulary, condition: int) -> Iterator[Piece]:
    """Text in which each "<region>" stands for a pooled region vector."""
    for number, part in enumerate(text.split(REGION)):
        if number:
            yield Piece.of([vocabulary.pad_id], Source.REGION, condition=condition)
        if part:
            yield Piece.of(vocabulary.encode(part), condition=condition)


def _answer(prompt: Prompt, vocabulary: Vocabulary, config: FocusConfig) -> Iterator[Piece]:
    """Words, then [SEG] and the mask queries if the task segments."""
    words = vocabulary.encode(prompt.answer) if prompt.answer else []
    if prompt.task not in SEGMENTING:
        yield Piece.of(words, learn=True)
        return
    yield Piece.of([*words, vocabulary.seg_id], learn=True)
    queries = [vocabulary.pad_id] * config.segment.num_queries
    yield Piece.of(queries, Source.MASK_QUERY)


def _picture_out(
    vocabulary: Vocabulary, bucket: Bucket, codes: tuple[Ints, Ints] | None
) -> Iterator[Piece]:
    piece = picture_block(vocabulary, bucket, read=False)
    if codes is None:
        yield piece
        return
    ids = piece.ids.copy()
    for level, (values, grid) in enumerate(zip(codes, bucket.grids, strict=True)):
        if values.shape != grid:
            raise PromptError(f"level {level} codes of {grid} expected, got {values.shape}")
        allowed = vocabulary.level_ids[level]
        if values.min() < 0 or values.max() >= allowed.stop - allowed.start:
            raise PromptError(f"level {level} codes below {allowed.stop - allowed.start} expected")
        ids[piece.grid[:, 0] == level] = values.reshape(-1) + allowed.start
    yield replace(piece, ids=ids)
