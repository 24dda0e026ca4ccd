"""The vocabulary: the text tokens of a tokenizer, then structure, visual codes and extras.

New ids follow the text by arithmetic, in ILLUME+'s order: seven structural tokens, heights and
widths 64..1024, semantic codes, pixel codes, [SEG]. They never enter the tokenizer, so nothing that
a user types can turn into one; special tokens typed as text stay text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

FORMAT_VERSION = 1
TOKENIZER, VOCABULARY = "tokenizer.json", "vocabulary.json"
CACHE_SIZE = 65_536  # texts whose ids are kept
SYSTEM = "You are a helpful assistant."  # Qwen2.5's own

STRUCTURE = (
    "start_of_image",
    "end_of_image",
    "end_of_line",
    "start_of_level0",
    "end_of_level0",
    "start_of_level1",
    "end_of_level1",
)
SIZE_STEP, MAX_SIZE = 64, 1024
NUM_SIZES = MAX_SIZE // SIZE_STEP
PAD, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

QWEN_TEXT_SIZE = 151_665
QWEN_IDS = {PAD: 151_643, IM_START: 151_644, IM_END: 151_645}
QWEN_SEMANTIC, QWEN_PIXEL = 32_768, 98_304


class VocabularyError(ValueError):
    """A tokenizer or a vocabulary file that is not what FOCUS needs."""


@dataclass(frozen=True, kw_only=True)
class _Settings:
    num_semantic: int
    num_pixel: int
    prefix_space: bool  # words at the start of a text get the space that they have inside one
    system: str | None  # the ChatML system message; None: none


class Vocabulary:
    """Ids of everything the language model reads and writes.

    text_size: number of text tokens; the first new id.
    size: number of ids in use; rows of the embedding table beyond it are reserved.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        num_semantic: int,
        num_pixel: int,
        *,
        prefix_space: bool = False,
        system: str | None = SYSTEM,
    ) -> None:
        self._tokenizer = tokenizer
        self._tokenizer.encode_special_tokens = True  # specials typed as text stay text
        self._settings = _Settings(
            num_semantic=num_semantic, num_pixel=num_pixel, prefix_space=prefix_space, system=system
        )
        self.text_size: int = tokenizer.get_vocab_size()
        self.num_semantic, self.num_pixel = num_semantic, num_pixel
        self.system = system
        self.structure = {name: self.text_size + i for i, name in enumerate(STRUCTURE)}
        self._heights = self.text_size + len(STRUCTURE)
        self._widths = self._heights + NUM_SIZES
        self._semantic = self._widths + NUM_SIZES
        self._pixel = self._semantic + num_semantic
        self.seg_id = self._pixel + num_pixel
        self.size = self.seg_id + 1
        self.pad_id = self._special(PAD)
        self.im_start = self._special(IM_START)
        self.eos_id = self._special(IM_END)
        self.special_ids = frozenset(tokenizer.get_added_tokens_decoder())  # never part of a text
        self._encoded: dict[str, tuple[int, ...]] = {}

    # ---------------------------------------------------------------- ids

    @property
    def semantic_ids(self) -> slice:
        """Ids of the semantic codes (level 0)."""
        return slice(self._semantic, self._pixel)

    @property
    def pixel_ids(self) -> slice:
        """Ids of the pixel codes (level 1)."""
        return slice(self._pixel, self._pixel + self.num_pixel)

    @property
    def level_ids(self) -> tuple[slice, slice]:
        """Ids of level 0 and of level 1."""
        return self.semantic_ids, self.pixel_ids

    def semantic(self, code: int) -> int:
        """Return the id of a semantic code."""
        return self._semantic + _in_range("semantic code", code, self.num_semantic)

    def pixel(self, code: int) -> int:
        """Return the id of a pixel code."""
        return self._pixel + _in_range("pixel code", code, self.num_pixel)

    def height_id(self, pixels: int) -> int:
        """Return the id of <height_pixels>, a multiple of 64 up to 1024."""
        return self._heights + _size_index("height", pixels)

    def width_id(self, pixels: int) -> int:
        """Return the id of <width_pixels>, a multiple of 64 up to 1024."""
        return self._widths + _size_index("width", pixels)

    def token(self, index: int) -> str:
        """Return the written form of any id."""
        _in_range("token id", index, self.size)
        if index < self.text_size:
            return self._tokenizer.id_to_token(index) or ""
        if index < self._heights:
            return f"<{STRUCTURE[index - self.text_size]}>"
        for name, start, end in (
            ("height", self._heights, self._widths),
            ("width", self._widths, self._semantic),
        ):
            if index < end:
                return f"<{name}_{(index - start + 1) * SIZE_STEP}>"
        if index < self._pixel:
            return f"<|image_level0_{index - self._semantic}|>"
        if index < self.seg_id:
            return f"<|image_level1_{index - self._pixel}|>"
        return "[SEG]"

    # ---------------------------------------------------------------- text

    def encode(self, text: str) -> list[int]:
        """Return the ids of plain text."""
        found = self._encoded.get(text)
        if found is None:
            if len(self._encoded) >= CACHE_SIZE:
                self._encoded.clear()
            found = self._encoded[text] = self._encode_text(text)
        return list(found)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; special, structural and visual ones are left out."""
        text: str = self._tokenizer.decode([i for i in ids if 0 <= i < self.text_size])
        return text.removeprefix(" ") if self._settings.prefix_space else text

    def _encode_text(self, text: str) -> tuple[int, ...]:
        if self._settings.prefix_space and re.match(r"\w", text):
            text = " " + text
        return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._tokenizer.encode_special_tokens = True  # a copied tokenizer forgets it

    def _special(self, token: str) -> int:
        index = self._tokenizer.token_to_id(token)
        if index is None:
            raise VocabularyError(f"a tokenizer with {token} expected; use a ChatML tokenizer")
        return int(index)

    # ---------------------------------------------------------------- making one

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        text_size: int,
        num_semantic: int,
        num_pixel: int,
        *,
        system: str | None = None,
    ) -> Vocabulary:
        """Learn a byte-level BPE of at most `text_size` tokens from texts.

        The texts should hold everything that prompts write around them as well
        (`focus.prompts.training_texts`). Any text can be encoded: all 256 bytes are tokens.

        Raises:
            VocabularyError: `text_size` leaves no room for the 256 bytes and the specials.
        """
        specials = [PAD, IM_START, IM_END]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        if text_size < len(alphabet) + len(specials):
            raise VocabularyError(
                f"text_size of at least {len(alphabet) + len(specials)} expected, got {text_size}"
            )
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=text_size,
            special_tokens=specials,
            initial_alphabet=alphabet,
            show_progress=False,
        )
        spaced = (" " + text if re.match(r"\w", text) else text for text in texts)
        tokenizer.train_from_iterator(spaced, trainer)
        return cls(tokenizer, num_semantic, num_pixel, prefix_space=True, system=system)

    @classmethod
    def from_qwen(
        cls,
        source: str | Path | Tokenizer,
        *,
        num_semantic: int = QWEN_SEMANTIC,
        num_pixel: int = QWEN_PIXEL,
    ) -> Vocabulary:
        """Wrap Qwen2.5's tokenizer (a directory, a tokenizer.json or a `Tokenizer`).

        Raises:
            VocabularyError: the ids are not Qwen2.5's, so the published tables would not fit.
        """
        tokenizer = source if isinstance(source, Tokenizer) else read_tokenizer(Path(source))
        if tokenizer.get_vocab_size() != QWEN_TEXT_SIZE:
            raise VocabularyError(
                f"Qwen2.5's tokenizer of {QWEN_TEXT_SIZE} tokens expected, got "
                f"{tokenizer.get_vocab_size()}; give the tokenizer of a Qwen2.5 release"
            )
        for token, index in QWEN_IDS.items():
            if tokenizer.token_to_id(token) != index:
                raise VocabularyError(
                    f"{token} at {index} expected, got {tokenizer.token_to_id(token)}; "
                    "give the tokenizer of a Qwen2.5 release"
                )
        return cls(tokenizer, num_semantic, num_pixel)

    def save(self, directory: str | Path) -> None:
        """Write tokenizer.json and vocabulary.json."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in self.files().items():
            (directory / name).write_text(text, encoding="utf-8")

    def files(self) -> dict[str, str]:
        """Return what `save` writes: texts by file name."""
        values = {"format_version": FORMAT_VERSION, **asdict(self._settings)}
        return {
            TOKENIZER: self._tokenizer.to_str(pretty=True),
            VOCABULARY: json.dumps(values, indent=2, ensure_ascii=False) + "\n",
        }

    @classmethod
    def load(cls, directory: str | Path) -> Vocabulary:
        """Read what `save` wrote.

        Raises:
            VocabularyError: a file is missing, broken or of another version.
        """
        path = Path(directory) / VOCABULARY
        values = _read_json(path)
        version = values.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise VocabularyError(
                f"{path}: format version {FORMAT_VERSION} expected, got {version!r}; "
                "this file was written by another release of focus-vl"
            )
        try:
            settings = _Settings(**values)
        except TypeError as error:
            raise VocabularyError(f"{path}: {error}") from error
        return cls(
            read_tokenizer(Path(directory)),
            settings.num_semantic,
            settings.num_pixel,
            prefix_space=settings.prefix_space,
            system=settings.system,
        )


def _in_range(what: str, value: int, size: int) -> int:
    if not 0 <= value < size:
        raise VocabularyError(f"a {what} in 0..{size - 1} expected, got {value}")
    return int(value)


def _size_index(what: str, pixels: int) -> int:
    if pixels % SIZE_STEP or not SIZE_STEP <= pixels <= MAX_SIZE:
        raise VocabularyError(
            f"a {what} of {SIZE_STEP}, {2 * SIZE_STEP}, ... {MAX_SIZE} pixels expected, "
            f"got {pixels}; use a size from focus.buckets"
        )
    return pixels // SIZE_STEP - 1


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise VocabularyError(f"{path} expected, but there is no such file") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise VocabularyError(f"{path}: JSON expected, got {error}") from error
    if not isinstance(values, dict):
        raise VocabularyError(f"{path}: an object expected, got {type(values).__name__}")
    return values


def read_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer.json, or that of a directory; raises `VocabularyError`."""
    path = path / TOKENIZER if path.is_dir() else path
    if not path.is_file():
        raise VocabularyError(f"{path} expected, but there is no such file")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises bare Exception
        raise VocabularyError(f"{path}: a tokenizer expected, got {error}") from error
