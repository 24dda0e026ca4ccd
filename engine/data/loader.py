"""Shards to batches: read, guard, decode once, crop, mirror, and hand out records.

Broken samples are left out of their micro-batch, never replaced, so that nothing comes twice and
the order of all others stays what it was.
"""

# N samples of a micro-batch

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from engine.data.codes import CodeReader, SampleCodes
from engine.data.compose import make_record, read_layers, still, turns_of
from engine.data.guard import BadSample, check_picture
from engine.data.manifest import Dataset, Tally
from engine.data.mixture import Part, Pick
from engine.data.pil import Copies, Decoder, Work
from engine.data.records import Record
from engine.data.schema import Encoded
from engine.data.views import (
    NO_AUGMENT,
    Augment,
    Sizes,
    View,
    bucket_sizes,
    make_view,
    may_flip,
    mirror_text,
)
from engine.run import derive_seed


class Samples(Protocol):
    """Undecoded samples by number: a `Dataset`."""

    def read(self, number: int) -> Encoded:
        """Read one sample. Raises `BadSample`."""
        ...


class Order(Protocol):
    """Which samples make which micro-batch: a `Mixture`."""

    seed: int
    next: int

    @property
    def parts(self) -> Sequence[Part]: ...  # noqa: D102
    @property
    def datasets(self) -> Mapping[str, Samples]: ...  # noqa: D102
    def pick(self, index: int) -> Pick: ...  # noqa: D102


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How samples become records.

    frame: X_H. sizes: fixed sizes of the copies; None takes each sample's bucket. crop: to the
    bucket's shape; otherwise the picture is letterboxed whole. codes: read the offline codes (such
    samples are neither moved, mirrored nor recoloured, since their codes are those of the plain
    picture).
    """

    frame: tuple[int, int] = (768, 768)
    sizes: Sizes | None = None
    crop: bool = True
    augment: Augment = NO_AUGMENT
    codes: bool = False


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """One micro-batch: its records (pictures and masks in the frame) and their other copies.

    pictures, targets: one entry per record, None where it has none. codes: of the target, or of
    the picture where there is no target. turns: whole dialogues.
    """

    pick: Pick
    records: tuple[Record, ...]
    pictures: tuple[Copies | None, ...]
    targets: tuple[Copies | None, ...]
    codes: tuple[SampleCodes | None, ...]
    turns: tuple[tuple[tuple[str, str], ...], ...]
    lost: int = 0


@dataclass
class _Draft:
    """One sample on its way: what it says, and its place among the works."""

    encoded: Encoded
    texts: tuple[str, str]
    view: View | None = None
    picture: int = -1
    target: int = -1
    masks: list[tuple[int, ...]] = field(default_factory=list)
    codes: SampleCodes | None = None
    turns: tuple[tuple[str, str], ...] = ()


class Loader:
    """Reads the micro-batches of a mixture for one rank.

    pairs: a clip gives two different frames in a row, instead of one.
    """

    def __init__(
        self,
        mixture: Order,
        decoder: Decoder,
        settings: Settings | None = None,
        tally: Tally | None = None,
        *,
        pairs: bool = False,
    ) -> None:
        self.mixture = mixture
        self.decoder = decoder
        self.settings = settings or Settings()
        self.tally = tally or Tally()
        self.pairs = pairs
        self._codes: dict[str, CodeReader] = {}

    def load(self, pick: Pick) -> Loaded:
        """Read one micro-batch; broken samples are counted and left out.

        Raises: DataError when the tally's limit is passed.
        """
        folder = self.mixture.parts[pick.part].dataset
        drafts: list[_Draft] = []
        works: list[Work] = []
        lost: list[BadSample] = []
        for number in pick.slot.numbers.tolist():
            try:
                drafts += self._drafts(folder, number, pick, works)
            except BadSample as error:
                lost.append(error)
        done = self.decoder.decode(works)
        records = []
        kept: list[tuple[_Draft, Copies | None, Copies | None]] = []
        for draft in drafts:
            try:
                pair = _pick(done, draft.picture), _pick(done, draft.target)
                told = draft.texts, draft.turns
                records.append(make_record(draft.encoded, *told, *pair, draft.masks))
                kept.append((draft, *pair))
            except BadSample as error:
                lost.append(error.named(draft.encoded.key))
        self.tally.count(len(kept))
        for refused in lost:
            self.tally.refuse(refused)
        return Loaded(
            pick=pick,
            records=tuple(records),
            pictures=tuple(picture for _, picture, _ in kept),
            targets=tuple(target for _, _, target in kept),
            codes=tuple(draft.codes for draft, _, _ in kept),
            turns=tuple(draft.turns for draft, _, _ in kept),
            lost=len(lost),
        )

    def _drafts(self, folder: str, number: int, pick: Pick, works: list[Work]) -> list[_Draft]:
        """One sample as one draft, a clip as its frames."""
        dataset = self.mixture.datasets[folder]
        encoded = dataset.read(number)
        codes = None
        if self.settings.codes and isinstance(dataset, Dataset):
            codes = self._read_codes(dataset, number)
        rng = np.random.default_rng(
            derive_seed(self.mixture.seed, pick.part, pick.slot.epoch, number)
        )
        says = encoded.says
        try:
            wordings = [str(says.get("text", "")), *map(str, says.get("texts", ()))]
            texts = wordings[int(rng.integers(len(wordings)))], str(says.get("answer", ""))
            turns = turns_of(encoded)
            if says["task"] == "text":
                return [_Draft(encoded, texts, turns=turns)]
            shown = [encoded]
            if says["task"] == "video":
                shown = [still(encoded, frame) for frame in self._frames(says, rng)]
            seed = int(rng.integers(1 << 62))
            drafts = [_Draft(one, texts, turns=turns, codes=codes) for one in shown]
            return [self._plan(draft, pick, seed, works) for draft in drafts]
        except BadSample as error:
            raise error.named(encoded.key) from error
        except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            told = f"{type(error).__name__}: {error}"
            raise BadSample("bad_schema", told, encoded.key) from error

    def _frames(self, says: Mapping[str, Any], rng: np.random.Generator) -> list[int]:
        """Which frames of a clip are shown: one, or two different ones."""
        count = int(says["frames"])
        if self.pairs and count > 1:
            return [int(frame) for frame in rng.choice(count, 2, replace=False)]
        return [int(rng.integers(count))]

    def _plan(self, draft: _Draft, pick: Pick, seed: int, works: list[Work]) -> _Draft:
        encoded, settings = draft.encoded, self.settings
        names = [n for n in ("", "target") if encoded.member(n) is not None]
        if not names:
            raise BadSample("missing_member", "a picture")
        datas = [encoded.need(name) for name in names]
        headers = [check_picture(data) for data in datas]
        size = headers[0].height, headers[0].width
        if any((h.height, h.width) != size for h in headers):
            raise BadSample("wrong_size", f"picture and target of one size expected: {headers}")
        wanted = tuple(encoded.says.get("size", size))
        if wanted != size:
            raise BadSample("wrong_size", f"a picture of {wanted} expected, got {size}")
        view = make_view(
            size,
            settings.sizes or bucket_sizes(pick.slot.bucket, settings.frame),
            crop=settings.crop,
            augment=NO_AUGMENT if draft.codes else settings.augment,
            seed=None if draft.codes else seed,
            flippable=may_flip(
                *draft.texts, *encoded.says.get("classes", ()), *(said for _, said in draft.turns)
            ),
        )
        draft.view = view
        if view.flip:
            draft.texts = mirror_text(draft.texts[0]), mirror_text(draft.texts[1])
            draft.turns = tuple((role, mirror_text(said)) for role, said in draft.turns)
        layers, draft.masks = read_layers(encoded, size)
        header = None if layers is None else check_picture(layers)
        for name, data, own in zip(names, datas, headers, strict=True):
            first = name == names[0]
            if first:
                draft.picture = len(works)
            else:
                draft.target = len(works)
            bits = header.bits if header else 8
            works.append(Work(data, view, layers if first else None, bits, own))
        if names == ["target"]:
            draft.picture, draft.target = -1, draft.picture
        return draft

    def _read_codes(self, dataset: Dataset, number: int) -> SampleCodes | None:
        key = str(dataset.folder)
        if key not in self._codes:
            self._codes[key] = CodeReader(dataset)
        return self._codes[key].read(number)

    def run(
        self, rank: int = 0, ranks: int = 1, ahead: int = 2, start: int | None = None
    ) -> Iterator[Loaded]:
        """Yield the micro-batches of one rank, `ahead` of them prepared by a thread.

        An error of the thread is raised here; leaving the generator ends the thread.
        """
        first = self.mixture.next + rank if start is None else start
        indices = (first + n * ranks for n in range(1 << 62))
        if ahead < 1:
            for index in indices:
                yield self.load(self.mixture.pick(index))
        yield from _ahead((lambda index: self.load(self.mixture.pick(index))), indices, ahead)


def _ahead(load: Any, indices: Iterator[int], ahead: int) -> Iterator[Loaded]:
    ready: queue.Queue[Any] = queue.Queue(ahead)
    stop = threading.Event()

    def put(value: Any) -> None:
        while not stop.is_set():
            try:
                ready.put(value, timeout=0.1)
                return
            except queue.Full:
                continue

    def work() -> None:
        try:
            for index in indices:
                if stop.is_set():
                    return
                put(load(index))
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=work, name="loader", daemon=True)
    thread.start()
    try:
        while True:
            value = ready.get()
            if isinstance(value, BaseException):
                raise value
            yield value
    finally:
        stop.set()
        thread.join(timeout=60)


def _pick(done: Sequence[Copies | BadSample], number: int) -> Copies | None:
    if number < 0:
        return None
    found = done[number]
    if isinstance(found, BadSample):
        raise found
    return found
