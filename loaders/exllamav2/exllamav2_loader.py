"""ExLlamaV2: a fast CUDA library for 4-bit GPTQ. Which models it can open, and how a folder is loaded with it.

It needs CUDA. Without a wheel that matches torch, it compiles itself for two minutes at its first import. Written for
exllamav2 0.3.2.
"""

import importlib
import logging
import math
import threading
import time
import traceback
from collections.abc import Callable
from types import ModuleType
from typing import Any, ClassVar

from ...core.errors import GptqWebuiError, LoadFailed, NotEnoughMemory
from ...core.folder_files import read_json
from ...core.foreign_errors import in_words, trace
from ...core.models import LocalModel
from ...core.units import format_bytes
from ..contract import superhot
from ..contract.base import Loader, LoadProgress, Refusal, Remark
from ..contract.options import gigabytes
from ..contract.refusals import not_in_gptq_layout, unreadable
from ..contract.standard_folder import standard_folder
from ..machine import memory_fit
from ..machine.capabilities import COMPILERS, Machine
from ..machine.memory_release import free_memory
from ..text.tokenizer import end_ids, read_tokenizer
from .exllamav2_model import ExLlamaV2Model, Ids
from .exllamav2_options import CACHES, ExLlamaV2Options

log = logging.getLogger(__name__)

COMPILE_S = 120.0  # 102 to 115 s were measured on one machine
_TICK_S = 1.0  # between two reports of progress
_PAGE_TOKENS = 256  # of the library's cache; its length is a multiple of it
# Those whose packed layers the library reads: it knows a few more, but with q, k and v (or gate and up) in one tensor,
# which it cannot take apart when packed (exllamav2 0.3.2, architecture.py and module.py).
ARCHITECTURES = frozenset(
    f"{name}ForCausalLM"
    for name in (
        "Llama", "Mistral", "Mixtral", "Yi", "Orion", "Qwen2", "Qwen3", "Qwen3Moe", "Gemma", "Gemma2", "Starcoder2", "Cohere",
        "Cohere2", "MiniCPM", "Index", "Granite",
    )
)  # fmt: skip
_TIED_BY_THE_LIBRARY = (
    "GemmaForCausalLM",
    "Gemma2ForCausalLM",
    "Starcoder2ForCausalLM",
    "CohereForCausalLM",
    "Cohere2ForCausalLM",
)


class ExLlamaV2Loader(Loader):
    name: ClassVar[str] = "exllamav2"
    options: ClassVar[type] = ExLlamaV2Options
    reason: ClassVar[str] = "made for 4-bit GPTQ models on a GPU"
    context_option: ClassVar[str] = "max_seq_len"

    def refusal(self, model: LocalModel, options: ExLlamaV2Options) -> Refusal | None:
        return unreadable(model) or not_in_gptq_layout(model) or _not_for_it(model) or _not_here(self._machine())

    def remark(self, model: LocalModel, options: ExLlamaV2Options) -> Remark | None:
        machine = self._machine()
        if not (machine.has("exllamav2_ext") or "exllamav2_ext" in machine.compiled):
            return Remark("would compile for about two minutes before its first load, once", COMPILE_S)
        if not _pages(machine.versions.get("flash_attn", "")) or options.no_flash_attn:
            return Remark("one answer at a time: several at once need flash-attn 2.5.7")
        return None

    def demand(self, model: LocalModel, options: ExLlamaV2Options, gpu: bool) -> memory_fit.Demand:
        return options.for_model(model).demand(model, gpu)

    def load(self, model: LocalModel, options: ExLlamaV2Options, progress: LoadProgress) -> "ExLlamaV2Model":
        given, options = options, options.for_model(model)
        remark = self.remark(model, options)
        library = _start("exllamav2", progress, remark.wait_s if remark else 0.0)
        progress(0.08, "Reading the tokenizer")
        tokenizer = read_tokenizer(model)
        context, reason = _context(model, options)
        hf_config = read_json(model.folder / "config.json")
        untie = model.architecture not in _TIED_BY_THE_LIBRARY
        loaded: Any = None
        try:
            with standard_folder(model, untie=untie) as folder:
                config = library.ExLlamaV2Config(str(folder))
                config.arch_compat_overrides(quiet=True)
                _apply(config, options, context)
                loaded = library.ExLlamaV2(config)
                cache = _load(library, loaded, options, lambda at, of: _layers(progress, at, of))
            paged = bool(_attention().has_flash_attn_with_paged) and not config.no_flash_attn
            parallel = options.max_batch_size if paged else 1
            progress(0.96, "Starting the generator")
            generator = importlib.import_module("exllamav2.generator").ExLlamaV2DynamicGenerator(
                model=loaded,
                cache=cache,
                tokenizer=Ids(len(tokenizer)),
                max_batch_size=parallel,
                max_sampling_threads=min(parallel, 4),
                filter_background_eval=False,
                paged=paged,
            )
            _settle()
        except BaseException as error:
            cache = generator = None
            if loaded is not None:
                loaded.unload()
            loaded = None
            traceback.clear_frames(error.__traceback__)  # they hold tensors
            _free()
            if isinstance(error, GptqWebuiError) or not isinstance(error, Exception):
                raise
            raise _in_words(error, model) from error
        notes = [] if paged else ["One answer is computed at a time: several at once need flash-attn 2.5.7."]
        notes += [superhot.note(options.compress_pos_emb)] if options != given else []
        ends = end_ids(tokenizer, read_json(model.folder / "generation_config.json"), hf_config)
        progress(1.0, "Ready")
        return ExLlamaV2Model(model, loaded, generator, tokenizer, context, reason, notes, parallel, ends)


def _not_for_it(model: LocalModel) -> Refusal | None:
    """What the library cannot read, wherever it runs."""
    quantize = model.quantize
    if quantize is None:
        return Refusal("it is used for 4-bit GPTQ models; this one is not quantised")
    if quantize.bits != 4:
        return Refusal(f"it reads 4-bit GPTQ only; this model has {quantize.bits} bits")
    size = quantize.group_size
    if size != -1 and (size < 32 or size & (size - 1)):
        return Refusal(f"group_size {size} is not {'a power of two' if size >= 32 else '32 or more'}, which it needs")
    if model.architecture not in ARCHITECTURES:
        return Refusal(f"it cannot read packed weights of the architecture {model.architecture or '(not named in config.json)'}")
    return None


def _not_here(machine: Machine) -> Refusal | None:
    """What is missing on this machine."""
    if not machine.has("torch"):
        return Refusal("the package torch is not installed", "pip install torch")
    if not machine.gpu:
        return Refusal("it needs a GPU, and there is none that this program may use")
    if not machine.cuda:
        return Refusal("the installed torch uses the processor only", "install a torch for your GPU")
    if not machine.has("exllamav2"):
        return Refusal("the package exllamav2 is not installed", "pip install exllamav2")
    if not machine.has("exllamav2_ext") and not machine.compilers:
        return Refusal(
            f"it would have to be compiled, which takes {COMPILERS}; not all of them are here",
            "install the exllamav2 wheel that matches your torch and CUDA, from its releases on GitHub",
        )
    return None


def _pages(version: str) -> bool:
    """Whether this flash-attn can serve several answers from one cache."""
    numbers = [int(each) for each in version.split(".") if each.isdigit()]
    return numbers >= [2, 5, 7]


def _start(name: str, progress: LoadProgress, wait_s: float) -> ModuleType:
    """Import the library, on a thread of its own so that the page sees it live. Raises LoadFailed."""
    found: list[ModuleType] = []
    failed: list[Exception] = []

    def work() -> None:
        try:
            found.append(importlib.import_module(name))
        except Exception as error:  # OSError without CUDA, RuntimeError from the compiler, ImportError from another torch
            failed.append(error)

    began = time.monotonic()
    thread = threading.Thread(target=work, name="import exllamav2", daemon=True)
    progress(0.01, "Compiling ExLlamaV2, once: about two minutes" if wait_s else "Starting ExLlamaV2")
    thread.start()
    while thread.is_alive():
        thread.join(_TICK_S)
        passed = time.monotonic() - began
        if thread.is_alive() and passed > 3 * _TICK_S:
            share = 0.06 * (1 - math.exp(-passed / COMPILE_S))
            progress(0.01 + share, f"Compiling ExLlamaV2, once: {passed:.0f} s so far, about two minutes in all")
    if failed:
        log.error("ExLlamaV2 cannot be started\n%s", trace(failed[0]))
        raise LoadFailed(
            f"ExLlamaV2 cannot be started here: {in_words(failed[0])}. Use the loader transformers, "
            "or install the exllamav2 wheel that matches your torch and CUDA."
        ) from failed[0]
    return found[0]


def _context(model: LocalModel, options: ExLlamaV2Options) -> tuple[int, str]:
    """(tokens, reason): a whole number of pages that fits beside the weights."""
    import torch

    free = sum(memory_fit.available_bytes(torch.device("cuda", at)) for at in range(torch.cuda.device_count()))
    if model.size_bytes > free:
        raise NotEnoughMemory(
            f"{model.name} needs {format_bytes(model.size_bytes)} and {format_bytes(free)} are free on the GPU. "
            "Close other programs, choose a smaller branch, or use the loader transformers, which spreads over the machine."
        )
    tokens, reason = memory_fit.fit_context(model, options.demand(model, True), free - model.size_bytes)
    return max(_PAGE_TOKENS, tokens // _PAGE_TOKENS * _PAGE_TOKENS), reason


def _apply(config: Any, options: ExLlamaV2Options, context: int) -> None:
    config.max_seq_len = context
    config.max_input_len = min(config.max_input_len, context)
    config.no_flash_attn = config.no_flash_attn or options.no_flash_attn or _is_old_gpu()
    if options.alpha_value != 1:
        config.scale_alpha_value = options.alpha_value
    if options.compress_pos_emb != 1:
        config.scale_pos_emb = options.compress_pos_emb
    if options.rope_freq_base:
        config.rotary_embedding_base = options.rope_freq_base
    if options.num_experts_per_token and config.num_experts:
        config.num_experts_per_token = min(options.num_experts_per_token, config.num_experts)


def _load(library: ModuleType, loaded: Any, options: ExLlamaV2Options, layers: Callable[[int, int], None]) -> Any:
    """Read the weights; returns the cache."""
    import torch

    make = getattr(library, CACHES[options.cache_type][0])
    split = gigabytes("gpu_split", options.gpu_split)
    if split or not options.autosplit:
        loaded.load(split or None, callback=layers)
        return make(loaded, max_seq_len=loaded.config.max_seq_len)
    cache = make(loaded, max_seq_len=loaded.config.max_seq_len, lazy=True)
    kept = [memory_fit.KEPT_FREE_BYTES] + [256_000_000] * (torch.cuda.device_count() - 1)
    loaded.load_autosplit(cache, reserve_vram=kept, last_id_only=True, callback=layers)
    return cache


def _layers(progress: LoadProgress, at: int, of: int) -> None:
    progress(0.1 + 0.85 * at / max(1, of), f"Reading the weights: part {min(at + 1, of)} of {of}")


def _is_old_gpu() -> bool:
    """Whether a GPU is older than Ampere: flash-attn 2 cannot compute on it."""
    import torch

    return any(torch.cuda.get_device_capability(at)[0] < 8 for at in range(torch.cuda.device_count()))


def _attention() -> Any:
    return importlib.import_module("exllamav2.attn")


def _settle() -> None:
    """Wait until everything is on the GPU: another thread computes with it."""
    import torch

    torch.cuda.synchronize()


def _free() -> None:
    import torch

    free_memory(torch.device("cuda"))


def _in_words(error: Exception, model: LocalModel) -> LoadFailed:
    if "out of memory" in str(error).lower() or "Insufficient" in str(error):
        return NotEnoughMemory(
            f"There is not enough memory on the GPU for {model.name} ({format_bytes(model.size_bytes)}) with its "
            "conversation. Choose a smaller max_seq_len, a smaller cache type, or a smaller branch."
        )
    log.error("ExLlamaV2 cannot open %s\n%s", model.name, trace(error))
    return LoadFailed(f"ExLlamaV2 cannot open {model.name}: {in_words(error)}. Use the loader transformers.")
