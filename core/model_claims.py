"""What config.json claims of a model, compared with itself and with the tensors in the files.

A library that builds a model from such numbers believes them: 3 heads on 2 key heads end in a crash, a million layers in
exhausted memory. Each contradiction is a sentence here, before anything is built.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from .config_numbers import CONTEXT, HEADS, HIDDEN, first, is_number, shown
from .folder_files import printable
from .packed_layout import Tensors
from .rope_claims import rope_problems

_CURE = "Correct config.json, or download the model again."
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_MOST = {  # far beyond every model there is; a larger number is damage
    **dict.fromkeys(_LAYERS, 10_000), **dict.fromkeys(HEADS, 1 << 16), **dict.fromkeys(HIDDEN, 1 << 20),
    **dict.fromkeys(CONTEXT, 1 << 31), "num_key_value_heads": 1 << 16, "head_dim": 1 << 14, "vocab_size": 1 << 24,
    "intermediate_size": 1 << 24, "ffn_dim": 1 << 24, "n_inner": 1 << 24,
}  # fmt: skip
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_CHOICES = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk")
_MOST_EXPERTS = 1 << 14  # a library makes each of them when it builds the model
_OF_OTHERS = ("quantization_config", "task_specific_params")
_LONGEST_NAME = 60
_MOST_LABELS = 1 << 16  # transformers names each of them
_TABLES = {  # families that make a table of all positions, or of all pairs of them, when they are built
    **dict.fromkeys(("gpt2", "gptj", "gpt_neo", "gpt_bigcode", "codegen"), 1 << 14), "mpt": 1 << 17, "bloom": 1 << 20,
    "falcon": 1 << 20, "opt": 1 << 20,
}  # fmt: skip
_OWN_HEAD_SIZE = ("mpt", "gpt2", "gptj", "gpt_neo", "gpt_bigcode", "codegen", "bloom", "falcon", "opt")  # they read no head_dim
_EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight", "tok_embeddings.weight")
_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)\.")
_NOT_NUMBERS = ("I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64", "BOOL", "F8_E4M3", "F8_E5M2")


def problem_of(config: Mapping[str, Any], tensors: Tensors) -> str:
    """The first contradiction as a sentence; "" if there is none. `tensors` may be empty: then only config.json is judged."""
    inner = config.get("text_config")
    numbers = {**config, **(inner if isinstance(inner, Mapping) else {})}
    for check in (_endless, _absurd, _heads, _experts, _expert_groups, rope_problems):
        if found := next(check(numbers), ""):
            return f"{found}. {_CURE}"
    return next(_files(numbers, tensors), "")


def type_problem(tensors: Tensors) -> str:
    """A weight of a GPTQ model that is neither packed nor a floating-point number, as a sentence; "" if there is none."""
    for name, (_path, info) in tensors.items():
        if name.endswith(".weight") and info.dtype in _NOT_NUMBERS:
            return (
                f"{printable(name)} is stored as {info.dtype}; it must be F16, BF16 or F32, for it is not packed. "
                "Some program changed the type of the numbers. Download the model again."
            )
    return ""


def embedding_rows(tensors: Tensors) -> list[int]:
    """Rows of the token embeddings in the files."""
    found = [info.shape for name, (_path, info) in tensors.items() if name.endswith(EMBEDDINGS)]
    return [shape[0] for shape in found if len(shape) == 2]


def _endless(config: Mapping[str, Any]) -> Iterator[str]:
    """Whole numbers that no tensor can hold. The quantisation's own are judged with its settings; no model is made of others."""
    waiting: list[tuple[str, Any]] = [
        (name, value) for name, value in config.items() if name not in _OF_OTHERS and not name.endswith("max_length")
    ]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, Mapping):
            waiting += [(str(key), each) for key, each in value.items()]
        elif isinstance(value, list):
            waiting += [(name, each) for each in value]
        elif isinstance(value, int) and abs(value) >= 1 << 63:
            yield f"config.json says {printable(name)[:_LONGEST_NAME]} {shown(value)}; a number of 64 bits was expected"


def _absurd(config: Mapping[str, Any]) -> Iterator[str]:
    for name, most in _MOST.items():
        value = config.get(name)
        if value is None or isinstance(value, list):  # a list: one number for each layer
            continue
        if not isinstance(value, int) or isinstance(value, bool):
            yield f"config.json says {name} {shown(value)}; a whole number was expected"
        elif not 0 < value <= most:
            yield f"config.json says {name} {shown(value)}; a number from 1 to {most} was expected"
    labels = config.get("num_labels")
    if labels is not None and not (isinstance(labels, int) and labels <= _MOST_LABELS):
        yield f"config.json says num_labels {shown(labels)}; a number up to {_MOST_LABELS} was expected"
    kind = config.get("model_type")
    positions = _TABLES.get(kind) if isinstance(kind, str) else None
    for name in CONTEXT if positions is not None else ():
        value = config.get(name)
        if isinstance(value, int) and value > (positions or 0):
            yield f"config.json says {name} {value}; a model of the type {kind} has {positions} positions at most"
    for name in _EPSILONS:
        value = config.get(name)
        if value is not None and not (is_number(value) and 0 <= value < 1):
            yield f"config.json says {name} {shown(value)}; a small positive number such as 1e-6 was expected"
    scale = config.get("attention_multiplier")
    if scale is not None and not (is_number(scale) and scale > 0):
        yield f"config.json says attention_multiplier {shown(scale)}; a positive number was expected"
    window = config.get("sliding_window")
    positive = isinstance(window, int) and not isinstance(window, bool) and 0 < window <= 1 << 31
    if window is not None and config.get("use_sliding_window") is not False and not positive:
        yield f"config.json says sliding_window {shown(window)}; a positive number of tokens or null was expected"


def _heads(config: Mapping[str, Any]) -> Iterator[str]:
    heads, keys = first(config, HEADS), config.get("num_key_value_heads")
    if isinstance(heads, int) and isinstance(keys, int) and heads % keys:
        yield (
            f"config.json says {heads} attention heads (num_attention_heads) that share {keys} key heads "
            "(num_key_value_heads); each key head must serve a whole number of heads"
        )
    hidden = first(config, HIDDEN)
    named = config.get("model_type") not in _OWN_HEAD_SIZE and any(
        "head_dim" in name and value is not None for name, value in config.items()
    )
    if isinstance(heads, int) and isinstance(hidden, int) and not named and hidden % heads:
        yield f"config.json says a hidden size of {hidden} for {heads} heads and no head_dim; the heads cannot divide it evenly"


def _experts(config: Mapping[str, Any]) -> Iterator[str]:
    experts, choices = first(config, _EXPERTS), first(config, _CHOICES)
    if isinstance(experts, int) and experts > _MOST_EXPERTS:
        yield f"config.json says {shown(experts)} experts; a number up to {_MOST_EXPERTS} was expected"
    if not isinstance(experts, int) or experts < 1 or choices is None or isinstance(choices, list):  # of a dense model, or a list
        return
    more = config.get("zero_expert_num")  # choices that compute nothing (LongCat)
    most = experts + (more if isinstance(more, int) else 0)
    if not isinstance(choices, int) or isinstance(choices, bool) or not 0 < choices <= most:
        yield (
            f"config.json says {shown(choices)} experts for each token (num_experts_per_tok) of {experts}; "
            f"a whole number from 1 to {most} was expected"
        )


def _expert_groups(config: Mapping[str, Any]) -> Iterator[str]:
    groups, chosen, experts = config.get("n_group"), config.get("topk_group"), first(config, _EXPERTS)
    if not isinstance(groups, int) or not isinstance(experts, int) or experts < 1:
        return
    if groups < 1:
        if config.get("topk_method") != "greedy":  # which asks for no groups
            yield f"config.json says {shown(groups)} groups of experts (n_group); a whole number from 1 to {experts} was expected"
    elif experts % groups:
        yield f"config.json says {experts} experts in {groups} groups (n_group); each group must have as many as the others"
    elif chosen is not None and not (isinstance(chosen, int) and 0 < chosen <= groups):
        yield f"config.json says topk_group {shown(chosen)} of {groups} groups; a whole number from 1 to {groups} was expected"


def _files(config: Mapping[str, Any], tensors: Tensors) -> Iterator[str]:
    if not tensors:
        return
    layers = config.get("num_layers_per_stack") or first(config, _LAYERS)  # HRM-Text goes through its layers several times
    if config.get("model_type") == "longcat_flash":  # num_hidden_layers counts two for each
        layers = first(config, ("num_layers", *_LAYERS))
    found = max((int(number) for name in tensors for number in _LAYER.findall(name) if len(number) < 6), default=-1) + 1
    if isinstance(layers, int) and found and layers > found:
        yield f"config.json says {layers} layers, the files hold {found}. {_CURE}"
    experts = first(config, _EXPERTS)
    held = max((int(number) for name in tensors for number in _EXPERT.findall(name) if len(number) < 6), default=-1) + 1
    if isinstance(experts, int) and held > experts + (zero if isinstance(zero := config.get("zero_expert_num"), int) else 0):
        yield f"config.json says {experts} experts, the files hold {held}. {_CURE}"
    rows, vocabulary = embedding_rows(tensors), config.get("vocab_size")
    more = int(config.get("model_type") == "moshi")  # its embedding has one for "no text yet"
    if rows and isinstance(vocabulary, int) and vocabulary + more not in rows and "padded_vocab_size" not in config:
        yield f"config.json says vocab_size {vocabulary}, the embedding in the files has {rows[0]} rows. {_CURE}"
