"""What a user would take instead of our operators: every peer that is installed.

A peer is a function from an operator's inputs to a call without arguments; preparation that a user
would do once (an index, folded weights, generated keys that do not depend on the query) happens
before timing only where the peer's own interface separates it.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Inputs = dict[str, Any]
Call = Callable[[], Any]
Peer = Callable[[Inputs], Call]


def installed(package: str) -> bool:
    """Return whether a package can be imported."""
    return importlib.util.find_spec(package) is not None


# --- codebook lookup -------------------------------------------------------------------------


def lookup_chunked(inputs: Inputs) -> Call:
    """Chunked matrix product and argmin, 256 tokens at a time."""

    def call() -> Tensor:
        x, codes = inputs["x"], inputs["codes"]
        norm = codes.square().sum(1)
        return torch.cat([torch.addmm(norm, c, codes.T, alpha=-2).argmin(1) for c in x.split(256)])

    return call


def lookup_cdist(inputs: Inputs) -> Call:
    """torch.cdist and argmin."""
    return lambda: torch.cdist(inputs["x"], inputs["codes"]).argmin(-1)


def lookup_official(inputs: Inputs) -> Call:
    """The formula of the official SimVQ."""

    def call() -> Tensor:
        x, codes = inputs["x"], inputs["codes"]
        squares = x.square().sum(1, keepdim=True) + codes.square().sum(1)
        scores: Tensor = squares - 2 * torch.einsum("bd,dn->bn", x, codes.T)
        return scores.argmin(1)

    return call


def lookup_vector_quantize(inputs: Inputs) -> Call:
    """SimVQ of vector-quantize-pytorch with an identity map."""
    package = importlib.import_module("vector_quantize_pytorch")

    codes = inputs["codes"]
    module = package.SimVQ(dim=codes.shape[1], codebook_size=codes.shape[0], rotation_trick=False)
    module = module.to(codes.device).eval()
    module.frozen_codebook.copy_(codes)
    module.code_transform.weight.data.copy_(torch.eye(codes.shape[1]))

    def call() -> Any:
        with torch.no_grad():
            return module(inputs["x"][None])[1][0]

    return call


def lookup_faiss(inputs: Inputs) -> Call:
    """IndexFlatL2 of faiss, filled before timing."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatL2(inputs["codes"].shape[1])
    index.add(inputs["codes"].numpy())
    return lambda: torch.from_numpy(index.search(inputs["x"].numpy(), 1)[1][:, 0])


def lookup_sklearn(inputs: Inputs) -> Call:
    """pairwise_distances_argmin of scikit-learn."""
    metrics = importlib.import_module("sklearn.metrics")

    x, codes = inputs["x"].numpy(), inputs["codes"].numpy()
    return lambda: torch.from_numpy(metrics.pairwise_distances_argmin(x, codes))


def lookup_flash_kmeans(inputs: Inputs) -> Call:
    """Assignment kernel of flash-kmeans (CUDA)."""
    package = importlib.import_module("flash_kmeans.assign_euclid_triton")

    x, codes = inputs["x"][None], inputs["codes"][None]
    squares = x.square().sum(-1)
    return lambda: package.euclid_assign_triton(x, codes, squares)[0]


# --- mask attention --------------------------------------------------------------------------


def _keys_and_values(inputs: Inputs, width: int = 640) -> tuple[Tensor, ...]:
    """Return a projected mask as a user would compute it: f = m A, K = f W_k, V = f W_v.

    The maps are chosen so that A W_k equals the operator's key vectors exactly enough: A embeds
    mask channels into the first of `width` features.
    """
    keys, values = inputs["key_vectors"], inputs["value_vectors"]
    heads, masks, dim = keys.shape
    embed = torch.zeros(masks, width, device=keys.device, dtype=keys.dtype)
    embed[:, :masks] = torch.eye(masks)
    maps = []
    for vectors in (keys, values):
        full = torch.zeros(width, heads * dim, device=keys.device, dtype=keys.dtype)
        full[:masks] = vectors.transpose(0, 1).reshape(masks, heads * dim)
        maps.append(full)
    return embed, *maps


def _rotation(grid: tuple[int, int], extent: tuple[int, int], dim: int, like: Tensor) -> Tensor:
    half = dim // 2
    turn = 1e4 ** (-2.0 * torch.arange(half // 2, dtype=torch.float64) / half)
    y, x = (
        (torch.arange(n, dtype=torch.float64) + 0.5) * length / n
        for n, length in zip(grid, extent, strict=True)
    )
    grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
    angle = torch.cat((grid_x.reshape(-1, 1) * turn, grid_y.reshape(-1, 1) * turn), 1)
    return torch.polar(torch.ones_like(angle), angle).to(like.device, torch.complex64)


def _rotate(tensor: Tensor, turn: Tensor) -> Tensor:
    pairs = torch.view_as_complex(tensor.float().reshape(*tensor.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turn).flatten(-2).to(tensor.dtype)


def attention_with(attend: Callable[[Tensor, Tensor, Tensor], Tensor], width: int) -> Peer:
    """Return a peer: project the mask to `width` features, to keys and values, rotate, attend."""

    def peer(inputs: Inputs) -> Call:
        trains = inputs["key_vectors"].requires_grad
        ready = None if trains else _keys_and_values(inputs, width)
        heads, _, dim = inputs["key_vectors"].shape
        query = inputs["query"]
        grid = (inputs["mask"].shape[2], inputs["mask"].shape[3])
        q_turn = _rotation(inputs["query_grid"], inputs["extent"], dim, query)
        k_turn = _rotation(grid, inputs["extent"], dim, query)

        def call() -> Tensor:
            embed, to_keys, to_values = ready or _keys_and_values(inputs, width)
            tokens = inputs["mask"].flatten(2).transpose(1, 2) @ embed
            k, v = (
                (tokens @ m).reshape(*tokens.shape[:2], heads, dim).transpose(1, 2)
                for m in (to_keys, to_values)
            )
            return attend(_rotate(inputs["query"], q_turn), _rotate(k, k_turn), v)

        return call

    return peer


def attend_flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlexAttention, compiled."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled = attend_flex.__dict__.setdefault("compiled", torch.compile(flex_attention))
    return compiled(q, k, v)  # type: ignore[no-any-return]


def attend_xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """memory_efficient_attention of xformers."""
    from xformers.ops import memory_efficient_attention

    parts = [t.transpose(1, 2) for t in (q, k, v)]
    return memory_efficient_attention(*parts).transpose(1, 2)  # type: ignore[no-any-return]


def attend_flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """flash_attn_func of flash-attn."""
    from flash_attn import flash_attn_func

    parts = [t.transpose(1, 2) for t in (q, k, v)]
    return flash_attn_func(*parts).transpose(1, 2)  # type: ignore[no-any-return]


def sdpa_backend(name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return SDPA restricted to one backend."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backend = getattr(SDPBackend, name)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return attend


# --- gated cross-attention -------------------------------------------------------------------


def gated_folded(inputs: Inputs) -> Call:
    """Projection of keys and values with folded weights, then SDPA: the strongest plain peer."""
    frozen = not inputs["w_k"].requires_grad
    folded = _fold(inputs) if frozen else None

    def call() -> Tensor:
        to_keys, to_values, shift = folded if folded is not None else _fold(inputs)
        heads = inputs["num_heads"]

        def split(tensor: Tensor) -> Tensor:
            return tensor.reshape(*tensor.shape[:2], heads, -1).transpose(1, 2)

        q = split(inputs["query"] @ inputs["w_q"].T)
        k = split(inputs["features"] @ to_keys.T)
        v = split(F.linear(inputs["features"], to_values, shift))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        tanh: Tensor = torch.tanh(inputs["gate"])
        return inputs["residual"] + tanh * (out @ inputs["w_o"].T)  # type: ignore[no-any-return]

    return call


def _fold(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    w_feature = inputs["w_feature"]
    return (
        inputs["w_k"] @ w_feature,
        inputs["w_v"] @ w_feature,
        inputs["w_v"] @ inputs["b_feature"],
    )


def gated_literal(inputs: Inputs) -> Call:
    """Equation 3 as written: feature projection, key and value projections, SDPA."""

    def call() -> Tensor:
        heads = inputs["num_heads"]

        def split(tensor: Tensor) -> Tensor:
            return tensor.reshape(*tensor.shape[:2], heads, -1).transpose(1, 2)

        f = F.linear(inputs["features"], inputs["w_feature"], inputs["b_feature"])
        q, k, v = (
            split(source @ inputs[name].T)
            for source, name in ((inputs["query"], "w_q"), (f, "w_k"), (f, "w_v"))
        )
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        tanh: Tensor = torch.tanh(inputs["gate"])
        return inputs["residual"] + tanh * (out @ inputs["w_o"].T)  # type: ignore[no-any-return]

    return call


def peers(operator: str, device: str) -> dict[str, Peer]:
    """Return the peers of an operator that are installed and run on `device`."""
    found: dict[str, Peer] = {}
    if operator == "codebook_lookup":
        found = {
            "chunked addmm + argmin": lookup_chunked,
            "torch.cdist + argmin": lookup_cdist,
            "official SimVQ formula": lookup_official,
        }
        if installed("vector_quantize_pytorch") and installed("einx"):
            found["vector-quantize-pytorch SimVQ"] = lookup_vector_quantize
        if device == "cpu" and installed("faiss"):
            found["faiss IndexFlatL2"] = lookup_faiss
        if device == "cpu" and installed("sklearn"):
            found["scikit-learn argmin"] = lookup_sklearn
        if device == "cuda" and installed("flash_kmeans"):
            found["flash-kmeans"] = lookup_flash_kmeans
    elif operator == "gated_cross_attention":
        found = {"folded projection + SDPA": gated_folded, "eq. 3 + SDPA": gated_literal}
    elif operator == "mask_attention":
        found = {"projection 640 + SDPA": attention_with(F.scaled_dot_product_attention, 640)}
        if device == "cuda":
            for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"):
                found[f"projection + SDPA {name.lower()}"] = attention_with(sdpa_backend(name), 640)
            found["projection + FlexAttention"] = attention_with(attend_flex, 640)
            if installed("xformers"):
                found["projection + xformers"] = attention_with(attend_xformers, 640)
            if installed("flash_attn"):
                found["projection + flash-attn"] = attention_with(attend_flash, 640)
    return found
