"""How a GPTQ model was quantised: read from a folder's JSON files and checked against its tensors.

The facts are in quantize_config.json (AutoGPTQ), in config.json's quantization_config
(Transformers, GPTQModel), in both or in neither, and they can be wrong. The tensors are
right: a value that differs from them is corrected, and `notes` says so. A byte order mark (BOM)
at the start of a JSON file is accepted (`read_json`).
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import BadQuantizeConfig
from .folder_files import read_json
from .safetensors_header import TensorInfo, read_int32

BITS = (2, 3, 4, 8)


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
    notes: tuple[str, ...] = field(default=(), compare=False)  # what was wrong in the files

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "QuantizeConfig":
        """From either file's dictionary. Raises BadQuantizeConfig for values that no loader accepts."""
        bits = values.get("bits", values.get("w_bit"))
        if not isinstance(bits, int) or bits not in BITS:
            raise BadQuantizeConfig(
                f"bits is {bits!r} in the quantisation settings; it must be 2, 3, 4 or 8. Correct the file, or download it again."
            )
        group = values.get("group_size")
        if group is None:
            group = -1 if "quant_method" not in values else 128  # AutoGPTQ's default, and the others'
        if not isinstance(group, int) or (group != -1 and group <= 0):
            raise BadQuantizeConfig(
                f"group_size is {group!r} in the quantisation settings; it must be -1 or a positive number of weights. "
                "Correct the file, or download it again."
            )
        form = str(values.get("checkpoint_format") or values.get("format") or "gptq").lower()
        if values.get("is_marlin_format"):
            form = "marlin"
        meta = values.get("meta") if isinstance(values.get("meta"), Mapping) else {}
        assert isinstance(meta, Mapping)
        damp = values.get("damp_percent", meta.get("damp_percent"))
        dataset, quantizer = values.get("dataset"), meta.get("quantizer")
        return cls(
            bits=bits,
            group_size=group,
            desc_act=bool(values.get("desc_act", "quant_method" not in values and bits == 4 and "group_size" not in values)),
            sym=bool(values.get("sym", True)),
            checkpoint_format=form,
            damp_percent=float(damp) if isinstance(damp, (int, float)) else None,
            dataset=dataset if isinstance(dataset, str) else None,
            quantizer=", ".join(map(str, quantizer)) if isinstance(quantizer, list) else quantizer,
            weights_name=values.get("model_file_base_name") or None,
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
                notes.append(f"{key} is {from_file[key]} in quantize_config.json and {in_config[key]} in config.json")
        try:
            config = cls.from_json(merged)
        except BadQuantizeConfig as error:
            if not tensors:
                raise
            notes.append(f"read from the tensors: {error}")
            config, is_guess = cls(bits=4), True
        if tensors:
            config = _check(config, tensors, notes, is_guess)
        return dataclasses.replace(config, notes=tuple(notes))

    @property
    def summary(self) -> str:
        """'4-bit, group 32, act-order'."""
        group = "no group" if self.group_size == -1 else f"group {self.group_size}"
        parts = [f"{self.bits}-bit", group] + ["act-order"] * self.desc_act + ["asymmetric"] * (not self.sym)
        return ", ".join(parts)


def _check(
    config: QuantizeConfig,
    tensors: Mapping[str, tuple[Path, TensorInfo]],
    notes: list[str],
    is_guess: bool,  # no file says what `config` says: nothing to note where the tensors differ
) -> QuantizeConfig:
    layers = [name[: -len(".qweight")] for name in tensors if name.endswith(".qweight")]
    layers = [name for name in layers if f"{name}.scales" in tensors and f"{name}.qzeros" in tensors]
    if not layers:
        return config
    seen_bits, seen_groups = set(), set()
    for name in layers:
        rows = tensors[f"{name}.qweight"][1].shape[0]
        groups, columns = tensors[f"{name}.scales"][1].shape
        bits = 32 * tensors[f"{name}.qzeros"][1].shape[1] / columns
        seen_bits.add(bits)
        if bits in BITS:
            in_features = int(rows * 32 // bits)
            fits = config.group_size > 0 and math.ceil(in_features / config.group_size) == groups
            seen_groups.add(config.group_size if fits else -1 if groups == 1 else math.ceil(in_features / groups))
    bits_found = min(seen_bits, key=lambda each: (each != config.bits, each))
    if bits_found not in BITS:
        raise BadQuantizeConfig(f"The tensors of {layers[0]} do not have the shapes of 2, 3, 4 or 8-bit GPTQ weights.")
    if bits_found != config.bits:
        notes.append(f"the settings say {config.bits} bits, the tensors have {int(bits_found)}")
        config = dataclasses.replace(config, bits=int(bits_found))
    if len(seen_groups) == 1 and (group := seen_groups.pop()) != config.group_size:
        if not is_guess:
            notes.append(f"the settings say group_size {config.group_size}, the tensors have {group}")
        config = dataclasses.replace(config, group_size=group)
    first = min(layers)
    if (stored := tensors.get(f"{first}.g_idx")) is not None and config.group_size != -1:
        g_idx = read_int32(*stored)
        unsorted = any(a > b for a, b in itertools.pairwise(g_idx))
        if unsorted and not config.desc_act:
            notes.append("the settings say no act-order, the tensors have it")
            config = dataclasses.replace(config, desc_act=True)
    return _check_zeros(config, read_int32(*tensors[f"{first}.qzeros"]), notes)


def _check_zeros(config: QuantizeConfig, words: tuple[int, ...], notes: list[str]) -> QuantizeConfig:
    middle = 1 << (config.bits - 1)
    repeated = {form: _repeated(middle - offset, config.bits) for form, offset in (("gptq", 1), ("gptq_v2", 0))}
    unsigned = [word & 0xFFFFFFFF for word in words]
    for form, pattern in repeated.items():
        if all(word == pattern[at % len(pattern)] for at, word in enumerate(unsigned)):
            if form != config.checkpoint_format and config.checkpoint_format in repeated:
                notes.append(f"the settings say format {config.checkpoint_format}, the tensors are {form}")
                return dataclasses.replace(config, checkpoint_format=form, sym=True)
            return dataclasses.replace(config, sym=True)
    if config.sym and config.checkpoint_format in repeated:
        notes.append("the settings say symmetric, the tensors are not")
        config = dataclasses.replace(config, sym=False)
    return config


def _repeated(value: int, bits: int) -> list[int]:
    """`value` packed 32 times, low bits first: `bits` words."""
    stream = sum(value << (bits * at) for at in range(32))
    return [(stream >> (32 * at)) & 0xFFFFFFFF for at in range(bits)]
