"""Shards to batches: read, guard, decode once, crop, mirror, and hand out records.

Broken samples are left out of their micro-batch, never replaced, so that nothing comes twice and
the order of all others stays what it was.
"""

# N samples of a micro-batch

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from engine.data.codes import CodeReader, SampleCodes
from engine.data.guard import BadSample, check_picture
from engine.data.layers import encode_map, from_cells, to_cells
from engine.data.manifest import Dataset, Tally
from engine.data.mixture import Part, Pick
from engine.data.pil import Copies, Decoder, Levels, Work
from engine.data.records import Record
from engine.data.rle import decode_rle
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
    """Reads the micro-batches of a mixture for one rank."""

    def __init__(
        self,
        mixture: Order,
        decoder: Decoder,
        settings: Settings | None = None,
        tally: Tally | None = None,
    ) -> None:
        self.mixture = mixture
        self.decoder = decoder
        self.settings = settings or Settings()
        self.tally = tally or Tally()
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
                drafts.append(self._draft(folder, number, pick, works))
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

    def _draft(self, folder: str, number: int, pick: Pick, works: list[Work]) -> _Draft:
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
            draft = _Draft(encoded, texts, turns=_turns(encoded))
            if says["task"] == "text":
                return draft
            if says["task"] == "video":
                draft.encoded = still(encoded, int(rng.integers(int(says["frames"]))))
            draft.codes = codes
            return self._plan(draft, pick, int(rng.integers(1 << 62)), works)
        except BadSample as error:
            raise error.named(encoded.key) from error
        except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            told = f"{type(error).__name__}: {error}"
            raise BadSample("bad_schema", told, encoded.key) from error

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


def _turns(encoded: Encoded) -> tuple[tuple[str, str], ...]:
    return tuple((str(role), str(text)) for role, text in encoded.says.get("turns", ()))


def pair_turns(turns: Sequence[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """The (question, answer) pairs of a dialogue; what the system says is left out.

    A last question without an answer keeps an empty one when it is the only one.
    """
    pairs: list[tuple[str, str]] = []
    asked: list[str] = []
    for role, said in turns:
        if role == "assistant":
            pairs.append(("\n".join(asked), said))
            asked = []
        elif role != "system":
            asked.append(said)
    if asked and not pairs:
        pairs.append(("\n".join(asked), ""))
    return tuple(pairs)


def read_layers(
    encoded: Encoded, size: tuple[int, int]
) -> tuple[bytes | None, list[tuple[int, ...]]]:
    """The map of a sample and the cells of its masks, then its regions; RLEs become a map."""
    told = [*encoded.says.get("masks", ()), *encoded.says.get("regions", ())]
    if not told:
        return None, []
    if any("rle" in one for one in told):
        found, cells = to_cells([decode_rle(one["rle"]) for one in told], size)
        return encode_map(found), list(cells)
    data = encoded.members.get("map.png")
    if data is None:
        raise BadSample("missing_member", "the index map")
    return data, [tuple(int(cell) for cell in one["cells"]) for one in told]


def still(encoded: Encoded, frame: int) -> Encoded:
    """One frame of a clip as a sample: referring to its track, or its objects by class."""
    says = encoded.says
    name = f"f{frame:04d}"
    ending = next(e for e in ("jpg", "png", "webp") if f"{name}.{e}" in encoded.members)
    members = {ending: encoded.members[f"{name}.{ending}"]}
    present = [(n, track[frame]) for n, track in enumerate(says["tracks"]) if track[frame]]
    if present:
        data = encoded.members.get(f"{name}.map.png")
        if data is None:
            raise BadSample("missing_member", f"the map of frame {frame}")
        members["map.png"] = data
    new: dict[str, Any] = {**says, "masks": [{"cells": cells} for _, cells in present]}
    if says.get("text"):
        reasons = says.get("kind") == "reasoning"
        new |= {"task": "reasoning" if reasons else "referring", "labels": [0] * len(present)}
    elif says.get("classes"):
        names = list(dict.fromkeys(says["classes"]))
        labels = [names.index(says["classes"][n]) for n, _ in present]
        new |= {"task": "class", "classes": names, "labels": labels}
    else:
        new |= {"task": "interactive", "labels": list(range(len(present)))}
        new |= {"regions": new["masks"], "region_kinds": ["mask"] * len(present)}
        if not present:
            raise BadSample("bad_schema", f"no object in frame {frame}")
    return Encoded(key=encoded.key, says=json.loads(json.dumps(new)), members=members)


def make_record(
    encoded: Encoded,
    texts: tuple[str, str],
    turns: Sequence[tuple[str, str]],
    picture: Copies | None,
    target: Copies | None,
    cells: Sequence[Sequence[int]],
) -> Record:
    """A record in the frame. Masks that the crop cut away leave their sample with their labels.

    A dialogue gives its first pair as text and answer, the others as turns.

    Raises: BadSample when a prompt region was cut away.
    """
    says = encoded.says
    levels: Levels | None = picture.map if picture is not None else None
    masks = from_cells(levels, cells) if levels is not None else ()
    count = len(says.get("masks", ()))
    labels = [int(label) for label in says.get("labels", ())]
    regions = masks[count:]
    if any(not region.any() for region in regions):
        raise BadSample("bad_mask", "a region lies outside the crop")
    kept = [(mask, label) for mask, label in zip(masks[:count], labels, strict=True) if mask.any()]
    text, answer = texts
    pairs = pair_turns(turns)
    if not text and pairs:
        text, answer = pairs[0]
    return Record(
        id=encoded.key,
        task=says["task"],
        text=text,
        answer=answer,
        classes=tuple(map(str, says.get("classes", ()))),
        image=None if picture is None else picture.frame,
        masks=tuple(mask for mask, _ in kept),
        labels=tuple(label for _, label in kept),
        regions=tuple(regions),
        region_kinds=tuple(says.get("region_kinds", ())),
        target=None if target is None else target.frame,
        turns=pairs[1:],
        kind=str(says.get("kind", "")),
    )
