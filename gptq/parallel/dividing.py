"""Which models can be divided among ranks, from config.json and the settings of the files alone, or why not."""

from collections.abc import Mapping
from typing import Any

from ...core.errors import BadParameter
from ...core.folder_files import read_json
from ...core.models import LocalModel
from .shares import heads_of_ranks

KINDS = ("llama", "mistral", "qwen2", "qwen3", "phi3", "seed_oss")
MOST_RANKS = 8
_LENGTH_DEPENDENT = ("dynamic", "longrope", "su")  # kinds of rotary positions


def why_not(model: LocalModel, config: Mapping[str, Any], ranks: int) -> tuple[str, str]:
    """(why a model cannot be divided among so many ranks, what would change that); ("", "") if it can.

    `config` is its config.json.
    """
    alone = "set tensor_parallel to 1"
    if model.kind not in ("gptq", "plain"):
        return f"tensor_parallel reads GPTQ's own layout and 16-bit models, and the weights are {model.badge}", (
            f"export the model as plain GPTQ, or {alone}"
        )
    if model.quantize is not None and model.quantize.pack_dtype not in (None, "int32"):
        return f"tensor_parallel reads words of 32 bits, and the files have {model.quantize.pack_dtype}", alone
    kind = config.get("model_type")
    if kind not in KINDS:
        return f"tensor_parallel knows models of the kinds {', '.join(KINDS)}, and this one is {kind or 'unnamed'}", alone
    for name in ("rope_scaling", "rope_parameters"):
        given = config.get(name)
        scaling = given.get("rope_type", given.get("type")) if isinstance(given, Mapping) else None
        if scaling in _LENGTH_DEPENDENT:
            return f"the rotary positions ({scaling}) depend on the length of the text", alone
    try:
        heads_of_ranks(*head_counts(config), ranks)
    except BadParameter as error:
        return str(error).removesuffix("."), ""
    return "", ""


def fullest_share(model: LocalModel, ranks: int) -> tuple[float, float]:
    """(of the weights, of the conversation) that the fullest rank holds. For a model that cannot be divided, as if it could."""
    heads, kv_heads = head_counts(read_json(model.folder / "config.json"))
    try:
        found = heads_of_ranks(heads, kv_heads, ranks)
    except BadParameter:
        return 1 / ranks, 1 / ranks
    queries = max(len(each.queries) for each in found) / heads
    return (2 / ranks + queries) / 3, max(len(each.keys) for each in found) / kv_heads  # attention is about a third


def head_counts(config: Mapping[str, Any]) -> tuple[int, int]:
    """(query heads, key heads) of a config.json; zeros where it does not say."""
    heads = config.get("num_attention_heads")
    keys = config.get("num_key_value_heads") or heads
    return (heads, keys) if isinstance(heads, int) and isinstance(keys, int) else (0, 0)
