"""Attention of a prompt that the model's own forward reads: scores with a cap, sinks, windows, and what a mask says.

torch's fast attention takes none of these; what transformers computes instead writes every score to memory several times. Whether
a mask is that of a causal model is found on the device, once for each mask of a forward, and not asked for.
"""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from ...core.errors import GptqWebuiError
from .attention_names import configs_of, decoders, name_attention
from .gpu_kernels import Gpu
from .kernel_arguments import PROMPT_ATTENTION
from .kernel_source import LayerVariant, PromptAttentionVariant
from .natural_order import NUMBERS
from .token_attention import HARMLESS, capturing
from .turned_rows import TurnedRows

log = logging.getLogger(__name__)

_MOST_HEADS = 65535
_MOST_MASKS = 4  # of a forward; in some each layer makes its own


class PromptAttention:
    """Its kernels on one GPU, for one model. Raises NoCompiler if they cannot be compiled."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self._gpu, self._configs = Gpu(device), configs_of(model)
        self._gpu.add(variants=[LayerVariant(False), LayerVariant(True)])
        self._turned = TurnedRows(model, self._gpu)
        self._fails = False  # a kernel could not be compiled
        self._compared: list[tuple[Tensor, int, Tensor]] = []  # masks of this forward, a window, and what was found

    @contextmanager
    def reading(self) -> Iterator[None]:
        """While it lasts, the model's forward uses the kernels, where they can."""
        with ExitStack() as undo:
            decoders.append(self)
            undo.callback(decoders.remove, self)
            undo.callback(self._forget)
            name_attention(self._configs, undo)
            self._turned.take(undo)
            yield

    def _forget(self) -> None:
        self._compared = []

    def close(self) -> None:
        self._gpu.close()

    def decode(self, query: Tensor, key: Tensor, value: Tensor, mask: Any, given: dict[str, Any]) -> Tensor | None:
        """[1, heads, T, D] -> [1, T, heads, D]; None if the kernel does not compute this, or torch does it as fast."""
        if (
            self._fails
            or query.dim() != 4
            or query.shape[0] != 1
            or query.shape[2] < 2
            or not isinstance(mask, Tensor)
            or capturing()
        ):
            return None
        if any(value is not None and name not in HARMLESS for name, value in given.items()) or given.get("dropout"):
            return None
        (heads, rows, dims), (kv_heads, keys) = query.shape[1:], key.shape[1:3]
        whole = key.shape == value.shape == (1, kv_heads, keys, dims) and not heads % kv_heads and heads <= _MOST_HEADS
        if not whole or not query.dtype == key.dtype == value.dtype or query.dtype not in NUMBERS or not query.is_cuda:
            return None
        variant = PromptAttentionVariant(query.dtype == torch.bfloat16, dims)
        if dims % 16 or dims > 256 or rows > keys or variant.shared_bytes > self._gpu.shared_limit_bytes:
            return None
        if self._gpu.capability < (8, 0):  # without copies past the registers it is no faster
            return None
        query, key, value = (_aligned(each) for each in (query, key, value))
        sinks = given.get("s_aux")
        kind = {torch.bool: 1, query.dtype: 2, torch.float32: 3}.get(mask.dtype)
        if kind is None or mask.dim() != 4 or mask.shape != (1, mask.shape[1], rows, keys) or mask.shape[1] not in (1, heads):
            return None
        if mask.shape[1] > 1 and sinks is None and not given.get("softcap"):  # torch adds what is for each head as fast
            return None
        if mask.stride(3) != 1 or (sinks is not None and sinks.numel() != heads):
            return None
        try:
            self._gpu.add_missing(variants=[variant])
        except GptqWebuiError as error:  # nothing is lost: torch attends
            log.info("prompts are attended by torch: %s", error)
            self._fails = True
            return None
        out = torch.empty(1, rows, heads, dims, dtype=query.dtype, device=query.device)
        scale = given.get("scaling")
        window = given.get("sliding_window")
        fields: dict[str, Any] = {
            "q": query, "k": key, "v": value, "out": out, "mask": mask, "mask_kind": kind,
            "sinks": None if sinks is None else sinks.to(query.dtype).contiguous(),
            "q_head": query.stride(1), "q_row": query.stride(2), "k_head": key.stride(1), "k_row": key.stride(2),
            "v_head": value.stride(1), "v_row": value.stride(2),
            "mask_head": mask.stride(1) if mask.shape[1] > 1 else 0, "mask_row": mask.stride(2),
            "heads": heads, "group": heads // kv_heads, "rows": rows, "keys": keys, "first": keys - rows,
            "window": 0 if window is None else int(window), "scale": float(dims**-0.5 if scale is None else scale),
            "cap": float(given.get("softcap") or 0.0),
        }  # fmt: skip
        irregular = self._comparison(variant, mask, fields)
        arguments = PROMPT_ATTENTION.pack(irregular=irregular, **fields)
        grid = (-(-rows // variant.rows), heads)
        self._gpu.run(variant.name, grid, variant.threads, arguments, variant.shared_bytes, overlap=True)
        return out

    def _comparison(self, variant: PromptAttentionVariant, mask: Tensor, fields: dict[str, Any]) -> Tensor:
        """int32 [1] on the device: 0 where the mask says what a causal model with the window does."""
        window = fields["window"]
        for known, of_window, found in self._compared:
            if known is mask and of_window == window:
                return found
        if mask.shape[1] > 1:  # of each head
            return torch.ones(1, dtype=torch.int32, device=mask.device)
        found = torch.zeros(1, dtype=torch.int32, device=mask.device)
        arguments = PROMPT_ATTENTION.pack(irregular=found, **fields)
        self._gpu.run(variant.name_of_comparison, (fields["rows"],), 256, arguments, overlap=True)
        self._compared = [*self._compared[1 - _MOST_MASKS :], (mask, window, found)]
        return found


def _aligned(x: Tensor) -> Tensor:
    """x [1, heads, T, D], whose rows the kernel can copy in pieces of 16 bytes."""
    plain = x.stride(3) == 1 and x.data_ptr() % 16 == 0 and x.stride(1) % 8 == x.stride(2) % 8 == 0
    return x if plain else x.clone(memory_format=torch.contiguous_format)
