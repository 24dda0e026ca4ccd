"""The assembled model: where embeddings come from, what is pooled, what the sections return."""

import pytest
import torch

from focus.batch import Pictures, Source
from focus.config import (
    ConfigError,
    FocusConfig,
    VanillaConfig,
    from_json,
    to_json,
)
from focus.inputs import collate, resize
from focus.losses import expected_code_loss, language_loss
from focus.model import FocusModel, gather, place, pool_conditions
from focus.presets import CONFIGS, focus_tiny
from focus.request import Request
from focus.vocabulary import Vocabulary


@pytest.fixture(scope="module")
def model() -> FocusModel:
    torch.manual_seed(0)
    return FocusModel(focus_tiny()).eval()


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary.load("assets/focus-tiny")


def requests(count: int) -> list[Request]:
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (count, 128, 128, 3), generator=generator, dtype=torch.uint8)
    texts = ("the red circle", "the blue star left of the green ring", "a ring")
    return [
        Request(task="referring", text=text, image=picture.numpy())
        for text, picture in zip(texts, pictures, strict=False)
    ]


def test_tiny_has_at_most_thirty_million_parameters(model: FocusModel) -> None:
    assert sum(parameter.numel() for parameter in model.parameters()) <= 30_000_000


def test_place_puts_values_in_reading_order() -> None:
    embedded = torch.zeros(2, 4, 1)
    where = torch.tensor([[0, 1, 0, 1], [1, 0, 0, 0]]).bool()
    values = torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]])
    assert place(embedded, where, values)[..., 0].tolist() == [[0, 1, 0, 2], [3, 0, 0, 0]]


def test_gather_undoes_place() -> None:
    values = torch.randn(3, 2, 5)
    where = torch.tensor([[0, 1, 0, 1], [1, 1, 0, 0], [0, 0, 1, 1]]).bool()
    assert torch.equal(gather(place(torch.zeros(3, 4, 5), where, values), where, 2), values)


def test_pool_conditions_averages_each_candidates_tokens() -> None:
    hidden = torch.arange(8.0).reshape(1, 4, 2)
    condition = torch.tensor([[0, -1, 1, 0]])
    expected = [[[3.0, 4.0], [4.0, 5.0], [0.0, 0.0]]]
    assert pool_conditions(hidden, condition, 3).tolist() == expected


def test_every_source_reaches_the_sequence(model: FocusModel, vocabulary: Vocabulary) -> None:
    batch = collate(requests(2), model.config, vocabulary)
    assert batch.pictures is not None
    features = model.front.encode(batch.pictures)
    embedded = model.front.embed(batch, features)
    bare = embedded - model.front._embed_cells(
        batch.grid, torch.nn.functional.pad(batch.grid[:, 1:], (0, 0, 0, 1), value=-1)
    )
    for source, values in model.front.sources(batch, features):
        found = gather(bare, batch.source == source, values.shape[1])
        assert torch.allclose(found, values, atol=1e-6), source
    sources = set(batch.source.unique().tolist())
    assert sources == {int(s) for s in Source} - {Source.REGION}


def test_rows_do_not_depend_on_their_batch(model: FocusModel, vocabulary: Vocabulary) -> None:
    together = collate(requests(2), model.config, vocabulary)
    with torch.no_grad():
        both, _ = model(together)
        for row, request in enumerate(requests(2)):
            alone = collate([request], model.config, vocabulary)
            one, _ = model(alone)
            length = int(alone.lengths[0])
            assert torch.allclose(one[0, :length], both[row, :length], atol=2e-5)


def test_language_loss_equals_cross_entropy_over_labels() -> None:
    torch.manual_seed(0)
    hidden, table = torch.randn(2, 5, 8).double(), torch.randn(11, 8).double()
    labels = torch.tensor([[1, -100, 3, 4, -100], [-100, 2, 2, -100, 10]])
    kept = labels != -100
    expected = torch.nn.functional.cross_entropy((hidden @ table.T)[kept], labels[kept])
    assert language_loss(hidden, labels, table).item() == pytest.approx(expected.item(), rel=1e-6)
    weight = torch.zeros(2, 5)
    weight[0, 0] = 2.0
    single = torch.nn.functional.cross_entropy((hidden @ table.T)[0, :1], labels[0, :1])
    weighted = language_loss(hidden, labels, table, weight)
    assert weighted.item() == pytest.approx(single.item(), rel=1e-6)
    assert language_loss(hidden, torch.full_like(labels, -100), table).item() == 0


def test_expected_code_loss_vanishes_for_a_sure_model() -> None:
    codes = torch.randn(6, 4)
    table = torch.eye(6) * 100
    index = torch.tensor([2, 5])
    assert expected_code_loss(torch.eye(6)[index], index, table, codes).item() < 1e-10
    unsure = expected_code_loss(torch.zeros(2, 6), index, table, codes)
    wanted = (codes.mean(0) - codes[index]).square().mean()
    assert unsure.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_resize_halves_by_averaging() -> None:
    pictures = torch.rand(1, 3, 8, 8)
    expected = pictures.reshape(1, 3, 4, 2, 4, 2).mean((3, 5))
    assert torch.allclose(resize(pictures, (4, 4)), expected, atol=1e-6)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_config_survives_json(name: str) -> None:
    config = CONFIGS[name]()
    assert from_json(to_json(config)) == config


def test_config_errors_name_the_field() -> None:
    values = to_json(focus_tiny())
    values["llm"]["depth"] = 3
    with pytest.raises(ConfigError, match=r"config.llm: unknown keys \['depth'\]"):
        from_json(values)
    with pytest.raises(ConfigError, match="format version"):
        from_json({**to_json(focus_tiny()), "format_version": 99})
    with pytest.raises(ConfigError, match="multiple of 14 pixels"):
        FocusConfig(name="x", vanilla=VanillaConfig(image_size=(50, 56), patch_size=7))


def test_regions_are_pooled_on_the_pictures_own_grid() -> None:
    torch.manual_seed(0)
    front = FocusModel(focus_tiny()).front.eval()
    wide = Pictures(
        vanilla=torch.rand(1, 3, 112, 224),
        hierarchical=torch.rand(1, 3, 128, 128),
        pixel=torch.rand(1, 3, 64, 128),
    )
    with torch.no_grad():
        features = front.encode(wide)
        points = torch.tensor([1 / 32, 1 / 16]).expand(1, 1, 4, 2)  # centre of the first cell
        pooled = front.pool_regions(features, points)[0, 0]
    assert features.grid == (8, 16)
    torch.testing.assert_close(pooled, features.fused.projected[0, 0])
