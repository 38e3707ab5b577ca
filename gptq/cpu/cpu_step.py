"""A Stepper for the described families on the CPU: one compiled function from embedding to logits."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor, nn

from ...core.errors import BadParameter
from ..answer_batch import MOST_ROWS, Batch, PromptReading
from ..drafting import Draft
from ..families.differences import OPTIONS
from ..families.parts import ModelParts, Norm
from ..gptq_linear import GPTQLinear
from ..lora import Part
from ..mlp_shapes import inputs
from ..patched_forward import ForwardPatch
from ..prefix_cache import PrefixCache
from ..reading_turns import Turns
from ..rope_length import RopeLength, border_of
from ..running import Running
from ..stepper import Memory, Reading, Stepper
from ..suitability import Limits, Shape, shape_of
from ..token_ids import require_known
from . import cpu_kernels as k
from . import forward_arguments as f
from .cpu_adapter import CpuAdapter
from .cpu_experts import described, rounded_room, with_room
from .cpu_latent import latent_of, latent_room
from .cpu_linear import CpuLinear
from .cpu_memory import CpuMemory
from .cpu_weights import Weights, from_module
from .expert_phases import PHASES_OF_EXPERTS
from .forward import PHASES_PER_LAYER, forward
from .forward_arguments import FORWARD, Arguments
from .model_tables import angles_of, columns_of, norms_of, qk_norms_of, row_of, sinks_of, temperatures_of, up
from .thread_team import Team
from .weight_room import WeightRoom, aligned
from .weight_table import tables_of

CHUNK_TOKENS = 256  # of a prompt at once …
_SMALL_CHUNK = 32  # … at least, while other answers wait for their next token
LEAST_ANSWERS, MOST_ANSWERS = 8, 64  # at once: more only if half of the free memory holds them all at full length
_ANY = -1  # in the place of a set of angles: a table of which some rows are filled for each forward


LIMITS = Limits(head_dim_step=16, length_dependent=True, options=frozenset(OPTIONS))


class CpuStepper(Stepper):
    kernel = "cpu"
    chunk_tokens = CHUNK_TOKENS
    all_in_turns = True
    can_adapt = True
    can_draft = True

    def __init__(self, parts: ModelParts, context_tokens: int, threads: int, parallel: int = 1, guesses: bool = True) -> None:
        """`guesses`: the next tokens are guessed, and computed beside the last ones.

        Raises Unsuited, and then leaves the model as it was.
        """
        self._shape = shape_of(parts, LIMITS)
        self.embedding_rows = self._shape.embedding_rows
        self.device = torch.device("cpu")
        self.parallel = min(parallel, MOST_ANSWERS)
        self._batch = Batch(self.rows_logits, context_tokens, self.embedding_rows, guesses)
        self._turns = Turns(lambda: self._batch.busy, lambda: CHUNK_TOKENS, _SMALL_CHUNK, _SMALL_CHUNK)
        self._sampling, self._torch_threads = 0, 0
        self._patch: ForwardPatch | None = None
        self.team = Team(threads)
        self._context_tokens = context_tokens
        self._parts_angles = parts.angles
        self._rope = RopeLength(parts.rotary)
        if self._rope.kind:  # a forward has one set of angles: rows of other texts may need others
            self.parallel, self.can_draft = 1, False
        self._embedding = parts.embedding.detach()
        self._head, self._norm, self._embedding_norm = parts.head, parts.norm, parts.embedding_norm
        self._learned = None if parts.positions is None else parts.positions.detach()
        self._options = parts.options
        self._head_dtype = next((each.dtype for each in parts.head.parameters() if each.is_floating_point()), torch.float32)
        self.weights: list[Weights] = []
        self._room = WeightRoom()
        # id of a layer's module -> (its row in the table of weights, the order of its outputs)
        self._rows_of: dict[int, tuple[int, Tensor | None]] = {}
        self._model = self._take_in(parts, self._shape, context_tokens)
        head = self.weights[self._model["head_row"]]
        self._head_size = head.outputs
        self._logits = np.zeros((MOST_ROWS, head.tiles * 16), np.float32)
        self._scores = np.zeros((self.team.size, 4, 16), np.float32)
        self._head_hidden = np.zeros((self.team.size, MOST_ROWS, self._model["hidden_width"]), np.float32)
        self._head_rounded = self._rounded(MOST_ROWS, self.team.size)
        self._lowered = np.zeros((CHUNK_TOKENS, f.MOST_WEIGHTS, 16), np.float32)
        of_experts = PHASES_OF_EXPERTS if self._experts["count"] else 0
        self._phases = (PHASES_PER_LAYER + of_experts) * self._model["layer_count"] + 1
        self._one = self._arguments(1, self.team.size)
        self._more: dict[int, Arguments] = {}  # by the rows that they have room for

        self.parallel = min(self.parallel, self._fitting())
        self.prefill(self.begin(), [0])  # compiles what is not compiled, before the first answer waits for it

    def _take_in(self, parts: ModelParts, shape: Shape, context_tokens: int) -> dict[str, Any]:
        """Build the kernels' weights from the model's modules. Returns the fields of FORWARD that describe the model."""
        buffers: list[tuple[int, int]] = []
        layers = [row_of(layer, partial(self._add, buffers)) for layer in parts.layers]
        mixtures = [at for at, layer in enumerate(parts.layers) if layer.experts is not None]
        for at, layer in enumerate(mixtures):
            layers[layer][f.MIXTURE] = at
        in_layers = dict(self._rows_of)
        head = self._add(buffers, (parts.head,))[0]
        self._rounded_buffers = 1 + max(buffer for buffer, _rounded_before in buffers)
        self._experts = described(parts, partial(self._add, buffers), self.weights)
        self._rows_of = in_layers
        hidden = up(shape.hidden)
        columns = [columns_of(row, shape, self.weights) for row in layers]
        starts, widths = np.stack([each for each, _width in columns]), [width for _starts, width in columns]
        for name, column in (("router_column", f.ROUTER), ("shared_gate_column", f.SHARED_GATE)):
            self._experts[name] = int(starts[mixtures[0], f.GATE_UP_PRODUCT, column - f.GATE]) if mixtures else 0
        self._latent = latent_of(parts, self.team)
        qk_norms, qk_norm_rows = qk_norms_of(parts)
        options = shape.options
        self._positions = up(context_tokens)
        # longer texts than the first set of angles is for have others, which `_turn` puts in their place
        first_set = min(self._positions, border_of(parts.rotary)) if self._rope.kind else self._positions
        cos, sin = angles_of(parts, first_set, self._positions)
        self._angles: dict[int, tuple[np.ndarray, ...]] = {0: (cos, sin)}
        bias = parts.position_bias(self._positions)
        kept_in_qkv = 0 if self._latent["rank"] else shape.kv_heads * shape.head_dim
        return {
            "layer_count": len(layers),
            "heads": shape.heads,
            "kv_heads": shape.kept_heads,
            "head_dim": shape.key_dim,
            "value_dim": shape.value_dim,
            "half_rotary": shape.rotary_half,
            "hidden_width": hidden,
            "head_row": head,
            "layer_norm": int(options.norm == "layer"),
            "norms_before": int(shape.norms_before),
            "norms_after": int(shape.norms_after),
            "parallel": int(options.parallel),
            "gated": int(options.gated),
            "activation": f.ACTIVATION_NUMBERS[options.activation],
            "gate_limit": options.gate_limit,
            "up_offset": options.up_offset,
            "qk_norm": f.QK_NORM_NUMBERS[options.qk_norm],
            "qk_norm_last": int(options.qk_norm_last),
            "score_scale": parts.score_scale,
            "score_cap": options.score_cap,
            "residual_scale": options.residual_scale,
            "logits_cap": options.logits_cap,
            "eps": shape.eps,
            "layers": np.array(layers, np.int64),
            "columns": starts,
            "norms": norms_of(parts, shape),
            "norm_width": shape.hidden,
            "qk_norms": qk_norms,
            "qk_norm_rows": qk_norm_rows,
            "cos": cos,
            "sin": sin,
            "angle_positions": self._positions,
            "bias": np.zeros((1, 1), np.float32) if bias is None else bias.cpu().contiguous().numpy(),
            "bias_positions": 0 if bias is None else self._positions,
            "sinks": sinks_of(parts),
            "has_sinks": int(parts.layers[0].sinks is not None),
            "temperatures": temperatures_of(parts, self._positions),
            "tables": tables_of(self.weights, buffers),
            "qkv_width": max(int(starts[0, f.QKV_PRODUCT, 2]) + up(kept_in_qkv), hidden),
            "attended_width": up(inputs(parts.layers[0].o)),
            "gate_up_width": max(*widths, hidden),
            "gated_width": up(max(shape.inner, self._latent["queries_rank"])),
        }

    def _add(self, buffers: list[tuple[int, int]], modules: Sequence[nn.Module], columns: Tensor | None = None) -> list[int]:
        """Take in modules that read the same input; returns their rows of the table of weights.

        `columns` int64 [outputs of all]: the order in which the step has their outputs, if it is not the modules' own.

        Adds the buffer that holds each one's rounded input, and whether a weight before it fills that buffer.
        """
        found: list[int] = []
        start = 0
        for module in modules:
            outputs = int(module.out_features)  # type: ignore[arg-type]
            mine = None if columns is None else columns[start : start + outputs] - start
            start += outputs
            weights = from_module(module, k.ISA, self.team, mine, self._room.zeros)
            if isinstance(module, GPTQLinear):
                module.release(CpuLinear(weights, self.team, mine))  # so that they are not held twice
            buffer, rounded_before = 0, 0
            for earlier in found:
                if _round_alike(weights, self.weights[earlier]):
                    buffer, rounded_before = buffers[earlier][0], 1
                    break
                buffer = max(buffer, buffers[earlier][0] + 1)
            found.append(len(self.weights))
            self._rows_of[id(module)] = len(self.weights), mine
            self.weights.append(weights)
            buffers.append((buffer, rounded_before))
        return found

    def _rounded(self, rows: int, owners: int) -> dict[str, Any]:
        """The record ROUNDED for inputs of up to `rows` rows."""
        return rounded_room(rows, owners, self._rounded_buffers, self.weights)

    def _arguments(self, rows: int, owners: int) -> Arguments:
        """For forwards of up to `rows` rows. Each of `owners` threads has its own inputs of the products."""
        model = self._model

        def floats(*shape: int) -> np.ndarray:
            return aligned(shape, np.float32)

        qkv, attended = floats(rows, model["qkv_width"]), floats(rows, model["attended_width"])
        latent = latent_room(self._latent, rows, model, qkv, attended)
        nothing = np.zeros(1, np.int64)  # these come with each call
        return Arguments(
            FORWARD,
            **model,
            experts=with_room(self._experts, rows, self.team.size, model["hidden_width"], self.weights),
            rows=rows,
            mixed=int(rows <= MOST_ROWS),
            positions=nothing,
            keys=nothing,
            values=nothing,
            capacities=nothing,
            adapted=0,
            row_adapters=nothing,
            no_adapter=np.zeros(f.ADAPTER_COLUMNS, np.int64),
            lowered=self._lowered,
            lowered_width=self._lowered.shape[2],
            x=floats(rows, model["hidden_width"]),
            hidden=floats(owners, rows, model["hidden_width"]),
            hidden_rows=rows,
            qkv=qkv,
            attended=attended,
            **latent,
            gate_up=floats(rows, model["gate_up_width"]),
            gated_rows=floats(owners, rows, model["gated_width"]),
            rounded=self._rounded(rows, owners),
            head_rounded=self._head_rounded,
            scores=self._scores,
            score_width=self._scores.shape[2],
            head_rows=1,
            head_limit=MOST_ROWS,
            head_hidden=self._head_hidden,
            logits=self._logits,
            logits_width=self._logits.shape[1],
        )

    @property
    def size_bytes(self) -> int:
        """Of the weights in the kernels' layout."""
        latent = sum(self._latent[name].nbytes for name in ("keys", "values"))
        return latent + sum(each.size_bytes for each in self.weights)

    def begin(self) -> CpuMemory:
        shape = self._shape
        return CpuMemory(shape.layers, shape.kept_heads, shape.key_dim, shape.value_dim, self._context_tokens)

    def adapter(self, parts: Sequence[tuple[Mapping[str, Part], float]]) -> CpuAdapter:
        return CpuAdapter(parts, self._rows_of, self.weights)

    def angles_of(self, tokens: int) -> int:
        return self._rope.of(tokens)

    def _turn(self, arguments: Arguments, start: int, rows: int, angles: int) -> None:
        """Give the forward the angles of its rows' positions."""
        if angles not in self._angles and self._rope.kind == "longrope":
            self._angles[angles] = tuple(each.numpy() for each in self._parts_angles(self._positions, of_set=angles))
        found = self._angles.get(angles)
        if found is None:  # a set of its own for each length: only these rows are filled
            if _ANY not in self._angles:
                self._angles[_ANY] = tuple(np.zeros_like(each) for each in self._angles[0])
            found = self._angles[_ANY]
            for table, part in zip(found, self._parts_angles(rows, start=start, of_set=angles), strict=True):
                table[0, start : start + rows] = part.numpy()
        cos, sin = found
        arguments.set(cos=cos, sin=sin)

    def prefill(self, memory: Memory, ids: Sequence[int]) -> Tensor:
        require_known(ids, self.embedding_rows)
        ids = self._rope.ready(memory, ids)
        for at in range(0, len(ids), CHUNK_TOKENS):
            self._compute([(memory, ids[at : at + CHUNK_TOKENS])])
        return torch.from_numpy(self._logits[:1, : self._head_size]).clone()  # others may compute before these are used

    def rows_logits(self, pieces: Sequence[tuple[Memory, Sequence[int]]]) -> Tensor:
        """Put each memory's ids through, up to MOST_ROWS in all -> logits of each id, in their order [rows, V].

        The next call overwrites them. Raises ValueError for more rows.
        """
        rows = sum(len(ids) for _memory, ids in pieces)
        for _memory, ids in pieces:
            require_known(ids, self.embedding_rows)
        if rows > MOST_ROWS:
            raise ValueError(f"{rows} rows were to be computed with their logits; at most {MOST_ROWS} can be.")
        self._compute(pieces, rows)
        return torch.from_numpy(self._logits[:rows, : self._head_size])

    def last_logits(self, memory: Memory, ids: Sequence[int], count: int) -> Tensor:
        if self._rope.kind or not 1 < count <= MOST_ROWS:
            return super().last_logits(memory, ids, count)
        if len(ids) > count:
            self.prefill(memory, ids[:-count])
        return self.rows_logits([(memory, ids[-count:])])

    def all_logits(self, memory: Memory, ids: Sequence[int]) -> Tensor:
        logits: Tensor = self._head(self.hidden(memory, ids).to(self._head_dtype)).float() * self._options.logits_scale
        cap = self._options.logits_cap
        return cap * torch.tanh(logits / cap) if cap else logits

    def hidden(self, memory: Memory, ids: Sequence[int]) -> Tensor:
        require_known(ids, self.embedding_rows)
        wanted, ids = len(ids), self._rope.ready(memory, ids)
        found = []
        for at in range(0, len(ids), CHUNK_TOKENS):
            rows = ids[at : at + CHUNK_TOKENS]
            x = self._compute([(memory, rows)])
            found.append(torch.from_numpy(x[: len(rows), : self._embedding.shape[1]].copy()))
        return self._normed(torch.cat(found)[-wanted:], self._norm)

    def _normed(self, x: Tensor, norm: Norm) -> Tensor:
        """fp32 [..., H], normed in PyTorch."""
        if self._options.norm == "layer":
            x = x - x.mean(-1, keepdim=True)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self._shape.eps) * norm.weight.float()
        return x if norm.bias is None else x + norm.bias.float()

    def _embedded(self, ids: list[int], positions: np.ndarray) -> Tensor:
        """What the first layer reads: fp32 [T, H]."""
        x = self._embedding[torch.tensor(ids)].float()
        if self._options.embedding_scale != 1:
            x *= self._options.embedding_scale
        if self._learned is not None:
            x += self._learned[torch.from_numpy(positions)].float()
        return x if self._embedding_norm is None else self._normed(x, self._embedding_norm)

    def running(self, memory: Memory, ids: Sequence[int]) -> Running:
        assert isinstance(memory, CpuMemory)
        return super().running(memory, ids) if self._rope.kind else self._batch.join(memory, ids)

    def draft_with(self, draft: Stepper, context_tokens: int) -> None:
        ids = min(self.embedding_rows or self._head_size, self._head_size)
        self._batch.draft = Draft(draft, context_tokens, ids)
        with torch.inference_mode():
            self._batch.draft.measure()

    def _fitting(self) -> int:
        """Answers at once, by what their conversations may take."""
        memory = self.begin()
        whole = max(1, memory.size_bytes * self._context_tokens // memory.capacity)
        return max(LEAST_ANSWERS, psutil.virtual_memory().available // 2 // whole)

    def reading(self, memory: Memory, tokens: int) -> Reading:
        return PromptReading(self._turns, partial(self.prefill, memory))

    @contextmanager
    def while_sampling(self) -> Iterator[None]:
        if not self._sampling:  # torch's own threads would spin on the cores that the next token needs
            self._torch_threads = torch.get_num_threads()
            torch.set_num_threads(1)
        self._sampling += 1
        try:
            yield
        finally:
            self._sampling -= 1
            if not self._sampling:
                torch.set_num_threads(self._torch_threads)

    @contextmanager
    def while_reading(self) -> Iterator[None]:
        threads = torch.get_num_threads()
        torch.set_num_threads(self._torch_threads if self._sampling else threads)
        try:
            yield
        finally:
            torch.set_num_threads(threads)

    def take_over(self, hf: Any, prefix: PrefixCache) -> None:
        self._patch = ForwardPatch(hf, self, prefix, self._context_tokens, own_loop=True)

    def _arguments_for(self, rows: int) -> Arguments:
        if rows == 1:
            return self._one
        limit = MOST_ROWS if rows <= MOST_ROWS else CHUNK_TOKENS
        if limit not in self._more:
            self._more[limit] = self._arguments(limit, 1)
        return self._more[limit]

    def _compute(self, pieces: Sequence[tuple[Memory, Sequence[int]]], head_rows: int = 1) -> np.ndarray:
        """Put each memory's ids through; only few rows may be of several memories. Returns x [rows, …] before the last norm."""
        ids = [id for _memory, own in pieces for id in own]
        rows, capacity = len(ids), 0
        table = np.empty((5, rows), np.int64)  # positions, addresses of keys and of values, capacities, addresses of adapters
        at = 0
        for memory, own in pieces:
            assert isinstance(memory, CpuMemory)
            if memory.length + len(own) > self._positions:
                raise BadParameter(
                    f"The conversation would have {memory.length + len(own)} tokens; the model is loaded for "
                    f"{self._context_tokens}. Shorten it, or load the model with a longer context."
                )
            if self._shape.positions and memory.length + len(own) > self._shape.positions:
                raise BadParameter(
                    f"The conversation would have {memory.length + len(own)} tokens; the model has positions for "
                    f"{self._shape.positions}. Shorten it."
                )
            memory.reserve(len(own))
            capacity = max(capacity, memory.capacity)
            mine = table[:, at : at + len(own)]
            mine[0] = np.arange(memory.length, memory.length + len(own))
            mine[1], mine[2], mine[3] = memory.keys.ctypes.data, memory.values.ctypes.data, memory.capacity
            mine[4] = memory.adapter.address if memory.adapter is not None else 0
            at += len(own)
        arguments = self._arguments_for(rows)
        needed = max(capacity, up(self._model["head_dim"]))  # a head's key is rotated there too
        if self._scores.shape[2] < needed:
            self._scores = np.zeros((self.team.size, 4, needed), np.float32)
        width = max((memory.adapter.rank for memory, _own in pieces if memory.adapter is not None), default=0)
        if width > self._lowered.shape[2]:
            self._lowered = np.zeros((CHUNK_TOKENS, f.MOST_WEIGHTS, width), np.float32)
        if self._rope.kind:
            ((memory, own),) = pieces
            self._turn(arguments, memory.length, rows, memory.angles)
        x: np.ndarray = arguments.kept["x"]
        x[:rows, : self._embedding.shape[1]] = self._embedded(ids, table[0]).numpy()
        arguments.set(
            rows=rows,
            positions=table[0],
            keys=table[1],
            values=table[2],
            capacities=table[3],
            adapted=int(width > 0),
            row_adapters=table[4],
            lowered=self._lowered,
            lowered_width=self._lowered.shape[2],
            scores=self._scores,
            score_width=self._scores.shape[2],
            head_rows=head_rows,
        )
        self.team.run(self._phases, forward, arguments.array)
        for memory, own in pieces:
            assert isinstance(memory, CpuMemory)
            memory.grown(len(own))
        return x

    def close(self) -> None:
        if self._patch is not None:
            self._patch.release()
            self._patch = None
        if self._batch.draft is not None:
            self._batch.draft.close()
            self._batch.draft = None
        self.team.close()


def _round_alike(a: Weights, b: Weights) -> bool:
    if not a.chunks or (a.chunks, a.chunk_rows) != (b.chunks, b.chunk_rows) or (a.order is None) != (b.order is None):
        return False
    return a.order is None or b.order is None or bool(np.array_equal(a.order, b.order))
