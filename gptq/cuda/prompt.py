"""Reading prompts on a card: many tokens of one conversation at once.

Up to 96 tokens are multiplied with the packed weights (few.cu). For more, weights are made dense by tiles, and
cuBLAS multiplies; both leave keys and values in the conversation's pages.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

from . import small_batch
from .cuda_kernels import Gather, Norm, Rope, Silu, pointer
from .cuda_weights import TILE, Weight
from .kv_pages import PAGE_TOKENS

if TYPE_CHECKING:
    from .cuda_layers import Layer
    from .cuda_step import CudaStep

_SCRATCH = 1 << 26  # weights made dense at once: 128 MB of fp16


class Prompt:
    """The prompts of one CudaStep."""

    def __init__(self, step: "CudaStep") -> None:
        self._step = step
        self._gpu = step.gpu
        self._largest = max(weight.tiles * TILE * weight.padded for layer in step.layers for weight in layer.weights)

    def read(self, ids: Sequence[int], start: int, table: Tensor) -> Tensor:
        """Compute tokens that follow `start` tokens in the pages of `table` [pages] -> fp32 [T, H], before the last norm."""
        step = self._step
        tokens = torch.tensor(list(ids), device=step.device)
        count = tokens.numel()
        h = step.embedding[tokens].float()  # [T, H]
        scratch = None
        if count > small_batch.MOST_ROWS:
            scratch = torch.empty(min(_SCRATCH, self._largest), dtype=torch.float16, device=step.device)
        seen = self._seen(start, count)
        rest = None  # what is still to be added to h: the next norm does it
        for at, layer in enumerate(step.layers):
            x = self._norm(h, rest, layer.input_norm, layer.qkv)
            qkv = self._product(x, layer.qkv, scratch)
            attended = self._attend(at, layer, qkv, start, count, table, seen)
            rest = self._add(h, _in_order(attended, layer.o), layer.o, scratch)
            x = self._norm(h, rest, layer.post_norm, layer.gate_up)
            rest = self._add(h, self._inner(x, layer, scratch), layer.down, scratch)
        return h if rest is None else h.add_(rest)

    def _norm(self, h: Tensor, rest: Tensor | None, norm: Tensor, weight: Weight) -> Tensor:
        out = torch.empty(h.shape[0], weight.padded, dtype=torch.float16, device=h.device)
        self.norm_into(h, norm, weight.order, out, rest)
        return out

    def norm_into(self, h: Tensor, norm: Tensor, order: Tensor, out: Tensor, rest: Tensor | None = None) -> None:
        """Add `rest` fp16 [T, H] to h fp32 [T, H]; RMSNorm of it -> out fp16 [T, padded] in the order of `order`."""
        step = self._step
        arguments = Norm(
            pointer(h), pointer(rest), pointer(norm), pointer(out), pointer(order), step.hidden, out.shape[1], step.eps
        )  # fmt: skip
        self._gpu.run("norm_rows", (h.shape[0],), 512, arguments, step.hidden * 4 + 160, overlap=True)

    def _product(self, x: Tensor, weight: Weight, scratch: Tensor | None) -> Tensor:
        """x [T, padded] in engine order -> [T, N], the outputs in the order of the weight's rows."""
        if scratch is None:
            y = torch.empty(x.shape[0], weight.out_features, dtype=torch.float16, device=x.device)
            small_batch.multiply(self._gpu, weight, "PLAIN", x, y)
            return y
        rows = weight.tiles * TILE
        y = torch.empty(x.shape[0], rows, dtype=torch.float16, device=x.device)
        step = max(1, scratch.numel() // (TILE * weight.padded))
        for first in range(0, weight.tiles, step):
            tiles = min(step, weight.tiles - first)
            dense = weight.dense(self._gpu, first, tiles, scratch)
            torch.mm(x, dense.T, out=y[:, first * TILE : (first + tiles) * TILE])
        if weight.bias is not None:
            y += weight.bias
        return y if rows == weight.out_features else y[:, : weight.out_features].contiguous()

    def _add(self, h: Tensor, x: Tensor, weight: Weight, scratch: Tensor | None) -> Tensor | None:
        """Add the product to h, or else return it, fp16 [T, H]: the rest, for the next norm to add."""
        if scratch is not None:
            return self._product(x, weight, scratch)
        small_batch.multiply(self._gpu, weight, "RESIDUAL", x, h)
        return None

    def _inner(self, x: Tensor, layer: "Layer", scratch: Tensor | None) -> Tensor:
        """SiLU(gate) * up, in the order of down's input."""
        out = torch.empty(x.shape[0], layer.down.padded, dtype=torch.float16, device=x.device)
        if scratch is None:
            small_batch.multiply(self._gpu, layer.gate_up, "SILU", x, out)
            return out
        gate_up = self._product(x, layer.gate_up, scratch)
        arguments = Silu(pointer(gate_up), pointer(out), gate_up.shape[1] // 2, layer.down.padded)
        self._gpu.run("silu_rows", (8, x.shape[0]), 256, arguments)
        return out

    def _attend(
        self, at: int, layer: "Layer", qkv: Tensor, start: int, count: int, table: Tensor, seen: dict[int, Tensor]
    ) -> Tensor:
        """[T, (heads + 2 kv heads) * D], its keys and values kept -> [T, heads * D]."""
        step = self._step
        heads, kv, dim = step.heads, step.kv_heads, step.head_dim
        layer_bytes = at * step.pages.layer_bytes
        rope = Rope(
            pointer(qkv), pointer(table), pointer(step.cosines), pointer(step.sines), pointer(layer.q_norm),
            pointer(layer.k_norm), layer_bytes, heads, kv, start, step.rotary_half, step.eps,
        )  # fmt: skip
        self._gpu.run(f"rope_{step.cache.name}", (count,), 256, rope)
        length = start + count
        split = qkv.view(count, heads + 2 * kv, dim).transpose(0, 1)  # [heads, T, D]
        queries = split[:heads]
        if start:
            keys = torch.empty(kv, length, dim, dtype=torch.float16, device=qkv.device)
            values = torch.empty_like(keys)
            gather = Gather(pointer(table), pointer(keys), pointer(values), layer_bytes, kv, length)
            self._gpu.run(f"gather_{step.cache.name}", (-(-length // PAGE_TOKENS), kv), 256, gather)
        else:
            keys, values = split[heads : heads + kv], split[heads + kv :]
        if layer.window and length > layer.window:
            out = _masked_attention(queries[None], keys[None], values[None], seen[layer.window])
        else:
            mask = causal_lower_right(count, length) if start else None
            out = nn.functional.scaled_dot_product_attention(
                queries[None], keys[None], values[None], attn_mask=mask, is_causal=mask is None, enable_gqa=True
            )
        return out[0].transpose(0, 1).reshape(count, heads * dim)

    def _seen(self, start: int, count: int) -> dict[int, Tensor]:
        """By window, bool [T, L]: what each token sees, for the windows that cut something off."""
        length = start + count
        windows = {layer.window for layer in self._step.layers if layer.window and length > layer.window}
        rows = torch.arange(start, length, device=self._step.device)[:, None]
        columns = torch.arange(length, device=self._step.device)[None]
        return {each: (columns <= rows) & (columns > rows - each) for each in windows}


def _in_order(x: Tensor, weight: Weight) -> Tensor:
    """[T, K] -> [T, padded] in engine order, zeros for padding."""
    if weight.padded == weight.in_features:
        return x.index_select(1, weight.order)
    return nn.functional.pad(x, (0, 1)).index_select(1, torch.where(weight.order < 0, weight.in_features, weight.order))


def _masked_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """q [1, heads, T, D], k and v [1, kv heads, L, D], seen bool [T, L] -> [1, heads, T, D]."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
