"""Attention of one token over a cache of transformers at a fixed address (`decode` in token_attention.cu)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .fused_norms import CudaNorm
from .gpu_kernels import Gpu
from .kernel_arguments import DECODE
from .kernel_source import DecodeVariant
from .natural_order import NUMBERS

HARMLESS = {  # beside these, nothing that attention is given is known
    "dropout", "scaling", "softcap", "sliding_window", "s_aux", "is_causal", "position_ids", "use_cache", "cache_position",
    "output_attentions", "output_hidden_states", "output_router_logits", "past_key_values", "cache", "return_dict",
}  # fmt: skip


def capturing() -> bool:
    return torch.cuda.is_current_stream_capturing()


def of_one_token(*tensors: Tensor) -> bool:
    """Whether they are [1, heads, 1, D] of numbers that the kernels take, a head's side by side and aligned."""
    return all(
        each.is_cuda and each.dtype in NUMBERS and each.dim() == 4 and each.shape[0] == each.shape[2] == 1 and each.stride(3) == 1
        for each in tensors
    )


def _of_one_token_each(query: Tensor) -> bool:
    """As `of_one_token`, of several conversations."""
    return all(of_one_token(each[None]) for each in query) if query.dim() == 4 and query.shape[0] > 1 else of_one_token(query)


def suffix(x: Tensor) -> str:
    """Of the kernels for these numbers."""
    return "bfloat" if x.dtype == torch.bfloat16 else "half"


@dataclass(frozen=True, eq=False)
class Turn:
    """A rotation of query and key that has not been computed: halves of a head turn together."""

    q: Tensor  # [1, heads, 1, D]
    k: Tensor
    cosines: Tensor  # of all that turn, or of half of it
    sines: Tensor
    norms: tuple[CudaNorm, CudaNorm] | None  # of the heads, before they turn
    rotated: int  # dimensions that turn, the first of a head


class TokenAttention:
    """Its kernels on one GPU, and the memory that they need."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._work: dict[Any, tuple[Tensor, Tensor]] = {}  # partial sums and counters

    def close(self) -> None:
        self._work.clear()

    def of(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Any, given: dict[str, Any], turn: Turn | None = None
    ) -> Tensor | None:
        """[rows, heads, 1, D] -> [rows, 1, heads, D of the values]; None if the kernel does not compute this.

        A row is the token of one conversation. With `turn`, which is for one row, the query and the new key are computed from
        what it holds.
        """
        count = getattr(key, "tokens_before", None)
        if count is None or any(value is not None and name not in HARMLESS for name, value in given.items()):
            return None
        rows, heads, _token, dims = query.shape
        if count.numel() != rows or key.shape[0] != rows or (rows > 1 and hasattr(key, "new_token")):
            return None
        kv_heads, shown, values_dim = key.shape[1], key.shape[2], value.shape[3]
        plain = key.stride(2) == dims and value.stride(2) == values_dim and key.stride(3) == value.stride(3) == 1
        if (
            not _of_one_token_each(query)
            or not plain
            or dims % 8
            or values_dim % 8
            or max(dims, values_dim) > 256
            or heads % kv_heads
        ):
            return None
        if not query.dtype == key.dtype == value.dtype:
            return None
        window = given.get("sliding_window")
        kind, stride, row_bytes = 0, 0, 0
        if isinstance(mask, Tensor):
            if (
                mask.dim() != 4
                or mask.shape[0] not in (1, rows)
                or mask.shape[2] != 1
                or mask.shape[3] != shown
                or mask.stride(3) != 1
            ):
                return None
            if mask.shape[1] not in (1, heads) or mask.dtype not in (torch.bool, torch.float32, query.dtype):
                return None
            kind = {torch.bool: 1, query.dtype: 2}.get(mask.dtype, 3)
            stride = mask.stride(1) if mask.shape[1] > 1 else 0
            row_bytes = mask.stride(0) * mask.element_size() if mask.shape[0] > 1 else 0
        elif mask is not None or (window is not None and window < shown):
            return None
        group = heads // kv_heads
        lanes = next(each for each in (4, 8, 16, 32) if each * 8 >= max(dims, values_dim))
        together = next((each for each in (1, 2, 4) if each >= group), 4)
        variant = DecodeVariant(query.dtype == torch.bfloat16, lanes, together)
        if not capturing():
            self._gpu.add_missing(variants=[variant])
        elif not self._gpu.has(variant.name):
            return None
        blocks = kv_heads * -(-group // together)
        at_once = (2 if rows == 1 else 4) * self._gpu.processors
        splits = max(1, min(32, at_once // (blocks * rows), -(-shown // 32)))
        key_of_work = (rows * heads, splits, values_dim, blocks * rows)
        if key_of_work not in self._work:
            if capturing():
                return None
            partial = torch.empty(rows * heads * splits * (values_dim + 4), dtype=torch.float32, device=query.device)
            self._work[key_of_work] = partial, torch.zeros(blocks * rows, dtype=torch.int32, device=query.device)
        partial, done = self._work[key_of_work]
        new_key, new_value = getattr(key, "new_token", (None, None))
        if turn is not None:
            query, new_key = turn.q, turn.k
            if new_key.data_ptr() % 16 or new_key.stride(1) % 8 or turn.cosines.data_ptr() % 16 or turn.sines.data_ptr() % 16:
                return None
        norms = (None, None) if turn is None or turn.norms is None else turn.norms
        sinks = given.get("s_aux")
        out = torch.empty(rows, 1, heads, values_dim, dtype=query.dtype, device=query.device)
        scale = given.get("scaling")
        if query.data_ptr() % 16 or query.stride(1) % 8 or query.stride(0) % 8:
            query = query.clone(memory_format=torch.contiguous_format)
        arguments = DECODE.pack(
            q=query, keys=key, values=value, new_key=new_key, new_value=new_value, mask=mask if kind else None,
            sinks=None if sinks is None else sinks.to(query.dtype).contiguous(), count=count, partial=partial, done=done, out=out,
            key_stride=key.stride(1), value_stride=value.stride(1), key_row=key.stride(0), value_row=value.stride(0),
            q_row=query.stride(0), mask_row=row_bytes, mask_kind=kind, mask_stride=stride, heads=heads, group=group,
            group_blocks=-(-group // together), shown=shown, d=dims, dv=values_dim, q_stride=query.stride(1),
            new_key_stride=0 if new_key is None else new_key.stride(1),
            new_value_stride=0 if new_value is None else new_value.stride(1),
            scale=float(dims**-0.5 if scale is None else scale), cap=float(given.get("softcap") or 0.0),
            cosines=None if turn is None else turn.cosines, sines=None if turn is None else turn.sines,
            q_norm=None if norms[0] is None else norms[0].weight, k_norm=None if norms[1] is None else norms[1].weight,
            angles=0 if turn is None else turn.cosines.shape[-1], rotated=0 if turn is None else turn.rotated,
            norm_eps=0.0 if norms[0] is None else norms[0].kind.eps,
            norm_offset=0.0 if norms[0] is None else norms[0].kind.offset,
        )  # fmt: skip
        name, grid = (variant.name, (blocks, splits)) if rows == 1 else (variant.name_of_rows, (blocks, splits, rows))
        self._gpu.run(name, grid, 128, arguments, variant.shared_bytes(values_dim), overlap=True)
        return out
