"""AutoGPTQ: the library that made these models, where it can still be imported, else GPTQModel, its maintained successor.

It comes after Transformers in the order: auto-gptq has had no release since 2024 and cannot work with transformers 5, and
GPTQModel compiles its kernels for a GPU at their first use.
"""

import contextlib
import importlib
import logging
import os
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ...core.errors import BadParameter, GptqWebuiError, LoadFailed, NotEnoughMemory
from ...core.foreign_errors import in_words, trace
from ...core.models import LocalModel, tensors_of
from ...core.units import format_bytes
from ..contract import superhot
from ..contract.base import Loader, LoadProgress, Refusal, Remark
from ..contract.options import option, require_choice, require_context
from ..contract.refusals import not_in_gptq_layout, unreadable
from ..contract.standard_folder import standard_folder, tied_embedding
from ..machine import memory_fit
from ..machine.capabilities import Machine
from ..machine.memory_release import free_memory
from ..pretrained import gptqmodel_kernels
from ..pretrained.pretrained_model import PretrainedModel
from ..text.tokenizer import read_tokenizer

log = logging.getLogger(__name__)

_KERNELS = ("torch", "triton", "exllama_v2", "marlin", "machete", "torch_int8", "torch_fused", "torch_aten", "bitblas")
_BACKENDS = ("auto", "auto_gptq", "gptqmodel", *_KERNELS)
_COMPILED = ("auto", "gptqmodel", "exllama_v2", "marlin", "machete")  # on a GPU, these are compiled first


@dataclass(frozen=True)
class AutoGPTQOptions:
    context_tokens: int = option(0, "Context length", "Tokens the model keeps in view; 0 chooses what fits, up to 8192.")
    backend: str = option(
        "auto",
        "Backend",
        "auto: auto-gptq if it can be imported, else GPTQModel, on a GPU with its Triton kernel, which needs no compiling. "
        "gptqmodel: it chooses its kernel. A kernel's name is GPTQModel's.",
        _BACKENDS,
    )
    device: str = option("auto", "Device", "auto uses the GPU if there is one.", ("auto", "cpu", "cuda"))
    dtype: str = option("auto", "Number format", "auto: what the kernel is best at.", ("auto", "fp16", "bf16", "fp32"))
    use_triton: bool = option(False, "Triton", "auto-gptq only: compute with Triton.")
    disable_exllama: bool = option(False, "No ExLlama kernel", "auto-gptq only.")
    disable_exllamav2: bool = option(False, "No ExLlamaV2 kernel", "auto-gptq only.")

    def __post_init__(self) -> None:
        require_context("context_tokens", self.context_tokens)
        require_choice("backend", self.backend, _BACKENDS)
        require_choice("device", self.device, ("auto", "cpu", "cuda"))
        require_choice("dtype", self.dtype, ("auto", "fp16", "bf16", "fp32"))

    def demand(self, model: LocalModel, gpu: bool) -> memory_fit.Demand:
        wide = self.dtype == "fp32"
        return memory_fit.Demand(
            self.context_tokens, number_bytes=4 if wide else 2, wide=wide, on_gpu=gpu and self.device != "cpu"
        )


class AutoGPTQLoader(Loader):
    name: ClassVar[str] = "autogptq"
    options: ClassVar[type] = AutoGPTQOptions
    reason: ClassVar[str] = "opens it with the kernels of AutoGPTQ or its successor"
    context_option: ClassVar[str] = "context_tokens"

    def refusal(self, model: LocalModel, options: AutoGPTQOptions) -> Refusal | None:
        machine = self._machine()
        wrong = unreadable(model) or not_in_gptq_layout(model)
        if wrong is not None:
            return wrong
        if model.quantize is None:
            return Refusal("it opens GPTQ models; this one is not quantised")
        if superhot.compression(model) > 1:
            return Refusal(
                "its context is stretched by code in its folder (SuperHOT), which is not run", "use the loader transformers"
            )
        library, missing = _library(machine, options)
        if missing is not None:
            return missing
        quantize = model.quantize
        if library == "gptqmodel" and not quantize.sym and quantize.checkpoint_format == "gptq":
            return Refusal(
                "GPTQModel refuses asymmetric models in the format gptq", "use the loader transformers, which reads them"
            )
        if library == "auto_gptq" and quantize.checkpoint_format != "gptq":
            return Refusal(f"auto-gptq reads the format gptq only; this model is in {quantize.checkpoint_format}")
        if options.device == "cuda" and not machine.cuda:
            return Refusal("there is no GPU that torch can use", "choose the device auto or cpu")
        if library == "gptqmodel" and _on_gpu(machine, options) and _backend(machine, options, quantize.bits) in _COMPILED:
            return gptqmodel_kernels.refusal(machine, "choose the backend triton or torch")
        return None

    def remark(self, model: LocalModel, options: AutoGPTQOptions) -> Remark | None:
        machine = self._machine()
        library, _missing = _library(machine, options)
        bits = model.quantize.bits if model.quantize is not None else 16
        if library == "gptqmodel" and _on_gpu(machine, options) and _backend(machine, options, bits) in _COMPILED:
            return gptqmodel_kernels.remark()
        return Remark("with auto-gptq 0.7, which is no longer maintained" if library == "auto_gptq" else "with GPTQModel")

    def demand(self, model: LocalModel, options: AutoGPTQOptions, gpu: bool) -> memory_fit.Demand:
        return options.demand(model, gpu)

    def load(self, model: LocalModel, options: AutoGPTQOptions, progress: LoadProgress) -> PretrainedModel:
        machine = self._machine()
        library, missing = _library(machine, options)
        if missing is not None:
            raise LoadFailed(str(missing))
        progress(0.02, "Starting torch and " + {"auto_gptq": "auto-gptq", "gptqmodel": "GPTQModel"}[library])
        import torch

        device = torch.device("cuda" if torch.cuda.is_available() and options.device != "cpu" else "cpu")
        tokenizer = read_tokenizer(model)
        kernel, dtype = _kernel(model, options, library, device, machine)
        memory_fit.require_memory(model, device, dtype)
        open_folder = _open_auto_gptq if library == "auto_gptq" else _open_gptqmodel
        hf: Any = None
        try:
            with standard_folder(model) as folder, _quiet():
                progress(0.15, f"Reading {format_bytes(model.size_bytes)} of weights")
                hf = open_folder(str(folder), kernel, dtype, device, options)
            notes = _retie(hf, model)
            progress(0.95, "Fitting the conversation into the memory")
            asks = replace(options.demand(model, device.type == "cuda"), number_bytes=dtype.itemsize)
            context, reason = memory_fit.fit_context(model, asks, memory_fit.available_bytes(device))
        except BaseException as error:
            hf = None
            traceback.clear_frames(error.__traceback__)  # they hold tensors
            free_memory(device)
            if isinstance(error, GptqWebuiError) or not isinstance(error, Exception):
                raise
            raise _in_words(error, model, library) from error
        hf.config.name_or_path = str(model.folder)
        used = f"Computed by {_used_kernel(hf)} of {'auto-gptq' if library == 'auto_gptq' else 'GPTQModel'}."
        from ...gptq.transformers_stepper import TransformersStepper

        progress(1.0, "Ready")
        hf = hf.eval()
        return PretrainedModel(model, hf, TransformersStepper(hf), tokenizer, context, reason, (used, *notes), str(device))


def _library(machine: Machine, options: AutoGPTQOptions) -> tuple[str, Refusal | None]:
    """("auto_gptq" or "gptqmodel", why it cannot be used)."""
    for package in ("torch", "transformers", "accelerate"):
        if not machine.has(package):
            return "", Refusal(f"the package {package} is not installed", f"pip install {package}")
    old = Refusal(
        f"auto-gptq {machine.versions.get('auto_gptq', '')} cannot work with transformers {machine.versions['transformers']}",
        'pip install "gptq-webui[autogptq]" for GPTQModel, or give auto-gptq an environment of its own',
    )
    works = machine.has("auto_gptq") and machine.major("transformers") < 5
    if options.backend == "auto_gptq":
        if not machine.has("auto_gptq"):
            return "", Refusal("the package auto-gptq is not installed", "choose the backend auto")
        return "auto_gptq", None if works else old
    if options.backend == "auto" and works:
        return "auto_gptq", None
    if machine.has("gptqmodel"):
        return "gptqmodel", None
    if machine.has("auto_gptq") and not works:
        return "", old
    return "", Refusal("neither auto-gptq nor GPTQModel is installed", 'pip install "gptq-webui[autogptq]"')


def _on_gpu(machine: Machine, options: AutoGPTQOptions) -> bool:
    return machine.cuda and options.device != "cpu"


def _backend(machine: Machine, options: AutoGPTQOptions, bits: int) -> str:
    """The backend that GPTQModel uses on a GPU."""
    return (gptqmodel_kernels.at_once(machine, bits) or "auto") if options.backend == "auto" else options.backend


def _kernel(model: LocalModel, options: AutoGPTQOptions, library: str, device: Any, machine: Machine) -> tuple[str, Any]:
    """(kernel, dtype). On a processor auto-gptq fails in fp16, and GPTQModel's own choice for 8 bits is 15 times too slow."""
    import torch

    named = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}.get(options.dtype)
    bits = model.quantize.bits if model.quantize is not None else 16
    asked = _backend(machine, options, bits) if library == "gptqmodel" and device.type == "cuda" else options.backend
    kernel = asked if asked in _KERNELS else "auto"
    if device.type == "cuda":
        return kernel, named or torch.float16
    if library == "auto_gptq":
        if named == torch.float16:
            raise BadParameter("auto-gptq cannot compute in fp16 on the processor. Choose the number format auto or fp32.")
        return kernel, named or torch.float32
    if kernel == "auto" and bits == 8:
        kernel = "torch_int8"
    return kernel, named or torch.bfloat16


def _open_gptqmodel(folder: str, kernel: str, dtype: Any, device: Any, options: AutoGPTQOptions) -> Any:
    if (os.cpu_count() or 1) <= 4:  # its own guess asks for more workers than two cores can serve, and fails
        os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    library = importlib.import_module("gptqmodel")
    backend = library.BACKEND("auto" if kernel == "auto" else f"gptq_{kernel}")
    loaded = library.GPTQModel.load(folder, device=str(device), backend=backend, dtype=dtype, trust_remote_code=False)
    return loaded.model


def _open_auto_gptq(folder: str, kernel: str, dtype: Any, device: Any, options: AutoGPTQOptions) -> Any:
    library = importlib.import_module("auto_gptq")
    loaded = library.AutoGPTQForCausalLM.from_quantized(
        folder,
        device=str(device) if device.type == "cpu" else f"cuda:{device.index or 0}",
        torch_dtype=dtype,
        use_safetensors=True,
        use_triton=options.use_triton,
        disable_exllama=True if options.disable_exllama or device.type == "cpu" else None,
        disable_exllamav2=options.disable_exllamav2 or device.type == "cpu",
        trust_remote_code=False,
    )
    return loaded.model


def _retie(hf: Any, model: LocalModel) -> tuple[str, ...]:
    """auto-gptq leaves a tied model's embedding unset (zeros, or what lay in the memory) and says nothing: read it again."""
    tensors = tensors_of(model.weights)
    name = tied_embedding(tensors)
    if name is None:
        return ()
    import torch
    from safetensors import safe_open

    weight, head = hf.get_input_embeddings().weight, hf.get_output_embeddings().weight
    with safe_open(tensors[name][0], framework="pt") as file, torch.no_grad():
        right = file.get_tensor(name).to(weight.device, weight.dtype)
        if torch.equal(weight, right) and torch.equal(head, right):
            return ()
        weight.copy_(right)
        head.copy_(right)
    return ("Its embedding was read again: the library leaves tied ones unset.",)


def _used_kernel(hf: Any) -> str:
    """The class of the packed layers: 'MarlinLinear', 'QuantLinear (exllamav2)'."""
    for module in hf.modules():
        kind = type(module)
        if kind.__module__.startswith(("gptqmodel.", "auto_gptq.")) and not list(module.children()):
            return kind.__name__ if kind.__name__ != "QuantLinear" else f"QuantLinear ({kind.__module__.rpartition('_')[2]})"
    return "its own layers"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """GPTQModel draws progress bars and logos on the terminal while it loads."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def _in_words(error: Exception, model: LocalModel, library: str) -> LoadFailed:
    name = "auto-gptq" if library == "auto_gptq" else "GPTQModel"
    if type(error).__name__ in ("OutOfMemoryError", "MemoryError") or "out of memory" in str(error).lower():
        return NotEnoughMemory(
            f"There is not enough memory for {model.name} ({format_bytes(model.size_bytes)}). "
            "Close other programs, or choose a smaller branch (fewer bits, larger group)."
        )
    log.error("%s cannot open %s\n%s", name, model.name, trace(error))
    return LoadFailed(f"{name} cannot open {model.name}: {in_words(error)}. Use the loader transformers.")
