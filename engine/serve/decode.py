"""The decode loop: jobs, a trunk, a cache.

    decoder = Decoder(model, vocabulary)
    words = decoder.text(state, stop=[vocabulary.seg_id])
    pictures = decoder.picture(state, buckets, sampling=sampling)

Writes what `focus.generate` writes with the same seeds, faster: the grammar of a picture is known
before it is drawn, so its forced tokens are embedded in one go and read in one pass, its noise is
drawn in blocks, tokens stay on the device, and the trunk is fused (`engine.serve.trunk`).
"""

# b rows, T positions, D width, m states that predict, V ids

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from engine.serve.graph import GraphTrunk
from engine.serve.job import Canvas, Chunk, Job, PictureJob, TextJob
from engine.serve.plan import make_plan
from engine.serve.speculate import SpeculativeJob
from engine.serve.trunk import FusedTrunk
from focus.buckets import BUCKETS, Bucket
from focus.generate import GenerationError, Progress, State, Words, append, decode_picture, pair
from focus.grammar import Drawing, Keep
from focus.llm import Qwen2Trunk
from focus.model import FocusModel
from focus.sampling import GREEDY, Sampling
from focus.vocabulary import Vocabulary


def with_trunk(model: FocusModel, trunk: nn.Module) -> FocusModel:
    """Return the model with another trunk; everything else is shared."""
    served = copy.copy(model)
    served._modules = {**model._modules, "trunk": trunk}
    return served


def fastest(model: FocusModel, int8: bool = False) -> nn.Module:
    """Return the trunk to decode with: fused, on a GPU in CUDA graphs; of a bundle its own."""
    trunk: nn.Module = model.trunk
    if not isinstance(trunk, Qwen2Trunk):
        if int8:
            raise GenerationError("int8 rounds a checkpoint's weights; a bundle has its precision")
        return trunk
    fused = FusedTrunk(trunk, int8=int8)
    return GraphTrunk(fused) if model.front.mask_queries.device.type == "cuda" else fused


class Decoder:
    """Decodes for one model. It reads the weights once: build another one after training.

    int8: weight-only int8 in the trunk. speculate: tokens of a picture that one pass checks at
    most; 1 draws them one by one. The pictures are the same either way, see `SpeculativeJob`.
    """

    def __init__(
        self,
        model: FocusModel,
        vocabulary: Vocabulary,
        *,
        int8: bool = False,
        speculate: int = 1,
        trunk: nn.Module | None = None,
    ) -> None:
        if speculate < 1:
            raise GenerationError(f"speculate of at least 1 token expected, got {speculate}")
        if trunk is None:
            trunk = fastest(model, int8)
        self.model = with_trunk(model, trunk).eval()
        self.vocabulary = vocabulary
        self.speculate = speculate
        self._canvases: dict[tuple[Bucket, torch.device], Canvas] = {}

    @torch.no_grad()
    def text(
        self,
        state: State,
        *,
        stop: Sequence[int],
        sampling: Sampling = GREEDY,
        max_tokens: int = 64,
        seeds: Sequence[int] | None = None,
        callback: Callable[[int, int], None] | None = None,
    ) -> list[Words]:
        """Write words until a `stop` id; see `focus.generate.decode_text`."""
        if not stop:
            raise GenerationError("at least one stop id expected, got none; see Vocabulary.seg_id")
        job = TextJob(
            self.model,
            self.vocabulary,
            _seeds(seeds, state),
            stop=stop,
            sampling=sampling,
            max_tokens=max_tokens,
            callback=callback,
        )
        self.run(job, state)
        return job.words()

    @torch.no_grad()
    def picture(
        self,
        state: State,
        buckets: Sequence[Bucket | None],
        *,
        sampling: Sampling,
        unconditional: State | None = None,
        seeds: Sequence[int] | None = None,
        keep: Sequence[Keep | None] | None = None,
        choices: Sequence[Bucket] = BUCKETS,
        drafts: Sequence[Drawing | None] | None = None,
        callback: Callable[[Progress], None] | None = None,
    ) -> list[Drawing]:
        """Write one picture per row; see `focus.generate.decode_picture`.

        drafts: pictures that resemble those to come (of an edit: the source), for `speculate`.
        Rows whose bucket is None choose it themselves, in the plain loop on the fused trunk.
        """
        batch = state.hidden.shape[0]
        kept, guesses = keep or [None] * batch, drafts or [None] * batch
        if not len(buckets) == len(kept) == len(guesses) == batch:
            counts = f"{len(buckets)}, {len(kept)} and {len(guesses)}"
            raise GenerationError(f"{batch} buckets, keeps and drafts expected, got {counts}")
        known = [bucket for bucket in buckets if bucket is not None]
        if len(known) < batch:
            return decode_picture(
                self.model,
                state,
                self.vocabulary,
                buckets,
                sampling=sampling,
                unconditional=unconditional,
                seeds=seeds,
                keep=keep,
                choices=choices,
                callback=callback,
            )
        seed = _seeds(seeds, state)
        if sampling.guidance != 1:
            state = pair(state, unconditional)
        pairs = zip(known, kept, strict=True)
        canvases = [self._canvas(b, k, state.hidden.device) for b, k in pairs]
        job: PictureJob | SpeculativeJob
        if self.speculate > 1:
            job = SpeculativeJob(
                self.model,
                self.vocabulary,
                seed,
                canvases,
                sampling=sampling,
                drafts=guesses,
                width=self.speculate,
                callback=callback,
            )
        else:
            job = PictureJob(
                self.model, self.vocabulary, seed, canvases, sampling=sampling, callback=callback
            )
        self.run(job, state)
        return job.drawings()

    def run(self, job: Job, state: State) -> None:
        """Drive one job to its end on its own state."""
        predicting = state.hidden[:, None]
        chunk = job.begin()
        while True:
            if chunk is not None:
                predicting = self.read(state, chunk)
            if job.done:
                return
            chunk = job.feed(self.logits(predicting, job.heads))

    def read(self, state: State, chunk: Chunk) -> Tensor:
        """Read a chunk; return the states [b, m, D] that predict what follows."""
        if chunk.back is not None:
            back = torch.tensor(chunk.back, device=state.cache.lengths.device)
            state.cache.truncate(state.cache.lengths - back)
        hidden = append(self.model, state, chunk.embeddings, chunk.lengths)
        return predicting(hidden, state.hidden, chunk)

    def logits(self, states: Tensor, heads: Sequence[slice]) -> Tensor | None:
        """Return the logits of the wanted ids, [b, m, V]; only their rows of the head are read."""
        parts = [self.model.logits(states, ids) for ids in heads]
        if len(parts) < 2:
            return parts[0] if parts else None
        return torch.cat(parts, -1)

    def _canvas(self, bucket: Bucket, keep: Keep | None, device: torch.device) -> Canvas:
        if keep is not None:
            return Canvas.of(self.model, make_plan(self.vocabulary, bucket, keep), device)
        key = (bucket, device)
        if key not in self._canvases:
            self._canvases[key] = Canvas.of(self.model, make_plan(self.vocabulary, bucket), device)
        return self._canvases[key]


def predicting(hidden: Tensor, last: Tensor, chunk: Chunk) -> Tensor:
    """Select the states that predict: [b, T, D] and each row's last [b, D] -> [b, m, D]."""
    if chunk.at is None:
        return last[:, None]
    return hidden.gather(1, chunk.at[..., None].expand(-1, -1, hidden.shape[2]))


def _seeds(seeds: Sequence[int] | None, state: State) -> Tensor:
    batch = state.hidden.shape[0]
    if seeds is not None and len(seeds) != batch:
        raise GenerationError(f"{batch} seeds expected, got {len(seeds)}")
    values = [0] * batch if seeds is None else [seed % (1 << 63) for seed in seeds]
    return torch.tensor(values, dtype=torch.int64, device=state.hidden.device)
