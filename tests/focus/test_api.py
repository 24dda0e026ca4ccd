"""The public API on an untrained tiny model: sizes, refusals, repeatability."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from engine.serve.engine import Engine
from focus import Box, Click, Focus, MaskRegion, Scribble
from focus.api import _result, point, read_pixels
from focus.buckets import bucket_of
from focus.errors import CheckpointMismatch
from focus.inputs import collate
from focus.model import FocusModel
from focus.pipeline import Pipeline
from focus.presets import focus_tiny
from focus.regions import RegionError
from focus.request import Request, RequestError
from focus.sampling import Sampling
from focus.settings import Settings
from focus.tokenizer.dual import Codes
from focus.vocabulary import Vocabulary

SETTINGS = Settings(
    words=4,
    generation=Sampling(temperature=1.0, guidance=2.0),
    editing=Sampling(temperature=0.7),
    steps=2,
    guidance=1.0,
    keep_tokens=True,
    paste_outside=True,
)


@pytest.fixture(scope="module")
def focus() -> Focus:
    torch.manual_seed(0)
    return Focus(FocusModel(focus_tiny()), Vocabulary.load("assets/focus-tiny"), SETTINGS)


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (90, 150, 3), dtype=np.uint8)


def test_masks_have_the_pictures_size(focus: Focus, picture: np.ndarray) -> None:
    result = focus.segment(picture, "the red circle")
    assert [mask.shape for mask in result.masks] == [(90, 150)]
    regions = [Click(5, 5), Box(0, 0, 20, 10), Scribble([(3, 3), (9, 9)])]
    result = focus.segment(picture, regions=regions)
    assert [mask.shape for mask in result.masks] == [(90, 150)] * 3
    assert result.labels == [0, 1, 2]


def test_an_edit_leaves_pixels_outside_its_mask_alone(focus: Focus, picture: np.ndarray) -> None:
    mask = np.zeros((90, 150), np.bool_)
    mask[20:40, 30:60] = True
    result = focus.edit(picture, "remove it", MaskRegion(mask), seed=3)
    reach = max(1, round(150 / 64))
    grown = np.pad(result.mask, reach)
    near = np.any(
        [
            np.roll(grown, (dy, dx), (0, 1))[reach:-reach, reach:-reach]
            for dy in range(-reach, reach + 1)
            for dx in range(-reach, reach + 1)
        ],
        axis=0,
    )
    assert result.image.size == (150, 90)
    assert np.array_equal(np.asarray(result.image)[~near], picture[~near])


def test_results_repeat_and_do_not_depend_on_their_batch(focus: Focus) -> None:
    requests = [Request(task="generation", text=t, seed=i) for i, t in enumerate(("a ring", "two"))]
    together = focus.generate_batch(requests)
    alone = [focus.generate_batch([request])[0] for request in requests]
    for one, two in zip(together, alone, strict=True):
        assert np.abs(one.astype(int) - two.astype(int)).max() <= 1
    again = np.asarray(focus.generate("a ring", seed=0))
    assert np.array_equal(again, alone[0])


@pytest.mark.parametrize("scheduler", ["euler_a", "ddpm"])
def test_schedulers_that_draw_noise_do_not_depend_on_their_batch(
    focus: Focus, scheduler: str
) -> None:
    settings = replace(SETTINGS, scheduler=scheduler, steps=3)
    pipeline = Pipeline(focus.model, focus.vocabulary, settings)
    semantic, pixel = (
        torch.arange(2 * rows * columns).view(2, rows, columns) % 16
        for rows, columns in bucket_of(focus.config).grids
    )
    together = pipeline.paint(Codes(semantic=semantic, pixel=pixel), seeds=[3, 5])
    alone = pipeline.paint(Codes(semantic=semantic[1:], pixel=pixel[1:]), seeds=[5])
    assert (together[1:] - alone).abs().max() < 1e-4
    other = pipeline.paint(Codes(semantic=semantic[1:], pixel=pixel[1:]), seeds=[3])
    assert (other - alone).abs().max() > 1e-3


def test_saved_models_answer_alike(focus: Focus, picture: np.ndarray, tmp_path: Path) -> None:
    focus.save_pretrained(tmp_path / "model")
    loaded = Focus.from_pretrained(tmp_path / "model")
    assert loaded.settings == SETTINGS and loaded.config == focus.config
    copied = loaded.model.state_dict()
    for name, tensor in focus.model.state_dict().items():
        assert torch.equal(tensor, copied[name]), name
    one, two = (m.segment(picture, "the blue star") for m in (focus, loaded))
    assert np.array_equal(one.probabilities[0], two.probabilities[0])


def test_a_failed_save_leaves_the_model_before_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Small(torch.nn.Module):
        config = focus_tiny()

        def __init__(self, value: float) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.full((2,), value))

    def make(value: float) -> Focus:
        return Focus(Small(value), Vocabulary.load("assets/focus-tiny"), SETTINGS)  # type: ignore[arg-type]

    make(1.0).save_pretrained(tmp_path / "m")
    before = {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()}
    assert Vocabulary.load(tmp_path / "m").size == make(1.0).vocabulary.size
    write = Path.write_text

    def full(path: Path, text: str, **given: object) -> int:
        if path.name == "vocabulary.json":
            raise OSError(28, "No space left on device")
        return write(path, text, **given)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        make(2.0).save_pretrained(tmp_path / "m")
    assert {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("damage", ["truncated", "foreign", "pickle", "missing"])
def test_damaged_models_are_refused_in_words(focus: Focus, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "model"
    focus.save_pretrained(folder)
    weights = folder / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:100_000])
        message = "whole safetensors file"
    elif damage == "foreign":
        config = (folder / "config.json").read_text().replace('"num_layers": 6', '"num_layers": 5')
        (folder / "config.json").write_text(config)
        message = "not of this config"
    elif damage == "pickle":
        (folder / "config.json").unlink()
        weights.rename(folder / "pytorch_model.bin")
        message = "pickle"
    else:
        folder = tmp_path / "nowhere"
        message = "no model"
    with pytest.raises(CheckpointMismatch, match=message):
        Focus.from_pretrained(folder)


def test_wrong_requests_say_what_was_expected(focus: Focus, picture: np.ndarray) -> None:
    with pytest.raises(RequestError, match="a task of referring"):
        focus.segment(picture, "x", task="panoptic")
    with pytest.raises(RequestError, match="needs a text"):
        focus.segment(picture, " ")
    with pytest.raises(RequestError, match="at least one region"):
        focus.segment(picture, task="interactive")
    with pytest.raises(RequestError, match="no region came"):
        focus.edit(picture, "make <region> red")
    with pytest.raises(RegionError, match="inside the picture"):
        focus.segment(picture, regions=[Click(200, 5)])
    with pytest.raises(RequestError, match="uint8"):
        read_pixels(picture.astype(np.float32))
    with pytest.raises(RequestError, match="No such file"):
        read_pixels("nowhere.png")


def test_a_prompt_that_leaves_no_room_is_refused(focus: Focus, picture: np.ndarray) -> None:
    limit = focus.config.llm.max_length
    with pytest.raises(RequestError, match=rf"at most {limit - 4} tokens expected") as caught:
        focus.chat(picture, "how many stars are there? " * limit)
    longest = int(re.search(r"got (\d+)", str(caught.value)).group(1))  # type: ignore[union-attr]
    assert longest > limit
    with pytest.raises(RequestError, match=r"a generation prompt .* fewer classes"):
        focus.generate("a red circle and " * limit)
    with pytest.raises(RequestError, match=rf"at most {limit - 4} tokens expected"):
        Engine(focus).chat(picture, "how many stars are there? " * limit)


def test_every_task_of_the_world_fits_the_tiny_model(focus: Focus) -> None:
    from engine.data.records import TASKS
    from engine.data.scenes import sample

    pipeline = Pipeline(focus.model, focus.vocabulary, replace(SETTINGS, words=64))
    bucket = bucket_of(focus.config)
    for task in TASKS:
        records = [sample(task, "test", 0, index, 64) for index in range(8)]
        pipeline.check_lengths(
            collate(records, focus.config, focus.vocabulary, until="answer"), bucket
        )


@pytest.mark.parametrize(
    ("said", "names"),
    [
        ("", ["region 1"]),
        (" red circle ", ["red circle"]),
        ("circle, ", ["region 1", "region 2"]),
        (",", ["region 1", "region 2"]),
        ("star", ["region 1", "region 2"]),
        ("star, ring", ["star", "ring"]),
    ],
)
def test_regions_are_named_as_said_or_by_number(said: str, names: list[str]) -> None:
    count = len(names)
    request = Request(task="interactive", regions=(np.ones((2, 3), bool),) * count)
    found = SimpleNamespace(
        labels=torch.arange(count),
        masks=torch.ones(count, 2, 3, dtype=torch.bool),
        scores=torch.ones(count),
        probabilities=torch.ones(count, 2, 3),
    )
    assert _result(request, found, said).names == names  # type: ignore[arg-type]


def test_a_region_takes_the_place_of_it() -> None:
    assert point("make it blue") == "make <region> blue"
    assert point("Replace that one by a star") == "Replace <region> by a star"
    assert point("remove") == "remove <region>"
    assert point("turn <region> red") == "turn <region> red"


def test_files_are_read_as_the_command_line_reads_them(tmp_path: Path) -> None:
    upright = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    stored = Image.fromarray(upright).transpose(Image.Transpose.ROTATE_90)
    stored.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(read_pixels(tmp_path / "turned.png"), upright)
    with Image.open(tmp_path / "turned.png") as picture:
        assert read_pixels(picture).shape == (6, 4, 3)  # as it lies: its owner's clicks fit it
    deep = Image.fromarray(np.asarray([[0, 257, 65_535]], np.uint16))
    deep.save(tmp_path / "deep.png")
    clear = Image.new("RGBA", (1, 1), (9, 9, 9, 0))
    clear.save(tmp_path / "clear.png")
    for picture in (deep, tmp_path / "deep.png", str(tmp_path / "deep.png")):
        assert read_pixels(picture)[0, :, 0].tolist() == [0, 1, 255]
    for picture in (clear, tmp_path / "clear.png"):
        assert read_pixels(picture).tolist() == [[[255, 255, 255]]]


def _cut(path: Path) -> None:
    Image.effect_noise((64, 64), 90).save(path, format="PNG")
    path.write_bytes(path.read_bytes()[:1500])


def _program(path: Path) -> None:
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n")


@pytest.mark.parametrize(
    ("make", "message"), [(_cut, "damaged or truncated"), (_program, "not a picture")]
)
def test_files_that_are_no_pictures_are_refused_requests(
    tmp_path: Path, make: Callable[[Path], None], message: str
) -> None:
    make(tmp_path / "a.png")
    with pytest.raises(RequestError, match=rf"a\.png: {message}"):
        read_pixels(tmp_path / "a.png")
    if make is _cut:
        with Image.open(tmp_path / "a.png") as lazy, pytest.raises(RequestError, match=message):
            read_pixels(lazy)


def test_grey_and_transparent_pictures_become_rgb() -> None:
    assert read_pixels(Image.new("L", (4, 3), 7)).tolist() == [[[7, 7, 7]] * 4] * 3
