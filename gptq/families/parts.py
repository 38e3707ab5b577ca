"""What an architecture is made of, as data: the tensors, and the options in which architectures differ.

The fast steps (cuda/, cpu/) compute the whole forward themselves from these parts. A family's file reads them off the modules
of transformers; suitability.py compares them with each other and with what a step can compute. With x the residual:

    x = embedding * embedding_scale + positions, normed by embedding_norm
    every layer:  x += residual_scale * attended_norm(o(attention(attention_norm(x))))
                  x += residual_scale * inner_norm(mlp(mlp_norm(x)))
    mlp(y) = down(act(gate(y)) * up(y)); in a layer with experts the weighted sum of those of the chosen experts, and a shared one
    logits = cap(head(norm(x)) * logits_scale)

A norm that is None does nothing. In parallel blocks both branches read the x that the layer began with.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..gptq_linear import GPTQLinear
from ..rope_length import kind_of, tables

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "gelu_quick", "relu", "relu2")  # gelu: with erf


@dataclass(frozen=True)
class Norm:
    """RMSNorm, or LayerNorm (which takes the mean off first). Of which kind, `Options` says."""

    weight: Tensor  # [width]; of the heads: [D], or [heads, D] where each has its own. What is multiplied: 1 is added already
    bias: Tensor | None
    eps: float


@dataclass(frozen=True)
class Rotary:
    module: nn.Module  # transformers' own: (x, positions, *arguments) -> cos, sin
    arguments: tuple[str, ...] = ()
    doubled: bool = False  # each angle twice in a row; else all angles, then all again


@dataclass(frozen=True)
class Alibi:
    """Adds slope × (position of the key) to the scores of a head, after they were scaled."""

    slopes: Tensor  # [heads]
    rounded: bool = False  # to bfloat16, before scores are scaled (Falcon)

    def table(self, positions: int, score_scale: float) -> Tensor:
        """fp32 [heads, positions], what is added to the scaled scores of a key."""
        at = torch.arange(positions, device=self.slopes.device)
        if self.rounded:
            return (self.slopes.bfloat16()[:, None] * at).float() * score_scale
        return self.slopes.float()[:, None] * at


@dataclass(frozen=True)
class Temperature:
    """Multiplies the queries of the layers that are `tempered` by 1 + rate * log(1 + floor((position + first) / step))."""

    rate: float
    step: float
    first: int = 0

    def table(self, positions: int) -> Tensor:
        """fp32 [positions]"""
        at = torch.arange(positions, dtype=torch.float32)
        return torch.log1p(torch.floor((at + self.first) / self.step)) * self.rate + 1

    @property
    def is_sound(self) -> bool:
        return math.isfinite(self.rate) and math.isfinite(self.step) and self.step > 0 and self.first >= 0


@dataclass(frozen=True)
class Options:
    """In what families differ, but for what the tensors themselves show. The defaults are Llama's."""

    norm: str = "rms"  # every norm: rms, or layer (LayerNorm)
    activation: str = "silu"  # one of ACTIVATIONS
    gated: bool = True  # act(gate) * up; else act(gate) alone: gate_up holds one layer
    gate_limit: float = 0.0  # gate is at most that, and up at most that far from 0; 0: no limit
    up_offset: float = 0.0  # then added to up
    parallel: bool = False
    qk_norm: str = ""  # of queries and keys: head (each head alone) or width (all heads together); "": none
    qk_norm_last: bool = False  # after they are turned
    score_scale: float | None = None  # of the scores; None: 1 / sqrt(D)
    score_cap: float = 0.0  # then cap * tanh(score / cap); 0: none
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logits_scale: float = 1.0
    logits_cap: float = 0.0  # then cap * tanh(logit / cap); 0: none


@dataclass(frozen=True)
class Expert:
    """An MLP with the model's activation."""

    gate_up: tuple[nn.Module, ...]  # as those of a layer; or `in_turns`
    down: nn.Module


@dataclass(frozen=True, kw_only=True)
class ExpertParts:
    """A mixture of experts: for each token those with the highest scores are computed, weighted and added."""

    router: nn.Module  # H -> experts
    experts: tuple[Expert, ...]
    choices: int  # experts of a token
    sigmoid: bool = False  # scores are sigmoids of what the router gives; else a softmax over all experts
    choice_bias: Tensor | None = None  # [experts], added to the scores where experts are chosen, not where they are weighted
    normed: bool = True  # the weights of the chosen are their scores divided by the sum of these
    scale: float = 1.0  # of the weights, at last
    weighs_input: bool = False  # an expert reads its input times its weight, and what it gives is added as it is
    groups: int = 1  # the experts lie in so many groups, and are chosen …
    chosen_groups: int = 1  # … from those of them with the highest scores,
    group_best: int = 1  # each the sum of its best scores, so many
    in_turns: bool = False  # the outputs of gate_up are one gate, one up; of two layers the second goes on where the first ends
    shared_gate: nn.Module | None = None  # H -> 1; its sigmoid weighs the shared expert: the layer's own gate_up and down

    def linears(self) -> Iterator[nn.Module]:
        yield self.router
        if self.shared_gate is not None:
            yield self.shared_gate
        for each in self.experts:
            yield from (*each.gate_up, each.down)


@dataclass(frozen=True, kw_only=True)
class LatentParts:
    """Keys and values that all heads make of one vector, the latent one (MLA: DeepSeek-V2, arXiv 2405.04434).

    A head's query and key have `fixed` dimensions, then `turned` ones; the turned ones of the keys are those of all heads. The
    layer's qkv are two: one that gives the queries, or the vector that `queries` reads; one that gives the latent vector and,
    behind it, the turned dimensions of the keys.
    """

    queries: nn.Module | None  # of a vector as long as `queries_norm` -> heads * (fixed + turned)
    queries_norm: Norm | None
    queries_columns: Tensor | None  # as qkv_columns, of the outputs of `queries`
    norm: Norm  # [rank], of the latent vector
    keys_values: nn.Module  # rank -> of each head its fixed dimensions of the key, then its value
    fixed: int
    turned: int
    value_dim: int  # of a head

    @property
    def rank(self) -> int:
        return int(self.norm.weight.numel())


@dataclass(frozen=True, kw_only=True)
class LayerParts:
    attention_norm: Norm | None  # [H], of what q, k and v read
    qkv: tuple[nn.Module, ...]  # q, k, v; or one layer that is all three; or those that LatentParts names
    qkv_columns: Tensor | None = (
        None  # int64 [all outputs of qkv]: where the outputs of q, then k, then v are found; None: in order
    )
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    o: nn.Module
    attended_norm: Norm | None = None  # [H], of what o gives
    mlp_norm: Norm | None  # [H], of what gate and up read
    # gate, up; or one layer that is both; or the only one of an MLP without a gate. None, and no down, where all are experts'
    gate_up: tuple[nn.Module, ...]
    down: nn.Module | None
    experts: ExpertParts | None = None
    inner_norm: Norm | None = None  # [H], of what down gives
    window: int = 0  # tokens a position sees, itself included; 0 for all
    rotary: int = 0  # which of the model's rotaries; -1: queries and keys are not turned
    sinks: Tensor | None = None  # [heads]: a score for no key at all
    chunk: int = 0  # a position sees those of its own chunk of so many tokens; 0 for all
    tempered: bool = False  # queries are multiplied by the model's temperature
    latent: LatentParts | None = None

    @property
    def norms(self) -> tuple[Norm | None, ...]:
        """Those of the residual's width, in the order of the computation."""
        return self.attention_norm, self.attended_norm, self.mlp_norm, self.inner_norm

    def linears(self) -> Iterator[nn.Module]:
        yield from (*self.qkv, self.o, *self.gate_up)
        if self.latent is not None:
            yield from (each for each in (self.latent.queries, self.latent.keys_values) if each is not None)
        if self.down is not None:
            yield self.down
        if self.experts is not None:
            yield from self.experts.linears()


@dataclass(frozen=True)
class ModelParts:
    embedding: Tensor  # [V, H]
    layers: tuple[LayerParts, ...]
    norm: Norm  # [H], the last one
    head: nn.Module  # nn.Linear or GPTQLinear, H -> V
    heads: int
    kv_heads: int
    head_dim: int  # D; of queries and keys, where values have other dimensions (LatentParts)
    rotaries: tuple[Rotary, ...] = ()
    rotary_dim: int = 0  # of D, how many are turned: dimension i with dimension i + rotary_dim / 2
    options: Options = Options()
    positions: Tensor | None = None  # [positions, H], added to the embeddings; a text cannot be longer
    embedding_norm: Norm | None = None
    alibi: Alibi | None = None
    temperature: Temperature | None = None

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def eps(self) -> float:
        """Of every norm."""
        return self.norm.eps

    @property
    def score_scale(self) -> float:
        own = self.options.score_scale
        return inverse_root(self.head_dim) if own is None else own

    @property
    def rotary(self) -> nn.Module:
        """The module of the first rotary; one that does nothing if there is none."""
        return self.rotaries[0].module if self.rotaries else nn.Module()

    @property
    def length_dependent(self) -> bool:
        """Whether the angles of a position depend on the length of the text."""
        return any(kind_of(each.module) for each in self.rotaries)

    @property
    def head_weight(self) -> Tensor:
        """[V, H]; of a packed head, made dense in fp16."""
        if isinstance(self.head, GPTQLinear):
            return self.head.dequantize(torch.float16)
        weight: Tensor = self.head.weight  # type: ignore[assignment]
        return weight

    def angles(self, positions: int, *, start: int = 0, of_set: int = 0, rotary: int = 0) -> tuple[Tensor, Tensor]:
        """(cos, sin) of positions from `start`, fp32 [positions, rotary_dim/2], with the model's own scaling.

        `of_set`: the set of angles, where they depend on the length of the text (rope_length.py).
        """
        one = self.rotaries[rotary]
        half = self.rotary_dim // 2
        return tables(one.module, start, positions, of_set, half, self.device, arguments=one.arguments, doubled=one.doubled)

    def position_bias(self, positions: int) -> Tensor | None:
        """What ALiBi adds to the scaled scores: fp32 [heads, positions of the key]; None without it."""
        return None if self.alibi is None else self.alibi.table(positions, self.score_scale)

    def linears(self) -> Iterator[nn.Module]:
        """Every linear layer but the head."""
        for layer in self.layers:
            yield from layer.linears()


def inverse_root(head_dim: int) -> float:
    """What scores are multiplied by where no option says otherwise; 0 for a head without dimensions."""
    return head_dim**-0.5 if head_dim > 0 else 0.0  # suitability.py refuses such heads
