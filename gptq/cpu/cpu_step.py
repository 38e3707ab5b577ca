"""A Stepper for Llama-family models on the processor: one compiled function from embedding to logits."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...core.chat import Step
from ...core.params import GenerationParams
from ..gptq_linear import GPTQLinear
from ..grammar_mask import GrammarMask
from ..llama import LlamaParts, parts_of
from ..stepper import Memory, Stepper
from . import cpu_kernels as k
from . import forward as f
from .cpu_linear import CpuLinear
from .cpu_memory import CpuMemory
from .cpu_weights import Weights, aligned, from_module
from .thread_team import Team
from .weight_table import table_of

CHUNK_TOKENS = 256  # of a prompt at once


def refusal(parts: LlamaParts) -> str:
    """Why this model cannot take this path; empty if it can."""
    if parts.device.type != "cpu":
        return "it is not on the processor"
    if parts.head_dim % 16:
        return f"its heads are {parts.head_dim} numbers wide, which 16 does not divide"
    return ""


def compiles() -> None:
    """Compile, and try a model of one layer on this processor, before weights are handed over. Raises if that fails."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=48, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    for weight in model.parameters():
        weight.data.normal_(0, 0.2, generator=generator)
    for owner, name in ((model.model.layers[0].self_attn, "q_proj"), (model.model.layers[0].mlp, "down_proj")):
        dense = getattr(owner, name)
        linear = GPTQLinear(dense.in_features, dense.out_features, 4, 32, bias=False)
        for words in (linear.qweight, linear.qzeros):
            words.data.random_(-(2**31), 2**31 - 1, generator=generator)
        linear.scales.data.uniform_(0.01, 0.03, generator=generator)
        setattr(owner, name, linear)
    ids = [7, 3, 9, 30, 1, 12]
    with torch.inference_mode():
        wanted = model(torch.tensor([ids])).logits[0, -1]
        parts = parts_of(model)
        assert parts is not None
        stepper = CpuStepper(parts, 16, 1)
        memory = stepper.begin()
        stepper.prefill(memory, ids[:-1])
        found = stepper.step(memory, ids[-1])[0]
        stepper.close()
    if not float((found - wanted).norm()) < 0.01 * float(wanted.norm()):
        raise RuntimeError("the compiled step gives other numbers than PyTorch on this processor")


@dataclass
class _Buffers:
    """What a forward writes into; h … act are there once for each thread if it is for a step of one token."""

    x: np.ndarray
    h: np.ndarray
    x8: np.ndarray
    x16: np.ndarray
    x_scales: np.ndarray
    x_sums: np.ndarray
    qkv: np.ndarray
    mixed: np.ndarray
    gate_up: np.ndarray
    act: np.ndarray


class CpuStepper(Stepper):
    kernel = "cpu"
    chunk_tokens = CHUNK_TOKENS

    def __init__(self, parts: LlamaParts, context_tokens: int, threads: int) -> None:
        self.device = torch.device("cpu")
        self.team = Team(threads)
        self._context_tokens = context_tokens
        self._embedding = parts.embedding.detach()
        self._shape = (len(parts.layers), parts.kv_heads, parts.head_dim)
        self.weights: list[Weights] = []
        rows: list[list[int]] = []
        layers = []
        for layer in parts.layers:
            at = [self._add(rows, group) for group in (layer.qkv, (layer.o,), layer.gate_up, (layer.down,))]
            q, key, value = at[0] if len(at[0]) == 3 else (at[0][0], -1, -1)
            gate, up = at[2] if len(at[2]) == 2 else (at[2][0], -1)
            layers.append([q, key, value, at[1][0], gate, up, at[3][0], layer.window])
        head = self._add(rows, (parts.head,))[0]
        self._layers = np.array(layers, np.int64)
        self._head_size = self.weights[head].outputs
        self._table, self._orders, self._biases = table_of(self.weights, rows)
        first = self.weights[layers[0][f.Q]]
        q_width, kv_width = parts.heads * parts.head_dim, parts.kv_heads * parts.head_dim
        fused = layers[0][f.K] < 0
        k_column = q_width if fused else first.tiles * 16
        v_column = k_column + (kv_width if fused else self.weights[layers[0][f.K]].tiles * 16)
        inner = self.weights[layers[0][f.DOWN]].inputs
        up_column = inner if layers[0][f.UP] < 0 else self.weights[layers[0][f.GATE]].tiles * 16
        has_norm = parts.layers[0].q_norm is not None
        self._sizes = np.array(
            [
                parts.heads, parts.kv_heads, parts.head_dim, parts.rotary_dim // 2, k_column, v_column, up_column, inner, head,
                int(has_norm),
            ],
            np.int64,
        )  # fmt: skip
        self._eps = np.float32(parts.eps)
        norms = [each for layer in parts.layers for each in (layer.input_norm, layer.post_norm)]
        self._norms = _stack([*norms, parts.norm])
        qk = [each for layer in parts.layers for each in (layer.q_norm, layer.k_norm) if each is not None]
        self._qk_norms = _stack(qk) if has_norm else np.zeros((1, 1), np.float32)
        cos, sin = parts.angles(-(-context_tokens // 16) * 16)
        self._cos, self._sin = cos.numpy(), sin.numpy()
        self._widths = {
            "x": _up(self._embedding.shape[1]),
            "qkv": max(v_column + _up(kv_width), _up(self._embedding.shape[1])),  # also what `down` gives
            "mixed": _up(q_width),
            "gate_up": max(up_column + _up(inner), _up(self._embedding.shape[1])),
            "act": _up(inner),
        }
        self._x_width = max((each.chunks * each.chunk_rows for each in self.weights), default=0)
        self._x_chunks = max((each.chunks for each in self.weights), default=0)
        self._inputs = 1 + max(slot for slot, _shared in rows)
        self._one = self._buffers(1, self.team.size)
        self._many: _Buffers | None = None
        self._scores = np.zeros((self.team.size, 4, 16), np.float32)
        self._logits = np.zeros((1 + self.team.size, max(self.weights[head].tiles * 16, self._widths["x"])), np.float32)

        self.prefill(self.begin(), [0])  # compiles what is not compiled, before the first answer waits for it

    def _add(self, rows: list[list[int]], modules: Sequence[nn.Module]) -> list[int]:
        """Take in modules that read the same input; returns their rows of the table."""
        found: list[int] = []
        for module in modules:
            weights = from_module(module, k.ISA, self.team)
            if isinstance(module, GPTQLinear):
                module.release(CpuLinear(weights, self.team))  # so that they are not held twice
            slot, shared = 0, 0
            for earlier in found:
                other = self.weights[earlier]
                if _rounds_alike(weights, other):
                    slot, shared = rows[earlier][0], 1
                    break
                slot = max(slot, rows[earlier][0] + 1)
            found.append(len(self.weights))
            self.weights.append(weights)
            rows.append([slot, shared])
        return found

    def _buffers(self, rows: int, copies: int) -> _Buffers:
        w = self._widths
        x8 = aligned((copies, self._inputs, rows * self._x_width * 2), np.int8)
        x16 = x8.view(np.int16)
        return _Buffers(
            x=aligned((rows, w["x"]), np.float32),
            h=aligned((copies, rows, w["x"]), np.float32),
            x8=x8,
            x16=x16,
            x_scales=aligned((copies, self._inputs, rows * self._x_chunks), np.float32),
            x_sums=aligned((copies, self._inputs, rows * self._x_chunks), np.int32),
            qkv=aligned((rows, w["qkv"]), np.float32),
            mixed=aligned((rows, w["mixed"]), np.float32),
            gate_up=aligned((rows, w["gate_up"]), np.float32),
            act=aligned((copies, rows, w["act"]), np.float32),
        )

    @property
    def size_bytes(self) -> int:
        """Of the weights in the kernels' layout."""
        return sum(each.size_bytes for each in self.weights)

    def begin(self) -> Memory:
        return CpuMemory(*self._shape, self._context_tokens)

    def prefill(self, memory: Memory, ids: Sequence[int]) -> Tensor:
        for at in range(0, len(ids), CHUNK_TOKENS):
            self._compute(memory, ids[at : at + CHUNK_TOKENS])
        return torch.from_numpy(self._logits[:1, : self._head_size])

    def draw(
        self,
        memory: Memory,
        logits: Tensor,
        ids: Sequence[int],
        params: GenerationParams,
        grammar_mask: GrammarMask | None = None,
    ) -> Generator[Step, None, None]:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # torch's own threads would spin on the cores that the next token needs
        try:
            yield from super().draw(memory, logits, ids, params, grammar_mask)
        finally:
            torch.set_num_threads(threads)

    def _compute(self, memory: Memory, ids: Sequence[int]) -> None:
        assert isinstance(memory, CpuMemory)
        rows = len(ids)
        memory.reserve(rows)
        if rows > 1 and self._many is None:
            self._many = self._buffers(CHUNK_TOKENS, 1)
        b = self._many if rows > 1 and self._many is not None else self._one
        if self._scores.shape[2] < memory.capacity:
            self._scores = np.zeros((self.team.size, 4, memory.capacity), np.float32)
        b.x[:rows, : self._embedding.shape[1]] = self._embedding[torch.tensor(list(ids))].float().numpy()
        self.team.run(
            10 * len(self._layers) + 1, f.forward, rows, memory.length, self._sizes, self._eps, self._table, self._layers,
            self._orders, self._biases, self._norms, self._qk_norms, self._cos, self._sin, memory.keys, memory.values,
            b.x, b.h, b.x8, b.x16, b.x_scales, b.x_sums, b.qkv, b.mixed, b.gate_up, b.act, self._scores, self._logits,
            self._one.x8, self._one.x16, self._one.x_scales, self._one.x_sums,
        )  # fmt: skip
        memory.grown(rows)

    def close(self) -> None:
        self.team.close()


def _up(count: int) -> int:
    return -(-count // 16) * 16


def _rounds_alike(a: Weights, b: Weights) -> bool:
    if not a.chunks or (a.chunks, a.chunk_rows) != (b.chunks, b.chunk_rows) or (a.order is None) != (b.order is None):
        return False
    return a.order is None or b.order is None or bool(np.array_equal(a.order, b.order))


def _stack(tensors: Sequence[Any]) -> np.ndarray:
    return torch.stack([each.detach().float() for each in tensors]).numpy()
