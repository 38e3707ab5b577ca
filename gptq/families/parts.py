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
class Options:
    """In what families differ, but for what the tensors themselves show. The defaults are Llama's."""

    norm: str = "rms"  # every norm: rms, or layer (LayerNorm)
    activation: str = "silu"  # one of ACTIVATIONS
    gated: bool = True  # act(gate) * up; else act(gate) alone: gate_up holds one layer
    parallel: bool = False
    qk_norm: str = ""  # of queries and keys: head (each head alone) or width (all heads together); "": none
    qk_norm_last: bool = False  # after they are turned
    score_scale: float = 0.0  # of the scores; 0: 1 / sqrt(D)
    score_cap: float = 0.0  # then cap * tanh(score / cap); 0: none
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logits_scale: float = 1.0
    logits_cap: float = 0.0  # then cap * tanh(logit / cap); 0: none


@dataclass(frozen=True)
class Expert:
    """An MLP with the model's activation."""

    gate_up: tuple[nn.Module, ...]  # as those of a layer
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
    shared_gate: nn.Module | None = None  # H -> 1; its sigmoid weighs the shared expert: the layer's own gate_up and down

    def linears(self) -> Iterator[nn.Module]:
        yield self.router
        if self.shared_gate is not None:
            yield self.shared_gate
        for each in self.experts:
            yield from (*each.gate_up, each.down)


@dataclass(frozen=True, kw_only=True)
class LayerParts:
    attention_norm: Norm | None  # [H], of what q, k and v read
    qkv: tuple[nn.Module, ...]  # q, k, v; or one layer that is all three
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

    @property
    def norms(self) -> tuple[Norm | None, ...]:
        """Those of the residual's width, in the order of the computation."""
        return self.attention_norm, self.attended_norm, self.mlp_norm, self.inner_norm

    def linears(self) -> Iterator[nn.Module]:
        yield from (*self.qkv, self.o, *self.gate_up)
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
    head_dim: int  # D
    rotaries: tuple[Rotary, ...] = ()
    rotary_dim: int = 0  # of D, how many are turned: dimension i with dimension i + rotary_dim / 2
    options: Options = Options()
    positions: Tensor | None = None  # [positions, H], added to the embeddings; a text cannot be longer
    embedding_norm: Norm | None = None
    alibi: Alibi | None = None

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def eps(self) -> float:
        """Of every norm."""
        return self.norm.eps

    @property
    def score_scale(self) -> float:
        return self.options.score_scale or _inverse_root(self.head_dim)

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


def _inverse_root(head_dim: int) -> float:
    return head_dim**-0.5 if head_dim > 0 else 0.0  # suitability.py refuses such heads


# What a step may be unable to compute, and in which words it says so.
OPTIONS = {
    "layer_norm": "layer norms",
    "norm_bias": "norms with a bias",
    "after": "norms of what attention and the MLP give",
    "before": "no norms before attention and the MLP",
    "parallel": "attention and MLP side by side",
    "plain_mlp": "an MLP without a gate",
    "activation": "another activation than SiLU",
    "experts": "a mixture of experts",
    "qk_norm_each": "norms of the heads, one for each",
    "qk_norm_width": "norms of queries and keys over all heads",
    "qk_norm_last": "norms of the heads after their rotation",
    "ropes": "several kinds of rotary positions, or layers without any",
    "qkv_columns": "queries, keys and values in an order of their own",
    "positions": "learned positions",
    "alibi": "ALiBi positions",
    "score_scale": "a scale of the scores",
    "score_cap": "a soft cap of the scores",
    "sinks": "attention sinks",
    "embedding_scale": "a scale of the embeddings",
    "embedding_norm": "a norm of the embeddings",
    "residual_scale": "a scale of what layers add",
    "logits_scale": "a scale of the logits",
    "logits_cap": "a soft cap of the logits",
}


def options_of(parts: ModelParts) -> set[str]:
    """The names in OPTIONS of what a model has and Llama has not."""
    o, layers = parts.options, parts.layers
    each_norm = [norm for layer in layers for norm in (*layer.norms, layer.q_norm, layer.k_norm) if norm is not None]
    heads = [norm for layer in layers for norm in (layer.q_norm, layer.k_norm) if norm is not None]
    found = {
        "layer_norm": o.norm != "rms",
        "norm_bias": any(norm.bias is not None for norm in (*each_norm, parts.norm)),
        "after": any(layer.attended_norm or layer.inner_norm for layer in layers),
        "before": any(layer.attention_norm is None or layer.mlp_norm is None for layer in layers),
        "parallel": o.parallel,
        "plain_mlp": not o.gated,
        "activation": o.activation != "silu",
        "experts": any(layer.experts is not None for layer in layers),
        "qk_norm_each": o.qk_norm == "head" and any(norm.weight.dim() > 1 for norm in heads),
        "qk_norm_width": o.qk_norm == "width",
        "qk_norm_last": o.qk_norm_last,
        "ropes": len(parts.rotaries) != 1 or any(layer.rotary != 0 for layer in layers),
        "qkv_columns": any(layer.qkv_columns is not None for layer in layers),
        "positions": parts.positions is not None,
        "alibi": parts.alibi is not None,
        "score_scale": parts.score_scale != _inverse_root(parts.head_dim),
        "score_cap": bool(o.score_cap),
        "sinks": any(layer.sinks is not None for layer in layers),
        "embedding_scale": o.embedding_scale != 1,
        "embedding_norm": parts.embedding_norm is not None,
        "residual_scale": o.residual_scale != 1,
        "logits_scale": o.logits_scale != 1,
        "logits_cap": bool(o.logits_cap),
    }
    return {name for name, has in found.items() if has}
