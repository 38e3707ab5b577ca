"""One token of a Llama-family model on an NVIDIA card: five kernels a layer, recorded once as a CUDA graph.

    qkv        norm, product, bias
    attention  norm of heads, rotary, keys and values written, attention; output in the next input's order
    o          product, added to the residual; the sum once more in the next input's order
    gate, up   norm, product, SiLU(gate) * up, in the next input's order
    down       as o

Every kernel begins while the one ahead still runs and asks for its first weights before it waits. Prompts are
read in prompt.py; several conversations at once are computed in rows.py.
"""

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..llama import LlamaParts
from . import gemv, small_batch
from .attention import AttentionWork, attend
from .cuda_kernels import Cache, Embed, GemvVariant, Gpu, Head, Sample, pointer
from .cuda_layers import Layer, products, require, take
from .cuda_weights import Weight, shape_of
from .gemv import Tuning
from .kv_pages import PAGE_TOKENS, PagedMemory, Pages
from .nvrtc import OwnStream
from .prompt import Prompt

log = logging.getLogger(__name__)

HOST_TOKENS = 64  # tokens that the card tells ahead of being asked (sample.cu)


class CudaStep:
    """A model's weights, and the buffers of one token. Not thread-safe: one thread uses it.

    With `q8` the keys and values of conversations are kept in a byte each.
    What draws tokens (`params` to `told`) has `slots` rows, since rows.py computes several conversations;
    the step of one token uses row 0. `table` has one row more, which is the prompts' (`prompt_row`).
    """

    def __init__(
        self,
        parts: LlamaParts,
        context_tokens: int,
        *,
        parallel: int = 1,
        q8: bool = False,
        gpu: Gpu | None = None,
        tunings: dict[str, Tuning] | None = None,
        progress: Callable[[float], None] = lambda share: None,
    ) -> None:
        """Takes the packed tensors out of `parts` layer by layer, so that the card never holds both forms of
        a model. Raises Unsuited (before anything is taken) or NoCompiler."""
        self.device = parts.device
        self.context_tokens = context_tokens
        self.parallel, self.prompt_row = parallel, parallel
        require(parts)
        self.gpu, self._own_gpu = gpu or Gpu(self.device), gpu is None
        self.heads, self.kv_heads, self.head_dim = parts.heads, parts.kv_heads, parts.head_dim
        self.cache = Cache(self.head_dim, q8)
        self.eps = float(parts.eps)
        self.hidden = parts.embedding.shape[1]
        self.head: Tensor = parts.head.weight.data  # type: ignore[assignment]
        self.vocabulary = int(self.head.shape[0])
        self.tunings = {**_TUNINGS, **(tunings or {})}
        shapes = [tuple(shape_of(each) for each in products(layer)) for layer in parts.layers]
        several = small_batch.every_variant(self.gpu, [pair for four in shapes for pair in zip(four, EPILOGUES, strict=True)])
        self.gpu.add(several, {each for four in shapes for each in four}, [self.cache], fixed=True)
        self.embedding = parts.embedding.data
        self.final_norm = parts.norm.data.half().contiguous()
        self.cosines, self.sines = parts.angles(context_tokens)
        self.rotary_half = parts.rotary_dim // 2
        self.layers: list[Layer] = []
        for at, (layer, four) in enumerate(zip(parts.layers, shapes, strict=True)):
            self.layers.append(take(self.gpu, layer, four))
            progress((at + 1) / len(parts.layers))
        self.pages = Pages(self.device, len(self.layers), self.kv_heads, self.cache)
        self._buffers()
        with torch.cuda.device(self.device):
            self._own_stream = OwnStream()
        self._recording = torch.cuda.ExternalStream(self._own_stream.handle.value, device=self.device)
        self.tune({})
        self.prompt = Prompt(self)
        self._table_pages: list[list[int]] = [[] for _ in range(parallel + 1)]

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
        self.prompt_x = zeros(self.hidden)
        self.prompt_logits = zeros(1, self.vocabulary, of=torch.float32)
        self.logits = zeros(self.parallel, self.vocabulary, of=torch.float32)
        self.max_pages = -(-self.context_tokens // PAGE_TOKENS) + 1
        self.table = zeros(self.parallel + 1, self.max_pages, of=torch.int64)
        self.group_blocks = -(-(self.heads // self.kv_heads) // 8)
        self.attention_work = AttentionWork(self, 1)
        # sampling
        self.ids = zeros(self.parallel, of=torch.int32)
        self.positions = zeros(self.parallel, of=torch.int32)
        self.params = zeros(self.parallel, 12, of=torch.float32)
        self.bias = zeros(self.parallel, self.vocabulary, of=torch.float32)
        self.seen = zeros(self.parallel, self.vocabulary, of=torch.int16)
        self.answered = zeros(self.parallel, self.vocabulary, of=torch.int16)
        self.history = zeros(self.parallel, self.context_tokens, of=torch.int32)
        self.answer_from = zeros(self.parallel, of=torch.int32)
        self.work = zeros(self.parallel, self.vocabulary, of=torch.float32)
        self.host_tokens = torch.zeros(self.parallel, HOST_TOKENS, dtype=torch.int32, pin_memory=True)

    def _variants(self, layer: Layer) -> list[GemvVariant]:
        return [self._gemv_plan(weight, role)[0] for weight, role in zip(layer.weights, _ROLES, strict=True)]

    def _gemv_plan(self, weight: Weight, role: str) -> tuple[GemvVariant, Tuning]:
        tuning = self.tunings[role]
        return gemv.variant(weight, EPILOGUES[_ROLES.index(role)], role in ("qkv", "gate_up"), tuning), tuning

    def tune(self, tunings: dict[str, Tuning]) -> None:
        """Spread the products in another way."""
        self.tunings = {**self.tunings, **tunings}
        self.gpu.add(variants={each for layer in self.layers for each in self._variants(layer)})
        self._graphs: dict[bool, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()  # torch lets go of one with its last graph

    # -- one token -------------------------------------------------------------------------------------------------

    def _gemv(
        self, role: str, weight: Weight, x: Tensor, out: Tensor, norm: Tensor | None = None, permutation: Tensor | None = None
    ) -> None:
        plan, tuning = self._gemv_plan(weight, role)
        residual = self.residual if permutation is not None else None
        gemv.launch(
            self.gpu, weight, plan, tuning.blocks_per_processor, x, out,
            norm=norm, residual=residual, permutation=permutation, eps=self.eps, overlap=True,
        )  # fmt: skip

    def embed(self, residual: Tensor, x: Tensor, rows: int = 1) -> None:
        """The embeddings of `ids` -> residual [rows, H] and x [rows, padded] in the first layer's order."""
        arguments = Embed(
            pointer(self.embedding),
            pointer(self.ids),
            pointer(residual),
            pointer(x),
            pointer(self.layers[0].qkv.permutation),
            self.hidden,
            x.shape[-1],
        )
        self.gpu.run("embed", (-(-self.hidden // 256), rows), 256, arguments, overlap=True)

    def _head(self, x: Tensor, logits: Tensor) -> None:
        arguments = Head(
            pointer(self.head),
            pointer(x),
            pointer(self.final_norm),
            pointer(logits),
            self.vocabulary,
            self.hidden,
            self.eps,
        )
        blocks = min(-(-self.vocabulary // 16), 4 * self.gpu.processors)
        self.gpu.run("head", (blocks,), 256, arguments, self.hidden * 2 + 160, overlap=True)

    def sample(self, first: int = 0, rows: int = 1) -> None:
        """From `logits` of some rows to their next tokens in `ids`, with their `params`."""
        arguments = Sample(
            pointer(self.logits[first]),
            pointer(self.params[first]),
            pointer(self.bias[first]),
            pointer(self.seen[first]),
            pointer(self.answered[first]),
            pointer(self.history[first]),
            pointer(self.answer_from[first]),
            pointer(self.work[first]),
            pointer(self.ids[first]),
            pointer(self.positions[first]),
            self.host_tokens[first].data_ptr(),
            self.vocabulary,
            self.context_tokens,
        )
        self.gpu.run("sample", (rows,), 1024, arguments, overlap=True)

    def forward(self) -> None:
        """From `ids` at `positions` to `logits`, on the current stream."""
        self.embed(self.residual, self.x)
        for at, layer in enumerate(self.layers):
            self._gemv("qkv", layer.qkv, self.x, self.qkv, layer.input_norm)
            attend(self, at, layer, self.qkv, self.attended, self.attention_work)
            self._gemv("o", layer.o, self.attended, self.x_mlp, permutation=layer.gate_up.permutation)
            self._gemv("gate_up", layer.gate_up, self.x_mlp, self.inner, layer.post_norm)
            last = at + 1 == len(self.layers)
            permutation = self.identity if last else self.layers[at + 1].qkv.permutation
            self._gemv("down", layer.down, self.inner, self.x_head if last else self.x, permutation=permutation)
        self._head(self.x_head, self.logits)

    def step(self, sample: bool = True) -> None:
        """Compute the token in `ids` and choose the next one, or leave it at `logits`. Recorded at the first call."""
        graph = self._graphs.get(sample)
        if graph is None:

            def run() -> None:
                self.forward()
                if sample:
                    self.sample()

            graph = self._graphs[sample] = self.record(run)
        graph.replay()

    def record(self, run: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """What `run` launches, as a graph. All share one stream and one pool of memory: cuBLAS keeps a workspace for each
        stream it has seen, and no two graphs run at once."""
        stream = self._recording
        stream.wait_stream(torch.cuda.current_stream(self.device))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            run()
        return graph

    # -- prompts ---------------------------------------------------------------------------------------------------

    def prefill(self, ids: Sequence[int], start: int, row: int = 0) -> Tensor:
        """Compute tokens that follow `start` tokens in the pages of a row -> fp32 [T, H], before the last norm.

        `prompt_logits` are those of the last token.
        """
        h = self.prompt.read(ids, start, self.table[row])
        self.prompt_x.copy_(h[-1].clamp(-65504, 65504))
        self._head(self.prompt_x, self.prompt_logits)
        return h

    def all_logits(self, h: Tensor) -> Tensor:
        """What `prefill` returned -> fp32 [T, V]."""
        x = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps) * self.final_norm.float()
        return (x.half() @ self.head.T).float()

    # -- conversations ---------------------------------------------------------------------------------------------

    def use(self, memory: PagedMemory, tokens: int, row: int = 0) -> None:
        """Make `memory` the one that a row reads and writes, with pages for that many tokens. Raises torch.OutOfMemoryError."""
        memory.reserve(tokens)
        pages, host_tokens = memory.pages, self._table_pages[row]
        if pages == host_tokens:
            return
        same = len(host_tokens) if pages[: len(host_tokens)] == host_tokens else 0
        self.table[row, same : len(pages)] = torch.tensor(pages[same:], dtype=torch.int64).to(self.device)
        self._table_pages[row] = list(pages)

    def move(self, source: int, target: int) -> None:
        """Let the conversation of one row go on in another."""
        for each in (self.params, self.bias, self.seen, self.answered, self.history, self.table):
            each[target].copy_(each[source])
        for each in (self.ids, self.positions, self.answer_from):
            each[target : target + 1].copy_(each[source : source + 1])
        self._table_pages[target] = self._table_pages[source]
        self._table_pages[source] = []

    def close(self) -> None:
        self._graphs.clear()
        self.pages.clear()
        self.layers.clear()
        torch.cuda.synchronize(self.device)
        self._own_stream.close()
        if self._own_gpu:
            self.gpu.close()


_ROLES = ("qkv", "o", "gate_up", "down")
EPILOGUES = ("PLAIN", "RESIDUAL", "SILU", "RESIDUAL")
_TUNINGS = {  # the best together of 240 on an H200, and better than the best one by one on an H100 (NOTES.md)
    "qkv": Tuning(4, 4, 3, 1, 4),
    "o": Tuning(8, 4, 3, 1, 2),
    "gate_up": Tuning(8, 4, 4, 1, 2),
    "down": Tuning(16, 2, 3, 1, 2),
}
