"""All layers of one token by one kernel (whole_token.cu), a block on every processor of the GPU."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..suitability import Unsuited
from . import kernel_arguments
from .buffers import Buffers
from .cuda_driver import HOPPER
from .cuda_layers import ROLES, ModelWeights
from .gpu_kernels import Gpu
from .kernel_arguments import CHUNK, TILE, Arguments
from .kernel_source import Packing
from .model_shape import ModelShape
from .sequences import Sequences

WHOLE_TOKEN = Arguments(
    "WholeTokenArguments",
    """
    const u64* table       // [layers][TOKEN_LAYER]: addresses, see _LAYER
    u32* counters          // [512], zero between launches
    float* residual        // fp32 [hidden]: the embedding
    u16* x                 // fp16 [hidden], input of qkv: the first one in, the others between layers
    u32* x_given           // tagged: input of qkv between layers
    void* qkv              // fp16, tagged: with a tag each, as the next four
    void* part_out         // [parts][heads * D], in the order of o's input
    float* part_weights    // [parts][heads][4]: highest score, sum of weights; tagged: with a tag behind each
    void* x_mlp
    void* inner
    u16* x_head            // fp16 [hidden]: what comes out
    const u64* pages       // [max_pages]
    const int* positions   // [1]
    const float* cosines   // [context][rotary_half]
    const float* sines
    u64* trace             // [blocks][layers][20], TRACED only
    u64 layer_bytes        // of a layer in a page
    int layers
    int rotary_half
    float eps
    float scale            // of scores, for powers of two
    """,
)
_LAYER = (
    *(f"{role}_{part}" for role in ROLES for part in ("words", "scales")),
    "input_norm", "post_norm", "place_heads", "place_o", "place_down", "heads_of", "q_norm", "k_norm", "bias", "window",
)  # fmt: skip
_FILES = ("unpack.cu", "staged_input.cu", "digits.cu", "copy_engine.cu", "attention.cu", "whole_token.cu")
_STATIC_BYTES = 7168  # of a block, besides what it asks for and the ring's barriers


@dataclass(frozen=True)
class WholeTokenVariant:
    """How the layers of a model are spread over a GPU."""

    packing: Packing
    blocks: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    warps: int = 16
    batch: int = 8  # chunks that travel together
    stages: int = 5
    splits: tuple[int, int, int, int] = (16, 8, 8, 8)  # warps that share a tile, by role
    kind: int = 0  # 0: blocks meet by a counter, 1: by flags, 2: numbers have tags
    least: int = 8  # times 16 tokens: of a part of the keys
    options: int = 0

    @property
    def name(self) -> str:
        numbers = "_".join(map(str, (self.blocks, self.warps, self.batch, self.stages, *self.splits, self.kind, self.least)))
        return f"whole_token_{self.packing.name}_{numbers}_{self.options}"

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def products(self) -> tuple[tuple[int, int], ...]:
        """Outputs and inputs, by role."""
        attended = self.heads * self.head_dim
        qkv = attended + 2 * self.kv_heads * self.head_dim
        return (qkv, self.hidden), (self.hidden, attended), (2 * self.inner, self.hidden), (self.hidden, self.inner)

    @property
    def shared_bytes(self) -> int:
        slot = self.batch * 128 * self.packing.bits + self.batch // 2 * self.packing.scale_bytes
        widest = max(self.hidden, self.heads * self.head_dim, self.inner)
        x = max(widest * 2 + widest // (2 * CHUNK) * 32, self.warps * self.heads // self.kv_heads * self.head_dim * 4)
        tiles = [-(-n // TILE // self.blocks) for n, _k in self.products]  # of a block
        sums = max(each * split for each, split in zip(tiles, self.splits, strict=True)) * TILE * 4
        return self.warps * self.stages * slot + x + sums + self.layers * len(_LAYER) * 8

    def checked(self, gpu: Gpu) -> "WholeTokenVariant":
        """The same. Raises Unsuited if the kernel cannot compute it."""
        group = self.heads // self.kv_heads
        if gpu.capability != HOPPER or self.shared_bytes + self.warps * self.stages * 8 + _STATIC_BYTES > gpu.shared_limit_bytes:
            raise Unsuited("a GPU that has no room for all layers in one kernel")
        if (
            any(n % TILE or k % (2 * CHUNK) for n, k in self.products)
            or group not in (1, 2, 4)
            or self.blocks // self.kv_heads < 4
        ):
            raise Unsuited("a shape that one kernel for all layers does not take")
        return self

    def source(self) -> str:
        """CUDA C of its kernel."""
        here = Path(__file__).resolve().parent
        defines = (
            "".join(f"#define TOKEN_{name.upper()} {at}\n" for at, name in enumerate(_LAYER))
            + f"#define TOKEN_LAYER {len(_LAYER)}\n"
        )
        text = [(here / "common.cu").read_text(encoding="utf-8"), kernel_arguments.c_text(), WHOLE_TOKEN.c_text, defines]
        text += [(here / name).read_text(encoding="utf-8") for name in _FILES]
        sizes = f"{self.warps}, {self.blocks}, {self.hidden}, {self.inner}, {self.heads}, {self.kv_heads}, {self.head_dim}"
        shape = f"TokenShape<{sizes}, {', '.join(map(str, self.splits))}>"
        sym = str(self.packing.sym).lower()
        numbers = f"{shape}, {self.kind}, {self.least}, {self.options}"
        call = f"whole_token<{self.packing.bits}, {sym}, {self.batch}, {self.stages}, {numbers}>"
        bounds = f"__launch_bounds__({self.threads}, 1)"
        text.append(f'extern "C" __global__ void {bounds} {self.name}(WholeTokenArguments p) {{ {call}(p); }}\n')
        return "".join(text)


class WholeToken:
    """The layers of a model for the token of row 0."""

    def __init__(self, gpu: Gpu, shape: ModelShape, weights: ModelWeights, sequences: Sequences, here: Buffers) -> None:
        """Raises Unsuited if the model or the GPU has not what the kernel needs."""
        first = weights.layers[0]
        if len({each.packing for layer in weights.layers for each in layer.weights}) > 1 or shape.kv.q8:
            raise Unsuited("layers of several formats")
        for layer in weights.layers:
            for each in layer.weights:
                if not each.lasting or each.groups * 2 != each.chunks or each.packing.bits == 8:
                    raise Unsuited("scales that do not last for two chunks")
                if each.bias is not None and each is not layer.qkv:
                    raise Unsuited("a bias that is not of qkv")
        self._gpu, self._shape, self._weights, self._sequences, self._here = gpu, shape, weights, sequences, here
        self.variant = WholeTokenVariant(
            first.qkv.packing, gpu.processors, shape.hidden, first.down.in_features, shape.heads, shape.kv_heads, shape.head_dim,
            len(weights.layers),
        )  # fmt: skip
        self._heads_of = [self._heads(each.o.order) for each in weights.layers]
        self._table = torch.tensor([self._row(at) for at in range(len(weights.layers))], dtype=torch.int64, device=gpu.device)
        self._counters = torch.zeros(512, dtype=torch.int32, device=gpu.device)
        attended = shape.heads * shape.head_dim
        self._part_weights = torch.zeros(16 * shape.heads * 4, dtype=torch.float32, device=gpu.device)
        sizes = {"x_given": shape.hidden, "qkv": shape.qkv_width, "x_mlp": shape.hidden, "inner": first.down.in_features}
        sizes["part_out"] = 16 * attended
        self._given = {name: torch.zeros(size, dtype=torch.int32, device=gpu.device) for name, size in sizes.items()}
        self.trace: Tensor | None = None
        self.overlap = False  # begin while the kernel before ends, and trust that all blocks fit

    def _heads(self, order: Tensor) -> Tensor:
        return (order.clamp(min=0) // self._shape.head_dim).to(torch.uint8)

    def _row(self, at: int) -> list[int]:
        layer, layers = self._weights.layers[at], self._weights.layers
        down = self._weights.identity if at + 1 == len(layers) else layers[at + 1].qkv.permutation
        tensors = [
            *(tensor for each in layer.weights for tensor in (each.words, each.scales)),
            layer.input_norm, layer.post_norm, layer.o.permutation, layer.gate_up.permutation, down, self._heads_of[at],
            layer.q_norm, layer.k_norm, layer.qkv.bias,
        ]  # fmt: skip
        return [*(0 if each is None else each.data_ptr() for each in tensors), layer.window]

    def use(self, **changes: object) -> None:
        """Compile a variant. Raises Unsuited or NoCompiler."""
        variant = replace(self.variant, **changes)  # type: ignore[arg-type]
        variant.checked(self._gpu)
        self._gpu.add_texts([variant.source()])
        self.variant = variant

    def given(self, name: str) -> Tensor:
        """fp16: what the last layer wrote for others."""
        words = self._given[name]
        return words.view(torch.float16)[::2] if self.variant.kind == 2 else words.view(torch.float16)[: words.numel()]

    def launch(self) -> None:
        """From the embedding in `residual` and `x` to `x_head`."""
        shape, here, weights, sequences = self._shape, self._here, self._weights, self._sequences
        arguments = WHOLE_TOKEN.pack(
            table=self._table, counters=self._counters, residual=here.residual, x=here.x,
            part_weights=self._part_weights, x_head=here.x_head, **self._given,
            pages=sequences.table, positions=sequences.positions, cosines=weights.cosines, sines=weights.sines, trace=self.trace,
            layer_bytes=shape.kv_layer_bytes, layers=len(weights.layers), rotary_half=shape.rotary_half, eps=shape.eps,
            scale=1.4426950408889634 / shape.head_dim**0.5,
        )  # fmt: skip
        one = self.variant
        self._gpu.run(one.name, (one.blocks,), one.threads, arguments, one.shared_bytes, self.overlap, not self.overlap)
