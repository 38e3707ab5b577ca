"""One token of a Llama-family model on an NVIDIA card: five kernels a layer, recorded once as a CUDA graph.

    qkv        norm, product, bias
    attention  norm of heads, rotary, keys and values written, attention; output in the next input's order
    o          product, added to the residual; the sum once more in the next input's order
    gate, up   norm, product, SiLU(gate) * up, in the next input's order
    down       as o

Every kernel begins while the one ahead still runs and asks for its first weights before it waits. Prompts take
another way: weights are made dense by tiles, and cuBLAS multiplies.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..linear import GPTQLinear
from ..llama import LayerParts, LlamaParts
from .kernels import (
    ATTENTION_THREADS,
    HEAD_DIMS,
    MOST_SPLITS,
    Attention,
    Card,
    Embed,
    Gather,
    Gemv,
    GemvVariant,
    Head,
    Norm,
    Rope,
    Sample,
    Silu,
    pointer,
)
from .pages import PAGE_TOKENS, PagedMemory, Pages
from .weights import TILE, Tuning, Unsuited, Weight, repack, shape_of, variant

log = logging.getLogger(__name__)

TOLD = 64  # tokens that the card tells ahead of being asked (sample.cu)
_SCRATCH = 1 << 26  # weights made dense at once: 128 MB of fp16


@dataclass(frozen=True)
class _Layer:
    qkv: Weight
    o: Weight
    gate_up: Weight
    down: Weight
    input_norm: Tensor  # fp16, engine order of qkv's input
    post_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    window: int


class CudaStep:
    """A model's weights and buffers for one conversation at a time. Not thread-safe: one thread uses it."""

    def __init__(
        self,
        parts: LlamaParts,
        context_tokens: int,
        *,
        card: Card | None = None,
        tunings: dict[str, Tuning] | None = None,
        progress: Callable[[float], None] = lambda share: None,
    ) -> None:
        """Takes the packed tensors out of `parts` layer by layer, so that the card never holds both forms of
        a model. Raises Unsuited (before anything is taken) or NoCompiler."""
        self.device = parts.device
        self.context_tokens = context_tokens
        _require(parts)
        self.card = card or Card(self.device)
        self.heads, self.kv_heads, self.head_dim = parts.heads, parts.kv_heads, parts.head_dim
        self.eps = float(parts.eps)
        self.hidden = parts.embedding.shape[1]
        self.head: Tensor = parts.head.weight.data  # type: ignore[assignment]
        self.vocabulary = int(self.head.shape[0])
        self.tunings = {**_TUNINGS, **(tunings or {})}
        shapes = [tuple(shape_of(each) for each in _products(layer)) for layer in parts.layers]
        self.card.add(shapes={each for four in shapes for each in four}, head_dims=[self.head_dim], fixed=True)
        self.embedding = parts.embedding.data
        self.final_norm = parts.norm.data.half().contiguous()
        self.cosines, self.sines = parts.angles(context_tokens)
        self.rotary_half = parts.rotary_dim // 2
        self.layers: list[_Layer] = []
        for at, (layer, four) in enumerate(zip(parts.layers, shapes, strict=True)):
            self.layers.append(self._take(layer, four))
            progress((at + 1) / len(parts.layers))
        self.pages = Pages(self.device, len(self.layers), self.kv_heads, self.head_dim)
        self._buffers()
        self.tune({})
        self._told_pages: list[int] = []

    # -- loading ---------------------------------------------------------------------------------------------------

    def _take(self, layer: LayerParts, shapes: Sequence[Any]) -> _Layer:
        qkv_layers, o_layers, gate_up_layers, down_layers = _products(layer)
        qkv = repack(self.card, qkv_layers, shapes[0])
        o = repack(self.card, o_layers, shapes[1])
        # gate and up are stored so that their product comes out in the order of down's input
        down = repack(self.card, down_layers, shapes[3])
        inner = down.in_features
        at = down.order.long().view(-1, 8)  # [tiles, 8], -1 where down's input is padding
        up = torch.where(at >= 0, at + inner, -1)
        gate_up = repack(self.card, gate_up_layers, shapes[2], torch.cat([at, up], dim=1).view(-1))
        for each in (*qkv_layers, *o_layers, *gate_up_layers, *down_layers):
            each.let_go()

        def in_order(norm: Tensor, weight: Weight) -> Tensor:
            return torch.where(weight.order >= 0, norm.data.half()[weight.order.clamp(min=0).long()], 0).contiguous()

        return _Layer(
            qkv,
            o,
            gate_up,
            down,
            in_order(layer.input_norm, qkv),
            in_order(layer.post_norm, gate_up),
            None if layer.q_norm is None else layer.q_norm.data.half().contiguous(),
            None if layer.k_norm is None else layer.k_norm.data.half().contiguous(),
            layer.window,
        )

    def _buffers(self) -> None:
        first = self.layers[0]

        def zeros(*shape: int, of: torch.dtype = torch.float16) -> Tensor:
            return torch.zeros(shape, dtype=of, device=self.device)

        self.residual = zeros(self.hidden, of=torch.float32)
        self.x = zeros(first.qkv.padded)
        self.x_mlp = zeros(first.gate_up.padded)
        self.qkv = zeros((self.heads + 2 * self.kv_heads) * self.head_dim)
        self.attended = zeros(first.o.padded)
        self.inner = zeros(first.down.padded)
        self.x_head = zeros(self.hidden)
        self.identity = torch.arange(self.hidden, dtype=torch.int32, device=self.device)
        self.logits = zeros(1, self.vocabulary, of=torch.float32)
        self.max_pages = -(-self.context_tokens // PAGE_TOKENS) + 1
        self.table = zeros(1, self.max_pages, of=torch.int64)
        self.group_blocks = -(-(self.heads // self.kv_heads) // 8)
        blocks = self.kv_heads * self.group_blocks
        self.splits = max(1, min(MOST_SPLITS, -(-2 * self.card.processors // blocks)))
        self.partial = zeros(blocks * self.splits * 8 * (self.head_dim + 2), of=torch.float32)
        self.done = zeros(blocks, of=torch.int32)
        # sampling
        self.ids = zeros(1, of=torch.int32)
        self.positions = zeros(1, of=torch.int32)
        self.params = zeros(1, 12, of=torch.float32)
        self.bias = zeros(1, self.vocabulary, of=torch.float32)
        self.seen = zeros(1, self.vocabulary, of=torch.int16)
        self.answered = zeros(1, self.vocabulary, of=torch.int16)
        self.history = zeros(1, self.context_tokens, of=torch.int32)
        self.answer_from = zeros(1, of=torch.int32)
        self.work = zeros(1, self.vocabulary, of=torch.float32)
        self.told = torch.zeros(1, TOLD, dtype=torch.int32, pin_memory=True)

    def _variants(self, layer: _Layer) -> list[GemvVariant]:
        return [self._gemv_plan(weight, epilogue)[0] for weight, epilogue in zip(*_ROLES(layer), strict=True)]

    def _gemv_plan(self, weight: Weight, role: str) -> tuple[GemvVariant, Tuning]:
        tuning = self.tunings[role]
        return variant(weight, _EPILOGUES[role], role in ("qkv", "gate_up"), tuning), tuning

    def tune(self, tunings: dict[str, Tuning]) -> None:
        """Spread the products in another way."""
        self.tunings = {**self.tunings, **tunings}
        self.card.add(variants={each for layer in self.layers for each in self._variants(layer)})
        self._graphs: dict[bool, torch.cuda.CUDAGraph] = {}

    # -- one token -------------------------------------------------------------------------------------------------

    def _gemv(
        self, role: str, weight: Weight, x: Tensor, out: Tensor, norm: Tensor | None = None, places: Tensor | None = None
    ) -> None:
        plan, tuning = self._gemv_plan(weight, role)
        arguments = Gemv(
            pointer(weight.words),
            pointer(weight.scales),
            pointer(x),
            pointer(norm),
            pointer(weight.bias),
            pointer(out),
            pointer(self.residual) if places is not None else None,
            pointer(places),
            weight.out_features,
            weight.tiles,
            weight.chunks,
            weight.groups,
            weight.unit_to_group,
            weight.in_features,
            self.eps,
        )
        blocks = min(-(-weight.tiles // plan.teams), tuning.blocks_per_processor * self.card.processors)
        self.card.run(plan.name, (blocks,), plan.threads, arguments, plan.shared_bytes(weight.chunks), overlap=True)

    def _embed(self) -> None:
        arguments = Embed(
            pointer(self.embedding),
            pointer(self.ids),
            pointer(self.residual),
            pointer(self.x),
            pointer(self.layers[0].qkv.places),
            self.hidden,
            self.x.numel(),
        )
        self.card.run("embed", (-(-self.hidden // 256), 1), 256, arguments, overlap=True)

    def _attention(self, at: int, layer: _Layer) -> None:
        arguments = Attention(
            pointer(self.qkv),
            pointer(self.table),
            pointer(self.positions),
            pointer(self.cosines),
            pointer(self.sines),
            pointer(layer.q_norm),
            pointer(layer.k_norm),
            pointer(self.attended),
            pointer(layer.o.places),
            pointer(self.partial),
            pointer(self.done),
            at * self.pages.layer_bytes,
            self.heads,
            self.kv_heads,
            self.max_pages,
            self.attended.numel(),
            layer.window,
            self.rotary_half,
            self.group_blocks,
            self.eps,
            math.log2(math.e) / math.sqrt(self.head_dim),
        )
        grid = (self.splits, self.kv_heads * self.group_blocks, 1)
        self.card.run(f"attention_{self.head_dim}", grid, ATTENTION_THREADS, arguments, overlap=True)

    def _head(self) -> None:
        arguments = Head(
            pointer(self.head),
            pointer(self.x_head),
            pointer(self.final_norm),
            pointer(self.logits),
            self.vocabulary,
            self.hidden,
            self.eps,
        )
        blocks = min(-(-self.vocabulary // 16), 4 * self.card.processors)
        self.card.run("head", (blocks,), 256, arguments, self.hidden * 2 + 160, overlap=True)

    def sample(self) -> None:
        """From `logits` to the next token in `ids`, with `params`."""
        arguments = Sample(
            pointer(self.logits),
            pointer(self.params),
            pointer(self.bias),
            pointer(self.seen),
            pointer(self.answered),
            pointer(self.history),
            pointer(self.answer_from),
            pointer(self.work),
            pointer(self.ids),
            pointer(self.positions),
            self.told.data_ptr(),
            self.vocabulary,
            self.context_tokens,
        )
        self.card.run("sample", (1,), 1024, arguments, overlap=True)

    def forward(self) -> None:
        """From `ids` at `positions` to `logits`, on the current stream."""
        self._embed()
        for at, layer in enumerate(self.layers):
            self._gemv("qkv", layer.qkv, self.x, self.qkv, layer.input_norm)
            self._attention(at, layer)
            self._gemv("o", layer.o, self.attended, self.x_mlp, places=layer.gate_up.places)
            self._gemv("gate_up", layer.gate_up, self.x_mlp, self.inner, layer.post_norm)
            last = at + 1 == len(self.layers)
            places = self.identity if last else self.layers[at + 1].qkv.places
            self._gemv("down", layer.down, self.inner, self.x_head if last else self.x, places=places)
        self._head()

    def step(self, sample: bool = True) -> None:
        """Compute the token in `ids` and choose the next one, or leave it at `logits`. Recorded at the first call."""
        graph = self._graphs.get(sample)
        if graph is None:
            stream = torch.cuda.Stream(self.device)
            stream.wait_stream(torch.cuda.current_stream(self.device))
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                self.forward()
                if sample:
                    self.sample()
            self._graphs[sample] = graph
        graph.replay()

    # -- prompts ---------------------------------------------------------------------------------------------------

    def prefill(self, ids: Sequence[int], start: int) -> Tensor:
        """Compute tokens that follow `start` tokens in the pages -> fp32 [T, H], before the last norm.

        `logits` are those of the last token.
        """
        tokens = torch.tensor(list(ids), device=self.device)
        count = tokens.numel()
        h = self.embedding[tokens].float()  # [T, H]
        scratch = torch.empty(min(_SCRATCH, max(_largest(each) for each in self.layers)), dtype=torch.float16, device=self.device)
        for at, layer in enumerate(self.layers):
            x = self._norm_rows(h, layer.input_norm, layer.qkv)
            qkv = self._product(x, layer.qkv, scratch)
            attended = self._attend(at, layer, qkv, start, count)
            h += self._product(_in_order(attended, layer.o), layer.o, scratch)
            x = self._norm_rows(h, layer.post_norm, layer.gate_up)
            gate_up = self._product(x, layer.gate_up, scratch)
            inner = torch.empty(count, layer.down.padded, dtype=torch.float16, device=self.device)
            arguments = Silu(pointer(gate_up), pointer(inner), gate_up.shape[1] // 2, layer.down.padded)
            self.card.run("silu_rows", (8, count), 256, arguments)
            h += self._product(inner, layer.down, scratch)
        self.x_head.copy_(h[-1].clamp(-65504, 65504))
        self._head()
        return h

    def all_logits(self, h: Tensor) -> Tensor:
        """What `prefill` returned -> fp32 [T, V]."""
        x = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps) * self.final_norm.float()
        return (x.half() @ self.head.T).float()

    def _norm_rows(self, h: Tensor, norm: Tensor, weight: Weight) -> Tensor:
        out = torch.empty(h.shape[0], weight.padded, dtype=torch.float16, device=self.device)
        arguments = Norm(pointer(h), pointer(norm), pointer(out), pointer(weight.order), self.hidden, weight.padded, self.eps)
        self.card.run("norm_rows", (h.shape[0],), 256, arguments)
        return out

    def _product(self, x: Tensor, weight: Weight, scratch: Tensor) -> Tensor:
        """x [T, padded] in engine order -> [T, rows], the rows in the order of the weight."""
        rows = weight.tiles * TILE
        y = torch.empty(x.shape[0], rows, dtype=torch.float16, device=self.device)
        step = max(1, scratch.numel() // (TILE * weight.padded))
        for first in range(0, weight.tiles, step):
            tiles = min(step, weight.tiles - first)
            dense = weight.dense(self.card, first, tiles, scratch)
            torch.mm(x, dense.T, out=y[:, first * TILE : (first + tiles) * TILE])
        if weight.bias is not None:
            y += weight.bias
        return y if rows == weight.out_features else y[:, : weight.out_features].contiguous()

    def _attend(self, at: int, layer: _Layer, qkv: Tensor, start: int, count: int) -> Tensor:
        heads, kv, dim = self.heads, self.kv_heads, self.head_dim
        layer_bytes = at * self.pages.layer_bytes
        rope = Rope(
            pointer(qkv), pointer(self.table), pointer(self.cosines), pointer(self.sines), pointer(layer.q_norm),
            pointer(layer.k_norm), layer_bytes, heads, kv, start, self.rotary_half, self.eps,
        )  # fmt: skip
        self.card.run(f"rope_{dim}", (count,), 256, rope)
        length = start + count
        split = qkv.view(count, heads + 2 * kv, dim).transpose(0, 1)  # [heads, T, D]
        queries = split[:heads]
        if start:
            keys = torch.empty(kv, length, dim, dtype=torch.float16, device=self.device)
            values = torch.empty_like(keys)
            gather = Gather(pointer(self.table), pointer(keys), pointer(values), layer_bytes, kv, length)
            self.card.run(f"gather_{dim}", (-(-length // PAGE_TOKENS), kv), 256, gather)
        else:
            keys, values = split[heads : heads + kv], split[heads + kv :]
        out = _causal_attention(queries[None], keys[None], values[None], layer.window)
        return out[0].transpose(0, 1).reshape(count, heads * dim)

    # -- conversations ---------------------------------------------------------------------------------------------

    def use(self, memory: PagedMemory, tokens: int) -> None:
        """Make `memory` the one that is read and written, with pages for that many tokens."""
        memory.reserve(tokens)
        pages = memory.pages
        if pages == self._told_pages:
            return
        same = len(self._told_pages) if pages[: len(self._told_pages)] == self._told_pages else 0
        added = torch.tensor(pages[same:], dtype=torch.int64)
        self.table[0, same : len(pages)] = added.to(self.device)
        self._told_pages = list(pages)

    def close(self) -> None:
        self._graphs.clear()
        self.pages.clear()
        self.layers.clear()


def _ROLES(layer: _Layer) -> tuple[tuple[Weight, ...], tuple[str, ...]]:
    return (layer.qkv, layer.o, layer.gate_up, layer.down), ("qkv", "o", "gate_up", "down")


_EPILOGUES = {"qkv": "PLAIN", "o": "RESIDUAL", "gate_up": "SILU", "down": "RESIDUAL"}
_TUNINGS = {  # measured on an H100 and an H200
    "qkv": Tuning(8, 4, 4, 1, 2),
    "o": Tuning(8, 4, 3, 1, 2),
    "gate_up": Tuning(8, 4, 3, 1, 3),
    "down": Tuning(16, 2, 3, 1, 2),
}


def _products(layer: LayerParts) -> tuple[Sequence[GPTQLinear], ...]:
    four = (layer.qkv, (layer.o,), layer.gate_up, (layer.down,))
    for each in four:
        for one in each:
            if not isinstance(one, GPTQLinear):
                raise Unsuited("a layer that is not packed")
    return four  # type: ignore[return-value]


def _require(parts: LlamaParts) -> None:
    """Raises Unsuited for what the kernels cannot do."""
    if parts.head_dim not in HEAD_DIMS:
        raise Unsuited(f"heads of {parts.head_dim} dimensions")
    if not isinstance(parts.head, nn.Linear) or parts.head.bias is not None:
        raise Unsuited("a packed output layer")
    if parts.head.weight.dtype != torch.float16 or parts.embedding.dtype != torch.float16:
        raise Unsuited("numbers other than fp16")
    if parts.embedding.shape[1] % 8:
        raise Unsuited("a width that is no multiple of 8")
    sizes = {(each.qkv[0].in_features, each.down.in_features, each.o.in_features) for each in parts.layers}
    if len(sizes) != 1:
        raise Unsuited("layers of different sizes")


def _in_order(x: Tensor, weight: Weight) -> Tensor:
    """[T, K] -> [T, padded] in engine order, zeros for padding."""
    if weight.padded == weight.in_features:
        return x.index_select(1, weight.order)
    return nn.functional.pad(x, (0, 1)).index_select(1, torch.where(weight.order < 0, weight.in_features, weight.order))


def _largest(layer: _Layer) -> int:
    return max(each.tiles * TILE * each.padded for each in _ROLES(layer)[0])


def _causal_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """q [1, heads, T, D] of the last T positions, k and v [1, kv heads, L, D] -> [1, heads, T, D]."""
    count, length = q.shape[2], k.shape[2]
    if count == length and (not window or length <= window):
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    rows = torch.arange(length - count, length, device=q.device)[:, None]
    columns = torch.arange(length, device=q.device)[None]
    seen = columns <= rows
    if window:
        seen &= columns > rows - window
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
