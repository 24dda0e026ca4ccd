"""Codebook lookup: exactness on every instruction set, adversarial inputs, caches, threads."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import dispatch, native
from kernels.codebook_lookup import native as fast
from kernels.codebook_lookup.api import codebook_lookup
from kernels.kernel import KernelUnsupported, ShapeError

ISAS = ("scalar", "avx2", "avx512", "vnni")


def brute_force(x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """The definition: fp64 distances of every pair, the first minimum."""
    gap = x.double()[:, None] - codes.double()[None]
    distance = gap.square().sum(-1)
    least = distance.amin(1, keepdim=True)
    first = torch.where(distance == least, torch.arange(codes.shape[0]), codes.shape[0])
    return first.amin(1), least[:, 0]


def assert_nearest(found: Tensor, index: Tensor, distance: Tensor, x: Tensor, book: Tensor) -> None:
    """Equal indices, except where two different codes tie to the last bits of fp64."""
    mine = (x.double() - book.double()[found]).square().sum(1)
    tied = (mine - distance) <= 2.0**-51 * x.shape[1] * distance
    copied = (book[found] == book[index]).all(1)
    assert bool(((found == index) | (tied & ~copied)).all())


def available() -> list[str]:
    return [isa for isa in ISAS if native.ISA[isa] <= native.ISA[native.best_isa()]]


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    tokens=st.sampled_from([1, 2, 13, 63, 100]),
    codes=st.sampled_from([1, 15, 255, 257, 700]),
    dim=st.sampled_from([1, 3, 8, 32, 33]),
    exponents=st.tuples(st.integers(-30, 18), st.integers(-30, 18)),
    offset=st.sampled_from([0.0, 1.0, 1000.0]),
    grain=st.sampled_from([0.0, 0.5]),
)
def test_every_implementation_equals_the_fp64_argmin(
    native_library: None,
    seed: int,
    tokens: int,
    codes: int,
    dim: int,
    exponents: tuple[int, int],
    offset: float,
    grain: float,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    book = torch.randn(codes, dim, generator=generator)
    x = torch.randn(tokens, dim, generator=generator)
    if grain:  # a lattice: many exact ties and duplicates
        book, x = (book / grain).round() * grain, (x / grain).round() * grain
    book, x = (book + offset) * 10.0 ** exponents[0], (x + offset) * 10.0 ** exponents[1]
    index, distance = brute_force(x, book)
    prepared = fast.Prepared(book)
    for isa in available():
        found, length = prepared.lookup(x, isa)
        assert_nearest(found, index, distance, x, book)
        torch.testing.assert_close(length, distance.float(), rtol=1e-6, atol=0)
    with dispatch.force(codebook_lookup="reference"):
        assert_nearest(codebook_lookup(x, book)[0], index, distance, x, book)


def test_duplicated_codes_give_the_lowest_index(native_library: None) -> None:
    book = torch.randn(1000, 32).repeat(3, 1)
    x = torch.randn(50, 32)
    for name in ("reference", "native"):
        with dispatch.force(codebook_lookup=name):
            assert codebook_lookup(x, book)[0].max() < 1000


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["reference", "native"])
def test_a_value_that_is_not_finite_never_gives_an_index(
    native_library: None, name: str, value: float
) -> None:
    x, book = torch.randn(5, 8), torch.randn(40, 8)
    x[2, 3] = value
    with dispatch.force(codebook_lookup=name):
        index, distance = codebook_lookup(x, book)
        assert index[2] == -1 and distance[2].isnan()
        assert (index[[0, 1, 3, 4]] >= 0).all()
        book[7, 0] = value
        index, distance = codebook_lookup(x, book)
    assert (index == -1).all() and distance.isnan().all()


def test_denormals_are_told_apart(native_library: None) -> None:
    book = torch.arange(300).float()[:, None] * 1e-42
    for name in ("reference", "native"):
        with dispatch.force(codebook_lookup=name):
            index, _ = codebook_lookup(book.flip(0), book)
        assert torch.equal(index, brute_force(book.flip(0), book)[0]), name


def test_prepared_codebook_follows_writes(native_library: None) -> None:
    book, x = torch.randn(300, 8), torch.randn(20, 8)
    with dispatch.force(codebook_lookup="native"):
        codebook_lookup(x, book)
        before = fast.prepare(book)
        assert fast.prepare(book) is before
        book[5] = x[0]
        assert codebook_lookup(x, book)[0][0] == 5
        assert fast.prepare(book) is not before


def test_many_threads_share_one_codebook(native_library: None) -> None:
    book = torch.randn(3000, 32)
    prepared = fast.Prepared(book)
    tokens = [torch.randn(97, 32) for _ in range(8)]
    expected = [prepared.lookup(t, threads=1)[0] for t in tokens]
    results: list[list[Tensor]] = [[] for _ in tokens]

    def work(i: int) -> None:
        for _ in range(5):
            results[i].append(prepared.lookup(tokens[i], threads=3)[0])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(tokens))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for found, truth in zip(results, expected, strict=True):
        assert len(found) == 5 and all(torch.equal(f, truth) for f in found)


def test_missing_library_says_how_to_build_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.setenv(native.LIBRARY_ENVIRONMENT, f"{tmp_path}/none.so")
    native.forget()
    dispatch.forget()
    try:
        with (
            dispatch.force(codebook_lookup="native"),
            pytest.raises(KernelUnsupported, match=r"cmake -S \. -B build"),
        ):
            codebook_lookup(torch.zeros(2, 4), torch.zeros(3, 4))
        assert codebook_lookup(torch.zeros(2, 4), torch.zeros(3, 4))[0].tolist() == [0, 0]
    finally:
        monkeypatch.undo()
        native.forget()
        dispatch.forget()


def test_shapes_that_contradict_are_named() -> None:
    with pytest.raises(ShapeError, match=r"x \[N, d\] and codes \[K, d\] expected"):
        codebook_lookup(torch.zeros(2, 4), torch.zeros(3, 5))
    with pytest.raises(ShapeError, match="at least one code"):
        codebook_lookup(torch.zeros(2, 4), torch.zeros(0, 4))
