"""What config.json says of rotary positions (RoPE), compared with what each kind of scaling needs.

transformers 4.57 only logs what is missing or wrong here, and fails or computes nonsense later.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from .config_numbers import head_dim_of, is_number, shown

_SHARES = ("partial_rotary_factor", "rotary_pct", "rotary_emb_fraction")
_POSITIVE = ("rope_theta", "original_max_position_embeddings", "attention_factor")
_SCALES = ("attention_factor", "mscale", "mscale_all_dim", "short_mscale", "long_mscale")  # of what is rotated; near 1
_LARGEST_SCALE = 100
_NEEDED = {  # of each kind, beside rope_theta
    "linear": ("factor",), "dynamic": ("factor",), "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor"), "su": ("short_factor", "long_factor"),
}  # fmt: skip
_LISTS = ("short_factor", "long_factor")


def rope_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """Each contradiction as a sentence without its full stop."""
    head_dim = head_dim_of(config)
    for name in ("rope_scaling", "rope_parameters"):
        given = config.get(name)
        if given is not None and not isinstance(given, Mapping):
            yield f"config.json says {name} {shown(given)}; a group of settings or null was expected"
    for each in (config, *_rope_settings(config)):
        yield from _shares(config, each, head_dim)
        for name in (*_POSITIVE, *(() if each is config else ("factor",))):
            value = each.get(name)
            if name == "rope_theta" and isinstance(value, (list, Mapping)):
                continue  # one for each layer, or for each kind of layer
            if value is not None and not (is_number(value) and value > 0):
                yield f"config.json says {name} {shown(value)} for the rotary positions; a positive number was expected"
        for name in _SCALES:
            value = each.get(name)
            if value is not None and not (is_number(value) and 0 <= value <= _LARGEST_SCALE):
                yield (
                    f"config.json says {name} {shown(value)} for the rotary positions; a number near 1, "
                    f"at most {_LARGEST_SCALE}, was expected"
                )
        if each is not config:
            yield from _kind(config, each, head_dim)
    rotary = config.get("rotary_dim")
    if isinstance(rotary, int) and head_dim and not (0 < rotary <= head_dim and rotary % 2 == 0):
        yield f"config.json says rotary_dim {rotary} for heads of {head_dim}; an even number, at most that, was expected"


def _shares(config: Mapping[str, Any], each: Mapping[str, Any], head_dim: int) -> Iterator[str]:
    for name in _SHARES:
        share = each.get(name)
        if share is None:
            continue
        if not is_number(share) or not 0 < share <= 1:
            yield f"config.json says {name} {shown(share)}: the share of a head that is rotated is at most 1 and more than 0"
        elif head_dim and "qk_rope_head_dim" not in config and int(head_dim * share) % 2:
            yield (
                f"config.json says {name} {shown(share)} with heads of {head_dim} numbers: {int(head_dim * share)} of them "
                "would be rotated, which must be an even number"
            )
        elif head_dim and int(head_dim * share) < 2:
            yield f"config.json says {name} {shown(share)} with heads of {head_dim} numbers: none of them would be rotated"


def _kind(config: Mapping[str, Any], each: Mapping[str, Any], head_dim: int) -> Iterator[str]:
    """What one group of settings says of its kind of scaling."""
    kind = each.get("rope_type", each.get("type"))
    if kind is None and any(isinstance(inner, Mapping) for inner in each.values()):
        return  # one group for each kind of layer, which follow
    if kind is not None and not isinstance(kind, str):
        yield f"config.json says rope_type {shown(kind)} for the rotary positions; the name of a kind of scaling was expected"
        return
    for name in _NEEDED.get(kind or "", ()):
        value = each.get(name)
        if value is None and not (name == "original_max_position_embeddings" and config.get(name) is not None):
            yield f"config.json says rotary positions of the kind {kind} and no {name}, which that kind needs"
        elif value is not None and name not in _LISTS and not (is_number(value) and value > 0):
            yield f"config.json says {name} {shown(value)} for the rotary positions; a positive number was expected"
    rotated = _rotated(config, each, head_dim)
    for name in _LISTS:
        values = each.get(name)
        if values is None:
            continue
        if not isinstance(values, list) or not all(is_number(value) and value > 0 for value in values):
            yield f"config.json says {name} {shown(values)} for the rotary positions; a list of positive numbers was expected"
        elif rotated and len(values) != rotated // 2:
            yield (
                f"config.json has {len(values)} numbers in {name} for heads of which {rotated} numbers are rotated; "
                f"{rotated // 2} were expected"
            )


def _rotated(config: Mapping[str, Any], each: Mapping[str, Any], head_dim: int) -> int:
    """Numbers of a head that are rotated; 0 if config.json does not tell."""
    if "qk_rope_head_dim" in config:
        inner = config["qk_rope_head_dim"]
        return inner if isinstance(inner, int) else 0
    share = next((part[name] for part in (each, config) for name in _SHARES if is_number(part.get(name))), 1)
    return int(head_dim * share)


def _rope_settings(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for name in ("rope_scaling", "rope_parameters"):
        given = config.get(name)
        if isinstance(given, Mapping):
            yield given
            yield from (each for each in given.values() if isinstance(each, Mapping))  # one for each kind of layer
