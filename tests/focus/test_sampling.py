import pytest
import torch

from focus.sampling import EDITING, GENERATION, GREEDY, Sampling, choose, guide, gumbel

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, -torch.inf])
IDS = torch.arange(100, 106)
DRAWS = 40_000


def draw(sampling: Sampling, level: int | None = 0, num: int = DRAWS) -> torch.Tensor:
    """Frequencies of `num` draws, each from its own seed."""
    chosen = choose(
        LOGITS.expand(num, -1),
        IDS,
        sampling,
        [level] * num,
        torch.arange(num) * 7919,
        torch.zeros(num, dtype=torch.int64),
    )
    return torch.bincount(chosen - 100, minlength=6) / num


def assert_frequencies(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Within five standard deviations of the binomial; exactly zero where forbidden."""
    error = (expected * (1 - expected) / DRAWS).sqrt()
    assert ((found - expected).abs() <= 5 * error).all(), (found, expected)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature):
    expected = (LOGITS / temperature).softmax(-1)
    assert_frequencies(draw(Sampling(temperature=temperature)), expected)


def test_top_k_keeps_the_likeliest_and_their_proportions():
    expected = torch.zeros(6)
    expected[[0, 1, 4]] = LOGITS[[0, 1, 4]].softmax(-1)
    assert_frequencies(draw(Sampling(top_k=(3, None))), expected)


def test_top_p_keeps_the_smallest_sufficient_set():
    probability = LOGITS.softmax(-1)
    assert probability[0] < 0.6 < probability[0] + probability[1]
    expected = torch.zeros(6)
    expected[[0, 1]] = LOGITS[[0, 1]].softmax(-1)
    assert_frequencies(draw(Sampling(top_p=0.6)), expected)
    assert draw(Sampling(top_p=0.01))[0] == 1


def test_temperature_zero_and_top_k_one_take_the_likeliest():
    assert draw(GREEDY)[0] == 1
    assert draw(Sampling(temperature=3.0, top_k=(None, 1)), level=1)[0] == 1


def test_top_k_differs_from_row_to_row():
    logits = LOGITS.expand(400, -1)
    seeds, steps = torch.arange(400), torch.zeros(400, dtype=torch.int64)
    chosen = choose(logits, IDS, Sampling(top_k=(1, 3)), [0] * 200 + [None] * 200, seeds, steps)
    assert set(chosen[:200].tolist()) == {100}
    assert set(chosen[200:].tolist()) == {100, 101, 102, 103, 104}


def test_temperature_differs_from_level_to_level():
    pair = Sampling(temperature=(2.0, 0.5))
    assert_frequencies(draw(pair, level=0), (LOGITS / 2).softmax(-1))
    assert_frequencies(draw(pair, level=1), (LOGITS / 0.5).softmax(-1))
    logits, steps = LOGITS.expand(DRAWS, -1), torch.zeros(DRAWS, dtype=torch.int64)
    levels = [0] * (DRAWS // 2) + [1] * (DRAWS // 2)
    cold = Sampling(temperature=(1.0, 0.0))
    chosen = choose(logits, IDS, cold, levels, torch.arange(DRAWS), steps)
    warm = chosen[: DRAWS // 2]
    assert len(warm.unique()) == 5 and bool((chosen[DRAWS // 2 :] == 100).all())
    alone = choose(logits, IDS, Sampling(), [0] * DRAWS, torch.arange(DRAWS), steps)
    assert torch.equal(warm, alone[: DRAWS // 2])
    assert not cold.greedy and Sampling(temperature=(0.0, 0.0)).greedy


@pytest.mark.parametrize(
    "sampling", [Sampling(top_k=(None, 20)), Sampling(top_k=(None, 20), top_p=0.9)]
)
def test_a_draw_depends_on_seed_step_and_ids_alone(sampling):
    torch.manual_seed(0)
    logits = torch.randn(8, 64)
    ids = torch.arange(1000, 1064)
    seeds = torch.tensor([5, 1 << 40, 3, 3, 9, 77, 0, (1 << 62) + 1])
    steps = torch.arange(8)
    together = choose(logits, ids, sampling, [1] * 8, seeds, steps)
    for row in range(8):
        one = slice(row, row + 1)
        alone = choose(logits[one], ids, sampling, [1], seeds[one], steps[one])
        assert alone == together[row]
        # a wider slice of the vocabulary, the rest forbidden
        wide = torch.full((1, 90), -torch.inf)
        wide[:, 10:74] = logits[one]
        assert together[row] == choose(
            wide, torch.arange(990, 1080), sampling, [1], seeds[one], steps[one]
        )


def test_noise_is_gumbel_and_differs_by_seed_step_and_id():
    seeds, steps, ids = torch.arange(200), torch.zeros(200, dtype=torch.int64), torch.arange(500)
    noise = gumbel(seeds, steps, ids)
    assert noise.isfinite().all()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.02)
    assert noise.var().item() == pytest.approx(1.6449, abs=0.05)
    high = gumbel(seeds + (1 << 32), steps, ids)
    later = gumbel(seeds, steps + 1, ids)
    for other in (high, later, noise.roll(1, 0), noise.roll(1, 1)):
        together = torch.stack([noise.flatten(), other.flatten()])
        assert abs(torch.corrcoef(together)[0, 1].item()) < 0.015


def test_noise_has_golden_values():
    # seeds make results repeatable across releases and devices: these numbers must not change
    noise = gumbel(torch.tensor([0, 42, 1 << 33]), torch.tensor([0, 7, 1 << 20]), torch.arange(3))
    expected = torch.tensor(
        [
            [0.172261, 3.551652, 0.251239],
            [0.432691, 0.94397, -2.057963],
            [1.561263, 0.435924, 1.274847],
        ]
    )
    torch.testing.assert_close(noise, expected, rtol=1e-5, atol=1e-5)


def test_guide_scales_the_difference_of_log_probabilities():
    torch.manual_seed(0)
    given, free = torch.randn(2, 9), torch.randn(2, 9)
    expected = 3 * given.log_softmax(-1) - 2 * free.log_softmax(-1)
    torch.testing.assert_close(guide(given, free, 3.0), expected)
    torch.testing.assert_close(guide(given, free, 1.0), given.log_softmax(-1))
    # only differences within a row matter, so a slice of the vocabulary guides alike
    part = guide(given[:, 2:7], free[:, 2:7], 3.0)
    torch.testing.assert_close(part.softmax(-1), expected[:, 2:7].softmax(-1))


def test_presets_are_those_of_illume():
    assert Sampling(temperature=1.0, top_k=(2048, 6144), top_p=1.0, guidance=2.0) == GENERATION
    assert Sampling(temperature=0.7, top_k=(512, 1536), top_p=0.8, guidance=1.25) == EDITING


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1.0}, "got -1.0, 1.0 and 1.0"),
        ({"top_p": 0.0}, "got 1.0, 0.0 and 1.0"),
        ({"top_k": (0, None)}, r"top_k of at least 1 or None expected, got \(0, None\)"),
    ],
)
def test_impossible_settings_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**values)
