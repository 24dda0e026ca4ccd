"""`focus.pipeline.Pipeline` on the engine: its decoder, and nothing read twice of a picture."""

# B requests, T positions, D width, N positions known before

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from engine.serve.decode import Decoder
from engine.serve.prefix import Memory, Seen, Start, key_of, row_of, shared_end, stack
from focus.batch import Batch, move
from focus.buckets import Bucket, bucket_of
from focus.generate import State, Words, append, picture_room
from focus.grammar import Drawing
from focus.inputs import collate
from focus.llm import KVCache
from focus.model import CONDITION_KINDS, Features, FocusModel
from focus.pipeline import Pipeline, Session
from focus.request import Request
from focus.sampling import Sampling
from focus.settings import Settings
from focus.tokenizer.dual import Codes
from focus.vocabulary import Vocabulary


class EnginePipeline(Pipeline):
    """Runs requests through a decoder, reusing what `memory` holds of their pictures.

    model: with the decoder's trunk (`Decoder.model`). speculate: hand the source's codes to the
    decoder as drafts of an edit.
    """

    def __init__(
        self,
        model: FocusModel,
        vocabulary: Vocabulary,
        settings: Settings,
        *,
        decoder: Decoder,
        memory: Memory,
        speculate: bool = False,
    ) -> None:
        super().__init__(model, vocabulary, settings)
        self.decoder, self.memory, self.speculate = decoder, memory, speculate

    @torch.no_grad()
    def open(
        self,
        requests: Sequence[Request],
        features: Features | None = None,
        region_vectors: Tensor | None = None,
        bucket: Bucket | None = None,
    ) -> Session:
        """Read prompts and pictures into a cache; see `Pipeline.open`.

        Pictures that were seen before are not encoded again, and prompts that begin as before are
        read from where they differ.
        """
        config = self.model.config
        weight = self.model.front.mask_queries
        bucket = bucket or bucket_of(config)
        batch = collate(requests, config, self.vocabulary, until="answer")
        self.check_lengths(batch, bucket)
        if region_vectors is not None:
            batch = replace(batch, region_vectors=region_vectors)
        keys = [None if r.image is None else key_of(r.image) for r in requests]
        seen = self._recall(batch, keys, features)
        batch = batch.to(weight.device, weight.dtype)
        if seen:
            features = stack([entry.features for entry in seen])
        embeddings = self.model.front.embed(batch, features)
        room = self.settings.words + 4 + config.segment.num_queries + picture_room(bucket)
        state = self._state(embeddings, room)
        hidden = self._read(state, batch, embeddings, seen)
        for row, (entry, key) in enumerate(zip(seen, keys, strict=False)):
            if key is not None:
                entry.start = _start(state, batch, hidden, row)
                self.memory.put(key, entry)
        return Session(requests, batch, features, hidden, state, bucket)

    def say(self, session: Session) -> list[Words]:
        """Decode the words of each row; see `Pipeline.say`."""
        segments = session.batch.task in CONDITION_KINDS
        return self.decoder.text(
            session.state,
            stop=[self.vocabulary.seg_id if segments else self.vocabulary.eos_id],
            max_tokens=self.settings.words,
            seeds=[request.seed for request in session.requests],
        )

    def draw(
        self,
        session: Session,
        *,
        sampling: Sampling,
        masks: Sequence[np.ndarray] | None = None,
    ) -> list[Drawing]:
        """Write the visual tokens of each row; see `Pipeline.draw`."""
        drafts = None
        if self.speculate and session.batch.pictures is not None:
            codes = self.codes(session)
            drafts = [
                Drawing(bucket=session.bucket, semantic=semantic, pixel=pixel)
                for semantic, pixel in zip(codes.semantic.numpy(), codes.pixel.numpy(), strict=True)
            ]
        return self.decoder.picture(
            session.state,
            [session.bucket] * len(session.requests),
            sampling=sampling,
            unconditional=self._unconditional(session) if sampling.guidance != 1 else None,
            seeds=[request.seed for request in session.requests],
            keep=None if masks is None else self._kept(session, masks),
            drafts=drafts,
        )

    @torch.no_grad()
    def codes(self, session: Session) -> Codes:
        """Return the codes of the source pictures, computed once for each picture."""
        keys = [key_of(r.image) for r in session.requests if r.image is not None]
        entries = [self.memory.find(key) for key in keys]
        if any(entry is None or entry.codes is None for entry in entries):
            found = super().codes(session)
            for row, entry in enumerate(entries):
                if entry is not None:
                    one = slice(row, row + 1)
                    entry.codes = Codes(found.semantic[one].cpu(), found.pixel[one].cpu())
            return Codes(found.semantic.cpu(), found.pixel.cpu())
        known = [entry.codes for entry in entries if entry is not None and entry.codes is not None]
        return Codes(
            semantic=torch.cat([codes.semantic for codes in known]),
            pixel=torch.cat([codes.pixel for codes in known]),
        )

    def _recall(
        self, batch: Batch, keys: Sequence[bytes | None], features: Features | None
    ) -> list[Seen]:
        """Return what is known of every row's picture; encode those that are new."""
        if batch.pictures is None or any(key is None for key in keys):
            return []
        entries = [self.memory.find(key) for key in keys if key is not None]
        missing = [row for row, entry in enumerate(entries) if entry is None]
        if missing and features is None:
            weight = self.model.front.mask_queries
            taken = torch.tensor(missing)
            parts = {name: tensor[taken] for name, tensor in vars(batch.pictures).items()}
            pictures = move(replace(batch.pictures, **parts), weight.device, weight.dtype)
            new = self.model.front.encode(pictures)
            for number, row in enumerate(missing):
                entries[row] = Seen(features=row_of(new, number))
        elif features is not None:
            for row in missing:
                entries[row] = Seen(features=row_of(features, row))
        return [entry for entry in entries if entry is not None]

    def _state(self, embeddings: Tensor, room: int) -> State:
        batch, num, dim = embeddings.shape
        cache = KVCache(
            self.model.config.llm, batch, num + room, embeddings.dtype, embeddings.device
        )
        return State(cache, embeddings.new_zeros(batch, dim))

    def _read(self, state: State, batch: Batch, embeddings: Tensor, seen: Sequence[Seen]) -> Tensor:
        """Read each prompt from where it differs; return its states [B, T, D], known ones too."""
        starts = [entry.start for entry in seen]
        known = [0 if s is None else s.common(batch, row) for row, s in enumerate(starts)]
        if not any(known):
            return append(self.model, state, embeddings, batch.lengths)
        for row, (start, num) in enumerate(zip(starts, known, strict=True)):
            if start is not None and num:
                state.cache.write(row, start.keys[:, :, :num], start.values[:, :, :num])
        ends = batch.lengths.tolist()
        rest = torch.nn.utils.rnn.pad_sequence(
            [embeddings[row, known[row] : ends[row]] for row in range(len(ends))], True
        )
        lengths = batch.lengths - torch.tensor(known, device=batch.lengths.device)
        alike = len(set(known)) == 1 and len(set(ends)) == 1
        new = append(self.model, state, rest, None if alike else lengths)
        hidden = torch.zeros_like(embeddings)
        for row, (start, num) in enumerate(zip(starts, known, strict=True)):
            if start is not None:
                hidden[row, :num] = start.hidden[:num]
            hidden[row, num : ends[row]] = new[row, : ends[row] - num]
        return hidden


def _start(state: State, batch: Batch, hidden: Tensor, row: int) -> Start:
    """Copy what the trunk made of a prompt."""
    num = shared_end(batch, row)
    keys, values = state.cache.read(row, 0, num)
    return Start(
        ids=batch.input_ids[row, :num].clone(),
        source=batch.source[row, :num].clone(),
        grid=batch.grid[row, :num].clone(),
        keys=keys,
        values=values,
        hidden=hidden[row, :num].clone(),
    )
