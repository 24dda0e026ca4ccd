"""A request's life: pictures and prompt -> words -> masks -> visual tokens -> picture.

Every function takes a batch of requests of one task; rows do not influence one another.
"""

# B requests, T positions, D width, N mask queries

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from focus import prompts
from focus.batch import Batch
from focus.buckets import BUCKETS, Bucket, bucket_of
from focus.generate import (
    State,
    Words,
    append,
    decode_picture,
    decode_text,
    picture_room,
)
from focus.grammar import Drawing, Keep, keep_outside
from focus.inputs import collate, resize
from focus.llm import KVCache
from focus.model import CONDITION_KINDS, Features, FocusModel, pool_conditions
from focus.request import Request, RequestError
from focus.sampling import Sampling
from focus.segment.predictor import Prediction
from focus.settings import Settings
from focus.tokenizer.dual import Codes
from focus.vocabulary import Vocabulary


@dataclass
class Session:
    """Requests that have been read: what every later step starts from."""

    requests: Sequence[Request]
    batch: Batch
    features: Features | None
    hidden: Tensor  # [B, T, D] of the prompt
    state: State
    bucket: Bucket  # size of the picture to draw
    mask_states: Tensor | None = None  # E_Q [B, N, D], once masks are predicted

    @property
    def frames(self) -> Tensor | None:
        """The pictures given [B, 3, h, w], as they lie in the hierarchical encoder's frame."""
        return None if self.batch.pictures is None else self.batch.pictures.hierarchical


class Pipeline:
    """Runs a `FocusModel` without gradients, in evaluation mode."""

    def __init__(self, model: FocusModel, vocabulary: Vocabulary, settings: Settings) -> None:
        self.model = model.eval()
        self.vocabulary = vocabulary
        self.settings = settings

    @torch.no_grad()
    def open(
        self,
        requests: Sequence[Request],
        features: Features | None = None,
        region_vectors: Tensor | None = None,
        bucket: Bucket | None = None,
    ) -> Session:
        """Read prompts and pictures into a cache.

        features: reuses an encoded picture. region_vectors: [B, R, D], stand at the <region> tokens
        instead of what would be pooled from the regions. bucket: size of the picture to draw, by
        default the config's own. Raises `RequestError` when a prompt and its answer are longer than
        the model reads.
        """
        config = self.model.config
        bucket = bucket or bucket_of(config)
        batch = collate(requests, config, self.vocabulary, until="answer")
        self.check_lengths(batch, bucket)
        if region_vectors is not None:
            batch = replace(batch, region_vectors=region_vectors)
        if features is None and batch.pictures is not None:
            features = self.model.front.encode(batch.pictures)
        embeddings = self.model.front.embed(batch, features)
        room = self.settings.words + 2 + config.segment.num_queries
        room += picture_room(bucket) + 2
        cache = KVCache(
            config.llm,
            len(requests),
            embeddings.shape[1] + room,
            embeddings.dtype,
            embeddings.device,
        )
        state = State(cache, embeddings.new_zeros(len(requests), embeddings.shape[2]))
        hidden = append(self.model, state, embeddings, batch.lengths)
        return Session(requests, batch, features, hidden, state, bucket)

    def check_lengths(self, batch: Batch, bucket: Bucket) -> None:
        """Raise `RequestError` unless prompts and answers fit into `llm.max_length` positions."""
        limit, longest = self.model.config.llm.max_length, int(batch.lengths.max())
        room = self.room(batch.task, bucket)
        if longest + room > limit:
            raise RequestError(
                f"a {batch.task} prompt of at most {limit - room} tokens expected ({limit} less "
                f"{room} for the answer), got {longest}; shorten the text or the dialogue, or give "
                "fewer classes or regions"
            )

    def room(self, task: str, bucket: Bucket) -> int:
        """Return the positions that an answer takes at most: words, mask queries, a picture."""
        room = 0 if task == "generation" else self.settings.words
        room += self.model.config.segment.num_queries if task in CONDITION_KINDS else 0
        return room + (picture_room(bucket) if task in ("editing", "generation") else 0)

    def say(self, session: Session) -> list[Words]:
        """Decode the words of each row: an answer, or names up to [SEG]."""
        segments = session.batch.task in CONDITION_KINDS
        stop = self.vocabulary.seg_id if segments else self.vocabulary.eos_id
        return decode_text(
            self.model,
            session.state,
            self.vocabulary,
            stop=[stop],
            max_tokens=self.settings.words,
            seeds=[request.seed for request in session.requests],
        )

    @torch.no_grad()
    def segment(self, session: Session) -> Prediction:
        """Read the mask queries into the cache in one pass and predict masks (eq. 5)."""
        assert session.features is not None and session.batch.num_conditions is not None
        states = append(self.model, session.state, self.model.front.mask_queries)
        session.mask_states = states
        conditions = pool_conditions(
            session.hidden, session.batch.condition, int(session.batch.num_conditions.max())
        )
        prediction: Prediction = self.model.heads.segment(
            session.features.maps, states, conditions, CONDITION_KINDS[session.batch.task]
        )
        return prediction

    def draw(
        self,
        session: Session,
        *,
        sampling: Sampling,
        masks: Sequence[np.ndarray] | None = None,
    ) -> list[Drawing]:
        """Write the visual tokens of each row; `masks` [H, W] say where an edit may write."""
        unconditional = self._unconditional(session) if sampling.guidance != 1.0 else None
        return decode_picture(
            self.model,
            session.state,
            self.vocabulary,
            [session.bucket] * len(session.requests),
            sampling=sampling,
            unconditional=unconditional,
            seeds=[request.seed for request in session.requests],
            keep=None if masks is None else self._kept(session, masks),
        )

    @torch.no_grad()
    def paint(
        self,
        codes: Codes,
        masks: Tensor | None = None,
        seeds: Sequence[int] | None = None,
        states: Tensor | None = None,
    ) -> Tensor:
        """Turn codes into pictures [B, 3, H, W] in [0, 1].

        masks: [B, 1, h, w] in [0, 1], where an edit changes the picture. seeds: one per row,
        default 0; each row's noise depends on its own alone. states: `Session.mask_states`, for
        models that condition on them.
        """
        settings, config = self.settings, self.model.config
        tokenizer = self.model.front.tokenizer
        if settings.decoder == "pixel":
            return tokenizer.decode(codes).clamp(0, 1).float()
        rows, columns = codes.pixel.shape[-2:]
        height, width = rows * config.pixel.stride, columns * config.pixel.stride
        size = (height * config.diffusion.upscale, width * config.diffusion.upscale)
        stride = config.diffusion.vae.stride
        numbers = [bucket.size for bucket in BUCKETS][: config.diffusion.num_sizes]
        number = numbers.index((height, width)) if (height, width) in numbers else 0
        shape = (config.diffusion.vae.latent_channels, *(s // stride for s in size))
        seeds = [0] * len(codes.pixel) if seeds is None else seeds
        own = [torch.Generator().manual_seed(seed) for seed in seeds]
        noise = [torch.randn(shape, generator=generator) for generator in own]
        weight = self.model.front.token_embedding.weight
        painted = self.model.heads.diffusion.sample(
            tokenizer.embed(codes).to(weight.dtype),
            masks,
            settings.steps,
            settings.guidance,
            own,  # goes on where the first noise ended, for schedulers that draw at every step
            settings.scheduler,
            size=size,
            size_index=torch.full((len(codes.pixel),), number),
            noise=torch.stack(noise),
            states=states,
        )
        return painted.float()

    def _unconditional(self, session: Session) -> State:
        """Read the other branch of guidance up to where its picture begins."""
        others = []
        for request in session.requests:
            prompt = prompts.Prompt.of(request).unconditional()
            others.append(replace(request, text=prompt.text, answer=prompt.answer, regions=()))
        other = self.open(others, session.features, bucket=session.bucket)
        if session.batch.task in CONDITION_KINDS:
            self.say(other)
            append(self.model, other.state, self.model.front.mask_queries)
        return other.state

    @torch.no_grad()
    def codes(self, session: Session) -> Codes:
        """Return the codes of the source pictures, from features that are there already."""
        features, front = session.features, self.model.front
        assert session.batch.pictures is not None and features is not None
        if front.semantic_project is not None:  # the features hold codes in place of pixels
            return front.tokenize(session.batch.pictures)
        grid = front.grid_of(session.batch.pictures)
        return front.tokenizer.encode(features.fused.e_prime, features.pixel, grid)

    def _kept(self, session: Session, masks: Sequence[np.ndarray]) -> list[Keep]:
        """Return, for each row, the source's codes and which of them to copy."""
        codes = self.codes(session)
        return [
            keep_outside(
                torch.from_numpy(mask),
                Drawing(bucket=session.bucket, semantic=semantic.numpy(), pixel=pixel.numpy()),
            )
            for mask, semantic, pixel in zip(masks, codes.semantic, codes.pixel, strict=True)
        ]


def codes_of(drawings: Sequence[Drawing]) -> Codes:
    """Stack the codes of finished drawings of one size."""
    return Codes(
        semantic=torch.stack([torch.from_numpy(d.semantic) for d in drawings]),
        pixel=torch.stack([torch.from_numpy(d.pixel) for d in drawings]),
    )


def to_uint8(pictures: Tensor, size: tuple[int, int] | None = None) -> np.ndarray:
    """Convert pictures [B, 3, h, w] in [0, 1] to uint8 [B, H, W, 3], resampled to `size`."""
    fitted = pictures if size is None else resize(pictures, size)
    return (fitted.permute(0, 2, 3, 1) * 255).round().clamp(0, 255).to(torch.uint8).numpy()
