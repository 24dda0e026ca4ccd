"""Tokenise a dataset once, in several processes, so that later stages need no tokenizer."""

from __future__ import annotations

import dataclasses
import multiprocessing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.codes import ENDING, Encoding, SampleCodes, Tokenize, encode_shard, fingerprint_of
from engine.data.manifest import Dataset, Manifest
from engine.data.pil import Copies, open_decoder
from engine.data.views import Sizes
from focus.config import FocusConfig

SMALL = 256  # models of smaller pictures know one size only


def sizes_of(config: FocusConfig) -> Sizes | None:
    """The one size of a small model; None (a sample's bucket) for a full one."""
    if min(config.pixel.image_size) >= SMALL:
        return None
    return Sizes(
        frame=config.hierarchical.image_size,
        vit=config.vanilla.image_size,
        pixel=config.pixel.image_size,
    )


def model_tokenizer(folder: Path) -> Tokenize:
    """Return the frozen tokenizer of a model directory as a function of decoded pictures."""
    import torch

    from focus.batch import Pictures
    from focus.model import FocusModel
    from focus.pretrained import load_weights, read_config

    model = FocusModel(read_config(folder))
    load_weights(model, folder)
    front = model.eval().requires_grad_(False).front

    def stack(images: Sequence[Any]) -> torch.Tensor:
        pixels = torch.from_numpy(np.stack(images))
        return pixels.permute(0, 3, 1, 2).float().div_(255.0)

    @torch.no_grad()
    def tokenize(copies: Sequence[Copies]) -> list[SampleCodes]:
        if not copies:
            return []
        pictures = Pictures(
            vanilla=stack([one.vit for one in copies]),
            hierarchical=stack([one.frame for one in copies]),
            pixel=stack([one.pixel for one in copies]),
        )
        codes = front.tokenize(pictures)
        pairs = zip(codes.semantic.int().numpy(), codes.pixel.int().numpy(), strict=True)
        return [SampleCodes(semantic, pixel) for semantic, pixel in pairs]

    return tokenize


def encode_dataset(
    folder: Path,
    model: str,
    *,
    loader: str = "auto",
    batch: int = 8,
    workers: int = 1,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Write the codes of every shard that lacks them, then name the tokenizer in the manifest.

    Returns the number of samples with codes and the fingerprint. Raises: DataError for a folder
    without a dataset, CheckpointMismatch for an unusable model.
    """
    from focus.pretrained import find_model, read_config

    directory = find_model(model)
    config = read_config(directory)
    sizes = sizes_of(config)
    shape = "bucket" if sizes is None else "x".join(map(str, sizes.pixel))
    how = Encoding(
        fingerprint=f"{fingerprint_of(directory)}-{shape}",
        frame=config.hierarchical.image_size,
        sizes=sizes,
        batch=batch,
    )
    total = len(Manifest.read(folder).shards)
    jobs = [(folder, directory, loader, how, rank, workers) for rank in range(workers)]
    if workers > 1:
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            counts = pool.starmap(_work, jobs)
    else:
        counts = [_work(*jobs[0], progress)]
    if progress is not None:
        progress(total)
    manifest = Manifest.read(folder)
    codes = {**manifest.codes, ENDING: how.fingerprint}
    dataclasses.replace(manifest, codes=codes).write(folder)
    return {"samples": sum(counts), "fingerprint": how.fingerprint}


def _work(
    folder: Path,
    model: Path,
    loader: str,
    how: Encoding,
    rank: int,
    workers: int,
    progress: Callable[[int], None] | None = None,
) -> int:
    dataset = Dataset(folder)
    decoder = open_decoder(loader, threads=1)
    tokenize = model_tokenizer(model)
    count = 0
    for shard in range(rank, len(dataset.manifest.shards), workers):
        count += encode_shard(dataset, shard, tokenize, decoder, how)
        if progress is not None:
            progress(shard + 1)
    decoder.close()
    return count
