import json
import pickle

import pytest
from tokenizers import AddedToken, Tokenizer, models

from focus.presets import focus_tiny
from focus.prompts import training_texts
from focus.vocabulary import Vocabulary, VocabularyError

TEXTS = ["the red circle left of the blue star", "make the heart green", *training_texts(3)]


@pytest.fixture(scope="module")
def tiny() -> Vocabulary:
    return Vocabulary.train(TEXTS, 512, 256, 1024)


def qwen_tokenizer(size: int = 151_665, first_special: int = 151_643) -> Tokenizer:
    """A tokenizer with Qwen2.5's sizes and special ids but other words."""
    tokenizer = Tokenizer(models.BPE({f"w{i}": i for i in range(first_special)}, []))
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    names += [f"<|special_{i}|>" for i in range(size - first_special - 3)]
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in names])
    return tokenizer


def test_from_qwen_has_the_exact_ids():
    vocabulary = Vocabulary.from_qwen(qwen_tokenizer())
    assert vocabulary.structure == {
        "start_of_image": 151_665,
        "end_of_image": 151_666,
        "end_of_line": 151_667,
        "start_of_level0": 151_668,
        "end_of_level0": 151_669,
        "start_of_level1": 151_670,
        "end_of_level1": 151_671,
    }
    assert vocabulary.height_id(64) == 151_672
    assert vocabulary.height_id(1024) == 151_687
    assert vocabulary.width_id(64) == 151_688
    assert vocabulary.width_id(1024) == 151_703
    assert vocabulary.semantic(0) == 151_704
    assert vocabulary.semantic(32_767) == 184_471
    assert vocabulary.pixel(0) == 184_472
    assert vocabulary.pixel(98_303) == 282_775
    assert vocabulary.seg_id == 282_776
    assert (vocabulary.pad_id, vocabulary.im_start, vocabulary.eos_id) == (
        151_643,
        151_644,
        151_645,
    )
    assert vocabulary.semantic_ids == slice(151_704, 184_472)
    assert vocabulary.pixel_ids == slice(184_472, 282_776)
    assert vocabulary.system == "You are a helpful assistant."
    assert vocabulary.token(151_704) == "<|image_level0_0|>"
    assert vocabulary.token(282_775) == "<|image_level1_98303|>"


@pytest.mark.parametrize(
    ("size", "first", "message"),
    [
        (151_664, 151_643, "151665 tokens expected, got 151664"),
        (151_665, 151_642, r"<\|endoftext\|> at 151643 expected, got 151642"),
    ],
)
def test_from_qwen_refuses_other_tokenizers(size, first, message):
    with pytest.raises(VocabularyError, match=message):
        Vocabulary.from_qwen(qwen_tokenizer(size, first))


def test_tiny_fits_its_table_and_keeps_the_order(tiny):
    config = focus_tiny()
    large = Vocabulary.train(TEXTS * 50, 700, 256, 1024)
    assert large.size <= config.llm.vocab_size
    assert tiny.structure["start_of_image"] == tiny.text_size
    assert tiny.semantic(0) == tiny.text_size + 39
    assert tiny.pixel(0) == tiny.semantic(0) + 256
    assert tiny.seg_id == tiny.pixel(1023) + 1 == tiny.size - 1
    names = [tiny.token(i) for i in range(tiny.size)]
    assert len(set(names)) == len(names)
    assert names[tiny.height_id(128)] == "<height_128>"
    assert names[tiny.width_id(1024)] == "<width_1024>"
    assert names[tiny.structure["end_of_line"]] == "<end_of_line>"
    assert names[-1] == "[SEG]"


@pytest.mark.parametrize(
    "text",
    ["the red circle", "été — 赤い 🙂", " two  spaces ", "\n", "", "red, blue.", "tab\there"],
)
def test_decode_gives_back_the_text(tiny, text):
    assert tiny.decode(tiny.encode(text)) in (text, text.removeprefix(" "))


def test_a_word_has_the_same_ids_everywhere(tiny):
    assert tiny.encode("red circle") == tiny.encode(" red circle")
    assert tiny.encode("the red circle")[-2:] == tiny.encode("red circle")


@pytest.mark.parametrize(
    "text",
    ["<|im_end|>", "<|im_start|>system\n", "[SEG]", "<start_of_image>", "<|image_level0_3|>"],
)
def test_typed_special_tokens_stay_text(tiny, text, tmp_path):
    tiny.save(tmp_path)
    for vocabulary in (tiny, Vocabulary.load(tmp_path), pickle.loads(pickle.dumps(tiny))):
        ids = vocabulary.encode(text)
        assert not set(ids) & vocabulary.special_ids
        assert max(ids) < vocabulary.text_size
        assert vocabulary.decode(ids) == text


def test_decode_leaves_out_what_is_not_text(tiny):
    ids = [tiny.im_start, *tiny.encode("red"), tiny.seg_id, tiny.pixel(3), tiny.eos_id]
    assert tiny.decode(ids) == "red"


def test_save_and_load_give_the_same_vocabulary(tiny, tmp_path):
    tiny.save(tmp_path / "here")
    loaded = Vocabulary.load(tmp_path / "here")
    assert [loaded.token(i) for i in range(loaded.size)] == [
        tiny.token(i) for i in range(tiny.size)
    ]
    assert loaded.encode("the purple ring") == tiny.encode("the purple ring")
    assert loaded.system is None
    assert loaded.seg_id == tiny.seg_id


def test_training_is_repeatable(tiny):
    again = Vocabulary.train(TEXTS, 512, 256, 1024)
    assert [again.token(i) for i in range(again.size)] == [tiny.token(i) for i in range(tiny.size)]


def test_load_names_what_is_wrong(tiny, tmp_path):
    with pytest.raises(VocabularyError, match="no such file"):
        Vocabulary.load(tmp_path)
    tiny.save(tmp_path)
    path = tmp_path / "vocabulary.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "format_version": 99}))
    with pytest.raises(VocabularyError, match="format version 1 expected, got 99"):
        Vocabulary.load(tmp_path)
    path.write_text(json.dumps({**values, "colour": 1}))
    with pytest.raises(VocabularyError, match="colour"):
        Vocabulary.load(tmp_path)
    path.write_text("{")
    with pytest.raises(VocabularyError, match="JSON expected"):
        Vocabulary.load(tmp_path)
    path.write_text(json.dumps(values))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(VocabularyError, match="a tokenizer expected"):
        Vocabulary.load(tmp_path)


def test_ids_out_of_range_are_refused(tiny):
    with pytest.raises(VocabularyError, match=r"semantic code in 0\.\.255 expected, got 256"):
        tiny.semantic(256)
    with pytest.raises(VocabularyError, match=r"pixel code in 0\.\.1023 expected, got -1"):
        tiny.pixel(-1)
    for pixels in (0, 100, 1088):
        with pytest.raises(VocabularyError, match=f"got {pixels}; use a size"):
            tiny.height_id(pixels)
    with pytest.raises(VocabularyError, match="text_size of at least 259 expected, got 100"):
        Vocabulary.train(["a"], 100, 4, 4)
