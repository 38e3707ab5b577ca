"""How a GPTQ model was quantised: read from a folder's JSON files and checked against its tensors.

The facts are in quantize_config.json (AutoGPTQ), in config.json's quantization_config
(Transformers, GPTQModel), in both or in neither, and they can be wrong. The tensors are
right: a value that differs from them is corrected, and `notes` says so. A byte order mark (BOM)
at the start of a JSON file is accepted (`read_json`).
"""

import dataclasses
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .config_numbers import is_number, shown
from .errors import BadQuantizeConfig
from .folder_files import printable, read_json
from .packed_layout import BITS, PARTS, Layout, layout_of, packed_names
from .safetensors_header import TensorInfo, read_integers

WORDS = "gptq_words"  # zeros as format gptq of GPTQModel holds them, see `zeros_format`
WORD_OFFSETS = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}  # by bits, what is subtracted from a word of 32
_AUTO_ROUND = ("auto-round", "auto_round", "intel/auto-round")
_V2_OF_AUTO_ROUND = ("auto_round", "auto_round:gptqmodel")  # auto_round 0.16: inference/backend.py, GPTQ_FORMAT_NO_ZP

_LARGEST_GROUP = 2**31 - 1
_LONGEST_NAME = 40  # of a format
_LONGEST_WRITER = 200  # of the programs that wrote the weights, with their versions
_OFF = ("", "false", "no", "off", "0", "none", "null")  # texts that some program wrote for False


@dataclass(frozen=True)
class QuantizeConfig:
    bits: int  # per weight
    group_size: int = -1  # weights that share one scale; -1 for a whole column
    desc_act: bool = False  # act-order: columns were quantised by falling activation
    sym: bool = True  # the zero point is the middle of the range
    checkpoint_format: str = "gptq"  # gptq stores zero - 1, gptq_v2 stores zero
    damp_percent: float | None = None
    dataset: str | None = None  # calibration text
    quantizer: str | None = None  # program and version that wrote the weights
    weights_name: str | None = None  # model_file_base_name: the weights file without its ending
    pack_dtype: str | None = None  # int8, int16 or int64: the type of the words; None for int32
    mixed_bits: tuple[int, ...] = ()  # of its layers, where they differ
    notes: tuple[str, ...] = field(default=(), compare=False)  # what was wrong in the files

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "QuantizeConfig":
        """From either file's dictionary. Raises BadQuantizeConfig for values that no loader accepts."""
        bits = values.get("bits", values.get("w_bit"))
        if not isinstance(bits, int) or bits not in BITS:
            raise BadQuantizeConfig(
                f"bits is {shown(bits)} in the quantisation settings; it must be 2, 3, 4 or 8. "
                "Correct the file, or download it again."
            )
        group = values.get("group_size")
        if group is None:
            group = -1 if "quant_method" not in values else 128  # AutoGPTQ's default, and the others'
        form = _name(values.get("checkpoint_format") or values.get("format") or "gptq")
        if form == "gptq_p" and bits in (2, 4, 8):
            form = "gptq_v2"  # planar words of these widths are the same, and zeros are stored as they are
        if is_auto_round(values):
            packing = _name(values.get("packing_format") or "auto_round:auto_gptq")
            form = "gptq_v2" if packing in _V2_OF_AUTO_ROUND else "gptq"
        if _switch(values.get("is_marlin_format")):
            form = "marlin"
        pack_dtype = _name(values.get("pack_dtype") or "int32").removeprefix("torch.")
        meta = values.get("meta") if isinstance(values.get("meta"), Mapping) else {}
        assert isinstance(meta, Mapping)
        damp = values.get("damp_percent", meta.get("damp_percent"))
        dataset, quantizer = values.get("dataset"), meta.get("quantizer")
        quantizer = ", ".join(map(str, quantizer)) if isinstance(quantizer, list) else quantizer
        return cls(
            bits=bits,
            group_size=checked_group(group),
            desc_act=_switch(values.get("desc_act", "quant_method" not in values and bits == 4 and "group_size" not in values)),
            sym=_switch(values.get("sym", True)),
            checkpoint_format=form,
            damp_percent=float(damp) if is_number(damp) else None,
            dataset=dataset if isinstance(dataset, str) else None,
            quantizer=printable(quantizer)[:_LONGEST_WRITER] if isinstance(quantizer, str) else None,
            weights_name=values.get("model_file_base_name") or None,
            pack_dtype=None if pack_dtype == "int32" else pack_dtype,
        )

    def to_json(self) -> dict[str, Any]:
        """As AutoGPTQ 0.7 writes quantize_config.json."""
        return {
            "bits": self.bits,
            "group_size": self.group_size,
            "damp_percent": self.damp_percent if self.damp_percent is not None else 0.01,
            "desc_act": self.desc_act,
            "static_groups": False,
            "sym": self.sym,
            "true_sequential": False,  # gptq/quantize.py takes its Hessians from the unquantised model
            "model_name_or_path": None,
            "model_file_base_name": self.weights_name,
            "quant_method": "gptq",
            "checkpoint_format": self.checkpoint_format,
            **({"pack_dtype": self.pack_dtype} if self.pack_dtype else {}),
        }

    @classmethod
    def read(cls, folder: Path, tensors: Mapping[str, tuple[Path, TensorInfo]] | None = None) -> "QuantizeConfig":
        """From a folder's files, checked against its `tensors` (name -> file and header entry).

        Raises BadFile for a damaged file, BadQuantizeConfig if neither the files nor the tensors say how to read the weights.
        """
        from_file = read_json(folder / "quantize_config.json")
        in_config = read_json(folder / "config.json").get("quantization_config")
        in_config = in_config if isinstance(in_config, dict) else {}
        notes: list[str] = []
        is_guess = False
        merged = {**in_config, **{key: value for key, value in from_file.items() if value is not None}}
        for key in ("bits", "group_size", "desc_act", "sym"):
            if key in from_file and key in in_config and from_file[key] != in_config[key]:
                own, other = shown(from_file[key]), shown(in_config[key])
                notes.append(f"{key} is {own} in quantize_config.json and {other} in config.json")
        try:
            config = cls.from_json(merged)
        except BadQuantizeConfig as error:
            if not tensors:
                raise
            notes.append(f"read from the tensors: {str(error).rstrip('.')}")
            config, is_guess = cls._without_bad(merged), True
        if tensors:
            config = _check(config, tensors, notes, is_guess)
        return dataclasses.replace(config, notes=tuple(notes))

    @classmethod
    def _without_bad(cls, values: Mapping[str, Any]) -> "QuantizeConfig":
        """From settings of which bits, group_size or both are no such numbers."""
        values = {"desc_act": False, **values}  # if it is left out; the tensors show the order
        for good in ({**values, "bits": 4}, {**values, "group_size": -1}, {**values, "bits": 4, "group_size": -1}):
            try:
                return cls.from_json(good)
            except BadQuantizeConfig as error:
                failed = error
        raise failed

    @property
    def zeros_format(self) -> str:
        """How the zero points are stored: gptq (each less one), gptq_v2 (as they are), or WORDS.

        GPTQModel (0.9 and later) writes format gptq by subtracting one from every zero in a whole word at once, so that
        a zero of 0 borrows from its neighbour (its utils/model.py, convert_gptq_v2_to_v1_format_module). Other programs
        subtract from each number.
        """
        version = re.search(r"gptqmodel(?::(\d+)\.(\d+))?", str(self.quantizer or "").lower())
        if self.checkpoint_format != "gptq" or version is None:
            return self.checkpoint_format
        old = version[1] is not None and (int(version[1]), int(version[2])) < (0, 9)
        return self.checkpoint_format if old else WORDS

    @property
    def summary(self) -> str:
        """'4-bit, group 32, act-order'; '4- and 8-bit, …' where layers differ."""
        group = "no group" if self.group_size == -1 else f"group {self.group_size}"
        *others, last = self.mixed_bits or (self.bits,)
        bits = f"{', '.join(f'{each}-' for each in others)} and {last}-bit" if others else f"{last}-bit"
        parts = [bits, group] + ["act-order"] * self.desc_act + ["asymmetric"] * (not self.sym)
        return ", ".join(parts)


def checked_group(group: object) -> int:
    """`group` itself. Raises BadQuantizeConfig for what is neither -1 nor a number of weights that a tensor can have."""
    if not isinstance(group, int) or isinstance(group, bool) or not (group == -1 or 0 < group <= _LARGEST_GROUP):
        raise BadQuantizeConfig(
            f"group_size is {shown(group)} in the quantisation settings; it must be -1 or a positive number of weights. "
            "Correct the file, or download it again."
        )
    return group


def is_auto_round(values: Mapping[str, Any]) -> bool:
    """Whether AutoRound wrote these settings."""
    return str(values.get("quant_method") or "").lower() in _AUTO_ROUND


def _check(
    config: QuantizeConfig,
    tensors: Mapping[str, tuple[Path, TensorInfo]],
    notes: list[str],
    is_guess: bool,  # no file says what `config` says: nothing to note where the tensors differ
) -> QuantizeConfig:
    names = [name for name in packed_names(tensors) if all(f"{name}.{part}" in tensors for part in PARTS)]
    if not names:
        return config
    bits, layouts = _most_alike(names, tensors, config)
    seen_bits = sorted({each.bits for each in layouts.values()})
    if config.bits not in seen_bits and not is_guess:
        notes.append(f"the settings say {config.bits} bits, the tensors have {' and '.join(map(str, seen_bits))}")
    config = dataclasses.replace(config, bits=bits)
    config = dataclasses.replace(config, mixed_bits=tuple(seen_bits) if len(seen_bits) > 1 else ())
    word_bits = layouts[names[0]].word_bits
    config = dataclasses.replace(config, pack_dtype=None if word_bits == 32 else f"int{word_bits}")
    seen_groups = {each.group_size(config.group_size) for each in layouts.values()}
    if len(seen_groups) == 1 and (group := seen_groups.pop()) != config.group_size:
        if not is_guess:
            notes.append(f"the settings say group_size {config.group_size}, the tensors have {group}")
        config = dataclasses.replace(config, group_size=group)
    first = names[0]
    if (stored := tensors.get(f"{first}.g_idx")) is not None and config.group_size != -1:
        g_idx = read_integers(*stored)
        unsorted = any(a > b for a, b in itertools.pairwise(g_idx))
        if unsorted and not config.desc_act:
            notes.append("the settings say no act-order, the tensors have it")
            config = dataclasses.replace(config, desc_act=True)
    firsts = [next(name for name in names if layouts[name].bits == bits) for bits in seen_bits]
    return _check_zeros(config, [(layouts[name], *tensors[f"{name}.qzeros"]) for name in firsts], notes)


def _most_alike(
    names: list[str], tensors: Mapping[str, tuple[Path, TensorInfo]], config: QuantizeConfig
) -> tuple[int, dict[str, Layout]]:
    """(bits, layouts): a small layer may fit several bits; then it has those that most layers can have."""

    def read_as(bits: int) -> dict[str, Layout]:
        return {name: layout_of(name, tensors, bits, config.pack_dtype) for name in names}

    found = read_as(config.bits)
    if all(each.bits == config.bits for each in found.values()):
        return config.bits, found
    every = {config.bits: found} | {bits: read_as(bits) for bits in BITS if bits != config.bits}
    return max(every.items(), key=lambda each: sum(layout.bits == each[0] for layout in each[1].values()))


def _check_zeros(config: QuantizeConfig, stored: list[tuple[Layout, Path, TensorInfo]], notes: list[str]) -> QuantizeConfig:
    """Symmetry and format, from the zeros of one layer of each width: each is judged by its own bits."""
    forms = ("gptq", "gptq_v2")
    found = [_symmetric_form(*each, writer=config.zeros_format) for each in stored]
    if all(form is not None for form in found):
        form = found[0] if len(set(found)) == 1 else config.checkpoint_format
        if form != config.checkpoint_format and config.checkpoint_format in forms and form is not None:
            notes.append(f"the settings say format {config.checkpoint_format}, the tensors are {form}")
            return dataclasses.replace(config, checkpoint_format=form, sym=True)
        return dataclasses.replace(config, sym=True)
    if config.sym and config.checkpoint_format in forms:
        notes.append("the settings say symmetric, the tensors are not")
        config = dataclasses.replace(config, sym=False)
    return config


def _symmetric_form(layout: Layout, path: Path, zeros: TensorInfo, writer: str) -> str | None:
    """The format in which every zero is the middle of the range; None if there is none: the layer is asymmetric."""
    length = zeros.size_bytes // layout.groups
    used = (1 << layout.bits * layout.out_features) - 1  # bits; the last word may have some left over
    rows: set[int] = set()
    with path.open("rb") as file:
        file.seek(zeros.start)
        for _ in range(layout.groups):  # one at a time: a file of strangers may hold gigabytes of zeros
            rows.add(int.from_bytes(file.read(length), "little") & used)
            if len(rows) > 1:
                return None
    middle = 1 << (layout.bits - 1)
    for form in ("gptq", "gptq_v2"):
        if rows == {_row_of(middle - (form == "gptq"), layout.bits, length) & used}:
            return form
    if writer == WORDS and layout.word_bits == 64 and layout.bits in WORD_OFFSETS:
        words = _row_of(middle, layout.bits, 8) - WORD_OFFSETS[layout.bits]  # it subtracts from the lower half only
        if rows == {int.from_bytes(words.to_bytes(8, "little") * (length // 8), "little") & used}:
            return "gptq"
    return None


def _row_of(value: int, bits: int, length: int) -> int:
    """A row of `length` bytes that holds `value` everywhere, as a number: eight values fill `bits` bytes."""
    eight = sum(value << bits * at for at in range(8)).to_bytes(bits, "little")
    return int.from_bytes((eight * -(-length // bits))[:length], "little")


def _switch(value: Any) -> bool:
    """True or false, also where a program wrote it as a text."""
    return value.strip().lower() not in _OFF if isinstance(value, str) else bool(value)


def _name(value: Any) -> str:
    """A name out of the settings, as sentences show it too."""
    return printable(str(value).lower())[:_LONGEST_NAME]
