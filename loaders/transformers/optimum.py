"""The kernel `optimum` of the loader transformers: transformers' own GPTQ integration, through optimum and GPTQModel."""

import logging
import os
from typing import Any

from ...core.errors import LoadFailed
from ...core.foreign_errors import in_words, trace
from ...core.models import LocalModel
from ...core.old_names import successor_of
from ..contract.base import Refusal, Remark
from ..contract.standard_folder import config_of
from ..machine.capabilities import Machine, look
from ..pretrained import gptqmodel_kernels

log = logging.getLogger(__name__)


def refusal(model: LocalModel, machine: Machine) -> Refusal | None:
    """Why transformers' own integration cannot open a model that the native kernel can."""
    if model.quantize is None:
        return None  # a 16-bit model has no GPTQ kernel
    successor = successor_of(config_of(model))
    if successor is not None and successor.tensors:
        return Refusal("the kernel optimum does not read files with the names of 2023", "choose the kernel native")
    for package in ("optimum", "gptqmodel"):
        if not machine.has(package):
            return Refusal(f"the kernel optimum needs the package {package}", 'pip install "gptq-webui[optimum]"')
    if not model.quantize.sym and model.quantize.checkpoint_format == "gptq":
        return Refusal("GPTQModel refuses asymmetric models in the format gptq", "choose the kernel native")
    if machine.cuda and gptqmodel_kernels.at_once(machine, model.quantize.bits) is None:
        return gptqmodel_kernels.refusal(machine, "choose the kernel native")
    return None


def remark(model: LocalModel, machine: Machine) -> Remark | None:
    if not machine.cuda or model.quantize is None:
        return None
    at_once = gptqmodel_kernels.at_once(machine, model.quantize.bits)
    return Remark("with GPTQModel's Triton kernel") if at_once else gptqmodel_kernels.remark()


def load(
    model: LocalModel,
    *,
    dtype: Any,
    device_map: Any,
    max_memory: dict[int | str, int] | None = None,
    attn_implementation: str | None = None,
    rope: Any = None,
    progress: Any = None,
    trust_remote_code: bool = False,
) -> tuple[Any, tuple[str, ...]]:
    """As gptq/checkpoint.py's `load`, with transformers' own layers. Raises LoadFailed with a sentence."""
    if (os.cpu_count() or 1) <= 4:  # GPTQModel's own guess asks for more workers than two cores can serve, and fails
        os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    import torch
    from transformers import AutoModelForCausalLM

    from ...gptq import config_reading, transformers_patch
    from ...gptq.rope import apply
    from ...gptq.weights_index import weights_source

    assert model.quantize is not None
    config = config_reading.read_config(model, trust_remote_code)
    notes = [*apply(config, rope)] if rope is not None else []
    settings = config_of(model)["quantization_config"]
    on_cpu = isinstance(device_map, dict) and {str(each) for each in device_map.values()} == {"cpu"}
    if on_cpu and model.quantize.bits == 8:  # its own choice is 15 times slower; this kernel wants bf16
        settings, dtype = {**settings, "backend": "gptq_torch_int8"}, torch.bfloat16
    elif not on_cpu and (kernel := gptqmodel_kernels.at_once(look(), model.quantize.bits)) is not None:
        settings = {**settings, "backend": f"gptq_{kernel}"}
    config.quantization_config = settings
    source = weights_source(model)
    config.transformers_weights = source.weights
    notes += [source.note] if source.note else []
    options: dict[str, Any] = {"max_memory": max_memory} if max_memory else {}
    if attn_implementation:
        options["attn_implementation"] = attn_implementation
    try:
        with transformers_patch.original():
            hf = AutoModelForCausalLM.from_pretrained(
                source.folder,
                config=config,
                dtype=dtype,
                device_map=device_map,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                **options,
            )
    except Exception as error:
        if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
            raise
        log.error("transformers' own GPTQ integration cannot open %s\n%s", model.name, trace(error))
        raise LoadFailed(
            f"transformers' own GPTQ integration cannot open {model.name}: {in_words(error)}. Choose the kernel native."
        ) from error
    vars(hf)["weights_source"] = source  # its links must live as long
    return hf.eval(), (*notes, "Computed by transformers' own GPTQ integration (optimum and GPTQModel).")
