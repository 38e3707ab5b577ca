"""What the header of a file says about one packed GPTQ layer, and whether its tensors can be one.

The tensors are the truth, as far as they fit each other. What does not fit is refused here, in words, before a weight is
read: a number of the wrong type or shape would be computed with, and only the answers would show it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from .errors import BadCheckpoint
from .folder_files import printable
from .safetensors_header import TensorInfo

BITS = (2, 3, 4, 8)
PARTS = ("qweight", "qzeros", "scales")
_WORD_BITS = {"I8": 8, "I16": 16, "I32": 32, "I64": 64}  # a word holds several weights
_SCALES = ("F16", "BF16", "F32")
_AGAIN = "Download the model again."
_MOST_FEATURES = 1 << 24  # inputs or outputs of a layer: more than the largest vocabulary has words

Tensors = Mapping[str, tuple[Path, TensorInfo]]  # name -> file and header entry


@dataclass(frozen=True)
class Layout:
    """Of qweight [ceil(K*bits/word_bits), N], qzeros [G, ceil(N*bits/word_bits)], scales [G, N] and g_idx [K]."""

    bits: int
    word_bits: int  # of qweight and qzeros: 32, but for files with another pack_dtype
    in_features: int  # K
    out_features: int  # N
    groups: int  # G
    scales_dtype: str  # safetensors' name
    has_bias: bool
    has_g_idx: bool

    def group_size(self, claimed: int) -> int:
        """Weights that share a scale; `claimed` where it fits (the last group may be short), -1 for a whole column.

        Else groups of one size, or of a power of two with a short last group, if there are such.
        """
        if claimed > 0 and -(-self.in_features // claimed) == self.groups:
            return claimed
        if self.groups == 1:
            return -1
        least = -(-self.in_features // self.groups)
        power = 1 << (least - 1).bit_length()
        return power if self.in_features % self.groups and -(-self.in_features // power) == self.groups else least


def packed_names(tensors: Iterable[str]) -> list[str]:
    """Names of the layers that have a packed tensor, sorted."""
    return sorted({name.rpartition(".")[0] for name in tensors if name.rpartition(".")[2] in PARTS})


def layout_of(name: str, tensors: Tensors, bits: int, pack_dtype: str | None = None) -> Layout:
    """The layout of the layer `name`. `bits` and `pack_dtype` are what the settings claim.

    Raises BadCheckpoint for a layer with a part missing, of another type, or with shapes that no GPTQ layer has.
    """
    missing = [part for part in PARTS if f"{name}.{part}" not in tensors]
    if missing:
        raise BadCheckpoint(f"{printable(name)} has no {' and no '.join(missing)} in the files. {_AGAIN}")
    infos = {part: tensors[f"{name}.{part}"][1] for part in (*PARTS, "g_idx", "bias") if f"{name}.{part}" in tensors}
    _require_types(name, infos)
    (rows, columns), (groups, out), (zero_groups, zero_words) = (infos[part].shape for part in ("qweight", "scales", "qzeros"))
    word_bits = _WORD_BITS[infos["qweight"].dtype]
    ordered = infos.get("g_idx")
    if word_bits != 32 and not _is_claimed(word_bits, pack_dtype, bits, out, zero_words):
        raise BadCheckpoint(
            f"The weights of {printable(name)} are in words of {word_bits} bits, the settings say pack_dtype "
            f"{pack_dtype or 'nothing'} and {bits} bits: the words were cut or widened by some program. {_AGAIN}"
        )
    fitting = [each for each in BITS if out and -(-out * each // word_bits) == zero_words]
    if ordered is not None and len(fitting) > 1:
        fitting = [each for each in fitting if -(-ordered.shape[0] * each // word_bits) == rows] or fitting
    if not fitting or columns != out or zero_groups != groups or not (rows and out and groups):
        raise BadCheckpoint(
            f"The tensors of {printable(name)} do not fit each other: qweight {rows}×{columns}, "
            f"qzeros {zero_groups}×{zero_words}, scales {groups}×{out}. They do not have the shapes "
            "of 2, 3, 4 or 8-bit GPTQ weights; download the model again."
        )
    found = bits if bits in fitting else fitting[0]
    in_features = rows * word_bits // found
    if ordered is not None and ordered.shape[0] != in_features:
        if -(-ordered.shape[0] * found // word_bits) != rows:
            raise BadCheckpoint(
                f"The tensors of {printable(name)} do not fit each other: {in_features} inputs in qweight, "
                f"{ordered.shape[0]} in g_idx. {_AGAIN}"
            )
        in_features = ordered.shape[0]  # the last word is not full
    if in_features > _MOST_FEATURES or out > _MOST_FEATURES:
        raise BadCheckpoint(
            f"{printable(name)} has {in_features} inputs and {out} outputs; at most {_MOST_FEATURES} are read. {_AGAIN}"
        )
    layout = Layout(found, word_bits, in_features, out, groups, infos["scales"].dtype, "bias" in infos, ordered is not None)
    size = layout.group_size(-1)
    if groups > in_features or (size > 0 and -(-in_features // size) != groups):
        raise BadCheckpoint(
            f"{printable(name)} has {groups} groups of scales for {in_features} inputs, which no group size gives. {_AGAIN}"
        )
    return layout


def _is_claimed(word_bits: int, pack_dtype: str | None, bits: int, out: int, zero_words: int) -> bool:
    """Whether words that are not of 32 bits are meant so: the settings say it, or their bits fit no other words."""
    return pack_dtype == f"int{word_bits}" or (not pack_dtype and -(-out * bits // word_bits) == zero_words)


def _require_types(name: str, infos: Mapping[str, TensorInfo]) -> None:
    ranks = {"qweight": 2, "qzeros": 2, "scales": 2, "g_idx": 1, "bias": 1}
    for part, info in infos.items():
        if len(info.shape) != ranks[part]:
            raise BadCheckpoint(
                f"{printable(name)}.{part} has {len(info.shape)} dimensions in the file; a GPTQ layer's has "
                f"{ranks[part]}. {_AGAIN}"
            )
        floating = part in ("scales", "bias")
        if info.dtype not in (_SCALES if floating else _WORD_BITS):
            wanted = "F16, BF16 or F32" if floating else "I32"
            raise BadCheckpoint(
                f"{printable(name)}.{part} is stored as {printable(info.dtype)}; it must be {wanted}. Some program changed the "
                f"type of the numbers, and what they were cannot be told. {_AGAIN}"
            )
    if infos["qweight"].dtype != infos["qzeros"].dtype:
        raise BadCheckpoint(
            f"{printable(name)} has its qweight as {infos['qweight'].dtype} and its qzeros as {infos['qzeros'].dtype}; both are "
            f"packed in words of one type. {_AGAIN}"
        )
    bias, scales = infos.get("bias"), infos["scales"]
    if bias is not None and bias.shape[0] != scales.shape[1]:
        raise BadCheckpoint(
            f"{printable(name)} has {scales.shape[1]} outputs in its scales and {bias.shape[0]} in its bias. {_AGAIN}"
        )
