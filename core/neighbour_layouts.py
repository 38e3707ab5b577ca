"""Formats with GPTQ's arithmetic in another order of bits: AWQ, and compressed-tensors' pack-quantized.

A weight is scale * (q - zero) in all of them. What differs is how q and zero lie in words:

    AWQ (GEMM)     qweight int32 [K, N/8], qzeros int32 [G, N/8], scales [G, N]; the nibbles of a word are columns 0 2 4 6 1 3 5 7
    pack-quantized weight_packed int32 [N, K*bits/32], weight_scale [N, G]; where zeros differ weight_zero_point, int32
                   [N*bits/32, G] or int8 [N, G]; with act-order weight_g_idx [K]; weight_shape, two numbers
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from .errors import BadCheckpoint, BadQuantizeConfig
from .folder_files import printable
from .packed_layout import Layout, Tensors
from .quantize_config import QuantizeConfig

AWQ, COMPRESSED = "awq", "compressed-tensors"  # a model's kind, and its settings' checkpoint_format
NEIGHBOURS = (AWQ, COMPRESSED)
_WIDTHS = (4, 8)  # of compressed-tensors; AWQ has 4 alone
_FLOATS = ("F16", "BF16", "F32")
_AGAIN = "Download the model again."


def settings_of(kind: str, config: Mapping[str, Any], quant_config: Mapping[str, Any]) -> QuantizeConfig:
    """How such a model was quantised, from config.json and quant_config.json (AutoAWQ).

    Raises BadQuantizeConfig, in words, for what cannot be read: other widths, quantised activations, other orders.
    """
    given = config.get("quantization_config") or config.get("compression_config")
    given = given if isinstance(given, Mapping) else {}
    return _awq({**quant_config, **given}) if kind == AWQ else _compressed(given)


def read_settings(kind: str, config: Mapping[str, Any], own: Mapping[str, Any], tensors: Tensors) -> QuantizeConfig:
    """`settings_of` with the group size that the tensors have. Raises BadCheckpoint for tensors that do not fit each other."""
    settings = settings_of(kind, config, own)
    names = neighbour_names(tensors, kind)
    if not names:
        raise BadCheckpoint(f"Its settings say {kind}, but the files hold no such weights. {_AGAIN}")
    sizes = {neighbour_layout(name, tensors, settings).group_size(settings.group_size) for name in names}
    return replace(settings, group_size=sizes.pop()) if len(sizes) == 1 else settings


def why_unreadable(kind: str, config: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """Why weights of these settings cannot be read, in a sentence; "" if they can."""
    try:
        settings_of(kind, config, own)
    except BadQuantizeConfig as error:
        return str(error)
    return ""


def name_of(config: QuantizeConfig) -> str:
    """'AWQ 4-bit g128', 'compressed-tensors W4A16 g128'; 'channel' where a whole column shares its scale."""
    group = "channel" if config.group_size == -1 else f"g{config.group_size}"
    if config.checkpoint_format == AWQ:
        return f"AWQ {config.bits}-bit {group}"
    parts = [f"compressed-tensors W{config.bits}A16 {group}"] + ["act-order"] * config.desc_act
    return ", ".join(parts + ["asymmetric"] * (not config.sym))


def neighbour_names(tensors: Iterable[str], kind: str) -> list[str]:
    """Names of the packed layers, sorted."""
    part = ".qweight" if kind == AWQ else ".weight_packed"
    return sorted(name.removesuffix(part) for name in tensors if name.endswith(part))


def neighbour_layout(name: str, tensors: Tensors, config: QuantizeConfig) -> Layout:
    """The layer `name` as GPTQ would hold it. Raises BadCheckpoint where its tensors do not fit each other."""
    wanted = ("qweight", "qzeros", "scales") if config.checkpoint_format == AWQ else ("weight_packed", "weight_scale")
    if missing := [part for part in wanted if f"{name}.{part}" not in tensors]:
        raise BadCheckpoint(f"{printable(name)} has no {' and no '.join(missing)} in the files. {_AGAIN}")
    shapes = {part: tuple(info.shape) for part, info in _parts(name, tensors).items()}
    types = {part: info.dtype for part, info in _parts(name, tensors).items()}
    weight, scales = (wanted[0], wanted[-1])
    if types[weight] != "I32" or types[scales] not in _FLOATS or len(shapes[weight]) != 2 or len(shapes[scales]) != 2:
        raise BadCheckpoint(
            f"{printable(name)} has its weights as {printable(types[weight])} {_shown(shapes[weight])} and its scales as "
            f"{printable(types[scales])} {_shown(shapes[scales])}; I32 and a floating-point number in two dimensions were "
            f"expected. {_AGAIN}"
        )
    if config.checkpoint_format == AWQ:
        in_features, out = shapes[weight][0], shapes[scales][1]
        groups = shapes[scales][0]
        fits = shapes[weight][1] * 8 == out and shapes["qzeros"] == (groups, out // 8) and types["qzeros"] == "I32"
    else:
        out, groups = shapes[scales]
        in_features = shapes[weight][1] * 32 // config.bits
        zeros = shapes.get("weight_zero_point")
        packed = types.get("weight_zero_point") == "I32"
        fits = shapes[weight][0] == out and (
            zeros is None or zeros == ((-(-out * config.bits // 32), groups) if packed else (out, groups))
        )
        fits = fits and shapes.get("weight_g_idx", (in_features,)) == (in_features,)
    fits = fits and shapes.get("bias", (out,)) == (out,) and bool(in_features and out and groups)
    layout = Layout(config.bits, 32, in_features, out, groups, types[scales], "bias" in shapes, "weight_g_idx" in shapes)
    if not fits or -(-in_features // max(1, _size(layout, config))) != groups:
        raise BadCheckpoint(
            f"The tensors of {printable(name)} do not fit each other or the settings ({name_of(config)}): "
            f"{', '.join(f'{part} {_shown(shape)}' for part, shape in sorted(shapes.items()))}. {_AGAIN}"
        )
    return layout


def _size(layout: Layout, config: QuantizeConfig) -> int:
    size = layout.group_size(config.group_size)
    return layout.in_features if size == -1 else size


def _parts(name: str, tensors: Tensors) -> dict[str, Any]:
    parts = ("qweight", "qzeros", "scales", "bias", "weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx")
    return {part: tensors[f"{name}.{part}"][1] for part in parts if f"{name}.{part}" in tensors}


def _awq(given: Mapping[str, Any]) -> QuantizeConfig:
    bits, group = given.get("bits", given.get("w_bit", 4)), given.get("group_size", given.get("q_group_size", 128))
    version = str(given.get("version") or "gemm").lower()
    if bits != 4:
        raise BadQuantizeConfig(
            f"The settings say AWQ with {bits!r} bits; 4 bits can be read. Look for the model's -GPTQ sister."
        )
    if version != "gemm":
        raise BadQuantizeConfig(
            f"The settings say AWQ in the layout {printable(version)[:20]}; GEMM can be read. Look for the model's -GPTQ sister."
        )
    return _checked(4, group, False, bool(given.get("sym", not given.get("zero_point", True))), AWQ)


def _compressed(given: Mapping[str, Any]) -> QuantizeConfig:
    named = given.get("config_groups")
    groups = [each for each in named.values() if isinstance(each, Mapping)] if isinstance(named, Mapping) else []
    forms = {str(each.get("format") or given.get("format") or "") for each in groups}
    if forms != {"pack-quantized"}:
        found = ", ".join(sorted(form or "nothing" for form in forms)) or "nothing"
        raise BadQuantizeConfig(
            f"The settings say compressed-tensors in the format {printable(found)[:60]}; pack-quantized can be read."
        )
    if any(each.get("input_activations") or each.get("output_activations") for each in groups):
        raise BadQuantizeConfig(
            "The settings say that activations are quantised too (not A16); only quantised weights can be read."
        )
    given_weights = (each.get("weights") for each in groups)
    weights: list[Mapping[str, Any]] = [each if isinstance(each, Mapping) else {} for each in given_weights]
    facts = {
        (each.get("num_bits"), each.get("type", "int"), each.get("strategy"), each.get("group_size"),
         bool(each.get("symmetric", True)), each.get("actorder") in ("group", True))
        for each in weights
    }  # fmt: skip
    if len(facts) != 1:
        raise BadQuantizeConfig(
            "The settings say that layers were quantised in several ways; compressed-tensors with one can be read."
        )
    bits, numbers, strategy, group, sym, ordered = facts.pop()
    if bits not in _WIDTHS or numbers != "int" or strategy not in ("group", "channel", None):
        raise BadQuantizeConfig(
            f"The settings say compressed-tensors with {bits!r} bits ({printable(str(numbers))[:20]}) by "
            f"{printable(str(strategy))[:20]}; whole numbers of 4 or 8 bits by group or channel can be read."
        )
    return _checked(bits, -1 if strategy == "channel" or group is None else group, ordered, sym, COMPRESSED)


def _checked(bits: int, group: object, ordered: bool, sym: bool, form: str) -> QuantizeConfig:
    if not isinstance(group, int) or (group != -1 and group <= 0):
        raise BadQuantizeConfig(
            f"group_size is {group!r} in the quantisation settings; it must be -1 or a positive number of weights. "
            "Correct the file, or download it again."
        )
    return QuantizeConfig(bits=bits, group_size=group, desc_act=ordered, sym=sym, checkpoint_format=form)


def _shown(shape: Iterable[int]) -> str:
    return "×".join(map(str, shape)) or "one number"
