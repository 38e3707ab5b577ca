"""The next token of several sequences in one step: row i of the buffers is the i-th sequence.

2 to 8 rows take five kernels a layer, as one does (octet_step.py), and up to 16 on Hopper and newer (cluster_step.py). More
take seven: norms are kernels of their own, and products are those of small_batch.cu. The weights are read once for all rows. A
graph is recorded for each of some numbers of rows (`ROWS`), one for short rows (attention.py) and one for others, when it first
occurs; rows beyond those that are wanted are idle (sequences.py).
"""

import torch
from torch import Tensor

from . import small_batch
from .attention import AttentionWork, attend, is_short
from .buffers import Buffers
from .cluster_step import ClusterStep
from .cuda_layers import ModelWeights
from .gpu_kernels import Gpu
from .graphs import GraphRecorder
from .model_shape import ModelShape
from .octet_step import OctetStep
from .row_kernels import embed, has_head_rows, head_rows, norm_rows
from .sample import sample
from .sequences import Sequences

ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)  # that graphs are recorded for
MOST_ROWS = ROWS[-1]


def rows_of_graph(rows: int) -> int:
    """The fewest rows of a graph that computes the first `rows`. Raises ValueError for more than any has."""
    if rows > MOST_ROWS:
        raise ValueError(f"{rows} rows were to be computed at once; at most {MOST_ROWS} can be.")
    return next(each for each in ROWS if each >= rows)


class BatchStep:
    """Up to `sequences.rows` sequences of one model."""

    def __init__(
        self,
        gpu: Gpu,
        shape: ModelShape,
        weights: ModelWeights,
        sequences: Sequences,
        recorder: GraphRecorder,
        octet: OctetStep,
        clusters: ClusterStep,
    ) -> None:
        self._gpu, self._shape, self._weights, self._sequences, self._recorder = gpu, shape, weights, sequences, recorder
        self._octet, self._clusters = octet, clusters
        self._graphs: dict[tuple[int, bool, bool], torch.cuda.CUDAGraph] = {}
        self._buffers = Buffers.of(shape, weights.layers[0], sequences.rows)
        self._work = AttentionWork(gpu, shape, sequences.rows)

    def step(self, rows: int, sample_next: bool = True) -> None:
        """Compute the tokens in `ids` of the first rows and choose the next ones, or leave them at `logits`."""
        rows = min(rows_of_graph(rows), self._sequences.rows)
        short = is_short(self._gpu, self._shape, self._sequences, rows)
        graph = self._graphs.get((rows, sample_next, short))
        if graph is None:
            self.warm()

            def run() -> None:
                self.forward(rows, short=short)
                if sample_next:
                    sample(self._gpu, self._sequences, 0, rows)

            graph = self._graphs[rows, sample_next, short] = self._recorder.record(run)
        graph.replay()

    def warm(self) -> None:
        """Before a recording: cuBLAS makes its handle outside of one."""
        self._head(1)

    def forward(self, rows: int, work: AttentionWork | None = None, short: bool = False) -> None:
        """From `ids` at `positions` to `logits` of the first rows, on the current stream. `work`: of rows of one sequence;
        `short` as for attention.py."""
        gpu, weights, work = self._gpu, self._weights, work or self._work
        here = self._buffers.first(rows)
        embed(gpu, weights.embedding, self._sequences.ids, weights.layers[0].qkv.permutation, here.residual, here.x)
        if self._octet.plans(rows) is not None:
            self._octet.forward(rows, here, work, short)
            if has_head_rows(gpu, rows, self._shape.hidden):
                head_rows(gpu, weights.head, here.x_head, weights.final_norm, self._sequences.logits[:rows], self._shape.eps)
                return
        elif self._clusters.whole(rows):
            self._clusters.forward(rows, here, work, short)
        else:
            self._many(here, work, short)
        norm_rows(gpu, here.residual, weights.final_norm, weights.identity, here.x_head, self._shape.eps)
        self._head(rows)

    def _many(self, here: Buffers, work: AttentionWork, short: bool) -> None:
        gpu, shape, weights, sequences, eps = self._gpu, self._shape, self._weights, self._sequences, self._shape.eps
        for at, layer in enumerate(weights.layers):
            norm_rows(gpu, here.residual, layer.input_norm, layer.qkv.order, here.x, eps)
            self._clusters.multiply(at, "qkv", here.x, here.qkv)
            attend(gpu, shape, weights, at, sequences, work, qkv=here.qkv, out=here.attended, short=short)
            self._clusters.multiply(at, "o", here.attended, here.residual)
            norm_rows(gpu, here.residual, layer.post_norm, layer.gate_up.order, here.x_mlp, eps)
            small_batch.multiply(gpu, layer.gate_up, "SILU", here.x_mlp, here.inner)
            self._clusters.multiply(at, "down", here.inner, here.residual)

    def _head(self, rows: int) -> None:
        self._sequences.logits[:rows] = head_product(self._buffers.x_head[:rows], self._weights.head)

    def close(self) -> None:
        self._graphs.clear()


def head_product(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T of halves, [T, N]; fp32 where torch can leave the sums so."""
    if hasattr(torch.ops.aten.mm, "dtype"):
        return torch.mm(x, weight.T, out_dtype=torch.float32)
    return (x @ weight.T).float()
