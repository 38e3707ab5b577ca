"""The option tensor_parallel of the loader transformers: what refuses it, what fits on each GPU, and the load."""

import logging
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ...core.errors import LoadCancelled, NotEnoughMemory
from ...core.folder_files import read_json
from ...core.models import LocalModel
from ...core.units import format_bytes
from ...gptq.parallel.dividing import MOST_RANKS, why_not
from ..contract.base import LoadProgress, Refusal
from ..machine import memory_fit
from ..machine.capabilities import Machine
from ..machine.gpus import GpuInfo, count_of_torch, visible_gpus
from ..machine.memory_release import free_memory
from ..text.tokenizer import read_tokenizer
from .transformers_options import TransformersOptions, device_of, dtype_of

if TYPE_CHECKING:
    from ..pretrained.divided_model import DividedModel

log = logging.getLogger(__name__)

_ALONE = "set tensor_parallel to 1"


def refusal(model: LocalModel, options: TransformersOptions, machine: Machine) -> Refusal | None:
    """Why a model cannot be loaded with tensor_parallel as it is set; None if it can."""
    ranks = options.tensor_parallel
    if options.device != "cpu":
        if not machine.cuda:
            return Refusal("tensor_parallel is for several GPUs, and there is none that torch can use", _ALONE)
        if sys.platform != "linux":
            return Refusal("tensor_parallel joins GPUs by NCCL, which is for Linux", _ALONE)
        if (found := len(visible_gpus()) or count_of_torch()) < ranks:
            cure = f"set it to {found}" if found > 1 else _ALONE
            return Refusal(f"tensor_parallel {ranks} needs {ranks} GPUs, and this machine has {found}", cure)
    for set_too, what in (
        (options.kernel != "native", f"the kernel {options.kernel}"),
        (bool(options.lora.strip()), "a LoRA adapter"),
        (bool(options.draft_model.strip()), "a draft model"),
        (options.trust_remote_code, "the model's own code"),
        (bool(options.gpu_memory.strip()), "a split of the GPU memory"),
    ):
        if set_too:
            return Refusal(f"tensor_parallel and {what} exclude each other", f"leave one of them out, or {_ALONE}")
    why, cure = why_not(model, read_json(model.folder / "config.json"), ranks)
    return Refusal(why, cure) if why else None


def chosen(
    model: LocalModel,
    options: TransformersOptions,
    machine: Machine,
    memory: memory_fit.Memory,
    demand: Callable[[TransformersOptions], memory_fit.Demand],
) -> tuple[TransformersOptions, str]:
    """(with the number of GPUs that compute together, a note or ""). Where it is left open: 1 if one holds the model, or if no
    number of them can; else the fewest that hold it, since split by layers they would work one after the other.

    `demand`: of options.
    """
    if options.tensor_parallel:
        return options, ""
    alone = replace(options, tensor_parallel=1)
    if memory.gpu is None or options.device not in ("auto", "cuda") or memory_fit.of(model, demand(alone), memory).fits:
        return alone, ""
    there = visible_gpus()
    if len({each.name for each in there}) > 1:
        return (
            alone,
            "The GPUs work one after the other, not together: they are of several kinds, and the slowest would set the speed.",
        )
    refused: Refusal | None = None
    for ranks in range(2, min(MOST_RANKS, len(there)) + 1):
        several = replace(options, tensor_parallel=ranks)
        if (why := refusal(model, several, machine)) is not None:
            refused = refused or why
        elif memory_fit.of(model, demand(several), of_every_gpu(memory, ranks, there)).fits:
            return several, ""
    return alone, f"The GPUs work one after the other, not together: {refused.reason}." if refused is not None else ""


def load_or_leave(
    model: LocalModel, options: TransformersOptions, progress: LoadProgress, optional: bool
) -> tuple["DividedModel | None", str]:
    """(the model, ""), or (None, a note) where that is `optional` and fails. Raises as `load`."""
    try:
        return load(model, options, progress), ""
    except LoadCancelled:
        raise
    except Exception as error:
        if not optional:
            raise
        log.warning("%d GPUs could not compute together: %s", options.tensor_parallel, error, exc_info=error)
        return None, (
            f"The GPUs work one after the other, since {options.tensor_parallel} of them could not compute together; the log has "
            "the details."
        )


def of_every_gpu(memory: memory_fit.Memory, ranks: int, there: list[GpuInfo] | None = None) -> memory_fit.Memory:
    """With what is free on the fullest of the GPUs, `there` or those that torch uses. What a loaded model will free counts."""
    found = [each.free_bytes for each in (visible_gpus() if there is None else there)[:ranks]]
    if memory.gpu is None or not found:
        return memory
    released = max(0, memory.gpu - found[0])
    free = [each + _released_on(at, released) for at, each in enumerate(found)]
    return replace(memory, gpu=min(memory.gpu, *free))


_divided: "weakref.WeakSet[DividedModel]" = weakref.WeakSet()  # that are loaded, and those that were


def _released_on(gpu: int, on_first: int) -> int:
    """Bytes that the loaded model will free on a GPU, if it frees so many on the first."""
    if gpu == 0 or any(each.ranks > gpu for each in _divided if each.is_loaded):
        return on_first
    torch = sys.modules.get("torch")
    return int(torch.cuda.memory_allocated(gpu)) if torch is not None and torch.cuda.is_initialized() else 0


def load(model: LocalModel, options: TransformersOptions, progress: LoadProgress) -> "DividedModel":
    """Raises GptqWebuiError with a sentence; every process has ended and everything is freed if it does."""
    import torch

    from ...gptq.parallel import first_rank
    from ..pretrained.divided_model import DividedModel

    ranks = options.tensor_parallel
    device = device_of(options)
    first = torch.device("cuda", 0) if device.type == "cuda" else device
    progress(0.1, "Reading the tokenizer")
    tokenizer = read_tokenizer(model)
    progress(0.15, f"Starting {ranks} processes for {format_bytes(model.size_bytes)} of weights")

    def tell(share: float, text: str) -> None:
        progress(0.15 + 0.78 * share, text)

    stepper: Any = None
    try:
        hf, stepper, notes = first_rank.load(
            model, ranks, dtype=dtype_of(options, device), device=device.type, rope=options.rope, tell=tell
        )
        progress(0.95, "Fitting the conversation into the memory")
        free = memory_fit.Memory(0, memory_fit.available_bytes(first))
        free = of_every_gpu(free, ranks) if device.type == "cuda" else free
        context, reason = memory_fit.fit_context(model, options.demand(model, device.type == "cuda"), free.gpu or 0)
        stepper.limit(context)
        notes = (*notes, f"Computed by {ranks} {'GPUs' if device.type == 'cuda' else 'processes'} together (tensor parallel).")
        loaded = DividedModel(model, stepper, hf.generation_config, tokenizer, context, reason, notes, first, ranks)
        _divided.add(loaded)
    except BaseException as error:
        if stepper is not None:
            stepper.close()
        free_memory(first)
        if memory_fit.is_out_of_memory(error) and not isinstance(error, NotEnoughMemory):
            where = "a GPU" if device.type == "cuda" else "this machine"
            raise NotEnoughMemory(
                f"There is not enough memory on {where} for a share of {model.name} "
                f"({format_bytes(model.size_bytes)} for {ranks} processes). Close other programs, or choose a smaller branch "
                "(fewer bits, larger group)."
            ) from None
        raise
    progress(1.0, "Ready")
    return loaded
