"""The record LATENT of forward_arguments.py: the matrices of a model's latent vectors (MLA), and room for its queries."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..families.parts import LatentParts, ModelParts
from ..gptq_linear import GPTQLinear
from . import cpu_kernels
from .cpu_linear import CpuLinear
from .cpu_weights import from_packed
from .thread_team import Team
from .tiles import LANES
from .weight_room import aligned

_NUMBERS = ("rank", "fixed", "turned", "value_dim", "eps", "queries_rank", "queries_eps")


def latent_of(parts: ModelParts, team: Team) -> dict[str, Any]:
    """The fields that describe the model. Packed layers of keys and values get their kernels, for the model's own forward."""
    latents = [each.latent for each in parts.layers if each.latent is not None]
    if not latents:
        nothing = np.zeros(1, np.float32)
        halves = np.zeros(1, np.int16)
        return dict.fromkeys(_NUMBERS, 0) | {"norms": nothing, "queries_norms": nothing, "keys": halves, "values": halves}
    first, heads = latents[0], parts.heads
    keys = aligned((len(latents), heads, first.rank // LANES, first.fixed, LANES), np.float16)
    values = aligned((len(latents), heads, first.value_dim // LANES, first.rank, LANES), np.float16)
    for at, each in enumerate(latents):
        key, value = _matrices(each, heads)
        keys[at] = key.view(heads, first.fixed, -1, LANES).permute(0, 2, 1, 3).numpy()
        values[at] = value.view(heads, -1, LANES, first.rank).permute(0, 1, 3, 2).numpy()
        _give_kernel(each.keys_values, team)
    norms = [each.queries_norm for each in latents if each.queries_norm is not None]
    return {
        "rank": first.rank,
        "fixed": first.fixed,
        "turned": first.turned,
        "value_dim": first.value_dim,
        "norms": _stacked([each.norm.weight for each in latents]),
        "eps": float(first.norm.eps),
        "queries_rank": norms[0].weight.numel() if norms else 0,
        "queries_norms": _stacked([each.weight for each in norms]) if norms else np.zeros(1, np.float32),
        "queries_eps": float(norms[0].eps) if norms else 0.0,
        "keys": keys.view(np.int16),
        "values": values.view(np.int16),
    }


def latent_room(
    described: dict[str, Any], rows: int, model: dict[str, Any], qkv: np.ndarray, attended: np.ndarray
) -> dict[str, Any]:
    """What the record FORWARD has of queries and of what attention gives, for forwards of up to `rows` rows: of a model without
    latent vectors, `qkv` and `attended`."""
    latent = {**described, "raised": qkv, "raised_width": qkv.shape[1]}
    queries, gathered = qkv, attended
    if described["rank"]:
        heads = model["heads"]
        queries = aligned((rows, heads * model["head_dim"]), np.float32)
        gathered = aligned((rows, heads * model["value_dim"]), np.float32)
        if described["queries_rank"]:
            width = -(-heads * (described["fixed"] + described["turned"]) // LANES) * LANES
            latent |= {"raised": aligned((rows, width), np.float32), "raised_width": width}
    return {
        "latent": latent,
        "queries": queries,
        "queries_width": queries.shape[1],
        "gathered": gathered,
        "gathered_width": gathered.shape[1],
    }


def _matrices(latent: LatentParts, heads: int) -> tuple[Tensor, Tensor]:
    """(of the keys [heads, fixed, rank], of the values [heads, value_dim, rank]) in halves."""
    layer: Any = latent.keys_values
    weight = layer.dequantize(torch.float32) if isinstance(layer, GPTQLinear) else layer.weight.float()
    both = weight.detach().half().view(heads, latent.fixed + latent.value_dim, latent.rank)
    return both[:, : latent.fixed], both[:, latent.fixed :]


def _give_kernel(layer: nn.Module, team: Team) -> None:
    if isinstance(layer, GPTQLinear):
        layer.release(CpuLinear(from_packed(layer, cpu_kernels.ISA, team), team))


def _stacked(vectors: list[Tensor]) -> np.ndarray:
    return torch.stack([each.detach().float() for each in vectors]).contiguous().numpy()
