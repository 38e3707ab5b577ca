"""Reading prompts on a GPU: many tokens at once, of one sequence or of several.

Up to 256 tokens, on Hopper 768, are multiplied with the packed weights (small_batch.cu, wide_batch.cu). For more, weights are
made dense (dense_weights.py), and cuBLAS multiplies. Both leave keys and values in the sequence's pages.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

from ..attention_backends import cudnn_attention
from ..token_ids import require_known
from . import small_batch
from .attention import gather_pages, rope_rows
from .buffers import Buffers
from .cuda_adapter import CudaAdapter, Matrices
from .cuda_layers import Layer, ModelWeights
from .cuda_weights import Weight
from .dense_weights import DenseRows, DenseWeights
from .gpu_kernels import Gpu
from .graphs import GraphRecorder
from .kernel_arguments import TILE
from .model_shape import ModelShape
from .prompt_graphs import PromptGraphs
from .row_kernels import norm_rows, order_rows, silu_rows
from .sequences import sent_to
from .torch_attention import PackedPrompts, masked_attention, packs

# cuDNN's attention takes half as long from so many tokens on. A plan takes as long as it saves in ten prompts, so one is made for
# multiples of so many tokens, once so many prompts have asked for it.
_PLANNED, _PLAN_STEP, _PLAN_AFTER = 3072, 256, 3


class Piece(NamedTuple):
    """Tokens of one sequence that follow `start` others in the pages of `table` [pages]."""

    ids: Sequence[int]
    start: int
    table: Tensor
    adapter: CudaAdapter | None = None


class Prompt:
    """Reads the prompts of one model."""

    def __init__(
        self, gpu: Gpu, shape: ModelShape, weights: ModelWeights, recorder: GraphRecorder, free_bytes: Callable[[], int]
    ) -> None:
        """`free_bytes` tells how much of the GPU is left when conversations have what they need."""
        self._gpu, self._shape, self._weights = gpu, shape, weights
        self._graphs = PromptGraphs(gpu, shape, weights, recorder)
        self._asked_plans: Counter[int] = Counter()  # by rows
        self.dense = DenseWeights(gpu, weights, free_bytes)

    @property
    def token_bytes(self) -> int:
        """Of a token's activations that are there at a time: gate and up, what SiLU leaves, the residual and what is added."""
        layers = self._weights.layers
        return 2 * max(each.gate_up.out_features + each.down.padded for each in layers) + 12 * self._shape.hidden

    def read(self, *pieces: Piece, ends: bool = False) -> Tensor:
        """Compute the tokens of pieces, one after the other -> fp32 [T, H], before the last norm.

        With `ends` -> [pieces, H], of the last token of each piece: the last layer keeps the keys and values of all tokens and
        computes the rest for those alone.
        """
        with cudnn_attention(allowed=False):
            hidden = self._read(pieces, ends)
        return _last_rows(hidden, pieces) if ends and len(hidden) > len(pieces) else hidden

    def _read(self, pieces: Sequence[Piece], ends: bool) -> Tensor:
        """As `read`; with `ends` perhaps of all tokens."""
        residual = self._embedded([id for each in pieces for id in each.ids])
        count = residual.shape[0]
        visible = [self._visible(each.start, len(each.ids)) for each in pieces]
        packed = self._packed(pieces, windows=any(visible))
        if all(each.adapter is None for each in pieces) and (found := self._graphs.of(count)) is not None:
            return self._read_by_graphs(residual, pieces, visible, packed, *found)
        dense = self.dense.of_rows(count)
        room = self._planned(pieces, windows=any(visible))
        addend = None  # a product that is still to be added to the residual: the next norm does it
        for at, layer in enumerate(self._weights.layers):
            x = self._norm(residual, addend, layer.input_norm, layer.qkv, dense)
            qkv = self._product(x, layer.qkv, dense, room)
            _adapt(qkv, x, pieces, at, "qkv", _natural(dense, layer.qkv))
            alone = ends and at + 1 == len(self._weights.layers) and all(each.adapter is None for each in pieces)
            attended = self._attend_all(at, layer, qkv, pieces, visible, packed, alone, planned=room > 0)
            if alone:  # the norm has added what was to be added
                residual, dense = _last_rows(residual, pieces), None
            x = self._in_order(attended, layer.o, dense)
            _adapt(residual, x, pieces, at, "o", _natural(dense, layer.o))
            addend = self._add(residual, x, layer.o, dense)
            x = self._norm(residual, addend, layer.post_norm, layer.gate_up, dense)
            x = self._inner(x, at, layer, pieces, dense)
            _adapt(residual, x, pieces, at, "down", None)
            addend = self._add(residual, x, layer.down, dense)
        return residual if addend is None else residual.add_(addend)

    def _read_by_graphs(
        self,
        residual: Tensor,
        pieces: Sequence[Piece],
        visible: Sequence[dict[int, Tensor]],
        packed: PackedPrompts | None,
        here: Buffers,
        graphs: Sequence[torch.cuda.CUDAGraph],
    ) -> Tensor:
        here.residual.copy_(residual)
        graphs[0].replay()
        for at, layer in enumerate(self._weights.layers):
            attended = self._attend_all(at, layer, here.qkv, pieces, visible, packed)
            order_rows(self._gpu, attended, layer.o.order, here.attended)
            graphs[at + 1].replay()
        return residual.copy_(here.residual)

    def close(self) -> None:
        """Drop what is recorded and kept."""
        self._graphs.close()
        self.dense.free()

    def _planned(self, pieces: Sequence[Piece], windows: bool) -> int:
        """Rows of queries, keys and values for which cuDNN's attention is asked; 0 for torch's own, which needs no plan.

        What is behind the tokens of a prompt is seen by none of them.
        """
        count = len(pieces[0].ids)
        if len(pieces) > 1 or pieces[0].start or windows or count < _PLANNED:
            return 0
        rows = -(-count // _PLAN_STEP) * _PLAN_STEP
        self._asked_plans[rows] += 1
        return rows if self._asked_plans[rows] > _PLAN_AFTER else 0

    def _packed(self, pieces: Sequence[Piece], windows: bool) -> PackedPrompts | None:
        """Where one kernel attends for all pieces."""
        device = self._weights.embedding.device
        if len(pieces) == 1 or windows or any(each.start for each in pieces) or not packs(device):
            return None
        return PackedPrompts([len(each.ids) for each in pieces], device)

    def _embedded(self, ids: Sequence[int]) -> Tensor:
        """fp32 [T, H]. Raises BadParameter for ids that the embedding does not have: on the GPU they would end the process."""
        require_known(ids, self._shape.embedding_rows)
        tokens = torch.tensor(ids if isinstance(ids, list) else list(ids))
        return self._weights.embedding[sent_to(self._weights.embedding.device, tokens)].float()

    def _norm(self, residual: Tensor, addend: Tensor | None, norm: Tensor, weight: Weight, dense: DenseRows | None) -> Tensor:
        """In the order that the weight takes: its fragment order [T, padded], or the model's own [T, H]."""
        order: Tensor | None = weight.order
        width = weight.padded
        if _natural(dense, weight) is not None and dense is not None:
            order, width, norm = None, weight.in_features, dense.natural_norm(norm, weight)
        out = torch.empty(residual.shape[0], width, dtype=torch.float16, device=residual.device)
        norm_rows(self._gpu, residual, norm, order, out, self._shape.eps, addend)
        return out

    def _in_order(self, x: Tensor, weight: Weight, dense: DenseRows | None) -> Tensor:
        """[T, K] -> [T, padded] in fragment order, zeros for padding; as it is where the weight takes it so."""
        if _natural(dense, weight) is not None:
            return x
        out = torch.empty(x.shape[0], weight.padded, dtype=torch.float16, device=x.device)
        order_rows(self._gpu, x, weight.order, out)
        return out

    def _product(self, x: Tensor, weight: Weight, dense: DenseRows | None, room: int = 0) -> Tensor:
        """x in the order that the weight takes -> [T, N], the outputs in the order of the weight's rows; `room` rows, if those
        are more, of which the last ones mean nothing."""
        if dense is None:
            y = torch.empty(x.shape[0], weight.out_features, dtype=torch.float16, device=x.device)
            small_batch.multiply(self._gpu, weight, "PLAIN", x, y)
            return y
        rows, count = weight.tiles * TILE, x.shape[0]
        y = torch.empty(max(count, room), rows, dtype=torch.float16, device=x.device)
        y[count:].zero_()
        for first, part in dense.of(weight):
            torch.mm(x, part.T, out=y[:count, first : first + len(part)])
        if weight.bias is not None:
            y += weight.bias
        return y if rows == weight.out_features else y[:, : weight.out_features].contiguous()

    def _add(self, residual: Tensor, x: Tensor, weight: Weight, dense: DenseRows | None) -> Tensor | None:
        """Add the product to the residual, or else return it, fp16 [T, H], for the next norm to add."""
        if dense is not None:
            return self._product(x, weight, dense)
        small_batch.multiply(self._gpu, weight, "RESIDUAL", x, residual)
        return None

    def _inner(self, x: Tensor, at: int, layer: Layer, pieces: Sequence[Piece], dense: DenseRows | None) -> Tensor:
        """SiLU(gate) * up, in the order of down's input."""
        out = torch.empty(x.shape[0], layer.down.padded, dtype=torch.float16, device=x.device)
        if dense is None and not any(_matrices(each, at, "gate_up") for each in pieces):
            small_batch.multiply(self._gpu, layer.gate_up, "SILU", x, out)
        else:
            gate_up = self._product(x, layer.gate_up, dense)
            _adapt(gate_up, x, pieces, at, "gate_up", _natural(dense, layer.gate_up))
            silu_rows(self._gpu, gate_up, out)
        return out

    def _attend_all(
        self,
        at: int,
        layer: Layer,
        qkv: Tensor,
        pieces: Sequence[Piece],
        visible: Sequence[dict[int, Tensor]],
        packed: PackedPrompts | None,
        alone: bool = False,
        planned: bool = False,
    ) -> Tensor:
        """As `_attend`, each piece with its own sequence."""
        if len(pieces) == 1:
            return self._attend(at, layer, qkv, pieces[0], visible[0], alone, planned)
        rows = qkv.split([len(each.ids) for each in pieces])
        if packed is not None:
            for own, piece in zip(rows, pieces, strict=True):
                rope_rows(self._gpu, self._shape, self._weights, at, qkv=own, table=piece.table, start=0)
            return packed.attend(qkv.view(len(qkv), -1, self._shape.head_dim), self._shape.heads, alone).flatten(1)
        found = [self._attend(at, layer, own, piece, seen, alone) for own, piece, seen in zip(rows, pieces, visible, strict=True)]
        return torch.cat(found)

    def _attend(
        self,
        at: int,
        layer: Layer,
        qkv: Tensor,
        piece: Piece,
        visible: dict[int, Tensor],
        alone: bool = False,
        planned: bool = False,
    ) -> Tensor:
        """[rows, (heads + 2 kv heads) * D], of which the first T are the piece's tokens, their keys and values kept ->
        [T, heads * D]; `alone`: [1, heads * D] of the last token. `planned`: rows are so many that cuDNN knows the shape."""
        shape, count, start = self._shape, len(piece.ids), piece.start
        heads, kv, dim, length = shape.heads, shape.kv_heads, shape.head_dim, start + count
        rope_rows(self._gpu, shape, self._weights, at, qkv=qkv[:count], table=piece.table, start=start)
        split = qkv.view(-1, heads + 2 * kv, dim).transpose(0, 1)  # [heads, rows, D]
        if not planned or alone:
            split = split[:, :count]
        queries = split[:heads, -1:] if alone else split[:heads]
        if start:
            keys = torch.empty(kv, length, dim, dtype=torch.float16, device=qkv.device)
            values = torch.empty_like(keys)
            gather_pages(self._gpu, shape, at, table=piece.table, keys=keys, values=values)
        else:
            keys, values = split[heads : heads + kv], split[heads + kv :]
        if layer.window and length > layer.window:
            seen = visible[layer.window]
            out = masked_attention(queries[None], keys[None], values[None], seen[-1:] if alone else seen)
        elif alone:  # the last token sees all
            out = nn.functional.scaled_dot_product_attention(queries[None], keys[None], values[None], enable_gqa=True)
        else:
            mask = causal_lower_right(count, length) if start else None
            with cudnn_attention(allowed=planned):
                out = nn.functional.scaled_dot_product_attention(
                    queries[None], keys[None], values[None], attn_mask=mask, is_causal=mask is None, enable_gqa=True
                )
        return out[0, :, :count].transpose(0, 1).reshape(-1, heads * dim)

    def _visible(self, start: int, count: int) -> dict[int, Tensor]:
        """By window, bool [T, L]: what each token sees, for the windows that hide something."""
        length, device = start + count, self._weights.embedding.device
        windows = {layer.window for layer in self._weights.layers if layer.window and length > layer.window}
        rows = torch.arange(start, length, device=device)[:, None]
        columns = torch.arange(length, device=device)[None]
        return {each: (columns <= rows) & (columns > rows - each) for each in windows}


def _last_rows(x: Tensor, pieces: Sequence[Piece]) -> Tensor:
    """[T, …] of the tokens of all -> [pieces, …] of the last token of each."""
    return torch.cat([x[end - 1 : end] for end in accumulate(len(each.ids) for each in pieces)])


def _matrices(piece: Piece, at: int, role: str) -> Matrices | None:
    return piece.adapter.matrices.get((at, role)) if piece.adapter is not None else None


def _natural(dense: DenseRows | None, weight: Weight) -> Tensor | None:
    """Where the weight's next product takes inputs in the model's own order: the place of each of them in fragment order."""
    return weight.permutation if dense is not None and dense.natural(weight) else None


def _adapt(y: Tensor, x: Tensor, pieces: Sequence[Piece], at: int, role: str, positions: Tensor | None) -> None:
    """Add what each piece's adapter adds to a product of x, in fragment order or else that of `positions`, to y [T, N]."""
    end = 0
    for each in pieces:
        first, end = end, end + len(each.ids)
        if (own := _matrices(each, at, role)) is not None:
            y[first:end] += own.of_rows(x[first:end], positions)
