"""Formats with GPTQ's arithmetic in another order of bits: AWQ, compressed-tensors' pack-quantized, and GPTQModel's gptq_p.

A weight is scale * (q - zero) in all of them. What differs is how q and zero lie in words:

    AWQ (GEMM)     qweight int32 [K, N/8], qzeros int32 [G, N/8], scales [G, N]; the nibbles of a word are columns 0 2 4 6 1 3 5 7
    pack-quantized weight_packed int32 [N, K*bits/32], weight_scale [N, G]; where zeros differ weight_zero_point, int32
                   [N*bits/32, G] or int8 [N, G]; with act-order weight_g_idx [K]; weight_shape, two numbers
    gptq_p         GPTQ's names and shapes, zeros as they are; of 32 numbers of 3, 5, 6 or 7 bits the low bits come first (2 of 3,
                   else 4), then the next (see PLANES). The other widths have gptq_v2's words
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from .config_numbers import shown
from .errors import BadCheckpoint, BadQuantizeConfig
from .folder_files import printable
from .packed_layout import BITS, Layout, Tensors
from .quantize_config import QuantizeConfig, checked_group

AWQ, COMPRESSED, PLANAR = "awq", "compressed-tensors", "gptq_p"  # a model's kind, and its settings' checkpoint_format
NEIGHBOURS = (AWQ, COMPRESSED, PLANAR)
PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}  # bits of a number, the lowest first
_WIDTHS = (4, 8)  # of compressed-tensors; AWQ has 4 alone
_FLOATS = ("F16", "BF16", "F32")
_AGAIN = "Download the model again."


def settings_of(kind: str, config: Mapping[str, Any], quant_config: Mapping[str, Any]) -> QuantizeConfig:
    """How such a model was quantised, from config.json and quant_config.json (AutoAWQ).

    Raises BadQuantizeConfig, in words, for what cannot be read: other widths, quantised activations, other orders.
    """
    given = config.get("quantization_config") or config.get("compression_config")
    given = given if isinstance(given, Mapping) else {}
    if kind == PLANAR:
        return _planar({**given, **{key: value for key, value in quant_config.items() if value is not None}})
    return _awq({**quant_config, **given}) if kind == AWQ else _compressed(given)


def read_settings(kind: str, config: Mapping[str, Any], own: Mapping[str, Any], tensors: Tensors) -> QuantizeConfig:
    """`settings_of` with the group size that the tensors have. Raises BadCheckpoint for tensors that do not fit each other."""
    settings = settings_of(kind, config, own)
    names = neighbour_names(tensors, kind)
    if not names:
        raise BadCheckpoint(f"Its settings say {kind}, but the files hold no such weights. {_AGAIN}")
    layouts = [neighbour_layout(name, tensors, settings) for name in names]
    sizes, widths = {each.group_size(settings.group_size) for each in layouts}, sorted({each.bits for each in layouts})
    if len(sizes) == 1:
        settings = replace(settings, group_size=sizes.pop())
    return settings if widths == [settings.bits] else replace(settings, bits=widths[-1], mixed_bits=tuple(widths))


def width_in_memory(bits: int) -> int:
    """Bits of a number once it is read: 5, 6 and 7 have no layout of GPTQ's, and are kept as 8."""
    return bits if bits in BITS else 8


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
    if config.checkpoint_format == PLANAR:
        return f"GPTQ {config.summary} (gptq_p)"
    parts = [f"compressed-tensors W{config.bits}A16 {group}"] + ["act-order"] * config.desc_act
    return ", ".join(parts + ["asymmetric"] * (not config.sym))


def neighbour_names(tensors: Iterable[str], kind: str) -> list[str]:
    """Names of the packed layers, sorted."""
    part = ".weight_packed" if kind == COMPRESSED else ".qweight"
    return sorted(name.removesuffix(part) for name in tensors if name.endswith(part))


def neighbour_layout(name: str, tensors: Tensors, config: QuantizeConfig) -> Layout:
    """The layer `name` as GPTQ would hold it. Raises BadCheckpoint where its tensors do not fit each other."""
    own = config.checkpoint_format != COMPRESSED
    wanted = ("qweight", "qzeros", "scales") if own else ("weight_packed", "weight_scale")
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
    bits = config.bits
    if config.checkpoint_format == PLANAR:
        groups, out = shapes[scales]
        words = shapes["qzeros"][1] if len(shapes["qzeros"]) == 2 else 0
        bits = words * 32 // out if out and words * 32 % out == 0 else 0
        in_features = shapes[weight][0] * 32 // max(1, bits)
        fits = bits in PLANES and out % 32 == 0 and shapes[weight] == (in_features * bits // 32, out) and in_features % 32 == 0
        fits = fits and shapes["qzeros"][0] == groups and types["qzeros"] == "I32"
        fits = fits and shapes.get("g_idx", (in_features,)) == (in_features,) and types.get("g_idx", "I32") == "I32"
    elif config.checkpoint_format == AWQ:
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
    has_order = "weight_g_idx" in shapes or "g_idx" in shapes
    layout = Layout(bits, 32, in_features, out, groups, types[scales], "bias" in shapes, has_order)
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
    parts = ("qweight", "qzeros", "scales", "g_idx", "bias", "weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx")
    return {part: tensors[f"{name}.{part}"][1] for part in parts if f"{name}.{part}" in tensors}


def _awq(given: Mapping[str, Any]) -> QuantizeConfig:
    bits, group = given.get("bits", given.get("w_bit", 4)), given.get("group_size", given.get("q_group_size", 128))
    version = str(given.get("version") or "gemm").lower()
    if bits != 4:
        raise BadQuantizeConfig(
            f"The settings say AWQ with {shown(bits)} bits; 4 bits can be read. Look for the model's -GPTQ sister."
        )
    if version != "gemm":
        raise BadQuantizeConfig(
            f"The settings say AWQ in the layout {printable(version)[:20]}; GEMM can be read. Look for the model's -GPTQ sister."
        )
    sym = bool(given.get("sym", not given.get("zero_point", True)))
    return QuantizeConfig(4, checked_group(group), False, sym, checkpoint_format=AWQ)


def _planar(given: Mapping[str, Any]) -> QuantizeConfig:
    bits, group = given.get("bits"), given.get("group_size", 128)
    words = str(given.get("pack_dtype") or "int32").removeprefix("torch.")
    if not isinstance(bits, int) or bits not in PLANES or words != "int32":
        raise BadQuantizeConfig(
            f"The settings say gptq_p with {shown(bits)} bits in words of {printable(words)[:20]}; "
            "2 to 8 bits in int32 can be read. Choose another branch of the model."
        )
    desc_act, sym = bool(given.get("desc_act")), bool(given.get("sym", True))
    return QuantizeConfig(bits, checked_group(group), desc_act, sym, checkpoint_format=PLANAR)


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
    facts = [
        (each.get("num_bits"), each.get("type", "int"), each.get("strategy"), each.get("group_size"),
         bool(each.get("symmetric", True)), each.get("actorder") in ("group", True))
        for each in weights
    ]  # fmt: skip
    if any(each != facts[0] for each in facts):
        raise BadQuantizeConfig(
            "The settings say that layers were quantised in several ways; compressed-tensors with one can be read."
        )
    bits, numbers, strategy, group, sym, ordered = facts[0]
    if bits not in _WIDTHS or numbers != "int" or strategy not in ("group", "channel", None):
        raise BadQuantizeConfig(
            f"The settings say compressed-tensors with {shown(bits)} bits ({printable(str(numbers))[:20]}) by "
            f"{printable(str(strategy))[:20]}; whole numbers of 4 or 8 bits by group or channel can be read."
        )
    group = -1 if strategy == "channel" or group is None else checked_group(group)
    return QuantizeConfig(bits, group, ordered, sym, checkpoint_format=COMPRESSED)


def _shown(shape: Iterable[int]) -> str:
    return "×".join(map(str, shape)) or "one number"
