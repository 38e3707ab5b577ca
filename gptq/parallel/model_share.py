"""A rank's share of a model, as a transformers model: its own code computes it, over fewer heads and inner units.

query, key, value, gate and up have the outputs of this rank's heads and inner units; the outputs of o and down are summed
over the ranks; the embedding and the output layer have some rows of the vocabulary; norms are whole. Where down has act-order,
a rank takes whole groups of it, and gate and up give their outputs in the order of these groups. Only a share's own bytes are
read, but for layers in such an order, which are read whole and cut in memory, one at a time.
"""

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import BadCheckpoint
from ...core.models import LocalModel
from ..checkpoint import HARMLESS, untied
from ..config_reading import read_config
from ..gptq_linear import GPTQLinear
from ..packed_quantizer import PackedLayer, packed_layers
from ..rope import Rope
from ..rope import apply as rope_apply
from ..token_ids import drop_unknown_ids
from .divided_layers import DividedEmbedding, GatheredOutput, PickedInputs
from .packed_shares import Pick, by_inputs, by_outputs, g_idx_of, inputs_of_ranks, with_even_groups
from .rank_group import RankGroup
from .shares import Span, heads_of_ranks, spans
from .tensor_files import TensorFiles

_UNIT = 32  # inner units and rows of the vocabulary are divided by so many

Arrived = Callable[[int, int], None]  # layers that are read, and all


def load(
    model: LocalModel,
    group: RankGroup,
    *,
    dtype: torch.dtype,
    device: torch.device,
    rope: Rope | None = None,
    arrived: Arrived = lambda done, all: None,
) -> tuple[Any, tuple[str, ...]]:
    """(the rank's share as a transformers causal LM in eval mode, notes for the user). dividing.why_not was asked before.

    Raises BadCheckpoint, BadParameter; never returns a model with a weight that did not come from the files.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    config = read_config(model)
    notes = [*drop_unknown_ids(config), *(rope_apply(config, rope) if rope is not None else ())]
    files = TensorFiles(model.weights, device)
    try:
        notes += untied(config, dict(files.infos))
        layers = packed_layers(files.infos, model.quantize) if model.quantize is not None else {}
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):
            hf: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
        hf.model.rotary_emb = type(hf.model.rotary_emb)(config)  # its angles are computed, not read
        share = _Share(model, files, layers, config, group, dtype)
        share.fill(hf, arrived)
    finally:
        files.close()
    with contextlib.suppress(OSError):  # a folder without one has what config.json says
        hf.generation_config = GenerationConfig.from_pretrained(model.folder)
    return hf.to(device).eval(), tuple(notes)


class _Share:
    """Fills a model on meta with what one rank has."""

    def __init__(
        self,
        model: LocalModel,
        files: TensorFiles,
        layers: dict[str, PackedLayer],
        config: Any,
        group: RankGroup,
        dtype: torch.dtype,
    ) -> None:
        self._model, self._files, self._layers, self._config = model, files, layers, config
        self._group, self._dtype = group, dtype
        self._heads = heads_of_ranks(config.num_attention_heads, config.num_key_value_heads, group.ranks)[group.rank]
        self._head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        self._taken: set[str] = set()  # tensors that have found their place

    def fill(self, hf: Any, arrived: Arrived) -> None:
        blocks = hf.model.layers
        for at, block in enumerate(blocks):
            arrived(at, len(blocks))
            self._attention(f"model.layers.{at}.self_attn", block.self_attn)
            self._mlp(f"model.layers.{at}.mlp", block.mlp)
        self._vocabulary(hf)
        for name, parameter in list(hf.named_parameters()):
            if parameter.is_meta:
                owner, _dot, last = name.rpartition(".")
                tensor = self._dense(name, tuple(parameter.shape))
                setattr(hf.get_submodule(owner), last, nn.Parameter(tensor, requires_grad=False))
        left = [each for each in self._files.infos if each not in self._taken and not HARMLESS.search(each)]
        if left:
            raise BadCheckpoint(
                f"The files of {self._model.name} hold {left[0]}, which has no place in a model that is divided among GPUs. "
                "Set tensor_parallel to 1."
            )

    def _attention(self, name: str, attention: Any) -> None:
        config, heads, size = self._config, self._heads, self._head_dim
        queries, keys = heads.queries.times(size), heads.keys.times(size)
        all_queries, all_keys = config.num_attention_heads * size, config.num_key_value_heads * size
        if hasattr(attention, "qkv_proj"):
            picks: list[Pick] = [queries, keys.after(all_queries), keys.after(all_queries + all_keys)]
            attention.qkv_proj = self._outputs(f"{name}.qkv_proj", config.hidden_size, all_queries + 2 * all_keys, picks)
        else:
            attention.q_proj = self._outputs(f"{name}.q_proj", config.hidden_size, all_queries, [queries])
            for each in ("k_proj", "v_proj"):
                setattr(attention, each, self._outputs(f"{name}.{each}", config.hidden_size, all_keys, [keys]))
        attention.o_proj = self._inputs(f"{name}.o_proj", all_queries, config.hidden_size, queries)
        own = copy.copy(config)
        own.num_attention_heads, own.num_key_value_heads = len(heads.queries), len(heads.keys)
        attention.config = own
        for number, value in (
            ("num_key_value_groups", heads.group),
            ("num_heads", len(heads.queries)),
            ("num_attention_heads", len(heads.queries)),
            ("num_key_value_heads", len(heads.keys)),
        ):
            if hasattr(attention, number):
                setattr(attention, number, value)

    def _mlp(self, name: str, mlp: Any) -> None:
        inner, hidden = self._config.intermediate_size, self._config.hidden_size
        pick = self._inner(f"{name}.down_proj", inner)
        if hasattr(mlp, "gate_up_proj"):
            ups = pick.after(inner) if isinstance(pick, Span) else pick + inner
            mlp.gate_up_proj = self._outputs(f"{name}.gate_up_proj", hidden, 2 * inner, [pick, ups])
        else:
            for each in ("gate_proj", "up_proj"):
                setattr(mlp, each, self._outputs(f"{name}.{each}", hidden, inner, [pick]))
        mlp.down_proj = self._inputs(f"{name}.down_proj", inner, hidden, pick)

    def _inner(self, down: str, inner: int) -> Pick:
        """The inner units of this rank, in the order of down's inputs."""
        layer = self._layers.get(down)
        if layer is None or layer.in_features != inner:  # which is refused where it is read
            return _even(inner, self._group.ranks)[self._group.rank]
        return inputs_of_ranks(g_idx_of(self._files, down, layer), layer.groups, self._group.ranks)[self._group.rank]

    def _vocabulary(self, hf: Any) -> None:
        rows, hidden = self._config.vocab_size, self._config.hidden_size
        cut = _even(rows, self._group.ranks)
        own = cut[self._group.rank]
        name = "model.embed_tokens.weight"
        hf.model.embed_tokens = DividedEmbedding(self._dense(name, (rows, hidden), own), own, self._group)
        if getattr(self._config, "tie_word_embeddings", False) and "lm_head" not in self._layers:
            head: nn.Module = _linear(hf.model.embed_tokens.weight, None)
            self._taken.add("lm_head.weight")  # the same numbers, if it is there: `untied` has compared them
        else:
            head = self._outputs("lm_head", hidden, rows, [own])
        hf.lm_head = GatheredOutput(head, cut, self._group)

    def _outputs(self, name: str, inputs: int, outputs: int, picks: list[Pick]) -> nn.Module:
        layer = self._packed(name, inputs, outputs)
        if layer is not None:
            return by_outputs(self._files, name, layer, picks)
        weight = torch.cat([self._dense(f"{name}.weight", (outputs, inputs), each) for each in picks])
        bias = None
        if f"{name}.bias" in self._files:
            bias = torch.cat([self._dense(f"{name}.bias", (outputs,), each) for each in picks])
        return _linear(weight, bias)

    def _inputs(self, name: str, inputs: int, outputs: int, pick: Pick) -> nn.Module:
        """A layer whose outputs are still to be summed over the ranks (divided_layers.sum_outputs)."""
        first = self._group.rank == 0
        layer = self._packed(name, inputs, outputs)
        if layer is not None:
            return self._for_kernels(by_inputs(self._files, name, layer, pick, bias=first))
        self._require_shape(f"{name}.weight", (outputs, inputs))
        assert isinstance(pick, Span)
        weight = self._files.columns(f"{name}.weight", pick).to(self._dtype)
        bias = None
        if f"{name}.bias" in self._files:
            bias = self._dense(f"{name}.bias", (outputs,))
        return _linear(weight, bias if first else None)

    def _for_kernels(self, linear: GPTQLinear) -> nn.Module:
        """With groups that the kernels of the device read: o's inputs are in the order of the heads, whatever their groups."""
        if self._files.device.type != "cuda" or (even := with_even_groups(linear)) is None:
            return linear
        return PickedInputs(*even, linear.in_features)

    def _packed(self, name: str, inputs: int, outputs: int) -> PackedLayer | None:
        layer = self._layers.get(name)
        if layer is None:
            return None
        if (layer.in_features, layer.out_features) != (inputs, outputs):
            raise BadCheckpoint(
                f"{name} is {layer.in_features}×{layer.out_features} in the files and {inputs}×{outputs} in config.json. "
                "The files belong to another model; download it again."
            )
        self._taken.update(f"{name}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx", "bias"))
        return layer

    def _dense(self, name: str, shape: tuple[int, ...], pick: Pick | None = None) -> Tensor:
        """A tensor in the model's number format, whole or the picked rows."""
        self._require_shape(name, shape)
        if pick is None:
            found = self._files.whole(name)
        elif isinstance(pick, Span):
            found = self._files.rows(name, pick)
        else:
            found = self._files.whole(name)[pick]
        return found.to(self._dtype)

    def _require_shape(self, name: str, shape: tuple[int, ...]) -> None:
        if name not in self._files:
            raise BadCheckpoint(
                f"The files of {self._model.name} lack {name}, which a model that is divided among GPUs needs under this name. "
                "Set tensor_parallel to 1, or download the model again."
            )
        if (found := self._files.shape(name)) != shape:
            raise BadCheckpoint(
                f"{name} is {list(found)} in the files, and config.json asks for {list(shape)}. The files belong to another "
                "model; download it again."
            )
        self._taken.add(name)


def _even(count: int, ranks: int) -> list[Span]:
    return spans(count, ranks, _UNIT if count >= _UNIT * ranks else 1)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear
