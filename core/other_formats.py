"""Names of the formats that are neither GPTQ nor 16-bit: a list shows FP8 weights as FP8, not as 16-bit."""

from collections.abc import Mapping
from typing import Any

from .folder_files import printable

GPTQ_P_BITS = (5, 6, 7)  # widths that exist only in GPTQModel's planar format
_SAME_BITS = (2, 4, 8)  # widths whose planar words are those of gptq_v2 (GPTQModel 7.7, utils/planar_packing.py)
_NAMES = {
    "aqlm": "AQLM", "bitnet": "BitNet", "bitsandbytes": "bitsandbytes", "compressed-tensors": "compressed-tensors",
    "eetq": "EETQ", "fbgemm_fp8": "FP8", "finegrained_fp8": "FP8", "fp8": "FP8", "fp_quant": "FP-Quant", "higgs": "HIGGS",
    "hqq": "HQQ", "modelopt": "ModelOpt", "mxfp4": "MXFP4", "quanto": "Quanto", "quark": "Quark", "spqr": "SpQR",
    "torchao": "torchao", "vptq": "VPTQ",
}  # fmt: skip
_OF_DTYPE = {"F32": "32-bit", "F64": "64-bit", "F8_E4M3": "FP8", "F8_E5M2": "FP8", "I8": "8-bit", "U8": "8-bit"}
_LONGEST = 40  # characters


def name_of_method(config: Mapping[str, Any]) -> str:
    """'FP8', 'bitsandbytes 4-bit', 'MLX 4-bit': what config.json says of the weights; "" if it says nothing."""
    quantization = config.get("quantization_config") or config.get("compression_config")
    if not isinstance(quantization, Mapping):
        mlx = config.get("quantization")
        return _with_bits("MLX", mlx.get("bits")) if isinstance(mlx, Mapping) and "group_size" in mlx else ""
    method = str(quantization.get("quant_method") or "")
    if method.lower() in ("", "bitsandbytes"):
        for bits in (4, 8):
            if quantization.get(f"load_in_{bits}bit") is True:
                return _with_bits("bitsandbytes", bits)
    if not method:
        return "quantised by an unknown method"
    name = _NAMES.get(method.lower()) or printable(method)[:_LONGEST]
    return _with_bits(name, quantization.get("bits"))


def name_of_gptq_p(settings: Mapping[str, Any]) -> str:
    """'GPTQ 5-bit (gptq_p)' if the settings of a GPTQ model name that format or its bits, else ""."""
    name = str(settings.get("checkpoint_format") or settings.get("format") or "").lower()
    bits = settings.get("bits")
    if name == "gptq_p" and bits in _SAME_BITS and all(each in _SAME_BITS for each in _bits_of_layers(settings)):
        return ""  # read as gptq_v2
    if name != "gptq_p" and not (isinstance(bits, int) and bits in GPTQ_P_BITS):
        return ""
    return f"{_with_bits('GPTQ', bits)} (gptq_p)"


def _bits_of_layers(settings: Mapping[str, Any]) -> list[Any]:
    """The widths that GPTQModel's `dynamic` gives to layers of their own."""
    dynamic = settings.get("dynamic")
    layers = dynamic.values() if isinstance(dynamic, Mapping) else ()
    return [each["bits"] for each in layers if isinstance(each, Mapping) and "bits" in each]


def name_of_dtype(dtype: str) -> str:
    """Of unquantised weights, from safetensors' name of their type: '16-bit' for F16 and BF16."""
    return _OF_DTYPE.get(dtype, "16-bit")


def _with_bits(name: str, bits: object) -> str:
    return f"{name} {bits}-bit" if isinstance(bits, int) and 0 < bits <= 64 else name
